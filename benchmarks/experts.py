"""What it takes to have K experts at once, token by token: CPU seconds and the greatest memory of a forward pass
with 2, 4, 8 and 16 experts on a small Llama, against one adapter of the same total rank (what no routing could
undercut) and against peft's Arrow with the same experts.

python benchmarks/experts.py [--repeats 7] [--rank 4] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from claims import at_least, at_most
from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.experts.routers import PREFIX, Routing, router
from fedtune.model.step_memory import StorageWatch

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
USUAL = {"width": 256, "blocks": 4, "texts": 4, "tokens": 128}
TINY = {"width": 32, "blocks": 1, "texts": 2, "tokens": 16}


class Lived(StorageWatch):
    """Bytes that live at once of what a pass makes, with the numbers that it really has."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.hold(tensor)
        return out


def base(width: int, blocks: int) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def adapter(net: Any, rank: int, seed: int) -> Any:
    """peft's, of scale 1, with factors that are not zero."""
    torch.manual_seed(seed)
    made = get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.02)
    return made.eval()


@contextmanager
def ways(size: dict[str, int], rank: int, count: int) -> Iterator[dict[str, Callable[[], Any]]]:
    """Networks of the same base: one adapter, ours, Arrow's; each is called with the tokens."""
    ids = torch.randint(0, 512, (size["texts"], size["tokens"]), generator=torch.manual_seed(2))
    shape = (size["width"], size["blocks"])
    experts, ours = {}, base(*shape)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(count):
            made = adapter(base(*shape), rank, number)
            paths.append(str(Path(folder) / str(number)))
            made.save_pretrained(paths[-1])
            experts[f"{number:02}"] = {
                name.replace(".default", ""): value.detach().numpy()
                for name, value in made.named_parameters()
                if "lora_" in name
            }
        assert all(name.startswith(PREFIX) for name in experts["00"])
        router(experts, {}, Routing("arrow", "topk", 2), causal=True).attach(ours)
        arrow = create_arrow_model(base(*shape), paths, ArrowConfig(top_k=2)).eval()
        one = adapter(base(*shape), rank * count, 0)
        nets = {"one": one, "ours": ours, "arrow": arrow}
        yield {name: lambda net=net: net(input_ids=ids, use_cache=False) for name, net in nets.items()}


def measured(passes: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Way -> CPU seconds (the median of alternating passes) and MiB of a pass."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    peaks = {}
    with torch.no_grad():
        for name, run in passes.items():
            run()
            with Lived() as watch:
                run()
            peaks[name] = watch.peak / 2**20
        for _ in range(repeats):
            for name, run in passes.items():
                began = time.process_time()
                run()
                seconds[name].append(time.process_time() - began)
    return {name: (statistics.median(seconds[name]), peaks[name]) for name in passes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="alternating passes; the median counts")
    parser.add_argument("--rank", type=int, default=4, help="of each expert")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    size, counts = (TINY, (2, 8)) if options.tiny else (USUAL, (2, 4, 8, 16))
    found = {}
    for count in counts:
        with ways(size, options.rank, count) as passes:
            found[count] = measured(passes, 1 if options.tiny else options.repeats)
        told = ", ".join(f"{name} {s * 1000:.1f} ms {mib:.2f} MiB" for name, (s, mib) in found[count].items())
        print(f"{count:>2} experts of rank {options.rank}: {told}")
    eight, most = found[8], found[max(counts)]
    what = "a forward pass with 8 experts against one adapter of their total rank"
    print(
        json.dumps(
            [
                at_most(f"{what}, CPU seconds", eight["ours"][0], eight["one"][0], 1.3),
                at_most(f"{what}, MiB", eight["ours"][1], eight["one"][1], 1.3),
                at_least(
                    "8 experts against peft's Arrow, CPU seconds", eight["ours"][0], eight["arrow"][0], 1
                ),
                at_least("8 experts against peft's Arrow, MiB", eight["ours"][1], eight["arrow"][1], 1),
                at_most(
                    f"MiB of a pass with {max(counts)} experts against 2",
                    most["ours"][1],
                    found[2]["ours"][1],
                    1.3,
                ),
            ]
        )
    )


if __name__ == "__main__":
    main()
