"""A run behind OpenAI's interface, asked by a real HTTP client, and talked with at a terminal."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.model.stream import Wish, begun
from fedtune.runtime.chat import Chat, Talker, talker
from fedtune.serving.server import BODY, ModelServer
from tests import small, tiny
from tests.waiting import PATIENCE

QUESTION = {"messages": [{"role": "user", "content": "say fox"}], "max_tokens": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    rows = [{"prompt": f"say {word}", "response": word} for word in ("fox", "cat", "dog") * 8]
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = small.tree(tiny.llama(place / "model"), file, rounds=1, method__train__lr=0.05)
    tree["data"] |= {"task": "instruct", "max_length": 40}
    return fedtune.simulate(tree, runs=place / "runs").folder


@pytest.fixture(scope="module")
def model(run: Path) -> Talker:
    return talker(run)


def served(model: Talker, token: str = "") -> Iterator[tuple[ModelServer, httpx.Client]]:
    with ModelServer(("127.0.0.1", 0), model, 16, token) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with httpx.Client(
            base_url=f"http://127.0.0.1:{server.server_port}", timeout=PATIENCE, trust_env=False
        ) as client:
            yield server, client
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def client(model: Talker) -> Iterator[httpx.Client]:
    for _, client in served(model):
        yield client


def chunks(client: httpx.Client, path: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream says; its last event is DONE."""
    with client.stream("POST", path, json={**asked, "stream": True}) as response:
        assert response.headers["content-type"] == "text/event-stream"
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_an_answer_is_what_predict_says(run: Path, client: httpx.Client, tmp_path: Path) -> None:
    said = client.post("/v1/chat/completions", json=QUESTION).raise_for_status().json()
    (tmp_path / "asked.jsonl").write_text('{"prompt": "say fox"}\n')
    (wanted,) = fedtune.predict(run, tmp_path / "asked.jsonl", tokens=6)
    assert said["choices"][0]["message"]["content"].strip() == wanted["prediction"]
    assert said["object"] == "chat.completion" and said["model"] == run.name
    assert (
        said["usage"]["total_tokens"] == said["usage"]["prompt_tokens"] + said["usage"]["completion_tokens"]
    )
    assert 1 <= said["usage"]["completion_tokens"] <= 6


def test_a_stream_is_the_answer_in_pieces(client: httpx.Client) -> None:
    whole = client.post("/v1/chat/completions", json=QUESTION).json()["choices"][0]
    made = chunks(client, "/v1/chat/completions", {**QUESTION, "stream_options": {"include_usage": True}})
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in made if one["choices"])
    assert text == whole["message"]["content"]
    assert made[-2]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert made[-1]["usage"]["completion_tokens"] >= 1 and len({one["id"] for one in made}) == 1


def test_texts_are_gone_on_with_and_stop(client: httpx.Client) -> None:
    asked = {"prompt": "the red fox", "max_tokens": 8}
    whole = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    assert "".join(one["choices"][0]["text"] for one in chunks(client, "/v1/completions", asked)) == whole
    middle = whole[len(whole) // 2 :][:2]
    cut = client.post("/v1/completions", json={**asked, "stop": [middle, "never"]}).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(middle)] and cut["finish_reason"] == "stop"
    drawn = {**asked, "temperature": 1.5, "seed": 7}
    assert (
        len({client.post("/v1/completions", json=drawn).json()["choices"][0]["text"] for _ in range(3)}) == 1
    )


def test_the_names_of_models_and_health(run: Path, client: httpx.Client) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == run.name
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/else").status_code == 404


