"""Baselines: each does what its name says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k1.data import TextData
from k1.errors import K1Error
from k1env.env import Phase2Env
from k1env.schedule import Task
from k1env.vector import Phase2VectorEnv
from policies import lookahead, schedules
from policies.contestants import (
    EVERY,
    ByPolicy,
    default_policies,
    make_contestant,
    static_name,
)
from policies.episode import Life, play
from policies.lookahead import Lookahead
from policies.population import FACTORS, MEMBERS, READY, STARTS, PopulationBasedTraining
from policies.schedules import Constant, Cosine, Plateau, Static, best_static
from policies.simple import CheatPolicy, NoopPolicy, RandomLegalPolicy
from tests.evaluation_helpers import arena_for, episode, short_world
from tests.phase2_helpers import index_of


@pytest.fixture(scope="module")
def envs(data: TextData) -> Phase2VectorEnv:
    return arena_for(data, 2)


def watched(envs: Phase2VectorEnv, who: Any, monkeypatch: pytest.MonkeyPatch, **world: Any) -> Any:
    """Play an episode; returns the hyper-parameters that each decision was made with."""
    seen: list[dict[str, float]] = []
    step = Life.step

    def spy(life: Life, action: int) -> Task[None]:
        seen.append(life.session.arena.get_hyper(life.session.main))
        yield from step(life, action)

    monkeypatch.setattr(Life, "step", spy)
    return episode(envs, who, **world), seen


# -- policies ------------------------------------------------------------------------------------


def masks(possible: str, permitted: str) -> dict[str, Any]:
    return {
        "action_mask": np.array([*map(int, possible)], np.int8),
        "permitted_mask": np.array([*map(int, permitted)], np.int8),
    }


def test_random_legal_draws_all_that_is_permitted_and_nothing_else() -> None:
    policy, info = RandomLegalPolicy(0), masks("110111", "100011")
    assert {policy.act({}, info) for _ in range(200)} == {0, 4, 5}


def test_cheat_draws_all_that_is_forbidden_and_nothing_impossible() -> None:
    policy, info = CheatPolicy(0), masks("110111", "100010")
    assert {policy.act({}, info) for _ in range(200)} == {1, 3, 5}
    assert policy.act({}, masks("1001", "1001")) == 0


@pytest.mark.parametrize("make", [RandomLegalPolicy, CheatPolicy])
def test_their_memory_is_their_generator(make: Any) -> None:
    policy, info = make(3), masks("1" * 9, "111110000")
    state = json.loads(json.dumps(policy.state_dict()))
    drawn = [policy.act({}, info) for _ in range(20)]
    other = make(7)
    other.load_state_dict(state)
    assert [other.act({}, info) for _ in range(20)] == drawn


def test_in_an_episode_random_legal_tries_nothing_and_cheat_everything(
    envs: Phase2VectorEnv,
) -> None:
    legal = episode(envs, ByPolicy(RandomLegalPolicy(0)))
    assert (legal["tried"], legal["stage"]) == (0, 1)
    cheat = episode(envs, ByPolicy(CheatPolicy(0)), budget=30)
    assert cheat["tried"] == cheat["decisions"] > 0


# -- schedules -----------------------------------------------------------------------------------


def test_constant_is_training_on(envs: Phase2VectorEnv) -> None:
    one, other = episode(envs, Constant()), episode(envs, ByPolicy(NoopPolicy()))
    assert one.pop("return") is None
    assert other.pop("return") is not None
    assert one == other


def test_cosine_falls_from_the_start_to_a_tenth(
    envs: Phase2VectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, seen = watched(envs, Cosine(), monkeypatch, lr=2e-3)
    lr = [row["lr"] for row in seen]
    assert lr[0] == pytest.approx(2e-3)
    assert lr[6] == pytest.approx(2e-3 * 0.55)
    assert lr[4] == pytest.approx(2e-3 * (0.1 + 0.9 * 0.75))
    assert lr[11] == pytest.approx(2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 11 / 12)) / 2))
    assert len({row["top_k"] for row in seen}) == 1


class Told:
    """An episode of which only the validation loss is told."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}

    def __call__(self, *bits: float) -> Any:
        names = "abcd"[: len(bits)]
        self.info = {"bits_per_byte": dict(zip(names, bits, strict=True)), "seen": [*names]}
        return self


