"""The dashboard and the log: the right words, at every size, whatever the numbers are."""

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from k1.data import load_data
from k1env import dashboard
from k1env.dashboard import Dashboard, make_display
from k1env.gate import GateConfig
from k1env.plain_log import PlainLog, final_report
from k1env.session import Session
from k1env.settings import Settings
from tests.helpers import write_two_domains

SIZES = [(40, 15), (80, 24), (120, 40), (20, 5), (200, 60), (100, 33)]
SUMMARY: dict[str, Any] = {
    "final_stage": 2,
    "stage_history": [
        {"stage": 1, "decision": 0, "attempted": 0, "accepted": 0, "evidence": 1.0},
        {"stage": 2, "decision": 9, "attempted": 5, "accepted": 3, "evidence": 826.4},
    ],
    "cheats_attempted": 7,
    "cheats_accepted": 3,
    "evidence": 0.83,
    "agents_start": 40,
    "agents_end": 36,
    "bits_per_byte_start": {"prose": 4.0, "code": None},
    "bits_per_byte_end": {"prose": 3.0, "code": math.nan},
    "stop_reason": "the controller stopped",
    "stop_criteria": ["loss plateau", "own benchmark stable"],
    "train_steps": 1234,
    "lane_steps": 9876,
    "seconds": 75.2,
    "state_hash": "ab" * 32,
}


