# mypy: disable-error-code="type-arg"
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_VALUES: _ClassVar[Kind]
    KIND_LEVELS: _ClassVar[Kind]
    KIND_RING: _ClassVar[Kind]
    KIND_STATE: _ClassVar[Kind]
    KIND_WHOLE: _ClassVar[Kind]
    KIND_RING64: _ClassVar[Kind]
    KIND_CHANGES: _ClassVar[Kind]

class Scaling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCALING_UNSPECIFIED: _ClassVar[Scaling]
    SCALING_TENSOR: _ClassVar[Scaling]
    SCALING_BLOCK64: _ClassVar[Scaling]
    SCALING_KEPT: _ClassVar[Scaling]
KIND_UNSPECIFIED: Kind
KIND_VALUES: Kind
KIND_LEVELS: Kind
KIND_RING: Kind
KIND_STATE: Kind
KIND_WHOLE: Kind
KIND_RING64: Kind
KIND_CHANGES: Kind
SCALING_UNSPECIFIED: Scaling
SCALING_TENSOR: Scaling
SCALING_BLOCK64: Scaling
SCALING_KEPT: Scaling

class Metric(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("version", "run", "round", "client", "verb", "schema", "base", "kind", "weight", "metrics", "entries", "scaling", "exponent", "dtypes", "digest", "scales", "since", "payload")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    SCALING_FIELD_NUMBER: _ClassVar[int]
    EXPONENT_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    version: int
    run: str
    round: int
    client: int
    verb: str
    schema: bytes
    base: str
    kind: Kind
    weight: float
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    scaling: Scaling
    exponent: int
    dtypes: bytes
    digest: bytes
    scales: bytes
    since: int
    payload: bytes
    def __init__(self, version: _Optional[int] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., client: _Optional[int] = ..., verb: _Optional[str] = ..., schema: _Optional[bytes] = ..., base: _Optional[str] = ..., kind: _Optional[_Union[Kind, str]] = ..., weight: _Optional[float] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., scaling: _Optional[_Union[Scaling, str]] = ..., exponent: _Optional[int] = ..., dtypes: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., scales: _Optional[bytes] = ..., since: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...
