"""A head that starts from the data: the sum over clients is that of one client with all rows, the head says
the right class before any training, and
every method, engine and exported file agrees on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedtune
from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.events import Scored
from fedtune.methods.head_start import TEMPERATURE, lda_head, means_head, ridge_head
from fedtune.model.features import class_sums
from fedtune.model.loss import inputs_of
from fedtune.runtime.check import check, rows
from fedtune.runtime.run import run
from tests import small, tiny
from tests.marks import mostly_thorough

WALK = {"type": "fedkseed", "size": 256, "steps": 2, "batch": 4, "lr": 1e-9, "estimator": "spsa"}
SPLIT = {
    "type": "sfprompt",
    "prompts": 2,
    "prompt_lr": 1e-9,
    "codec": "fp32",
    "train": {"lr": 1e-9, "head_lr": 1e-9, "steps": 1, "batch": 4},
}
STILL = {
    "type": "fedpeft",
    "adapter": {"kind": "lora", "rank": 2},
    "train": {"lr": 1e-9, "head_lr": 1e-9, "steps": 1, "batch": 4},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"), 240)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("bert"))


def recipe_of(bert: Path, data: Path, **changes: Any) -> config.Recipe:
    return small.recipe(
        bert,
        data,
        **{
            "rounds": 1,
            "model__pooling": "mean",
            "evaluate": {"local": False, "centralised": False, "base": True},
        }
        | changes,
    )


@pytest.mark.parametrize("moments", [False, True])
def test_the_sum_over_clients_is_that_of_one_client_with_all_rows(
    moments: bool, bert: Path, data: Path
) -> None:
    workspace, _ = small.workspace_of(recipe_of(bert, data))
    parts = [
        (len(workspace.train(n)), class_sums(workspace.tunable, workspace.train(n), moments))
        for n in workspace.names
    ]
    whole = class_sums(workspace.tunable, workspace.pooled(), moments)
    total = sum(count for count, _ in parts)
    for name, value in whole.items():
        np.testing.assert_allclose(
            sum(count * means[name] for count, means in parts) / total, value, rtol=1e-6, atol=1e-9
        )
    assert (
        whole["shares"].sum() == pytest.approx(1.0)
        and whole["sums"].shape == (3, 32)
        and (whole["moments"].shape == (32, 32) if moments else True)
    )


def test_a_decoder_is_read_where_its_own_class_takes_the_scores_from(data: Path, tmp_path: Path) -> None:
    """At each text's last token, however long the texts beside it in a batch are."""
    workspace, _ = small.workspace_of(
        recipe_of(tiny.llama(tmp_path / "llama", chat=False), data, model__pooling="auto", data__limit=20)
    )
    tunable, texts = workspace.tunable, workspace.pooled()
    given, wanted = list[torch.Tensor](), np.zeros((3, 32))
    head = next(
        m for m in tunable.base.net.modules() if getattr(m, "weight", None) is tunable.named[tunable.head]
    )
    handle = head.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    with torch.no_grad():
        for at in range(len(texts)):
            arguments, labels = inputs_of(tunable, texts.collate([at]))
            tunable.net.eval()(**arguments)
            last = given[-1][0, -1].double().numpy()
            wanted[int(labels)] += last / np.linalg.norm(last) / len(texts)
    handle.remove()
    np.testing.assert_allclose(class_sums(tunable, texts)["sums"], wanted, rtol=1e-4, atol=1e-7)


