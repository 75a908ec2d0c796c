"""`leannorm bench`: parse, call, exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leannorm.cli.errors import clean_errors

if TYPE_CHECKING:
    from leannorm.bench.plan import Plan

commands = typer.Typer(help="Measure speed against torch, behind a correctness gate.", no_args_is_help=True)
ImageSize = Annotated[int, typer.Option(help="Pixels of a side of the images.")]
Batch = Annotated[int | None, typer.Option(help="Images in a batch; 16 (training: 8), on cuda 256 if left out.")]
Sources = Annotated[
    str | None,
    typer.Option("--statistics", help="Sources that leannorm is timed with; full, fs:1/32, grid:1/32 ... if left out."),
]
Compiled = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Time torch.compile too; slow. On cuda the default.")
]
Repeats = Annotated[int, typer.Option(help="Samples of each side, interleaved.")]
Seed = Annotated[int, typer.Option(help="Of the data and of the order of the samples.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch; its own choice if left out.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it works; proves nothing about speed.")]
Results = Annotated[
    Path | None, typer.Option("--out", help="File; benchmarks/results/KIND-MACHINE-YYYY-MM.json if left out.")
]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")]


@commands.command()
def layers(
    image_size: ImageSize = 224,
    batch: Batch = None,
    operations: Annotated[str | None, typer.Option(help="bn,bn+relu,bn+add+relu; all if left out.")] = None,
    layouts: Annotated[
        str | None, typer.Option(help="channels_last,contiguous; on cuda the first alone if left out.")
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="fp32,bf16, of the maps (parameters stay fp32); on cuda bf16 if left out.")
    ] = None,
    statistics: Sources = None,
    compiled: Compiled = None,
    decomposed: Annotated[
        bool,
        typer.Option("--decomposed", help="Time leannorm in torch.compile too, as one operator and decomposed; slow."),
    ] = False,
    replayed: Annotated[bool | None, typer.Option(help="Time replays of CUDA graphs too; on cuda if left out.")] = None,
    repeats: Repeats = 11,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    quick: Quick = False,
    out: Results = None,
    overwrite: Replace = False,
) -> None:
    """Time BN, BN+ReLU and BN+add+ReLU, forward and backward, on ResNet-50's shapes."""
    with clean_errors():
        from leannorm.bench.plan import LayerPlan, listed, planned

        plan = planned(
            LayerPlan,
            device,
            image_size=image_size,
            batch=batch,
            statistics=listed(statistics),
            compiled=compiled,
            decomposed=decomposed,
            replayed=replayed,
            repeats=repeats,
            seed=seed,
            operations=listed(operations),
            layouts=listed(layouts),
            dtypes=listed(dtypes),
        )
        _measure(plan, quick=quick, threads=threads, out=out, overwrite=overwrite)


@commands.command()
def training(
    image_size: ImageSize = 224,
    batch: Batch = None,
    models: Annotated[str | None, typer.Option(help="Of torchvision; five of them, on cuda two if left out.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, or bf16 by autocast, the default on cuda.")] = None,
    statistics: Sources = None,
    compiled: Compiled = None,
    repeats: Repeats = 11,
    settle: Annotated[int, typer.Option(help="Untimed steps of a side before each of its samples.")] = 1,
    folded: Annotated[
        bool | None, typer.Option(help="Time + fuse convolution and + tune too; on cuda not if left out.")
    ] = None,
    apart: Annotated[bool | None, typer.Option(help="A process a side, as a training has; on cuda not.")] = None,
    starts: Annotated[int, typer.Option(help="How often these processes are begun anew, with their rounds.")] = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    quick: Quick = False,
    out: Results = None,
    overwrite: Replace = False,
) -> None:
    """Time the whole training step of models, channels_last, converted and fused."""
    with clean_errors():
        from leannorm.bench.plan import TrainingPlan, listed, planned

        plan = planned(
            TrainingPlan,
            device,
            image_size=image_size,
            batch=batch,
            statistics=listed(statistics),
            compiled=compiled,
            repeats=repeats,
            settle=settle,
            seed=seed,
            folded=folded,
            apart=apart,
            starts=starts,
            models=listed(models),
            dtype=dtype,
        )
        _measure(plan, quick=quick, threads=threads, out=out, overwrite=overwrite)


@commands.command()
def launches(
    repeats: Repeats = 11,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Results = None,
    overwrite: Replace = False,
) -> None:
    """Count kernel launches and host microseconds of BN, BN+ReLU and BN+add+ReLU, forward and backward."""
    with clean_errors():
        from leannorm.bench.command import measure_launches
        from leannorm.bench.plan import LayerPlan, planned

        plan = planned(LayerPlan, device, repeats=repeats, seed=seed, compiled=False)
        measured, file = measure_launches(plan, out=out, overwrite=overwrite)
        for case in measured.cases:
            microseconds = 1e6 * sorted(case.seconds)[len(case.seconds) // 2]
            typer.echo(f"{case.operation}, {case.side}: {case.launches} launches, {microseconds:.0f} us of the host")
        typer.echo(f"raw results: {file}")


@commands.command()
def table(
    results: Annotated[Path, typer.Argument(help="A file that `bench layers` or `bench training` wrote.")],
) -> None:
    """Show the table of earlier RESULTS; measures nothing."""
    with clean_errors():
        import rich

        from leannorm.bench.results import read
        from leannorm.bench.table import tables

        rich.print(tables(read(results)))


def _measure(plan: Plan, *, quick: bool, threads: int | None, out: Path | None, overwrite: bool) -> None:
    import rich

    from leannorm.bench.command import measure
    from leannorm.bench.gate import RedGate
    from leannorm.bench.plan import quickly
    from leannorm.bench.table import tables

    try:
        results, file = measure(
            quickly(plan) if quick else plan, threads=threads, out=out, overwrite=overwrite, progress=True
        )
    except RedGate as red:
        typer.echo(str(red), err=True)
        raise typer.Exit(1) from red
    except KeyboardInterrupt as error:
        typer.echo("interrupted: the file holds the cases that were timed, if any was", err=True)
        raise typer.Exit(130) from error
    rich.print(tables(results))
    typer.echo(f"raw results: {file}")
