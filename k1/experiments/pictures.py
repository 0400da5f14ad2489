"""A picture of an experiment: what learning costs in forgetting, and how a stream goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from k1.experiments.metrics import Matrix, frontier
from k1.experiments.report import best_rows, by_setting, curve_of, sweep
from k1.figures import check_plot, save, style
from k1.row_file import Row

VIEW = "windows"


def anytime(rows: Sequence[Row]) -> Matrix:
    """Mean over runs, at each evaluation, of the mean bits of the domains met so far: [points]."""
    curves = [[np.mean(bits[: phase + 1]) for phase, bits in curve_of(row)] for row in rows]
    return np.asarray(np.mean(curves, axis=0))


def moments(row: Row, checks: Sequence[float]) -> list[float]:
    """When the evaluations of a run were, in phases since its beginning.

    Args:
        row: the run.
        checks: shares of a phase at which evaluations within it were due, besides its end.
    """
    found = []
    for phase in dict.fromkeys(phase for phase, _ in row["curve"]):
        count = sum(p == phase for p, _ in row["curve"])
        # Where steps are few, the last of what was due is left out.
        found += [phase + share for share in (*checks[: count - 1], 1.0)]
    return found


def plot(rows: Sequence[Row], checks: Sequence[float], path: Path) -> None:
    """Draw each method's frontier, and its anytime curve at its best setting.

    Args:
        rows: the runs.
        checks: as for `moments`.
        path: the file.

    Raises:
        K1Error: if matplotlib is missing, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = best_rows(rows)
    for number, (method, settings) in enumerate(by_setting(rows).items()):
        points = [p for p in sweep(settings, VIEW) if all(map(math.isfinite, p))]
        colour = f"C{number}"
        left.plot([x for x, _ in points], [y for _, y in points], ".", color=colour, alpha=0.4)
        line, fewest = frontier(points), min(map(len, settings.values()))
        left.plot(
            [x for x, _ in line], [y for _, y in line], style(number) + "o", color=colour,
            markersize=4, label=f"{method} ({fewest})",
        )  # fmt: skip
        runs = best[method]
        right.plot(moments(runs[0], checks), anytime(runs), style(number), color=colour)
    left.set_xlabel("bits per byte of new domains after their phase")
    left.set_yscale("symlog", linthresh=1.0)
    left.set_ylabel("forgetting of earlier ones, in % of bits (linear to 1 %)")
    left.set_title("each setting, and those that no other of the method beats in both")
    right.set_xlabel("phases of the stream")
    right.set_ylabel("mean bits per byte of the domains met so far")
    right.set_title("at the setting that ends best")
    if rows:
        title = "method (runs a setting, at least)"
        figure.legend(loc="outside right upper", fontsize="small", title=title)
    save(figure, path)
