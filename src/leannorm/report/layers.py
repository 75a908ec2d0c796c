"""Charts of what the layers and the loss did while training, from `TrainingTrace` records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leannorm.report.charts import Chart, Series, lines
from leannorm.report.wording import significant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leannorm.records import TrainingTrace

QUANTITIES = {
    "mean": "Mean of the output, |mean| over channels",
    "variance": "Variance of the output",
    "shift": "Shift of the mean since the step before, in standard deviations",
    "gradient_norm": "Norm of the gradient at the output",
}
_RANGE = {"lowest": "Lowest loss along the gradient", "highest": "Highest loss along the gradient"}


def layer_charts(traces: Sequence[TrainingTrace | None]) -> tuple[Chart, ...]:
    """Draw each quantity over the steps for the first, middle and last layer, then the loss along its gradient.

    Args:
        traces: one for each run of the page, in its order; None where a run was not recorded.
    """
    if not any(traces):
        return ()
    charts = []
    for field, title in QUANTITIES.items():
        for where, place in (("first", 0.0), ("middle", 0.5), ("last", 1.0)):
            series = []
            for i, trace in enumerate(traces):
                if trace is not None and trace.layers:
                    layer = trace.layers[round(place * (len(trace.layers) - 1))]
                    values = [(point.step, getattr(point, field)) for point in layer.points]
                    points = tuple((step, value) for step, value in values if value is not None)
                    series.append(Series(f"{trace.statistics}, {layer.layer}", i, points))
            charts.append(_chart(f"{title}, {where} layer", series))
    for field, title in {**_RANGE, "gradient_change": "Change of the gradient along itself, relative"}.items():
        charts.append(
            _chart(
                title,
                [
                    Series(trace.statistics, i, tuple((p.step, getattr(p, field)) for p in trace.smoothness))
                    for i, trace in enumerate(traces)
                    if trace is not None
                ],
            )
        )
    return tuple(charts)


def _chart(title: str, series: list[Series]) -> Chart:
    identity = "layers-" + "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    return lines(identity, title, series, significant, over="step")
