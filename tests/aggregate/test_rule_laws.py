"""What holds for every rule. A newcomer is enrolled by its line in RULES."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedtune.aggregate import RULES, ClientAdapter, Combined, Rule, split
from fedtune.errors import FedtuneError
from fedtune.schema import digest
from tests.aggregate.dense import NOW, SHAPES, adapter, apart, mean_product, near, products, run

WEIGHTLESS = {name for name, rule in RULES.items() if not rule.weighted}
ALL = sorted(RULES)
EACH = sorted(name for name in RULES if not RULES[name]().linear)
SCALE = 2.0


def states(rule: Rule, rank: int = 4, b: float = 1.0) -> Combined:
    tensors = adapter(rank, 0, b)
    if rule.core:
        tensors |= {
            "layers.0.q.lora_R.weight": np.eye(rank, dtype=np.float32),
            "layers.1.up.lora_R.weight": np.eye(rank, dtype=np.float32),
        }
    return Combined(tensors)


def client(rule: Rule, before: Combined, seed: int) -> dict[str, np.ndarray]:
    """Trained from `before`; what the rule does not send is common."""
    sent = rule.sends(before.tensors, NOW.number)
    return {
        name: value if name in sent else before.tensors[name]
        for name, value in near(before.tensors, seed).items()
    }


def cohort(rule: Rule, before: Combined, count: int = 6) -> list[ClientAdapter]:
    return [ClientAdapter(i, client(rule, before, 10 + i), 1.0 + i, SCALE) for i in range(count)]


every_rule = pytest.mark.parametrize("build", [RULES[name] for name in ALL], ids=ALL)


@every_rule
@pytest.mark.parametrize("rank", [1, 4])
def test_equal_answers_give_that_answer(build: Callable[..., Rule], rank: int) -> None:
    rule = build()
    before = states(rule, rank)
    one = client(rule, before, 5)
    made = run(rule, [ClientAdapter(i, one, 0.1 + i, SCALE) for i in range(7)], before, SCALE)
    assert apart(products(made, SCALE), products(one, SCALE)) < 1e-6
    rest = split(one)[1]
    assert digest({name: made.tensors[name] for name in rest}) == digest(rest)
    if rule.linear or rule.rule == "hetlora":
        assert digest(made.tensors) == digest(one)


@every_rule
def test_one_client_gives_its_answer(build: Callable[..., Rule]) -> None:
    rule = build()
    before = states(rule)
    one = client(rule, before, 5)
    if rule.rule == "krum":
        with pytest.raises(
            FedtuneError, match="R410: found 1 answers where 1 may be faulty, expected at least 5"
        ):
            run(rule, [ClientAdapter(3, one, 2.0, SCALE)], before, SCALE)
        return
    assert (
        apart(
            products(run(rule, [ClientAdapter(3, one, 2.0, SCALE)], before, SCALE), SCALE),
            products(one, SCALE),
        )
        < 1e-6
    )


@every_rule
def test_the_order_of_clients_does_not_matter(build: Callable[..., Rule]) -> None:
    rule = build()
    before = states(rule)
    answers = cohort(rule, before)
    there, back = run(rule, answers, before, SCALE), run(rule, answers[::-1], before, SCALE)
    assert apart(products(back, SCALE), products(there, SCALE)) < 1e-6
    for name, value in split(there.tensors)[1].items():
        np.testing.assert_allclose(back.tensors[name], value, rtol=2e-7, atol=1e-7)


@every_rule
def test_the_same_answers_give_the_same_bytes(build: Callable[..., Rule]) -> None:
    rule = build()
    before = states(rule)
    assert digest(run(rule, cohort(rule, before), before, SCALE).tensors) == digest(
        run(rule, cohort(rule, before), before, SCALE).tensors
    )


@every_rule
def test_a_weight_of_two_is_two_clients(build: Callable[..., Rule]) -> None:
    rule = build()
    if rule.rule in WEIGHTLESS:
        pytest.skip("weights do not count")
    before = states(rule)
    x, y = client(rule, before, 1), client(rule, before, 2)
    two = run(rule, [ClientAdapter(0, x, 2.0, SCALE), ClientAdapter(1, y, 1.0, SCALE)], before, SCALE)
    three = run(
        rule,
        [ClientAdapter(0, x, 1.0, SCALE), ClientAdapter(1, x, 1.0, SCALE), ClientAdapter(2, y, 1.0, SCALE)],
        before,
        SCALE,
    )
    assert apart(products(two, SCALE), products(three, SCALE)) < 1e-6


@every_rule
def test_only_ratios_of_weights_matter(build: Callable[..., Rule]) -> None:
    rule = build()
    before = states(rule)
    answers = cohort(rule, before)
    other = [
        ClientAdapter(a.client, a.tensors, 1.0 if rule.rule in WEIGHTLESS else a.weight * 3.7, a.scale)
        for a in answers
    ]
    assert (
        apart(
            products(run(rule, other, before, SCALE), SCALE),
            products(run(rule, answers, before, SCALE), SCALE),
        )
        < 1e-6
    )


@every_rule
def test_nothing_learned_changes_nothing(build: Callable[..., Rule]) -> None:
    rule = build()
    before = states(rule)
    made = run(rule, [ClientAdapter(i, before.tensors, 1.0 + i, SCALE) for i in range(5)], before, SCALE)
    assert apart(products(made, SCALE), products(before, SCALE)) < 1e-6


@every_rule
def test_a_product_of_zero_can_still_be_trained(build: Callable[..., Rule]) -> None:
    """As LoRA starts: B = 0. Were A zero as well, no gradient would reach either."""
    rule = build()
    before = states(rule, b=0.0)
    made = run(rule, [ClientAdapter(i, before.tensors, 1.0, SCALE) for i in range(5)], before, SCALE)
    for module, product in products(made, SCALE).items():
        assert not product.any()
        assert np.linalg.norm(made.tensors[f"{module}.lora_A.weight"], axis=1).min() > 0
        small = rule.for_rank(made.tensors, SCALE, 2, SCALE)
        assert np.linalg.norm(small[f"{module}.lora_A.weight"], axis=1).min() > 0


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(name: str, number: float) -> None:
    rule = RULES[name]()
    before = states(rule)
    answers = cohort(rule, before)
    bad = dict(answers[3].tensors)
    bad["layers.0.q.lora_B.weight"] = bad["layers.0.q.lora_B.weight"].copy()
    bad["layers.0.q.lora_B.weight"][2, 1] = number
    answers[3] = ClientAdapter(3, bad, 1.0, SCALE)
    with pytest.raises(
        FedtuneError,
        match=r"W607: found NaN or Inf in 'layers.0.q.lora_B.weight' from client 3, expected finite numbers",
    ):
        run(rule, answers, before, SCALE)


@pytest.mark.parametrize("name", sorted(set(RULES) - set(EACH)))
def test_a_mean_that_is_not_finite_is_refused(name: str) -> None:
    rule = RULES[name]()
    before = states(rule)
    mean = {key: np.full_like(before.tensors[key], np.nan) for key in rule.sends(before.tensors, 1)}
    with pytest.raises(FedtuneError, match="W607: found NaN or Inf in the mean of"):
        rule.from_mean(before.tensors, mean)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.inf])
def test_a_weight_must_be_positive(name: str, weight: float) -> None:
    rule = RULES[name]()
    before = states(rule)
    with pytest.raises(FedtuneError, match=r"W607: found weight .* from client 0"):
        run(rule, [ClientAdapter(0, before.tensors, weight, SCALE)], before, SCALE)


@pytest.mark.parametrize("name", EACH)
def test_no_answers_and_other_names_are_refused(name: str) -> None:
    rule = RULES[name]()
    before = states(rule)
    with pytest.raises(FedtuneError, match="R405"):
        run(rule, [], before, SCALE)
    with pytest.raises(FedtuneError, match="M305: found 'extra' only there in the answer of client 0"):
        run(
            rule,
            [ClientAdapter(0, dict(before.tensors) | {"extra": np.ones(2, np.float32)}, 1.0, SCALE)],
            before,
            SCALE,
        )
    with pytest.raises(FedtuneError, match=r"M305: found shape .* of 'head.bias'"):
        run(
            rule,
            [ClientAdapter(0, dict(before.tensors) | {"head.bias": np.ones(2, np.float32)}, 1.0, SCALE)],
            before,
            SCALE,
        )


@pytest.mark.parametrize("name", EACH)
def test_the_rest_is_averaged_plainly(name: str) -> None:
    """Bias, magnitude vector and a number without dimensions: weights 1, 3 and values x, y give (x + 3 y) /
    4."""
    if name in WEIGHTLESS:
        pytest.skip("robust on the rest as well")
    rule = RULES[name]()
    before = states(rule)
    x, y = near(before.tensors, 1), near(before.tensors, 2)
    made = run(
        rule, [ClientAdapter(0, x, 1.0, SCALE), ClientAdapter(1, y, 3.0, SCALE)], before, SCALE
    ).tensors
    for key in ("head.bias", "layers.0.q.lora_magnitude_vector", "temperature"):
        np.testing.assert_allclose(made[key], (np.float64(x[key]) + 3 * np.float64(y[key])) / 4, rtol=1e-6)
        assert made[key].dtype == np.float32 and made[key].shape == x[key].shape


@pytest.mark.parametrize("name", EACH)
def test_every_module_has_its_error_and_they_add_up(name: str) -> None:
    """By squares, each times what its error is relative to: mean(BA), or for krum and clipped what they
    averaged, cut to rank 4."""
    rule = RULES[name](**({"extra": 4} if RULES[name]().carries else {}))
    before = states(rule)
    answers = cohort(rule, before)
    made = run(rule, answers, before, SCALE)
    assert made.layers.keys() == SHAPES.keys() and all(0 <= error < 1 for error in made.layers.values())
    if name in {"median", "trimmed"}:
        assert {f"cut/{module}" for module in SHAPES} < made.report.keys() and made.report["cut"] == max(
            made.report[f"cut/{module}"] for module in SHAPES
        )
    if name not in {"krum", "clipped"}:
        whole = {module: float(np.linalg.norm(product)) for module, product in mean_product(answers).items()}
        lost = np.sqrt(sum((made.layers[module] * whole[module]) ** 2 for module in SHAPES))
        assert lost == pytest.approx(
            made.report["error"] * np.sqrt(sum(norm**2 for norm in whole.values())), rel=1e-6, abs=1e-6
        )
    if name == "clipped":
        assert (
            min(made.layers.values()) <= made.report["cut"] <= max(made.layers.values())
            and made.report["cut"] > 0.01
        )


@pytest.mark.parametrize("name", EACH)
def test_ranks_and_scales_of_their_own(name: str) -> None:
    """Ranks 4, 2, 1 with alpha 8: the error that is reported is the one that a dense twin finds."""
    rule = RULES[name]()
    before = states(rule)
    ranks = (4, 2, 1, 4, 2, 1)
    answers = [
        ClientAdapter(i, near(rule.for_rank(before.tensors, SCALE, rank, 8 / rank), i), 1.0 + i, 8 / rank)
        for i, rank in enumerate(ranks)
    ]
    made = run(rule, answers, before, SCALE)
    assert {pair.rank for pair in split(made.tensors)[0].values()} == {4}
    if name not in {"krum", "clipped"}:  # their figures are about the answers that they chose or shortened
        assert made.report["error"] == pytest.approx(
            apart(products(made, SCALE), mean_product(answers)), abs=1e-6
        )


@pytest.mark.parametrize("name", sorted(set(RULES) - set(EACH) - {"fedsb"}))
def test_linear_rules_refuse_mixed_ranks(name: str) -> None:
    """numpy would broadcast a factor of rank 1 over one of rank 4."""
    rule = RULES[name]()
    big, small = states(rule), states(rule, 1)
    with pytest.raises(FedtuneError, match="M305: found shape"):
        run(
            rule,
            [ClientAdapter(0, big.tensors, 1.0, SCALE), ClientAdapter(1, small.tensors, 1.0, SCALE)],
            big,
            SCALE,
        )


@every_rule
def test_what_is_sent_is_trained_and_what_stays_is_not_sent(build: Callable[..., Rule]) -> None:
    rule = build()
    names = states(rule).tensors
    for number in (1, 2):
        assert rule.sends(names, number) <= rule.trains(names, number) <= set(names)
        assert not rule.sends(names, number) & rule.stays(names)
