"""Laws of every step that a recipe can name. A newcomer is enrolled by being in STEPS; VARIANTS adds settings
worth the same laws."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ClientFailed
from fedtune.schema import Schema, digest
from fedtune.settings import Settings
from fedtune.transforms import STEPS, Chain, Question, bits_per_parameter, build
from fedtune.transforms.dither import DitherSettings
from fedtune.types import Client, Round, Tensors, Update
from fedtune.wire import Expect, Header, decode, encode

VARIANTS: list[dict[str, Any]] = [
    {"step": "quantize", "bits": 8},
    {"step": "quantize", "bits": 2},
    {"step": "quantize", "bits": 2, "error_feedback": True},
    {"step": "quantize", "bits": 4, "rounding": "stochastic"},
    {"step": "quantize", "bits": 2, "rounding": "stochastic", "error_feedback": True},
    {"step": "dither", "sigma": 0.3},
    {"step": "sign", "error_feedback": False},
    {"step": "sign", "scale": "unbiased"},
    {"step": "sign", "scale": "unbiased", "error_feedback": False},
    {"step": "deadzone", "sigma": 0.5, "error_feedback": False},
    {"step": "ternary", "keep": 0.05},
    {"step": "ternary", "keep": 0.2, "scale": "sigma", "alpha": 3.0},
    {"step": "ternary", "error_feedback": False},
    {"step": "topk", "error_feedback": False},
    {"step": "topk", "keep": 0.05, "bits": 2, "chunk": 64, "decay": 0.95},
    {"step": "topk", "keep": 0.1, "bits": 2, "error_feedback": False},
    {"step": "topk", "keep": 0.1, "chunk": 4096, "decay": 0.5},
    {"step": "ternary", "keep": 0.05, "chunk": 100, "decay": 0.9},
    {"step": "auto", "ratio": 4.0},
    {"step": "auto", "ratio": 16.0},
    {"step": "auto", "ratio": 40.0},
]
HIDING = {
    "mask"
}  # needs an exchange of its own, and draws secrets: tests/privacy, tests/runtime/test_masked.py
QUIET: dict[str, dict[str, Any]] = {"private": {"noise_multiplier": 0.0}}  # noise keeps no law
ALL = [
    STEPS[fields["step"]](**fields)
    for fields in [
        *({"step": name, **QUIET.get(name, {})} for name in STEPS if name not in HIDING),
        *VARIANTS,
    ]
]
NOW = Round(3, 11, (0, 1, 2))
HEADER = Header("run", 3, 0, "train")


def words(settings: Settings) -> str:
    return "-".join(f"{value}" for value in settings.model_dump().values())


every = pytest.mark.parametrize("settings", ALL, ids=words)
codes = pytest.mark.parametrize(
    "settings", [s for s in ALL if s.build().tolerance is not None], ids=words
)  # steps that say numbers with fewer bits
feeding = pytest.mark.parametrize(
    "settings", [s for s in ALL if getattr(s, "error_feedback", False)], ids=words
)


def client(number: int = 0, client_state: dict[str, np.ndarray] | None = None, base: str = "base") -> Client:
    model = SimpleNamespace(
        base=SimpleNamespace(fingerprint=base)
    )  # stands for a TunableModel, of which only the base's fingerprint is read
    return Client(number, f"site-{number}", model, None, {} if client_state is None else client_state)


def difference(seed: int, scale: float = 1e-3) -> dict[str, np.ndarray]:
    """Tensors of different sizes and spreads, one of them a single number, one untouched."""
    rng = np.random.default_rng(seed)
    sizes = {"a": (40, 8), "b": (8, 30), "bias": (70,), "gate": ()}
    out = {
        name: np.float32(rng.normal(0, scale * (1 + number), shape))
        for number, (name, shape) in enumerate(sizes.items())
    }
    return out | {"untouched": np.zeros((5, 3), np.float32)}


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([np.asarray(tensors[name], np.float64).reshape(-1) for name in sorted(tensors)])


def over_the_wire(chain: Chain, update: Update) -> Update:
    expect = Expect("run", 3, 0, "train", "", Schema.of(update.tensors), chain.kinds)
    return decode(encode(update, HEADER), expect)[1]


def chain_of(settings: Settings) -> Chain:
    return build([settings]).bound(Question("run", "train", figures=("loss",)))  # type: ignore[list-item]


def read(settings: Settings, values: Tensors) -> Tensors:
    """What a server reads of one client's answer, where it reads sums alone."""
    return chain_of(settings).settle(there(settings, values, client()), replace(NOW, members=(0,))).tensors


def there(settings: Settings, values: Tensors, site: Client, weight: float = 1.0, now: Round = NOW) -> Update:
    """One answer through both halves and the wire, as the server adds it."""
    chain = chain_of(settings)
    return chain.receive(
        over_the_wire(chain, chain.send(Update.of(values, weight, {"loss": 2.0}), site, now)), site.id, now
    )


@every
def test_inputs_are_unchanged(settings: Settings) -> None:
    update = Update.of(difference(0), 5.0)
    before = digest(update.tensors)
    chain_of(settings).send(update, client(), NOW)
    assert digest(update.tensors) == before


@every
def test_same_seed_same_bytes(settings: Settings) -> None:
    def sent() -> bytes:
        return encode(chain_of(settings).send(Update.of(difference(0), 5.0), client(), NOW), HEADER)

    assert sent() == sent()


