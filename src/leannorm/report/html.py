"""Records to one self-contained HTML page: no script, no external resource, every name escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leannorm.report import charts, format
from leannorm.report.rows import COLUMNS, details, names, rows, verdict

try:
    import jinja2
    from markupsafe import Markup
except ImportError as missing:
    raise ImportError(f"The page needs jinja2: pip install 'leannorm[report]' (got: {missing})") from missing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from leannorm.records import Deployment
    from leannorm.report.charts import Bar, Chart, Series


def page(deployments: Sequence[Deployment], *, title: str = "leannorm: trained and shipped") -> str:
    """Return one HTML page that shows all deployments: verdict, summary, charts, then a section each.

    The page opens offline, follows the reader's light or dark setting and prints. The same records give the same bytes.

    Args:
        deployments: at least one, shown in this order.
        title: heading of the page.

    Raises:
        ValueError: if there is no deployment.
    """
    if not deployments:
        raise ValueError("A report needs at least one deployment, got none.")
    labels = names(deployments)
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            verdict=verdict(deployments),
            columns=COLUMNS,
            legend=[(label, *charts.legend(place)) for place, label in enumerate(labels)],
            charts=[
                (chart, Markup(chart.svg or ""), charts.note(chart)) for chart in _charts(deployments, labels)
            ],
            sections=[(label, d, rows(d), details(d)) for label, d in zip(labels, deployments, strict=True)],
        )
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
    for function in (
        format.number,
        format.share,
        format.points,
        format.error,
        format.size,
        format.milliseconds,
    ):
        environment.filters[function.__name__] = function
    environment.globals["counted"] = format.counted
    return environment


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else format.visible(str(value))


def _charts(deployments: Sequence[Deployment], labels: Sequence[str]) -> tuple[Chart, ...]:
    runs = list(enumerate(zip(labels, deployments, strict=True)))

    def history(metric: str) -> list[Series]:
        return [
            charts.Series(label, i, tuple((e.epoch, getattr(e, metric)) for e in d.training.history))
            for i, (label, d) in runs
        ]

    def files(metric: str) -> list[Bar]:
        return [
            charts.Bar(f.precision, label, i, getattr(f, metric)) for i, (label, d) in runs for f in d.files
        ]

    reference = [
        charts.Bar("PyTorch, as trained", label, i, d.reference_latency_ms) for i, (label, d) in runs
    ]
    return (
        charts.lines("chart-accuracy", "Validation accuracy", history("validation_accuracy"), _axis_share),
        charts.lines("chart-loss", "Training loss", history("training_loss"), lambda loss: f"{loss:.4g}"),
        charts.bars(
            "chart-latency", "Latency at batch 1", reference + files("latency_ms"), format.milliseconds
        ),
        charts.bars("chart-size", "File size", files("bytes"), lambda count: format.size(int(count))),
    )


def _axis_share(value: float) -> str:
    return f"{100 * value:.4g}%"
