"""A client and the body service: the same numbers as the whole model, on a socket or in one process, and the
bytes that the formula says."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.split.channel import Broken, Channel, Socket
from fedtune.split.codec import Coding, size_of
from fedtune.split.cut import Side
from fedtune.split.grpc_server import serve
from fedtune.split.micro import Micro, Wishes
from fedtune.split.pipeline import infer, train
from fedtune.split.service import Service, Terms
from fedtune.split.session import Tokens
from fedtune.split.stream import Stream
from fedtune.wire.v1 import split_pb2 as pb
from tests.split.link import Link
from tests.split.plain import (
    KEY,
    OFFER,
    PROMPTS,
    WIDTH,
    Batch,
    Model,
    batches,
    listening,
    near,
    opened,
    run,
    served,
    split_step,
    turn,
)

ROWS, LENGTH, MICROS = 4, 61, 4
TOKENS = ROWS * (LENGTH + PROMPTS)  # 256 of width 16: 16 KiB of float32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def equal(a: tuple[list[float], list[torch.Tensor]], b: tuple[list[float], list[torch.Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize(
    "wishes", [{}, {"lean": True}, {"window": 1}, {"masked": True, "positioned": True}], ids=str
)
def test_training_over_a_socket_and_in_one_process_equals_the_whole_model(wishes: dict[str, Any]) -> None:
    oracle = run(None)
    stream = opened(near(served()), **wishes)
    assert equal(run(stream), oracle)
    with listening() as (service, dial):
        remote = opened(dial, **wishes)
        assert equal(run(remote), oracle)
        remote.close()
        assert (remote.sent, remote.received) == (stream.sent + 2, stream.received)  # and BYE
        assert not service.errors and service.live == 0 and service.held.size == 0


@pytest.mark.parametrize(
    ("coding", "most"), [(Coding("fp16"), 1e-3), (Coding("bf16"), 5e-3), (Coding("int8", 16), 1e-2)]
)
def test_a_coarser_coding_is_close(coding: Coding, most: float) -> None:
    (losses, _), (wanted, _) = run(opened(near(served()), coding=coding)), run(None)
    assert 0 < max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < most


def step_bytes(wishes: dict[str, Any]) -> tuple[int, int, int, int]:
    """Bytes of a step of four micro-batches: of frames up and down, and of the socket up and down."""
    with listening() as (_, dial):
        link = Link(dial.port)
        stream, model, todo = (
            opened(lambda: Socket(f"127.0.0.1:{link.port}"), **wishes),
            Model(),
            batches(MICROS, rows=ROWS, length=LENGTH),
        )
        split_step(model, stream, todo)
        before = stream.sent, stream.received, link.up, link.down
        split_step(model, stream, todo)
        after = stream.sent, stream.received, link.up, link.down
        stream.close()
        link.close()
    return tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("lean", "coding", "width"),
    [
        (False, Coding("fp32"), 4),
        (True, Coding("fp32"), 4),
        (True, Coding("fp16"), 2),
        (False, Coding("int8", 0), 1 + 2 / WIDTH),
    ],
)
def test_bytes_are_those_of_the_formula(lean: bool, coding: Coding, width: float) -> None:
    """Up: hidden states and gradients, and the hidden states again unless lean, with a byte a token for the
    mask and 4 for positions each
    time. Down: activations and gradients. 100 bytes a frame are 0.1 % of the 100 KB that a real micro-batch
    has."""
    up, down, socket_up, socket_down = step_bytes({"lean": lean, "coding": coding})
    side, hidden = TOKENS * (1 + 4), TOKENS * WIDTH * width
    says = 1 if lean else 2
    formula_up, formula_down = MICROS * (says * (hidden + side) + hidden), MICROS * 2 * hidden
    assert 0 <= up - formula_up <= 2 * MICROS * 50 and 0 <= down - formula_down <= 2 * MICROS * 50
    assert up <= socket_up <= up + 2 * MICROS * 150 and down <= socket_down <= down + 2 * MICROS * 150


class Wide:
    """A body that changes nothing, for counting."""

    def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        return hidden

    def backward(self, hidden: torch.Tensor, side: Side, grad: torch.Tensor) -> torch.Tensor:
        return grad


@pytest.mark.parametrize("lean", [False, True])
def test_bytes_of_a_real_size_are_within_a_thousandth(lean: bool) -> None:
    """Four micro-batches of 8 x 205 tokens of width 768, like a ViT-B's with prompts: 5 MB each, in parts of
    1 MiB."""
    offer = replace(OFFER, width=768)
    service = Service(Wide(), offer, Tokens(KEY).admit)
    stream = Stream(near(service), offer, turn(), Wishes(Coding("fp32"), 4, lean=lean))
    micros = [Micro(torch.ones(8, 205, 768, requires_grad=True)) for _ in range(4)]
    train(stream, micros, lambda micro: micro, lambda micro, hidden: hidden.sum())
    formula = 4 * 2 * 8 * 205 * 768 * 4
    again = 0 if lean else formula // 2
    assert (
        0 <= stream.sent - formula - again < 0.001 * formula
        and 0 <= stream.received - formula < 0.001 * formula
    )


# --- slim
# ------------------------------------------------------------------------------------------------------------


def smashed(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """What enters at the cut where prompts do: the frozen head's output of the text alone."""
    return model.first(model.embed(ids), Side()).detach()


