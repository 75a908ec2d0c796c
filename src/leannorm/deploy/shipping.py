"""deploy: from a checkpoint to verified files without normalization, and the report on them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
from torch import Tensor, nn
from torch.export import ExportedProgram

import leannorm
from leannorm import records
from leannorm.conversion.methods import settle
from leannorm.conversion.recalibration import can_recalibrate
from leannorm.deploy.export import add_metadata, export_onnx
from leannorm.deploy.normalization import normalization_nodes
from leannorm.deploy.precision import emulated_types, execute_plan, plan_precision
from leannorm.deploy.precision.spelling import parse_precision
from leannorm.deploy.runtime import Session, latency_ms
from leannorm.deploy.verify import verify
from leannorm.graph import fold
from leannorm.graph.export import export
from leannorm.quantize.static import quantize_int8
from leannorm.records import (
    Deployment,
    PruningReport,
    Recalibration,
    ShippedFile,
    TrainingRun,
    TransformReport,
    Verification,
)
from leannorm.train import checkpoint as checkpoints
from leannorm.train.data import ImageData
from leannorm.train.environment import environment

FP32, INT8, MIXED, REPORT, PAGE = FILES = (
    "model.fp32.onnx",
    "model.int8.onnx",
    "model.mixed.onnx",
    "report.json",
    "report.html",
)

# Eight bits cost a few percent of the outputs' norm in a sound model; more is a sign of a broken calibration.
INT8_MAX_ERROR = 0.1
INT8_ACCURACY_DROP = 0.005
INT8_AGREEMENT = 0.95

RECALIBRATION_BATCHES = 200
CALIBRATION_IMAGES = 1024
PLAN_IMAGES = 256  # held in memory: a plan reads them many times


def deploy(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    out: str | Path,
    overwrite: bool = False,
    prune: bool = False,
    max_error: float = 0.01,
    precision: str = "int8",
    batch_size: int = 64,
    workers: int = 0,
) -> Deployment:
    """Ship a trained model: recalibrate where that helps, fold, export, quantise, verify, and report.

    Running statistics recomputed over augmented training batches replace the trained ones only where validation
    accuracy gets better. The folded model is written as `model.fp32.onnx` and, calibrated on training batches,
    `model.int8.onnx`; both run in onnxruntime over all validation images beside the model that they were made from.
    `report.json` holds the record that is returned, `report.html` shows it. The files appear in ``out`` together,
    after all of them are made.

    The deployment passes if the fp32 file's relative error is at most ``max_error``, and if the INT8 file, which
    rounds by design, loses less than 0.5 points of accuracy, agrees in at least 95% of the arg-maxes and stays within
    a relative error of 10%. By ``precision`` the INT8 file is left out ("fp32"), or `model.mixed.onnx` takes its place
    ("plan"): it has a number format a layer (`leannorm.plan_precision`), and passes by ``max_error`` and the INT8
    file's bounds on accuracy and agreement.

    Args:
        checkpoint: a file that `leannorm train` wrote.
        data: spelling of the data; None means those of the training.
        out: folder of the files, made where it is missing.
        overwrite: replace the deployment that ``out`` holds.
        prune: remove channels that batch normalization makes constant (`leannorm.prune`) before folding; the files are
            compared with the model as it was before.
        max_error: the largest relative error of the fp32 file, and of a mixed one, that passes.
        precision: "fp32", "int8", "plan" for the formats that onnxruntime computes natively here, or those that a plan
            may use, emulated or not, as in "plan:int8,fp16".
        batch_size: images in a batch, for all but the latencies (batch 1).
        workers: processes that decode images.

    Returns:
        The record of it all; ``passed`` is the verdict.

    Raises:
        FileExistsError: if ``out`` holds a deployment and ``overwrite`` is not given.
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if checkpoint or data cannot be read or do not fit, or the model takes one size of batch only.
    """
    from leannorm.report.html import page

    second, types = parse_precision(precision)
    out = Path(out)
    _check_folder(out, overwrite=overwrite)
    trained, training = checkpoints.load(checkpoint)
    settle(trained)
    images = checkpoints.open_data_of(checkpoint, data, batch_size=batch_size, workers=workers)
    model, recalibration = _recalibrated(trained, images)
    example = next(iter(images.val_dataloader()))[0][:1]
    smaller, pruning = _pruned(model, example) if prune else (model, None)
    program, folded = _fold(smaller, example)
    metadata = _metadata(Path(checkpoint), training, images, recalibration)
    with _staged(out) as folder:
        export_onnx(program, folder / FP32, inputs=["images"], outputs=["logits"], metadata=metadata)
        files = [_shipped(folder / FP32, "fp32", model, images, example, max_error)]
        plan = None
        if second == "int8":
            batches = itertools.islice(images.train_dataloader(), -(-CALIBRATION_IMAGES // batch_size))
            quantize_int8(folder / FP32, folder / INT8, batches)
            files.append(_shipped(folder / INT8, "int8", model, images, example, INT8_MAX_ERROR))
        elif second == "plan":
            batches = list(itertools.islice(images.train_dataloader(), -(-PLAN_IMAGES // batch_size)))
            plan = plan_precision(folder / FP32, batches, model=model, types=types, max_error=max_error)
            plan = execute_plan(plan, folder / FP32, folder / MIXED, batches, images.val_dataloader(), reference=model)
            files.append(_shipped(folder / MIXED, "mixed", model, images, example, max_error))
        deployment = Deployment(
            checkpoint=str(checkpoint),
            training=training,
            recalibration=recalibration,
            fold=folded,
            reference_latency_ms=latency_ms(model, (example,)),
            files=tuple(files),
            passed=not any(file.failures for file in files),
            pruning=pruning,
            precision=plan,
        )
        records.write(folder / REPORT, deployment)
        records.write_text(folder / PAGE, page([deployment]))
    return deployment


def _check_folder(out: Path, *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, expected a folder: choose another name")
    held = [name for name in FILES if (out / name).exists()]
    if held and not overwrite:
        raise FileExistsError(f"{out} already holds a deployment ({', '.join(held)}): --overwrite replaces it")


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A hidden folder inside ``out`` whose files move to ``out`` at the end, or vanish with what was made for them.

    What an exception leaves is all of it or nothing; where it is all, the exception has a note.
    """
    made, moved = not out.exists(), False
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".deploy.") as name:
            yield Path(name)
            _move(Path(name), out)
            moved = True
    except BaseException as error:
        if moved:
            error.add_note(f"all files are in {out}")
        elif made:
            with contextlib.suppress(OSError):  # somebody else put something there
                out.rmdir()
        raise


