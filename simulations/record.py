"""Run a table of variants over seeds and keep the results: simulations/results/<table>.json, with hardware
and month.

    python simulations/record.py shakespeare --set model.name=FOLDER --set data.path=input.txt [--only outer]
    [--seeds 1 2 3] [--results FOLDER]

Every row is a run of a shipped recipe with overrides; rows that are already recorded for a seed are kept
unless --again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
KEEP = (
    "metric",
    "base",
    "local",
    "federated",
    "centralised",
    "up_bytes_per_client_round",
    "down_bytes_per_client_round",
)
KEEP += (
    "first_round_seconds",
    "rounds",
    "clients",
    "trainable",
    "total",
    "seconds",
    "peak_rss_bytes",
    "state_sha256",
)
FIGURES = ("drift", "error", "residual_rank")  # of rules that read single answers
OUTER = [
    "method.server.optimizer=sgd",
    "method.server.lr=0.7",
    "method.server.momentum=0.9",
    "method.server.nesterov=true",
]
CONSTANT = ["method.train.lr=3e-3", "method.train.schedule=constant", "method.train.floor=0.0"]
ALONE = ["evaluate.base=false", "evaluate.local=false", "evaluate.centralised=false"]


def chain(step: str, **settings: Any) -> list[str]:
    words = ", ".join(
        [f'step = "{step}"', *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
    )
    return [f"chain=[{{{words}}}]", "downlink.step=none", *ALONE]


CODES: dict[str, list[str]] = {
    "fp32": ALONE,
    "int8": chain("quantize", bits=8),
    "int4": chain("quantize", bits=4),
    "int2": chain("quantize", bits=2),
    "dither": chain("dither"),
    "sign + EF": chain("sign", error_feedback=True),
    "deadzone + EF": chain("deadzone", error_feedback=True),
    "ternary 20 % + EF": chain("ternary", keep=0.2, error_feedback=True),
    "ternary 10 % + EF": chain("ternary", keep=0.1, error_feedback=True),
    "ternary 5 % + EF": chain("ternary", keep=0.05, error_feedback=True),
    "ternary 20 %": chain("ternary", keep=0.2, error_feedback=False),
    "ternary 10 %": chain("ternary", keep=0.1, error_feedback=False),
    "ternary 5 %": chain("ternary", keep=0.05, error_feedback=False),
    "ComPEFT 20 %, alpha 1": chain("ternary", keep=0.2, scale="sigma", alpha=1.0, error_feedback=False),
    "ComPEFT 5 %, alpha 1": chain("ternary", keep=0.05, scale="sigma", alpha=1.0, error_feedback=False),
    "ComPEFT 5 %, alpha 3": chain("ternary", keep=0.05, scale="sigma", alpha=3.0, error_feedback=False),
    "sign + EF, delta down": [*chain("sign", error_feedback=True), "downlink.step=delta"],
    "int4, int8 down": [*chain("quantize", bits=4), "downlink.step=int8"],
}
BEST = [  # the best rate and outer step that were found for the shakespeare recipe
    "method.train.lr=1e-2",
    "method.train.schedule=cosine",
    "method.train.floor=0.05",
    "method.server.optimizer=sgd",
    "method.server.lr=1.0",
    "method.server.momentum=0.5",
    "method.server.nesterov=true",
]
INT8_DOWN = ["downlink.step=int8"]
INT4_CHANGE = ['downlink={step = "delta", keep = 1.0, width = 4, start = "int8"}']
INT2_CHANGE = ['downlink={step = "delta", keep = 1.0, width = 2, start = "int8"}']


def sparse(share: float, *, outer: bool = False, down: bool = True) -> list[str]:
    """SparseLoCo's rule, with the same share down; its mean is the next state, unless `outer`."""
    rule = chain("topk", keep=share, bits=2, chunk=4096, decay=0.95)
    way = f'downlink={{step = "delta", keep = {share}, width = 2, chunk = 4096, start = "int8"}}'
    return [*rule, *([way] if down else []), *([] if outer else ['method.server={optimizer = "none"}'])]


