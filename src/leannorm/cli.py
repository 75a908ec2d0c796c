"""The `leannorm` command: parse, call, exit code."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leannorm.termination import left, unwound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leannorm.bench.plan import Plan

# Everything else is imported by the command that needs it, so that `leannorm --help` answers at once.

main = typer.Typer(
    help="Batch normalization that costs next to nothing while training, and none when shipped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEFAULT_STATISTICS = "grid:1/8"  # what `leannorm.convert` takes
Data = Annotated[str, typer.Argument(help="`digits`, or a folder of class folders (or of train/ and val/ with these).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove what the folder holds from an earlier run first.")]


@main.callback()
def _group() -> None:
    """Keep `train`, `deploy` and `report` as commands, however many there are."""


@main.command()
def train(
    model: Annotated[
        str,
        typer.Argument(
            help="resnet8, resnet20, torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory."
        ),
    ],
    data: Data,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints, metrics and logs; runs/MODEL-DATA-STATISTICS if left out."),
    ] = None,
    statistics: Annotated[
        str,
        typer.Option(
            help="Source of statistics or method: full, grid:1/32, fs:1/32+vdn:1, gn:32, renorm:3, ghost:32, ..."
        ),
    ] = DEFAULT_STATISTICS,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 30,
    seed: Annotated[int, typer.Option(help="Same seed: same weights, same data.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Highest rate of the schedule.")] = 0.1,
    schedule: Annotated[
        str, typer.Option(help="one-cycle, or drops:50,80 (a tenth from these epochs on).")
    ] = "one-cycle",
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients make one step.")] = 1,
    weight_decay: Annotated[float, typer.Option(help="Of all but biases and normalization.")] = 5e-4,
    gamma_l1: Annotated[float, typer.Option(help="L1 penalty on gamma, for channels to be pruned by: 1e-4.")] = 0.0,
    image_size: Annotated[int | None, typer.Option(help="Resize images to this many pixels.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
    accelerator: Annotated[str, typer.Option(help="cpu, gpu, auto, ...")] = "auto",
    channels_last: Annotated[bool, typer.Option(help="Keep weights and activations channels last.")] = True,
    fuse: Annotated[bool, typer.Option(help="Compute BN, addition and activation in one operator.")] = True,
    record_layers: Annotated[
        int | None, typer.Option(help="Record layers and loss every so many steps, for the report's plots.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last finished epoch in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train MODEL on DATA with any source of batch statistics."""
    with _clean_errors("interrupted: what was done is kept; the same command with --resume goes on"):
        from leannorm.train import run

        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        out = out or run.default_folder(model, data, statistics)
        trained = run.train(
            model,
            data,
            statistics=statistics,
            epochs=epochs,
            seed=seed,
            out=out,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            accumulate=accumulate,
            gamma_l1=gamma_l1,
            image_size=image_size,
            workers=workers,
            accelerator=accelerator,
            channels_last=channels_last,
            fuse=fuse,
            record_layers=record_layers,
            resume=resume,
            overwrite=overwrite,
            progress=True,
        )
        best = max(trained.history, key=lambda epoch: epoch.validation_accuracy)
        typer.echo(f"validation accuracy {best.validation_accuracy:.2%} after epoch {best.epoch}: {out / 'best.ckpt'}")


@main.command()
def deploy(
    checkpoint: Annotated[Path, typer.Argument(help="best.ckpt or last.ckpt of `leannorm train`.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the ONNX files and the report; `deployed` beside CHECKPOINT if left out."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images to recalibrate and verify on; those of the training if left out.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove channels that batch normalization makes constant; exact.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="Beside the fp32 file: int8; plan (a format a layer, of the native ones); plan:int8,fp16 (of these, "
            "emulated or not); fp32 for none."
        ),
    ] = "int8",
    overwrite: Overwrite = False,
) -> None:
    """Fold CHECKPOINT's normalization away, export it to ONNX, verify the files and report."""
    with _clean_errors(), unwound():
        import rich

        from leannorm.deploy import deploy as ship
        from leannorm.report import text

        out = out or checkpoint.parent / "deployed"
        deployment = ship(checkpoint, data=data, out=out, precision=precision, overwrite=overwrite, prune=prune)
    rich.print(text.summary([deployment]))
    typer.echo(f"files and report: {out}")
    raise typer.Exit(0 if deployment.passed else 1)


