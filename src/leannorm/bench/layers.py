"""`leannorm bench layers`: batch normalization, alone and with what follows it, forward and backward."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leannorm.bench import gate, timing
from leannorm.bench.plan import DTYPES, LAYOUTS
from leannorm.bench.progress import track
from leannorm.bench.reference import normalized
from leannorm.bench.results import LayerBenchmark, LayerCase
from leannorm.bench.shapes import batch_norm_shapes
from leannorm.nn import BatchNorm2d
from leannorm.ops import definition
from leannorm.spelling import parse_statistics
from leannorm.statistics import FullBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from leannorm.bench.plan import LayerPlan
    from leannorm.bench.results import Check, Conditions, Timing
    from leannorm.statistics import Statistics

QUICK_SHAPES = 2
COMPILED, DECOMPOSED = ", compiled", ", decomposed"
_KINK = 4  # roundings of the largest element, within which the sign of an element is anybody's guess


@dataclass(frozen=True)
class Operation:
    """What is computed of a tensor: batch norm, and perhaps the addition of a residual and a ReLU."""

    residual: bool
    relu: bool


OPERATIONS = {
    "bn": Operation(residual=False, relu=False),
    "bn+relu": Operation(residual=False, relu=True),
    "bn+add+relu": Operation(residual=True, relu=True),
}


@dataclass(frozen=True)
class Case:
    """One case to measure; the tensors are made anew from its seed."""

    operation: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    device: str
    seed: int

    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Make x, the residual and dy, (N, C, H, W)."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        x, residual, dy = (
            self._tensor(torch.randn(self.shape, generator=generator, device=self.device)) for _ in range(3)
        )
        needs_residual = OPERATIONS[self.operation].residual
        return x.requires_grad_(), residual.requires_grad_() if needs_residual else None, dy

    def parameters(self) -> dict[str, Tensor]:
        """Make gamma and beta, (C,)."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        channels = self.shape[1]
        weight, bias = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
        return {"weight": weight, "bias": bias}

    def _tensor(self, value: Tensor) -> Tensor:
        return value.to(self.device, DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[self.layout])


class TorchLayer(nn.Module):
    """The operation as torchvision's models spell it: the addition and the ReLU in place."""

    def __init__(self, channels: int, operation: Operation) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True) if operation.relu else None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize, add, activate."""
        y = self.norm(input)
        if residual is not None:
            y += residual
        return y if self.relu is None else self.relu(y)


def run(plan: LayerPlan, conditions: Conditions, *, progress: bool = False) -> Iterator[LayerBenchmark]:
    """Check every case, then time every case.

    Yields:
        What is known so far: the checks of all cases, then the same with the timings of one case more each time.

    Raises:
        RedGate: if a side of any case is less accurate than it may be; nothing is timed then.
    """
    shapes = list(dict.fromkeys(batch_norm_shapes("torchvision:resnet50", plan.image_size)))
    cases = [
        Case(operation, (plan.batch, *shape), layout, dtype, plan.device, plan.seed)
        for operation, layout, dtype, shape in product(
            plan.operations, plan.layouts, plan.dtypes, shapes[:QUICK_SHAPES] if plan.quick else shapes
        )
    ]
    found = [
        LayerCase(case.operation, case.shape, case.layout, case.dtype, check(case, plan), ())
        for case in track(cases, "checking", shown=progress)
    ]
    benchmark = LayerBenchmark("layers", conditions, plan.image_size, plan.batch, tuple(found))
    yield benchmark
    if red := gate.red(found):
        raise gate.RedGate(red)
    for i, case in enumerate(track(cases, "timing", shown=progress)):
        found[i] = dataclasses.replace(found[i], timings=measure(case, plan))
        yield dataclasses.replace(benchmark, cases=tuple(found))


def sides(case: Case, plan: LayerPlan) -> dict[str, nn.Module]:
    """Make the layers that are compared, with the same parameters: torch's first."""
    operation, channels = OPERATIONS[case.operation], case.shape[1]
    torchs = TorchLayer(channels, operation)
    torchs.norm.load_state_dict(case.parameters(), strict=False)
    layers: dict[str, nn.Module] = {"torch": torchs}
    if plan.compiled or plan.decomposed:
        torch.compiler.reset()  # else later cases meet the limit of recompilations and run eagerly
    if plan.compiled:
        compiled_torchs = TorchLayer(channels, operation)
        compiled_torchs.norm.load_state_dict(case.parameters(), strict=False)
        compiled_torchs.compile(dynamic=False)
        layers["torch.compile"] = compiled_torchs
    for spelling in plan.statistics:
        statistics = parse_statistics(spelling)
        layer = BatchNorm2d(channels, statistics=statistics, activation="relu" if operation.relu else None)
        layer.load_state_dict(case.parameters(), strict=False)
        layers[spelling] = layer
        for form in (COMPILED, DECOMPOSED) if plan.decomposed else ():
            compiled = copy.deepcopy(layer)
            compiled.decomposes = form == DECOMPOSED
            compiled.compile(dynamic=False)
            layers[spelling + form] = compiled
    return {side: layer.to(case.device) for side, layer in layers.items()}


