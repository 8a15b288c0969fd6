"""A Hugging Face Trainer of a site's own, at a real site: the script runs because the site has started it
(`fedtune client --trainer FILE`), and trains the tensors that the site's worker hands it in each round.

    trainer = Trainer(model=model, args=args, train_dataset=rows, compute_loss_func=mine)
    fedtune.patch(trainer)
    trainer.train()

No coordinator sends, names or starts code. What leaves the site leaves it through the worker, as in any run:
by its policy, its chain, its signatures and its log.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from fedtune.errors import FedtuneError
from fedtune.rng import seed_of
from fedtune.runtime.trainer import SEEDS, Federated, on_rows, patch, refuse, refuse_arguments
from fedtune.runtime.trainer_wire import LINE, MORE, PLACE, TOKEN, Garbled, Wire

AGAIN = 1.0  # seconds between two tries to reach the worker, which may be starting


@dataclass
class Joined:
    """A trainer whose `train` does a site's rounds, until fedtune client ends it."""

    trainer: Any
    train_alone: Any
    place: str
    token: str

    def train(self, *arguments: Any, **named: Any) -> NoReturn:
        """In the place of `Trainer.train`: waits for the worker's questions, and answers them."""
        refuse_arguments(*arguments, *named.values())
        while True:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as call:
                if call.connect_ex(self.place) == 0:
                    self.serve(Wire(call))
            time.sleep(AGAIN)  # the worker was started anew, or will be

    def serve(self, wire: Wire) -> None:
        """Round after round, until the worker has gone. What the trainer itself raises ends the script."""
        most = MORE + 4 * sum(value.numel() for value in self.trainer.model.parameters())
        answer: dict[str, Any] = {"token": self.token}
        trained: dict[str, Any] = {}
        while True:
            try:
                wire.send(answer, trained)
                asked, tensors = wire.receive(LINE, most)
            except (OSError, EOFError, Garbled):
                return
            try:
                answer, trained = self.trained(asked, tensors)
            except FedtuneError as error:
                answer, trained = {"refused": str(error)}, {}
            answer["number"] = asked["number"]

    def trained(
        self, asked: dict[str, Any], tensors: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What one round makes of the tensors. Raises M305 where they are not the model's, M304 where it says
        something else with them than the worker's."""
        from fedtune.hf.draws import own_draws
        from fedtune.model.exchanged import exchanged, only_these, require_alike
        from fedtune.model.tunable import read

        net, rows = self.trainer.model, self.trainer.train_dataset
        seed = seed_of("trainer", int(asked["seed"])) % SEEDS
        named = exchanged(net, tensors)
        require_alike(net, asked["probe"])
        with (
            only_these(named, asked["still"]),
            on_rows(self.trainer, range(len(rows)), seed),
            own_draws(seed, self.trainer.args.device),
        ):
            output = self.train_alone()
        args = self.trainer.args
        told = {
            "loss": float(output.training_loss),
            "steps": int(output.global_step),
            "rows": len(rows),
            "batch": args.train_batch_size * args.gradient_accumulation_steps,
        }
        return told, read(named)


Patched = Federated | Joined


def patched(trainer: Any, **simulated: Any) -> Patched:
    """Let a trainer's `train` do the rounds of the site that has started this script, or those of a
    simulation where no site has. Everything else of the trainer stays. Raises C104 for what a federation
    cannot keep, and what `fedtune.runtime.trainer.patch` raises."""
    place = os.environ.get(PLACE, "")
    if not place:
        return patch(trainer, **simulated)
    refuse(trainer)
    made = Joined(trainer, trainer.train, place, os.environ.get(TOKEN, ""))
    trainer.train = made.train
    return made
