"""Libraries below speak through our events or not at all."""

from __future__ import annotations

import os
import warnings


def quiet() -> None:
    """FEDTUNE_DEBUG lets them talk."""
    if os.environ.get("FEDTUNE_DEBUG"):
        return
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore")
