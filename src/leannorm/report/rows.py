"""The summary that the page and the terminal share, so that the two cannot disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leannorm.report.precision import emulation, formats
from leannorm.report.wording import NOT_MEASURED, counted, error, milliseconds, points, share, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leannorm.records import Deployment, ShippedFile

COLUMNS = {
    "form": "Model",
    "accuracy": "Accuracy",
    "relative_error": "Relative error",
    "normalization": "Norms left",
    "size": "Size",
    "latency": "Latency",
    "check": "Check",
}


@dataclass(frozen=True)
class Row:
    """A model as trained or as shipped, in the words of the summary; `COLUMNS` holds the headings."""

    form: str
    accuracy: str
    relative_error: str
    normalization: str
    size: str
    latency: str
    check: str


@dataclass(frozen=True)
class Verdict:
    """The whole story in a few sentences, and what failed."""

    headline: str
    sentences: tuple[str, ...]
    failures: tuple[str, ...]


def names(deployments: Sequence[Deployment]) -> tuple[str, ...]:
    """Return the shortest names that tell the deployments apart, the statistics source first of all."""
    runs = [deployment.training for deployment in deployments]
    for candidates in (
        tuple(run.statistics for run in runs),
        tuple(f"{run.model}, {run.statistics}" for run in runs),
        tuple(f"{run.model}, {run.statistics}, seed {run.seed}" for run in runs),
    ):
        if len(set(candidates)) == len(candidates):
            return candidates
    return tuple(f"{i}: {deployment.checkpoint}" for i, deployment in enumerate(deployments, 1))


def rows(deployment: Deployment) -> tuple[Row, ...]:
    """Return the summary of one deployment: the model as trained, then each file."""
    trained = Row(
        form="trained",
        accuracy=share(deployment.recalibration.trained_accuracy),
        relative_error=NOT_MEASURED,
        normalization=NOT_MEASURED,
        size=NOT_MEASURED,
        latency=milliseconds(deployment.reference_latency_ms),
        check=NOT_MEASURED,
    )
    return (trained, *(_shipped(file) for file in deployment.files))


def details(deployment: Deployment) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return all that is known of the files: what is stated, then the statement about each file."""
    facts = [_facts(file, deployment) for file in deployment.files]
    return tuple((head, tuple(fact[head] for fact in facts)) for head in (facts[0] if facts else ()))


def verdict(deployments: Sequence[Deployment]) -> Verdict:
    """Judge all deployments together."""
    failed = sum(not deployment.passed for deployment in deployments)
    total = counted(len(deployments), "deployment", "deployments")
    named = list(zip(names(deployments), deployments, strict=True))
    return Verdict(
        headline=f"{failed} of {total} failed" if failed else f"{total} passed",
        sentences=(
            *_sentences([file for deployment in deployments for file in deployment.files]),
            *(f"Pruning of {name} removed {_removed(d)}." for name, d in named if d.pruning is not None),
            *(f"{name}: {formats(d.precision)}." for name, d in named if d.precision is not None),
        ),
        failures=tuple(f"{name}: {reason}" for name, d in named for reason in _reasons(d)),
    )


def _shipped(file: ShippedFile) -> Row:
    left = len(file.normalization_nodes)
    return Row(
        form=file.precision,
        accuracy=share(file.verification.candidate_accuracy),
        relative_error=error(file.verification.relative_error),
        normalization=f"{left:,}" if left else "none",
        size=size(file.bytes),
        latency=milliseconds(file.latency_ms) + ("\nemulated" if file.emulated else ""),
        check="failed" if file.failures else "passed",
    )


def _facts(file: ShippedFile, deployment: Deployment) -> dict[str, str]:
    check = file.verification
    return {
        "Check": "failed" if file.failures else "passed",
        "Precision": file.precision,
        "Size": f"{size(file.bytes)}, {counted(file.bytes, 'byte', 'bytes')}",
        "Latency at batch 1": "; ".join((milliseconds(file.latency_ms), *map(emulation, file.emulated))),
        "PyTorch latency at batch 1": milliseconds(deployment.reference_latency_ms),
        "Normalization left": "\n".join(file.normalization_nodes) or "none",
        "Relative error": error(check.relative_error),
        "Relative error allowed": error(check.max_error),
        "Largest absolute error": error(check.maximum_error),
        "Same arg-max": share(check.argmax_agreement),
        "Accuracy of the PyTorch model": share(check.reference_accuracy),
        "Accuracy of the file": share(check.candidate_accuracy),
        "Images compared": f"{check.samples:,}",
    }


def _removed(deployment: Deployment) -> str:
    pruning = deployment.pruning
    assert pruning is not None
    removed = counted(pruning.channels_before - pruning.channels_after, "channel", "channels")
    return f"{removed} of {pruning.channels_before:,}"


def _sentences(files: Sequence[ShippedFile]) -> tuple[str, ...]:
    if not files:
        return ("No file was shipped.",)
    shipped = counted(len(files), "shipped file", "shipped files")
    left = sum(bool(file.normalization_nodes) for file in files)
    remains = f"Normalization is left in {left}" if left else "No normalization is left in any"
    sentences = [
        f"{remains} of the {shipped}.",
        f"The largest relative error is {error(_worst(file.verification.relative_error for file in files))}.",
    ]
    checks = [file.verification for file in files]
    changes = [
        check.candidate_accuracy - check.reference_accuracy
        for check in checks
        if check.candidate_accuracy is not None and check.reference_accuracy is not None
    ]
    if changes:
        sentences.append(f"Shipping changed the accuracy by {points(min(changes, key=_nan_first))} at worst.")
    return tuple(sentences)


def _reasons(deployment: Deployment) -> tuple[str, ...]:
    reasons = [f"{file.file}: {failure}" for file in deployment.files for failure in file.failures]
    if not (reasons or deployment.passed):
        reasons.append("recorded as failed, though each file's check passed")
    return tuple(reasons)


def _worst(errors: Iterable[float]) -> float:
    return max(errors, key=lambda value: math.inf if math.isnan(value) else value)


def _nan_first(value: float) -> float:
    return -math.inf if math.isnan(value) else value
