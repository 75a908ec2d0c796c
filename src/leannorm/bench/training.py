"""`leannorm bench training`: the whole training step of a model, forward, loss, backward and SGD."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from leannorm.activation import activation_of
from leannorm.bench import gate, timing
from leannorm.bench.apart import apart, isolated
from leannorm.bench.plan import DTYPES
from leannorm.bench.progress import track
from leannorm.bench.reference import by_definition
from leannorm.bench.results import SavedBytes, TrainingBenchmark, TrainingCase
from leannorm.conversion import convert, fuse, tune
from leannorm.spelling import parse_statistics
from leannorm.statistics import FullBatch
from leannorm.train.models import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from leannorm.bench.plan import TrainingPlan
    from leannorm.bench.results import Check, Conditions, Timing

CLASSES = 1000
FUSED = " + fuse"
FOLDED = " + fuse convolution"
TUNED = " + tune"
CEILING = "ceiling"
TRIALS = 3


def run(plan: TrainingPlan, conditions: Conditions, *, progress: bool = False) -> Iterator[TrainingBenchmark]:
    """Check every model, then time every model.

    Yields:
        What is known so far: the checks of all models, then the same with the timings of one model more each time.

    Raises:
        RedGate: if a side of any model is less accurate than it may be; nothing is timed then.
        ValueError: for a model that torchvision has not.
    """
    for name in plan.models:
        build(f"torchvision:{name}", classes=CLASSES, channels=3)  # a misspelt name is told before minutes of checks
    checked = partial(isolated, check) if plan.apart else check
    cases = [TrainingCase(name, checked(name, plan), (), ()) for name in track(plan.models, "checking", shown=progress)]
    benchmark = TrainingBenchmark(
        kind="training",
        conditions=conditions,
        image_size=plan.image_size,
        batch=plan.batch,
        layout="channels_last",
        dtype=plan.dtype,
        settle=plan.settle,
        apart=plan.apart,
        starts=plan.starts,
        cases=tuple(cases),
    )
    yield benchmark
    if red := gate.red(cases):
        raise gate.RedGate(red)
    for i, name in enumerate(track(plan.models, "timing", shown=progress)):
        saved, timings = measure(name, plan)
        cases[i] = dataclasses.replace(cases[i], saved=saved, timings=timings)
        yield dataclasses.replace(benchmark, cases=tuple(cases))


@torch.no_grad()
def ceiling(model: nn.Module, images: Tensor) -> nn.Module:
    """Replace batch norm and activations by Identity in a copy; additions stay.

    What its step gains over the model's is the most that a faster batch norm with its activation can gain. Weights are
    drawn anew so that maps and logits keep their size without normalization, since arithmetic on subnormal numbers is
    many times slower.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm) or activation_of(module) is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if linear:
        linear[-1].weight /= model(images).std()
    return model


def sides(plan: TrainingPlan) -> list[str]:
    """Name what is timed beside the ceiling: torch's own, and for each source converted, fused and folded."""
    names = ["torch"] + ["torch.compile"] * plan.compiled
    for spelling in plan.statistics:
        names += [spelling, spelling + FUSED] + [spelling + FOLDED] * (plan.folded and _is_sampled(spelling))
    if plan.folded:
        names += [spelling + TUNED for spelling in plan.statistics if _is_sampled(spelling)]
    return names


def side(name: str, model: nn.Module, images: Tensor, plan: TrainingPlan) -> nn.Module:
    """Make a side of a copy of the model."""
    if name == CEILING:
        return ceiling(model, images)
    model = copy.deepcopy(model)
    if name == "torch":
        return model
    if name == "torch.compile":
        torch.compiler.reset()
        model.compile(dynamic=False)
        return model
    if name.endswith(FOLDED):
        return fuse(_converted(model, name.removesuffix(FOLDED)), convolution=True)[0]
    if name.endswith(FUSED):
        return fuse(_converted(model, name.removesuffix(FUSED)))[0]
    if name.endswith(TUNED):
        model = _converted(model, name.removesuffix(TUNED))
        # a file of its own: what an earlier run measured does not count; what is fastest depends on the dtype
        with tempfile.TemporaryDirectory() as folder, autocast(plan):
            return tune(model, images, plan=Path(folder) / "plan.json")[0]
    return _converted(model, name)


def measure(name: str, plan: TrainingPlan) -> tuple[tuple[SavedBytes, ...], tuple[Timing, ...]]:
    """Count what the sides of a model save for backward, then time their steps against each other."""
    found = [_measure_once(name, plan, plan.seed + start) for start in range(plan.starts)]
    saved, timings = found[0]
    for _, more in found[1:]:
        pairs = zip(timings, more, strict=True)
        timings = tuple(dataclasses.replace(one, seconds=one.seconds + other.seconds) for one, other in pairs)
    return saved, timings