def slim_parts(model: Model, rows: str, ids: list[int] | None = None) -> tuple[Any, Any]:
    """Head and tail with prompts at the cut; the tail reads one row of every example."""

    def head(batch: Batch) -> Micro:
        tokens = batch[0].shape[1] + PROMPTS
        chosen = (
            {"row": 0}
            if rows == "row"
            else {"rows": torch.arange(len(batch[0])) * tokens}
            if rows == "rows"
            else {}
        )
        named = [int(value) for value in batch[0][:, 0] * 100 + batch[0][:, 1]] if ids is not None else ()
        if ids is not None:
            ids.extend(named)
        return Micro(lambda: smashed(model, batch[0]), batch[1], model.prompts, 0, samples=named, **chosen)

    def tail(batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        first = hidden[:, 0] if rows == "all" else hidden
        return torch.nn.functional.cross_entropy(model.tail(first), batch[2]) / MICROS

    return head, tail


def naive(model: Model, todo: list[Batch]) -> list[float]:
    losses = []
    for ids, side, labels in todo:
        hidden = torch.cat([model.prompts.expand(len(ids), -1, -1), smashed(model, ids)], 1)
        loss = torch.nn.functional.cross_entropy(model.tail(model.body(hidden, side)[:, 0]), labels) / MICROS
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("rows", ["all", "row", "rows"])
@pytest.mark.parametrize("lean", [False, True])
def test_prompts_at_the_cut_and_rows_that_come_down(rows: str, lean: bool) -> None:
    """The prompts' gradient is summed at the service; nothing else of the body's input comes down."""
    todo, whole, model = batches(MICROS, rows=3), Model(), Model()
    wanted = naive(whole, todo)
    with listening() as (_, dial):
        stream = opened(dial, prompts=PROMPTS, lean=lean)
        assert train(stream, todo, *slim_parts(model, rows)) == wanted
        stream.close()
    for mine, theirs in zip(model.trained, whole.trained, strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_samples_are_sent_once_and_again_where_they_were_lost() -> None:
    """Twelve samples: 12 x 6 x 16 numbers once; then each step sends prompts and 12 gradient rows, and the
    gradients are the same."""
    todo, model, whole = batches(MICROS, rows=3), Model(), Model()
    service, ids = served(), list[int]()
    stream = opened(near(service), prompts=PROMPTS, lean=True, cache=True)
    head, tail = slim_parts(model, "row", ids)
    before = stream.sent, stream.received
    train(stream, todo, head, tail)
    first = stream.sent - before[0]
    train(stream, todo, head, tail)
    second, down = stream.sent - before[0] - first, (stream.received - before[1]) // 2
    assert len(set(ids)) == 12 and first - second == 12 * 6 * WIDTH * 4 + MICROS * 11  # 11: a header
    side, frames = 3 * 9 * 5, 8 * 60
    assert (
        0 < second - MICROS * (PROMPTS + 3) * WIDTH * 4 - MICROS * side < frames
        and 0 < down - MICROS * (PROMPTS + 3) * WIDTH * 4 < frames
    )
    stream.close()
    stream = Stream(near(service), OFFER, turn(), stream.wishes, held=stream.held)  # the next round's
    before = stream.sent, stream.received
    train(stream, todo, head, tail)
    assert stream.sent - before[0] == second and not service.errors
    for key in list(service.held.entries):
        service.held.drop(key)  # as after a restart
    train(stream, todo, head, tail)
    assert service.errors == {"S713": 4} and stream.again == 4
    for _ in range(4):
        wanted = naive(whole, todo)
    assert wanted == train(opened(near(service), prompts=PROMPTS), todo, *slim_parts(Model(), "row"))
    assert all(
        torch.equal(mine.grad, theirs.grad) for mine, theirs in zip(model.trained, whole.trained, strict=True)
    )


def text_micro(
    model: Model, ids: torch.Tensor, lengths: list[int], samples: list[int], told: list[int]
) -> Micro:
    """Texts of these lengths, padded to the longest; what the head computes is noted in `told`."""
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(torch.uint8)
    own = torch.stack(
        [
            torch.cat([ids[n, :length], torch.zeros(longest - length, dtype=torch.long)])
            for n, length in enumerate(lengths)
        ]
    )

    def hidden() -> torch.Tensor:
        told.extend(samples)
        return model.first(model.embed(own), Side(mask)).detach()

    return Micro(
        hidden,
        Side(torch.cat([mask.new_ones(len(mask), PROMPTS), mask], 1)),
        model.prompts,
        0,
        row=0,
        samples=samples,
    )


def test_padded_samples_come_back_in_other_company() -> None:
    """Texts of 6, 3 and 5 tokens, sent two by two, then in a batch of the two shorter ones: padded to 5, no
    longer to 6, nothing is sent again
    and the answer is that of the text sent whole. A text that changed its length under the same id is asked
    for again."""
    model, told, service = Model(), list[int](), served()
    ids = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(1))
    stream = opened(near(service), prompts=PROMPTS, cache=True)

    def ask(lengths: list[int], samples: list[int], through: Stream = stream) -> torch.Tensor:
        through.forward(text_micro(model, ids[samples], lengths, samples, told))
        answer = through.answer()
        through.done(answer.sequence)
        return answer.value

    ask([6, 3], [0, 1])
    ask([5, 6], [2, 0])
    assert told == [0, 1, 2, 0]
    again = ask([3, 5], [1, 2])
    assert told == [0, 1, 2, 0] and not service.errors
    assert torch.allclose(
        again, ask([3, 5], [1, 2], opened(near(served()), prompts=PROMPTS)), rtol=0, atol=1e-6
    )
    told.clear()
    ask([4, 5], [1, 2])
    assert told == [1, 2] and service.errors == {"S713": 1}


def test_without_its_consent_nothing_of_a_client_is_held() -> None:
    service = served()
    seen: list[int] = []
    real = service.held.put
    service.held.put = lambda *args: (seen.append(1), real(*args))[1]  # type: ignore[method-assign]
    run(opened(near(service)))
    assert not seen


# --- window, order, evaluation
# ----------------------------------------------------------------------------------------


def test_no_more_micro_batches_are_in_flight_than_were_granted() -> None:
    service = served(Terms(credits=2))
    stream = opened(near(service), window=8)
    assert stream.window == 2
    most, put = 0, service.merger.submit

    def submit(job: Any) -> None:
        nonlocal most
        put(job)
        most = max(most, service.live)

    service.merger.submit = submit  # type: ignore[method-assign]
    run(stream, micros=8)
    assert most == 2


def test_the_window_is_shared_among_those_who_are_there() -> None:
    """8 in all: the first gets 8, with a second each has 4, and 8 again when it is gone."""
    service = served(Terms(credits=8, together=8))
    first = opened(near(service), 0, window=8)
    second = opened(near(service), 1, window=8)
    assert (first.window, second.window) == (8, 4)
    run(first, steps=1)
    assert first.window == 4
    second.close()
    run(first, steps=1)
    assert first.window == 8


def test_answers_in_another_order_give_the_same_sums() -> None:
    class Shuffled:
        """A channel whose answers come in pairs the wrong way round."""

        def __init__(self, inner: Channel) -> None:
            self.inner, self.kept = inner, list[bytes]()
            self.sent = self.received = 0

        def send(self, message: bytes) -> None:
            self.inner.send(message)

        def receive(self) -> bytes:
            if not self.kept:
                self.kept.append(self.inner.receive())
                with contextlib.suppress(Broken):
                    self.kept.append(self.inner.receive())
            return self.kept.pop()

        def close(self) -> None:
            self.inner.close()

    stream = opened(near(served(merging=None)))
    stream.channel = Shuffled(stream.channel)  # type: ignore[arg-type]
    assert equal(run(stream), run(None))


def test_evaluation_brings_activations_in_order() -> None:
    model, todo, seen = Model(), batches(6), []
    with listening() as (service, dial):
        stream = opened(dial)
        infer(
            stream,
            todo,
            lambda b: Micro(model.head(b[0], b[1]), b[1]),
            lambda b, hidden: seen.append((b, hidden)),
        )
        assert service.merger.counts.jobs == 6 and not stream.flights
        stream.close()
    assert all(
        torch.equal(hidden, model.body(model.head(b[0], b[1]), b[1])) and b is todo[i]
        for i, (b, hidden) in enumerate(seen)
    )


def test_a_frozen_head_needs_no_gradient() -> None:
    model = Model()
    model.prompts.requires_grad_(False)
    service = served()
    split_step(model, opened(near(service)), batches(4))
    assert service.merger.counts.jobs == 4 and model.tail.weight.grad is not None


# --- what arrives is what was sent
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["mask", "positions", "sequence", "answer"])
def test_a_message_changed_under_way_is_caught(change: str) -> None:
    """A mask dropped, positions shifted, two numbers swapped, an answer to another micro-batch: each ends the
    step with a sentence."""

    class Spoiled:
        def __init__(self, inner: Channel) -> None:
            self.inner, self.sent, self.received = inner, 0, 0

        def send(self, message: bytes) -> None:
            frame = pb.Frame.FromString(message)
            if change == "mask":
                self.drop(frame, pb.ROLE_MASK)
            elif change == "positions":
                self.drop(frame, pb.ROLE_POSITIONS, shift=True)
            elif change == "sequence" and frame.sequence:
                frame.sequence += 1 if frame.sequence % 2 else -1
            self.inner.send(frame.SerializeToString())

        def drop(self, frame: pb.Frame, role: int, shift: bool = False) -> None:
            at = 0
            for place, header in enumerate(frame.tensors):
                size = size_of(header)
                if header.role == role:
                    values = (
                        torch.frombuffer(
                            bytearray(frame.payload[at : at + size]),
                            dtype=torch.int32 if shift else torch.uint8,
                        )
                        + 1
                    )
                    frame.payload = (
                        frame.payload[:at]
                        + (bytes(values.numpy().data) if shift else b"")
                        + frame.payload[at + size :]
                    )
                    if not shift:
                        del frame.tensors[place]
                    return
                at += size

        def receive(self) -> bytes:
            frame = pb.Frame.FromString(self.inner.receive())
            if change == "answer" and frame.sequence:
                frame.sequence += 1 if frame.sequence % 2 else -1
            return frame.SerializeToString()

        def close(self) -> None:
            self.inner.close()

    stream = opened(near(served()))
    stream.channel = Spoiled(stream.channel)  # type: ignore[arg-type]
    with pytest.raises(FedtuneError, match="S717"):
        run(stream)


