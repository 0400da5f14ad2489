"""A picture of a comparison: test bits per byte against compute, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k1.figures import check_plot, save, style
from policies.comparison import estimate
from policies.episode import SHARES


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the anytime curves.

    Raises:
        K1Error: if matplotlib is missing, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (policy, row) in enumerate(result["policies"].items()):
        points = [estimate(point) for point in row["curve"]]
        axes.plot(SHARES, [p.value for p in points], style(number), label=policy)
        axes.fill_between(SHARES, [p.low for p in points], [p.high for p in points], alpha=0.15)
    axes.set_xlabel("share of the budget of operations")
    axes.set_ylabel("test bits per byte (interquartile mean, 95 % interval)")
    axes.legend()
    save(figure, path)
