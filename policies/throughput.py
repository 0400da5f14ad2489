"""Environment steps a second: lanes of one arena against single environments and a plain loop.

Sides take turns, round after round. A side's turn is one step of all its environments or, where it
learns, one rollout and its updates. Episodes that end are begun anew within the time measured.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from k1.bench.drivers import Stream
from k1.bench.stock import StockTrainer, fresh_tree
from k1.bench.timing import quartile_range, wait_for
from k1.data import TextData
from k1.errors import K1Error
from k1.sampling import TokenStore
from k1.tables import Table
from k1env.settings import Settings
from policies.ppo_settings import PPOSettings

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

TIERS = {
    "no-op": "the environment alone; the controller trains on",
    "random": "the environment alone; possible actions at random, most of them tried on copies",
    "inference": "actions by a policy network with fresh weights",
    "learning": "the whole of PPO: rollouts and updates",
}
SEED = 0
N_STEPS = 8
"""Decisions of each environment between updates: short rollouts, so that many fit the time."""
FACTORS = (0.5, 1.0, 2.0)
"""By what the plain loop multiplies its learning rate."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    settings: Settings
    """Sizes, interval and trials of the environments. All are in the default world: in worlds of
    their own, trees differ in size, and many would have more to do each than one."""
    data: TextData
    device: torch.device
    lanes: tuple[int, ...]
    """Numbers of environments in one arena; the first is what the others are compared with."""
    processes: int
    """Single environments in processes of their own, on the CPU; 0 for none."""
    tiers: tuple[str, ...]
    """Which of `TIERS`."""
    rounds: int = 5
    seconds: float = 5.0
    """Time that each side and tier is measured for, over all rounds."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        unknown = [tier for tier in self.tiers if tier not in TIERS]
        if unknown:
            raise K1Error(f"unknown tier {unknown[0]!r}: choose from {', '.join(TIERS)}")
        if not self.lanes or min(self.lanes) < 1 or self.processes < 0:
            raise K1Error("--lanes are 1 or more, and --processes 0 or more")
        if self.rounds < 1 or not 0 < self.seconds < math.inf:
            raise K1Error("--rounds and --seconds are positive")


class Side(ABC):
    """Something that makes environment steps."""

    count: int
    """Environments that step together."""

    @abstractmethod
    def turn(self, tier: str) -> int:
        """Make a turn; returns how many environment steps it was."""

    def tiers(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the wanted tiers that it has."""
        return wanted

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Give back what it holds."""


class Vector(Side):
    """Environments behind Stable-Baselines3's interface."""

    def __init__(self, venv: VecEnv, model: Any) -> None:
        """Start episodes.

        Args:
            venv: the environments.
            model: makes an algorithm for them, when a tier first needs it.
        """
        self.venv, self.count = venv, venv.num_envs
        self._make_model, self._model = model, None
        self._random = np.random.default_rng(SEED)
        venv.seed(SEED)
        self._seen: Any = venv.reset()

    @property
    def model(self) -> Any:
        """The algorithm."""
        if self._model is None:
            self._model = self._make_model(self.venv)
        return self._model

    def turn(self, tier: str) -> int:
        """Make a turn."""
        if tier == "learning":
            before = self.model.num_timesteps
            self.model.learn(self.model.n_steps * self.count, reset_num_timesteps=False)
            self._seen = self.model._last_obs
            return int(self.model.num_timesteps - before)
        actions = np.zeros(self.count, dtype=np.int64)
        if tier != "no-op":
            masks = np.stack(self.venv.env_method("action_masks"))
            if tier == "inference":
                actions, _ = self.model.predict(self._seen, action_masks=masks)
            else:
                actions = np.array([self._random.choice(np.flatnonzero(row)) for row in masks])
        self._seen = self.venv.step(actions)[0]
        return self.count

    def close(self) -> None:
        """Close the environments."""
        self.venv.close()


