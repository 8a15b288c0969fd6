"""A site's own training script as a program that fedtune client looks after: what it is given, and what it is
kept from.

It is the site's own, and may read and write what its user may, except what makes this machine that site:
keys, home, policy, the worker's folder. Nothing here comes from a coordinator.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fedtune.deploy.own_trainer import TRAINER
from fedtune.deploy.site_config import SiteConfig
from fedtune.deploy.supervisor import KEPT, PARENT, Program
from fedtune.runtime.trainer_wire import PLACE, TOKEN

# of the environment, beside what any program of Python needs: where models lie, and how libraries compute
GIVEN = (
    "HOME",
    "USER",
    "LOGNAME",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_CACHE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "TORCH_HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)
FAMILIES = ("LC_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "OMP_", "MKL_", "OPENBLAS_", "PYTORCH_")


def script_program(config: SiteConfig) -> Program:
    """The program, whose folder is HOME/trainer."""
    home, private = Path(config.home), Path(config.socket).parent
    place = home / "trainer"
    (place / "tmp").mkdir(parents=True, exist_ok=True)
    place.chmod(0o700)
    env = script_environment(os.environ) | {
        "TMPDIR": str(place / "tmp"),
        PLACE: str(private / TRAINER),
        TOKEN: config.trainer_token,
    }
    closed = (config.keys, config.first_keys, config.home, config.policy, str(private))
    rules = {
        "but": [str(Path(path).resolve()) for path in closed if path],
        "list": ["/"],
        "read": [path for path in (config.trainer, config.data, config.shared) if path],
        "write": [str(place)],
    }
    log = home / "logs" / "trainer.log"
    command = (sys.executable, config.trainer)
    return Program("trainer", command, log, env, walls=json.dumps(rules), group=True, place=place)


def script_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Without passphrases, tokens and addresses: whatever a variable is not known to be, it does not get."""
    names = {*KEPT, *GIVEN} - {PARENT}
    return {name: value for name, value in env.items() if name in names or name.startswith(FAMILIES)}
