"""What was taken out of a run, in writing: a JSON file that a member signs, or that carries its own hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fedtune.disk import json_text


def certificate(record: dict[str, Any], keys: Path | None) -> bytes:
    """The record as canonical JSON with the signature of a member or, without keys, with its hash."""
    said = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    if keys is None:
        return (json_text(record | {"sha256": hashlib.sha256(said).hexdigest()}, indent=2) + "\n").encode()
    from fedtune.trust.identity import load
    from fedtune.trust.signed import seal

    return seal(said, load(keys)).to_json()
