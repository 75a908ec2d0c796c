"""Does `fold` account for every batch normalization of torchvision's and timm's architectures, and stay exact?

    .venv/bin/python experiments/fold_sweep.py                     # hours on 2 cores; goes on where it was stopped
    .venv/bin/python experiments/fold_sweep.py --seconds 240       # as much as fits
    .venv/bin/python experiments/fold_sweep.py --table             # what is there, in Markdown

Every torchvision classification model, and some of each timm family that have batch normalization, with random weights,
statistics, gamma and beta. Raw results: `benchmarks/results/fold-sweep.json`, one record a model.
"""

import argparse
import collections
import functools
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from leannorm import records
from leannorm.graph import fold
from leannorm.records import Environment, Refusal
from leannorm.train.environment import environment
from leannorm.train.models import build, import_torchvision

RESULT = Path("benchmarks/results/fold-sweep.json")
FAMILY = 4  # models of each timm family, among the first of its names
LARGEST = 60_000_000  # parameters of a timm model
CANCELLATION = 0.6


@dataclass(frozen=True)
class Swept:
    """What `fold` did to one model.

    ``calls`` counts batch normalizations in a run of the original; each is ``folded`` into a neighbour, ``tabled`` (a
    scale and a shift per channel) or among ``refusals``; ``merged`` counts convolutions that became part of another.
    ``error32`` is ``||folded - original|| / ||original||`` of the outputs in float32, ``error64`` in float64, and
    ``rounding32`` that of the original in float32 against itself in float64. ``spread`` is that of the two samples'
    outputs against each other. ``other`` names normalizations of other kinds. ``failure`` says why there is nothing, or
    nothing in float32.
    """

    model: str
    input_shape: tuple[int, ...]
    calls: int
    folded: int
    tabled: int
    merged: int
    refusals: tuple[Refusal, ...]
    other: tuple[str, ...]
    error32: float | None
    error64: float | None
    rounding32: float | None
    spread: float | None
    seconds: float
    failure: str | None


@dataclass(frozen=True)
class Sweep:
    """All models so far."""

    environment: Environment
    timm: str
    models: tuple[Swept, ...]


