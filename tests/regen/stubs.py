"""Protobuf stubs: every .proto under protos/ as Python beside the package that its path names."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# the generator's `Mapping` has no type arguments, which mypy's strict mode would refuse
HEAD = '# mypy: disable-error-code="type-arg"\n'


def generate() -> dict[str, str]:
    """message_pb2.py and .pyi of each .proto; those with a service get _pb2_grpc.py too."""
    from grpc_tools import protoc

    files: dict[str, str] = {}
    sources = sorted((ROOT / "protos").rglob("*.proto"))
    for source in sources:
        flags = (
            ["--grpc_python_out"] if re.search(r"^service ", source.read_text(encoding="utf-8"), re.M) else []
        )
        with tempfile.TemporaryDirectory() as folder:
            outs = [f"{flag}={folder}" for flag in ["--python_out", "--pyi_out", *flags]]
            code = protoc.main(
                [
                    "protoc",
                    f"-I{ROOT / 'protos'}",
                    f"-I{Path(protoc.__file__).parent / '_proto'}",
                    *outs,
                    str(source),
                ]
            )
            if code:
                raise RuntimeError(f"protoc failed on {source}")
            for made in sorted(Path(folder).rglob("*.py*")):
                text = made.read_text(encoding="utf-8")
                files[made.relative_to(folder).as_posix()] = HEAD + text if made.suffix == ".pyi" else text
    return files


def without_versions(text: str) -> str:
    """Generated text without the numbers that say which generator made it."""
    text = re.sub(r"^# Protobuf Python Version: .*$", "", text, flags=re.M)
    text = re.sub(r"^GRPC_GENERATED_VERSION = .*$", "", text, flags=re.M)
    return re.sub(r"(_runtime_version\.Domain\.PUBLIC,)(\s+\d+,)+", r"\1", text)
