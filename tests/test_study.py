"""The study of time to loss: its runs, its record, its statistics, its command line."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy import stats

from k1.attribution import NEVER
from k1.bench.counters import flops_per_step, updated_per_step, visit_spread
from k1.bench.methods import METHODS, choose_methods
from k1.bench.study import LONGEST, MOST_TRIALS, Plan, Situation, Study, schedule
from k1.bench.study_report import (
    at_step,
    half_width,
    markdown,
    mean_bits,
    step_reaching,
    tables,
)
from k1.errors import ConfigError
from k1.flops import step_flops
from k1.trainer import Trainer
from tests.phase2_helpers import ROOT, call
from tests.reference import same_bits, small_config

BY_NAME = {method.name: method for method in METHODS}
SCRIPT = ROOT / "scripts" / "time_to_loss.py"


@pytest.fixture
def study(data):
    def build(methods="sparse", **plan) -> Study:
        fields = {
            "steps": 8, "seeds": (1, 2, 3), "tune_seed": 0, "methods": choose_methods(methods),
            "old": "alpha", "new": "beta", **plan,
        }  # fmt: skip
        return Study(small_config(), data, "cpu", Plan(**fields), lambda line: None)

    return build


def scratch(study: Study) -> Situation:
    return study._situation("scratch")


# -- runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "sparse", "random", "visits", "bcd-10", "top-20"])
def test_a_lane_of_the_study_is_the_run_alone(study, data, name):
    study, method = study(), BY_NAME[name]
    situation = scratch(study)
    study.record["situations"]["scratch"] = {"methods": {}}
    result = study._runs(method, situation, 2e-3, [1.0, 1.0])
    alone = Trainer(method.configure(study.config), data, seed=2)
    alone.arena.set_hyper(0, "lr", 2e-3)
    engine = method.engine(alone.arena, alone.store, None)
    steps = result["curve"]["steps"]
    assert steps == [0, *schedule(8, 8)]
    for point, step in enumerate(steps):
        engine.train(0, 1, step - alone.steps)
        for domain, bits in alone.evaluate().items():
            assert result["curve"]["bits"][domain][point][1] == bits
    assert len({bits[1] for bits in zip(*result["curve"]["bits"]["alpha"], strict=True)}) > 1


def test_trained_trees_start_anew_but_for_their_weights(study):
    study = study(seeds=(1, 2), steps=30)
    situation = study._situation("new-domain")
    assert set(situation.start) == {0, 1, 2} and situation.target == ("beta",)
    assert situation.mix == (0.0, 1.0, 0.0)
    engine = study.engine(BY_NAME["top-20"], situation, [(2, 3e-3), (1, 1e-3)])
    arena = engine.arena
    fresh = study.engine(BY_NAME["top-20"], scratch(study), [(2, 3e-3), (1, 1e-3)]).arena
    for name in set(arena.state) - {"weight", "shared", "data_cursor", "mix"}:
        assert same_bits(arena[name], fresh[name]), name
    assert (arena["last_culprit"] == NEVER).all() and arena.host_top_k == [20, 20]
    assert not torch.equal(arena["weight"], fresh["weight"])
    before = study.record["before"]["bits"]
    measured = study.measure(engine, "validation")
    assert [measured["alpha"][lane] for lane in (1, 0)] == before["alpha"][1:]
    assert max(before["alpha"]) < min(study.measure(_arena_only(engine, fresh), "gate")["alpha"])


def _arena_only(engine, arena):
    return type(engine)(arena, engine.store, 1)


def test_a_cheap_method_runs_until_it_has_used_what_dense_did(study):
    study = study()
    situation = scratch(study)
    dense = {"step_flops": 100.0, "step_seconds": 1.0}
    study.record["situations"]["scratch"] = {"methods": {"dense": dense}}
    assert study._steps_needed(situation, 40.0, 1.0) == 20
    assert study._steps_needed(situation, 100.0, 0.4) == 20
    assert study._steps_needed(situation, 200.0, 2.0) == 8
    assert study._steps_needed(situation, 1.0, 1.0) == 8 * LONGEST


def test_flops_follow_the_blocks_that_were_updated(study):
    study = study()
    for name, updated in (("sparse", 4), ("top-20", 7), ("bcd-10-path", None)):
        engine = study.engine(BY_NAME[name], scratch(study), [(1, 1e-3), (2, 1e-3)])
        engine.train(0, 2, 14)
        if updated is None:
            updated = sum(engine.path_blocks) / 28
            assert 1 < updated < 3
        else:
            assert updated_per_step(engine) == updated
        assert flops_per_step(engine) == pytest.approx(
            step_flops(engine.arena.config, 256, 7, updated)
        )


def test_visits_are_summed_up_over_the_blocks_that_may_be_visited(study):
    study = study()
    engine = study.engine(BY_NAME["sparse"], scratch(study), [(1, 1e-3)])
    assert visit_spread(engine) is None
    leaf = engine.arena.index(0, 1)[2].offset
    engine.arena["visits"][0, leaf : leaf + 3] = torch.tensor([2, 1, 1])
    assert visit_spread(engine) == [{"most": 0.5, "entropy": 1.5, "visited": 3, "of": 4}]
    coordinate = study.engine(BY_NAME["bcd"], scratch(study), [(1, 1e-3)])
    coordinate.arena["visits"][0, 0] = 5
    assert visit_spread(coordinate) == [{"most": 1.0, "entropy": 0.0, "visited": 1, "of": 7}]


def test_the_learning_rate_is_chosen_on_the_gate_pool_and_the_grid_grows_at_its_edge(study):
    study = study()
    asked = []

    def bits(engine, situation, pool):
        rates = [engine.arena.get_hyper(lane)["lr"] for lane in range(engine.arena.lanes)]
        asked.append((pool, [round(rate, 6) for rate in rates]))
        assert (engine.arena["data_seed"] == engine.arena["data_seed"][0]).all()
        return [abs(math.log(rate / best)) if rate < 1 else math.nan for rate in rates]

    study.target_bits = bits
    study.train = lambda engine, steps: None
    best = 1e-3
    assert study.tune(BY_NAME["dense"], scratch(study), 5)[0] == 1e-3
    assert asked == [("gate", [4e-4, 1e-3, 2.5e-3])]
    best = 6e-3
    lr, trials = study.tune(BY_NAME["dense"], scratch(study), 5)
    assert lr == 2.5e-3 * 2.5 and len(trials) == MOST_TRIALS
    best = 1e-6
    lr, trials = study.tune(BY_NAME["dense"], scratch(study), 5)
    assert lr == min(trials) and len(trials) == MOST_TRIALS


def test_the_schedule_is_shared_and_grows_by_ratios():
    short, long = schedule(600, 600), schedule(600, 2000)
    assert short == long[: len(short)] and short[0] == 38 and short[-1] == 600
    assert long[-1] == 2000 and all(b / a < 1.5 for a, b in pairwise(long))
    assert schedule(2, 2) == [1, 2]


def test_a_study_records_every_method_and_stops_in_time(study, monkeypatch):
    for name in ("TIMED", "TIMED_STEPS", "MOST_TRIALS"):
        monkeypatch.setattr(f"k1.bench.study.{name}", 2)
    saved = []
    whole = study("sparse,bcd-10", steps=4, seeds=(1, 2))
    whole.run(lambda record: saved.append(json.loads(json.dumps(record, allow_nan=False))))
    assert len(saved) == 3 * 2 + 1 and saved[-1]["stopped"] is None
    for situation in ("scratch", "new-domain"):
        methods = saved[-1]["situations"][situation]["methods"]
        assert list(methods) == ["dense", "sparse", "bcd-10"]
        assert list(saved[0]["situations"]["scratch"]["methods"]) == ["dense"]
        assert methods["dense"]["visits"] is None and methods["dense"]["updated_blocks"] == 7
        assert sum(v["entropy"] > 0 for v in methods["sparse"]["visits"]) == 2
        assert {len(bits) for bits in methods["sparse"]["curve"]["bits"]["gamma"]} == {2}
    text = markdown(saved[-1] | {"command": "x", "device": "cpu", "versions": "y"})
    assert text.count("| bcd-10 |") == 1 + 3 + 4 and "optimizer moments" in text
    late = study(seconds=0.0)
    late.run(saved.append)
    assert "time was used up" in saved[-1]["stopped"]
    assert tables(saved[-1]) == {}


def test_impossible_plans_are_refused(study):
    with pytest.raises(ConfigError, match=r"no domain 'code'.*alpha, beta, gamma"):
        study(old="code")
    with pytest.raises(ConfigError, match="unknown situation 'war'"):
        study(situations=("war",))
    with pytest.raises(ConfigError, match="tuned"):
        study(seeds=(0, 1))


# -- statistics ---------------------------------------------------------------------------------


def fake(steps, *lanes, flops=100.0, seconds=1.0):
    bits = [list(point) for point in zip(*lanes, strict=True)]
    return {
        "what": "a test", "lr": 1e-3, "edge": False, "trials": {}, "step_seconds": seconds,
        "step_seconds_quartiles": [seconds, seconds], "step_flops": flops, "updated_blocks": 4.0,
        "skipped": 0, "visits": None, "curve": {"steps": steps, "bits": {"a": bits, "b": bits}},
    }  # fmt: skip


def test_values_between_evaluations_follow_the_logarithm_of_the_step():
    method = fake([0, 3, 15], [8.0, 4.0, 2.0], [8.0, 6.0, 5.0])
    bits = mean_bits(method, ["a"])
    assert at_step(method, bits, 7) == pytest.approx([3.0, 5.5])
    assert at_step(method, bits, 15) == pytest.approx([2.0, 5.0])
    assert at_step(method, bits, 16) is None
    reached = step_reaching(method, bits, [3.0, 4.9])
    assert reached[0] == pytest.approx(7) and math.isnan(reached[1])
    assert step_reaching(method, bits, [9.0, 9.0]) == [0.0, 0.0]


def test_the_interval_is_that_of_a_paired_t_test():
    ours, theirs = [2.1, 2.3, 2.2, 2.6], [2.0, 2.1, 2.2, 2.2]
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert half_width(each) == pytest.approx((high - low) / 2)
    assert math.isnan(half_width([1.0]))


def test_methods_are_compared_at_equal_compute_and_at_equal_time():
    """Half the FLOPs but the same time per step: 7 dense steps are 14 of its own by FLOPs."""
    record = {
        "old": "b", "new": "a", "steps": 7, "situations": {
            "scratch": {
                "target": ["a", "b"],
                "methods": {
                    "dense": fake([0, 1, 3, 7], [8, 6, 4, 3], [8, 6, 4, 3.2]),
                    "half": fake([0, 1, 7, 15], [8, 7, 5, 2.9], [8, 7, 5, 3.1], flops=7 / 15 * 100),
                    "short": fake([0, 3, 7], [8, 7, 6], [8, 7, 3], flops=50.0),
                    "lost": fake([0, 7], [8, None], [8, 3]),
                },
            }
        },
    }  # fmt: skip
    cost, flops, seconds = tables(record)["scratch"]
    assert [row[5] for row in cost.rows] == ["1.00", "0.47", "0.50", "1.00"]
    by_flops = {row[0]: row[1:] for row in flops.rows}
    by_time = {row[0]: row[1:] for row in seconds.rows}
    assert by_flops["dense"][2:] == ["3.100 ± 0.141", "-", "1.00"]
    assert by_flops["half"][2] == "3.000 ± 0.141" and by_flops["half"][3].startswith("-0.100 ±")
    assert by_time["half"][2] == "5.000 ± 0.000" and by_time["half"][3].startswith("+1.900")
    assert 1 < float(by_time["half"][4]) < 15 / 7
    assert by_flops["short"][2:4] == ["-", "-"] and by_flops["short"][4].endswith("(1 of 2 seeds)")
    assert by_flops["lost"][2] == "nan" and by_flops["lost"][4] == "0.91 (1 of 2 seeds)"


# -- command line -------------------------------------------------------------------------------


def test_the_command_writes_its_record_and_its_report(tmp_path: Path):
    import numpy as np

    letters = np.random.default_rng(0).choice(list("abcde \n"), 12_000)
    for domain in ("one", "two"):
        (tmp_path / "text" / domain).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            words = "".join(letters).replace("\n\n", "\n")
            pieces = [words[i : i + 600].strip() for i in range(0, len(words), 600)]
            (tmp_path / "text" / domain / f"{split}.txt").write_text(
                "\n\n".join(f"{domain} {split} {n} {piece}" for n, piece in enumerate(pieces))
            )
    options = ["--preset", "tiny", "--device", "cpu", "--data", tmp_path / "text", "--seeds", "2",
               "--steps", "2", "--methods", "dense"]  # fmt: skip
    done = call(SCRIPT, *options, "--situations", "scratch", "--json", tmp_path / "out" / "a.json",
                "--markdown", tmp_path / "out" / "a.md")  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["command"].startswith("python ") and "PyTorch" in record["versions"]
    assert list(record["situations"]["scratch"]["methods"]) == ["dense"]
    text = (tmp_path / "out" / "a.md").read_text()
    assert text.startswith("## Time to loss") and "time_to_loss.py --preset tiny" in text
    assert "From scratch" in done.stdout and "equal FLOPs" in done.stdout
    wrong = call(SCRIPT, *options)
    assert wrong.returncode == 2 and "no domain 'code'" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