# --- TLS
# ------------------------------------------------------------------------------------------------------------


def authority() -> Iterator[tuple[bytes, bytes]]:
    """PEM of a key and its certificate: the authority itself, then as many members as are asked for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
    signer = None
    while True:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = (
            name if signer is None else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "member")])
        )
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
        )
        made = made.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(hours=1)
        )
        made = made.add_extension(x509.BasicConstraints(signer is None, None), True)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        certificate = made.sign(signer or key, hashes.SHA256())
        signer = signer or key
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        yield pem, certificate.public_bytes(serialization.Encoding.PEM)


def test_mutual_tls() -> None:
    """A member trains; a stranger with a certificate of its own, and one without any, are not even heard."""
    made = authority()
    (_, root), (server_key, server_cert), (client_key, client_cert) = next(made), next(made), next(made)
    stranger = authority()
    next(stranger)
    odd_key, odd_cert = next(stranger)
    service = served()
    peers: list[str] = []
    admit = service.admit
    service.admit = lambda hello, peer: (peers.append(peer), admit(hello, peer))[1]
    service.start()
    server, port = serve(
        service, "localhost:0", grpc.ssl_server_credentials([(server_key, server_cert)], root, True)
    )
    address = f"localhost:{port}"
    try:
        member = grpc.ssl_channel_credentials(root, client_key, client_cert)
        stream = Stream(
            lambda: Socket(address, member), OFFER, turn(peer="member"), Wishes(Coding("fp32"), 4)
        )
        assert equal(run(stream), run(None)) and peers == ["member"]
        stream.close()
        for credentials in (
            grpc.ssl_channel_credentials(root, odd_key, odd_cert),
            grpc.ssl_channel_credentials(root),
        ):
            with pytest.raises(FedtuneError, match="S711"):
                opened(lambda c=credentials: Socket(address, c), patience=0.0)
        assert len(peers) == 1
    finally:
        service.stop()
        server.stop(0)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "body.example.org:1", "192.168.1.2:1"])
def test_without_certificates_only_this_machine(address: str) -> None:
    with pytest.raises(FedtuneError, match="S716"):
        serve(served(), address)
    with pytest.raises(FedtuneError, match="S716"):
        Socket(address)


def test_a_service_that_is_not_there_is_said_after_the_patience() -> None:
    with pytest.raises(FedtuneError, match="S711: the body service did not answer after"):
        opened(lambda: Socket("127.0.0.1:9"), patience=0.3)