@every
def test_local_equals_remote(settings: Settings) -> None:
    chain = chain_of(settings)
    sent = chain.send(Update.of(difference(0), 7.3, {"loss": 1.1}), client(), NOW)
    here, remote = chain.receive(sent, 0, NOW), chain.receive(over_the_wire(chain, sent), 0, NOW)
    assert digest(here.tensors) == digest(remote.tensors)
    assert (here.weight, here.metrics) == (remote.weight, remote.metrics)


@codes
def test_the_sum_is_kept_within_the_tolerance(settings: Settings) -> None:
    chain = chain_of(settings)
    tolerance = chain.steps[0].tolerance or 0.0
    answers = [(difference(site), 1.0 + 2 * site) for site in range(3)]
    total = None
    for site, (values, weight) in enumerate(answers):
        answer = there(settings, values, client(site), weight)
        total = answer if total is None else total + answer
    assert total is not None
    want = sum(weight * flat(values) for values, weight in answers)
    room = tolerance * sum(weight * np.linalg.norm(flat(values)) for values, weight in answers)
    assert np.linalg.norm(flat(chain.settle(total, NOW).tensors) - want) <= room
    assert total.weight == 9.0
    assert total.metrics == {"loss": 18.0}


@every
def test_names_and_shapes_are_kept(settings: Settings) -> None:
    values = difference(0) | {"none": np.zeros((0, 4), np.float32)}
    assert Schema.of(read(settings, values)) == Schema.of(values)


@every
def test_zeros_stay_zeros(settings: Settings) -> None:
    values = {name: np.zeros_like(value) for name, value in difference(0).items()}
    assert not flat(read(settings, values)).any()


@codes
@pytest.mark.parametrize("number", [0.5, -3e-7, 1e30, -1e30])
def test_one_element(settings: Settings, number: float) -> None:
    got = there(settings, {"w": np.float32([number])}, client()).tensors["w"]
    if isinstance(settings, DitherSettings):  # anywhere within half a step
        assert abs(got[0] - number) <= settings.sigma / 2 * 1.001 * abs(number)
        return
    waits = (
        getattr(settings, "scale", "") == "sigma" or getattr(settings, "sigma", 0) > 1
    )  # one number has no spread; it is 1 root mean square
    assert got[0] == (0 if waits else pytest.approx(number, rel=1e-3))


@codes
def test_huge_values_are_sent(settings: Settings) -> None:
    values = {name: value * np.float32(1e33) for name, value in difference(0).items()}
    got, want = flat(there(settings, values, client()).tensors), flat(values)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got - want) <= settings.build().tolerance * np.linalg.norm(want)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_this_clients_failure(settings: Settings, bad: float) -> None:
    client_state: dict[str, np.ndarray] = {}
    values = {name: np.asarray(value, np.float64).copy() for name, value in difference(0).items()}
    values["a"][3, 3] = bad
    with pytest.raises(ClientFailed, match="W607"):
        build([settings]).send(Update(values), client(client_state=client_state), NOW)  # type: ignore[list-item]
    assert not client_state  # nothing of a failed answer is owed


@every
def test_the_estimate_is_near_what_travels(settings: Settings) -> None:
    values = {"w": np.random.default_rng(0).uniform(-1, 1, (200, 200)).astype(np.float32)}
    chain = chain_of(settings)
    sent = 8 * len(encode(chain.send(Update.of(values), client(), NOW), HEADER)) / 40_000
    told = bits_per_parameter(chain, Schema.of(values))
    assert 0.8 * told < sent < 1.25 * told + 0.05  # 0.05: 250 bytes of header in so short a message


# --- error feedback ---


def residual(client_state: dict[str, np.ndarray]) -> np.ndarray:
    return flat({key: value for key, value in client_state.items() if key.startswith("residual/")})


@feeding
def test_what_was_sent_and_the_residual_are_what_was_to_be_sent(settings: Settings) -> None:
    """Over any number of rounds; of what was owed, `decay` is left each round."""
    site, sent, wanted, decay = client(), 0.0, 0.0, settings.model_dump().get("decay", 1.0)
    for number in range(1, 7):
        values, weight = difference(number), float(number)  # the weight changes and must not matter
        wanted = wanted + flat(values) - (1 - decay) * (residual(site.state) if site.state else 0.0)
        sent = sent + flat(there(settings, values, site, weight, replace(NOW, number=number)).mean().tensors)
    if not site.state:
        pytest.skip("auto chose a code without a client state")
    np.testing.assert_allclose(sent + residual(site.state), wanted, atol=1e-6 * np.abs(wanted).max())


@feeding
def test_the_residual_survives_a_restart(settings: Settings) -> None:
    def second(client_state: dict[str, np.ndarray]) -> Tensors:
        return there(
            settings, difference(2), client(client_state=client_state), now=replace(NOW, number=4)
        ).tensors

    kept: dict[str, np.ndarray] = {}
    there(settings, difference(1), client(client_state=kept))
    copied = {
        name: np.frombuffer(value.tobytes(), value.dtype).reshape(value.shape) for name, value in kept.items()
    }
    assert digest(second(kept)) == digest(second(copied))


@feeding
@pytest.mark.parametrize("change", ["base", "schema"])
def test_the_residual_of_another_model_is_dropped(settings: Settings, change: str) -> None:
    client_state: dict[str, np.ndarray] = {}
    there(settings, difference(1), client(client_state=client_state))
    values = difference(2)
    if change == "schema":
        values["a"] = values["a"].T.copy()
    base = "other" if change == "base" else "base"
    fresh = there(settings, values, client(base=base)).tensors
    assert digest(there(settings, values, client(client_state=client_state, base=base)).tensors) == digest(
        fresh
    )
