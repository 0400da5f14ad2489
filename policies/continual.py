"""K-1 under a controller of Phase 2, as methods of the comparison in continual learning.

Each run's system lives in an environment, in a world of the run's own: its domains in its order,
its tree, its learning rate. A controller decides after each interval of training whether to grow,
prune or tune. A domain ends when the run has executed what dense training does in a phase, with all
that trials, shadows and measurements for the controller have taken; the world's text shifts then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from k1.config import Config
from k1.experiments.learner import Learner, Run
from k1.experiments.method import FULL, Method
from k1.experiments.stream import Views
from k1.flops import step_flops
from k1env.actions import action_table
from k1env.gate import GateConfig
from k1env.instances import Instance
from k1env.outcome import UNLOGGED
from k1env.schedule import Request, Scheduler, Task, Train
from k1env.seating import seat
from k1env.settings import Settings
from k1env.setup import Setup
from policies import find_policy, make_policy
from policies.base import Policy
from policies.episode import Life, measured_flops

T = TypeVar("T")

INTERVALS = 40
"""Decisions that a phase has room for, if nothing but training is paid for."""
WINDOWS = 16
"""Windows that a twin is scored on in a trial, and at most those of a domain that make up the
validation loss, which controllers see."""
HEADROOM = 2
"""What an environment may spend, as a multiple of what its stream would come to."""
NEVER = 10**9
"""A decision that no stream comes to: nobody knows yet when the text will shift."""


@dataclass
class Controlled:
    """One run: its episode, and who decides in it."""

    life: Life
    policy: Policy
    flops: float = 0.0
    """Operations executed so far."""
    met: bool = False
    """Whether the present domain has been trained on."""


class ControlledLearner(Learner):
    """Runs whose systems live in environments, where a controller may change them.

    The learner's own lanes are copies: the fresh systems that the environments start with, then
    what is measured. The learning rate is the controller's, so it has no schedule. Where an episode
    ends before its stream does (the controller stopped, the system diverged beyond rollback, its
    budget is spent), the system trains on as it is.
    """

    def __init__(self, *args: Any, controller: str, **kwargs: Any) -> None:
        """Fill an arena with the systems to start with.

        Args:
            *args: as for `Learner`.
            controller: what `policies.make_policy` knows.
            **kwargs: as for `Learner`.

        Raises:
            K1Error: for an unknown controller, or weights that cannot be read.
        """
        self.controller = find_policy(controller)
        super().__init__(*args, **kwargs)
        actions = [action.label for action in action_table(self.arena.config.model)]
        self._policies = [self.make_policy(actions, run.seed) for run in self.runs]
        self._unit = super().step_flops()
        self._controlled: list[Controlled] = []
        """The runs, once they have begun."""

    def make_policy(self, actions: Sequence[str], seed: int) -> Policy:
        """Make a run's controller; it has a memory of its own.

        Raises:
            K1Error: if it cannot be read.
        """
        return make_policy(self.controller, actions, seed=seed)

    def step_flops(self, lane: int = 0, updated: float | None = None) -> float:
        """Operations that count as a step of a phase: those of a step of the starting system."""
        return self._unit

    def begin(self, phase: int) -> None:
        """Let each run's text shift to its next domain."""
        self.phase = phase
        for run in self._controlled:
            run.met = False
            if not run.life.over:
                shift(run.life)

    def train(self, done: int, steps: int, total: int) -> None:
        """Let controllers decide until the steps done + 1 .. done + steps are paid for.

        What the last decision of a phase takes beyond it is taken from the next phase, which has a
        decision at least.
        """
        if not self._controlled:
            self._open(total)
        paid, last = self.phase * total + done + steps, done + steps == total
        tasks = [self._go_on(lane, paid * self._unit, last) for lane in range(self.lanes)]
        self._scheduler.run(tasks)
        self.flops = [run.flops for run in self._controlled]

    def _open(self, total: int) -> None:
        """Begin the episodes; a phase has `total` steps."""
        settings, device = settings_of(self.arena.config, total), self.arena.device
        setups = [
            Setup(
                settings, self.store.data, device, self.arena.read_lane(lane),
                world_of(run, settings, total),
            )
            for lane, run in enumerate(self.runs)
        ]  # fmt: skip
        envs = seat(setups, [UNLOGGED] * self.lanes, None, wide=device.type != "cpu")
        self._scheduler: Scheduler = envs[0].session.scheduler
        for env, policy in zip(envs, self._policies, strict=True):
            self._controlled.append(Controlled(Life(env, {}, {}), policy))
        self._scheduler.run([self._counted(lane, self._reset(lane)) for lane in range(self.lanes)])

    def _reset(self, lane: int) -> Task[None]:
        life = self._controlled[lane].life
        life.observation, life.info = yield from life.env.reset_task(self.runs[lane].seed)
        # The batches of other methods' runs with this seed.
        session = life.session
        session.arena["data_seed"][session.main] = self.arena["data_seed"][lane]

    def _go_on(self, lane: int, goal: float, last: bool) -> Task[None]:
        """Decide until a run has executed as many operations."""
        run = self._controlled[lane]
        while run.flops < goal or (last and not run.met):
            yield from self._counted(lane, self._decide(lane))
            run.met = True

    def _decide(self, lane: int) -> Task[None]:
        run = self._controlled[lane]
        life, session = run.life, run.life.session
        if not life.over:
            yield from life.step(run.policy.act(life.observation, life.info))
        else:
            session.trainer.set_mix({self.domain(lane): 1.0})
            yield Train((session.main,), session.settings.interval)

    def _counted(self, lane: int, task: Task[T]) -> Task[T]:
        """Run a task, and charge a run for what it asks for."""
        try:
            request = next(task)
            while True:
                before = self._counts(lane, request)
                try:
                    answer = yield request
                except Exception as error:
                    self._charge(lane, request, before)
                    request = task.throw(error)
                else:
                    self._charge(lane, request, before)
                    request = task.send(answer)
        except StopIteration as end:
            return end.value
        finally:
            task.close()

    def _counts(self, lane: int, request: Request) -> torch.Tensor:
        """Blocks that steps have moved without and with root, and shared parts: int64 [lanes, 3].

        They are those of the lanes that a request trains.
        """
        a = self._controlled[lane].life.session.arena
        lanes = list(request.lanes) if isinstance(request, Train) else []
        counts = a["blocks_updated"][lanes], a["updates"][lanes].sum(1), a["shared_count"][lanes]
        return torch.stack([count.long().cpu() for count in counts], 1)

    def _charge(self, lane: int, request: Request, before: torch.Tensor) -> None:
        run = self._controlled[lane]
        session = run.life.session
        run.flops += measured_flops(session, request)
        if isinstance(request, Train):
            a, moved = session.arena, (self._counts(lane, request) - before).tolist()
            for where, (agents, blocks, shared) in zip(request.lanes, moved, strict=True):
                tree = len(a.trees[where].blocks)
                # The root is on every path.
                updated = agents / request.steps + 1
                run.flops += request.steps * step_flops(a.config, a.vocab_size, tree, updated)
                size, common = a.block_layout.total, a.shared_layout.total
                self._moved[lane] += blocks * size + shared * common
                self._lived[lane] += request.steps * (tree * size + common)

    def measure(self, views: Views, view: str) -> list[list[float]]:
        """Measure copies of the systems as they are."""
        for lane, run in enumerate(self._controlled):
            session = run.life.session
            self.arena.write_lane(lane, session.arena.read_lane(session.main))
        return super().measure(views, view)

    def remarks(self, lane: int) -> dict[str, Any]:
        """What the controller did."""
        session = self._controlled[lane].life.session
        return {
            "made_by": self._policies[lane].state_dict().get("weights"),
            "trained": session.trainer.steps,
            "decisions": session.decision,
            "tried": len(session.tries),
            "credited": sum(entry["credited"] for entry in session.tries),
            "stage": session.boundary.stage,
            "rollbacks": session.guard.rollbacks,
            "hyper": session.arena.get_hyper(session.main),
            "ended": session.stop_reason,
        }


