"""Pictures of a session: plain text, a panel for the terminal, and an image."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from k1 import display
from k1.display import BlockRow, number, percent, unit
from k1.errors import K1Error
from k1.topology import LEVEL_NAMES
from k1env.boundary import EVIDENCE_TO_ADVANCE, STAGES, SUCCESSES_TO_ADVANCE
from k1env.session import Session
from k1env.view import (
    PERMITTED,
    SessionView,
    bounds_lines,
    evidence_line,
    evidence_share,
    explain,
    look,
    loss_line,
    stage_lines,
    verdict_word,
)

if TYPE_CHECKING:
    from PIL import ImageDraw


def _sections(view: SessionView) -> list[Text]:
    """All but the tree, as lines."""
    width = max((min(16, len(d)) for d in view.bits), default=6)
    lines = [Text(f"Decision {view.decision}, {view.spent:,} of {view.budget:,} training steps")]
    lines += [*stage_lines(view), evidence_line(view)]
    lines.append(Text(f"Cheats: {view.accepted} of {view.attempted} tried succeeded"))
    lines += map(Text, (f"Permitted: {PERMITTED[view.stage - 1]}", *bounds_lines(view)))
    lines.append(Text("Bits per byte (start, now, change; lower is better)", "bold"))
    lines += [loss_line(view, domain, width, ()) for domain in view.bits]
    lines.append(Text("Last verdicts", "bold"))
    lines += [Text(f"  {line}") for line in view.tries] or [Text("  nothing forbidden tried yet")]
    if view.last is not None:
        why = explain(view.last, view.gate)
        lines.append(Text(f"  last: {view.last.name}: {verdict_word(view.last)}; {why}"))
    return lines


def ansi(session: Session) -> str:
    """Describe a session as plain text: boundary system, loss, verdicts and tree."""
    text = display.render_plain(Group(*_sections(look(session))), width=100)
    return f"{text}\n\n{display.plain_tree(session.trainer)}\n"


def panel(session: Session) -> Panel:
    """Describe a session as a panel for a terminal."""
    view = look(session)
    tree = [Text(""), *display.heat_lines(view.rows, 40), display.legend()]
    title = f"K-1 Phase 2, stage {view.stage} of {len(STAGES)}: {STAGES[view.stage - 1]}"
    return Panel(Group(*_sections(view), *tree), title=title)


# -- the image -----------------------------------------------------------------------------------

_INK, _FAINT, _PAPER, _EDGE = (28, 32, 44), (112, 118, 132), (252, 252, 250), (206, 209, 216)
_BLUE, _GREEN, _RED = (24, 92, 214), (18, 140, 84), (196, 48, 40)
_RAMP = np.array([(255, 246, 214), (253, 196, 108), (232, 96, 62), (116, 20, 76)], dtype=float)
_FINE = 2
"""The image is drawn this many times larger and then scaled down, for smooth edges."""


def rgb_array(session: Session, size: tuple[int, int] = (960, 640)) -> np.ndarray:
    """Draw a session as an image.

    Args:
        session: what to draw.
        size: width and height in pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        K1Error: if Pillow is not installed.
    """
    return _Canvas(look(session), size).draw()


def _pillow() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise K1Error(
            "drawing an image takes Pillow, which is not installed: pip install k1[viz]"
        ) from error
    return Image, ImageDraw, ImageFont


def _heat_colour(heat: float) -> tuple[int, int, int]:
    place = unit(heat) * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    red, green, blue = (_RAMP[low] + (place - low) * (_RAMP[low + 1] - _RAMP[low])).round()
    return int(red), int(green), int(blue)


class _Canvas:
    """One image: header, the tree with a row for each level, legend."""

    def __init__(self, view: SessionView, size: tuple[int, int]) -> None:
        self.view, self.size = view, size
        image, draw, self.fonts = _pillow()
        self.scale = min(size[0] / 960, size[1] / 640)
        self.image: Any = image.new("RGB", (size[0] * _FINE, size[1] * _FINE), _PAPER)
        self.pen: ImageDraw.ImageDraw = draw.Draw(self.image)
        self.children: dict[int, list[BlockRow]] = {}
        for row in view.rows:
            self.children.setdefault(row.parent, []).append(row)

    def draw(self) -> np.ndarray:
        self._header()
        self._tree(150 * self.scale, self.size[1] - 78 * self.scale)
        self._legend(self.size[1] - 28 * self.scale)
        return np.asarray(self.image.resize(self.size, resample=4), dtype=np.uint8).copy()

    # All coordinates are in pixels of the final image; `points` are font sizes at 960 x 640.

    def _text(
        self, x: float, y: float, text: str, points: float = 14, fill: tuple = _INK, at: str = "lm"
    ) -> float:
        """Write text and return where it ends."""
        font = self.fonts.load_default(max(6.0, points * self.scale) * _FINE)
        self.pen.text((x * _FINE, y * _FINE), text, fill=fill, font=font, anchor=at)
        return x + self.pen.textlength(text, font=font) / _FINE

    def _box(self, x: float, y: float, w: float, h: float, fill: tuple) -> None:
        corners = [v * _FINE for v in (x, y, x + max(w, 0.5), y + h)]
        self.pen.rounded_rectangle(corners, radius=min(w, h) / 3 * _FINE, fill=fill)

    def _disc(
        self, x: float, y: float, r: float, fill: tuple | None, ring: tuple, w: float
    ) -> None:
        corners = [v * _FINE for v in (x - r, y - r, x + r, y + r)]
        self.pen.ellipse(corners, fill=fill, outline=ring, width=max(1, round(w * _FINE)))

    def _header(self) -> None:
        view, s, right = self.view, self.scale, self.size[0] - 24 * self.scale
        x = self._text(24 * s, 32 * s, f"Stage {view.stage} of {len(STAGES)}", 26)
        self._text(x + 14 * s, 33 * s, STAGES[view.stage - 1], 22, _FAINT)
        facts = f"decision {view.decision}    {view.agents} agents    training step {view.step:,}"
        self._text(right, 32 * s, facts, 15, _FAINT, "rm")
        x = self._text(24 * s, 70 * s, "Evidence", 15) + 12 * s
        if view.stage < len(STAGES):
            self._box(x, 63 * s, 180 * s, 14 * s, _EDGE)
            self._box(x, 63 * s, 180 * s * evidence_share(view.evidence), 14 * s, _BLUE)
            shown = f"{number(view.evidence)} of {EVIDENCE_TO_ADVANCE:g}"
            x = self._text(x + 192 * s, 70 * s, shown, 15) + 36 * s
            needed = SUCCESSES_TO_ADVANCE[view.stage - 1]
            x = self._text(x, 70 * s, "Successful cheats", 15) + 12 * s
            for i in range(needed):
                fill = _GREEN if i < view.successes else _EDGE
                self._box(x + 16 * s * i, 64 * s, 12 * s, 12 * s, fill)
            self._text(x + (16 * needed + 8) * s, 70 * s, f"{view.successes} of {needed}", 15)
        else:
            self._text(x, 70 * s, "all stages reached", 15, _FAINT)
        if last := view.last:
            self._text(right, 70 * s, f"last: {last.name}, {verdict_word(last)}", 15, _FAINT, "rm")
        self._losses(24 * s, 106 * s, right)

    def _losses(self, x: float, y: float, right: float) -> None:
        s, view = self.scale, self.view
        x = self._text(x, y, "Bits per byte", 15) + 14 * s
        for domain, now in view.bits.items():
            if x > right - 150 * s:
                self._text(x, y, "...", 15, _FAINT)
                break
            start = view.bits_start.get(domain, math.nan)
            x = self._text(x, y, display.fit(domain, min(16, len(domain))), 15, _FAINT) + 6 * s
            x = self._text(x, y, number(now, ".3f"), 15) + 6 * s
            change = (now - start) / start if start else math.nan
            fill = _FAINT if not math.isfinite(change) else _GREEN if change <= 0 else _RED
            x = self._text(x, y, percent(change, "+.1f"), 13, fill) + 26 * s
        self.pen.line(
            [24 * s * _FINE, 128 * s * _FINE, right * _FINE, 128 * s * _FINE], _EDGE, _FINE
        )

    def _places(self, top: float, bottom: float) -> dict[int, tuple[float, float]]:
        """Lay the tree out: a column for each leaf, each parent over the middle of its children."""
        left, right = 112 * self.scale, self.size[0] - 24 * self.scale
        leaves = sum(row.is_leaf for row in self.view.rows)
        self.column = (right - left) / max(1, leaves)
        depth = max(1, max(row.level for row in self.view.rows))
        self.step_down = (bottom - top - 52 * self.scale) / depth
        place: dict[int, tuple[float, float]] = {}
        next_leaf = leaves
        for row in reversed(self.view.rows):  # children come before their parents
            below = [place[child.slot][0] for child in self.children.get(row.slot, [])]
            if not below:
                next_leaf -= 1
            x = (min(below) + max(below)) / 2 if below else left + (next_leaf + 0.5) * self.column
            place[row.slot] = (x, top + 26 * self.scale + row.level * self.step_down)
        return place

    def _tree(self, top: float, bottom: float) -> None:
        place = self._places(top, bottom)
        rows, s = self.view.rows, self.scale
        moved = (display.CULPRIT, display.UPDATED)
        for row in sorted(rows[1:], key=lambda r: r.state in moved):
            ends = [v * _FINE for point in (place[row.parent], place[row.slot]) for v in point]
            on_path = row.state in moved
            self.pen.line(
                ends, _BLUE if on_path else _EDGE, round((3 if on_path else 1.5) * s * _FINE)
            )
        for level in sorted({row.level for row in rows}):
            y = place[next(r.slot for r in rows if r.level == level)][1]
            name = LEVEL_NAMES[level] if level < len(LEVEL_NAMES) else f"Level {level}"
            self._text(24 * s, y, name if level == 0 else f"{name}s", 14, _FAINT)
        for row in rows:
            self._block(row, *place[row.slot])

    def _block(self, row: BlockRow, x: float, y: float) -> None:
        s = self.scale
        radius = min((25, 22, 18, 14)[min(row.level, 3)] * s, 0.42 * self.column)
        if not row.is_leaf:
            radius = max(radius, min(17 * s, 0.8 * self.column))
        fill = _heat_colour(row.heat)
        if row.state == display.CULPRIT:
            self._disc(x, y, radius + 5 * s, _PAPER, _BLUE, 3 * s)
        self._disc(x, y, radius, fill, _BLUE if row.state == display.UPDATED else _INK, 1.2 * s)
        if radius >= 6 * s:
            dark = sum(fill) < 420
            label = "R" if row.level == 0 else str(row.ordinal)
            points = min(16.0, 0.95 * radius / s)
            self._text(x, y, label, points, _PAPER if dark else _INK, "mm")
        if row.age is not None and row.age <= display.NEW_STEPS:
            self._badge(x + 0.75 * radius, y - 0.75 * radius, max(4 * s, 0.32 * radius))
        if row.is_leaf and self.column >= 22 * s:
            self._text(x, y + radius + 14 * s, f"{row.visits}x", 11, _FAINT, "mm")

    def _badge(self, x: float, y: float, r: float) -> None:
        self._disc(x, y, r, _GREEN, _PAPER, 0.2 * r)
        for dx, dy in ((0.5 * r, 0), (0, 0.5 * r)):
            ends = [v * _FINE for v in (x - dx, y - dy, x + dx, y + dy)]
            self.pen.line(ends, _PAPER, max(1, round(0.3 * r * _FINE)))

    def _legend(self, y: float) -> None:
        s = self.scale
        x = self._text(24 * s, y, "Responsibility in its row", 13, _FAINT) + 10 * s
        for i in range(60):
            self._box(x + 1.5 * i * s, y - 7 * s, 2 * s, 14 * s, _heat_colour(i / 59))
        x = self._text(x + 98 * s, y, "high", 13, _FAINT) + 40 * s
        self._disc(x, y, 9 * s, _PAPER, _BLUE, 2.5 * s)
        x = self._text(x + 16 * s, y, "culprit of the last step", 13, _FAINT) + 34 * s
        self.pen.line(
            [v * _FINE for v in (x - 12 * s, y, x + 12 * s, y)], _BLUE, round(3 * s * _FINE)
        )
        x = self._text(x + 20 * s, y, "updated", 13, _FAINT) + 34 * s
        self._badge(x, y, 7 * s)
        x = self._text(x + 14 * s, y, "new", 13, _FAINT) + 28 * s
        self._text(x, y, "5x  times culprit", 13, _FAINT)
