"""Records to one self-contained HTML page: no script, no external resource, every name escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leannorm.report import wording
from leannorm.report.charts import Bar, Chart, Series, bars, legend, lines
from leannorm.report.layers import layer_charts
from leannorm.report.precision import formats, tables
from leannorm.report.rows import COLUMNS, details, names, rows, verdict

try:
    import jinja2
    from markupsafe import Markup
except ImportError as missing:
    raise ImportError(f"The page needs jinja2: pip install 'leannorm[report]' (got: {missing})") from missing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from leannorm.records import Deployment, TrainingTrace


def page(
    deployments: Sequence[Deployment],
    *,
    title: str = "leannorm: trained and shipped",
    traces: Sequence[TrainingTrace | None] = (),
) -> str:
    """Return one HTML page that shows all deployments: verdict, summary, charts, then a section each.

    The page opens offline, follows the reader's light or dark setting and prints. Same records, same page.

    Args:
        deployments: at least one, shown in this order.
        title: heading of the page.
        traces: of the deployments' trainings, in their order; None where the layers were not recorded.

    Raises:
        ValueError: if there is no deployment.
    """
    if not deployments:
        raise ValueError("A report needs at least one deployment, got none.")
    labels = names(deployments)
    template = _environment().get_template("page.html")
    return template.render(
        title=title,
        verdict=verdict(deployments),
        columns=COLUMNS,
        legend=[(label, *legend(place)) for place, label in enumerate(labels)],
        charts=[(chart, Markup(chart.svg or "")) for chart in _charts(deployments, labels)],
        layer_charts=[(chart, Markup(chart.svg or "")) for chart in layer_charts(traces)],
        sections=[(label, d, rows(d), details(d)) for label, d in zip(labels, deployments, strict=True)],
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("leannorm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "share": wording.share,
        "points": wording.points,
        "number": wording.number,
        "significant": wording.significant,
        "error": wording.error,
        "formats": formats,
    }
    environment.globals["counted"] = wording.counted
    environment.globals["precision_tables"] = tables
    return environment


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else wording.visible(str(value))


def _charts(deployments: Sequence[Deployment], labels: Sequence[str]) -> tuple[Chart, ...]:
    runs = list(enumerate(zip(labels, deployments, strict=True)))

    def by_epoch(metric: str) -> list[Series]:
        return [
            Series(label, i, tuple((epoch.epoch, getattr(epoch, metric)) for epoch in d.training.history))
            for i, (label, d) in runs
        ]

    def by_file(metric: str) -> list[Bar]:
        emulated = " (emulated)" if metric == "latency_ms" else ""
        return [
            Bar(file.precision + (emulated if file.emulated else ""), label, i, getattr(file, metric))
            for i, (label, d) in runs
            for file in d.files
        ]

    trained = [Bar("trained, in PyTorch", label, i, d.reference_latency_ms) for i, (label, d) in runs]
    latencies = trained + by_file("latency_ms")
    return (
        lines("chart-accuracy", "Validation accuracy", by_epoch("validation_accuracy"), wording.tick_share),
        lines("chart-loss", "Training loss", by_epoch("training_loss"), wording.significant),
        bars("chart-latency", "Latency at batch 1", latencies, wording.milliseconds),
        bars("chart-size", "File size", by_file("bytes"), lambda count: wording.size(int(count))),
    )