BITS: dict[str, list[str]] = {  # up and down together
    "fp32": ALONE,
    "int8, int8 down": [*chain("quantize", bits=8), *INT8_DOWN],
    "int4, int4 change down": [*chain("quantize", bits=4), *INT4_CHANGE],
    "int2, int4 change down": [*chain("quantize", bits=2), *INT4_CHANGE],
    "dither": chain("dither"),
    "dither, int8 down": [*chain("dither"), *INT8_DOWN],
    "dither, int4 change down": [*chain("dither"), *INT4_CHANGE],
    "dither, int2 change down": [*chain("dither"), *INT2_CHANGE],
    "sign": chain("sign", error_feedback=False),
    "sign + EF": chain("sign"),
    "sign unbiased": chain("sign", scale="unbiased", error_feedback=False),
    "sign unbiased + EF": chain("sign", scale="unbiased"),
    "SparseLoCo 1 %": sparse(0.01),
    "SparseLoCo 3 %": sparse(0.03),
    "SparseLoCo 3 %, outer Nesterov": sparse(0.03, outer=True),
    "SparseLoCo 3 %, fp32 down": sparse(0.03, down=False),
}
KINDS: dict[str, list[str]] = {  # rates: docs/rates.md
    "full": ["method.adapter.kind=full"],
    "lora, all linear": ["method.adapter.kind=lora", "evaluate.centralised=true"],
    "lora, q and v": ['method.adapter.targets=["query", "value"]'],
    "bias": ["method.adapter.kind=bias"],
    "adapter": ["method.adapter.kind=adapter"],
    "ia3": ["method.adapter.kind=ia3"],
    "prompt": ["method.adapter.kind=prompt", "method.adapter.deep=true"],
    "head": ["method.adapter.kind=head"],
}
DOMAINS = [
    "data.label=domain",
    "partition.by=iid",
    "partition.clients=4",
    "data.limit=2000",
    "method.train.steps=10",
]
KSEED = [*DOMAINS, "method.type=fedkseed", "method.weight=equal"]
WALK = [*KSEED, "method.estimator=spsa", "method.steps=50"]
PROJECT = [*KSEED, "method.estimator=gradient", "method.refresh=1"]
LORA = ["method.space=adapter"]
HEAD = ["method.space=adapter", "method.adapter.kind=head"]
# ten domains of CLINC150 as classes, 2,000 rows at four sites; heads start from class means
SEEDS: dict[str, list[str]] = {
    "class means, no step": [*DOMAINS, "method.adapter.kind=head", "method.train.lr=1e-12", "rounds=1"],
    "FedPEFT, LoRA": DOMAINS,
    "FedPEFT, head only": [*DOMAINS, "method.adapter.kind=head"],
    "FedKSeed, all weights, gradient": PROJECT,
    "FedKSeed, LoRA, gradient": [*PROJECT, *LORA],
    "FedKSeed, head only, gradient": [*PROJECT, *HEAD],
    "FedKSeed, all weights, spsa": WALK,
    "FedKSeed, LoRA, spsa": [*WALK, *LORA],
    "FedKSeed, head only, spsa": [*WALK, *HEAD],
}
PLAIN = (
    "mean",
    "ffa",
    "rolora",
    "fedsa",
    "fedsb",
    "flexlora",
    "fedrot",
    "fair",
    "hetlora",
    "median",
    "trimmed",
    "krum",
    "clipped",
)
MEAN = ["method.server.optimizer=none"]  # few rules may be followed by an outer step
RULES: dict[str, list[str]] = {rule: [f"aggregate.rule={rule}", *MEAN, *ALONE] for rule in PLAIN}
RULES |= {
    rule: [f"aggregate.rule={rule}", "aggregate.extra=64", *MEAN, *ALONE] for rule in ("fedex", "flora")
}
FEW = [  # four speakers, short rounds at a constant rate
    *MEAN,
    *ALONE,
    "partition.clients=4",
    "data.max_length=64",
    "method.train.steps=3",
    "method.train.schedule=constant",
    "method.train.floor=0.0",
    "evaluate.every=1",
    "evaluate.rows=64",
    "evaluate.clients=false",
]
RATES = {"zero": 1e-2, "eva": 3e-3, "pissa": 3e-3, "corda": 3e-3}  # the best of two or three on seed 11
STARTS: dict[str, list[str]] = {
    start + said: [*FEW, f"rounds={rounds}", f"method.lora_start={start}", f"method.train.lr={rate}"]
    for rounds, said in ((10, ""), (30, ", 30 rounds"))
    for start, rate in RATES.items()
}
LONG = ["rounds=8", "method.train.steps=30", *ALONE]
RANKS = ["method.adapter.rank=16", "method.adapter.alpha=32", "method.lora_rank_by_client=[4, 8, 16]", *LONG]
MIXED: dict[str, list[str]] = {  # ten clients with a domain of intents each
    "flexlora, ranks 4/8/16": ["aggregate.rule=flexlora", *RANKS],
    "hetlora by slices, ranks 4/8/16": ["aggregate.rule=hetlora", *RANKS],
    "hetlora by padding, ranks 4/8/16": ["aggregate.rule=hetlora", "aggregate.by=padding", *RANKS],
    "mean, all rank 4": ["method.adapter.rank=4", "method.adapter.alpha=8", *LONG],
}
TINY = [  # for a model of 260,032 parameters
    "model.threads=1",
    "data.max_length=160",
    "rounds=6",
    "method.train.steps=10",
    "method.train.batch=8",
    "method.train.lr=5e-3",
]
PAIRS: dict[str, list[str]] = {
    loss: [*TINY, f"method.train.objective.loss={loss}"] for loss in ("dpo", "orpo")
}
DIRICHLET = ["partition.by=dirichlet", "partition.alpha=0.1"]
SKEWED = [  # twenty rows a class at ten clients; what the frozen blocks say of a row is computed once
    *DIRICHLET,
    "rounds=4",
    "data.limit=3000",
    "method.adapter.last=1",
    "method.adapter.keep_front=true",
    "method.train.steps=20",
    "method.train.batch=8",
    "evaluate.clients=false",
]


