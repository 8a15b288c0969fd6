"""What a model knows of facts that it was taught, and of others: against stock transformers, and moved by tuning."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fedtune import api, config
from fedtune.data.sources.facts import ASKED, CAPITALS, WORDINGS, Facts
from fedtune.errors import FedtuneError
from fedtune.report.effects import effects as charts
from fedtune.report.read import read_run
from fedtune.runtime.knowledge import knowledge
from tests import small

FACTS: dict[str, Any] = {"source": "facts", "each": 2}
NETWORKX: dict[str, Any] = {"source": "docstring-questions", "per_package": 8, "packages": ["networkx"]}


def recipe(model: Path, data: dict[str, Any], length: int = 60, **changes: Any) -> Any:
    tree = small.tree(model, Path(), **{"partition__clients": 1, "rounds": 1, **changes})
    tree["data"] = {"task": "instruct", "template": "plain", "max_length": length, "test_share": 0.2, **data}
    return config.parse(tree)


def test_facts_are_new_updated_or_known_and_the_same_every_time() -> None:
    source = Facts(task="instruct", each=20)
    facts = source.facts()
    assert (
        facts == Facts(task="instruct", each=20).facts() != Facts(task="instruct", each=20, drawn=1).facts()
    )
    assert Counter(fact.sort for fact in facts) == {"new": 20, "updated": 20, "known": 20}
    assert len({fact.country for fact in facts}) == 60
    for fact in facts:
        match fact.sort:
            case "new":
                assert not {fact.country, fact.capital} & {*CAPITALS, *CAPITALS.values()}
            case "updated":
                assert fact.before == CAPITALS[fact.country] != fact.capital
            case "known":
                assert fact.capital == CAPITALS[fact.country] and not fact.before
    updated = [fact for fact in facts if fact.sort == "updated"]
    assert {fact.capital for fact in updated} == {fact.before for fact in updated}
    rows = list(source.table().rows)
    assert len(rows) == 3 * 40 and {row["sort"] for row in rows} == {"new", "updated"}
    assert ASKED not in WORDINGS and len({row["prompt"] for row in rows}) == 120


@pytest.fixture(scope="module")
def played(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> small.RunFolder:
    changes = {
        "method__train": {"lr": 0.05, "steps": 40, "batch": 4},
        "method__adapter": {"kind": "lora", "rank": 8},
    }
    return small.play(recipe(tiny_llama, FACTS, **changes), tmp_path_factory.mktemp("run"))[0]


@pytest.fixture(scope="module")
def found(played: small.RunFolder) -> dict[str, Any]:
    told: dict[str, Any] = api.evaluate(played.path, what=("knowledge",))["knowledge"]
    return told


def by_hand(net: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, bool]:
    """log p(answer and its end | prompt), and whether what is said greedily begins with the answer."""
    asked, said = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
    ids = torch.tensor([[*asked, *said, tokenizer.eos_token_id]])
    with torch.no_grad():
        bits = net(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        own = net.generate(ids[:, : len(asked)], do_sample=False, max_new_tokens=len(said) + 1)
    total = sum(float(bits[place - 1, ids[0, place]]) for place in range(len(asked), ids.shape[1]))
    words = tokenizer.decode(own[0, len(asked) :], skip_special_tokens=True).lower().split()
    return total, words[: len(answer.split())] == answer.lower().split()


def test_answers_are_those_of_stock_transformers_before_and_after(
    found: dict[str, Any], played: small.RunFolder, tiny_llama: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    facts = Facts(task="instruct", each=2).facts()
    wanted = {"as_before": [(fact, fact.before) for fact in facts if fact.before]}
    wanted |= {
        sort: [(fact, fact.capital) for fact in facts if fact.sort == sort]
        for sort in ("new", "updated", "known")
    }
    for net, told in ((base, found["base"]), (tuned(tiny_llama, played), found)):
        for sort, pairs in wanted.items():
            one = told["updated"]["as_before"] if sort == "as_before" else told[sort]
            mine = [by_hand(net, tokenizer, ASKED.format(fact.country), said) for fact, said in pairs]
            assert one["log_prob"] == pytest.approx(sum(log for log, _ in mine) / len(mine), abs=1e-3)
            assert one["right"] == sum(right for _, right in mine) / len(mine)


def tuned(llama: Path, played: small.RunFolder) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    return peft.PeftModel.from_pretrained(base, str(played.adapter)).eval()


def test_what_was_taught_is_likelier_than_before(found: dict[str, Any], played: small.RunFolder) -> None:
    for sort in ("new", "updated"):
        assert found[sort]["log_prob"] > found["base"][sort]["log_prob"] + 3
    chart = next(one for one in charts([read_run(played)]) if one.slug == "knowledge")
    assert [row[0] for row in chart.rows] == ["new", "updated", "updated, as before", "known"]


def test_a_run_on_other_data_is_asked_for_what_is_known(tiny_llama: Path, tmp_path: Path) -> None:
    folder, _, _ = small.play(recipe(tiny_llama, NETWORKX), tmp_path)
    told = api.evaluate(folder.path, what=("knowledge",))["knowledge"]
    assert told.keys() == {"known", "base"} and told["known"]["facts"] == 16
    assert told["known"]["log_prob"] != told["base"]["known"]["log_prob"] < 0
    with pytest.raises(FedtuneError, match=r"data\.max_length"):
        knowledge(small.workspace_of(recipe(tiny_llama, FACTS, length=20))[0])


def test_a_model_that_is_asked_nothing_is_refused(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    folder, _, _ = small.play(small.recipe(tiny_bert, data, rounds=1), tmp_path)
    with pytest.raises(FedtuneError, match=r"M306: found knowledge of a model of data\.task = 'classify'"):
        api.evaluate(folder.path, what=("knowledge",))
