"""The command line: two arguments at most where one would do; torch is imported by the commands that need it,
not here."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from fedtune.errors import FedtuneError
from fedtune.panics import panics_as_errors
from fedtune.plain import plain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a mistake that the user can fix, 70 a defect of
    fedtune."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    try:
        with panics_as_errors():
            code: int = options.command(options)
    except FedtuneError as error:
        print(plain(f"fedtune: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "fedtune: stopped; of a run, what was committed is kept: fedtune resume goes on with it",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            return defect(error)
        print(
            "fedtune: R404: there is no space left where the output goes; free space and run the command "
            "again.",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        return defect(error)
    return code


def defect(error: Exception) -> int:
    """An error that we did not foresee: one line, and how to see more."""
    if os.environ.get("FEDTUNE_DEBUG"):
        raise error
    where = traceback.extract_tb(error.__traceback__)[-1]
    print(
        f"fedtune: X900: a defect ({type(error).__name__} at {where.name}:{where.lineno}: {error}); run "
        "again with FEDTUNE_DEBUG=1 and report what it prints.",
        file=sys.stderr,
    )
    return 70


def build_parser() -> argparse.ArgumentParser:
    """All commands; each module under fedtune/cli/ adds its own."""
    from fedtune import __version__
    from fedtune.cli import (
        audit,
        chat,
        check,
        compare,
        completion,
        data,
        deploy,
        experts,
        explain,
        forget,
        init,
        keys,
        leak_test,
        merge,
        offsite,
        runs,
        schema,
        serve,
        simulate,
        site,
        sweep,
        ui,
    )

    parser = argparse.ArgumentParser(
        prog="fedtune",
        description="Federated fine-tuning of one pretrained model, on Flower.",
        epilog="Begin with fedtune simulate (the built-in federation) or fedtune init rows.csv (your rows).",
    )
    parser.add_argument(
        "--version", action="version", version=f"fedtune {__version__}", help="show the version and exit"
    )
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (
        init, data, check, simulate, sweep, leak_test, runs, ui, chat, serve, compare, merge, experts, forget,
        audit, deploy, offsite, site, keys, explain, schema, completion,
    ):  # fmt: skip
        module.add_commands(commands)
    return parser
