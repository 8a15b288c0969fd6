# mypy: disable-error-code="type-arg"
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Piece(_message.Message):
    __slots__ = ("data", "deflated", "total")
    DATA_FIELD_NUMBER: _ClassVar[int]
    DEFLATED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    deflated: bool
    total: int
    def __init__(self, data: _Optional[bytes] = ..., deflated: _Optional[bool] = ..., total: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("run", "sha256", "offset")
    RUN_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    run: str
    sha256: bytes
    offset: int
    def __init__(self, run: _Optional[str] = ..., sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("envelope", "signature")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    envelope: bytes
    signature: bytes
    def __init__(self, envelope: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("offer", "piece")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    offer: Offer
    piece: Piece
    def __init__(self, offer: _Optional[_Union[Offer, _Mapping]] = ..., piece: _Optional[_Union[Piece, _Mapping]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("record", "signature", "certificate")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    record: bytes
    signature: bytes
    certificate: bytes
    def __init__(self, record: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., certificate: _Optional[bytes] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("offset", "receipt")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    offset: int
    receipt: Receipt
    def __init__(self, offset: _Optional[int] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class RoundStatus(_message.Message):
    __slots__ = ("run", "round", "verb", "open", "asked", "accepted", "bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    verb: str
    open: bool
    asked: int
    accepted: int
    bytes: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., verb: _Optional[str] = ..., open: _Optional[bool] = ..., asked: _Optional[int] = ..., accepted: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("run", "rounds", "committed", "seconds", "round_seconds", "finished", "up_bytes", "down_bytes")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    UP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    rounds: int
    committed: int
    seconds: float
    round_seconds: float
    finished: bool
    up_bytes: int
    down_bytes: int
    def __init__(self, run: _Optional[str] = ..., rounds: _Optional[int] = ..., committed: _Optional[int] = ..., seconds: _Optional[float] = ..., round_seconds: _Optional[float] = ..., finished: _Optional[bool] = ..., up_bytes: _Optional[int] = ..., down_bytes: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("oldest_protocol", "newest_protocol", "sequence", "now", "rounds", "uploads", "free_bytes", "runs", "present", "names")
    OLDEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NEWEST_PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    oldest_protocol: int
    newest_protocol: int
    sequence: int
    now: float
    rounds: _containers.RepeatedCompositeFieldContainer[RoundStatus]
    uploads: int
    free_bytes: int
    runs: _containers.RepeatedCompositeFieldContainer[RunStatus]
    present: int
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, oldest_protocol: _Optional[int] = ..., newest_protocol: _Optional[int] = ..., sequence: _Optional[int] = ..., now: _Optional[float] = ..., rounds: _Optional[_Iterable[_Union[RoundStatus, _Mapping]]] = ..., uploads: _Optional[int] = ..., free_bytes: _Optional[int] = ..., runs: _Optional[_Iterable[_Union[RunStatus, _Mapping]]] = ..., present: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "found", "expected", "do", "retry_after")
    CODE_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    DO_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    code: str
    found: str
    expected: str
    do: str
    retry_after: float
    def __init__(self, code: _Optional[str] = ..., found: _Optional[str] = ..., expected: _Optional[str] = ..., do: _Optional[str] = ..., retry_after: _Optional[float] = ...) -> None: ...
