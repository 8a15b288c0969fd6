"""A site as a process of its own: python -m tests.exchange.site JOB, where JOB is a JSON file. Answers one
question through the exchange's port.

Prints one JSON line: parameters held, parameters of the body in memory, resident bytes that loading and
training took, the answer's file.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import psutil
import torch

from fedtune import config, transforms
from fedtune.data import load as load_data
from fedtune.exchange.split_service import body_address
from fedtune.model.encode import encode
from fedtune.runtime.client_half import respond
from fedtune.runtime.protocol import Ask, Link
from fedtune.split.facts import SplitFacts
from fedtune.trust import load
from fedtune.types import Client, Round


def main(job: Path) -> None:
    told = json.loads(job.read_text())
    recipe, details = config.parse(told["recipe"]), SplitFacts.from_words(told["details"])
    method = config.method_of(recipe)
    assert method.capabilities.costs and method.capabilities.split
    federation = load_data(recipe.data, recipe.partition, recipe.seed)
    method.capabilities.costs.plan(
        recipe.model, recipe.data.task, len(federation.labels)
    )  # imports what the model's kind needs, reads no weights
    before = psutil.Process().memory_info().rss
    base = method.capabilities.split.load_site(
        recipe.model, recipe.data.task, federation.labels, recipe.seed, details
    )
    tunable = method.prepare(base, recipe.seed)
    number, name = told["client"], told["name"]
    data = encode(federation.clients[number].train, base, max_length=recipe.data.max_length)
    body = body_address(load(Path(told["keys"])), told["address"], told["run"], details)
    client = Client(number, name, tunable, data, {}, body)
    link = Link(told["run"], base.fingerprint, method, transforms.build(recipe.chain))
    ask = Ask(
        number,
        "train",
        Round(told["round"], recipe.seed, tuple(told["members"])),
        job.with_name(told["given"]).read_bytes(),
    )
    job.with_name("answer").write_bytes(respond(link, client, ask).payload)
    grown = psutil.Process().memory_info().rss - before
    gc.collect()
    tensors = {
        id(one.untyped_storage()): one
        for one in gc.get_objects()
        if isinstance(one, torch.Tensor) and not one.is_meta and one.is_floating_point()
    }
    largest = sorted((one.numel() for one in tensors.values()), reverse=True)
    print(json.dumps({"held": base.size, "living": sum(largest), "grown": grown}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
