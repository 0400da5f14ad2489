"""Episodes of a comparison: what is charged, where they are cut, what is measured when."""

from __future__ import annotations

import math
from typing import Any

import pytest

from k1.data import TextData
from k1.flops import measuring_flops, step_flops
from k1env.env import Phase2Env
from k1env.schedule import Evaluate, Task, Train
from k1env.vector import Phase2VectorEnv
from policies.contestants import ByPolicy
from policies.episode import SHARES, TEST_WINDOWS, Life, Meter, TimeUp, play
from policies.population import PopulationBasedTraining
from policies.simple import CheatPolicy, NoopPolicy
from tests.evaluation_helpers import arena_for, episode, short_world
from tests.phase2_helpers import index_of, quick


@pytest.fixture(scope="module")
def envs(data: TextData) -> Phase2VectorEnv:
    return arena_for(data, 3)


class Script:
    """Does what it is told, then nothing."""

    within_bounds = True

    def __init__(self, *labels: str) -> None:
        self.labels = [*labels]

    def play(self, life: Life) -> Task[None]:
        while not life.over:
            label = self.labels.pop(0) if self.labels else "no-op"
            yield from life.step(index_of(life.env, label))


def test_training_on_spends_the_budget_exactly(envs: Phase2VectorEnv) -> None:
    found = episode(envs, ByPolicy(NoopPolicy()))
    assert found["flops"] == pytest.approx(found["budget_flops"], rel=1e-12)
    assert (found["decisions"], found["stop_reason"]) == (12, "compute budget spent")
    system = envs.envs[0].session.settings.system
    vocab, windows = envs.envs[0].data.vocab_size, 2 * system.train.eval_windows
    decision = 2 * step_flops(system, vocab, 7, 3) + measuring_flops(system, vocab, 7, windows)
    assert found["budget_flops"] == pytest.approx(12 * decision)


def test_an_episode_goes_as_it_would_unobserved(envs: Phase2VectorEnv, data: TextData) -> None:
    script = ["add under slot 0", "tune lr x0.1", "no-op"]
    watched = envs.envs[0]
    found = envs.run([play(watched, Script(*script), short_world(budget=30), 4)])[0]
    alone = Phase2Env(
        config=envs.envs[0].settings, data=data, device="cpu", instance=short_world(budget=30)
    )
    alone.reset(seed=4)
    total, over = 0.0, False
    labels = iter(script)
    while not over and alone.session.decision < found["decisions"]:
        label = next(labels, "no-op")
        _, reward, terminated, truncated, _ = alone.step(index_of(alone, label))
        total, over = total + reward, terminated or truncated
    assert found["tried"] == 1
    assert found["return"] == pytest.approx(total, abs=1e-12)
    before = watched.session.bits
    assert before == alone.session.bits


def test_trials_are_charged_and_nothing_goes_beyond_the_budget(envs: Phase2VectorEnv) -> None:
    found = episode(envs, ByPolicy(CheatPolicy(0)), budget=40)
    assert found["tried"] > 0
    assert found["decisions"] < 40
    assert found["flops"] <= found["budget_flops"] * (1 + 1e-9)
    assert all(len(row) == len(SHARES) for row in found["bits"].values())


def test_cheaper_steps_buy_more_of_them(envs: Phase2VectorEnv) -> None:
    """Lane steps end before operations do: the system trains on as it is."""
    session = envs.envs[0].session
    episode(envs, ByPolicy(NoopPolicy()))
    usual = session.trainer.steps

    class Cheap:
        within_bounds = False

        def play(self, life: Life) -> Task[None]:
            while not life.over:
                life.tune({"top_k": 1})
                yield from life.step(0)

    found = episode(envs, Cheap())
    assert session.trainer.steps > usual
    assert found["decisions"] == 12
    left = found["budget_flops"] - found["flops"]
    assert 0 <= left < 2 * session.step_flops(session.main)


def test_the_measured_system_is_the_one_before_the_share_is_passed(envs: Phase2VectorEnv) -> None:
    env = envs.envs[0]
    steps: list[int] = []

    def spy(task: Task[Any]) -> Task[Any]:
        request = next(task)
        try:
            while True:
                if isinstance(request, Evaluate) and request.split == "test":
                    steps.append(env.session.trainer.steps)
                request = task.send((yield request))
        except StopIteration as end:
            return end.value

    envs.run([spy(play(env, ByPolicy(NoopPolicy()), short_world(budget=20), 0))])
    assert steps == [2 * int(20 * share) for share in SHARES]


