"""What people read in a log: the tree of blocks, the path of an error, the line of a step.

All of it is text that survives a terminal without colour, a narrow one, and one that knows ASCII
only. `block_rows` reads the tree off the device once; everything else works on those plain rows.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import set_cell_size
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from k1.topology import ROOT_SLOT
from k1.trainer import StepReport, Trainer

CULPRIT, UPDATED, NEWBORN, IDLE = "culprit", "updated", "new", "idle"
ICONS = {CULPRIT: "●", UPDATED: "◐", NEWBORN: "✦", IDLE: "○"}
STYLES = {CULPRIT: "bold red", UPDATED: "yellow", NEWBORN: "bold green", IDLE: "dim"}
BARS = "▁▂▃▄▅▆▇█"
HEAT_STYLES = ("dim", "cyan", "yellow", "red")
NEW_STEPS = 64
"""Steps for which a block that was added counts as new-born."""
_ASCII = str.maketrans("●◐✦○▁▂▃▄▅▆▇█■□▶✓✗━─│·±…→", "*+!.12345678#->y!=-|.~~>")
_NARROW = 80


@dataclass(frozen=True)
class BlockRow:
    """One living block as plain data."""

    slot: int
    parent: int
    level: int
    ordinal: int
    name: str
    """Short: `Sub-Agent 13`."""
    is_leaf: bool
    state: str
    """`CULPRIT` or `UPDATED` in the last step, else `NEWBORN` or `IDLE`."""
    age: int | None
    """Steps since it was added; None if it is as old as the tree."""
    responsibility: float
    """Last measured gradient norm."""
    mean_responsibility: float
    """Running mean of it."""
    heat: float
    """The running mean as a share of the largest of its level, in [0, 1]."""
    update_share: float
    """Share of all steps in which it was updated."""
    visits: int
    """Times it was a culprit."""


@dataclass(frozen=True)
class Concentration:
    """How unevenly the leaves are held responsible."""

    leaf: str
    """The most visited leaf."""
    visits: int
    """Of all leaves together."""
    top_share: float
    """Share of the most visited leaf."""
    entropy: float
    """Of the shares, divided by its maximum: 1 if all leaves are alike, 0 if one takes all."""


def block_rows(trainer: Trainer, lane: int = 0) -> list[BlockRow]:
    """Read one lane's tree as plain rows, each block before its children."""
    arena, tree = trainer.arena, trainer.arena.trees[lane]
    names = ("visits", "updates", "last_culprit", "last_update", "born")
    visits, updates, last_culprit, last_update, born = (arena[n][lane].tolist() for n in names)
    measured = arena["responsibility"][lane].tolist()
    mean = arena["mean_responsibility"][lane].tolist()
    step = arena.host_step[lane]
    largest: dict[int, float] = {}
    for slot, block in tree.blocks.items():
        if math.isfinite(mean[slot]):
            largest[block.level] = max(largest.get(block.level, 0.0), mean[slot])
    rows = []
    order = [ROOT_SLOT]
    for slot in order:  # children go right behind their parent
        at = order.index(slot) + 1
        order[at:at] = tree.children(slot)
    for slot in order:
        block, age = tree.blocks[slot], step - born[slot] if born[slot] else None
        state = IDLE if age is None or age > NEW_STEPS else NEWBORN
        if step and last_culprit[slot] == step - 1:
            state = CULPRIT
        elif step and last_update[slot] == step - 1:
            state = UPDATED
        rows.append(
            BlockRow(
                slot, block.parent, block.level, block.ordinal, tree.name(slot, short=True),
                tree.is_leaf(slot), state, age, measured[slot], mean[slot],
                unit(ratio(mean[slot], largest.get(block.level, 0.0))),
                ratio(updates[slot], step), visits[slot],
            )
        )  # fmt: skip
    return rows


# -- numbers and glyphs --------------------------------------------------------------------------


def ratio(part: float, whole: float) -> float:
    """Divide, with 0 for a division by zero."""
    return part / whole if whole else 0.0


def unit(value: float) -> float:
    """Clamp to [0, 1]; what is not finite becomes 0."""
    return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0


