"""What a site's operator decides, as the file that its programs read it from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedtune.config import Recipe
from fedtune.deploy.sites import called
from fedtune.errors import FedtuneError


@dataclass(frozen=True)
class SiteConfig:
    """What the site's operator says; not a word of it comes from the coordinator.

    model, device, load, dtype  in place of the recipe's, "" leaves them: the same base under another path,
                   this site's own device, and how it holds the base there
    columns        --map as it was given: the recipe's names of columns and this site's
    shared         this site's copy of the rows that all sites mix into their own
    partition      for demos: the recipe may say which rows and which model's folder are read here
    cache_bytes    of states that are kept, so that they need not be sent again, and of rows that are kept as
                   tokens; 0: neither
    keep_days      for which receipts and lines of the ledger are kept; 0: for good
    first_keys     the folder that was named, where renewed keys in HOME have taken its place
    trainer        this site's own training script, "" for fedtune's local loop
    trainer_token  by which the worker knows it, new with each life of fedtune client
    """

    keys: str
    coordinator: str
    home: str
    socket: str
    data: str = ""
    model: str = ""
    device: str = ""
    policy: str = ""
    partition: bool = False
    columns: str = ""
    shared: str = ""
    cache_bytes: int = 4 << 30
    keep_days: int = 0
    load: str = ""
    dtype: str = ""
    first_keys: str = ""
    trainer: str = ""
    trainer_token: str = field(default="", repr=False)

    @classmethod
    def read(cls, path: Path) -> SiteConfig:
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def require_own(config: SiteConfig) -> None:
    """What the site's operator named has to be there before anybody asks for it. Raises M301 for --device and
    --model. Reads no weights."""
    if config.device:
        from fedtune.model.device import pick_device

        with called("model.device", "--device"):
            pick_device(config.device)
    if config.model:
        from fedtune.hf.config import require_model
        from fedtune.model.base import reading

        with called("model.name", "--model"), reading(config.model):
            require_model(config.model)


def with_own_model(recipe: Recipe, config: SiteConfig) -> Recipe:
    """The coordinator's recipe with this site's model. Raises C104 for a --load that the recipe cannot
    take."""
    own = {"name": config.model, "device": config.device, "load": config.load, "dtype": config.dtype}
    model = recipe.model.model_copy(update={key: value for key, value in own.items() if value})
    mine = recipe.model_copy(update={"model": model})
    with called("model.load", "--load"):
        for found, expected, do in model.conflicts(mine):
            raise FedtuneError("C104", found, expected, do)
    return mine
