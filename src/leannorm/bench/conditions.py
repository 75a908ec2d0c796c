"""What a measurement depends on besides the code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from leannorm.bench.results import Conditions
from leannorm.train.environment import environment

if TYPE_CHECKING:
    from leannorm.bench.plan import Plan

ALLOCATOR = (
    "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
)  # fmt: skip
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def conditions(plan: Plan) -> Conditions:
    """Describe this process and the device that the plan measures.

    Raises:
        ValueError: if there is no such device.
    """
    device = plan.device
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"bench measures on cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device cpu")
    return Conditions(
        environment=environment(),
        device="cpu" if kind == "cpu" else torch.cuda.get_device_name(device),
        threads=torch.get_num_threads(),
        allocator=tuple((name, os.environ[name]) for name in ALLOCATOR if name in os.environ),
        cache_bytes=_cpu_cache(_CPU_CACHES)
        if kind == "cpu"
        else torch.cuda.get_device_properties(device).L2_cache_size,
        repeats=plan.repeats,
        seed=plan.seed,
        quick=plan.quick,
    )


def _cpu_cache(folder: Path) -> int | None:
    """Give the bytes of the last-level cache, where the kernel tells."""
    sizes = [path.read_text(encoding="ascii").strip() for path in folder.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=None)