def number(value: float | None, spec: str = ".3g") -> str:
    """Format a number; `n/a` for one that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return format(value, ",.0f" if spec == ".3g" and 999 <= abs(value) < 1e6 else spec)


def percent(share: float | None, spec: str = ".0f") -> str:
    """Format a share as a percentage."""
    text = number(None if share is None else 100 * share, spec)
    return text if text == "n/a" else f"{text} %"


def norm(value: float) -> str:
    """Format a gradient norm in seven columns."""
    return f"{number(value, '.4f' if not abs(value) < 1e-3 or value == 0 else '.1e'):>7}"


def bar(share: float, width: int) -> str:
    """Draw a share in [0, 1] as a bar."""
    full = round(unit(share) * width)
    return "━" * full + "·" * (width - full)


def fit(text: str, width: int) -> str:
    """Cut or pad text to exactly `width` terminal columns."""
    return set_cell_size(text, width)


def heat_bar(heat: float) -> str:
    """One character that shows a share in [0, 1]."""
    return BARS[min(len(BARS) - 1, int(unit(heat) * len(BARS)))]


def heat_style(heat: float) -> str:
    """A terminal style for a share in [0, 1]."""
    return HEAT_STYLES[min(len(HEAT_STYLES) - 1, int(unit(heat) * len(HEAT_STYLES)))]


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the course of a figure, at most `width` characters; gaps where it is not finite."""
    shown = list(values)
    if len(shown) > width > 0:
        shown = [shown[round(i * (len(shown) - 1) / max(1, width - 1))] for i in range(width)]
    finite = [v for v in shown if math.isfinite(v)]
    if not finite or width <= 0:
        return ""
    low, high = min(finite), max(finite)
    return "".join(
        heat_bar((v - low) / (high - low) if high > low else 0.5) if math.isfinite(v) else " "
        for v in shown
    )


def ascii_text(text: str) -> str:
    """Replace every character that is not ASCII by one that is, so that columns stay aligned."""
    return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")


def ascii_line(line: Text) -> Text:
    """Do the same to styled text."""
    plain = ascii_text(line.plain)
    return Text(plain, style=line.style, spans=list(line.spans), no_wrap=True)


def _no_unicode(ascii_only: bool | None) -> bool:
    if ascii_only is not None:
        return ascii_only
    return not (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


# -- the tree ------------------------------------------------------------------------------------


def tree_text(
    trainer: Trainer,
    *,
    lane: int = 0,
    max_children: int | None = None,
    ascii_only: bool | None = None,
    width: int = 100,
) -> Tree:
    """Draw the tree of blocks, one line each.

    Args:
        trainer: the system.
        lane: which lane of its arena.
        max_children: show only so many children of a block, the most responsible ones.
        ascii_only: by default, whatever the standard output can show.
        width: columns of the terminal; the words are left out where they are few.
    """
    rows = block_rows(trainer, lane)
    children: dict[int, list[BlockRow]] = {}
    for row in rows:
        children.setdefault(row.parent, []).append(row)
    name_width = max(4 * row.level + len(row.name) for row in rows)
    plain = _no_unicode(ascii_only)

    def label(line: Text) -> Text:
        return ascii_line(line) if plain else line

    def grow(branch: Tree, row: BlockRow) -> None:
        below = children.get(row.slot, [])
        kept = sorted(below, key=lambda r: -r.heat)[:max_children]
        for child in below:
            if child in kept:
                grow(branch.add(label(_tree_line(child, name_width, width))), child)
        if len(kept) < len(below):
            branch.add(label(Text(f"… {len(below) - len(kept)} less responsible", style="dim")))

    root = Tree(label(_tree_line(rows[0], name_width, width)), guide_style="dim")
    grow(root, rows[0])
    return root


def _tree_line(row: BlockRow, name_width: int, width: int) -> Text:
    words = ("", "", "", "") if width < _NARROW else ("grad ", "mean ", "updated ", "culprit ")
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"{ICONS[row.state]} ", STYLES[row.state])
    line.append(f"{row.name:<{name_width - 4 * row.level}}", "" if row.is_leaf else "bold")
    line.append(f"  {words[0]}{norm(row.responsibility)}")
    if words[1]:
        line.append(f"  {words[1]}{norm(row.mean_responsibility)}")
    line.append(f" {heat_bar(row.heat)}", heat_style(row.heat))
    line.append(f" {words[2]}{percent(row.update_share):>5}")
    if row.is_leaf:
        line.append(f"  {words[3]}{row.visits}x")
    if row.age is not None and row.age <= NEW_STEPS:
        line.append(f"  new: {row.age} steps", STYLES[NEWBORN])
    return line


