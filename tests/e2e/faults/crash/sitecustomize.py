"""Named crash points without hooks in the product: Python imports this file at the start of every process
that has its folder on PYTHONPATH.

FLWR_TEST_CRASH is a JSON list of points:

at      "module:Class.method" or "module:function", as the caller finds it there
moment  "before" or "after" the call
when    an expression over `args` (with self) and `calls` (of this process); "" for the first call
kill    roles that get SIGKILL; empty for the process itself
do      an expression over `args` that is evaluated instead of a kill, for faults that are not deaths;
        `gone(path)` waits until a file is gone
marker  a file that is made then, so that it happens once
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from typing import Any


def crash(point: dict[str, Any], args: tuple[Any, ...]) -> None:
    """Once: whoever makes the marker."""
    try:
        os.close(os.open(point["marker"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if point.get("do"):
        eval(point["do"], {"args": args, "gone": gone})  # noqa: S307
        return
    from roles import ROOT, mine, processes

    for role in point.get("kill", ()):
        for pid, _, _ in processes(os.environ[ROOT], role):
            os.kill(pid, signal.SIGKILL)
    if not point.get("kill") or mine() in point["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)


def gone(path: str) -> None:
    """The process stands still here for as long as there is the file that the test has made."""
    while os.path.exists(path):
        time.sleep(0.05)


def arm(module: Any, points: list[dict[str, Any]]) -> None:
    """Wrap the functions that this module's points name."""
    for point in points:
        *parents, name = point["at"].partition(":")[2].split(".")
        owner = functools.reduce(getattr, parents, module)
        setattr(owner, name, wrapped(getattr(owner, name), point))


def wrapped(real: Any, point: dict[str, Any]) -> Any:
    calls = 0

    @functools.wraps(real)
    def armed(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        meant = bool(eval(point["when"] or "calls == 1", {"args": args, "calls": calls}))  # noqa: S307  # written by the test beside it
        if meant and point["moment"] == "before":
            crash(point, args)
        result = real(*args, **more)
        if meant and point["moment"] == "after":
            crash(point, args)
        return result

    return armed


class Arming(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets a module be loaded as ever, and arms it before anybody sees it."""

    def __init__(self, points: dict[str, list[dict[str, Any]]]) -> None:
        self.points = points
        self.real: dict[str, importlib.abc.Loader] = {}

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.points or name in self.real:
            return None
        self.real[name] = None  # type: ignore[assignment]  # the search below comes by here
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.real[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self.real[spec.name].create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.real[module.__name__].exec_module(module)
        arm(module, self.points[module.__name__])


faulthandler.register(
    signal.SIGUSR1
)  # `kill -USR1` writes every thread's stack to the process's log: where does it hang?

if told := os.environ.get("FLWR_TEST_CRASH"):
    by_module: dict[str, list[dict[str, Any]]] = {}
    for given in json.loads(told):
        if not os.path.exists(given["marker"]):
            by_module.setdefault(given["at"].partition(":")[0], []).append(given)
    sys.meta_path.insert(0, Arming(by_module))
