"""What would end a run at its beginning is said before it is begun, at the side that can mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.deploy.preflight import check_at_coordinator, remarks
from fedtune.deploy.site_config import SiteConfig, require_own
from fedtune.deploy.sites import at_site
from fedtune.errors import FedtuneError
from tests import small
from tests.waiting import free_ports

LABELS = sorted(small.WORDS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small.write_rows(tmp_path)


def test_a_recipe_that_can_begin_passes(tiny_bert: Path, data: Path) -> None:
    check_at_coordinator(small.recipe(tiny_bert, data, data__labels=LABELS, deploy__test=str(data)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model__name": "/nowhere/model"}, "M301.*/nowhere/model"),
        ({"deploy__test": "/nowhere/rows.jsonl"}, "D201.*/nowhere/rows.jsonl.*correct deploy.test"),
        ({"data__labels": []}, "D206"),
        ({"deploy__data": "partition", "data__path": "/nowhere"}, "D201.*correct data.path"),
    ],
)
def test_what_would_end_a_run_is_found_before(
    changes: dict[str, Any], sentence: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=sentence):
        check_at_coordinator(small.recipe(tiny_bert, data, **{"data__labels": LABELS, **changes}))


@pytest.mark.thorough
def test_a_server_with_a_mistake_in_its_recipe_begins_no_run(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the recipe, mended, finds its folder free."""
    keys, runs = str(tmp_path / "keys"), tmp_path / "runs"
    main(["keys", "init", "--federation", "demo", "--host", "127.0.0.1", "--keys", keys])
    main(["keys", "issue", "site-a", "--keys", keys])
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f"[model]\nname = '{tiny_bert}'\n[data]\nsource = 'jsonl'\npath = '{data}'\nmax_length = 12\nlabels "
        f"= {LABELS}\n"
    )
    capsys.readouterr()
    wrong = ["--set", "model.name=/nowhere/model"]
    assert (
        main(
            [
                "server",
                str(recipe),
                *wrong,
                "--keys",
                keys,
                "--runs",
                str(runs),
                "--listen",
                f"127.0.0.1:{free_ports(1)[0]}",
            ]
        )
        == 2
    )
    assert "M301" in capsys.readouterr().err and not runs.exists()


def test_check_knows_what_a_server_will_need(tiny_bert: Path, data: Path) -> None:
    def said(**changes: Any) -> str:
        return " ".join(remarks(small.recipe(tiny_bert, data, **{"data__labels": LABELS, **changes})))

    rows = len(data.read_text().splitlines())
    assert "ready for fedtune server" in said() and f"the {rows} rows of deploy.test" in said(
        deploy__test=str(data)
    )
    assert "would refuse this recipe: D201" in said(deploy__test="/nowhere") and "C104" in said(
        deploy__sites=["a", "a"]
    )
    assert "C104" in said(deploy__data="partition", deploy__sites=["a", "b", "c"], partition__clients=2)
    assert said(deploy__data="partition") == ""


def test_a_sites_own_data_are_called_by_its_option(tiny_bert: Path, data: Path) -> None:
    with pytest.raises(FedtuneError, match=r"D201.*/nowhere.*correct --data"):
        at_site(small.recipe(tiny_bert, data, data__labels=LABELS, deploy__sites=["site-a"]), 0, "/nowhere")


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"device": "gpu"}, "M301.*'gpu'.*change --device"),
        ({"device": "cuda:99"}, "M301.*cuda:99"),
        ({"model": "/nowhere/model"}, "M301.*/nowhere/model.*check --model"),
        ({"model": "package:nobody/model"}, "M301"),
        ({"model": "~/no-model-here"}, "M301"),
    ],
)
def test_what_a_site_names_has_to_be_there(own: dict[str, str], sentence: str) -> None:
    with pytest.raises(FedtuneError, match=sentence):
        require_own(SiteConfig("keys", "localhost:1", "home", "socket", **own))


def test_a_sites_own_model_needs_weights(tiny_bert: Path, tmp_path: Path) -> None:
    require_own(SiteConfig("keys", "localhost:1", "home", "socket", model=str(tiny_bert), device="cpu"))
    (tmp_path / "config.json").write_bytes((tiny_bert / "config.json").read_bytes())
    with pytest.raises(FedtuneError, match=r"M301.*no \*.safetensors"):
        require_own(SiteConfig("keys", "localhost:1", "home", "socket", model=str(tmp_path)))
