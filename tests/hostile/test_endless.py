"""A recipe's model whose chat template, tokenizer or sizes never end or want all memory: the site's worker is a
real process here, looked after as fedtune client does it, and the site answers with a code."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.site_config import SiteConfig
from fedtune.deploy.supervisor import Program
from fedtune.deploy.watchdog import Watchdog, overdue
from fedtune.errors import FedtuneError
from fedtune.flower.worker_socket import through
from tests.hostile.coordinator import Taken, taken
from tests.waiting import PATIENCE

# the worker, with seconds in the place of minutes and a machine of a gigabyte; what takes long to import is
# there before anything is timed
WORKER = (
    "import peft, torch, transformers.models.llama.modeling_llama\n"
    "import fedtune.deploy.worker as worker, fedtune.model.hardware as hardware\n"
    "worker.STILL, hardware.free_memory = 20.0, lambda: 1 << 30\n"
    "worker.main()\n"
)
ENDLESS = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a number without end, in one step of C": "{% set n = messages|length + 8 %}{{ (n ** n ** n) % 7 }}",
    "a text of a terabyte": "{{ 'x' * 10 ** 12 }}",
    "a text that doubles": "{% set s = namespace(x='a') %}{% for a in range(99) %}"
    "{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}",
}


@pytest.fixture(scope="module")
def hostile(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with taken(tmp_path_factory.mktemp("endless"), tiny_llama) as made:
        rows = [{"prompt": "the red fox runs over", "response": "the green hill"}] * 40
        made.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield made


class Site:
    """A worker's process and who looks after it, as in fedtune client; started with --partition, so that one
    of it may be asked about many models."""

    def __init__(self, hostile: Taken, home: Path) -> None:
        home.mkdir()
        self.hostile, self.home, self.said = hostile, home, list[str]()
        config = SiteConfig(
            str(hostile.made.authority.place("site-a")),
            hostile.made.server.address,
            str(home),
            str(home / "socket"),
            str(hostile.rows),
            partition=True,
        )
        config.write(home / "worker.json")
        command = [sys.executable, "-c", WORKER, str(home / "worker.json")]
        self.program = Program("worker", command, home / "worker.log", dict(os.environ), own=True)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look_after, daemon=True)
        self.thread.start()

    def _look_after(self) -> None:
        while not self.ended.wait(0.2):
            self.program.look()
            if why := overdue(self.home):
                self.said.append(why)
                self.program.restart()

    def asks(self, model: Path) -> str:
        """The code of its answer to a ticket about a model."""
        data = {
            "source": "jsonl",
            "task": "instruct",
            "path": "x.jsonl",
            "prompt": "prompt",
            "response": "response",
            "max_length": 32,
        }
        ticket = self.hostile.ticket(self.hostile.recipe(data=data, model__name=str(model)))
        said = through(str(self.home / "socket"), {"what": "ticket", "ticket": ticket.decode()}, PATIENCE)
        assert set(said) == {"code", "number"} and "Traceback" not in (self.home / "worker.log").read_text()
        return str(said["code"])

    def close(self) -> None:
        self.ended.set()
        self.thread.join()
        self.program.stop()


@pytest.fixture(scope="module")
def site(hostile: Taken) -> Iterator[Site]:
    made = Site(hostile, hostile.made.root / "home-endless")
    yield made
    made.close()


def changed(model: Path, folder: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(model, folder)
    tree = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(tree | changes))
    return folder


def some(what: dict[str, Any], fast: set[str]) -> list[Any]:
    """All of them, most with -m slow: a worker that was ended takes a while to start."""
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in sorted(what)]


@pytest.mark.parametrize(
    "what", some(ENDLESS, {"a number without end, in one step of C", "a text of a terabyte"})
)
def test_a_chat_template_without_end(what: str, hostile: Taken, site: Site, tmp_path: Path) -> None:
    """The site answers by a code; asked again, it does so at once."""
    folder = shutil.copytree(hostile.model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(ENDLESS[what])
    assert site.asks(folder) in ("M311", "D203")
    ends = len(site.said)
    assert site.asks(folder) in ("M311", "D203") and len(site.said) == ends


SIZES: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**7},
    "width": {"hidden_size": 1 << 20, "intermediate_size": 1 << 22},
    "words": {"vocab_size": 10**10},
}


@pytest.mark.parametrize("what", some(SIZES, {"words"}))
def test_sizes_without_measure(what: str, hostile: Taken, site: Site, tmp_path: Path) -> None:
    model = changed(hostile.model, tmp_path / "model", "config.json", **SIZES[what])
    assert site.asks(model) in ("M301", "M310", "M311")


@pytest.mark.slow
def test_a_tokenizer_that_looks_for_ever(hostile: Taken, site: Site, tmp_path: Path) -> None:
    """A pattern that goes back and forth over each text. Some libraries give up by themselves: then it is a
    tokenizer as others are, and only the base is another one."""
    folder = shutil.copytree(hostile.model, tmp_path / "model")
    tree = json.loads((folder / "tokenizer.json").read_text())
    pattern = {"Regex": "((([a-z ])+)+)+0"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tree["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    assert site.asks(folder) in ("M301", "M311", "W604")


@pytest.mark.thorough
def test_an_honest_model_is_still_read(hostile: Taken, site: Site) -> None:
    """The last step before work: this ticket's base is made up."""
    assert site.asks(hostile.model) == "W604"


@pytest.mark.thorough
def test_memory_is_bounded_while_a_model_is_read_and_not_afterwards(tmp_path: Path) -> None:
    guard = Watchdog(tmp_path)
    with pytest.raises(FedtuneError, match="M311"), guard.bounded("model 'x'", 60.0, memory=64 << 20):
        bytearray(8 << 30)
    assert len(bytearray(2 << 30)) == 2 << 30
