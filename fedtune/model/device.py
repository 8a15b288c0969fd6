"""Where a model computes, and how exactly: its device, and torch's threads and arithmetic."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from fedtune.errors import FedtuneError
from fedtune.model.settings import ModelSettings
from fedtune.threads import threads_for

CPU = Path("/proc/cpuinfo")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = ":4096:8"  # buffers that no two products share, so that sums have one order (manual of cuBLAS)


def pick_device(name: str) -> torch.device:
    """auto means CUDA where there is one. Raises M301 for a device that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        known = device.type == "cpu" or (
            device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
        )
    except RuntimeError:
        known = False
    if not known:
        raise FedtuneError(
            "M301",
            f"model.device = '{name}'",
            "auto, cpu, or a CUDA device that this machine has, such as cuda:0",
            "change model.device",
        )
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes with bfloat16 itself. Where it does not, a step was 20 times slower than with
    float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    with suppress(OSError):  # another system than Linux
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(CPU.read_text().split()))
    return False


def prepare_torch(settings: ModelSettings) -> None:
    """Threads, and kernels whose results do not differ from one time to the next: always on the CPU, on a GPU
    where they are asked for. Raises M301 for a device that is not there, or one that was begun with
    otherwise.

    The number of threads is always set: Ray would leave its actors one, and bits depend on the number.
    """
    torch.set_num_threads(threads_for(settings.threads)[0])
    on_gpu = pick_device(settings.device).type == "cuda"
    if on_gpu and settings.deterministic:
        fix_workspace()
    same = settings.deterministic or not on_gpu
    # use_deterministic_algorithms imports torch's compiler
    torch.set_deterministic_debug_mode("error" if same else "default")
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # costs time and nothing here reads such memory
    )
    torch.set_float32_matmul_precision("high" if on_gpu and settings.tf32 else "highest")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def fix_workspace() -> None:
    """cuBLAS reads its variable when CUDA begins. Raises M301 where that is over."""
    if os.environ.get(WORKSPACE):
        return
    if torch.cuda.is_initialized():
        raise FedtuneError(
            "M301",
            f"model.deterministic in a process that has begun to use its GPU without {WORKSPACE}",
            f"{WORKSPACE}={FIXED} in its environment",
            f"set {WORKSPACE}={FIXED} before you start it",
        )
    os.environ[WORKSPACE] = FIXED
