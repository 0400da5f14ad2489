"""The gate's calibration: trials that are the gate's own, records to go on from, the report."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from k1.data import TextData
from k1.errors import K1Error
from k1env import calibration
from k1env.calibration import (
    LUCK,
    NOTHING,
    ROUNDING,
    Calibration,
    Plan,
    Trial,
    calibrate,
    lengths,
    plan_trials,
)
from k1env.calibration_report import markdown, tables
from k1env.gate import CHEAT, CONTROL, Gate
from k1env.odds import clopper_pearson
from k1env.verdicts import gate_ruling
from tests.phase2_helpers import ROOT, call, quick, write_text

SCRIPT = ROOT / "scripts" / "calibrate_gate.py"


@pytest.fixture(scope="module")
def plan(data: TextData) -> Plan:
    settings = quick({"seeds": 4, "early": 2, "group": 1}, phase1_steps=6)
    return Plan(settings, data, torch.device("cpu"), trials=1)


@pytest.fixture(scope="module")
def ready(plan: Plan) -> Calibration:
    made = Calibration(plan)
    made.prepare()
    return made


def attempt(ready: Calibration, cheat: str, number: int = 0, age: str = "late") -> dict[str, Any]:
    trial = Trial(cheat, "beta", age, number, 2, 2)
    return ready.scheduler.run([ready.attempt(trial, ready.places[0])])[0]


# -- trials --------------------------------------------------------------------------------------


def test_nothing_is_exactly_nothing(ready: Calibration) -> None:
    row = attempt(ready, NOTHING)
    assert row["gains"] == row["test"] == [0.0] * 4
    assert row["lane_steps"] == 2 * 4 * 4


def test_rounding_is_next_to_nothing_but_not_nothing(ready: Calibration) -> None:
    row = attempt(ready, ROUNDING)
    assert 0 < max(map(abs, row["gains"])) < 1e-4


def test_luck_is_other_batches_for_the_cheat_alone(
    ready: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    before = Gate._train

    def train(gate: Gate, arms: list[str], lanes: dict[str, int], size: int, **more: Any) -> Any:
        seeds = gate.engine.arena["data_seed"].tolist()
        seen.append([seeds[lanes[arm] + i] for arm in (CONTROL, CHEAT) for i in range(size)])
        return before(gate, arms, lanes, size, **more)

    monkeypatch.setattr(Gate, "_train", train)
    row = attempt(ready, LUCK)
    same = attempt(ready, NOTHING)
    assert len(set(seen[0])) == 8, "no two of its lanes have the same batches"
    assert seen[1][:4] == seen[1][4:]
    assert min(map(abs, row["gains"])) > 0 == max(same["gains"])


def test_a_changed_rate_is_seen(ready: Calibration) -> None:
    assert statistics.fmean(attempt(ready, "lr x4", age="early")["gains"]) > 0.0001
    assert attempt(ready, "lr x1")["gains"] == [0.0] * 4


def test_systems_are_what_they_are_called(ready: Calibration) -> None:
    steps = [ready.arena.host_step[lane] for lane in range(len(ready.cells))]
    assert steps == [6, 60] * 3
    for lane, (domain, _) in enumerate(ready.cells):
        shares = ready.arena["mix"][lane].tolist()
        assert shares[ready.plan.data.domains.index(domain)] == 1.0 == sum(shares)
    assert len(set(ready.states.values())) == 6
    before = [ready.arena.hash_lane(lane) for lane in range(6)]
    attempt(ready, "lr x2")
    assert [ready.arena.hash_lane(lane) for lane in range(6)] == before


def test_a_full_trial_says_what_the_gate_would_have_said(ready: Calibration) -> None:
    """The gate itself, with its early end, on the same seeds: the same verdict after as many."""
    ends = set()
    for number, cheat in enumerate(["lr x4", "lr x0.5", "lr x2", LUCK]):
        trial = Trial(cheat, "alpha", "early", number, 2, 2)
        (row,) = ready.scheduler.run([ready.attempt(trial, ready.places[0])])
        if cheat == LUCK:
            continue
        seed = calibration.derive_seed("calibration", ready.plan.seed, *trial.key)
        gate = Gate(ready.engine, ready.places[0], ready.plan.settings.gate)
        result = gate.run(
            ready.cells.index(("alpha", "early")), None, ready._change(cheat, seed), seed=seed,
            mix=(1.0, 0.0, 0.0), price=lambda lane: 0.01, own_stream=False,
        )  # fmt: skip
        assert result.control is not None
        run = result.seeds_run
        assert result.control.differences == pytest.approx(row["gains"][:run], abs=1e-6)
        assert gate_ruling(row["gains"], ready.plan.settings.gate) == (result.accepted, run)
        ends.add(run)
    assert len(ends) > 1, "one of them ended early"


def test_wide_calls_measure_the_same(plan: Plan, ready: Calibration) -> None:
    """As on a GPU: trials of several kinds and lengths in one batch, to rounding."""
    wide = Calibration(plan, wide=True)
    wide.prepare()
    trials = [Trial(LUCK, "beta", "late", 0, 2, 2), Trial("lr x2", "alpha", "early", 0, 4, 2)]
    tasks = [wide.attempt(t, at) for t, at in zip(trials, wide.places, strict=True)]
    for trial, row in zip(trials, wide.scheduler.run(tasks), strict=True):
        (alone,) = ready.scheduler.run([ready.attempt(trial, ready.places[0])])
        assert row["gains"] == pytest.approx(alone["gains"], abs=2e-6)
        assert row["test"] == pytest.approx(alone["test"], abs=2e-6)


# -- plans and records ---------------------------------------------------------------------------


def test_every_part_of_a_plan_is_as_far_as_the_others_at_any_time(plan: Plan) -> None:
    trials = plan_trials(replace(plan, trials=240))
    assert len({trial.key for trial in trials}) == len(trials)
    count = {cheat: sum(t.cheat == cheat for t in trials) for cheat in (LUCK, ROUNDING, NOTHING)}
    assert count == {LUCK: 240, ROUNDING: 60, NOTHING: 30}
    half = trials[: len(trials) // 2]
    assert sum(t.cheat == LUCK for t in half) == pytest.approx(120, abs=6)
    assert (2, 2) not in lengths(plan.settings.gate) and (16, 2) in lengths(plan.settings.gate)


@pytest.fixture(scope="module")
def short(plan: Plan) -> Plan:
    return replace(plan, settings=replace(plan.settings, phase1_steps=2))


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of few trials, none of them long."""
    everything = plan_trials

    def chosen(plan: Plan) -> list[Trial]:
        return [t for t in everything(plan) if t.horizon == 2 and t.domain != "gamma"][:10]

    monkeypatch.setattr(calibration, "plan_trials", chosen)


