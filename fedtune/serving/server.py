"""The server: one answer at a time, bounded requests, a token where one is set.

transformers' own (`transformers serve`, 5.23) loads whatever model a request names unless told otherwise,
knows no adapter kinds but peft's, no token and no bound, and needs FastAPI and more. This one serves one
model, with nothing but the standard library.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from fedtune.errors import FedtuneError
from fedtune.serving.asked import ChatRequest, Sampling, TextRequest, read_request

if TYPE_CHECKING:
    from fedtune.model.stream import Answer
    from fedtune.runtime.chat import Talker

BODY = 2**20  # bytes of a request
PATIENCE = 30.0  # seconds for a client to send its request, or to take a piece of the answer
WAITING = 8  # requests that wait for their turn; more are told to come again
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ModelServer(ThreadingHTTPServer):
    """Holds the model; each connection has a thread, and threads take turns at the model."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], talker: Talker, most: int, token: str = "") -> None:
        """most: tokens of an answer. Raises E801 for an address that is not free."""
        self.talker, self.most, self.token = talker, most, token
        self.turn = threading.Lock()
        self.room = threading.BoundedSemaphore(WAITING + 1)
        self.began = int(time.time())
        try:
            super().__init__(address, Handler)
        except OSError as error:
            found = f"the address {address[0]}:{address[1]} ({error.strerror})"
            raise FedtuneError("E801", found, "one that is free", "choose another --listen") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nobody's mistake."""


class Handler(BaseHTTPRequestHandler):
    server: ModelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fedtune", ""
    timeout = PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Questions are nobody else's business."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send({"status": "ok"})
            return
        if not self.allowed():
            return
        if self.path == "/v1/models":
            about = {"id": self.server.talker.name, "object": "model", "owned_by": "fedtune"}
            self.send({"object": "list", "data": [about | {"created": self.server.began}]})
        else:
            self.refuse(HTTPStatus.NOT_FOUND, f"no '{self.path[:80]}' here")

    def do_POST(self) -> None:
        known: dict[str, tuple[type[Sampling], Form]] = {
            "/v1/chat/completions": (ChatRequest, CHAT),
            "/v1/completions": (TextRequest, TEXT),
        }
        body = self.body()
        if body is None or not self.allowed():
            return
        if self.path not in known:
            self.refuse(HTTPStatus.NOT_FOUND, f"no '{self.path[:80]}' here")
            return
        cls, form = known[self.path]
        try:
            asked = read_request(cls, body)
            prompt = prompt_of(self.server.talker, asked)
        except (ValueError, FedtuneError) as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        if not self.server.room.acquire(blocking=False):
            self.refuse(HTTPStatus.TOO_MANY_REQUESTS, f"{WAITING} requests wait already; try again")
            return
        try:
            with self.server.turn:
                self.reply(asked, prompt, form)
        except FedtuneError as error:
            self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        finally:
            self.server.room.release()

    def allowed(self) -> bool:
        """Whether the client may ask; says why not. A page in a browser that reaches this machine under
        another name may not."""
        host = self.headers.get("Host", "").rpartition(":")[0].strip("[]") or self.headers.get("Host", "")
        if not self.server.token:
            if host in LOOPBACK:
                return True
            self.refuse(HTTPStatus.FORBIDDEN, "without a token only this machine may ask, as localhost")
            return False
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), self.server.token.encode()):
            return True
        self.refuse(HTTPStatus.UNAUTHORIZED, "expected Authorization: Bearer with the server's token")
        return False

    def body(self) -> bytes | None:
        """The request's bytes; None after saying why there are none."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length[:12]) > BODY or len(length) > 12:
            self.close_connection = True
            missing = not length.isdecimal()
            status = HTTPStatus.LENGTH_REQUIRED if missing else HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            self.refuse(status, f"expected Content-Length of {BODY:,} bytes or less")
            return None
        body = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":  # which a page of another site cannot send
            self.refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected Content-Type: application/json")
            return None
        return body

    def reply(self, asked: Sampling, prompt: list[int], form: Form) -> None:
        answer = self.server.talker.answer(prompt, wish_of(asked, self.server.most))
        shared = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        shared |= {"model": self.server.talker.name}
        if not asked.stream:
            text = "".join(answer)
            choice = {"index": 0, **form.whole(text), "finish_reason": answer.finish}
            self.send({**shared, "object": form.object, "choices": [choice], "usage": usage(answer)})
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for event in events(asked, answer, form, shared):
                self.wfile.write(event)
                self.wfile.flush()
        except OSError:  # nobody listens any more
            answer.close()
        finally:
            self.close_connection = True

    def refuse(self, status: HTTPStatus, message: str) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.send({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    def send(self, content: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Form:
    """How one of the two interfaces writes an answer."""

    def __init__(
        self, prefix: str, whole_object: str, piece_object: str,
        whole: Callable[[str], dict[str, Any]], piece: Callable[[str], dict[str, Any]],
    ) -> None:  # fmt: skip
        self.prefix, self.object, self.chunk = prefix, whole_object, piece_object
        self.whole, self.piece = whole, piece


CHAT = Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text}},
    lambda text: {"delta": {"role": "assistant", "content": text}},
)
TEXT = Form(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}
)


def prompt_of(talker: Talker, asked: Sampling) -> list[int]:
    if isinstance(asked, ChatRequest):
        return talker.prompt([message.plain for message in asked.messages])
    assert isinstance(asked, TextRequest)
    return talker.text_prompt(asked.text)


def wish_of(asked: Sampling, most: int) -> Any:
    from fedtune.model.stream import Wish

    tokens = min(asked.max_completion_tokens or asked.max_tokens or most, most)
    top_p = 1.0 if asked.top_p is None else asked.top_p
    return Wish(tokens, asked.temperature or 0.0, top_p, asked.seed, asked.stops)


def usage(answer: Answer) -> dict[str, int]:
    total = answer.asked + answer.said
    return {"prompt_tokens": answer.asked, "completion_tokens": answer.said, "total_tokens": total}


def events(asked: Sampling, answer: Answer, form: Form, shared: Mapping[str, Any]) -> Iterator[bytes]:
    """Server-sent events: a chunk a piece, one that says why it ends, the usage if asked for, and DONE."""

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return (
            b"data: "
            + json.dumps({**shared, "object": form.chunk, "choices": choices, **more}).encode()
            + b"\n\n"
        )

    for piece in answer:
        yield event([{"index": 0, **form.piece(piece), "finish_reason": None}])
    last: dict[str, Any] = {"delta": {}} if form is CHAT else {"text": ""}
    yield event([{"index": 0, **last, "finish_reason": answer.finish}])
    if asked.stream_options and asked.stream_options.include_usage:
        yield event([], usage=usage(answer))
    yield b"data: [DONE]\n\n"