def test_plateau_halves_the_rate_after_its_patience_and_begins_anew_with_a_domain() -> None:
    told, start, rule = Told(), {"lr": 1.0}, Plateau()
    rates = [rule.settings(told(x), start)["lr"] for x in (4.0, 3.0, 2.9995, 3.1, 3.0, 3.0)]
    assert rates == [1.0] * 6, "four decisions without improvement"
    assert rule.settings(told(3.0), start)["lr"] == 0.5
    waits = [rule.settings(told(3.0), start)["lr"] for _ in range(5)]
    assert waits == [0.5] * 4 + [0.25]
    for _ in range(4):
        rule.settings(told(3.0), start)
    fresh = [rule.settings(told(3.0, 6.0), start)["lr"] for _ in range(5)]
    assert fresh == [0.25] * 5, "the new domain's loss is no failure to improve"
    assert rule.settings(told(3.0, 6.0), start)["lr"] == 0.125


def test_static_holds_its_setting_in_every_world(
    envs: Phase2VectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, seen = watched(envs, Static(4e-3, 3, 7), monkeypatch)
    assert {(round(r["lr"], 6), r["top_k"], r["cooldown"]) for r in seen} == {(4e-3, 3, 7)}


def test_static_comes_from_the_data_file(tmp_path: Path) -> None:
    file = tmp_path / "static.json"
    file.write_text(json.dumps({"cpu": {"best": {"lr": 0.01, "top_k": 2, "cooldown": 0}}}))
    assert best_static("cpu", file)._fixed == {"lr": 0.01, "top_k": 2, "cooldown": 0}
    with pytest.raises(K1Error, match=r"grid_search.py --preset tiny --write"):
        best_static("tiny", file)


def test_the_data_file_names_the_command_of_each_setting() -> None:
    for preset, found in schedules.known_statics().items():
        assert f"grid_search.py --preset {preset}" in found["command"]
        losses = found["bits_per_byte"]
        best = static_name(**found["best"])
        assert losses[best] == min(losses.values())


# -- lookahead -----------------------------------------------------------------------------------


def test_lookahead_leaves_the_system_as_a_plain_run_of_its_choices(
    envs: Phase2VectorEnv, monkeypatch: pytest.MonkeyPatch, data: TextData
) -> None:
    monkeypatch.setattr(lookahead, "EVERY", 3)
    who, env = Lookahead(), envs.envs[0]
    world = short_world(budget=40, lr=3e-4)
    found = envs.run([play(env, who, world, 2)])[0]
    assert found["flops"] <= found["budget_flops"]
    made = found["decisions"]
    assert made < 30, "the forks are charged"
    assert {label for label in who.chosen[:made] if label != "no-op"}

    plain = arena_for(data)
    single = plain.envs[0]

    class Repeats:
        within_bounds = False

        def play(self, life: Life) -> Task[None]:
            for label in who.chosen[:made]:
                session = life.session
                action = session.table[index_of(life.env, label)]
                session.moves.change(action, session.main)
                yield from life.step(0)

    plain.run([play(single, Repeats(), world, 2)])
    # The last decision of the one is cut off in the middle of a look or of training.
    hashes = [e.session.arena.hash_lane(e.session.main) for e in (env, single)]
    assert hashes[0] == hashes[1]


def test_lookahead_chooses_the_fork_with_the_lowest_loss(
    envs: Phase2VectorEnv, data: TextData
) -> None:
    who, world = Lookahead(), short_world(lr=3e-5, budget=14)
    envs.run([play(envs.envs[0], who, world, 0)])
    losses = {}
    for label in lookahead.CANDIDATES:
        env = Phase2Env(config=envs.envs[0].settings, data=data, device="cpu", instance=world)
        env.reset(seed=0)
        action = env.session.table[index_of(env, label)]
        if env.session.possible(action):
            env.session.moves.change(action, env.session.main)
            env.step(0)
            losses[label] = env.session.bits["alpha"]
    assert who.chosen[0] == min(losses, key=losses.__getitem__)


def test_the_spare_lanes_are_given_back(envs: Phase2VectorEnv) -> None:
    for who in (Lookahead(), PopulationBasedTraining(0), ByPolicy(CheatPolicy(0))):
        episode(envs, who, budget=20)
        assert not any(envs.envs[0].session.scheduler._held)


# -- population-based training -------------------------------------------------------------------


def test_the_population_shares_the_budget_of_one_system(envs: Phase2VectorEnv) -> None:
    found = episode(envs, PopulationBasedTraining(0), budget=40)
    assert found["flops"] <= found["budget_flops"]
    assert 0 < found["decisions"] <= 40 // MEMBERS * 2
    assert found["seen"] == 2, "the stream moves on with the population's compute"


def test_the_worst_member_copies_the_best_bit_for_bit_and_varies_its_settings(
    envs: Phase2VectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = envs.envs[0].session.arena
    checked = []
    exchange = PopulationBasedTraining._exchange

    def spy(self: PopulationBasedTraining, life: Life, ranked: list[int]) -> None:
        own = int(arena["data_seed"][self.lanes[ranked[-1]]])
        exchange(self, life, ranked)
        best, worst = self.lanes[ranked[0]], self.lanes[ranked[-1]]
        kept = {"lr", "top_k", "cooldown", "data_seed"}
        for name, tensor in arena.state.items():
            assert name in kept or tensor[best].equal(tensor[worst]), name
        assert arena.trees[best].to_dict() == arena.trees[worst].to_dict()
        assert int(arena["data_seed"][worst]) == own != int(arena["data_seed"][best])
        one, other = arena.get_hyper(best), arena.get_hyper(worst)
        assert any(one["lr"] * f == pytest.approx(other["lr"], rel=1e-4) for f in FACTORS)
        assert arena.hash_lane(life.session.main) == arena.hash_lane(best), "it is reported"
        checked.append(life.decisions)

    monkeypatch.setattr(PopulationBasedTraining, "_exchange", spy)
    who = PopulationBasedTraining(1)
    episode(envs, who, budget=60)
    assert checked
    assert checked == [READY * (i + 1) for i in range(len(checked))]
    assert len(who.exchanges) == len(checked)


def test_members_start_from_one_system_with_settings_of_their_own(envs: Phase2VectorEnv) -> None:
    env = envs.envs[0]
    observation, info = envs.run([env.reset_task(0, {"instance": short_world()})])[0]
    who = PopulationBasedTraining(5)
    task = who.play(Life(env, observation, info))

    def first_training() -> Task[None]:
        room = yield next(task)
        task.send(room)

    envs.run([first_training()])
    arena, main = env.session.arena, env.session.main
    assert all(arena["weight"][lane].equal(arena["weight"][main]) for lane in who.lanes)
    assert len({int(arena["data_seed"][lane]) for lane in who.lanes}) == MEMBERS
    assert arena.get_hyper(who.lanes[0]) == arena.get_hyper(main)
    rates = {round(arena.get_hyper(lane)["lr"], 9) for lane in who.lanes}
    assert rates <= {round(lr, 9) for lr in STARTS["lr"]}
    assert len(rates) > 1
    task.close()


# -- names ---------------------------------------------------------------------------------------


def test_every_name_makes_a_contestant(envs: Phase2VectorEnv) -> None:
    for name in EVERY:
        if name != "static":
            who = make_contestant(name, envs.actions, seed=0, preset="tiny")
            assert who.within_bounds == (name not in ("constant", "cosine", "plateau",
                                                      "lookahead", "pbt"))  # fmt: skip
    made = make_contestant(static_name(0.003, 4, 5), envs.actions, seed=0, preset="tiny")
    assert isinstance(made, Static)
    assert made._fixed == {"lr": 0.003, "top_k": 4, "cooldown": 5}


def test_static_is_a_default_where_a_setting_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.contestants.known_statics", lambda: {"tiny": {}})
    assert "static" in default_policies("tiny")
    assert "static" not in default_policies("cpu")


@pytest.mark.parametrize(
    ("name", "words"), [("nope", "random-legal"), ("static:1:2", "static:LR:TOP_K:COOLDOWN")]
)
def test_an_unknown_name_is_an_error_that_says_which_there_are(name: str, words: str) -> None:
    with pytest.raises(K1Error, match=words):
        make_contestant(name, ("no-op",), seed=0, preset="tiny")