def legend() -> Text:
    """Explain the icons and bars of the tree."""
    line = Text(no_wrap=True, overflow="ellipsis")
    meaning = {CULPRIT: "culprit", UPDATED: "updated", NEWBORN: "new", IDLE: "idle"}
    for state, words in meaning.items():
        line.append(f"{ICONS[state]} ", STYLES[state]).append(f"{words}  ", "dim")
    return line.append(f"{BARS[0]}{BARS[-1]} responsibility", "dim")


def plain_tree(
    trainer: Trainer,
    *,
    lane: int = 0,
    max_children: int | None = None,
    ascii_only: bool = False,
    width: int = 100,
) -> str:
    """Draw the tree as plain text without colour, with its legend as the last line."""
    tree = tree_text(
        trainer, lane=lane, max_children=max_children, ascii_only=ascii_only, width=width
    )
    note = ascii_line(legend()) if ascii_only else legend()
    return render_plain(Group(tree, note), width=width, ascii_only=ascii_only)


def render_plain(renderable: object, *, width: int = 100, ascii_only: bool = False) -> str:
    """Render anything of rich as plain text."""
    encoding = "ascii" if ascii_only else "utf-8"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    Console(file=stream, width=width, color_system=None, legacy_windows=False).print(renderable)
    stream.seek(0)
    return "\n".join(line.rstrip() for line in stream.read().splitlines())


# -- the tree in few lines -----------------------------------------------------------------------


def heat_lines(rows: Sequence[BlockRow], height: int) -> list[Text]:
    """Draw the tree in at most `height` lines, with leaves as cells on their parent's line.

    One line for each block with children if that fits, else one for each child of the root, else
    as many of those as fit and a count of the others.
    """
    children: dict[int, list[BlockRow]] = {}
    for row in rows:
        children.setdefault(row.parent, []).append(row)
    inner = [row for row in rows if not row.is_leaf or row.level == 0]
    if len(inner) <= height:
        width = max(2 * row.level + len(row.name) for row in inner)
        return [_inner_line(row, children.get(row.slot, []), width) for row in inner]
    lines = [_node_line(row, children) for row in children.get(ROOT_SLOT, [])]
    if len(lines) > height:
        hidden = len(lines) - max(0, height - 1)
        lines = [*lines[: max(0, height - 1)], Text(f"… {hidden} more nodes", style="dim")]
    return lines[: max(0, height)]


def _cell(row: BlockRow, width: int = 1) -> Text:
    icon = " " if row.state == IDLE else ICONS[row.state]
    cell = Text(icon, STYLES[row.state], no_wrap=True)
    return cell.append(f"{row.ordinal:>{width}}", "").append(
        heat_bar(row.heat), heat_style(row.heat)
    )


def _inner_line(row: BlockRow, below: Sequence[BlockRow], width: int) -> Text:
    line = Text("  " * row.level, no_wrap=True, overflow="ellipsis")
    line.append(ICONS[row.state], STYLES[row.state])
    line.append(f" {row.name:<{width - 2 * row.level}} ", "bold" if row.level < 2 else "")
    line.append(heat_bar(row.heat), heat_style(row.heat))
    line.append(f" {norm(row.mean_responsibility)} {percent(row.update_share):>5} ")
    for child in below:
        if child.is_leaf:
            line.append_text(_cell(child, 3))
    return line


