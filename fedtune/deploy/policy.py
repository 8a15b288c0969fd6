"""What a site allows, in a file of its own: the coordinator cannot change it.

methods = ["fedpeft"]            # what may be done here; empty: everything
models = ["/models/llama"]       # base models, as the recipe or --model names them; empty: every one
require = ["sign"]               # chain steps without which nothing leaves the house
update_bytes = 50_000_000        # most bytes of one update; 0: the coordinator's budget
"""

from __future__ import annotations

import tomllib
from os.path import expanduser
from pathlib import Path

from pydantic import Field, ValidationError

from fedtune.config import Recipe, sentence
from fedtune.errors import FedtuneError
from fedtune.settings import Settings


class Policy(Settings):
    """The file's keys."""

    methods: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    update_bytes: int = Field(0, ge=0)

    def check(self, recipe: Recipe, budget: int) -> None:
        """Raises F507."""
        steps = [step.step for step in recipe.chain]
        if self.methods and recipe.method.type not in self.methods:
            raise forbidden(f"method '{recipe.method.type}'", f"one of {', '.join(self.methods)}")
        if self.models and expanduser(recipe.model.name) not in map(expanduser, self.models):
            raise forbidden(f"base model '{recipe.model.name}'", f"one of {', '.join(self.models)}")
        if lacking := [name for name in self.require if name not in steps]:
            raise forbidden(f"a message chain without '{lacking[0]}'", f"one with {', '.join(self.require)}")
        if self.update_bytes and budget > self.update_bytes:
            raise forbidden(f"updates of up to {budget} bytes", f"at most {self.update_bytes}")


def forbidden(found: str, expected: str) -> FedtuneError:
    return FedtuneError("F507", found, expected, "agree on the recipe, or change the site's policy file")


def read_policy(path: str) -> Policy:
    """The site's file, "" for none: everything is allowed. Raises C105, C103, C101, C102."""
    if not path:
        return Policy()
    try:
        return Policy.model_validate(tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8-sig")), strict=False)
    except (OSError, UnicodeDecodeError) as error:
        raise FedtuneError("C105", f"no readable policy at '{path}' ({type(error).__name__})", "a TOML file", "check the path") from None
    except tomllib.TOMLDecodeError as error:
        raise FedtuneError("C103", f"'{path}' that is not TOML ({error})", "key = value lines", "mend that line") from None
    except ValidationError as error:
        raise sentence(error) from None
