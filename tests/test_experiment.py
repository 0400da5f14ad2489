"""Experiments: plans, rows that are neither lost nor doubled, tables, and the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from k1.data import TextData
from k1.errors import ConfigError, K1Error
from k1.experiments import methods, pictures
from k1.experiments.methods import METHODS
from k1.experiments.page import read_results
from k1.experiments.plans import EXPERIMENTS, Experiment, choose_experiment
from k1.experiments.runner import Conditions, open_rows, run_experiment
from k1.experiments.tuning import read_tuned
from k1.row_file import RowFile
from policies.continual import CONTROLLED
from tests.phase2_helpers import ROOT, call
from tests.test_experiment_report import ROWS, row

SCRIPT = ROOT / "scripts" / "experiment.py"
SHORT = Experiment(
    "short",
    "for tests",
    ("dense", "k1-evidence-grow"),
    preset="tiny",
    sections={"model": {"spare": 1.0}, "train": {"eval_windows": 4}},
    steps=4,
    rates=(1e-3, 3e-3),
    seeds=2,
    orders="1,2",
    checks=(0.5,),
    passage=2,
)


@pytest.fixture
def conditions(data: TextData) -> Conditions:
    return Conditions(data, "builtin", "cpu")


def test_plans_name_methods_that_there_are():
    assert len({e.name for e in EXPERIMENTS}) == len(EXPERIMENTS)
    for experiment in EXPERIMENTS:
        assert methods.choose_methods(experiment.methods, {**METHODS, **CONTROLLED})
        experiment.config("builtin")
        assert json.dumps(experiment.settings())


def test_seeds_take_the_orders_in_turn():
    runs = SHORT.runs(METHODS["dense"], [("a", "b"), ("b", "a")])
    assert [(r.seed, r.order, r.lr) for r in runs] == [
        (1, ("a", "b"), 1e-3), (1, ("a", "b"), 3e-3), (2, ("b", "a"), 1e-3), (2, ("b", "a"), 3e-3),
    ]  # fmt: skip
    assert len(SHORT.runs(METHODS["ewc"], [("a", "b")])) == 2 * 2 * len(METHODS["ewc"].strengths)


def test_impossible_plans_are_refused():
    with pytest.raises(ConfigError, match="no experiment 'x': choose from ci"):
        choose_experiment("x")
    with pytest.raises(ConfigError, match="a step and a seed"):
        choose_experiment("ci", steps=0)
    with pytest.raises(ConfigError, match="learning rates"):
        choose_experiment("ci", rates=(math.nan,))


def test_methods_run_for_as_many_flops_as_dense(conditions: Conditions):
    rows = run_experiment(SHORT, conditions, open_rows(SHORT, conditions, None))
    steps = {row["method"]: row["steps"] for row in rows}
    assert steps["dense"] == [4, 4, 4]
    flops = {row["method"]: row["flops"] for row in rows}
    assert flops["k1-evidence-grow"] / flops["dense"] == pytest.approx(1, abs=0.15)
    grown = next(row for row in rows if row["method"] == "k1-evidence-grow")
    assert grown["blocks"] == 13  # two more nodes with two leaves each
    assert all(len(row["curve"]) == 6 for row in rows)
    assert all(row["memory"] is None for row in rows)  # counted on CUDA alone
    assert all(row["curve"][-1][1] == row["bits"]["windows"][-1] for row in rows)


def test_cheap_steps_are_limited(conditions: Conditions, monkeypatch: pytest.MonkeyPatch):
    plan = replace(SHORT, methods=("mixture",), rates=(1e-3,), seeds=1, steps=2)
    monkeypatch.setattr("k1.experiments.runner.budget", lambda learner, experiment: math.inf)
    (row,) = run_experiment(plan, conditions, open_rows(plan, conditions, None))
    assert row["steps"] == [6, 6, 6]


def test_a_resumed_experiment_has_the_same_rows_once(conditions: Conditions, tmp_path: Path):
    whole = run_experiment(SHORT, conditions, open_rows(SHORT, conditions, tmp_path / "a"))
    file = tmp_path / "b"
    part = replace(SHORT, seeds=1, methods=("k1-evidence-grow",))
    assert len(run_experiment(part, conditions, open_rows(part, conditions, file))) == 2
    text = file.read_text()
    file.write_text(text + '{"method": "den')  # a crash
    again = run_experiment(SHORT, conditions, open_rows(SHORT, conditions, file))
    assert len(again) == 8 and file.read_text().startswith(text)
    assert len(file.read_text().splitlines()) == 9

    def plain(rows):
        return [{k: v for k, v in row.items() if k not in ("seconds", "lanes")} for row in rows]

    assert plain(again) == plain(whole)
    before = file.read_bytes()
    assert run_experiment(SHORT, conditions, open_rows(SHORT, conditions, file)) == again
    assert file.read_bytes() == before


def test_what_is_out_of_time_leaves_no_row(conditions: Conditions, tmp_path: Path):
    late = replace(conditions, deadline=-1.0)
    assert run_experiment(SHORT, late, open_rows(SHORT, late, tmp_path / "a")) == []
    assert len((tmp_path / "a").read_text().splitlines()) == 1


def test_results_of_something_else_are_refused(conditions, tmp_path, monkeypatch):
    file = tmp_path / "a"
    one = replace(SHORT, methods=("dense",), seeds=1, rates=(1e-3,))
    run_experiment(one, conditions, open_rows(one, conditions, file))
    open_rows(SHORT, conditions, file)  # more seeds and methods are welcome
    longer, test = replace(SHORT, steps=5), replace(conditions, pool="test")
    with pytest.raises(K1Error, match="other settings: name another file"):
        open_rows(longer, conditions, file)
    with pytest.raises(K1Error, match="other pool"):
        open_rows(SHORT, test, file)
    changed = replace(METHODS["dense"], replay=0.5)
    monkeypatch.setitem(METHODS, "dense", changed)
    with pytest.raises(K1Error, match="dense that is defined otherwise"):
        open_rows(SHORT, conditions, file)


def test_a_row_file_keeps_each_row_once_and_one_writer(tmp_path: Path):
    file = RowFile(tmp_path / "a", {"kind": "x"}, ("name", "at"))
    file.add({"name": "a", "at": [1, 2], "value": 3})
    with pytest.raises(ValueError, match="already"):
        file.add({"name": "a", "at": (1, 2), "value": 4})
    again = RowFile(tmp_path / "a", {"kind": "x"}, ("name", "at"))
    assert list(again.rows) == [("a", (1, 2))]
    with file.lock():
        message = refusal_of(again)
    assert "another process" in message
    with again.lock():
        pass
    (tmp_path / "a").write_text((tmp_path / "a").read_text() + '{"name": "a"}\n')
    with pytest.raises(K1Error, match="no record"):
        RowFile(tmp_path / "a", {"kind": "x"}, ("name", "at"))


def refusal_of(file: RowFile) -> str:
    with pytest.raises(K1Error) as caught, file.lock():
        pass
    return str(caught.value)


# -- the picture ---------------------------------------------------------------------------------


def test_evaluations_are_placed_within_their_phases():
    late = {"curve": [[0, [1]], [0, [1]], [0, [1]], [1, [1]], [1, [1]]]}
    assert pictures.moments(late, (0.25, 0.5)) == [0.25, 0.5, 1.0, 1.25, 2.0]


def test_the_anytime_curve_is_of_the_domains_met_so_far():
    assert pictures.anytime(ROWS[:2]).tolist() == [2.0, 3.75]


def test_frontiers_and_curves_are_drawn(tmp_path: Path):
    pytest.importorskip("matplotlib")
    diverged = row("lost", 1, 1.0, [[8, 8], [None, 7], [None, None]])
    pictures.plot([*ROWS, diverged], (), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<!-- calm (2) -->" in text and "<!-- lost (1) -->" in text
    pictures.plot([*ROWS, diverged], (), tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text() == text
    pictures.plot([], (), tmp_path / "none.svg")
    with pytest.raises(K1Error, match="end the name in one of"):
        pictures.plot(ROWS, (), tmp_path / "a.nope")


# -- the command ---------------------------------------------------------------------------------


def test_the_quick_experiment_runs_is_resumed_and_is_tuned_for_the_test_pool(tmp_path: Path):
    results = tmp_path / "tune.jsonl"
    short = ["--quick", "--device", "cpu", "--seeds", "1", "--steps"]
    options = [*short, "4", "--results", results]
    first = call(SCRIPT, *options, "--methods", "dense,k1-own-grow")
    assert first.returncode == 0, first.stderr
    assert len(results.read_text().splitlines()) == 3
    again = call(SCRIPT, *options, "--methods", "dense,k1-own-grow,ewc",
                 "--markdown", tmp_path / "results.md")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "ewc: 4 runs" in again.stdout and "dense: 1 runs" not in again.stdout
    page = (tmp_path / "results.md").read_text()
    assert page.startswith("# Results") and "k1-own-grow" in page and str(tmp_path) not in page
    told = call(SCRIPT, "--from", results, "--markdown", tmp_path / "again.md")
    assert told.returncode == 0, told.stderr
    assert "ewc: 4 runs" not in told.stdout
    assert (tmp_path / "again.md").read_text() == page
    assert {row["method"] for row in read_results(results, ("ewc", "dense")).rows} == {
        "dense",
        "ewc",
    }
    with pytest.raises(K1Error, match="has no runs of si"):
        read_results(results, ("si",))
    wrong = call(SCRIPT, *short, "7", "--results", results)
    assert wrong.returncode == 2 and "other settings" in wrong.stderr
    final = call(SCRIPT, *short, "4", "--methods", "dense,ewc", "--test", "--tuned", results,
                 "--results", tmp_path / "final.jsonl")  # fmt: skip
    assert final.returncode == 0, final.stderr
    rows = [json.loads(line) for line in (tmp_path / "final.jsonl").read_text().splitlines()]
    assert rows[0]["pool"] == "test" and len(rows) == 3  # one strength of ewc
    plan = choose_experiment("ci", methods=("ewc",), steps=4)
    best = read_tuned(results, plan, rows[0]["data"])
    assert rows[2]["strength"] == best["ewc"][1]
    with pytest.raises(K1Error, match="other data: name another file"):
        read_tuned(results, plan, "other text")


def test_the_command_refuses_what_makes_no_sense(tmp_path: Path):
    for options, reason in (
        (["nothing"], "no experiment"),
        (["--quick", "--test"], "give --tuned"),
        (["--quick", "--rates", "a"], "numbers apart by commas"),
        (["--quick", "--tuned", tmp_path / "none"], "there is no file"),
        (["--from", tmp_path / "none"], "there is no file"),
        (["ci", "--from", tmp_path, "--seeds", "2"], "--from makes no runs: leave name, seeds out"),
        (["--from", tmp_path / "a.jsonl", "--markdown", tmp_path / "a.jsonl"], "named twice"),
        (["--plot", tmp_path / "a.svg", "--markdown", tmp_path / "a.svg"], "named twice"),
        (["--quick", "--methods", ""], "no method ''"),
        (["--quick", "--plot", tmp_path / "a.nope"], "--plot"),
    ):
        done = call(SCRIPT, *options)
        assert done.returncode == 2 and reason in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_the_list_names_all(tmp_path: Path):
    done = call(SCRIPT, "--list")
    assert done.returncode == 0
    for name in (*METHODS, *CONTROLLED, *(e.name for e in EXPERIMENTS)):
        assert name in done.stdout