@main.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `leannorm deploy` wrote.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it is there.")] = False,
) -> None:
    """Compare deployed RUNS on one page."""
    with _clean_errors():
        import rich

        from leannorm import records
        from leannorm.report import html, text

        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists: --overwrite replaces it")
        deployments = [records.read(records.Deployment, run / "report.json") for run in runs]
        out.parent.mkdir(parents=True, exist_ok=True)
        recorded = [Path(deployment.checkpoint).parent / "layers.json" for deployment in deployments]
        traces = [records.read(records.TrainingTrace, path) if path.exists() else None for path in recorded]
        records.write_text(out, html.page(deployments, traces=traces))
        rich.print(text.summary(deployments))
        typer.echo(f"page: {out}")


@main.command()
def explain(
    model: Annotated[str, typer.Argument(help="As of `leannorm train`.")],
    statistics: Annotated[str, typer.Option(help="Source or method, as of `leannorm train`.")] = DEFAULT_STATISTICS,
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fuse batch norm, addition and activation.")] = True,
    convolution: Annotated[bool, typer.Option("--convolution", help="Fuse the convolutions too.")] = False,
    image_size: Annotated[int, typer.Option(help="Pixels of a side of the images.")] = 224,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    channels: Annotated[int, typer.Option(help="Of the images.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
) -> None:
    """Say which code computes each normalization layer of MODEL in training, and why no faster one."""
    with _clean_errors():
        from leannorm.train.explained import explain_spelled

        typer.echo(
            explain_spelled(
                model,
                statistics=statistics,
                fuse=fuse,
                convolution=convolution,
                image_size=image_size,
                batch_size=batch_size,
                channels=channels,
                device=device,
            )
        )


bench = typer.Typer(help="Measure speed against torch, behind a correctness gate.", no_args_is_help=True)
main.add_typer(bench, name="bench")

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


@bench.command()
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
    repeats: Repeats = 11,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    quick: Quick = False,
    out: Results = None,
    overwrite: Replace = False,
) -> None:
    """Time BN, BN+ReLU and BN+add+ReLU, forward and backward, on ResNet-50's shapes."""
    with _clean_errors():
        from leannorm.bench.plan import LayerPlan, listed, planned

        plan = planned(
            LayerPlan,
            device,
            image_size=image_size,
            batch=batch,
            statistics=listed(statistics),
            compiled=compiled,
            repeats=repeats,
            seed=seed,
            operations=listed(operations),
            layouts=listed(layouts),
            dtypes=listed(dtypes),
        )
        _measure(plan, quick=quick, threads=threads, out=out, overwrite=overwrite)


@bench.command()
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
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
    quick: Quick = False,
    out: Results = None,
    overwrite: Replace = False,
) -> None:
    """Time the whole training step of models, channels_last, converted and fused."""
    with _clean_errors():
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
            models=listed(models),
            dtype=dtype,
        )
        _measure(plan, quick=quick, threads=threads, out=out, overwrite=overwrite)


@bench.command()
def launches(
    repeats: Repeats = 11,
    seed: Seed = 0,
    device: Device = "cuda",
    out: Results = None,
    overwrite: Replace = False,
) -> None:
    """Count kernel launches and host microseconds of BN, BN+ReLU and BN+add+ReLU, forward and backward."""
    with _clean_errors():
        from leannorm.bench.command import measure_launches
        from leannorm.bench.plan import LayerPlan, planned

        plan = planned(LayerPlan, device, repeats=repeats, seed=seed, compiled=False)
        measured, file = measure_launches(plan, out=out, overwrite=overwrite)
        for case in measured.cases:
            microseconds = 1e6 * sorted(case.seconds)[len(case.seconds) // 2]
            typer.echo(f"{case.operation}, {case.side}: {case.launches} launches, {microseconds:.0f} us of the host")
        typer.echo(f"raw results: {file}")


@bench.command()
def table(
    results: Annotated[Path, typer.Argument(help="A file that `bench layers` or `bench training` wrote.")],
) -> None:
    """Show the table of earlier RESULTS; measures nothing."""
    with _clean_errors():
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


@contextmanager
def _clean_errors(interrupted: str | None = None) -> Iterator[None]:
    """Show what the user can mend as one message, and an interruption as what it means."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo(interrupted or f"interrupted: {left(error)}", err=True)
        raise typer.Exit(130) from error


if __name__ == "__main__":
    main()
