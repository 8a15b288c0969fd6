"""A language model's local steps: LoRA on a small Llama with random weights and the vocabulary of a real one, one
CPU thread, prompts and responses as uneven as documentation is (docstrings as questions and answers).

loop     what fedtune's loop costs beside a plain peft loop on the same batches: CPU time and the memory that
         lives at once (every storage counted in one step of each)
padding  tokens of examples trained on per CPU second: batches of chance, padded to their longest; buckets
         (method.train.bucket = 16) and packed rows (method.train.packing), each against that

    python benchmarks/llm.py [--repeats 1] [--full | --tiny]

--full is SmolLM2-135M's own shape; the default has 4 of its 30 blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from claims import at_least, at_most
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._pytree import tree_leaves

from fedtune.data.sources.docstrings import documented, prose, trees
from fedtune.model.adapters import Lora
from fedtune.model.base import Base, load
from fedtune.model.encode import Encoded, encode
from fedtune.model.fit import fit, step_batches
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.step_memory import StorageWatch
from fedtune.model.tunable import TunableModel, attach, detach

SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
TINY = SMOL | {"hidden_size": 36, "intermediate_size": 64, "vocab_size": 512}
LORA = Lora(rank=8, alpha=16.0)
WAYS: dict[str, dict[str, Any]] = {
    "padding": {},
    "buckets": {"bucket": 16},
    "packing": {"packing": True},
}
GOALS = {"buckets": 1.2, "packing": 1.2}


def questions() -> Iterator[dict[str, str]]:
    """What a package's classes and functions are for, and all that their docstrings say in prose."""
    for tree in trees("networkx", 0):
        for name, docstring in documented(tree):
            if answer := prose(docstring):
                yield {"prompt": f"What is {name} for?", "response": answer}