@pytest.mark.parametrize(
    ("status", "path", "content", "headers"),
    [
        (400, "/v1/chat/completions", b"{", {}),
        (400, "/v1/chat/completions", b'{"messages": []}', {}),
        (400, "/v1/chat/completions", b'{"messages": [{"role": "assistant", "content": "a"}]}', {}),
        (400, "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "n": 2}', {}),
        (400, "/v1/completions", b'{"prompt": ["a", "b"]}', {}),
        (400, "/v1/completions", b'{"prompt": "a", "temperature": 9}', {}),
        (404, "/v1/embeddings", b'{"input": "a"}', {}),
        (403, "/v1/completions", b'{"prompt": "a"}', {"Host": "evil.example:80"}),
        (413, "/v1/completions", b"x" * (BODY + 1), {}),
        (415, "/v1/completions", b'{"prompt": "a"}', {"Content-Type": "text/plain"}),
    ],
)  # fmt: skip
def test_what_is_not_as_it_should_be_is_refused(
    status: int, path: str, content: bytes, headers: dict[str, str], client: httpx.Client
) -> None:
    said = client.post(path, content=content, headers={"Content-Type": "application/json"} | headers)
    assert said.status_code == status and said.json()["error"]["message"]


def test_a_token_is_asked_for(model: Talker) -> None:
    for _, client in served(model, token="long and secret"):
        assert client.post("/v1/chat/completions", json=QUESTION).status_code == 401
        wrong, right = ({"Authorization": f"Bearer {token}"} for token in ("long", "long and secret"))
        assert client.get("/v1/models", headers=wrong).status_code == 401
        assert client.post("/v1/chat/completions", json=QUESTION, headers=right).status_code == 200
        assert client.get("/health").status_code == 200


def test_more_than_can_wait_are_told_to_come_again(model: Talker) -> None:
    for server, client in served(model):
        with server.turn:  # as if an answer were being written
            for _ in range(9):
                server.room.acquire()
            assert client.post("/v1/chat/completions", json=QUESTION).status_code == 429
            for _ in range(9):
                server.room.release()
        assert client.post("/v1/chat/completions", json=QUESTION).status_code == 200


def test_a_client_that_hangs_up_leaves_the_model_free(model: Talker) -> None:
    for _, client in served(model):
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as response:
            next(response.iter_lines())
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_both_sides_answer_and_the_model_stays(run: Path, model: Talker) -> None:
    before = model.tunable.read()
    shown: list[tuple[str, str]] = []
    chat = Chat(model, Wish(6))
    said = chat.say("say fox", lambda side, piece: shown.append((side, piece)))
    assert set(said) == {"base", "tuned"} and said["base"] != said["tuned"]
    assert "".join(piece for side, piece in shown if side == "tuned").strip() == said["tuned"]
    again = Chat(model, Wish(6)).say("say fox", lambda side, piece: None)
    assert again == said  # nothing of the base's turn is left in the tuned model
    assert all((value == before[name]).all() for name, value in model.tunable.read().items())
    chat.say("say cat", lambda side, piece: None)
    assert [turn["role"] for turn in chat.past["base"]] == ["user", "assistant"] * 2


def test_questions_come_from_a_pipe(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("say fox\n\n/new\nsay fox\n/bye\nnever\n"))
    assert main(["chat", str(run), "--tokens", "4"]) == 0
    lines = capsys.readouterr().out
    assert lines.count("base: ") == lines.count("tuned: ") == 2
    half = len(lines) // 2
    assert lines[:half] == lines[half:]  # after /new the conversation begins again
    assert main(["chat", str(run), "--say", "say fox", "--only", "tuned", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("tuned: ")


def test_mistakes_are_sentences(
    run: Path,
    tmp_path: Path,
    tiny_bert: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FEDTUNE_SERVE_TOKEN", raising=False)
    for arguments in (
        ["serve", str(run), "--listen", "0.0.0.0:0"],
        ["serve", str(run), "--listen", "nowhere"],
        ["chat", str(run), "--tokens", "0"],
    ):
        assert main(arguments) == 2 and "C103" in capsys.readouterr().err
    tree = small.tree(tiny_bert, small.write_rows(tmp_path), rounds=1)
    with pytest.raises(FedtuneError, match=r"M306: found a conversation with a model of data\.task"):
        talker(fedtune.simulate(tree, runs=tmp_path / "runs").folder)


def test_what_may_begin_a_stop_text_waits() -> None:
    assert (begun("and so", "so on"), begun("and", "so"), begun("xx", "xxx"), begun("", "x")) == (2, 0, 2, 0)
