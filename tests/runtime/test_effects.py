"""What tuning did to the model: calibration, intruder dimensions, forgetting, and who moves the same weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.lora.intruders import reduce_intruder_dimension

from fedtune import api
from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.model.calibration import expected_error
from fedtune.report.effects import effects as charts
from fedtune.report.read import read_run
from fedtune.runtime.effects import help_topics
from fedtune.runtime.overlaps import most_moved, pairs
from tests import small, tiny

CAUSAL = {
    "data__task": "causal-lm", "data__max_length": 24, "partition__clients": 2, "watch": {"influence": True},
    "method__train": {"lr": 0.3, "steps": 4, "batch": 4},
}  # fmt: skip  # a rate at which the adapter shouts down the base


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"), 60)


@pytest.fixture(scope="module")
def played(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> small.RunFolder:
    return small.play(small.recipe(llama, data, **CAUSAL), tmp_path_factory.mktemp("run"))[0]


@pytest.fixture(scope="module")
def found(played: small.RunFolder) -> dict[str, Any]:
    return api.evaluate(played.path, what=("forgetting", "calibration", "intruders", "clients"))


def stock(llama: Path, played: small.RunFolder) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    return peft.PeftModel.from_pretrained(base, str(played.adapter)).eval()


def said(net: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def test_the_expected_calibration_error_is_that_of_a_plain_loop() -> None:
    draw = np.random.default_rng(0)
    confidence = np.concatenate([draw.uniform(0, 1, 400), np.array([0.0, 1.0, 1 / 15, 2 / 15])])
    right = draw.uniform(0, 1, len(confidence)) < confidence**2
    total = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (c == 0 and number == 0)]
        if inside:
            sure, true = sum(confidence[i] for i in inside), sum(bool(right[i]) for i in inside)
            total += abs(sure - true)
    found = expected_error(confidence, right)
    assert found["ece"] == pytest.approx(total / len(confidence), abs=1e-9)
    assert sum(one["count"] for one in found["bins"]) == found["count"] == 404
    assert expected_error(np.ones(3), np.ones(3))["ece"] == 0


def test_calibration_is_of_every_token_of_the_test_set(
    found: dict[str, Any], llama: Path, data: Path, played: small.RunFolder
) -> None:
    encoded = small.workspace_of(small.recipe(llama, data, **CAUSAL))[0].test()
    for net, told in (
        (stock(llama, played), found["calibration"]),
        (transformers.AutoModelForCausalLM.from_pretrained(llama).eval(), found["calibration"]["base"]),
    ):
        sure, right = [], []
        for example in encoded.examples:
            ids = example["input_ids"].tolist()
            shares = said(net, ids).softmax(-1)[:-1]
            sure += shares.max(-1).values.tolist()
            right += [guess == ids[place + 1] for place, guess in enumerate(shares.argmax(-1).tolist())]
        assert told["count"] == len(sure) and told["of"] == "tokens"
        want = expected_error(np.array(sure), np.array(right))
        assert told["ece"] == pytest.approx(want["ece"], abs=1e-4)


@pytest.mark.thorough
def test_forgetting_is_the_loss_on_text_before_and_after(
    found: dict[str, Any], llama: Path, played: small.RunFolder
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    stream = [
        i for row in help_topics() for i in (*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id)
    ]
    blocks = [stream[start : start + 24] for start in range(0, len(stream), 24)]
    some = [block for block in blocks if len(block) > 1]
    one = found["forgetting"]
    for net, told in (
        (stock(llama, played), one["loss"]),
        (transformers.AutoModelForCausalLM.from_pretrained(llama).eval(), one["base"]["loss"]),
    ):
        losses = [
            torch.nn.functional.cross_entropy(
                said(net, block)[:-1], torch.tensor(block[1:]), reduction="sum"
            ).item()
            for block in some
        ]
        assert told == pytest.approx(sum(losses) / sum(len(block) - 1 for block in some), rel=1e-3)
    assert one["rise"] == one["loss"] - one["base"]["loss"] != 0


def test_intruders_are_counted_as_peft_counts_them_and_taken_back_as_peft_does(
    found: dict[str, Any], llama: Path, played: small.RunFolder, tmp_path: Path
) -> None:
    lines: list[str] = []
    net = stock(llama, played)
    reduce_intruder_dimension(
        net, top_k=10, threshold_epsilon=0.5, mitigation_lambda=0.25, logging_sink=lines.append
    )
    counted = sum(int(line.rpartition(" ")[2]) for line in lines if ": Intruders: " in line)
    assert found["intruders"]["intruders"] == counted > 0
    assert found["intruders"]["looked_at"] == 10 * found["intruders"]["matrices"] == 10 * 14
    api.export(played.path, tmp_path / "adapter", intruders=0.25)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    ours = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = list(range(5, 20))
    torch.testing.assert_close(said(ours, ids), said(net.eval(), ids), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(said(ours, ids), said(stock(llama, played), ids), rtol=1e-2, atol=1e-2)


def test_overlaps_are_shares_of_the_most_moved_weights(found: dict[str, Any]) -> None:
    first = {"a": np.array([[5.0, 0.0], [-9.0, 1.0]]), "b": np.zeros(196)}
    assert most_moved(first).tolist() == [0, 2]  # a hundredth of 200: 5 and -9
    other = {"a": np.array([[5.0, 6.0], [0.0, 1.0]]), "b": np.zeros(196)}
    table = pairs({"x": most_moved(first), "y": most_moved(other)})
    assert table == {"x": {"x": 1.0, "y": 0.5}, "y": {"x": 0.5, "y": 1.0}}
    (own, shared), (again, other_own) = found["clients"]["overlap"]
    assert own == other_own == 1 and shared == again and 0 <= shared < 1
    assert found["clients"]["rounds"] == 3


def test_the_page_shows_how_sure_the_model_is(found: dict[str, Any], played: small.RunFolder) -> None:
    made = {chart.slug: chart for chart in charts([read_run(played)])}
    assert set(made) == {"reliability", "overlap"}
    assert made["reliability"].alt.startswith("Expected calibration error: tuned 0.")
    assert len(made["reliability"].rows) == sum(
        len(one["bins"]) for one in (found["calibration"], found["calibration"]["base"])
    )


def test_text_of_ones_own_from_the_command_line(
    played: small.RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("the red fox runs over the green hill\n\nrain falls on the roof\n")
    arguments = ["eval", str(played.path), "--what", "forgetting", "--text", str(tmp_path / "mine.txt")]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)["forgetting"]
    assert told["text"].endswith("mine.txt") and 0 < told["tokens"] < 200 and math.isfinite(told["rise"])


def test_what_means_nothing_is_refused(
    played: small.RunFolder, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedtuneError, match=r"C103: found --what 'mood', expected some of forgetting"):
        api.evaluate(played.path, what=("forgetting", "mood"))
    with pytest.raises(FedtuneError, match="C103: found --text without"):
        api.evaluate(played.path, text="some.txt")
    table = {"kind": "bias"}
    folder, _, _ = small.play(small.recipe(tiny_bert, data, method__adapter=table, rounds=1), tmp_path)
    with pytest.raises(FedtuneError, match=r"M306: found forgetting of a model of data.task = 'classify'"):
        api.evaluate(folder.path, what=("forgetting",))
    with pytest.raises(FedtuneError, match="M306: found intruder dimensions of kind 'bias'"):
        api.evaluate(folder.path, what=("intruders",))
    with pytest.raises(FedtuneError, match=r"M306: found --intruders for kind 'bias'"):
        api.export(folder.path, tmp_path / "adapter", intruders=0.5)
    with pytest.raises(FedtuneError, match="C104: found overlaps of a run that noted none"):
        api.evaluate(folder.path, what=("clients",))
    assert "base" not in api.evaluate(folder.path, what=("calibration",))["calibration"]  # its head is fresh