def _move(folder: Path, out: Path) -> None:
    """Put a deployment in the place of another; an exception in between puts that one back."""
    replaced = folder / "replaced"
    replaced.mkdir()
    held = [file for file in FILES if (out / file).exists()]
    try:
        for file in held:
            (out / file).replace(replaced / file)
        for file in FILES:
            if (folder / file).exists():
                (folder / file).replace(out / file)
    except BaseException:
        for file in FILES:
            if (replaced / file).exists():
                (replaced / file).replace(out / file)
            elif file not in held:
                (out / file).unlink(missing_ok=True)
        raise


def _recalibrated(trained: nn.Module, images: ImageData) -> tuple[nn.Module, Recalibration]:
    """The model with the better statistics by validation accuracy; the trained ones where both are as good."""
    candidate = copy.deepcopy(trained)
    batches = 0
    if can_recalibrate(candidate):
        batches = min(len(images.train_dataloader()), RECALIBRATION_BATCHES)
        leannorm.recalibrate(candidate, images.train_dataloader(), limit=batches)
    compared = verify(trained, candidate, images.val_dataloader())
    before, after = compared.reference_accuracy, compared.candidate_accuracy
    assert before is not None
    assert after is not None
    kept = "recalibrated" if after > before else "trained"
    return candidate if after > before else trained, Recalibration(kept, before, after, batches)


def _pruned(model: nn.Module, example: Tensor) -> tuple[nn.Module, PruningReport]:
    try:
        return leannorm.prune(model, example)
    except RuntimeError as error:
        raise ValueError(f"the model cannot be pruned, ship it without: {error}") from error


def _fold(model: nn.Module, example: Tensor) -> tuple[ExportedProgram, TransformReport]:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"the checkpoint holds NaN or infinity in {name}: ship one from before training diverged")
    program, fixed = export(model, (example,))
    if fixed:
        raise ValueError(f"the model cannot be shipped for any batch: {fixed[0].reason}")
    return fold(program, (example,))


def _shipped(
    path: Path, precision: str, model: nn.Module, images: ImageData, example: Tensor, max_error: float
) -> ShippedFile:
    session = Session(path)
    verification = verify(model, session, images.val_dataloader(), max_error=max_error)
    latency = latency_ms(session, (example,))
    # A summary: the layers are in the report.
    summary = {name: value for name, value in dataclasses.asdict(verification).items() if name != "layers"}
    add_metadata(path, {"verification": json.dumps(summary)})
    file = onnx.load(path)
    return ShippedFile(
        file=path.name,
        precision=precision,
        bytes=path.stat().st_size,
        latency_ms=latency,
        normalization_nodes=normalization_nodes(file),
        verification=verification,
        failures=_failures(precision, verification),
        emulated=emulated_types(file),
    )


def _failures(precision: str, verification: Verification) -> tuple[str, ...]:
    """Why a file does not pass; see `deploy`."""
    failures = []
    if not verification.passed:
        layer = verification.first_wrong_layer
        where = "" if layer is None else f"; it goes wrong at {layer} first"
        failures.append(
            f"its relative error is {verification.relative_error:.2g}, {verification.max_error:g} is allowed{where}"
        )
    if precision != "fp32":
        agreement, reference = verification.argmax_agreement, verification.reference_accuracy
        candidate = verification.candidate_accuracy
        assert agreement is not None
        assert reference is not None
        assert candidate is not None
        if agreement < INT8_AGREEMENT:
            failures.append(f"it agrees in {agreement:.1%} of the arg-maxes, {INT8_AGREEMENT:.0%} is asked for")
        if reference - candidate >= INT8_ACCURACY_DROP:
            failures.append(
                f"it loses {100 * (reference - candidate):.2f} points of accuracy, "
                f"less than {100 * INT8_ACCURACY_DROP:.2f} is allowed"
            )
    return tuple(failures)


def _metadata(
    checkpoint: Path, training: TrainingRun, images: ImageData, recalibration: Recalibration
) -> dict[str, str]:
    """What the file says of itself; lists are JSON."""
    preprocessing = images.preprocessing
    return {
        "leannorm_version": leannorm.__version__,
        "model": training.model,
        "statistics": training.statistics,
        "running_statistics": recalibration.kept,
        "checkpoint": checkpoint.name,
        "data": training.data,
        "training_commit": training.environment.commit,
        "deployment_commit": environment().commit,
        "classes": json.dumps(images.classes),
        "input_mean": json.dumps(preprocessing.mean),
        "input_std": json.dumps(preprocessing.std),
    }