def measure(case: Case, plan: LayerPlan) -> tuple[Timing, ...]:
    """Time the sides of a case, and a copy of its input, against each other."""
    x, residual, dy = case.inputs()
    steps: dict[str, Callable[[], object]] = {
        side: _step(layer, x, residual, dy) for side, layer in sides(case, plan).items()
    }
    if plan.replayed:
        steps |= {side + timing.REPLAYED: timing.graph_of(step) for side, step in steps.items()}
    source, target = x.detach(), torch.empty_like(x, requires_grad=False)
    steps["copy"] = lambda: target.copy_(source)
    return timing.interleave(
        steps,
        repeats=plan.repeats,
        seed=plan.seed,
        device=plan.device,
        shortest_sample=0.0 if plan.quick else timing.SHORTEST_SAMPLE,
    )


def check(case: Case, plan: LayerPlan) -> tuple[Check, ...]:
    """Compare y and all gradients of each side with float64."""
    dtype, found = DTYPES[case.dtype], []
    # What torch compiles is not ours to check.
    layers = sides(case, dataclasses.replace(plan, compiled=False, decomposed=False))
    full, full_dy = exact(case, FullBatch(), plan.seed)
    torchs = _gradients(layers.pop("torch"), case, full_dy, plan.seed)
    for side, layer in layers.items():
        wanted, dy = full, full_dy
        if side != "full":
            wanted, dy = exact(case, parse_statistics(side), plan.seed)
        found += gate.check(side, [_gradients(layer, case, dy, plan.seed)], wanted, [torchs], full, dtype)
    return tuple(found)


def exact(case: Case, statistics: Statistics, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Compute y and all gradients in float64 by the definition.

    Returns:
        The tensors by name, and the incoming gradient that they belong to: dy, but zero where rounding decides on the
        sign of z, and so on whether ReLU lets the gradient pass.
    """
    operation, dtype = OPERATIONS[case.operation], DTYPES[case.dtype]
    x, residual, dy = case.inputs()
    parameters = case.parameters().values()
    x64, residual64, weight, bias = (
        None if value is None else value.detach().to(case.device, torch.float64).requires_grad_()
        for value in (x, residual, *parameters)
    )
    assert x64 is not None
    torch.manual_seed(seed)
    z = normalized(x64, weight, bias, residual64, statistics.regions_of(x), 1e-5)
    if operation.relu:
        size = z.detach().abs()
        dy = dy * (size > _KINK * torch.finfo(dtype).eps * size.max())
    y = definition.activate(z, "relu" if operation.relu else "", ())
    inputs = [value for value in (x64, weight, bias, residual64) if value is not None]
    return _named(y, torch.autograd.grad(y, inputs, dy.double())), dy


def _gradients(layer: nn.Module, case: Case, dy: Tensor, seed: int) -> dict[str, Tensor]:
    x, residual, _ = case.inputs()
    torch.manual_seed(seed)
    y = layer(x) if residual is None else layer(x, residual)
    return _named(y, torch.autograd.grad(y, _inputs(layer, x, residual), dy))


def stepping(layer: nn.Module, case: Case) -> Callable[[], object]:
    """Give the layer's forward and backward on the case's inputs."""
    return _step(layer, *case.inputs())


def _step(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> Callable[[], object]:
    inputs = _inputs(layer, x, residual)
    arguments = (x,) if residual is None else (x, residual)
    # Not .backward(): it would copy the residual's gradient into .grad, which no network does.
    return lambda: torch.autograd.grad(layer(*arguments), inputs, dy)


def _inputs(layer: nn.Module, x: Tensor, residual: Tensor | None) -> list[Tensor]:
    return [x, *layer.parameters(), *(() if residual is None else (residual,))]


def _named(y: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = ("dx", "dweight", "dbias", "dresidual")
    return {"y": y.detach()} | dict(zip(names, gradients, strict=False))
