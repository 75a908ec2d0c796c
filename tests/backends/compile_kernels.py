"""Compile the Triton kernels for an H100 as the launchers call them, on tensors without data; needs no GPU.

Writes JSON: for each launch its kernel, programs, global loads, bytes of spilled registers, and whether it has wide
indices; and how many variants of kernels there are after a first step and after more with other places. Run by
`test_triton_compiled` in a process of its own, since the interpreter of the other tests cannot be left again.
"""

import json
import re
import subprocess
import sys
import tempfile
from functools import lru_cache

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from leannorm import parse_statistics
from leannorm.backends.triton import geometry, launchers

KERNELS = ("moments", "normalize", "gradient", "apply", "correct", "finish", "track")
launches = []


class Driver:
    """An H100 that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@lru_cache
def spilled(cubin):
    """Give the bytes of a thread's stack, where what finds no register lies."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


class Compiled:
    """Stands for a kernel: does what Triton does for a call, up to the launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*arguments, **options):
            asm = self.kernel.warmup(*arguments, grid=grid, **options).asm
            launches.append(
                {
                    "kernel": self.kernel.__name__.removesuffix("_kernel"),
                    "programs": grid[0] * grid[-1],
                    "loads": sorted(set(re.findall(r"ld\.global\S*", asm["ptx"]))),
                    "spilled": spilled(asm["cubin"]),
                    "wide": options.get("WIDE", False),
                }
            )

        return call

    def variants(self):
        return sum(len(cache[0]) for cache in self.kernel.device_caches.values())


def step(shape, channels_last, spelling, dtype, activation, residual, place=0):
    """Call both fused operators."""
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, regions = torch.empty(shape[1], device="meta"), parse_statistics(spelling).regions(tuple(shape), place)
    draw = torch.empty(regions.draws, dtype=torch.int64, device="meta") if regions.draws else None
    places = draw, list(regions.boxes), list(regions.weights)
    y, mean, var = launchers.batch_norm(x, weight, weight, x if residual else None, *places, 1e-5, activation, [])
    launchers.batch_norm_backward(
        y, x, mean, var, weight, weight, None, y if residual else None, 1e-5, activation, [], *places, residual
    )


if __name__ == "__main__":
    driver.set_active(Driver())
    geometry._multiprocessors = lambda device: 132
    kernels = [Compiled(getattr(launchers, f"{name}_kernel")) for name in KERNELS]
    for name, kernel in zip(KERNELS, kernels, strict=True):
        setattr(launchers, f"{name}_kernel", kernel)
    asked = json.loads(sys.argv[1])
    step(*asked)
    first = list(launches)
    variants = [sum(kernel.variants() for kernel in kernels)]
    for place in range(1, 30):
        step(*asked, place)
    step([abs(asked[0][0] - 6), *asked[0][1:]], *asked[1:])  # another batch size too
    variants.append(sum(kernel.variants() for kernel in kernels))
    launchers.moments(torch.empty(9, 64, device="meta"), None, [], [])
    running, batches = torch.empty(2, 64, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    launchers.track(*running, batches, *running, 1.0, 0.1, True, True)
    sys.stdout.write(json.dumps({"launches": [*first, *launches[-3:]], "variants": variants}))