def test_a_calibration_goes_on_and_company_does_not_matter(
    short: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    file, seen = tmp_path / "trials.jsonl", list[tuple[int, int]]()
    whole = calibrate(short, file, progress=lambda *at: seen.append(at))
    assert (whole.planned, whole.made, len(whole.rows)) == (10, 10, 10)
    assert seen[-1] == (10, 10)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:40])
    seen.clear()
    resumed = calibrate(replace(short, at_once=1), file, progress=lambda *at: seen.append(at))
    assert resumed.made == 6 and resumed.rows == whole.rows
    assert seen == [(n, 10) for n in range(5, 11)]
    monkeypatch.setattr(calibration, "Calibration", None)  # nothing is trained any more
    assert calibrate(short, file).rows == whole.rows
    assert calibrate(replace(short, trials=60), file, max_seconds=0.0).made == 0

    with pytest.raises(K1Error, match="other seed: name another file"):
        calibrate(replace(short, seed=1), file)
    with pytest.raises(K1Error, match="other settings: name another file"):
        calibrate(replace(short, settings=quick()), file)


def test_records_of_other_systems_are_not_gone_on_with(
    short: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(monkeypatch)
    file = tmp_path / "trials.jsonl"
    calibrate(short, file)
    head, first, *_ = file.read_text().splitlines()
    row = {**json.loads(first), "state": "0" * 16}
    file.write_text(f"{head}\n{json.dumps(row)}\n")
    with pytest.raises(K1Error, match="trials of other systems"):
        calibrate(short, file)


def test_impossible_plans_are_refused(plan: Plan) -> None:
    for bad in ({"trials": 0}, {"at_once": 0}):
        with pytest.raises(K1Error, match="1 or more"):
            replace(plan, **bad)


# -- the report ----------------------------------------------------------------------------------


def row(cheat: str, gains: list[float], number: int, **more: Any) -> dict[str, Any]:
    return {
        "cheat": cheat, "domain": "a", "age": "early", "number": number, "horizon": 60,
        "anneal": 30, "gains": gains, "test": [g / 2 for g in gains], "fell": True, "state": "",
        "lane_steps": 1440, **more,
    }  # fmt: skip


def test_the_tables_say_what_the_records_say() -> None:
    from k1env.gate import GateConfig

    noise = [0.001, -0.001, 0.002, -0.002, 0.0005, -0.0005, 0.001, -0.001]
    rows = [row(NOTHING, [0.0] * 8, n) for n in range(3)]
    rows += [row(LUCK, [(-1) ** n * x for x in noise], n) for n in range(4)]
    rows += [row("lr x2", [0.01 + x for x in noise], n) for n in range(4)]
    found = {table.title: table for table in tables(rows, GateConfig())}
    false = {(r[0], r[1]): r for r in found["False acceptances"].rows}
    high = f"{clopper_pearson(0, 3)[1]:.1%}"
    assert false[NOTHING, "all"][2:4] == (f"0 of 3 = 0.0% (0.0% to {high})", "3 of 3")
    assert false[LUCK, "all"][3] == "0 of 4"
    naive = {r[0]: r for r in found["Naive rules beside it"].rows}
    assert naive["K-1's gate"][3] == "0" and naive["validation got better"][3:] == ("3", "18")
    assert naive["one seed: loss lower"][2].startswith("2 of 4 = 50.0%")
    gains = dict(found["Acceptance by what a change is worth"].rows)
    assert gains["+0.7 % to +1.5 %"].startswith("4 of 4")
    assert gains["below +0.0 %"] == "-"
    kept = {r[0]: r for r in found["Gain claimed and gain kept"].rows}
    assert kept["accepted"][1:4] == ("4", "+1.00 %", "+0.50 %")
    seeds = {r[:2]: r for r in found["Replicates and margin"].rows}
    assert seeds["8", "+0.10 %"][5] == "100%" and seeds["8", "+0.10 %"][6:8] == ("4", "1,440")
    page = markdown(list(found.values()), "python x", ["About."])
    assert all(f"## {title}" in page for title in found) and "```bash\npython x\n```" in page


def test_a_report_of_nothing_is_empty_and_no_error(plan: Plan) -> None:
    assert all(table.title for table in tables([], plan.settings.gate))


# -- the command line ----------------------------------------------------------------------------


def test_the_command_line_writes_its_page_and_goes_on(tmp_path: Path) -> None:
    text, file = write_text(tmp_path / "text"), tmp_path / "trials.jsonl"
    options = ["--preset", "tiny", "--data", text, "--device", "cpu", "--trials", "1"]
    page, out = tmp_path / "gate.md", tmp_path / "gate.json"
    done = call(
        SCRIPT, *options, "--max-minutes", "0.0001", "--records", file, "--markdown", page,
        "--json", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 of 114 trials" in page.read_text() and json.loads(out.read_text())["trials"] == []
    assert "--records FILE" in page.read_text()
    other = call(SCRIPT, *options, "--seed", "1", "--records", file)
    assert other.returncode == 2 and "other seed" in other.stderr
    assert other.stderr.count("\n") == 1