def _node_line(row: BlockRow, children: dict[int, list[BlockRow]]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(ICONS[row.state], STYLES[row.state]).append(f" {row.name:<8}", "bold")
    line.append(heat_bar(row.heat), heat_style(row.heat))

    def grow(slot: int) -> None:
        for child in children.get(slot, []):
            line.append_text(_cell(child))
            if not child.is_leaf:
                line.append("(", "dim")
                grow(child.slot)
                line.append(" )", "dim")

    grow(row.slot)
    return line


# -- steps and visits ----------------------------------------------------------------------------


def _name(trainer: Trainer, block_id: int) -> str:
    tree = trainer.tree
    for slot, block in tree.blocks.items():
        if block.id == block_id:
            return tree.name(slot, short=True)
    return f"block {block_id} (deleted since)"


def error_path(trainer: Trainer, report: StepReport) -> str:
    """Describe where a step's error was traced to, one line for each path."""
    if not report.path:
        return "Error path: none, for a dense step updates every block"
    lines = []
    for path in report.path:
        stations = (
            f"{_name(trainer, i)}(g={number(report.responsibility.get(i, math.nan), '.2g')})"
            for i in path
        )
        lines.append("Error path: " + " -> ".join(stations))
    return "\n".join(lines)


def updated_line(report: StepReport) -> str:
    """Say how much of the system a step updated."""
    if report.skipped:
        return "Updated nothing: a gradient was not finite, so the step was skipped"
    agents = f"{report.agents_updated}/{report.agents} agents"
    return f"Updated {agents} ({percent(report.updated_fraction, '.1f')} of parameters)"


def step_line(
    report: StepReport,
    *,
    trainer: Trainer | None = None,
    total: int | None = None,
    lr: float | None = None,
    milliseconds: float | None = None,
) -> str:
    """Describe a step in one line: step, loss, learning rate, time, path.

    Args:
        report: the step.
        trainer: the system that made it, for the names of blocks; else the path is of ids.
        total: steps planned.
        lr: learning rate.
        milliseconds: time that the step took.
    """
    width = len(str(total)) if total else 5
    parts = [f"step {report.step + 1:>{width}}" + (f"/{total}" if total else "")]
    parts.append(f"loss {number(report.loss, '.4f')}")
    if lr is not None:
        parts.append(f"lr {number(lr, '.2e')}")
    if milliseconds is not None:
        parts.append(f"{number(milliseconds, '6.1f')} ms")
    if report.skipped:
        parts.append("skipped: gradient not finite")
    elif report.path:
        more = f" and {len(report.path) - 1} more" if len(report.path) > 1 else ""
        names = [_name(trainer, i) if trainer else f"block {i}" for i in report.path[0][1:]]
        parts.append(" > ".join(names) + more)
    else:
        parts.append("all blocks")
    return " | ".join(parts)


def concentration(rows: Iterable[BlockRow]) -> Concentration:
    """Measure how unevenly the leaves were held responsible."""
    leaves = [row for row in rows if row.is_leaf]
    total = sum(row.visits for row in leaves)
    top = max(leaves, key=lambda row: row.visits)
    shares = [row.visits / total for row in leaves if row.visits] if total else []
    spread = -math.fsum(s * math.log(s) for s in shares)
    most = math.log(len(leaves)) if len(leaves) > 1 else 0.0
    return Concentration(top.name, total, ratio(top.visits, total), unit(ratio(spread, most)))


def visit_table(trainer: Trainer, *, lane: int = 0, ascii_only: bool | None = None) -> str:
    """Tabulate how often each leaf was the culprit, and how concentrated that is."""
    rows = block_rows(trainer, lane)
    leaves = sorted((r for r in rows if r.is_leaf), key=lambda r: (-r.visits, r.slot))
    found, plain = concentration(rows), _no_unicode(ascii_only)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Leaf", no_wrap=True)
    table.add_column("Culprit", justify="right")
    table.add_column("Share", justify="right")
    table.add_column("", no_wrap=True)
    for row in leaves:
        share = percent(ratio(row.visits, found.visits), ".1f")
        drawn = bar(ratio(row.visits, leaves[0].visits), 20)
        table.add_row(row.name, str(row.visits), share, ascii_text(drawn) if plain else drawn)
    words = (
        f"{found.leaf} takes {percent(found.top_share)} of {found.visits} visits; evenness "
        f"{found.entropy:.2f} (1: all {len(leaves)} leaves alike, 0: one takes all)"
        if found.visits
        else "no leaf has been a culprit yet"
    )
    return f"{render_plain(table, width=80, ascii_only=plain)}\n{words}"
