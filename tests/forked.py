"""Python programs as processes of their own that need not import torch and transformers first.

Importing them costs seconds of a core, more than most programs of the tests then work. Python's fork server has
imported them and done nothing else; every program is a child of it, with a session, a folder, an environment and
output of its own: a process like any other, that can be killed at any moment. What a program imports, and when it
begins to speak, are questions for `python -m fedtune` itself (tests/cli/test_cli.py).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMPORTED = ("torch", "transformers", "peft", "safetensors.torch", "fedtune.runtime.run", "fedtune.model.base")
_subprocess_run = subprocess.run  # tests put `run` in its place
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*IMPORTED, __name__])


class Program:
    """`python WORDS`, while it runs: of Python's own options -m and -c are known, or a script comes first."""

    def __init__(self, *words: str, cwd: Path | None = None, **environment: str) -> None:
        self.args, self._folder = words, tempfile.TemporaryDirectory(prefix="program-")
        self._output = Path(self._folder.name)
        self._process = _context.Process(
            target=_run, args=(words, str(cwd or Path.cwd()), {**os.environ, **environment}, self._output)
        )
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def kill_all(self) -> None:
        """With the processes that it has started."""
        os.killpg(self._process.pid or 0, signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 300) -> int:
        """Its exit code, or minus the signal that ended it; TimeoutExpired where it has not ended."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Its exit code and all that it wrote; a program that takes longer is killed, with its children."""
        try:
            code = self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise
        out, err = ((self._output / name).read_text() for name in ("1", "2"))
        return subprocess.CompletedProcess(self.args, code, out, err)


def run_fedtune(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return Program("-m", "fedtune", *words, cwd=cwd).finish()


def run(
    command: Sequence[str], *, check: bool = False, cwd: Path | None = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    """In the place of `subprocess.run` for scripts that start themselves or fedtune again and read the output."""
    if command[0] != sys.executable:
        return _subprocess_run(command, check=check, cwd=cwd, **more)
    done = Program(*map(str, command[1:]), cwd=cwd).finish()
    if check:
        done.check_returncode()
    return done


def _run(words: tuple[str, ...], cwd: str, env: dict[str, str], output: Path) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(output / str(number), os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = list(words if words[0] not in ("-m", "-c") else words[1:])
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(compile(words[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
