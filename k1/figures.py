"""What all pictures share: whether one can be drawn, and writing it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from k1.errors import K1Error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = 10
"""Colours before matplotlib begins anew."""
_STYLES = ("-", "--", ":")


def style(number: int) -> str:
    """Line style of a picture's n-th curve: another one when the colours begin anew."""
    return _STYLES[number // COLOURS % len(_STYLES)]


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


def save(figure: Figure, path: Path) -> None:
    """Write a picture to a file.

    Raises:
        K1Error: if it cannot be written.
    """
    from matplotlib import rc_context

    try:
        # Without a date and random ids, the same picture is the same file.
        with rc_context({"svg.hashsalt": "k1"}):
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise K1Error(f"--plot {path} cannot be written ({error})") from None
