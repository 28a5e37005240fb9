"""The plot of an automatic warm-up: what selection/warmup.py watched, and when it decided."""

from collections.abc import Sequence

from pipeline.record import plots
from pipeline.record.plots import Plot, Series, finite
from pipeline.record.runs import Run, dig


def warmup_plot(runs: Sequence[Run]) -> Plot | None:
    """The spread by visit of the runs whose warm-up it ended; None where none did."""
    auto = [run for run in runs if dig(run.config, "selector.warmup_visits") == "auto"]
    watched = [run for run in auto if isinstance(run.watched.get("spread"), list) and run.watched["spread"]]
    series = [
        Series(
            run.label, list(range(len(run.watched["spread"]))), finite(run.watched["spread"]), run.number, len(run.watched["spread"]) - 0.5
        )
        for run in watched
    ]
    if not series:
        return None
    ends = ", ".join(f"{run.label} after {run.warmup_visits} visits" for run in watched)
    caption = f"Standard deviation of the scores at each visit. Warm-up ends when it is past its peak, where clean and noisy pairs are furthest apart: {ends}."
    svg = plots.lines("warmup", series, xlabel="visit", ylabel="spread of the scores", floor=0)
    return Plot("Automatic warm-up", svg, caption, f"Line chart of the spread of the scores per visit of warm-up, which ended: {ends}.")
