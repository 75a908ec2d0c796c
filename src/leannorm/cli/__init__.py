"""The `leannorm` command: parse, call, exit code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from leannorm.cli import bench
from leannorm.cli.errors import clean_errors
from leannorm.termination import unwound

# Everything else is imported by the command that needs it, so that `leannorm --help` answers at once.

main = typer.Typer(
    help="Batch normalization that costs next to nothing while training, and none when shipped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

main.add_typer(bench.commands, name="bench")

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
    with clean_errors("interrupted: what was done is kept; the same command with --resume goes on"):
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
    with clean_errors(), unwound():
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
    with clean_errors():
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
    with clean_errors():
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