def write_model(folder: Path, shape: dict[str, Any], layers: int, texts: list[str]) -> None:
    """A model folder as any other, with a byte-level tokenizer trained on the texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(4096, shape["vocab_size"]),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    config = transformers.LlamaConfig(**shape, num_hidden_layers=layers, max_position_embeddings=1024)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def base_of(folder: Path, shape: dict[str, Any], layers: int, texts: list[str]) -> Base:
    write_model(folder, shape, layers, texts)
    return load(ModelSettings(name=str(folder), device="cpu", threads=1), "instruct", (), 1)


def plain_loop(base: Base, encoded: Encoded, s: TrainSettings) -> Callable[[], None]:
    """peft as its documentation has it: the model's own loss, AdamW, the same batches."""
    target = [name for name, part in base.net.named_modules() if isinstance(part, torch.nn.Linear)]
    config = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.alpha,
        target_modules=[name for name in target if "lm_head" not in name],
        task_type="CAUSAL_LM",
    )
    net = peft.get_peft_model(base.net, config)

    def run() -> None:
        optimizer = torch.optim.AdamW(
            [p for p in net.parameters() if p.requires_grad], lr=float(s.lr), weight_decay=0.0
        )
        net.train()
        for (indices,) in step_batches(len(encoded), s, 1):
            optimizer.zero_grad()
            batch = {name: value.to(base.device) for name, value in encoded.collate(list(indices)).items()}
            with torch.autocast(base.device.type, torch.bfloat16, enabled=base.device.type == "cuda"):
                loss = net(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        net.eval()

    return run


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


class RealWatch(StorageWatch):
    """Tensors have numbers here, which may be looked at."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self.hold(tensor)
        return out


def held(run: Callable[[], object]) -> int:
    """Bytes of the storages that operations made and that lived at once."""
    with RealWatch() as watch:
        run()
    return watch.peak


def trained_on(encoded: Encoded, s: TrainSettings) -> int:
    """Tokens of the examples of all steps, padding left out."""
    batches = step_batches(len(encoded), s, 1, encoded.length)
    return sum(encoded.length(i) for micro in batches for part in micro for i in part)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1, help="alternating; the median counts")
    parser.add_argument("--full", action="store_true", help="all 30 blocks")
    parser.add_argument(
        "--tiny", action="store_true", help="shows that the script runs; its figures mean nothing"
    )
    options = parser.parse_args()
    shape, layers, repeats = (
        (TINY, 2, 1) if options.tiny else (SMOL, 30 if options.full else 4, options.repeats)
    )
    batch, steps, longest = (4, 2, 48) if options.tiny else (8, 2, 256)
    rows = list(islice(questions(), 64 if options.tiny else 600))
    with tempfile.TemporaryDirectory() as folder:
        base = base_of(Path(folder), shape, layers, [row["response"] for row in rows])
        encoded = encode(rows, base, max_length=longest)
    settings = TrainSettings(optimizer="adamw", lr=1e-3, clip=1.0, batch=batch, steps=steps)
    claims = [
        *loop_claims(base, encoded, settings, repeats),
        *padding_claims(base, encoded, settings, repeats),
    ]
    print(json.dumps(claims))


def loop_claims(base: Base, encoded: Encoded, s: TrainSettings, repeats: int) -> list[dict[str, object]]:
    times: dict[str, list[float]] = {"fedtune": [], "peft": []}
    bytes_held: dict[str, int] = {}
    for turn in range(repeats + 1):  # the first one warms up, and is looked at for its memory
        for name in times:
            run, undo = ours(base, encoded, s) if name == "fedtune" else theirs(base, encoded, s)
            if turn:
                times[name].append(seconds(run))
            else:
                bytes_held[name] = held(run)
            undo()
    mine, other = (statistics.median(times[name]) for name in times)
    print(
        f"{s.steps} steps of {s.batch}: fedtune {mine:.2f} s CPU, peft {other:.2f}; "
        f"alive at once {bytes_held['fedtune'] / 2**20:,.0f} and {bytes_held['peft'] / 2**20:,.0f} MiB"
    )
    return [
        at_most("a LoRA step, CPU time, against a plain peft loop", mine, other, 1.05),
        at_most(
            "a LoRA step, memory alive at once, against a plain peft loop",
            *map(float, bytes_held.values()),
            1.0,
        ),
    ]


def ours(base: Base, encoded: Encoded, s: TrainSettings) -> tuple[Callable[[], object], Callable[[], None]]:
    tunable = attach(base, LORA, 1)
    return lambda: fit(tunable, encoded, s, 1), lambda: detach(tunable)


def theirs(base: Base, encoded: Encoded, s: TrainSettings) -> tuple[Callable[[], object], Callable[[], None]]:
    wrapped = attach(base, LORA, 1)  # so that it can be taken off again as ours is
    detach(wrapped)
    run = plain_loop(base, encoded, s)
    return run, lambda: undone(base, wrapped)


def undone(base: Base, wrapped: TunableModel) -> None:
    base.attached = wrapped
    detach(wrapped)


def padding_claims(base: Base, encoded: Encoded, s: TrainSettings, repeats: int) -> list[dict[str, object]]:
    tunable = attach(base, LORA, 1)
    start = tunable.read()
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(repeats + 1):
        for name, change in WAYS.items():
            way = TrainSettings(**{**s.model_dump(), **change})
            spent = seconds(lambda way=way: fit(tunable, encoded, way, 1))  # type: ignore[misc]
            tunable.write(start)
            if turn:
                speeds[name].append(trained_on(encoded, way) / spent)
    fast = {name: statistics.median(found) for name, found in speeds.items()}
    print("tokens a CPU second: " + ", ".join(f"{name} {value:,.0f}" for name, value in fast.items()))
    return [
        at_least(
            f"CPU seconds for 1,000 tokens, {name} against padding",
            1e3 / fast[name],
            1e3 / fast["padding"],
            goal,
        )
        for name, goal in GOALS.items()
    ]


if __name__ == "__main__":
    main()
