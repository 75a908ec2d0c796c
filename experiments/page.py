"""The page of an experiment: a table with the paper's numbers beside ours, the curves, and what they were made with."""

import io
import re
import statistics
import warnings
from pathlib import Path

import claims
from claims import Claim
from comparison import CONFIDENCE, paired_over_seeds
from matplotlib.figure import Figure
from trials import Arm, Scale, Trial, accuracies

from leannorm import records
from leannorm.records import Environment

FIXED = 0.9  # of the first arm's accuracy: what "epochs to" counts to


def table(arms: tuple[Arm, ...], found: list[Trial]) -> str:
    """Give the table in Markdown."""
    goal = FIXED * _mean([each for each in found if each.arm == arms[0].name])
    lines = [
        f"| configuration | `--statistics` | accuracy | epochs to {100 * goal:.0f}% | seeds | difference, 95% interval "
        "| against | | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        group = [each for each in found if each.arm == arm.name]
        if not group:
            lines.append(f"| {arm.name} | `{arm.statistics}` | not run | | 0 | | {arm.against or ''} | | {arm.paper} |")
            continue
        accuracy = f"{100 * _mean(group):.2f}%"
        diverged = sum(each.run is None for each in group)
        if diverged:
            accuracy += f" ({diverged} diverged)"
        against = {} if arm.against is None else accuracies(arm.against, found)
        difference = paired_over_seeds(accuracies(arm.name, found), against)
        cells = ["", "", ""]
        if difference is not None:
            half = f" ± {100 * difference.half_width:.2f}" if difference.seeds > 1 else ", one seed"
            cells = [f"{100 * difference.mean:+.2f}{half}", str(arm.against), difference.verdict]
        row = (arm.name, f"`{arm.statistics}`", accuracy, _epochs_to(goal, group), str(len(group)), *cells, arm.paper)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _mean(group: list[Trial]) -> float:
    return statistics.fmean(each.accuracy for each in group) if group else 0.0


def _epochs_to(goal: float, group: list[Trial]) -> str:
    """Give the mean over seeds of the first epoch that has come to an accuracy; "" where one never did."""
    epochs = [
        next((n for n, epoch in enumerate(each.run.history, 1) if epoch.validation_accuracy >= goal), None)
        for each in group
        if each.run is not None
    ]
    reached = [epoch for epoch in epochs if epoch is not None]
    return f"{statistics.fmean(reached):.1f}" if len(reached) == len(group) else ""


def plot(title: str, arms: tuple[Arm, ...], found: list[Trial]) -> str:
    """Draw validation accuracy over epochs, the mean over seeds, as SVG text that is the same for the same trials."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, arm in enumerate(arms):
        runs = [each.run.history for each in found if each.arm == arm.name and each.run is not None]
        if runs:
            curve = [
                100 * statistics.fmean(e.validation_accuracy for e in epochs) for epochs in zip(*runs, strict=True)
            ]
            style = ("-", "--", ":", "-.")[i // 10 % 4]
            axes.plot(range(1, len(curve) + 1), curve, style, color=f"C{i % 10}", linewidth=1.2, label=arm.name)
            if re.fullmatch(r"0\.\d+", arm.paper):
                axes.plot(len(curve), 100 * float(arm.paper), "*", color=f"C{i % 10}", markersize=9)
    axes.set(title=title, xlabel="epoch", ylabel="validation accuracy, %; stars: the paper's, at the end")
    axes.grid(alpha=0.3)
    if axes.has_data():
        figure.legend(loc="outside right upper", fontsize="x-small")
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}), warnings.catch_warnings(action="ignore"):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def made_with(environments: set[Environment]) -> str:
    """Name machines, versions and commits in one line."""
    made = (
        f"{e.machine}, {e.cores} cores, Python {e.python}, torch {dict(e.versions).get('torch')}, "
        f"leannorm at {e.commit[:12]}"
        for e in environments
    )
    return "; ".join(sorted(made)) or "nothing was run"


def _findings(claimed: tuple[Claim, ...], found: list[Trial]) -> str:
    if not claimed:
        return ""
    return f"""## What others have found

A claim agrees or disagrees where the whole interval of the difference does.

{claims.table(claimed, found)}

"""


def write_page(
    folder: Path,
    name: str,
    title: str,
    intro: str,
    scale: Scale,
    arms: tuple[Arm, ...],
    found: list[Trial],
    claimed: tuple[Claim, ...] = (),
) -> Path:
    """Write ``folder``/NAME-SCALE.md and .svg; give the page."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{scale.name}"
    records.write_text(folder / f"{stem}.svg", plot(title, arms, found))
    made = made_with({each.run.environment for each in found if each.run is not None})
    text = f"""# {title}

{intro}

`make reproduce EXPERIMENT={name} SCALE={scale.name}`: {scale.model}, {scale.images:,} training images of
`{scale.data}`, {scale.epochs} epochs, batch {scale.batch_size} where nothing else is said, schedule {scale.schedule}
from {scale.learning_rate:g}. Accuracy: mean over seeds of the last tenth of the epochs, on all validation images.
Difference: paired over the seeds that both have, in points, with its {CONFIDENCE:.0%} interval (Student's t); where the
interval holds 0 the seeds do not resolve a difference, which is not to say that there is none. The paper's numbers are
of other images and networks: compare the order, not the values. Raw results: `benchmarks/results/{stem}.json`.

{table(arms, found)}

![validation accuracy over epochs]({stem}.svg)

{_findings(claimed, found)}Made with: {made}.
"""
    records.write_text(folder / f"{stem}.md", text)
    return folder / f"{stem}.md"
