"""Rules between settings that no single table can check: refused while reading, with the reason. All raise C104."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedtune.aggregate import RULES, Rule
from fedtune.errors import FedtuneError
from fedtune.model.settings import TrainSettings
from fedtune.settings import Settings
from fedtune.transforms import Chain, build

if TYPE_CHECKING:
    from fedtune.config import Recipe
    from fedtune.data.settings import DataSettings

# Which keys of a table the value of its selector uses; other keys would be ignored, so they are refused.
ADAPTER_KEYS: dict[str, set[str]] = {
    "lora": {"rank", "alpha", "dropout", "targets", "last", "rslora", "dora", "modules_to_save"},
    "ia3": {"targets", "last", "modules_to_save"},
    "adapter": {"reduction", "shared"},
    "prompt": {"tokens", "deep"},
    "prefix": {"tokens"},
    "p-tuning": {"tokens"},
    "full": {"only"},
}
PARTITION_KEYS: dict[str, set[str]] = {"dirichlet": {"alpha", "column"}, "column": {"column", "all_values"}, "shards": {"column", "shards_per_client"}}
TRAIN_KEYS: dict[str, set[str]] = {"sgd": {"momentum", "nesterov"}}
TRAIN_ALWAYS = set(TrainSettings.model_fields) - {"momentum", "nesterov"}
SELECTORS: dict[str, tuple[set[str], dict[str, set[str]]]] = {
    "method.adapter.kind": ({"kind"}, ADAPTER_KEYS),
    "partition.by": ({"by", "clients", "min_rows"}, PARTITION_KEYS),
    "downlink.step": ({"step"}, {"delta": {"keep"}}),
    "method.train.optimizer": (TRAIN_ALWAYS, TRAIN_KEYS),
}
SOURCE_TASKS: dict[str, set[str]] = {
    "docstrings": {"classify", "causal-lm"},
    "text": {"causal-lm"},
    "plays": {"causal-lm", "classify"},
    "clinc150": {"classify", "causal-lm"},
    "images": {"image-classify"},
    "digits": {"image-classify"},
}
FILELESS = {"docstrings", "digits"}


def check_rules(recipe: Recipe) -> None:
    """Every rule, in the order of the tables."""
    data, partition, method = recipe.data, recipe.partition, recipe.method
    known = SOURCE_TASKS.get(data.source)
    if known and data.task not in known:
        refuse(f"data.task = '{data.task}' with data.source = '{data.source}'", f"one of {', '.join(sorted(known))}", "change data.task or data.source")
    if data.source != "hub" and "split" in data.model_fields_set and data.split != "train":
        refuse(f"data.split = '{data.split}' with data.source = '{data.source}'", "data.source = 'hub'", "remove it, or name the file in data.path")
    if not data.path and data.source not in FILELESS:
        refuse(f"no data.path for data.source = '{data.source}'", "a file, a folder or a hub name", "set data.path in the recipe or with --set data.path=...")
    if partition.by == "column" and not partition.column:
        refuse("partition.by = 'column' without partition.column", "the column that names the client", "set partition.column")
    if partition.by in ("dirichlet", "shards") and not partition.column and data.task in ("causal-lm", "instruct"):
        refuse(f"partition.by = '{partition.by}' for a task without labels", "a column to skew", "set partition.column, or partition.by = 'iid'")
    if data.test_share == 0 and data.client_test_share == 0 and data.source != "clinc150":
        refuse("data.test_share = 0 and data.client_test_share = 0", "some rows to test on", "raise one of them")
    if recipe.sampling.count and "fraction" in recipe.sampling.model_fields_set:
        refuse("both sampling.count and sampling.fraction", "one of them", "remove one")
    if recipe.sampling.count > partition.clients and not partition.all_values:
        refuse(f"sampling.count = {recipe.sampling.count} of {partition.clients} clients", "at most all of them", "lower it")
    if recipe.downlink.step != "none" and not recipe.chain:
        refuse(f"downlink.step = '{recipe.downlink.step}' without a [[chain]]", "a chain with a step, so that clients answer with differences",
               "add [[chain]] step = 'quantize' bits = 8, or remove [downlink]")  # fmt: skip
    tables = {name: getattr(method, name) for name in ("adapter", "train") if hasattr(method, name)}
    for path, owner in (
        ("method.adapter.kind", tables.get("adapter")),
        ("partition.by", partition),
        ("downlink.step", recipe.downlink),
        ("method.train.optimizer", tables.get("train")),
    ):
        if owner is not None:
            check_used(path, owner)
    if data.messages and data.task != "instruct":
        refuse(f"data.messages with data.task = '{data.task}'", "data.task = 'instruct'", "remove one of them")
    check_templates(data)
    if data.stride > data.max_length:
        refuse(f"data.stride = {data.stride} above data.max_length = {data.max_length}", "at most max_length, so that no token is passed over", "lower it")
    train = tables.get("train")
    if train and train.head_lr and data.task in ("causal-lm", "instruct"):
        refuse(f"method.train.head_lr with data.task = '{data.task}'", "a task with a head of its own", "remove it")
    if train and train.steps and "epochs" in train.model_fields_set:
        refuse("method.train.epochs beside method.train.steps", "one of them", "set steps = 0 to train whole epochs")
    if train and train.nesterov and not train.momentum:
        refuse("method.train.nesterov without momentum", "momentum above 0", "set method.train.momentum")
    for table in tables_of(recipe):
        for conflict in table.conflicts(recipe):
            refuse(*conflict)
    check_single_answers(recipe.aggregate, build(recipe.chain))


def check_templates(data: DataSettings) -> None:
    """Keys that say how prompts and conversations become texts, where nothing would use them."""
    for key, unused in (("template", "auto"), ("system", "")):
        if getattr(data, key) != unused and data.task != "instruct":
            refuse(f"data.{key} with data.task = '{data.task}'", "data.task = 'instruct'", "remove one of them")
    own = data.template not in ("auto", "chat")  # the text is the user's own, and no chat template writes it
    if own and data.messages:
        refuse(f"data.template = '{data.template}' with data.messages", "the model's chat template", "remove one of them")
    if own and data.system:
        refuse(f"data.system with data.template = '{data.template}'", "a chat template, which knows where it goes", "write it into data.template")
    if "{response}" in data.template.removesuffix("{response}"):
        refuse("data.template with {response} before its end", "a text that goes before the response", "end data.template where the response begins")


def check_single_answers(rule: Rule, chain: Chain) -> None:
    """A rule that reads single answers cannot stand beside a step that only the sum undoes, such as a mask."""
    late = next((step.name for step in chain.steps if step.undone == "sum" or step.hides), "")
    if late and not rule.linear:
        found = f"aggregate.rule = '{rule.rule}', which reads single answers, beside '{late}', which hides them"
        refuse(
            found,
            f"a rule that needs the sum only: {', '.join(sorted(tag for tag, other in RULES.items() if other.linear))}",
            f"change aggregate.rule, or remove '{late}' from [[chain]]",
        )


def tables_of(settings: Settings) -> Iterator[Settings]:
    """A settings object and all tables inside it."""
    yield settings
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for below in value if isinstance(value, tuple) else (value,):
            if isinstance(below, Settings):
                yield from tables_of(below)


def used(path: str, value: str) -> set[str]:
    """Keys that may stand beside a selector of that value."""
    always, by_value = SELECTORS[path]
    return always | by_value.get(value, set())


def check_used(path: str, owner: Settings) -> None:
    """A key that the selector's value would ignore is a mistake, not a wish."""
    parent, _, selector = path.rpartition(".")
    value = str(getattr(owner, selector))
    for key in sorted(owner.model_fields_set - used(path, value)):
        refuse(f"{parent}.{key} with {path} = '{value}'", f"only {', '.join(sorted(used(path, value)))}", f"remove it or change {path}")


def refuse(found: str, expected: str, do: str) -> None:
    raise FedtuneError("C104", found, expected, do)