def test_the_heads_are_what_their_formulas_say() -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    draw = np.random.default_rng(0)
    centres = draw.normal(size=(3, 6))
    labels = np.repeat([0, 1], 40)  # nobody has class 2
    features = centres[labels] + 0.1 * draw.normal(size=(80, 6))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    hot = np.eye(3)[labels]
    said = {
        "sums": hot.T @ unit / 80,
        "shares": hot.mean(0),
        "norm": np.array([np.linalg.norm(features, axis=1).mean()]),
        "moments": unit.T @ unit / 80,
    }
    means = means_head(said)
    for number in (0, 1):
        mean = unit[labels == number].mean(0)
        np.testing.assert_allclose(
            means[number], TEMPERATURE * mean / np.linalg.norm(mean) / said["norm"], rtol=1e-6
        )
    np.testing.assert_allclose(means[2], means[:2].mean(0))
    matrix, bias = lda_head(said)
    both = (labels == 0) | (labels == 1)
    known = LinearDiscriminantAnalysis(priors=[0.5, 0.5]).fit(unit[both], labels[both])
    margin = unit @ (matrix[1] - matrix[0]) * said["norm"] + bias[1] - bias[0]
    theirs = known.decision_function(unit)
    assert np.corrcoef(margin, theirs)[0, 1] > 0.999 and ((margin > 0) == labels[both]).all()
    assert not matrix[2].any() and bias[2] == 0  # nobody has it: the mean of the others, which is nothing
    ridge = ridge_head(said) * said["norm"] / TEMPERATURE
    penalty = 1e-2 * np.trace(said["moments"]) / 6
    want = np.linalg.solve(unit.T @ unit / 80 + penalty * np.eye(6), unit.T @ hot / 80).T
    np.testing.assert_allclose(ridge, want, rtol=1e-6, atol=1e-9)
    assert all((features @ head.T).argmax(1)[i] == labels[i] for head in (means, ridge) for i in range(80))


