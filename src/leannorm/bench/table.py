"""Tables for the terminal, made from raw results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leannorm.bench import gate
from leannorm.bench.results import LayerBenchmark
from leannorm.bench.summary import layer_rows, status, training_rows

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text
except ImportError as missing:
    raise ImportError(f"The tables need rich: pip install 'leannorm[train]' (got: {missing})") from missing

if TYPE_CHECKING:
    from leannorm.bench.results import Conditions, TrainingBenchmark
    from leannorm.bench.summary import Quartiles


def tables(benchmark: LayerBenchmark | TrainingBenchmark) -> Group:
    """Show how many times faster than torch each side is, and under which conditions; where the gate was red, why."""
    shown = []
    if any(case.timings for case in benchmark.cases):
        shown = _layers(benchmark) if isinstance(benchmark, LayerBenchmark) else [_training(benchmark)]
    return Group(*map(Text, _heading(benchmark)), *shown)


def _layers(benchmark: LayerBenchmark) -> list[Table]:
    rows = layer_rows(benchmark)
    shown = []
    for operation in dict.fromkeys(row.operation for row in rows):
        table = _table(operation, ("Side",), ("Layout", "dtype", "Speed-up", "Quartiles", "Worst", "Shape", "Floor"))
        for row in rows:
            if row.operation == operation:
                floor = "" if row.of_floor is None else f"{row.of_floor:.0%}"
                shape = "x".join(map(str, row.worst_shape[1:]))
                table.add_row(
                    *(Text(cell) for cell in (row.side, row.layout, row.dtype)),
                    *(*_speedup(row.speedup), f"{row.worst:.2f}x", shape, floor),
                    end_section=row.side == "floor",
                )
        shown.append(table)
    return shown


def _training(benchmark: TrainingBenchmark) -> Table:
    table = _table("training step", ("Model", "Side"), ("Speed-up", "Quartiles", "Saved"))
    for row in training_rows(benchmark):
        saved = "" if row.saved is None else f"{row.saved:.0%}"
        table.add_row(Text(row.model), Text(row.side), *_speedup(row.speedup), saved, end_section=row.side == "ceiling")
    return table


def _table(title: str, names: tuple[str, ...], figures: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name)
    for figure in figures:
        # In a narrow terminal a name may fold, figures may not.
        table.add_column(figure, justify="right", no_wrap=figure != "Layout", overflow="fold")
    return table


def _speedup(speedup: Quartiles) -> tuple[str, str]:
    return f"{speedup.median:.2f}x", f"{speedup.low:.2f}-{speedup.high:.2f}"


def _heading(benchmark: LayerBenchmark | TrainingBenchmark) -> list[str]:
    conditions: Conditions = benchmark.conditions
    versions = dict(conditions.environment.versions)
    allocator = ", ".join(f"{name}={value}" for name, value in conditions.allocator) or "default"
    size = f"{benchmark.image_size} px, batch {benchmark.batch}"
    if isinstance(benchmark, LayerBenchmark):
        shapes = len({case.shape for case in benchmark.cases})
        what = (
            f"Layers: forward and backward; times faster than torch eager, geometric means over {shapes} shapes of "
            f"ResNet-50 at {size}. Floor: the share of the memory-bandwidth floor, on tensors well over the cache."
        )
    else:
        what = (
            "Training: forward, loss, backward and SGD; times faster than torch eager, at "
            f"{size}, {benchmark.layout}, {benchmark.dtype}. Ceiling: batch norm and activations gone. Saved: bytes "
            "kept for backward, as a share of torch's. "
            f"Each sample follows {benchmark.settle} untimed steps of its side"
            f"{', in a process of its own' if benchmark.apart else ''}"
            f"{f', begun anew {benchmark.starts} times' if benchmark.starts > 1 else ''}."
        )
    where = (
        f"{conditions.device} on {conditions.environment.machine}, {conditions.threads} threads, torch "
        f"{versions.get('torch', 'unknown')}, commit {conditions.environment.commit[:10]}, allocator {allocator}; "
        f"medians of {conditions.repeats * getattr(benchmark, 'starts', 1)} interleaved rounds."
    )
    quick = ["QUICK: tiny sizes, which prove nothing about speed."] if conditions.quick else []
    if red := gate.red(benchmark.cases):
        return [what, where, *quick, "GATE RED, so nothing was timed:", *red]
    partial = status(benchmark.cases)
    return [what, where, *quick, *([f"PARTIAL: {partial} were timed."] if partial else [])]