class PlainLoop(Side):
    """What one writes by hand: ordinary modules train on, and the learning rate changes.

    One of its steps is the training, dense, and the measuring that a step of the environment has,
    and nothing else of it.
    """

    count = 1

    def __init__(self, plan: Plan) -> None:
        """Build the modules, with the settings' own tree."""
        self.config, self.interval = plan.settings.system, plan.settings.interval
        self.store = TokenStore(plan.data, self.config.model.context, plan.device)
        self.stream = Stream(self.store, self.config)
        model = fresh_tree(self.config, plan.data.vocab_size, plan.device)
        self.trainer = StockTrainer(model, self.config)
        self._random = np.random.default_rng(SEED)

    def tiers(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """It makes no trials and has no policy."""
        return tuple(tier for tier in wanted if tier == "no-op")

    def turn(self, tier: str) -> int:
        """Choose a learning rate, train for an interval, measure."""
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.config.train.lr * self._random.choice(FACTORS)
        for _ in range(self.interval):
            batch = self.stream.next()
            self.trainer.step(batch.inputs[0], batch.targets[0])
        size, windows = self.config.train.batch, self.config.train.eval_windows
        with torch.no_grad():
            for domain in self.store.domains:
                batch = self.store.spread("validation", domain, windows)
                parts = zip(batch.inputs[0].split(size), batch.targets[0].split(size), strict=True)
                torch.stack([self.trainer.model(*part) for part in parts]).mean().item()
        return 1


def sides(plan: Plan, say: Callable[[str], None]) -> dict[str, Side]:
    """Build what is compared."""
    from k1env.sb3 import SB3VecEnv

    worlds: dict[str, Any] = {"config": plan.settings, "data": plan.data}
    model = partial(_algorithm, device=plan.device.type)
    made: dict[str, Side] = {}
    venv: VecEnv
    for count in plan.lanes:
        say(f"{count} lanes")
        wide = None if count > 1 else False  # one lane needs no call that is wide enough for 16
        venv = SB3VecEnv(num_envs=count, device=plan.device.type, wide=wide, **worlds)
        made[f"{count} lane{'s' if count > 1 else ''}"] = Vector(venv, model)
    if plan.processes:
        from stable_baselines3.common.vec_env import SubprocVecEnv

        say(f"{plan.processes} processes")
        single: list[Callable[[], Any]] = [partial(_single, worlds)] * plan.processes
        venv = SubprocVecEnv(single, start_method="spawn")
        made[f"{plan.processes} processes"] = Vector(venv, model)
    say("a plain loop")
    made["plain loop"] = PlainLoop(plan)
    return made


def _algorithm(venv: VecEnv, device: str) -> Any:
    """Make the algorithm that `train_ppo.py` trains with, for any vector environment."""
    from policies.network import NetworkSizes
    from policies.ppo import make_model

    settings, actions = PPOSettings(n_steps=N_STEPS), venv.get_attr("actions", 0)[0]
    return make_model("maskable", venv, settings, actions, NetworkSizes(), seed=SEED, device=device)


def _single(worlds: dict[str, Any]) -> Any:
    """Make an environment in a process of its own."""
    from k1.cli import prepare_torch
    from k1env.env import Phase2Env

    prepare_torch("cpu")
    return Phase2Env(device="cpu", **worlds)


def measure(
    plan: Plan, say: Callable[[str], None], keep: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Time every side in every tier, in turns.

    Args:
        plan: what to time.
        say: is told how it goes.
        keep: is given all records so far after each tier, which can take minutes.

    Returns:
        A record for each side and tier: environment steps a second as median over the rounds, with
        the range between quartiles, and relative to the first side in the same tier.
    """
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    built = sides(plan, say)
    records: list[dict[str, Any]] = []
    try:
        for tier in plan.tiers:
            found = _measure_tier(
                {name: side for name, side in built.items() if tier in side.tiers(plan.tiers)},
                tier, plan, say,
            )  # fmt: skip
            first = statistics.median(next(iter(found.values())))
            for name, rates in found.items():
                middle = statistics.median(rates)
                records.append(
                    {
                        "side": name,
                        "environments": built[name].count,
                        "tier": tier,
                        "steps_per_second": middle,
                        "iqr": quartile_range(rates),
                        "rounds": rates,
                        "times": middle / first,
                    }
                )
            keep(records)
    finally:
        for side in built.values():
            side.close()
    return records


def _measure_tier(
    built: dict[str, Side], tier: str, plan: Plan, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Environment steps a second of every side, one figure a round."""
    turns: dict[str, int] = {}
    for name, side in built.items():
        for _ in range(2):  # the second time, all is compiled and recorded
            _, seconds = _timed(side, tier, 1, plan.device)
        turns[name] = max(1, round(plan.seconds / plan.rounds / seconds))
    rates: dict[str, list[float]] = {name: [] for name in built}
    for number in range(plan.rounds):
        names = list(built)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            steps, seconds = _timed(built[name], tier, turns[name], plan.device)
            rates[name].append(steps / seconds)
        told = ", ".join(f"{name} {rates[name][-1]:.3g}" for name in names)
        say(f"{tier}, round {number + 1} of {plan.rounds}: {told}")
    return rates


def _timed(side: Side, tier: str, turns: int, device: torch.device) -> tuple[int, float]:
    wait_for(device)
    began = time.perf_counter()
    steps = sum(side.turn(tier) for _ in range(turns))
    wait_for(device)
    return steps, time.perf_counter() - began


def table(records: list[dict[str, Any]]) -> Table:
    """A row for each side with every tier's figures."""
    tiers = list(dict.fromkeys(r["tier"] for r in records))
    rows = []
    for side in dict.fromkeys(r["side"] for r in records):
        own = {r["tier"]: r for r in records if r["side"] == side}
        rows.append([side, *[_cell(own[tier]) if tier in own else "-" for tier in tiers]])
    return Table("environment steps a second (times the first row's)", ["", *tiers], rows)


def _cell(record: dict[str, Any]) -> str:
    rate, spread = record["steps_per_second"], record["iqr"]
    return f"{rate:.3g} ± {spread / 2:.2g} ({record['times']:.3g}x)"


def markdown(result: dict[str, Any]) -> str:
    """Write a result as a section of a page."""
    found = table(result["records"])
    lines = [
        "## Throughput",
        "",
        f"Environment steps a second, and as a multiple of the first row's: median over "
        f"{result['rounds']} rounds ± half the range between the quartiles. On {result['device']}, "
        f"{result['versions']}; {result['about']}.",
        "",
        f"```bash\n{result['command']}\n```",
        "",
        *found.markdown(),
        "",
        *[f"- {tier}: {TIERS[tier]}." for tier in found.headers[1:]],
    ]
    if result["peak_bytes"] is not None:
        lines.append(f"- All of them together took {result['peak_bytes'] / 1e9:.1f} GB at most.")
    return "\n".join(lines) + "\n"
