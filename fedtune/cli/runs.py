"""fedtune resume | eval | export | report: what one does with a run."""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedtune.cli.common import add_round, add_workers
from fedtune.cli.showing import add_showing, shown
from fedtune.cli.waits import waiting
from fedtune.disk import json_text
from fedtune.errors import FedtuneError
from fedtune.quiet import quiet

if TYPE_CHECKING:
    from fedtune.runtime.folder import RunFolder


def add_commands(commands: Any) -> None:
    parser = commands.add_parser("resume", help="continue a run after its last committed round")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument(
        "--rounds",
        type=int,
        default=0,
        metavar="N",
        help="continue to N rounds in all, more than the run was started with",
    )
    add_workers(parser)
    add_showing(parser)
    parser.set_defaults(command=resume)

    parser = commands.add_parser(
        "eval", help="score a run's state on its test set and on every client's held-out rows, or on a file"
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="score the rows of this file or folder instead; the run's own data is not needed",
    )
    parser.add_argument(
        "--what",
        default="",
        metavar="NAME,...",
        help="instead, what tuning did to the model: forgetting (loss on general text, before and after), "
        "calibration (confidence against accuracy), intruders (singular vectors that the base has not), "
        "clients (overlap of the weights that they moved most), knowledge (facts of data.source = 'facts', "
        "new, updated and untouched ones)",
    )
    parser.add_argument(
        "--text",
        default="",
        metavar="FILE",
        help="general text for forgetting (default: what Python has)",
    )
    add_steering(parser)
    add_round(parser)
    parser.set_defaults(command=evaluate)

    parser = commands.add_parser(
        "export", help="write a run's model as a PEFT adapter, a merged model or a seed file"
    )
    parser.add_argument("run", nargs="?", help="the run's folder")
    forms = (
        "adapter: stock PEFT; merged: the whole model; seeds: fedkseed's accumulators, a few kilobytes; "
        "default: what the run left behind"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--as", dest="form", choices=("adapter", "merged", "seeds"), default="", help=forms)
    chosen.add_argument(
        "--for",
        dest="program",
        choices=("peft", "merged", "gguf", "vllm", "sentence-transformers"),
        default="",
        help="a folder that this program loads as it is; refused with the reason where it has no form there",
    )
    parser.add_argument(
        "--from-seeds", metavar="FILE", help="instead of a run: a file written by --as seeds; needs --base"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="with --from-seeds: the base model that the seeds were made for"
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=None,
        metavar="R",
        help="reduce a LoRA adapter to this rank (SVD), and report what is lost",
    )
    parser.add_argument(
        "--intruders",
        type=float,
        default=None,
        metavar="SHARE",
        help="take the intruder dimensions of a LoRA adapter back, up to this share of them (0 to 1)",
    )
    add_round(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.set_defaults(command=export)

    parser = commands.add_parser(
        "predict", help="say what a run's model, or an exported adapter, makes of the rows of a file"
    )
    parser.add_argument("model", help="the folder of a run or of an adapter that fedtune export wrote")
    parser.add_argument("data", help="CSV, JSONL or Parquet; rows need no label and no response")
    parser.add_argument(
        "--column", default="", metavar="NAME", help="of the texts or prompts, if it is not as in the recipe"
    )
    parser.add_argument(
        "--to", default="", metavar="FILE", help="a .csv or .jsonl file; without it, JSON lines are printed"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="rows in a forward pass")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of a response, at most")
    add_steering(parser)
    add_round(parser)
    parser.set_defaults(command=predict)

    parser = commands.add_parser(
        "report", help="write a page about a run, or about several side by side, that opens without a network"
    )
    parser.add_argument("runs", nargs="+", metavar="run", help="the folders of runs, or of sweeps")
    parser.add_argument(
        "--to", default="", metavar="FILE",
        help="the page (default: report.html of the run or the sweep, comparison.html beside several)",
    )  # fmt: skip
    parser.add_argument("--png", default="", metavar="DIR", help="write its pictures here, too")
    parser.add_argument("--csv", default="", metavar="DIR", help="write its numbers here, too")
    parser.set_defaults(command=report)


def add_steering(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steer",
        default="",
        metavar="MODEL",
        help="experimental: a big language model of the same vocabulary in the place of the run's, its "
        "logits moved as tuning moved the run's; self: the run's own, of experts behind a gate, its logits "
        "moved away from those of experts that it leaves out",
    )
    parser.add_argument(
        "--steer-weight",
        type=float,
        default=None,
        metavar="W",
        help="how far (default: as far as the run's model moved, in KL divergence on a few texts; self: 0.5)",
    )


def opened(path: str) -> RunFolder:
    """A run's folder. Raises R402."""
    from fedtune.runtime.folder import existing

    return existing(Path(path).expanduser().resolve())


def is_sweep(path: str) -> bool:
    return (Path(path).expanduser() / "sweep.json").exists()


def opened_all(path: str) -> list[RunFolder]:
    """A run's folder, or the folders of a sweep's runs, trial by trial. Raises R402."""
    if not is_sweep(path):
        return [opened(path)]
    return [opened(str(one.parent)) for one in sorted(Path(path).expanduser().glob("runs/*/config.json"))]


def resume(options: argparse.Namespace) -> int:
    """A finished run says its result again; an unfinished one goes on."""
    from fedtune.runtime.folder import recipe_of

    folder = opened(options.run)
    recipe = recipe_of(folder)
    quiet()
    if options.rounds:
        from fedtune.runtime.extend import extend

        recipe = extend(folder, options.rounds)
    if (folder.path / "deploy.json").exists():
        from fedtune.cli.deploy import go_on

        return go_on(folder, options)
    with shown(options) as tell:
        from fedtune.runtime.run import run
        from fedtune.sinks import sink_of

        run(recipe, folder, sink_of(folder.path, recipe.sinks, tell), workers=options.workers)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    quiet()
    from fedtune import api

    what = [name for name in options.what.split(",") if name]
    with waiting("reading the model and the rows"):
        found = api.evaluate(
            options.run, options.data or "", options.round, what, options.text,
            steer=options.steer, steer_weight=options.steer_weight,
        )  # fmt: skip
    print(json_text(found, indent=2))
    return 0


def predict(options: argparse.Namespace) -> int:
    target = Path(options.to).expanduser()
    if options.to and target.suffix not in (".csv", ".jsonl"):
        raise FedtuneError("C103", f"--to '{target}'", "a .csv or .jsonl file", "change its suffix")
    quiet()
    from fedtune import api
    from fedtune.disk import disk_errors

    said = api.predict(
        options.model, options.data, options.column, batch=options.batch, tokens=options.tokens,
        round=options.round, steer=options.steer, steer_weight=options.steer_weight,
    )  # fmt: skip
    with waiting("reading the model and the rows"):
        # before a file is made: what is wrong with the model shows here
        first = list(itertools.islice(said, 1))
    rows = itertools.chain(first, said)
    if not options.to:
        for row in rows:
            print(json_text(row))
        return 0
    with (
        waiting("writing answers"),
        disk_errors(target),
        target.open("w", encoding="utf-8", newline="") as file,
    ):
        if target.suffix == ".jsonl":
            file.writelines(json_text(row) + "\n" for row in rows)
        else:
            write_csv(file, rows)
    return 0


def write_csv(file: IO[str], rows: Iterable[dict[str, Any]]) -> None:
    """Rows with the columns of the first; every label's probability would be too much of a table."""
    writer = None
    for row in rows:
        row.pop("probabilities", None)
        if writer is None:
            writer = csv.DictWriter(file, list(row), extrasaction="ignore")
            writer.writeheader()
        writer.writerow(row)


def export(options: argparse.Namespace) -> int:
    target = Path(options.to).expanduser().resolve()
    given = [
        word
        for word, value in (
            ("RUN", options.run),
            ("--from-seeds", options.from_seeds),
            ("--base", options.base),
        )
        if value
    ]
    if given not in (["RUN"], ["--from-seeds", "--base"]):
        raise FedtuneError(
            "C103",
            f"export with {' and '.join(given) or 'nothing'}",
            "RUN, or --from-seeds FILE with --base MODEL",
            "give one of them",
        )
    if options.program and options.from_seeds:
        raise FedtuneError("C103", f"--for {options.program} with --from-seeds", "RUN", "use --as")
    if options.rank is not None and (options.rank < 1 or options.from_seeds):
        raise FedtuneError(
            "C103", f"--rank {options.rank}", "1 or more, together with RUN", "correct it or leave it out"
        )
    if options.intruders is not None and (options.from_seeds or not 0 <= options.intruders < 1):
        found, expected = f"--intruders {options.intruders}", "0 or more and below 1, together with RUN"
        raise FedtuneError("C103", found, expected, "correct it or leave it out")
    if options.from_seeds:
        quiet()
        from fedtune.runtime.finished import export_seeds

        with waiting("rebuilding the model"):
            export_seeds(
                Path(options.from_seeds).expanduser(), options.base, options.form or "merged", target
            )
    else:
        quiet()
        from fedtune import api

        with waiting("reading the model"):
            lost = api.export(
                options.run,
                target,
                options.form,
                options.rank or 0,
                options.round,
                options.program,
                options.intruders,
            )
        if options.rank:
            print(f"cut to rank {options.rank}: {100 * lost:.3g} % of the adapter's norm is lost")
    print(options.to)
    return 0


def report(options: argparse.Namespace) -> int:
    folders = [folder for path in options.runs for folder in opened_all(path)]
    to = Path(options.to).expanduser() if options.to else None
    if to is None and len(options.runs) == 1 and is_sweep(options.runs[0]):
        to = Path(options.runs[0]).expanduser().resolve() / "report.html"
    with waiting("drawing the page"):
        from fedtune.report import csv_files, png_files, write_report

        page = write_report(folders, to)
    print(page)
    for place, write in ((options.png, png_files), (options.csv, csv_files)):
        for path in write(folders, Path(place).expanduser()) if place else ():
            print(path)
    return 0
