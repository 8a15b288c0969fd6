"""What is refused or said before SFPrompt begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.runtime.check import check, rows
from tests import small
from tests.methods.sfprompt_data import write_sentences
from tests.methods.test_sfprompt import recipe_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("rows"))


def test_a_blind_shortcut_is_refused_by_check_and_before_the_first_round(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    for changes in ({"local_update": 1}, {"pruning": "el2n", "keep": 0.5}, {"preset": "sfprompt-paper"}):
        recipe = recipe_of(tiny_bert, data, {"head": 0, **changes})
        for start in (check, small.workspace_of):
            with pytest.raises(FedtuneError, match=r"S703.*k = 0.*first token"):
                start(recipe)
    check(recipe_of(tiny_bert, data, {"head": 0, "tail": 1, "local_update": 1}))  # a block in the tail sees


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 0.5}, "method.pruning = 'none'"),
        ({"pruning": "random"}, "method.keep = 1"),
        ({"position": "input", "cache_smashed": True}, "cache_smashed"),
        ({"prompts": 0}, "method.prompts = 0"),
        ({"lora_rank": 2, "head": 0}, "method.lora_rank = 2"),
        ({"lora_rank": 2, "cache_smashed": True}, "LoRA in the head"),
        ({"aggregate": "krum"}, "aggregate.rule = 'krum'"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path
) -> None:
    more = {"aggregate": {"rule": changes.pop("aggregate")}} if "aggregate" in changes else {}
    with pytest.raises(FedtuneError, match="C104") as caught:
        recipe_of(tiny_bert, data, changes, **more)
    assert words in str(caught.value)


def test_a_text_that_leaves_no_room_for_prompts_is_refused(tiny_llama: Path, data: Path) -> None:
    check(recipe_of(tiny_llama, data, data__max_length=61, data__task="causal-lm"))
    with pytest.raises(FedtuneError, match=r"D207.*62 tokens and 3 prompts"):
        check(recipe_of(tiny_llama, data, data__max_length=62, data__task="causal-lm"))


def test_check_knows_the_row_that_a_generative_classifier_reads(tiny_llama: Path, data: Path) -> None:
    """4 texts of 12 tokens, 3 prompts, float16: down 4 rows and the prompts' gradient."""
    told = rows(check(recipe_of(tiny_llama, data, {"codec": "fp16"})))
    assert any(f"down {(4 + 3) * 32 * 2} bytes" in line for line in told)


def test_a_cut_that_does_not_fit_is_refused(tiny_bert: Path, data: Path) -> None:
    with pytest.raises(FedtuneError, match="S701"):
        check(recipe_of(tiny_bert, data, {"head": 1, "tail": 1}))


def test_check_says_who_can_see_the_inputs(tiny_bert: Path, data: Path) -> None:
    told = "\n".join(rows(check(recipe_of(tiny_bert, data))))
    assert (
        "body      whoever runs it sees hidden states of every example and can reconstruct the inputs" in told
    )
    assert (
        "not from the body's operator" in told
        and "of full fine-tuning's FLOPs" in told
        and "as much as fedpeft" in told
    )
