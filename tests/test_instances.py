"""The sets of worlds: drawn by seed, written down, disjoint; and the environment in them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import k1env
from k1.config import PRESETS
from k1.data import TextData
from k1.data.builtin import BUILTIN_DOMAINS
from k1.errors import ConfigError, K1Error
from k1.topology import Topology
from k1env import instances as module
from k1env.env import Phase2Env
from k1env.instances import (
    FILE,
    MOST_DOMAINS,
    ROOM,
    SIZES,
    SPLITS,
    TEST_DOMAINS,
    TRAIN_DOMAINS,
    VALIDATION_DOMAINS,
    Instance,
    domains_of,
    find_instance,
    instances,
    instances_over,
    sample_instance,
)
from k1env.session import MAIN, Session
from k1env.settings import Settings
from k1env.world import World, text_of, with_room
from tests.phase2_helpers import ROOT, entry, environment, index_of, quick

Sets = dict[str, tuple[Instance, ...]]
BUILTIN: Sets = {split: instances(split) for split in SPLITS}
GAMMA_FIRST = Instance(
    name="own", domains=("gamma", "alpha"), shifts=(2,), branching=(3, 2), lr=3e-3, cooldown=7,
    top_k=2, exploration=0.25, pretrained=True, budget=4, seed=11,
)  # fmt: skip
FRESH = replace(GAMMA_FIRST, name="fresh", domains=("beta",), shifts=(), branching=(2, 2, 2),
                pretrained=False)  # fmt: skip


# -- the sets -----------------------------------------------------------------------------------


def test_the_file_is_what_the_command_writes() -> None:
    command = [sys.executable, "-m", "k1env.instances"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=True, timeout=60
    )
    assert done.stdout == FILE.read_text(encoding="utf-8")


def test_writing_writes_the_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE", tmp_path / "instances.json")
    monkeypatch.setattr(sys, "argv", ["instances", "--write"])
    assert module.main() == 0
    assert (tmp_path / "instances.json").read_text() == FILE.read_text()


def test_the_file_comes_with_the_package() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    assert f'k1env = ["{FILE.name}"]' in listed and FILE.parent.name == "k1env"


def test_sizes_and_names() -> None:
    for split, worlds in BUILTIN.items():
        assert [world.name for world in worlds] == [f"{split}/{n}" for n in range(SIZES[split])]


def everything(worlds: tuple[Instance, ...], field: str) -> set[Any]:
    return {getattr(world, field) for world in worlds}


def check_disjoint(sets: Sets) -> None:
    for one, other in itertools.combinations(SPLITS, 2):
        for field in ("domains", "branching", "seed", "name"):
            assert not everything(sets[one], field) & everything(sets[other], field), field
    seeds = [world.seed for worlds in sets.values() for world in worlds]
    assert len(set(seeds)) == len(seeds)


def domains_in(worlds: tuple[Instance, ...]) -> set[str]:
    return {domain for world in worlds for domain in world.domains}


def test_no_order_shape_or_seed_is_in_two_sets() -> None:
    check_disjoint(BUILTIN)


def test_every_test_world_has_a_domain_that_is_nowhere_else() -> None:
    elsewhere = domains_in(BUILTIN["train"]) | domains_in(BUILTIN["validation"])
    assert all(set(world.domains) - elsewhere for world in BUILTIN["test"])
    assert domains_in(BUILTIN["test"]) - elsewhere == set(TEST_DOMAINS)
    for world in BUILTIN["validation"]:
        assert set(world.domains) - domains_in(BUILTIN["train"]) == set(VALIDATION_DOMAINS)
    assert domains_in(BUILTIN["train"]) == set(TRAIN_DOMAINS)


def test_the_builtin_text_has_all_domains() -> None:
    for split in SPLITS:
        assert set(domains_of(split)) <= set(BUILTIN_DOMAINS)
        assert text_of(split, Settings()) == "builtin:" + ",".join(domains_of(split))
    assert text_of("train/3", Settings()) == text_of("train", Settings())
    assert text_of("default", Settings()) == "builtin"
    assert text_of(GAMMA_FIRST, Settings()) == "builtin:gamma,alpha"


def test_orders_within_a_set_differ() -> None:
    for worlds in BUILTIN.values():
        assert len(everything(worlds, "domains")) == len(worlds)


def test_starts_range_from_bad_to_good_in_every_set() -> None:
    for worlds in BUILTIN.values():
        assert everything(worlds, "lr") == set(module.LR)
        assert everything(worlds, "cooldown") == set(module.COOLDOWN)
        assert everything(worlds, "pretrained") == {True, False}
        assert everything(worlds, "budget") == set(module.BUDGET)
        assert everything(worlds, "top_k") >= {1, 2, 3, 4, 6}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_tree_has_room_to_grow_on_each_level(preset: str) -> None:
    model = with_room(Settings.preset(preset)).system.model
    for world in itertools.chain(*BUILTIN.values()):
        tree = Topology.full(world.branching, model.level_capacity, model.max_children)
        assert all(tree.free_slots(level) for level in range(1, len(world.branching) + 1))
        assert tree.agents >= 4, "the hard limit"


def test_room_is_the_same_for_all_settings_unless_they_have_more() -> None:
    for preset in ("tiny", "cpu"):
        roomy = with_room(Settings.preset(preset))
        assert roomy.system.model.branching == ROOM
        assert with_room(roomy) is roomy
    large = Settings(system=Settings().system.replace(model={"branching": (5, 4, 3, 2)}))
    assert with_room(large) is large


def test_drawing_by_seed() -> None:
    drawn = [sample_instance("train", seed) for seed in range(400)]
    assert drawn == [find_instance("train", seed) for seed in range(400)]
    assert len(set(drawn)) > 60 and set(drawn) <= set(BUILTIN["train"])
    assert find_instance("test/23", seed=9) is BUILTIN["test"][23]


@pytest.mark.parametrize(
    "name", ["exam", "train/64", "train/-1", "train/", "train/x", "exam/0", ""]
)
def test_an_unknown_instance_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="choose train"):
        find_instance(name, seed=0)
    with pytest.raises(ConfigError, match="choose train"):
        Settings(instance=name)


@pytest.mark.parametrize(
    "fields",
    [
        {"domains": ("alpha", "alpha")}, {"domains": ()}, {"shifts": ()}, {"shifts": (0,)},
        {"branching": ()}, {"branching": (2, 0)}, {"lr": float("nan")}, {"lr": 0.0},
        {"cooldown": -1}, {"top_k": 0}, {"exploration": 1.5}, {"budget": 0},
        {"domains": tuple("abcde"), "shifts": (1, 2, 3, 4)},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_world_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"'own': {next(iter(fields))} = .* is not possible"):
        replace(GAMMA_FIRST, **fields)


# -- worlds over any text -----------------------------------------------------------------------


@hypothesis_settings(max_examples=15, deadline=None)
@given(number=st.integers(3, 20), seed=st.integers(0, 2**31))
def test_any_three_domains_make_disjoint_sets(number: int, seed: int) -> None:
    names = [f"domain {n}" for n in range(number)]
    sizes = {"train": 8, "validation": 3, "test": 5}
    sets = instances_over(names, seed, sizes)
    assert {split: len(worlds) for split, worlds in sets.items()} == sizes
    check_disjoint(sets)
    elsewhere = domains_in(sets["train"]) | domains_in(sets["validation"])
    assert len(set(names) - elsewhere) >= number // 3
    assert all(set(world.domains) - elsewhere for world in sets["test"])
    assert all(2 <= len(w.domains) <= MOST_DOMAINS for worlds in sets.values() for w in worlds)
    assert instances_over(names[::-1], seed, sizes) == sets, "folders come in any order"


def test_other_seeds_make_other_worlds() -> None:
    names = ["a", "b", "c", "d"]
    assert instances_over(names, 0) != instances_over(names, 1)
    assert {split: len(worlds) for split, worlds in instances_over(names, 0).items()} == SIZES


@pytest.mark.parametrize("names", [[], ["a", "b"], ["a", "b", "b"]])
def test_too_few_domains_are_an_error(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="three different domains"):
        instances_over(names, 0)


# -- the stream ---------------------------------------------------------------------------------


def test_domains_arrive_at_the_shifts() -> None:
    world = World(quick(replay=0.5), ("alpha", "beta", "gamma"), 0, GAMMA_FIRST)
    assert [world.current(n) for n in range(4)] == ["gamma", "gamma", "alpha", "alpha"]
    assert [world.into_phase(n) for n in range(5)] == [0, 1, 0, 1, 2]
    assert world.mix(1) == {"gamma": 1.0} and world.mix(2) == {"gamma": 0.5, "alpha": 0.5}
    assert world.shown(1) == ("gamma",) and world.shown(9) == ("gamma", "alpha")


def test_the_default_world_shifts_every_few_decisions() -> None:
    world = World(quick(phase_decisions=3), ("alpha", "beta", "gamma"), 5, None)
    assert [world.phase(n) for n in (0, 2, 3, 5, 6, 99)] == [0, 0, 1, 1, 2, 2]
    assert [world.into_phase(n) for n in (0, 2, 3, 7, 99)] == [0, 2, 0, 1, 93]
    assert world.seed == 5 and world.shown(0) == ("alpha", "beta", "gamma")


# -- the environment ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(data: TextData) -> Phase2Env:
    return Phase2Env(config=quick(phase1_steps=6), data=data, instance=GAMMA_FIRST)


def test_an_episode_is_as_the_instance_says(shared: Phase2Env) -> None:
    env = shared
    observation, info = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    session = env.session
    assert info["hyper"] == pytest.approx(
        {"lr": 3e-3, "cooldown": 7, "top_k": 2, "exploration": 0.25}
    )
    assert session.tree.agents == 9 and session.trainer.steps == 6
    assert info["seen"] == ["gamma"] and set(info["bits_per_byte"]) == {"gamma", "alpha"}
    assert entry(session, "start")["instance"] == asdict(GAMMA_FIRST)
    json.dumps(entry(session, "start"))
    rewards, seen, truncated = [], [], False
    while not truncated:
        observation, reward, terminated, truncated, info = env.step(0)
        assert env.observation_space.contains(observation) and not terminated
        rewards.append(reward)
        seen.append(info["seen"])
    assert seen == [["gamma"], *[["gamma", "alpha"]] * 3]
    assert info["stop_reason"] == "compute budget spent"
    assert session.spent == 4 * env.settings.interval


def test_rows_of_domains_are_filled_as_they_arrive(shared: Phase2Env) -> None:
    observation, info = shared.reset(seed=0)
    rows = observation["domains"].reshape(MOST_DOMAINS, 4)
    bits = info["bits_per_byte"]["gamma"] / 8
    assert rows[0] == pytest.approx([1.0, 1.0, bits, 0.0]) and not rows[1:].any()
    for _ in range(2):
        observation, *_, info = shared.step(0)
    rows = observation["domains"].reshape(MOST_DOMAINS, 4)
    shares = [1 - shared.settings.replay, shared.settings.replay]
    assert rows[:2, 0] == pytest.approx(shares[::-1]) and rows[:2, 1] == pytest.approx([1, 1])
    assert rows[1, 2] == pytest.approx(info["bits_per_byte"]["alpha"] / 8)
    assert not rows[2:].any()


def test_a_reset_can_ask_for_another_world(shared: Phase2Env) -> None:
    first, _ = shared.reset(seed=0)
    other, info = shared.reset(seed=0, options={"instance": FRESH})
    assert info["seen"] == ["beta"] and shared.session.tree.agents == 14
    assert shared.session.trainer.steps == 0, "no Phase 1"
    assert shared.observation_space.contains(other)
    shared.step(index_of(shared, "add under slot 0"))
    again, _ = shared.reset(seed=0)
    assert all(again[name].tobytes() == first[name].tobytes() for name in first)


def test_seed_and_instance_both_decide_the_weights(shared: Phase2Env) -> None:
    def weights(seed: int, instance: Instance) -> bytes:
        shared.reset(seed=seed, options={"instance": instance})
        return bytes(shared.session.arena["shared"][MAIN].numpy().tobytes())

    other = replace(GAMMA_FIRST, seed=12)
    made = [weights(seed, world) for seed in (0, 1) for world in (GAMMA_FIRST, other)]
    assert len(set(made)) == 4
    assert weights(1, GAMMA_FIRST) == made[2]


def test_the_settings_of_one_world_do_not_reach_the_next(shared: Phase2Env) -> None:
    shared.reset(seed=0, options={"instance": replace(GAMMA_FIRST, budget=1)})
    assert shared.step(0)[3]
    shared.reset(seed=0)
    assert not shared.step(0)[3]


def test_looking_ahead_stays_in_the_world(shared: Phase2Env) -> None:
    shared.reset(seed=3, options={"instance": FRESH})
    seen = shared.peek(0)
    told = shared.step(0)
    assert seen[1:4] == told[1:4]
    assert all(seen[0][name].tobytes() == told[0][name].tobytes() for name in seen[0])
    twin = shared.fork()
    assert twin.session.world.instance == FRESH
    twin.reset(seed=3)
    assert twin.session.world.instance == GAMMA_FIRST, "the environment's own"


def test_a_world_that_does_not_fit_is_an_error_and_changes_nothing(
    shared: Phase2Env, data: TextData
) -> None:
    before, _ = shared.reset(seed=0)
    for wrong, message in (
        (replace(FRESH, domains=("delta",)), "needs the domain 'delta', and the data have alpha"),
        (replace(FRESH, branching=(7,)), r"the tree \(7,\) .* does not fit"),
        (replace(FRESH, branching=(1, 1, 1, 1, 1)), "does not fit"),
        (replace(FRESH, branching=(1, 9)), "does not fit"),
        ("train/0", "needs the domain"),
        ("exam", "choose train"),
    ):
        with pytest.raises(ConfigError, match=message):
            shared.reset(seed=0, options={"instance": wrong})
    assert all(shared.observe()[0][name].tobytes() == before[name].tobytes() for name in before)
    plain = Phase2Env(config=quick(), data=data)
    with pytest.raises(ConfigError, match="does not fit into the slots"):
        plain.reset(seed=0, options={"instance": replace(FRESH, branching=(3, 3))})


def test_a_checkpoint_has_a_tree_of_its_own(data: TextData) -> None:
    with pytest.raises(K1Error, match="give start or instance"):
        Phase2Env("tiny", data=data, start="anywhere", instance="train")


def text_for(split: str, data: TextData) -> TextData:
    """The test text under the names of a set's domains."""
    renamed = TextData.__new__(TextData)
    renamed.__dict__.update(data.__dict__)
    renamed.domains = domains_of(split)
    for name in ("_tokens", "_starts", "_sizes"):
        held = getattr(data, name)
        setattr(renamed, name, {
            (domain, pool): held[data.domains[i % len(data.domains)], pool]
            for i, domain in enumerate(renamed.domains)
            for pool in ("train", "gate", "validation", "test")
        })  # fmt: skip
    return renamed


