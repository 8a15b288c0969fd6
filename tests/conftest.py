"""What all tests share: one thread, no network, and tiny models made once a session."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# Two hundred programs would each compile the library anew, and every run all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A shell's background job ignores interrupts, and so would the programs that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes is a matter of what else runs on the machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

TESTS = Path(__file__).resolve().parent
WORKERS = (
    4  # at most: each holds torch, and the tests of real deployments start a dozen processes beside them
)


class OneDeploymentAtATime(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests share their models, so they stay on one worker; so do all of tests/e2e, whose
    federations would only slow one another."""

    def _split_scope(self, nodeid: str) -> str:
        return "e2e" if in_e2e(nodeid) else nodeid.partition("::")[0]


def in_e2e(nodeid: str) -> bool:
    return nodeid.startswith("tests/e2e/")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return OneDeploymentAtATime(config, log)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core that this process may use, and two more, since a fifth of the time goes into waiting
    for other programs, as far as there are 3 GB for each; none of its own for a single file, which would not be
    divided."""
    files = {argument.partition("::")[0] for argument in config.args}
    if len(files) == 1 and Path(*files).is_file():
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(WORKERS, len(os.sched_getaffinity(0)) + 2, memory // (3 << 30)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """A worker imports the files of its own share before all others: so the workers rewrite the assertions of a
    new clone once between them, and not each for itself at the same time."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None:
        return
    asked = [Path(argument).resolve() for argument in session.config.args]
    files = sorted(file for file in TESTS.rglob("test_*.py") if any(map(file.is_relative_to, asked)))
    names = [".".join(file.relative_to(TESTS.parent).with_suffix("").parts) for file in files]
    begin = len(names) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for name in names[begin:] + names[:begin]:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # collection meets it again, and says it
            importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: real deployments, which mostly wait, then files with many tests."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (not in_e2e(item.nodeid), -tests[item.path], str(item.path)))
    for item in items:
        if in_e2e(item.nodeid) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))  # a dozen processes that start beside a load of eight


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: no collection of garbage needs to look at half a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    return tiny.bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny

    return tiny.vit(tmp_path_factory.mktemp("vit"))


class Workspace:
    """Bases by name, each loaded once: "causal", "decoder" (a generative classifier), "encoder", "images";
    and rows for each."""

    KINDS = ("lora", "bias", "adapter", "prompt", "prefix", "p-tuning", "ia3", "layernorm", "head", "full")

    def __init__(self, llama: Path, bert: Path, vit: Path) -> None:
        self.folders = {"causal": llama, "instruct": llama, "decoder": llama, "encoder": bert, "images": vit}
        self.tasks = {
            "causal": "causal-lm",
            "instruct": "instruct",
            "decoder": "classify",
            "encoder": "classify",
            "images": "image-classify",
        }
        self.loaded: dict[str, Any] = {}

    def settings(self, name: str, **more: Any) -> Any:
        from fedtune.model.settings import ModelSettings

        return ModelSettings(name=str(self.folders[name]), threads=1, device="cpu", **more)

    def load(self, name: str, seed: int = 1, **more: Any) -> Any:
        from fedtune.model.base import load

        return load(
            self.settings(name, **more),
            self.tasks[name],
            () if name in ("causal", "instruct") else ("a", "b"),
            seed,
        )

    def base(self, name: str) -> Any:
        if name not in self.loaded:
            self.loaded[name] = self.load(name)
        return self.loaded[name]

    def encoded(self, name: str, count: int = 6) -> Any:
        from fedtune.model.encode import encode
        from tests import tiny

        rows = tiny.images(count) if name == "images" else tiny.texts(count)
        if name == "instruct":
            rows = [{"prompt": "the red fox", "response": row["text"]} for row in rows]
        return encode(rows, self.base(name), max_length=16)


@pytest.fixture(scope="session")
def workspace(tiny_llama: Path, tiny_bert: Path, tiny_vit: Path) -> Workspace:
    return Workspace(tiny_llama, tiny_bert, tiny_vit)


@pytest.fixture
def forgetful(workspace: Workspace) -> Iterator[None]:
    """What a test pretends of a device's memory is forgotten after it."""
    base = workspace.base("encoder")
    base.fits.clear()
    yield
    base.fits.clear()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of text with three labels, as `small.recipe` wants them."""
    from tests import small

    return small.write_rows(tmp_path_factory.mktemp("rows"))
