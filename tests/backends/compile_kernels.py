"""Compile the Triton kernels for an H100 as the launchers call them, on tensors without data; needs no GPU.

Writes JSON: for each launch its kernel, grid, global loads, bytes of stack and whether indices are wide. Run by
`test_triton_compiled` in a process of its own, since the interpreter of the other tests cannot be left again.
"""

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leannorm import parse_statistics
from leannorm.backends.triton import geometry, launchers

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
launches = []


class Compiled:
    """Stands for a kernel: compiles it for the arguments that it is called with, and launches nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def call(*arguments, num_warps, enable_fp_fusion, **constants):
            types, aligned = {}, {}
            for i, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=False)):
                types[parameter.name] = self.type_of(parameter, value)
                if isinstance(value, torch.Tensor):
                    aligned[(i,)] = [["tt.divisibility", 16]]
            nothing = {name: None for name, kind in types.items() if kind == "constexpr"}
            types |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(self.kernel, types, constants | nothing, aligned)
            options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
            ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
            launches.append(
                {
                    "kernel": self.kernel.__name__,
                    "programs": grid[0] * grid[-1],
                    "loads": sorted(set(re.findall(r"ld\.global\S*", ptx))),
                    "stack": "__local_depot" in ptx,
                    "wide": constants["WIDE"],
                }
            )

        return call

    def type_of(self, parameter, value):
        match value:
            case None:
                return "constexpr"
            case torch.Tensor():
                return "*" + TYPES[value.dtype]
            case int():
                assert parameter.do_not_specialize, f"{self.kernel.__name__} is compiled again for {parameter.name}"
                return "i32" if value < 2**31 else "i64"
        return "fp32"


def step(shape, channels_last, spelling, dtype, activation, residual):
    """Call both fused operators."""
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, regions = torch.empty(shape[1], device="meta"), parse_statistics(spelling).regions(tuple(shape))
    draw = torch.empty(regions.draws, dtype=torch.int64, device="meta") if regions.draws else None
    places = draw, list(regions.boxes), list(regions.weights)
    y, mean, var = launchers.batch_norm(x, weight, weight, x if residual else None, *places, 1e-5, activation, [])
    launchers.batch_norm_backward(
        y, x, mean, var, weight, weight, None, y if residual else None, 1e-5, activation, [], *places, residual
    )


if __name__ == "__main__":
    geometry._multiprocessors = lambda device: 132
    for kernel in ("moments", "normalize", "gradient", "apply", "correct", "finish"):
        setattr(launchers, f"{kernel}_kernel", Compiled(getattr(launchers, f"{kernel}_kernel")))
    step(*json.loads(sys.argv[1]))
    launchers.moments(torch.empty(9, 64, device="meta"), None, [], [])
    sys.stdout.write(json.dumps(launches))