def loss(name: str, **settings: float) -> list[str]:
    return [
        *SKEWED,
        *(f"method.train.objective.{key}={value}" for key, value in {"loss": name, **settings}.items()),
    ]


LABELS: dict[str, list[str]] = {
    "linear discriminants, no step": [*SKEWED, "rounds=1", "method.train.steps=1", "method.train.lr=1e-12"],
    "cross entropy": SKEWED,
    "focal, gamma 2": loss("focal", gamma=2.0),
    "balanced": loss("balanced"),
    "logit-adjusted, tau 1": loss("logit-adjusted", tau=1.0),
}
TABLES: dict[str, tuple[str, dict[str, list[str]]]] = {
    "demo": ("", {"built-in": []}),
    "shakespeare": (
        "shakespeare.toml",
        {
            "outer Nesterov 1.0 / 0.5": [],
            "plain mean": [*MEAN, *ALONE],
            "plain mean, constant 3e-3": [*MEAN, *ALONE, *CONSTANT],
            "outer Nesterov 0.7 / 0.9, constant 3e-3": [*OUTER, *ALONE, *CONSTANT],
        },
    ),
    "shakespeare-codes": ("shakespeare.toml", CODES),
    "shakespeare-bits": ("shakespeare.toml", {name: [*BEST, *sets] for name, sets in BITS.items()}),
    "shakespeare-bits-long": (
        "shakespeare.toml",
        {name: [*BEST, "rounds=60", "method.train.steps=30", *sets] for name, sets in BITS.items()},
    ),
    "shakespeare-rules": ("shakespeare.toml", RULES),
    "shakespeare-starts": ("shakespeare.toml", STARTS),
    "preference": ("preference.toml", PAIRS),
    "clinc150-labels": ("clinc150.toml", LABELS),
    "clinc150-ranks": ("clinc150.toml", MIXED),
    "clinc150-kinds-domains": ("clinc150.toml", KINDS),
    "clinc150-kinds-dirichlet": (
        "clinc150.toml",
        {name: [*sets, *DIRICHLET] for name, sets in KINDS.items()},
    ),
    "fedkseed-clinc150": ("clinc150.toml", SEEDS),
    "clinc150-codes": ("clinc150.toml", {name: [*sets, *DIRICHLET] for name, sets in CODES.items()}),
}


def hardware() -> str:
    """Processor, cores used and month, as a line."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores, CPU only, {time.strftime('%B %Y')}"


def play(recipe: str, sets: list[str], seed: int) -> dict[str, Any]:
    """One run in a process of its own; what its result.json says."""
    with tempfile.TemporaryDirectory() as runs:
        command = [
            sys.executable,
            "-m",
            "fedtune",
            "simulate",
            *([str(HERE / recipe)] if recipe else []),
            "--runs",
            runs,
        ]
        before = cpu_seconds()
        done = subprocess.run(
            [*command, *(f"--set={one}" for one in [*sets, f"seed={seed}", "name=run"])],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        spent = cpu_seconds() - before
        result = json.loads((Path(runs) / "run" / "result.json").read_text())
        events = [json.loads(line) for line in (Path(runs) / "run" / "events.jsonl").read_text().splitlines()]
    figures = [
        {key: event["metrics"][key] for key in FIGURES if key in event["metrics"]}
        for event in events
        if event["event"] == "RoundDone"
    ]
    curve = [
        round(event["value"], 4)
        for event in events
        if event["event"] == "Scored" and event["phase"] == "held-out"
    ]
    return (
        {key: result[key] for key in KEEP}
        | {"cpu_seconds": round(spent, 1)}
        | {key: one for key, one in result["figures"]["federated"].items() if key == "macro_f1"}
        | ({"held_out_by_round": curve} if curve else {})
        | ({"by_round": figures} if any(figures) else {})
    )


def cpu_seconds() -> float:
    """Of all runs that have ended: other jobs on the machine do not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(table: dict[str, Any]) -> None:
    """Mean and spread over seeds."""
    for name, seeds in table["rows"].items():
        finals = [run["federated"] for run in seeds.values()]
        up, down = (
            statistics.mean(run[f"{way}_bytes_per_client_round"] for run in seeds.values())
            for way in ("up", "down")
        )
        count = next(iter(seeds.values()))["trainable"] / 8
        spread = f"{min(finals):.4f} to {max(finals):.4f}"
        print(
            f"{name:<26} {statistics.mean(finals):9.4f}  ({spread}, {len(finals)} seeds)  up "
            f"{up / 1024:9.1f} KiB  {up / count:6.3f} bits/parameter, down {down / count:6.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--again", action="store_true")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    recipe, rows = TABLES[options.table]
    path = options.results / f"{options.table}.json"
    table = json.loads(path.read_text()) if path.exists() else {"recipe": recipe or "built-in", "rows": {}}
    table["hardware"] = hardware()
    for seed in options.seeds:
        for name in options.only or rows:
            known = table["rows"].setdefault(name, {})
            if str(seed) not in known or options.again:
                known[str(seed)] = play(recipe, [*options.set, *rows[name]], seed)
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(table, indent=1) + "\n")
    show(table)


if __name__ == "__main__":
    main()
