"""Each step on numbers that can be checked on paper, and against naive twins."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ClassVar, get_args

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedtune.schema import Schema
from fedtune.transforms import STEPS, ChainStep, bits_per_parameter, build
from fedtune.transforms.auto import AutoSettings, choose, density, kurtosis
from fedtune.transforms.base import Chain, Kind, Transform
from fedtune.transforms.dither import Dither, DitherSettings, dither_rate, nearest
from fedtune.transforms.levels import Packed
from fedtune.transforms.quantize import block_levels, deadzone_rate, sign_levels, step_levels
from fedtune.transforms.sparsify import ternary_bits, ternary_levels, topk_levels, two_bit_levels
from fedtune.types import Client, Round, Update
from fedtune.wire.scales import expand, rounded
from tests.waiting import PATIENCE

RNG = np.random.default_rng(0)


def step(**fields: object) -> Packed:
    made = build([TypeAdapter(ChainStep).validate_python(fields)]).steps[0]
    assert isinstance(made, Packed) or fields["step"] == "auto"
    return made  # type: ignore[return-value]


def test_two_bits_round_to_the_blocks_largest() -> None:
    values = {
        "w": np.array([4.0, -1.9, 2.1, 0.0] + [0.0] * 60 + [0.5, -0.5])
    }  # blocks with 4 and 0.5 as largest
    levels, scales = block_levels(values, RNG, 1, random=False)
    assert levels["w"].tolist() == [1, 0, 1, 0] + [0] * 60 + [1, -1]
    assert scales["w"].tolist() == [4.0, 0.5]


@pytest.mark.parametrize("top", [1, 7, 127])
def test_blocks_equal_a_naive_twin(top: int) -> None:
    value = RNG.normal(0, 1e-4, (5, 77))
    levels, scales = block_levels({"w": value}, RNG, top, random=False)
    flat, got = value.reshape(-1), levels["w"].reshape(-1)
    largest = rounded(
        {"w": np.array([max(abs(x) for x in flat[i : i + 64]) / top for i in range(0, flat.size, 64)])}
    )["w"]
    assert np.array_equal(scales["w"], largest)
    assert got.tolist() == [
        max(-top, min(top, round(x / float(largest[i // 64])))) for i, x in enumerate(flat)
    ]


def test_stochastic_rounding_is_right_on_average() -> None:
    value = np.full(64, 0.3)
    value[0] = 1.0
    draws = [
        block_levels({"w": value}, np.random.default_rng(seed), 1, random=True)[0]["w"][1:].mean()
        for seed in range(200)
    ]
    assert np.mean(draws) == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / (63 * 200)))


def test_stochastic_draws_differ_by_client_and_round() -> None:
    chain = build(
        [TypeAdapter(ChainStep).validate_python({"step": "quantize", "bits": 2, "rounding": "stochastic"})]
    )
    update = Update.of({"w": RNG.normal(size=200).astype(np.float32)})
    sent = {
        (c, r): chain.send(update, Client(c, "", None, None), Round(r, 1, ())).tensors["w"].tobytes()
        for c in (0, 1)
        for r in (1, 2)
    }
    assert len(set(sent.values())) == 4


def test_sign_by_hand() -> None:
    levels, scales = sign_levels({"w": np.array([3.0, -1.0, 0.0]), "b": np.array([-5.0])})
    assert levels["w"].tolist() == [1, -1, 0] and levels["b"].tolist() == [-1]
    assert (scales["w"], scales["b"]) == (2.0, 5.0)


def test_the_unbiased_sign_is_as_long_along_the_numbers_as_they_are() -> None:
    levels, scales = sign_levels({"w": np.array([3.0, -1.0, 0.0]), "b": np.zeros(2)}, unbiased=True)
    assert (scales["w"], scales["b"]) == (2.5, 0.0) and levels["w"].tolist() == [1, -1, 0]  # 10 / 4
    value = RNG.standard_t(3, 5000) * 1e30
    levels, scales = sign_levels({"w": value}, unbiased=True)
    assert (value / 1e30) @ (expand(levels["w"], scales["w"]) / 1e30) == pytest.approx(
        (value / 1e30) @ (value / 1e30), rel=1e-3
    )


def test_deadzone_by_hand() -> None:
    values = {
        "w": np.array([1.0, -1.0, 5.0, 0.0, 0.0, 0.0])
    }  # root mean square 2.1213, step the same: 1 is in the dead zone
    levels, scales = step_levels(values, 1.0)
    assert levels["w"].tolist() == [0, 0, 2, 0, 0, 0]
    assert scales["w"] == 2.5  # fits 2 levels to 5


def test_deadzone_reaches_the_largest_number() -> None:
    value = np.full(100_000, 1e-3)
    value[7] = 1.0  # 316 root mean squares
    levels, scales = step_levels({"w": value}, 1.0)
    assert levels["w"].max() == 127
    assert expand(levels["w"], scales["w"])[7] == pytest.approx(1.0, rel=1e-3)


def test_ternary_has_one_threshold_for_all_tensors() -> None:
    values = {"a": np.array([9.0, -7.0, 1.0, 0.5]), "b": np.array([8.0, 0.1])}
    levels, scales = ternary_levels(values, 0.5)
    assert levels["a"].tolist() == [1, -1, 0, 0] and levels["b"].tolist() == [1, 0]
    assert (scales["a"], scales["b"]) == (8.0, 8.0)


def test_compefts_scale_is_that_of_its_code() -> None:
    """alpha * std of the whole vector, for every tensor (ComPEFT, ties_utils.py)."""
    values = {"a": RNG.normal(0, 1, 500), "b": RNG.normal(0, 3, 300)}
    levels, scales = ternary_levels(values, 0.1, alpha=4.0)
    spread = 4.0 * np.concatenate([values["a"], values["b"]]).std()
    assert scales["a"] == scales["b"] == pytest.approx(spread, rel=2**-11)
    assert sum(int(np.count_nonzero(level)) for level in levels.values()) == 80


def test_zeros_are_never_kept() -> None:
    levels, _ = ternary_levels({"w": np.array([0.0, 0.0, 0.0, 2.0])}, 0.75)
    assert levels["w"].tolist() == [0, 0, 0, 1]


def test_topk_sends_the_values() -> None:
    values = {"w": np.array([[0.1, -4.0], [3.0, 0.2]])}
    levels, scales = topk_levels(values, 0.5)
    assert expand(levels["w"], scales["w"]).tolist() == [[0.0, -4.0], [3.0, 0.0]]


def test_each_chunk_sends_its_largest() -> None:
    """Chunks run through all tensors in name order; the last may be shorter, and sends one number at least."""
    values = {"b": np.array([[5.0, 0.5], [0.4, -0.6]]), "a": np.array([1.0, -9.0, 2.0])}
    levels, _ = ternary_levels(values, 0.34, chunk=3)
    assert levels["a"].tolist() == [0, -1, 0] and levels["b"].tolist() == [[1, 0], [0, -1]]


@pytest.mark.parametrize(("chunk", "count"), [(1, 200), (7, 29), (64, 10), (200, 10), (201, 10), (0, 10)])
def test_chunks_equal_a_naive_twin(chunk: int, count: int) -> None:
    value = RNG.normal(size=200)
    got = np.flatnonzero(ternary_levels({"w": value}, 0.05, chunk=chunk)[0]["w"]).tolist()
    want: list[int] = []
    for start in range(0, 200, chunk or 200):
        part = list(range(start, min(200, start + (chunk or 200))))
        want += sorted(part, key=lambda i: -abs(value[i]))[: max(1, round(0.05 * len(part)))]
    assert got == sorted(want) and len(got) == count


def test_two_bits_say_the_sign_and_which_half() -> None:
    levels, scales = two_bit_levels({"w": np.array([0.1, -2.0, 0.2, 4.0, 2.0]), "z": np.zeros(2)}, 0.43)
    assert levels["w"].tolist() == [0, -2, 0, 3, 2]  # the mean of what is sent is 2.67
    assert scales["w"] == pytest.approx((2 * 2 + 2 * 2 + 4 * 3) / (4 + 4 + 9), rel=2**-11)
    assert scales["z"] == 0


def test_two_bits_err_less_than_signs() -> None:
    values = {"w": RNG.laplace(size=50_000)}
    for keep in (0.02, 0.05, 0.2):
        errors = {
            code: float(np.sum((expand(levels["w"], scales["w"]) - values["w"])[levels["w"] != 0] ** 2))
            for code in (ternary_levels, two_bit_levels)
            for levels, scales in [code(values, keep)]
        }
        assert errors[two_bit_levels] < 0.6 * errors[ternary_levels]


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-6, 1.0, 65504.0, 1e30])
def test_scales_keep_eleven_bits_at_every_size(size: float) -> None:
    scales = {"a": np.float64(size), "b": np.array([0.0, size / 3, size / 1000])}
    once = rounded(scales)
    assert once["a"] == pytest.approx(size, rel=2**-11)
    assert once["b"] == pytest.approx(scales["b"], rel=2**-11 if size > 1e-30 else 1e-2)
    again = rounded(once)
    assert all(np.array_equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("size", [2047.9 / 2048, 65535.0 / 65536, 0.99999])
def test_a_scale_that_rounds_up_to_a_power_of_two(size: float) -> None:
    once = rounded({"a": np.array([size, 3e-9])})
    assert np.array_equal(rounded(once)["a"], once["a"])


def test_float32_is_the_end() -> None:
    with pytest.raises(OverflowError):
        rounded({"a": 3.4028e38 * 1.01})


# --- auto ---


def test_kurtosis_of_known_shapes() -> None:
    assert kurtosis({"w": np.array([1.0, -1.0, 1.0])}) == 1.0
    assert kurtosis({"a": RNG.uniform(-1e30, 1e30, 100_000)}) == pytest.approx(1.8, abs=0.02)
    assert kurtosis({"a": RNG.normal(size=200_000)}) == pytest.approx(3.0, abs=0.1)
    assert kurtosis({"w": np.zeros(3)}) == 3.0


@pytest.mark.parametrize(
    ("measured", "ratio", "name", "rate", "feedback"),
    [
        (2.0, 1.9, "quantize", 8.0, False),
        (2.0, 3.8, "quantize", 3.9, False),
        (2.0, 8.0, "quantize", 1.5, False),
        (2.0, 15.0, "sign", 1.0, True),
        (3.0, 15.0, "ternary", 0.93, True),
        (5.0, 15.0, "ternary", 0.57, True),
        (2.0, 40.0, "ternary", 0.40, True),
    ],
)
def test_auto_picks_the_most_faithful_that_fits(
    measured: float, ratio: float, name: str, rate: float, feedback: bool
) -> None:
    pick = choose(measured, AutoSettings(step="auto", ratio=ratio))
    assert (pick.name, pick.feedback) == (name, feedback)
    assert pick.rate == pytest.approx(rate, abs=0.01)
    assert pick.bits(Schema((("w", (1000, 1000)),)), 32.0) <= 16 / ratio + 0.01


def test_auto_says_what_it_chose_and_why() -> None:
    auto = step(step="auto", ratio=15.0)
    sent = auto.on_client(
        Update.of({"w": np.float32([1, -1, 1, 1])}), Client(0, "", None, None), Round(1, 1, (0,))
    )
    assert sent.notes == (
        "auto: sign at about 1.00 bits with error feedback, because the kurtosis is 1.00 and the target 15 "
        "times smaller than bfloat16",
    )


class Meet(Transform):
    """Lets nobody on before both clients have come through the steps before it."""

    takes: ClassVar[Kind] = "any"
    gives: ClassVar[Kind] = "same"

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=PATIENCE)

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        self.barrier.wait()
        return update


def test_two_clients_in_threads_through_one_chain_keep_their_own_notes() -> None:
    chain = Chain([AutoSettings(step="auto", ratio=15.0).build(), Meet()])
    now, far = Round(1, 1, (0, 1)), np.float32([100] + [0.1] * 99)
    values = {0: np.float32([1, -1] * 50), 1: far}  # signs, and a heavy tail

    def notes(client: int) -> tuple[str, ...]:
        return chain.send(Update.of({"w": values[client]}), Client(client, "", None, None), now).notes

    with ThreadPoolExecutor(2) as pool:
        signs, sparse = pool.map(notes, (0, 1))
    assert "sign at" in signs[0] and "ternary at" in sparse[0] and len(signs) == len(sparse) == 1


def test_notes_are_no_part_of_a_sum() -> None:
    one = replace(Update.of({"w": np.float32([1])}), notes=("why",))
    assert (one + one).notes == () and one.shifted({"w": np.float32([1])}, -1).notes == ("why",)


def test_auto_without_client_state_stops_at_two_bits() -> None:
    with pytest.raises(ValidationError, match="at most 9"):
        AutoSettings(step="auto", ratio=15.0, error_feedback=False)


def test_density_inverts_the_entropy() -> None:
    for share in (0.01, 0.05, 0.2):
        assert density(1.008 * ternary_bits(share)) == pytest.approx(share, rel=1e-6)


# --- registry and estimates ---


def test_every_step_can_be_named_in_a_recipe() -> None:
    union = get_args(get_args(ChainStep)[0])
    assert set(STEPS.values()) == set(union)
    for name, settings in STEPS.items():
        assert TypeAdapter(ChainStep).validate_python({"step": name}) == settings(step=name)


def test_estimates_are_the_entropies_of_the_facts() -> None:
    schema = Schema((("w", (1_000_000,)),))

    def bits(**fields: object) -> float:
        return bits_per_parameter(build([TypeAdapter(ChainStep).validate_python(fields)]), schema)

    assert bits_per_parameter([], schema) == 32
    assert bits(step="quantize", bits=4) == pytest.approx(3.9 + 0.25)
    assert bits(step="sign") == pytest.approx(1.0, abs=1e-3)
    for keep, entropy in ((0.05, 0.336), (0.1, 0.569), (0.2, 0.922)):
        assert bits(step="ternary", keep=keep) == pytest.approx(entropy, rel=0.01)
        assert bits(step="topk", keep=keep) == pytest.approx(entropy + 16 * keep, rel=0.01)
        assert bits(step="topk", keep=keep, bits=2) == pytest.approx(entropy + keep, rel=0.01)


def test_the_deadzones_rate_is_that_of_normal_numbers() -> None:
    levels, _ = step_levels({"w": RNG.normal(size=400_000)}, 1.0)
    _, counts = np.unique(levels["w"], return_counts=True)
    shares = counts / counts.sum()
    assert deadzone_rate(1.0) == pytest.approx(-(shares * np.log2(shares)).sum(), abs=0.01)


def test_the_dithers_rate_is_that_of_normal_numbers() -> None:
    levels = nearest(RNG.normal(size=400_000), 2.7, RNG.random(400_000) - 0.5)
    _, counts = np.unique(levels, return_counts=True)
    shares = counts / counts.sum()
    assert dither_rate(2.7) == pytest.approx(-(shares * np.log2(shares)).sum(), abs=0.01)


def test_the_dithers_errors_are_uniform_and_average_out_over_clients() -> None:
    """Sixteen clients that all say the same: plain rounding errs alike on each, dither's errors have a
    sixteenth of the variance."""
    step, now = Dither(DitherSettings(step="dither", sigma=2.0)), Round(1, 5, tuple(range(16)))
    values = {"w": np.float32(RNG.normal(size=20_000))}
    errors = []
    for number in now.members:
        sent = step.on_client(Update.of(values), Client(number, f"site-{number}", None, None), now)
        errors.append(step.on_reply(sent, number, now).tensors["w"] - values["w"])
    width = 2.0 * float(np.sqrt(np.mean(np.square(values["w"], dtype=np.float64))))
    assert np.abs(errors).max() <= width / 2 * 1.001
    assert np.var(errors[0]) == pytest.approx(width**2 / 12, rel=0.03)
    assert np.var(np.mean(errors, axis=0)) == pytest.approx(width**2 / 12 / 16, rel=0.05)
