"""Rules between settings that no single table can check: refused while reading, with the reason. All raise C104."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.errors import FedtuneError
from fedtune.model.settings import AdapterSettings

if TYPE_CHECKING:
    from fedtune.config import Recipe

ADAPTER_KEYS: dict[str, set[str]] = {
    "lora": {"rank", "alpha", "dropout", "targets", "rslora", "dora"},
    "ia3": {"targets"},
    "adapter": {"reduction", "shared"},
    "prompt": {"tokens", "deep"},
    "prefix": {"tokens"},
    "p-tuning": {"tokens"},
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
    check_adapter(method.adapter)
    if method.train.steps and "epochs" in method.train.model_fields_set:
        refuse("method.train.epochs beside method.train.steps", "one of them", "set steps = 0 to train whole epochs")
    for table in ("train", "server"):
        settings = getattr(method, table)
        if settings.nesterov and not settings.momentum:
            refuse(f"method.{table}.nesterov without momentum", "momentum above 0", f"set method.{table}.momentum")
        if settings.optimizer != "sgd" and settings.momentum:
            refuse(f"method.{table}.momentum with optimizer '{settings.optimizer}'", "optimizer = 'sgd'", f"change method.{table}.optimizer or remove momentum")


def check_adapter(adapter: AdapterSettings) -> None:
    """A setting that the chosen kind would ignore is a mistake, not a wish."""
    used = ADAPTER_KEYS.get(adapter.kind, set()) | {"kind"}
    ignored = sorted(adapter.model_fields_set - used)
    if ignored:
        refuse(f"method.adapter.{ignored[0]} for kind '{adapter.kind}'", f"only {', '.join(sorted(used))}", "remove it or change the kind")


def refuse(found: str, expected: str, do: str) -> None:
    raise FedtuneError("C104", found, expected, do)
