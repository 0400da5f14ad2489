"""The log that people read agrees with the numbers behind it."""

import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.tree import Tree

from k1 import display
from k1.config import Config
from k1.data import load_data
from k1.trainer import Trainer
from tests.helpers import write_two_domains


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    data = load_data(write_two_domains(tmp_path_factory.mktemp("text")))
    made = Trainer(Config.preset("tiny"), data, seed=1)
    made.train(12)
    return made


def test_rows_agree_with_the_arena(trainer: Trainer) -> None:
    rows = display.block_rows(trainer)
    arena, tree = trainer.arena, trainer.tree
    assert {row.slot for row in rows} == set(tree.blocks)
    seen: set[int] = set()
    for row in rows:
        assert row.parent in seen or row.slot == 0
        seen.add(row.slot)
        assert row.visits == arena["visits"][0, row.slot]
        assert row.update_share == arena["updates"][0, row.slot] / 12
        assert row.responsibility == arena["responsibility"][0, row.slot]
        assert (row.state == display.CULPRIT) == (arena["last_culprit"][0, row.slot] == 11)
        assert 0 <= row.heat <= 1
    assert any(row.state == display.CULPRIT for row in rows)


def test_a_row_says_what_is_new(trainer: Trainer) -> None:
    grown = trainer.fork()
    new = grown.add_agent(0)
    rows = {grown.tree.blocks[r.slot].id: r for r in display.block_rows(grown)}
    assert rows[new].age == 0
    assert [r.age for r in rows.values()].count(None) == len(display.block_rows(trainer))
    assert "new: 0 steps" in display.plain_tree(grown)


@pytest.mark.parametrize("width", [20, 40, 79, 100, 160])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_tree_has_a_line_for_each_block(trainer: Trainer, width: int, ascii_only: bool) -> None:
    lines = display.plain_tree(trainer, width=width, ascii_only=ascii_only).splitlines()
    assert len(lines) == len(trainer.tree.blocks) + 1
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).isascii() == ascii_only
    assert "\x1b" not in "".join(lines)


def test_the_tree_shows_names_and_figures(trainer: Trainer) -> None:
    text = display.plain_tree(trainer)
    assert isinstance(display.tree_text(trainer), Tree)
    for row in display.block_rows(trainer):
        line = next(line for line in text.splitlines() if f" {row.name} " in line)
        assert display.ICONS[row.state] in line
        assert display.norm(row.responsibility).strip() in line
        assert f"{row.update_share:.0%}".replace("%", " %") in line
        assert not row.is_leaf or f"culprit {row.visits}x" in line


def test_children_beyond_the_most_are_counted(trainer: Trainer) -> None:
    text = display.plain_tree(trainer, max_children=1)
    assert "1 less responsible" in text
    assert len(text.splitlines()) == 1 + 2 + 2 + 1


def test_the_error_path_names_each_block(trainer: Trainer) -> None:
    fork = trainer.fork()
    report = fork.step()
    lines = display.error_path(fork, report).splitlines()
    assert len(lines) == len(report.path)
    for line, path in zip(lines, report.path, strict=True):
        assert line.startswith("Error path: Root(g=") and line.count(" -> ") == len(path) - 1
        leaf = fork.tree.name(fork.tree.slot_of(path[-1]), short=True)
        assert line.split(" -> ")[-1] == f"{leaf}(g={report.responsibility[path[-1]]:.2g})"
    words = f"Updated {report.agents_updated}/6 agents ({100 * report.updated_fraction:.1f} %"
    assert display.updated_line(report).startswith(words)


def test_a_step_is_one_line(trainer: Trainer) -> None:
    fork = trainer.fork()
    report = fork.step()
    line = display.step_line(report, trainer=fork, total=600, lr=1e-3, milliseconds=12.3)
    assert line.startswith(f"step  13/600 | loss {report.loss:.4f} | lr 1.00e-03 |   12.3 ms | ")
    assert "\n" not in line and "Agent" in line
    assert display.step_line(report).count("block ") == len(report.path[0]) - 1
    assert "loss n/a" in display.step_line(replace(report, loss=math.nan))
    assert "skipped" in display.step_line(replace(report, skipped=True))
    assert "skipped" in display.updated_line(replace(report, skipped=True))


def test_dense_steps_and_deleted_blocks_have_words_too(trainer: Trainer) -> None:
    fork = trainer.fork()
    report = fork.step()
    assert "dense" in display.error_path(fork, replace(report, path=()))
    gone = replace(report, path=((0, 999),))
    assert "block 999 (deleted since)(g=n/a)" in display.error_path(fork, gone)


def test_visits_are_tabulated(trainer: Trainer) -> None:
    rows = display.block_rows(trainer)
    found = display.concentration(rows)
    assert found.visits == int(trainer.arena["visits"][0].sum())
    assert found.top_share == max(r.visits for r in rows) / found.visits
    text = display.visit_table(trainer)
    assert f"of {found.visits} visits; evenness {found.entropy:.2f}" in text
    plain = display.visit_table(trainer, ascii_only=True)
    assert plain.isascii()


def test_concentration_at_its_ends(trainer: Trainer) -> None:
    rows = [row for row in display.block_rows(trainer) if row.is_leaf]
    even = display.concentration([replace(row, visits=5) for row in rows])
    assert (even.top_share, even.entropy) == (0.25, 1.0)
    one = display.concentration([replace(r, visits=5 * (r is rows[0])) for r in rows])
    assert (one.top_share, one.entropy) == (1.0, 0.0)
    assert display.concentration([replace(r, visits=0) for r in rows]).top_share == 0


def test_a_fresh_tree_and_nan_can_be_shown(trainer: Trainer) -> None:
    fresh = Trainer(trainer.config, trainer.data, seed=2)
    assert "culprit 0x" in display.plain_tree(fresh)
    assert "no leaf has been" in display.visit_table(fresh)
    fresh.arena["responsibility"][0] = math.nan
    fresh.arena["mean_responsibility"][0] = math.inf
    assert "n/a" in display.plain_tree(fresh)
    assert display.heat_lines(display.block_rows(fresh), 3)


@pytest.mark.parametrize("height", range(6))
def test_the_tree_fits_into_few_lines(trainer: Trainer, height: int) -> None:
    lines = display.heat_lines(display.block_rows(trainer), height)
    assert len(lines) <= height
    if height >= 3:
        assert len(lines) == 3  # the root and two nodes, with the leaves as cells
        assert all(str(row.ordinal) in lines[2].plain for row in display.block_rows(trainer)[-2:])


def test_small_drawings() -> None:
    assert display.bar(0.5, 10) == "━━━━━·····"
    assert display.bar(math.nan, 4) == "····"
    assert display.sparkline([1.0, math.nan, 3.0], 8) == "▁ █"
    assert display.sparkline([], 8) == display.sparkline([math.nan], 8) == ""
    assert len(display.sparkline(list(range(100)), 16)) == 16
    assert [display.number(x) for x in (0.909, 10.0, 1000.0)] == ["0.909", "10", "1,000"]
    assert display.percent(None) == display.percent(math.inf) == "n/a"
    assert display.ascii_text("▶ é ─ ±").isascii()
    assert Console(width=10).measure(display.fit("日本語日本語", 7)).maximum == 7
