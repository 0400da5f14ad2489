"""Controllers of Phase 2 in the comparison in continual learning."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from k1.data import TextData
from k1.errors import ConfigError, K1Error
from k1.experiments.learner import Run
from k1.experiments.method import FULL, Method
from k1.experiments.methods import METHODS, choose_methods
from k1.experiments.plans import choose_experiment
from k1.experiments.report import tables
from k1.experiments.runner import Conditions, open_rows, run_experiment
from k1.flops import measuring_flops, step_flops
from k1.sampling import TokenStore
from k1env.seating import seat
from k1env.wide import Wide
from policies import continual
from policies.continual import CONTROLLED, WINDOWS, ControlledLearner
from policies.learned import SHIPPED
from tests.experiment_helpers import ORDER, SPARE, Build
from tests.phase2_helpers import ROOT, call
from tests.reference import same_bits, small_config

SCRIPT = ROOT / "scripts" / "experiment.py"
STEPS = 60


class Does:
    """Takes one action at its first decision, by its label, and trains on after that."""

    reason = "told so"

    def __init__(self, actions, label):
        self.index, self.shown = list(actions).index(label), []

    def act(self, observation, info):
        self.shown.append((info["seen"], observation["domains"].reshape(-1, 4)[:, 1].tolist()))
        return self.index if len(self.shown) == 1 else 0

    def state_dict(self):
        return {}


class Told(ControlledLearner):
    """Its controllers do as they are told; what came of it is kept."""

    def __init__(self, *args, label, **kwargs):
        self.label, self.outcomes = label, []
        super().__init__(*args, controller="noop", **kwargs)

    def make_policy(self, actions, seed):
        return Does(actions, self.label)

    def _decide(self, lane):
        yield from super()._decide(lane)
        self.outcomes.append(self.session(lane).last)

    def session(self, lane=0):
        return self._controlled[lane].life.session


def told(data: TextData, label: str = "no-op", **sections) -> Told:
    config = small_config(**{**SPARE, **sections})
    store = TokenStore(data, config.model.context, "cpu")
    method = Method("k1-told", "for tests", FULL, learner=Told, options={"label": label})
    runs = [Run("k1-told", ORDER, 1, 3e-3)]
    return Told(method, config, store, data.vocab_size, runs, "cpu", label=label)


def experiment(*methods: str):
    return choose_experiment("ci", methods=methods, steps=12)


def rows_of(data: TextData, *methods: str, more=(), seeds: int = 1):
    known = {**METHODS, **CONTROLLED, **{method.name: method for method in more}}
    conditions = Conditions(data, "builtin", "cpu", methods=known)
    plan = replace(experiment(*methods), seeds=seeds)
    return run_experiment(plan, conditions, open_rows(plan, conditions, None))


def plain(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "lanes")} for row in rows]


def test_rows_have_all_that_tables_need(data: TextData):
    rows = rows_of(data, "dense", *CONTROLLED)
    by_method = {row["method"]: row for row in rows}
    assert json.loads(json.dumps(rows)) == rows
    for name in CONTROLLED:
        row = by_method[name]
        assert by_method["dense"].keys() <= row.keys()
        assert [len(row["bits"][view]) for view in ("windows", "passages")] == [4, 4]
        assert row["curve"][-1][1] == row["bits"]["windows"][-1]
        assert row["bits"]["windows"][0] == by_method["dense"]["bits"]["windows"][0]
    idle = by_method["k1-noop"]
    assert idle["tried"] == 0 and idle["blocks"] == by_method["dense"]["blocks"]
    assert by_method["k1-heuristic"]["tried"] > 0
    assert by_method["k1-ppo"]["made_by"] and idle["made_by"] is None
    assert idle["hyper"]["lr"] == pytest.approx(idle["lr"])
    text = "".join(table.shown().title or "" for table in tables(rows, "dense"))
    assert "random windows" in text


def test_who_does_nothing_trains_as_a_full_path_at_a_constant_rate(data: TextData):
    idle, path = told(data), Build(data)("k1-full-path")
    for phase in range(3):
        idle.begin(phase)
        idle.train(0, STEPS, STEPS)
        path.begin(phase)
        main = idle.session().main
        path.engine.train(0, 1, idle.session().trainer.steps - path.arena.host_step[0])
        for name in ("weight", "shared", "evidence", "data_cursor"):
            assert same_bits(idle.session().arena[name][main], path.arena[name][0]), name
    assert path.arena.host_step[0] > STEPS


def measuring(learner: Told, windows: int) -> float:
    a = learner.arena
    return measuring_flops(a.config, a.vocab_size, len(a.trees[0].blocks), windows)


@pytest.mark.parametrize("label", ["no-op", "tune lr x2", "add under slot 1"])
def test_all_that_is_executed_is_charged_and_phases_end_on_it(data: TextData, label: str):
    learner = told(data, label, train={"top_k": 2})  # every step moves the root and a whole path
    unit = learner.step_flops()
    assert unit == step_flops(learner.arena.config, data.vocab_size, 7, 3)
    before, blocks = 0.0, 7 + (label == "add under slot 1")
    for phase in range(3):
        learner.begin(phase)
        for done in (0, STEPS // 2):
            learner.train(done, STEPS // 2, STEPS)
        session, a = learner.session(), learner.arena
        trials = [outcome.trial for outcome in learner.outcomes if outcome.trial]
        most = 4 * 8 / 7 * unit + measuring(learner, 3 * a.config.train.eval_windows)
        most += sum(t.lane_steps * unit + 2 * t.seeds_run * measuring(learner, WINDOWS)
                    for t in trials)  # fmt: skip
        assert 0 <= learner.flops[0] - (phase + 1) * STEPS * unit <= most
        assert learner.flops[0] - before == pytest.approx(STEPS * unit, abs=most)
        before = learner.flops[0]
    assert len(trials) == (label == "tune lr x2")
    looks = (session.decision + 1) * measuring(learner, 3 * a.config.train.eval_windows)
    scores = sum(2 * t.seeds_run * measuring(learner, WINDOWS) for t in trials)
    if label == "add under slot 1":  # half of the lane steps are the shadow's, of the old tree
        looks += session.decision * (measuring_flops(a.config, data.vocab_size, blocks, 12)
                                     - measuring(learner, 12))  # fmt: skip
        grown = step_flops(a.config, data.vocab_size, blocks, 3)
        trained = session.spent / 2 * (unit + grown)
    else:
        trained = session.spent * unit
    assert before == pytest.approx(trained + looks + scores)
    assert (session.shadow_diverged, session.tree.agents) == (blocks == 8, blocks - 1)


def test_many_lanes_in_one_call_are_charged_as_each_by_itself(data: TextData, monkeypatch):
    alone, wide = told(data, "tune lr x2"), told(data, "tune lr x2")
    for learner in (alone, wide):
        for phase in range(2):
            learner.begin(phase)
            learner.train(0, STEPS, STEPS)
        monkeypatch.setattr(continual, "seat", lambda *a, wide: seat(*a, wide=True))
    assert alone.flops == pytest.approx(wide.flops) and alone.moved == pytest.approx(wide.moved)
    assert wide.session().scheduler.calls.__class__ is Wide
    assert wide.session().tries == alone.session().tries


def test_an_agent_that_is_added_shows_in_the_row(data: TextData):
    grow = Method("k1-told", "", FULL, learner=Told, options={"label": "add under slot 0"})
    (row,) = rows_of(data, "k1-told", more=[grow])
    assert row["blocks"] == 10 and row["tried"] == 0  # a node and its two leaves
    (idle,) = rows_of(data, "k1-noop")
    assert row["parameters"] > idle["parameters"] and row["trained"] < idle["trained"]


def test_the_text_shifts_with_the_phase_and_the_controller_sees_it(data: TextData):
    learner = told(data)
    learner.begin(0)
    learner.train(0, STEPS, STEPS)
    first, session = learner.session().decision, learner.session()
    assert session.seen == ORDER[:1]
    learner.begin(1)
    learner.train(0, STEPS, STEPS)
    shown = learner._policies[0].shown
    assert [seen for seen, _ in shown[first - 1 : first + 1]] == [list(ORDER[:1]), list(ORDER[:2])]
    assert [rows for _, rows in shown[first - 1 : first + 1]] == [[1, 0, 0, 0], [1, 1, 0, 0]]
    shares = session.arena["mix"][session.main].tolist()
    assert shares == [float(domain == ORDER[1]) for domain in data.domains]


def test_a_system_whose_episode_is_over_trains_on(data: TextData):
    learner = told(data)
    learner.begin(0)
    learner.train(0, STEPS, STEPS)
    session = learner.session()
    session.end("the controller stopped")
    learner._controlled[0].life.over = True
    decisions, steps = session.decision, session.trainer.steps
    for phase in (1, 2):
        learner.begin(phase)
        learner.train(0, STEPS, STEPS)
    assert session.decision == decisions and session.trainer.steps > 2.5 * steps
    assert learner.flops[0] == pytest.approx(3 * STEPS * learner.step_flops(), rel=0.05)
    shares = session.arena["mix"][session.main].tolist()
    assert shares == [float(domain == ORDER[2]) for domain in data.domains]
    assert learner.remarks(0)["ended"] == "the controller stopped"


def test_a_run_is_reproducible_alone_and_among_others(data: TextData):
    both = rows_of(data, "k1-heuristic", seeds=2)
    assert plain(rows_of(data, "k1-heuristic")) == plain(both[:1])
    assert plain(rows_of(data, "k1-heuristic", seeds=2)) == plain(both)


def test_controllers_that_cannot_be_had_are_refused(data: TextData, tmp_path: Path):
    def method(controller):
        options = {"controller": str(controller)}
        return Method("k1-other", "", FULL, learner=ControlledLearner, options=options)

    with pytest.raises(K1Error, match="unknown policy 'nobody'"):
        rows_of(data, "k1-other", more=[method("nobody")])
    folder = tmp_path / "weights"
    shutil.copytree(SHIPPED, folder)
    assert rows_of(data, "k1-other", more=[method(folder)])
    tensors = folder / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(K1Error, match="weights"):
        rows_of(data, "k1-other", more=[method(folder)])
    with pytest.raises(ConfigError, match=r"no method 'k1-x': .*k1-noop"):
        choose_methods(["k1-x"], {**METHODS, **CONTROLLED})


def test_the_command_compares_controllers(tmp_path: Path):
    results = tmp_path / "rows.jsonl"
    options = ["--quick", "--device", "cpu", "--seeds", "1", "--steps", "8", "--results", results]
    done = call(SCRIPT, *options, "--methods", "dense,k1-noop,k1-ppo")
    assert done.returncode == 0, done.stderr
    assert "k1-ppo: 1 runs" in done.stdout and "executed FLOPs" in done.stdout
    assert len(results.read_text().splitlines()) == 4
