# mypy: disable-error-code="type-arg"
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrameKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_UNSPECIFIED: _ClassVar[FrameKind]
    FRAME_HELLO: _ClassVar[FrameKind]
    FRAME_FORWARD: _ClassVar[FrameKind]
    FRAME_ACTIVATION: _ClassVar[FrameKind]
    FRAME_BACKWARD: _ClassVar[FrameKind]
    FRAME_GRADIENT: _ClassVar[FrameKind]
    FRAME_CREDIT: _ClassVar[FrameKind]
    FRAME_ERROR: _ClassVar[FrameKind]
    FRAME_BYE: _ClassVar[FrameKind]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_HIDDEN: _ClassVar[Role]
    ROLE_MASK: _ClassVar[Role]
    ROLE_POSITIONS: _ClassVar[Role]
    ROLE_PROMPTS: _ClassVar[Role]
    ROLE_ROWS: _ClassVar[Role]
    ROLE_GRADIENT: _ClassVar[Role]

class Number(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NUMBER_UNSPECIFIED: _ClassVar[Number]
    NUMBER_FLOAT32: _ClassVar[Number]
    NUMBER_FLOAT16: _ClassVar[Number]
    NUMBER_BFLOAT16: _ClassVar[Number]
    NUMBER_INT8: _ClassVar[Number]
    NUMBER_UINT8: _ClassVar[Number]
    NUMBER_INT32: _ClassVar[Number]
FRAME_UNSPECIFIED: FrameKind
FRAME_HELLO: FrameKind
FRAME_FORWARD: FrameKind
FRAME_ACTIVATION: FrameKind
FRAME_BACKWARD: FrameKind
FRAME_GRADIENT: FrameKind
FRAME_CREDIT: FrameKind
FRAME_ERROR: FrameKind
FRAME_BYE: FrameKind
ROLE_UNSPECIFIED: Role
ROLE_HIDDEN: Role
ROLE_MASK: Role
ROLE_POSITIONS: Role
ROLE_PROMPTS: Role
ROLE_ROWS: Role
ROLE_GRADIENT: Role
NUMBER_UNSPECIFIED: Number
NUMBER_FLOAT32: Number
NUMBER_FLOAT16: Number
NUMBER_BFLOAT16: Number
NUMBER_INT8: Number
NUMBER_UINT8: Number
NUMBER_INT32: Number

class Tensor(_message.Message):
    __slots__ = ("role", "number", "shape", "group")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    role: Role
    number: Number
    shape: _containers.RepeatedScalarFieldContainer[int]
    group: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., number: _Optional[_Union[Number, str]] = ..., shape: _Optional[_Iterable[int]] = ..., group: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "session", "run", "round", "client", "token", "model", "part", "first", "last", "width", "masked", "positioned", "prompts", "number", "group", "credits", "lean", "cache", "lease", "largest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    POSITIONED_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    LEAN_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LARGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    session: str
    run: str
    round: int
    client: int
    token: str
    model: str
    part: str
    first: int
    last: int
    width: int
    masked: bool
    positioned: bool
    prompts: int
    number: Number
    group: int
    credits: int
    lean: bool
    cache: bool
    lease: int
    largest: int
    def __init__(self, version: _Optional[int] = ..., session: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., client: _Optional[int] = ..., token: _Optional[str] = ..., model: _Optional[str] = ..., part: _Optional[str] = ..., first: _Optional[int] = ..., last: _Optional[int] = ..., width: _Optional[int] = ..., masked: _Optional[bool] = ..., positioned: _Optional[bool] = ..., prompts: _Optional[int] = ..., number: _Optional[_Union[Number, str]] = ..., group: _Optional[int] = ..., credits: _Optional[int] = ..., lean: _Optional[bool] = ..., cache: _Optional[bool] = ..., lease: _Optional[int] = ..., largest: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "found", "expected", "advice", "samples")
    CODE_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    code: str
    found: str
    expected: str
    advice: str
    samples: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, code: _Optional[str] = ..., found: _Optional[str] = ..., expected: _Optional[str] = ..., advice: _Optional[str] = ..., samples: _Optional[_Iterable[int]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("kind", "sequence", "part", "tensors", "payload", "digest", "at", "row", "samples", "credits", "hello", "failure")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    kind: FrameKind
    sequence: int
    part: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    payload: bytes
    digest: bytes
    at: int
    row: int
    samples: _containers.RepeatedScalarFieldContainer[int]
    credits: int
    hello: Hello
    failure: Failure
    def __init__(self, kind: _Optional[_Union[FrameKind, str]] = ..., sequence: _Optional[int] = ..., part: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., payload: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., at: _Optional[int] = ..., row: _Optional[int] = ..., samples: _Optional[_Iterable[int]] = ..., credits: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...