def test_it_is_measured_on_many_windows_of_the_test_pool(envs: Phase2VectorEnv) -> None:
    found = episode(envs, ByPolicy(NoopPolicy()))
    env = envs.envs[0]
    engine, main = env.session.engine, env.session.main
    windows = TEST_WINDOWS * env.settings.system.train.eval_windows
    assert windows == 8
    for domain, row in found["bits"].items():
        batch = engine.store.spread("test", domain, windows)
        assert row[-1] == float(engine.bits_per_byte(main, main + 1, batch)[0])
        few = engine.store.spread("test", domain, 2)
        assert row[-1] != float(engine.bits_per_byte(main, main + 1, few)[0])


def test_wide_lanes_give_the_same_episodes_to_rounding(
    envs: Phase2VectorEnv, data: TextData
) -> None:
    wide = Phase2VectorEnv(
        2, config=quick(), data=data, device="cpu", instance=short_world(), wide=True
    )
    world = short_world(budget=40)
    found = []
    for arena in (envs, wide):
        rule = ByPolicy(NoopPolicy())
        pairs = zip(arena.envs, (rule, PopulationBasedTraining(0)), strict=False)
        found.append(arena.run([play(env, who, world, 0) for env, who in pairs]))
    for one, other in zip(*found, strict=True):
        assert one["decisions"] > 0
        assert one["flops"] == other["flops"]
        for domain, row in one["bits"].items():
            assert other["bits"][domain] == pytest.approx(row, rel=1e-3)


def test_a_stopped_episode_keeps_its_last_figures(envs: Phase2VectorEnv) -> None:
    class Quits:
        within_bounds = True

        def play(self, life: Life) -> Task[None]:
            yield from life.step(0)

    found = episode(envs, Quits())
    assert found["decisions"] == 1
    assert found["flops"] == pytest.approx(found["budget_flops"] / 12)
    for row in found["bits"].values():
        assert row[0] != row[1]
        assert len(set(row[1:])) == 1


def test_domains_count_from_when_an_undisturbed_stream_brings_them(envs: Phase2VectorEnv) -> None:
    found = episode(envs, ByPolicy(NoopPolicy()), budget=10, shifts=(3,))
    assert found["brought"] == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]


def test_every_kind_of_request_has_its_price(envs: Phase2VectorEnv) -> None:
    env = envs.envs[0]
    envs.run([env.reset_task(0, {"instance": short_world()})])
    session = env.session
    meter = Meter(session, "test", lambda: False)
    system, vocab = session.settings.system, env.data.vocab_size

    def asks() -> Task[None]:
        yield Train((session.main,), 3)
        bits = yield Evaluate(session.main, "validation", session.world.domains[:1])
        assert len(bits) == 1

    envs.run([meter.run(asks())])
    expected = 3 * step_flops(system, vocab, 7, 3)
    expected += measuring_flops(system, vocab, 7, system.train.eval_windows)
    assert meter.spent == pytest.approx(expected)
    assert len(meter.curve) == len(SHARES)


def test_an_error_reaches_the_task_that_asked(envs: Phase2VectorEnv) -> None:
    env, met = envs.envs[0], []
    envs.run([env.reset_task(0, {"instance": short_world()})])
    main = env.session.main

    def asks() -> Task[None]:
        try:
            yield Train((main,), 1)
        except IndexError as error:
            met.append(error)
        yield Train((main,), 2)

    task = Meter(env.session, "test", lambda: False).run(asks())

    def beyond_measurements(request: Any) -> Any:
        while isinstance(request, Evaluate):
            request = task.send(dict.fromkeys(request.domains, 5.0))
        return request

    assert beyond_measurements(next(task)) == Train((main,), 1)
    assert beyond_measurements(task.throw(IndexError("no such lane"))) == Train((main,), 2)
    assert len(met) == 1


def test_when_time_is_up_an_episode_ends_without_a_record(envs: Phase2VectorEnv) -> None:
    world = short_world()
    task = play(envs.envs[0], ByPolicy(NoopPolicy()), world, 0, expired=lambda: True)
    with pytest.raises(TimeUp):
        envs.run([task])


def test_settings_by_hand_stay_within_the_hard_limits(envs: Phase2VectorEnv) -> None:
    env = envs.envs[0]
    observation, info = envs.run([env.reset_task(0, {"instance": short_world()})])[0]
    life = Life(env, observation, info)
    life.tune({"lr": 5.0, "top_k": 0.0, "cooldown": 2.6})
    hyper = env.session.arena.get_hyper(env.session.main)
    assert math.isclose(hyper["lr"], 0.3, rel_tol=1e-6)
    assert (hyper["top_k"], hyper["cooldown"]) == (1, 3)
