"""The coverage-guided fuzzer: python -m tests.wire.coverage_fuzz -runs=20000 [CORPUS FOLDER]. Needs
atheris."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["fedtune.wire"]):
    from tests.wire import fuzz

if __name__ == "__main__":
    atheris.Setup(sys.argv, fuzz.one)
    atheris.Fuzz()