def settings_of(system: Config, total: int) -> Settings:
    """Settings of an environment whose phases have so many steps.

    Trials are as long beside an interval as in the preset `small`, which the controller that comes
    with K-1 was trained in.
    """
    interval = max(1, round(total / INTERVALS))
    gate = GateConfig(horizon=max(1, interval // 2), anneal=max(1, interval // 4), windows=WINDOWS)
    return Settings(
        system=system.replace(train={"eval_windows": min(WINDOWS, system.train.eval_windows)}),
        gate=gate,
        interval=interval,
        phase_decisions=INTERVALS,
        replay=0.0,
    )


def world_of(run: Run, settings: Settings, total: int) -> Instance:
    """The world of a run whose phases have so many steps; its text shifts when `shift` says so."""
    train, domains = settings.system.train, len(run.order)
    return Instance(
        name="continual",
        domains=run.order,
        shifts=tuple(range(NEVER, NEVER + domains - 1)),
        branching=settings.system.model.branching,
        lr=run.lr,
        cooldown=train.cooldown,
        top_k=train.top_k,
        exploration=train.exploration,
        pretrained=False,
        budget=math.ceil(HEADROOM * domains * total / settings.interval),
        seed=run.seed,
    )


def shift(life: Life) -> None:
    """Let the next domain come at the coming decision, and show the controller that."""
    session = life.session
    world = session.world.instance
    assert world is not None
    known = session.world.phase(session.decision)
    shifts = (*world.shifts[:known], session.decision, *world.shifts[known + 1 :])
    session.world = session.worlds.draw(session.seed, replace(world, shifts=shifts))
    life.observation, life.info = life.env.observe()


def _method(controller: str, what: str) -> Method:
    options = {"controller": controller}
    return Method(f"k1-{controller}", what, FULL, learner=ControlledLearner, options=options)


CONTROLLED = {
    method.name: method
    for method in (
        _method("noop", "k1-full-path in an environment of Phase 2 where nobody acts: a control"),
        _method("heuristic", "k1-noop with the scripted controller"),
        _method("ppo", "k1-noop with the trained controller"),
    )
}
"""Methods by name."""
