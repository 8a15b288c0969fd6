"""The attacks of fedtune.split.inversion on a recipe's cut: as the head's answer is, and as the recipe's
codec sends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.runtime.workspace import workspace_of

if TYPE_CHECKING:
    from fedtune.split.inversion import Leak


def leaks(recipe: Recipe, client: int, examples: int, steps: int) -> dict[str, Leak]:
    """What each attack found in a client's first training examples. Raises C104 for a method without a cut,
    C103 for a client that is not there."""
    split = method_of(recipe).capabilities.split
    if split is None:
        raise FedtuneError(
            "C104",
            f"leak-test with method.type = '{recipe.method.type}'",
            "a method that splits the model: sfprompt",
            "set method.type = 'sfprompt'",
        )
    workspace = workspace_of(recipe)
    if client not in workspace.names or examples < 1 or steps < 1:
        found = f"--client {client} --examples {examples} --steps {steps}"
        raise FedtuneError(
            "C103",
            found,
            f"a client below {len(workspace.names)}, and at least one example and one step",
            "correct these options",
        )
    from fedtune.split.codec import Coding, decode, encode
    from fedtune.split.inversion import attack, plain
    from fedtune.wire.v1 import split_pb2 as pb

    coding = Coding(split.codec)

    def sent(hidden: Any) -> Any:
        return decode(encode(pb.ROLE_HIDDEN, hidden, coding)[0]).to(hidden)

    data, net = workspace.train(client), workspace.tunable.net
    batch = {
        name: value.to(workspace.base.device)
        for name, value in data.collate(range(min(examples, len(data)))).items()
    }
    ways = {"the head's answer": plain, f"sent as {split.codec}": sent}
    return {name: attack(net.part, batch, wire=wire, steps=steps) for name, wire in ways.items()}


def sentences(recipe: Recipe, found: dict[str, Leak]) -> list[str]:
    """The report as lines of text."""
    what = "images" if recipe.data.task == "image-classify" else "tokens"
    lines = [
        f"{name:<22}{leak.attack}: recovered {100 * leak.recovered:.1f} % of {leak.tried} {what}, relative "
        f"squared error {leak.error:.2g}"
        for name, leak in found.items()
    ]
    worst = max(leak.recovered for leak in found.values())
    lines.append(
        f"Whoever runs the body can reconstruct {'all' if worst > 0.99 else f'{100 * worst:.0f} % of'} these "
        f"{what}. Split training keeps data from other "
        "clients and from disks, not from the body's operator: let it be the data's owner, or somebody "
        "trusted like one."
    )
    if worst < 0.5:
        lines.append(
            "That these attacks found less than half protects nobody: better ones are known, and noise "
            "spoils training long before it protects."
        )
    return lines
