"""A picture of a comparison: test bits per byte against compute, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from k1.errors import K1Error
from policies.comparison import estimate
from policies.episode import SHARES

_COLOURS = 10
"""Colours before matplotlib begins anew."""
_STYLES = ("-", "--", ":")


def check_plot(path: Path) -> None:
    """See that a picture can be drawn into a file, before anything takes time.

    Raises:
        K1Error: if matplotlib is missing, or the file's ending says no format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise K1Error('--plot needs matplotlib: pip install -e ".[viz]"') from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise K1Error(f"--plot {path}: end the name in one of {', '.join(sorted(known))}")


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
        style = _STYLES[number // _COLOURS % len(_STYLES)]
        axes.plot(SHARES, [p.value for p in points], style, label=policy)
        axes.fill_between(SHARES, [p.low for p in points], [p.high for p in points], alpha=0.15)
    axes.set_xlabel("share of the budget of operations")
    axes.set_ylabel("test bits per byte (interquartile mean, 95 % interval)")
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise K1Error(f"--plot {path} cannot be written ({error})") from None
