"""A model's folder that would have code fetched or run is refused by us, whatever transformers makes of
it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.hf.code import FILES, named
from fedtune.hf.config import load_config, require_model

EVIL: list[dict[str, Any]] = [
    {"auto_map": {"AutoConfig": "configuration_evil.EvilConfig", "AutoModel": "modeling_evil.Evil"}},
    {"auto_map": {"AutoTokenizer": ["evil/repo--tok.Tok"]}},
    {"trust_remote_code": True},
    {"custom_pipelines": {"evil": {"impl": "evil.Evil", "pt": ["AutoModel"]}}},
    {"custom_generate": "evil/generate"},
    {"_attn_implementation": "evil/kernel"},
    {"attn_implementation": "evil/kernel@main:attention"},
    {"text_config": {"auto_map": {"AutoModel": "x.Y"}}},
    {"layers": [{"_attn_implementation": "evil/kernel"}]},
    {"use_kernels": True},
    {"kernel_config": {"RMSNorm": "evil/kernel:RMSNorm"}},
]


@pytest.mark.parametrize("evil", EVIL, ids=str)
@pytest.mark.parametrize("file", FILES)
def test_settings_that_name_code_are_refused(
    file: str, evil: dict[str, Any], tiny_bert: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    marker = tmp_path / "ran"
    for module in ("configuration_evil", "modeling_evil", "evil", "x"):
        (model / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    known = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps(known | evil))
    for read in (
        lambda: load_config(str(model), "classify", ("a", "b"), {}),
        lambda: require_model(str(model)),
    ):
        with pytest.raises(
            FedtuneError, match=f"M301: found '{next(iter(named(evil)))}' in {re.escape(file)}"
        ):
            read()
    assert not marker.exists()


def test_plain_settings_pass(tiny_bert: Path, tmp_path: Path) -> None:
    plain = {
        "auto_map": None,
        "_attn_implementation": "sdpa",
        "attn_implementation": "eager",
        "trust_remote_code": False,
        "architectures": ["BertModel"],
        "x": [1, {}],
    }
    assert list(named(plain)) == []
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    (model / "config.json").write_text(
        json.dumps(json.loads((model / "config.json").read_text()) | {"_attn_implementation": "eager"})
    )
    load_config(str(model), "classify", ("a", "b"), {})


def test_the_library_that_reads_models_is_one_without_a_known_way_to_run_code() -> None:
    bound = re.search(
        r'"transformers>=(\d+)\.(\d+)', (Path(__file__).parents[2] / "pyproject.toml").read_text()
    )
    assert bound and (int(bound[1]), int(bound[2])) >= (5, 3)