class Clock:
    """A clock that moves when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def settings() -> Settings:
    return replace(
        Settings.preset("tiny"),
        gate=GateConfig(seeds=3, horizon=2, anneal=1, windows=2),
        phase1_steps=4,
        interval=2,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_domains(tmp_path_factory.mktemp("text"))


@pytest.fixture
def session(settings: Settings, text: Path) -> Session:
    return Session(settings, load_data(text), seed=3)


def act(session: Session, label: str) -> Any:
    return session.act(next(a.index for a in session.table if a.label == label))


def console(width: int = 80, height: int = 24, **options: Any) -> Console:
    return Console(
        file=options.pop("file", io.StringIO()), width=width, height=height, force_terminal=True,
        color_system=None, legacy_windows=False, **options,
    )  # fmt: skip


def picture(board: Dashboard) -> list[str]:
    lines = board.console.render_lines(board, board.console.options, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.fixture(scope="module")
def ready(settings: Settings, text: Path) -> Session:
    """A session with some decisions behind it, for tests that change nothing."""
    made = Session(settings, load_data(text), seed=3)
    played(made, Dashboard(console()))
    return made


def watched(session: Session, board: Dashboard) -> Dashboard:
    """A display that takes over a session that goes on."""
    assert session.last is not None
    board.start(session)
    board.outcome(session.last)
    return board


def played(session: Session, board: Dashboard) -> Dashboard:
    board.start(session)
    session.begin()
    for label in ("no-op", "no-op", "prune 25%"):
        board.outcome(act(session, label))
    return board


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("banner", [False, True])
def test_it_fits_every_terminal(ready: Session, size: tuple[int, int], banner: bool) -> None:
    board = watched(ready, Dashboard(console(*size)))
    if banner:
        board.promotion(2)
    lines = picture(board)
    assert len(lines) <= size[1] - 1
    assert all(len(line) <= size[0] for line in lines)


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_it_shows_what_the_session_is(session: Session, size: tuple[int, int]) -> None:
    shown = "\n".join(picture(played(session, Dashboard(console(*size)))))
    assert "decision 3" in shown and "0 of 3 successes" in shown
    assert f"{session.tree.agents} agents" in shown
    assert f"training step {session.trainer.steps}" in shown
    assert "0.909 of 100" in shown
    assert "no-op 2 times" in shown and "cheat refused" in shown
    assert "permits no deletion" in shown
    for domain, bits in session.bits.items():
        line = next(line for line in shown.splitlines() if domain in line)
        assert f"{session.bits_start[domain]:.3f}" in line and f"{bits:.3f}" in line
    assert f"of {session.settings.budget:,} training steps" in shown


def test_the_picture_keeps_its_height(session: Session) -> None:
    board = Dashboard(console(80, 24))
    board.start(session)
    heights = set()
    session.begin()
    for label in ("no-op", "prune 25%", "tune lr x2", "no-op", "add under slot 0"):
        board.outcome(act(session, label))
        heights.add(len(picture(board)))
    assert heights == {23}


def test_work_in_progress_is_named(session: Session) -> None:
    shown: list[str] = []
    board = Dashboard(console(100, 30))
    board.start(session)
    told = session.notify

    def spy(kind: str, **data: Any) -> None:
        told(kind, **data)
        shown.append("\n".join(picture(board)))

    session.notify = spy
    session.begin()
    board.outcome(act(session, "prune 25%"))
    everything = "\n".join(shown)
    assert "Phase 1: training with fixed settings" in everything
    assert "trying on copies: prune 25% " in everything and "of 3 seeds" in everything


def test_time_left_follows_the_budget(session: Session) -> None:
    clock = Clock()
    board = Dashboard(console(), clock=clock)
    board.start(session)
    session.begin()
    for _ in range(2):
        clock.now += 10
        board.outcome(act(session, "no-op"))
    # 58 decisions of 60 are left, at 10 seconds each since the first one began to train.
    assert "20 elapsed" in picture(board)[0]
    assert "at most" in picture(board)[0]
    clock.now += 1e6
    assert "at most 0:00 left" in picture(board)[0]


def test_a_promotion_is_impossible_to_miss(session: Session) -> None:
    clock, stream = Clock(), io.StringIO()
    board = played(session, Dashboard(console(file=stream), clock=clock))
    board.promotion(2)
    board.promotion(2)
    assert stream.getvalue().count("STAGE 2 OF 4 REACHED") == 1  # stays in the scrollback
    shown = "\n".join(picture(board))
    assert "STAGE 2 OF 4 REACHED: PARAMETER EXPLORATION" in shown and "now permitted" in shown
    clock.now += dashboard.BANNER_SECONDS + 1
    assert "REACHED" not in "\n".join(picture(board))


def test_an_ascii_terminal_gets_ascii(ready: Session) -> None:
    for size in SIZES:
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        board = watched(ready, Dashboard(console(*size, file=stream)))
        assert "".join(picture(board)).isascii()
        stream.flush()


def test_what_is_not_finite_is_shown(session: Session) -> None:
    played(session, Dashboard(console()))
    session.bits = dict.fromkeys(session.bits, math.nan)
    session.arena["mean_responsibility"][0] = math.nan
    session.boundary.evidence = math.nan
    assert session.last is not None and session.last.trial is not None
    control = replace(session.last.trial.control, differences=(math.nan,), p_value=math.nan)
    broken = replace(session.last, trial=replace(session.last.trial, control=control))
    for size in SIZES:
        board = Dashboard(console(*size))
        board.start(session)
        board.outcome(replace(broken, rolled_back=True))
        assert picture(board)
    log = PlainLog(io.StringIO())
    log.start(session)
    log.outcome(broken)
    assert "loss not finite" in log.stream.getvalue()


def test_it_can_be_shown_before_anything_happened() -> None:
    assert "K-1 Phase 2" in picture(Dashboard(console()))[0]


def test_a_live_terminal_is_left_in_order(session: Session) -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Dashboard(console(file=stream)) as board:
        board.start(session)
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back
    with Dashboard(console(file=stream)) as board:
        played(session, board)
    assert "finished" in stream.getvalue()


def test_the_log_has_a_line_for_each_decision(session: Session) -> None:
    clock, stream = Clock(), io.StringIO()
    log = PlainLog(stream, clock=clock)
    with log:
        log.start(session)
        session.begin()
        clock.now = 42
        for label in ("no-op", "prune 25%"):
            log.outcome(act(session, label))
        log.promotion(2)
    lines = stream.getvalue().splitlines()
    decisions = [line for line in lines if line.startswith("decision ")]
    assert decisions[0].startswith("decision 0 | stage 1 | E 1 | no-op | permitted | ")
    assert decisions[1].startswith("decision 1 | stage 1 | E 0.909 | prune 25% | cheat refused (")
    first = session.seen[0]
    assert f" | {first} {session.bits[first]:.2f} | 0 % of budget | 0:42" in decisions[1]
    assert "permits no deletion" in lines[lines.index(decisions[1]) + 1]
    banner = [i for i, line in enumerate(lines) if line == "=" * 78]
    assert len(banner) == 2 and "STAGE 2 OF 4 REACHED" in lines[banner[0] + 1]


def test_a_promotion_comes_after_its_decision(session: Session) -> None:
    log = PlainLog(io.StringIO())
    log.start(session)
    session.begin()
    outcome = act(session, "no-op")
    session.boundary.stage, session.boundary.evidence = 2, 1.0
    session.boundary.history.append({"stage": 2, "decision": 0, "evidence": 826.0})
    log.outcome(replace(outcome, promoted=True))
    log.promotion(2)
    lines = log.stream.getvalue().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("decision 0"))
    assert "E 826" in lines[at] and lines[at + 1] == "=" * 78
    assert log.stream.getvalue().count("REACHED") == 1


def test_progress_is_rare(session: Session) -> None:
    clock = Clock()
    log = PlainLog(io.StringIO(), clock=clock)
    log.start(session)
    before = len(log.stream.getvalue().splitlines())
    for second in range(35):
        clock.now = second
        log.event("phase1", done=second, total=100)
    lines = log.stream.getvalue().splitlines()[before:]
    assert lines[0] == "    ... Phase 1: training with fixed settings 10/100 | 0:10"
    assert len(lines) == 3


def test_an_ascii_log_is_ascii(session: Session) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    log = PlainLog(stream)
    log.start(session)
    session.begin()
    log.outcome(act(session, "prune 25%"))
    stream.seek(0)
    assert "+/-" in stream.read()


@pytest.fixture
def plain_term(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("TERM", "xterm")
    yield monkeypatch


def test_the_terminal_decides(plain_term: pytest.MonkeyPatch) -> None:
    assert isinstance(make_display(io.StringIO()), PlainLog)
    assert isinstance(make_display(Terminal()), Dashboard)
    assert isinstance(make_display(Console(file=Terminal())), Dashboard)
    assert isinstance(make_display(Console(file=io.StringIO())), PlainLog)
    plain_term.setenv("TERM", "dumb")
    assert isinstance(make_display(Terminal()), PlainLog)


def test_the_report_says_how_it_went() -> None:
    report = final_report(SUMMARY, "runs/1")
    for words in (
        "2 of 4: Parameter exploration",
        "stage 2 at decision 9: 3 of 5 cheats succeeded, evidence 826",
        "3 of 7 succeeded",
        "40 -> 36",
        "4.000 -> 3.000 (-25.0 %)",
        "n/a -> n/a (n/a)",
        "the controller stopped (loss plateau, own benchmark stable)",
        "1,234 steps, 9,876 with all copies, in 1:15",
    ):
        assert words in report
    assert report.endswith("replay.py runs/1")
    assert final_report({}).startswith("Stage reached    1 of 4")
