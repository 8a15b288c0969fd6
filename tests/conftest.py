"""What all tests share: one thread, no network, and tiny models made once a session."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from pathlib import Path
from typing import Any

import pytest


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


class World:
    """Bases by name, each loaded once: "causal", "decoder" (a generative classifier), "encoder", "images"; and rows for each."""

    KINDS = ("lora", "bias", "adapter", "prompt", "prefix", "p-tuning", "ia3", "layernorm", "head", "full")

    def __init__(self, llama: Path, bert: Path, vit: Path) -> None:
        self.folders = {"causal": llama, "instruct": llama, "decoder": llama, "encoder": bert, "images": vit}
        self.tasks = {"causal": "causal-lm", "instruct": "instruct", "decoder": "classify", "encoder": "classify", "images": "image-classify"}
        self.loaded: dict[str, Any] = {}

    def settings(self, name: str, **more: Any) -> Any:
        from fedtune.model.settings import ModelSettings

        return ModelSettings(name=str(self.folders[name]), threads=1, device="cpu", **more)

    def load(self, name: str, seed: int = 1, **more: Any) -> Any:
        from fedtune.model.base import load

        return load(self.settings(name, **more), self.tasks[name], () if name in ("causal", "instruct") else ("a", "b"), seed)

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
def world(tiny_llama: Path, tiny_bert: Path, tiny_vit: Path) -> World:
    return World(tiny_llama, tiny_bert, tiny_vit)