def _measure_once(name: str, plan: TrainingPlan, seed: int) -> tuple[tuple[SavedBytes, ...], tuple[Timing, ...]]:
    makers = {each: partial(prepare, name, each, plan) for each in [*sides(plan), CEILING]}
    with apart(makers) if plan.apart else nullcontext({each: make() for each, make in makers.items()}) as made:
        timed = timing.interleave(
            {each: step for each, (_, step) in made.items()},
            repeats=plan.repeats,
            seed=seed,
            device=plan.device,
            shortest_sample=0.0 if plan.quick else timing.SHORTEST_SAMPLE,
            untimed=plan.settle,
        )
        return tuple(SavedBytes(each, kept) for each, (kept, _) in made.items() if kept is not None), timed


def prepare(name: str, which: str, plan: TrainingPlan) -> tuple[int | None, Callable[[], object]]:
    """Give the bytes that a side of a model saves for backward, where they are of interest, and its step."""
    model, images, labels = _setting(name, plan)
    model = side(which, model, images, plan)
    kept = None
    if which not in ("torch.compile", CEILING):
        with autocast(plan):
            kept = saved_bytes(model, images)
    return kept, _step(model, images, labels, plan)


def autocast(plan: TrainingPlan) -> torch.autocast:
    """Compute as the plan's dtype says."""
    return torch.autocast(torch.device(plan.device).type, torch.bfloat16, enabled=plan.dtype == "bf16")


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Give the bytes of all storages that a forward pass keeps for backward, without parameters and images."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    for tensor in (images, *model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del output  # until here, so that no storage was freed and its place taken by another
    return sum(storages.values())


def check(name: str, plan: TrainingPlan) -> tuple[Check, ...]:
    """Compare logits and gradients of each side with float64.

    A network amplifies rounding, and more so with few samples. So torch's error is that of the same network: torch's
    own with full statistics, torch's operators by the definition with sampled ones. Each trial but the first moves the
    images by a rounding, since a sign that changes before a ReLU can outweigh all other errors.
    """
    # What torch compiles is not ours to check.
    plan = dataclasses.replace(plan, batch=min(plan.batch, plan.gate_batch), compiled=False)
    model, images, labels = _setting(name, plan)
    trials = [images] + [_moved(images, seed, DTYPES[plan.dtype]) for seed in range(1, TRIALS)]
    found = []
    references: dict[str, tuple[list[dict[str, Tensor]], dict[str, Tensor]]] = {}
    for each in sides(plan)[1:]:
        if each.endswith(TUNED):
            continue  # a mixture of the sides before
        spelling = each.removesuffix(FOLDED).removesuffix(FUSED)
        if spelling not in references:
            plain = side("torch" if spelling == "full" else spelling, model, images, plan)
            reference = plain if spelling == "full" else by_definition(plain)
            with autocast(plan):
                torchs = [_gradients(reference, trial, labels, plan.seed) for trial in trials]
            references[spelling] = torchs, _gradients(reference.double(), images.double(), labels, plan.seed)
        torchs, exact = references[spelling]
        with autocast(plan):
            checked = side(each, model, images, plan)
            ours = [_gradients(checked, trial, labels, plan.seed) for trial in trials]
        found += gate.check(each, ours, exact, torchs, exact, DTYPES[plan.dtype])
    return tuple(found)


def _setting(name: str, plan: TrainingPlan) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(plan.seed)
    model = build(f"torchvision:{name}", classes=CLASSES, channels=3)
    images = torch.randn(plan.batch, 3, plan.image_size, plan.image_size)
    labels = torch.randint(CLASSES, (plan.batch,))
    model = model.to(plan.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stub
    return model, images.to(plan.device, memory_format=torch.channels_last), labels.to(plan.device)


def _moved(images: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Move each pixel up or down by a rounding in the dtype that computes."""
    signs = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return images * (1 + signs.to(images) * torch.finfo(dtype).eps)


def _is_sampled(spelling: str) -> bool:
    return not isinstance(parse_statistics(spelling), FullBatch)


def _converted(model: nn.Module, spelling: str) -> nn.Module:
    return convert(model, parse_statistics(spelling))[0]


def _step(model: nn.Module, images: Tensor, labels: Tensor, plan: TrainingPlan) -> Callable[[], object]:
    # A rate of zero costs what any other does, and keeps every side at the numbers with which it began.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        with autocast(plan):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gradients(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, _DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.eval()  # what random numbers they draw depends on the dtype
    torch.manual_seed(seed)
    logits = model(images)
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    return {"logits": logits.detach(), "gradients": torch.cat([g.flatten() for g in gradients])}
