"""lora_rank_by_client = "auto": ranks from memory, with numbers; and a run with them is the run with the
ranks written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.aggregate import Mean
from fedtune.cli import main
from fedtune.config import Recipe, decided
from fedtune.errors import FedtuneError
from fedtune.methods.fedpeft import FedPEFT
from fedtune.methods.fedpeft_ranks import label_count
from fedtune.methods.fedpeft_ranks import needs_of as needs_by_settings
from fedtune.methods.memory_ranks import MIB, Needs, bytes_of, powers, rank_for, reason
from fedtune.runtime.check import check, rows
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.run import run
from tests import small


def needs_of(recipe: Recipe, labels: int) -> Needs:
    return needs_by_settings(recipe.method, recipe, labels)  # type: ignore[arg-type]


def auto(model: Path, data: Path, **more: Any) -> Recipe:
    adapter = {"kind": "lora", "rank": 12}
    return small.recipe(
        model,
        data,
        **{
            "aggregate": {"rule": "flexlora"},
            "method__lora_rank_by_client": "auto",
            "method__adapter": adapter,
            **more,
        },
    )


def needs(rank: int) -> dict[str, int]:
    """100 MiB for the model, 10 MiB for each rank."""
    return {"base model": 100 * MIB, "adapter": 10 * MIB * rank}


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("512 B", 512),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("900 MB", 900_000_000),
        ("2 GiB", 2**31),
        ("0.5 TB", 5 * 10**11),
        ("1.000001 MB", 1_000_001),
    ],
)
def test_sizes(size: str, count: int) -> None:
    assert bytes_of(size) == count


def test_the_greatest_power_of_two_that_fits() -> None:
    """Rank 8 needs 180 MiB, 4 140, 2 120, 1 110; a byte less is the next smaller rank; more than rank 12 does
    not matter."""
    assert list(powers(12)) == [8, 4, 2, 1] and next(iter(powers(16))) == 16 and list(powers(1)) == [1]
    for memory, rank in ((180, 8), (140, 4), (120, 2), (110, 1)):
        assert rank_for(memory * MIB, 12, needs) == rank
        if rank > 1:
            assert rank_for(memory * MIB - 1, 12, needs) == rank // 2
    assert rank_for(2**50, 12, needs) == 8
    assert reason(4, 150 * MIB, 12, needs) == "needs 140.0 MiB of 150.0 MiB; rank 8 would need 180.0 MiB"
    assert reason(8, 150 * MIB, 12, needs) == "needs 180.0 MiB of 150.0 MiB"


def test_a_client_in_which_nothing_fits_is_refused_with_the_numbers() -> None:
    said = (
        r"M308: found 100.0 MiB of memory at client 3, expected at least 110.0 MiB, which rank 1 needs "
        r"\(base model 100.0 \+ adapter 10.0\); lower"
    )
    with pytest.raises(FedtuneError, match=said):
        rank_for(100 * MIB, 8, needs, "client 3")


def test_needs_follow_the_shapes(tiny_bert: Path, data: Path) -> None:
    """One more rank is one row of A and one column of B a module: 16 bytes each under AdamW (value, gradient,
    two moments)."""
    recipe = auto(tiny_bert, data)
    of = needs_of(recipe, label_count(recipe))
    plan = (
        small.recipe(tiny_bert, data)
        .method.build(3, Mean())
        .capabilities.costs.plan(recipe.model, "classify", 3)
    )
    row = sum(
        shape[1] if name.endswith("lora_A.weight") else shape[0]
        for name, shape in plan.shapes.items()
        if "lora_" in name
    )
    assert sum(of(3).values()) - sum(of(2).values()) == 16 * row
    sgd = needs_of(
        auto(tiny_bert, data, method__train={"optimizer": "sgd", "lr": 0.1, "batch": 4, "steps": 2}), 3
    )
    assert sum(sgd(3).values()) - sum(sgd(2).values()) == 8 * row
    carried = needs_of(auto(tiny_bert, data, aggregate={"rule": "flora", "extra": 32}), 3)
    assert (
        sum(carried(2).values()) - sum(of(2).values()) == 16 * row * 32
    )  # the residual has room beside the adapter
    thrifty = needs_of(
        auto(tiny_bert, data, method__train={"checkpointing": True, "batch": 4, "steps": 2}), 3
    )
    assert thrifty(2)["activations (estimate)"] < of(2)["activations (estimate)"]


def test_ranks_are_a_function_of_recipe_and_memory(tiny_bert: Path, data: Path) -> None:
    recipe = auto(tiny_bert, data)
    of = needs_of(recipe, 3)
    memory = [sum(of(rank).values()) for rank in (8, 4, 2, 1)]
    once = decided(recipe, memory)
    assert once.method.lora_rank_by_client == (8, 4, 2, 1)  # type: ignore[union-attr]
    assert decided(recipe, memory) == once == decided(recipe, memory, labels=3) == decided(once, [1, 1])
    by_hand = small.recipe(
        tiny_bert,
        data,
        aggregate={"rule": "flexlora"},
        method__adapter={"kind": "lora", "rank": 12},
        method__lora_rank_by_client=[8, 4, 2, 1],
    )
    assert once.fingerprint == decided(by_hand).fingerprint
    method = once.method.build(3, once.aggregate)
    assert isinstance(method, FedPEFT) and [method.seat(client)[0] for client in range(5)] == [8, 4, 2, 1, 8]
    with pytest.raises(FedtuneError, match=r"M308: .* at client 1, expected"):
        decided(recipe, [memory[0], memory[3] - 1])


def test_a_run_with_chosen_ranks_is_the_run_with_the_same_ranks_by_hand(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    of = needs_of(auto(tiny_bert, data), 3)
    sizes = [f"{sum(of(rank).values())} B" for rank in (4, 1)]
    recipe = auto(tiny_bert, data, method__memory_by_client=sizes)
    said = rows(check(recipe))
    of_ranks = [line for line in said if line.startswith("ranks ")]
    assert [line.split(";")[0] for line in of_ranks] == [
        f"ranks     client-{n}: rank {r} of 12, by its memory" for n, r in enumerate((4, 1, 4, 1))
    ]
    assert "rank 8 would need" in of_ranks[0]
    _, by_memory, _ = small.play(decided(recipe), tmp_path / "auto")
    hand = auto(tiny_bert, data, method__lora_rank_by_client=[4, 1])
    _, by_hand, events = small.play(hand, tmp_path / "hand")
    assert by_memory["state_sha256"] == by_hand["state_sha256"]
    up = {e.client: e.up_bytes for e in events if type(e).__name__ == "ClientDone"}  # type: ignore[attr-defined]
    assert check(hand).bits == (32.0, 32.0)  # of what each trains at its own rank
    assert check(hand).up_bytes == pytest.approx(sum(up.values()) / 4, abs=3) and up[0] > up[1]
    assert [line for line in rows(check(hand)) if line.startswith("ranks")][1].startswith(
        "ranks     client-1: rank 1 of 12, by the recipe; needs "
    )


def test_simulate_writes_the_ranks_into_the_runs_recipe(
    tiny_bert: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    tree = small.tree(
        tiny_bert,
        data,
        rounds=1,
        aggregate={"rule": "flexlora"},
        method__lora_rank_by_client="auto",
        method__memory_by_client=["1 GiB"],
    )
    file = tmp_path / "mine.toml"
    file.write_text(tomli_w.dumps(tree))
    assert main(["simulate", str(file), "--runs", str(tmp_path / "runs")]) == 0
    kept = RunFolder(tmp_path / "runs" / "mine").read_json("config.json")["method"]
    assert (kept["lora_rank_by_client"], kept["memory_by_client"]) == ([2], [])
    assert (
        main(
            [
                "simulate",
                str(file),
                "--runs",
                str(tmp_path / "no"),
                "--set",
                'method.memory_by_client=["1 kB"]',
            ]
        )
        == 2
    )
    assert "M308" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__memory_by_client": ["much"]}, "C102.*memory_by_client"),
        (
            {"method__memory_by_client": ["2 GiB"], "method__lora_rank_by_client": [2]},
            "C104: found method.memory_by_client without",
        ),
        ({"aggregate": {"rule": "mean"}}, "flexlora, flora, hetlora"),
        ({"method__lora_rank_by_client": "most"}, "C102"),
    ],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=words):
        auto(tiny_bert, data, **changes)


def test_without_a_known_memory_a_run_does_not_begin_and_check_says_what_ranks_need(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = auto(tiny_bert, data)
    with pytest.raises(FedtuneError, match=r"C104: .*no client's memory is known"):
        decided(recipe)
    with pytest.raises(FedtuneError, match=r"C104: .*ranks should be known"):
        run(recipe, create(tmp_path, "", "run"), lambda event: None)
    lines = [line for line in rows(check(recipe)) if line.startswith("ranks")]
    assert [line.split(" needs ")[0] for line in lines] == [
        f"ranks     by the memory that a client reports: rank {rank}" for rank in (8, 4, 2, 1)
    ]