def test_a_set_gives_each_reset_a_world_by_its_seed(data: TextData) -> None:
    settings = quick(phase1_steps=2)
    spaces = []
    for split in SPLITS:
        env = gym.make(k1env.ENV_ID, config=settings, data=text_for(split, data), instance=split)
        spaces.append((env.observation_space, env.action_space))
        for seed in (0, 1, 2):
            observation, info = env.reset(seed=seed)
            world = sample_instance(split, seed)
            assert env.unwrapped.session.world.instance == world
            assert env.observation_space.contains(observation)
            assert info["hyper"]["lr"] == pytest.approx(world.lr)
            assert info["seen"] == [world.domains[0]]
            env.step(0)
        env.reset(seed=0, options={"instance": f"{split}/3"})
        assert env.unwrapped.session.world.instance == instances(split)[3]
    assert spaces[0] == spaces[1] == spaces[2], "one controller fits all sets"


def test_a_session_of_stored_settings_has_the_same_world(data: TextData) -> None:
    text = text_for("test", data)
    made = Phase2Env(config=quick(phase1_steps=2), data=text, instance="test/4")
    made.reset(seed=6)
    stored = Settings.from_dict(json.loads(json.dumps(made.settings.to_dict())))
    again = Session(stored, text, seed=6)
    again.begin()
    assert entry(again, "start") == entry(made.session, "start")


def test_without_data_the_text_of_the_set_is_read(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(source: str, **fields: Any) -> TextData:
        asked.append(source)
        return text_for("validation", data)

    monkeypatch.setattr("k1env.setup.load_data", load)
    Phase2Env("tiny", instance="validation/2")
    Phase2Env(config=Settings(system=Settings.preset("tiny").system, instance="validation"))
    Phase2Env("tiny")
    assert asked == ["builtin:code,prose,science,numerics,tables,stubs,checks"] * 2 + ["builtin"]


def test_the_documentation_names_the_sets() -> None:
    text = (ROOT / "docs" / "environment.md").read_text()
    new = {"train": TRAIN_DOMAINS, "validation": VALIDATION_DOMAINS, "test": TEST_DOMAINS}
    for split, worlds in BUILTIN.items():
        domains = ", ".join(f"`{domain}`" for domain in new[split])
        shapes = ", ".join(map(str, module.SHAPES[split])).replace(",)", ")")
        assert f"| `{split}` | {len(worlds)} | {domains} | {shapes} |" in text