class Calls(TorchDispatchMode):
    """Counts batch normalizations by running statistics, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count one operator."""
        if "batch_norm" in str(function) and False in (args[5], (kwargs or {}).get("training")):
            self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def randomize(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Put a model into eval mode with statistics, gamma and beta that no default hides; eps stays.

    Statistics are drawn around those of what each layer reads in a run on ``x``, so that maps stay of size one: random
    ones let some networks grow until their own rounding is 1e-2 of the outputs. `CANCELLATION` of the mean square is
    added to each variance, or the layers of a deep network would magnify what rounding leaves of a difference.
    Parameters that begin at zero, such as those of classifiers, are drawn too, or all outputs would be zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    hooks = {}

    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hooks.pop(module).remove()
        var, mean = torch.var_mean(inputs[0], [d for d in range(inputs[0].ndim) if d != 1], correction=0)
        var = var + CANCELLATION * inputs[0].square().mean()
        var = torch.where(var > 0, var, 1.0)
        module.running_mean.mul_(var.sqrt()).add_(mean)
        module.running_var.mul_(var)

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(std=0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(generator=generator)
            hooks[module] = module.register_forward_pre_hook(measure)
    model.eval()(x)
    for hook in hooks.values():
        hook.remove()
    return model


def relative_error(got: Tensor, expected: Tensor) -> float:
    """2-norms over all elements, in float64; the difference itself where all outputs are 0."""
    difference, scale = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / scale if scale else difference


@torch.no_grad()
def sweep(name: str) -> Swept:
    """Fold one model in float32 and in float64."""
    begin = time.perf_counter()
    torch.manual_seed(0)
    model = build(name, classes=10, channels=3).eval()
    x = _small_input(model)
    randomize(model, x)
    with Calls() as counter:
        expected = model(x)
    calls, spread = counter.count, relative_error(expected[0], expected[1])
    if not spread > 0:
        raise ValueError("the outputs do not depend on the input, or are not finite, with these statistics")
    error32, error64, rounding32, failure = None, None, None, None
    try:
        folded, report = fold(model, x)
        error32 = relative_error(folded(x), expected)
        del folded
    except RuntimeError as error:  # float64 tells whether the fold was wrong, or rounding grows so much in the model
        if not calls:
            raise
        failure = f"float32: {str(error).strip().partition(chr(10))[0]}"
    if calls:
        model, x = model.double(), x.double()
        exact = model(x)
        folded, report = fold(model, x)
        error64, rounding32 = relative_error(folded(x), exact), relative_error(expected, exact)
    actions = collections.Counter(change.action.partition(" ")[0] for change in report.changes)
    other = [refusal for refusal in report.refusals if refusal.reason.startswith("it is ")]
    refusals = tuple(refusal for refusal in report.refusals if refusal not in other)
    accounted = actions["folded"] + actions["replaced"] + sum(bool(refusal.module) for refusal in refusals)
    if accounted != calls:
        raise ValueError(f"the model calls batch normalization {calls} times, fold reports on {accounted}")
    return Swept(
        model=name,
        input_shape=tuple(x.shape),
        calls=calls,
        folded=actions["folded"],
        tabled=actions["replaced"],
        merged=actions["merged"],
        refusals=refusals,
        other=tuple(f"{refusal.module}: {refusal.reason.split(',')[0]}" for refusal in other),
        error32=error32,
        error64=error64,
        rounding32=rounding32,
        spread=spread,
        seconds=round(time.perf_counter() - begin, 1),
        failure=failure,
    )


def _small_input(model: nn.Module) -> Tensor:
    """A batch of two of the smallest size that the model takes."""
    asked = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    for size in (64, 96, 128, 224, asked[-1], 299):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            model(x)
            return x
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            refused = error
    raise refused


def names(known: dict[str, Swept]) -> Iterator[str]:
    """All models of the sweep; torchvision's first."""
    models = import_torchvision().models
    yield from (f"torchvision:{name}" for name in models.list_models(module=models))
    import timm

    for wanted in (2, FAMILY):  # all families before more of each
        for family in timm.list_modules():
            found = 0
            for name in timm.list_models(module=family)[: 4 * FAMILY]:
                if found < wanted and (f"timm:{name}" in known or _fits(name)):
                    found += 1
                    yield f"timm:{name}"


@functools.cache
def _fits(name: str) -> bool:
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except Exception:  # some architectures compute with their weights when they are built
        return False
    small = sum(parameter.numel() for parameter in model.parameters()) <= LARGEST
    return small and any(isinstance(module, _BatchNorm) for module in model.modules())


def _nothing(name: str, failure: str) -> Swept:
    return Swept(name, (), 0, 0, 0, 0, (), (), None, None, None, None, 0.0, failure)


def table(models: list[Swept]) -> str:
    """The sweep in Markdown: a line a family, and every model that is not as it should be."""
    done = [model for model in models if model.failure is None]
    lines = ["| family | models | BN | folded | scale and shift | refused | error fp32 | error float64 |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    groups: dict[str, list[Swept]] = {"all": done}
    for model in done:
        groups.setdefault(model.model.partition(":")[0], []).append(model)
    for family, group in groups.items():
        calls, folded, tabled = (sum(getattr(m, field) for m in group) for field in ("calls", "folded", "tabled"))
        errors = [max((getattr(m, field) or 0.0 for m in group), default=0.0) for field in ("error32", "error64")]
        lines.append(
            f"| {family} | {len(group)} | {calls} | {folded} | {tabled} | {calls - folded - tabled} "
            f"| {errors[0]:.1e} | {errors[1]:.1e} |"
        )
    for model in models:
        if model.failure is not None:
            exact = (
                "" if model.error64 is None else f" (float64: {model.error64:.1e}; rounding: {model.rounding32:.1e})"
            )
            lines.append(f"\n- `{model.model}` failed: {model.failure}{exact}")
        elif (model.error32 or 0) >= 1e-5 or (model.error64 or 0) >= 1e-12:
            lines.append(
                f"\n- `{model.model}`: error {model.error32:.1e} in fp32 (the original's own rounding: "
                f"{model.rounding32:.1e}), {model.error64:.1e} in float64"
            )
        lines += [f"\n- `{model.model}`, `{refusal.module}`: {refusal.reason}" for refusal in model.refusals]
    return "\n".join(lines)


def main() -> None:
    """Go on with the sweep, or show it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no model after this time")
    parser.add_argument("--retry", action="store_true", help="run failed models again")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    options = parser.parse_args()
    begin = time.perf_counter()
    known = {}
    if RESULT.exists():
        known = {model.model: model for model in records.read(Sweep, RESULT).models}
    if not options.table:
        import timm

        here = environment()
        for name in names(known):
            if name in known and not (options.retry and known[name].failure is not None):
                continue
            if time.perf_counter() - begin > options.seconds:
                break
            known[name] = _nothing(name, "it was stopped on the way")
            records.write(RESULT, Sweep(here, timm.__version__, tuple(known.values())))
            try:
                known[name] = sweep(name)
            except Exception as error:  # recorded, whatever a model or torch.export raises
                first = str(error).strip().partition("\n")[0]
                known[name] = _nothing(name, f"{type(error).__name__}: {first}")
            records.write(RESULT, Sweep(here, timm.__version__, tuple(known.values())))
            print(json.dumps([name, known[name].calls, known[name].failure, known[name].seconds]), flush=True)
            gc.collect()
    print(table(list(known.values())))


if __name__ == "__main__":
    main()
