"""fedtune: federated fine-tuning of one pretrained model, on Flower.

Importing this package loads neither torch nor Flower; docs/architecture.md shows what imports what.
"""

from typing import TYPE_CHECKING, Any

from fedtune.threads import shorten_spinning

if TYPE_CHECKING:
    from fedtune.api import Result as Result
    from fedtune.api import check as check
    from fedtune.api import evaluate as evaluate
    from fedtune.api import export as export
    from fedtune.api import forget as forget
    from fedtune.api import live as live
    from fedtune.api import load as load
    from fedtune.api import merge as merge
    from fedtune.api import patch as patch
    from fedtune.api import predict as predict
    from fedtune.api import recipe as recipe
    from fedtune.api import simulate as simulate
    from fedtune.api import stream as stream
    from fedtune.api import sweep as sweep
    from fedtune.config import Recipe
    from fedtune.errors import FedtuneError


__version__ = "0.1.0"

# here, since torch reads the setting when it is imported, and everything of fedtune comes before that
shorten_spinning()

API = (
    "Result",
    "check",
    "evaluate",
    "export",
    "forget",
    "live",
    "load",
    "merge",
    "patch",
    "predict",
    "recipe",
    "simulate",
    "stream",
    "sweep",
)
__all__ = [*API, "FedtuneError", "Recipe", "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import fedtune` stays light."""
    if name in API:
        from fedtune import api

        return getattr(api, name)
    if name == "Recipe":
        from fedtune.config import Recipe

        return Recipe
    if name == "FedtuneError":
        from fedtune.errors import FedtuneError

        return FedtuneError
    raise AttributeError(f"module 'fedtune' has no attribute '{name}'")
