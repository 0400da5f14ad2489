"""Text, panel and image of a session say what the session is."""

import importlib.util
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from k1 import display
from k1.data import load_data
from k1.errors import K1Error
from k1env import render, view
from k1env.gate import Comparison, GateConfig, TrialResult
from k1env.outcome import Outcome
from k1env.session import Session
from k1env.settings import Settings
from tests.helpers import write_two_domains

needs_pillow = pytest.mark.skipif(
    importlib.util.find_spec("PIL") is None, reason="takes Pillow: pip install k1[viz]"
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    settings = replace(
        Settings.preset("tiny"),
        gate=GateConfig(seeds=3, horizon=2, anneal=1, windows=2),
        phase1_steps=4,
        interval=2,
    )
    made = Session(settings, load_data(write_two_domains(tmp_path_factory.mktemp("text"))), seed=3)
    made.begin()
    made.act(0)
    made.act(next(a.index for a in made.table if a.label == "prune 25%"))
    return made


def trial(differences: tuple[float, ...], *, accepted: bool = False) -> TrialResult:
    mean = sum(differences) / len(differences)
    measured = Comparison(differences, mean if math.isfinite(mean) else 0.0, 0.002, 2e-11, accepted)
    return TrialResult(accepted, "improves", measured, None, len(differences), 100)


def outcome(**fields: object) -> Outcome:
    return replace(
        Outcome(12, 5, "tune", "tune lr x2", 1, rule="stage 1 permits no tuning"), **fields
    )


def test_text_holds_what_the_session_knows(session: Session) -> None:
    text = render.ansi(session)
    assert "1 Safe exploration" in text and "0 of 3 successes" in text
    assert f"Decision 2, {session.spent:,} of 4,000 training steps" in text
    assert f"{session.boundary.accepted} of {session.boundary.attempted} tried" in text
    assert f"{display.number(session.boundary.evidence)} of 100" in text
    assert "decision 1, stage 1: prune 25% refused" in text
    for domain, bits in session.bits.items():
        line = next(line for line in text.splitlines() if domain in line)
        assert f"{session.bits_start[domain]:.3f}" in line and f"{bits:.3f}" in line
    for slot in session.tree.blocks:
        assert session.tree.name(slot, short=True) in text
    assert "\x1b" not in text


def test_drawing_changes_nothing(session: Session) -> None:
    before = session.trainer.state_hash()
    render.ansi(session)
    render.panel(session)
    render.rgb_array(session, (120, 80))
    assert session.trainer.state_hash() == before


@pytest.mark.parametrize("width", [30, 80, 120])
def test_the_panel_fits(session: Session, width: int) -> None:
    text = display.render_plain(render.panel(session), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "stage 1 of 4" in text or width < 40


def test_a_session_that_has_not_begun_can_be_shown(session: Session) -> None:
    fresh = Session(session.settings, session.data, seed=4)
    assert "nothing forbidden tried yet" in render.ansi(fresh)
    Console(quiet=True).print(render.panel(fresh))
    if importlib.util.find_spec("PIL"):
        assert render.rgb_array(fresh, (96, 64)).shape == (64, 96, 3)


@needs_pillow
@pytest.mark.parametrize("size", [(960, 640), (480, 320), (64, 48), (1000, 200)])
def test_the_image_is_an_image(session: Session, size: tuple[int, int]) -> None:
    image = render.rgb_array(session, size)
    assert image.shape == (size[1], size[0], 3) and image.dtype == np.uint8
    assert image.flags.writeable and image.flags.c_contiguous
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20
    assert (image == render.rgb_array(session, size)).all()


@needs_pillow
def test_the_image_shows_heat_culprits_and_growth(session: Session) -> None:
    tensors, state = session.snapshot()

    def pixels(colour: tuple[int, int, int]) -> int:
        return int((render.rgb_array(session) == colour).all(-1).sum())

    ringed, green = pixels(render._BLUE), pixels(render._GREEN)
    session.arena["last_culprit"][0] = session.arena["last_update"][0] = -1
    assert pixels(render._BLUE) < ringed
    session.act(1)
    assert pixels(render._GREEN) > green
    session.restore(tensors, state)


@needs_pillow
def test_the_image_survives_what_is_not_finite(session: Session) -> None:
    tensors, state = session.snapshot()
    session.arena["mean_responsibility"][0] = math.nan
    session.bits = dict.fromkeys(session.bits, math.nan)
    session.boundary.evidence = math.nan
    assert render.rgb_array(session).shape == (640, 960, 3)
    assert "n/a" in render.ansi(session)
    session.restore(tensors, state)


def test_without_pillow_the_error_names_the_remedy(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(K1Error, match=r"pip install k1\[viz\]"):
        render.rgb_array(session)


def test_verdicts_have_words() -> None:
    accepted = trial((0.04, 0.05), accepted=True)
    assert view.verdict_word(outcome(impossible="no room")) == "impossible"
    assert view.verdict_word(outcome(permitted=True)) == "permitted"
    assert view.verdict_word(outcome(stopped=True)) == "stopped"
    assert view.verdict_word(outcome(trial=trial((0.0, 0.1)))) == "cheat refused"
    assert view.verdict_word(outcome(trial=accepted, applied=True)) == "allowed, not counted"
    credited = outcome(trial=accepted, applied=True, credited=True)
    assert view.verdict_word(credited) == "cheat succeeded"


def test_an_explanation_has_rule_limit_and_measurement() -> None:
    full = outcome(trial=trial((0.04,) * 8, accepted=True), applied=True, credited=True)
    why = view.explain(full, GateConfig())
    assert "stage 1 permits no tuning; gain +4.00 % ± 0.20, p 2e-11 over 8 seeds" in why
    assert "needed more than 0.1 % with p at most 0.01" in why
    early = view.explain(outcome(trial=trial((-0.1, -0.1))), GateConfig())
    assert "ended early" in early
    stop = view.explain(replace(full, kind="stop"), GateConfig())
    assert "going on gains" in stop and "less than" in stop
    broken = view.explain(outcome(trial=trial((math.nan, 0.1))), GateConfig())
    assert "loss not finite" in broken
    shadow = replace(full.trial, shadow=full.trial.control)
    assert "its shadow" in view.explain(replace(full, trial=shadow), GateConfig())


@pytest.mark.parametrize(
    ("evidence", "share"),
    [(1.0, 0.0), (10.0, 0.5), (100.0, 1.0), (826.0, 1.0), (0.5, 0.0), (0.0, 0.0), (math.nan, 0.0)],
)
def test_evidence_is_drawn_on_a_log_scale(evidence: float, share: float) -> None:
    assert view.evidence_share(evidence) == pytest.approx(share)


def test_every_stage_can_be_shown(session: Session) -> None:
    shown = view.look(session)
    for stage in (1, 2, 3, 4):
        at = replace(shown, stage=stage)
        lines = [line.plain for line in view.stage_lines(at)]
        assert len(lines) == 4 and lines[stage - 1].startswith(f"▶ {stage}")
        assert sum(line.startswith("✓") for line in lines) == stage - 1
        assert ("no further" in view.evidence_line(at).plain) == (stage == 4)
        assert view.bounds_lines(at)


def test_durations() -> None:
    assert [view.duration(s) for s in (0, 42, 61, 3661, -5)] == [
        "0:00", "0:42", "1:01", "1:01:01", "0:00",
    ]  # fmt: skip
    assert view.duration(math.nan) == view.duration(None) == "n/a"
