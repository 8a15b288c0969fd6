"""An emulator as a folder: the model of sites that are not to have the real one."""

from __future__ import annotations

from pathlib import Path

from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.exports import check_target, whole_folder
from fedtune.runtime.check import federation_of
from fedtune.runtime.workspace import public_for


def write_emulator(recipe: Recipe, target: Path) -> list[str]:
    """Write what sites load, and say what it is, in lines. Raises C104 for another method, S701, S721,
    R401."""
    check_target(target)
    labels = federation_of(recipe).labels
    from fedtune.model.base import load
    from fedtune.model.emulator import Emulation, save, shares
    from fedtune.model.tunable import detach

    base = load(recipe.model, recipe.data.task, labels, recipe.seed)
    base.public = public_for(recipe, base, None)
    tunable = method_of(recipe).prepare(base, recipe.seed)
    emulator = tunable.emulator
    if emulator is None:
        is_one = Emulation.read(base.net.config) is not None
        found = "a model that is an emulator itself" if is_one else f"method.type = '{recipe.method.type}'"
        raise FedtuneError(
            "C104", f"{found} with fedtune offsite", "method.type = 'offsite' on the model itself",
            "change the recipe",
        )  # fmt: skip
    small = emulator.base
    error = tunable.distilled
    detach(emulator)
    with whole_folder(target) as temporary:
        save(small, temporary, base.fingerprint)
    about = Emulation.read(small.net.config)
    assert about is not None
    held = [f"{100 * n / base.size:.1f} % of the model's values {how}" for how, n in shares(base, small) if n]
    return [
        f"{target}: blocks {', '.join(map(str, about.kept))} of {about.blocks}; {', '.join(held)}",
        f"model     {base.fingerprint}",
        f"emulator  {small.fingerprint}",
        *([f"distilled error {error['before']:.4g} before, {error['after']:.4g} after"] if error else []),
    ]