@pytest.mark.parametrize("method", [STILL, WALK, SPLIT], ids=lambda method: method["type"])
@pytest.mark.parametrize("kind", mostly_thorough(["means", "ridge", "lda", "auto"], ["auto"]))
def test_a_model_knows_the_classes_before_it_is_trained(
    method: dict[str, Any], kind: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    scores: dict[str, float] = {}

    def tell(event: Any) -> None:
        if isinstance(event, Scored):
            scores[event.phase] = event.value

    folder = small.create(tmp_path, "", "run")
    recipe = recipe_of(bert, data, method=method | {"head_start": kind})
    folder.begin(recipe)
    run(recipe, folder, tell)
    assert scores["federated"] > 0.8 > 0.55 > scores["base"]  # the rates above move nothing


def test_auto_leaves_a_head_that_a_file_has_trained_and_language_models_alone(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    import transformers

    trained = tmp_path / "trained"
    names = dict(enumerate(sorted(small.WORDS)))
    net = transformers.AutoModelForSequenceClassification.from_pretrained(
        bert, num_labels=3, id2label=names, label2id={v: k for k, v in names.items()}
    )
    net.save_pretrained(trained)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(trained)
    workspace, link = small.workspace_of(recipe_of(trained, data, method=STILL | {"head_start": "auto"}))
    assert not workspace.tunable.head and not link.method.start(workspace.tunable).kept
    with pytest.raises(FedtuneError, match=r"M306.*no fresh head of classes"):
        workspace, link = small.workspace_of(recipe_of(trained, data, method=STILL | {"head_start": "means"}))
        link.method.start(workspace.tunable)
    with pytest.raises(FedtuneError, match=r"C104.*method.head_start = 'ridge' with data.task = 'causal-lm'"):
        recipe_of(bert, data, method=STILL | {"head_start": "ridge"}, data__task="causal-lm")
    with pytest.raises(FedtuneError, match=r"C104.*head_start = 'means' with method.start_from"):
        recipe_of(bert, data, method=STILL | {"head_start": "means", "start_from": "x"})


def test_check_says_what_the_question_shows_and_costs(bert: Path, data: Path) -> None:
    said = "\n".join(rows(check(recipe_of(bert, data, method=STILL | {"head_start": "auto"}))))
    assert (
        "verb 'features': sees each client's answer as it passes, uses the sum only (the share of each class"
        in said
    )
    assert "once before the first round: up" in said and "model     pooling: mean" in said
    assert "features" not in "\n".join(
        rows(check(recipe_of(bert, data, method=STILL | {"head_start": "random"})))
    )


def test_a_seed_file_rebuilds_the_started_head(bert: Path, data: Path, tmp_path: Path) -> None:
    from fedtune.runtime.finished import export_run, export_seeds
    from fedtune.runtime.folder import existing

    walk = WALK | {"lr": 1e-3, "space": "adapter", "adapter": {"kind": "bias"}}
    result = fedtune.simulate(
        small.tree(bert, data, rounds=2, method=walk | {"head_start": "means"}), runs=tmp_path / "runs"
    )
    export_run(existing(result.folder), "seeds", tmp_path / "seeds")
    export_seeds(tmp_path / "seeds", str(bert), "adapter", tmp_path / "rebuilt")
    export_run(existing(result.folder), "adapter", tmp_path / "direct")
    (one, tokenizer), (two, _) = fedtune.load(tmp_path / "rebuilt"), fedtune.load(tmp_path / "direct")
    batch = tokenizer(["the red fox"], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert torch.equal(one(**batch).logits, two(**batch).logits)


def test_classes_that_no_member_of_the_first_round_has_start_in_the_middle() -> None:
    said = {
        "sums": np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
        "shares": np.array([0.5, 0.5, 0.0]),
        "norm": np.array([2.0]),
    }
    np.testing.assert_allclose(means_head(said), np.array([[8.0, 0.0], [0.0, 8.0], [4.0, 4.0]]))


CODED = (
    {"step": "sign"},
    {"step": "ternary", "keep": 0.05},
    {"step": "dither"},
    {"step": "auto", "ratio": 10},
)


@pytest.mark.parametrize("code", mostly_thorough(CODED, CODED[:1]), ids=lambda code: str(code["step"]))
def test_codes_for_updates_leave_what_a_head_starts_from_alone(
    code: dict[str, Any], bert: Path, data: Path, tmp_path: Path
) -> None:
    """A bit a number of class sums starts no head; the run begins where one without a code does."""

    def start(name: str, *chain: dict[str, Any]) -> list[float]:
        still = {"method__head_start": "lda", "method__train__lr": 1e-12, "chain": list(chain)}
        recipe = small.recipe(bert, data, rounds=1, evaluate__every=1, **still)
        _, _, events = small.play(recipe, tmp_path / name)
        return [event.loss for event in events if isinstance(event, Scored)]

    plain, coded = start("plain"), start("coded", code)
    assert len(plain) >= 2 and np.allclose(plain, coded, rtol=1e-4)
    shown = rows(check(small.recipe(bert, data, method__head_start="lda", chain=[code])))
    (passes,) = [line for line in map(str, shown) if "unit features" in line]
    assert code["step"] not in passes


@pytest.mark.parametrize("start", mostly_thorough(["means", "ridge", "lda"], ["lda"]))
@pytest.mark.parametrize(
    "method",
    [
        STILL,
        {**STILL, "lora_start": "eva"},
        {**STILL, "type": "experts", "experts": {"by": "clients"}},
        WALK,
        {**WALK, "estimator": "gradient", "train": {"lr": 1e-9, "head_lr": 1e-9, "steps": 1, "batch": 4}},
        SPLIT,
    ],
    ids=["fedpeft", "eva", "experts", "walks", "gradients", "sfprompt"],
)
def test_what_the_federation_is_compared_with_starts_from_its_own_data_too(
    method: dict[str, Any], start: str, bert: Path, data: Path, tmp_path: Path
) -> None:
    """Nobody moves from the start, so all rows in one place score what the federation scores."""
    compared = {"local": True, "centralised": True, "base": True}
    recipe = recipe_of(bert, data, method=method | {"head_start": start}, evaluate=compared)
    _, result, _ = small.play(recipe, tmp_path)
    loss = result["phases"]["loss"]
    assert loss["centralised"] == pytest.approx(loss["federated"], rel=1e-3)
    assert loss["base"] != pytest.approx(loss["federated"], rel=1e-2)
    assert loss["local"] != pytest.approx(loss["base"], rel=1e-2)
