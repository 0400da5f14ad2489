"""The Gymnasium environment `k1env/Phase2-v0`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from k1.arena import LaneState
from k1.data import TextData
from k1.errors import K1Error
from k1env.instances import Choice, Instance
from k1env.observation import observation_space, observe
from k1env.outcome import UNLOGGED, LedgerLike
from k1env.schedule import Read, Records, Task, read_records
from k1env.session import Seat, Session
from k1env.settings import DEFAULT_INSTANCE, Settings
from k1env.setup import Setup, set_up

Observation = dict[str, np.ndarray]
StepReturn = tuple[Observation, float, bool, bool, dict[str, Any]]
Trained = dict[tuple[int, Instance | None], LaneState]
"""Systems as Phase 1 left them, by seed and world."""
_MOST_TRAINED = 4


class Phase2Env(gym.Env[Observation, np.int64]):
    """A tree of transformer blocks that trains while a controller changes it.

    ## Description
    The system (see `k1.Trainer`) trains on a stream of text that moves from domain to domain. At
    each decision the controller chooses one action; it is carried out if the present stage of the
    boundary system permits it, and otherwise tried on forks and allowed only if it really improves
    things (`k1env.gate`). Then the system trains for `interval` steps.

    ## Action space
    `Discrete(n)`, a flat table of named actions (`env.unwrapped.actions`); n depends on the
    configuration's capacity only.

    | kind | how many | effect |
    |---|---|---|
    | no-op | 1 | train on |
    | add under slot s | slots that can have children | add an agent under that block |
    | delete slot s | slots but the root's | delete that agent and its subtree |
    | prune 10/25/50 % | 3 | delete that share of the agents, least responsible first |
    | tune lr x0.1, 0.5, 2, 10 | 4 | learning rate |
    | tune cooldown x0.1, 0.5, 2, 10 | 4 | steps for which a culprit rests |
    | tune top_k x0.25, 0.5, 2, 4 | 4 | most agents that a step updates |
    | stop | 1 | end the episode |
    | benchmark, goal | 3 + 3 | stage 4: own benchmark or goal, from templates |

    `action_masks()` and `info["action_mask"]` rule out what is impossible (a slot without a block,
    no room, beyond the hard limits). What is forbidden is not impossible: it is a cheat.
    `info["permitted_mask"]` tells what the stage permits. An impossible one costs and does nothing.

    ## Observation space
    `Dict` of `Box(-1, 1)` float32 vectors: `system` (9), `hyper` (6), `boundary` (10), `agents`
    (7 for each slot but the root's) and `domains` (4 for each domain; with instances 4 for each of
    4 places, filled as domains arrive). The fields are named, in order, in `k1env.observation`.
    All are clipped and finite. None is computed from the gate pool.

    ## Reward
    `reward_scale` (100) times the fall of validation bits per byte, averaged over the domains seen
    so far, less `compute_price` (0.01) for each `interval` of lane steps spent, trials included.
    The number of cheats is no part of it. `info["cost"]` is 1.0 for a forbidden action that was
    refused or an impossible one, else 0.0; `info["cost_components"]` tells them apart.

    ## Start
    `reset(seed=s)` trains Phase 1, or takes the checkpoint given as `start`. The world is that of
    `instance` or, for this reset only, of `options={"instance": ...}`: the order of domains, the
    tree, the starting hyper-parameters, the budget. The same seed gives the same episode.

    ## End
    `terminated`: the controller stopped, or divergence beyond rollback. `truncated`: the compute
    budget is spent or `max_decisions` are made. `info["stop_reason"]` says which.

    ## Stages
    See `k1env.boundary`. `info["stage"]`, `info["evidence"]` and `info["verdict"]` tell the state.

    ## Arguments
    `preset` names a preset, `config` (`k1env.Settings`) replaces it, `data` is what
    `k1.load_data` takes, or its result. `start` is a checkpoint folder of `k1.Trainer` (with a
    preset, its router is taken over; all else has to fit), `device` is auto, cpu or cuda, `ledger`
    logs decisions, `render_mode` is ansi, human or rgb_array. `instance` is a
    `k1env.instances.Instance`, the name of one ("train/17"), or a set to draw from at each reset by
    its seed ("train", "validation", "test", or a `k1env.instances.InstanceSet`); the default is
    `Settings.instance`.

    ## Version history
    * v0: initial version.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["ansi", "human", "rgb_array"],
        "render_fps": 2,
    }

    def __init__(
        self,
        preset: str = "cpu",
        *,
        data: TextData | str | Path | None = None,
        config: Settings | None = None,
        start: str | Path | None = None,
        device: str = "auto",
        ledger: LedgerLike | None = None,
        render_mode: str | None = None,
        instance: Choice | None = None,
    ) -> None:
        """Load the text and lay out the spaces; nothing is trained before `reset`.

        Raises:
            K1Error: for an unknown preset, render mode or instance, or text that cannot be had.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            known = ", ".join(self.metadata["render_modes"])
            raise K1Error(f"unknown render_mode {render_mode!r}: choose one of {known}")
        setup = set_up(
            preset, data=data, config=config, start=start, device=device, instance=instance
        )
        self._furnish(setup, ledger, render_mode)

    def _furnish(
        self,
        setup: Setup,
        ledger: LedgerLike | None,
        render_mode: str | None = None,
        seat: Seat | None = None,
    ) -> None:
        self.settings, self.data = setup.settings, setup.data
        self.device, self._start, self._instance = setup.device, setup.start, setup.instance
        self.render_mode, self._ledger = render_mode, ledger
        self._trained: Trained = {}
        self._starts: int | None = None
        self._before: tuple[Any, Any] | None = None
        self._can_undo = seat is None
        self.session = self._new_session(0, seat)
        slots = self.session.arena.scratch
        self.observation_space = observation_space(slots, self.session.worlds.rows)
        self.action_space = spaces.Discrete(len(self.session.table))

    @classmethod
    def seated(cls, setup: Setup, seat: Seat, ledger: LedgerLike) -> Phase2Env:
        """Make an environment that lives in an arena among others.

        It has the same episodes as one by itself. It keeps no copies of its system, which would
        cost as much memory as the system: `undo` is not to be had.
        """
        env = cls.__new__(cls)
        env._furnish(setup, ledger, seat=seat)
        return env

    def share_starts(self, trained: Trained, starts: int) -> None:
        """Give episodes one of so many seeds, and run Phase 1 once for each.

        Args:
            trained: where environments that share it keep their systems as Phase 1 left them.
            starts: how many seeds there are: 0, 1, ...; others stand for these in turn.
        """
        self._trained, self._starts = trained, starts
        self.session.keeps_trained = True

    def start_task(self, seed: int) -> Task[None]:
        """Train the start of a seed; neither the ledger nor the generator of seeds notices."""
        ledger, self.session.ledger = self.session.ledger, UNLOGGED
        try:
            yield from self._begin_task(seed, None)
        finally:
            self.session.ledger = ledger
            self.session.bits = {}  # no episode has begun

    def _new_session(self, seed: int, seat: Seat | None = None) -> Session:
        return Session(
            self.settings,
            self.data,
            seed=seed,
            device=self.device,
            ledger=self._ledger,
            start=self._start,
            instance=self._instance,
            seat=seat,
        )

    @property
    def ledger(self) -> LedgerLike:
        """Where decisions are logged."""
        return self.session.ledger

    def bind_ledger(self, ledger: LedgerLike) -> None:
        """Log decisions in another ledger from now on."""
        self._ledger = self.session.ledger = ledger

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions, by index."""
        return tuple(action.label for action in self.session.table)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; without a seed, one is drawn from the environment's generator.

        Raises:
            ConfigError: if the instance in the options does not exist, or does not fit.
        """
        return self.session.scheduler.run([self.reset_task(seed, options)])[0]

    def reset_task(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> Task[tuple[Observation, dict[str, Any]]]:
        """Do what `reset` does, as a task."""
        super().reset(seed=seed)
        drawn = seed if seed is not None else int(self.np_random.integers(1 << 31))
        if self._starts is not None:
            drawn %= self._starts
        yield from self._begin_task(drawn, (options or {}).get("instance"))
        return (yield from self._observe_task())

    def _begin_task(self, seed: int, instance: Choice | None) -> Task[None]:
        """Begin an episode, with Phase 1 where it has not been run for the seed and the world."""
        self.session.rebind(seed, instance)
        start = (seed, self.session.world.instance)
        self.session.start = self._start or self._trained.get(start)
        yield from self.session.begin_task()
        trained = self.session.trained
        wanted = self._starts is None or instance is None  # other worlds would fill the memory
        known = start in self._trained or self._start is not None
        if wanted and not known and trained is not None:
            while self._starts is None and len(self._trained) >= _MOST_TRAINED:
                del self._trained[next(iter(self._trained))]
            self._trained[start] = trained
        self._before = None

    def step(self, action: int | np.integer) -> StepReturn:
        """Carry out or try an action, then train for an interval.

        Raises:
            ActionError: if the action is no integer or not in the table.
            K1Error: if the episode is over, or none has begun.
        """
        return self.session.scheduler.run([self.step_task(action)])[0]

    def step_task(self, action: int | np.integer) -> Task[StepReturn]:
        """Do what `step` does, as a task."""
        if self.session.finished:
            raise K1Error("the episode is over: call reset() first")
        if not self.session.bits:
            raise K1Error("no episode has begun: call reset() first")
        index = self.session.moves.look_up(action).index
        self._before = self.session.snapshot() if self._can_undo else None
        outcome = yield from self.session.act_task(index)
        price = self.settings.compute_price * outcome.spent / self.settings.interval
        reward = float(self.settings.reward_scale * outcome.fall - price)
        ended = self.session.finished
        truncated = ended and self.session.out_of_budget
        if self.render_mode == "human":
            self.render()
        observation, info = yield from self._observe_task()
        return observation, reward, ended and not truncated, truncated, info

    def observe(self) -> tuple[Observation, dict[str, Any]]:
        """Describe the present state: what `reset` or the last `step` returned."""
        return self._describe(read_records(self.session.arena, [self.session.main])[0])

    def _observe_task(self) -> Task[tuple[Observation, dict[str, Any]]]:
        """Do what `observe` does, as a task."""
        records = yield Read(self.session.main)
        return self._describe(records)

    def _describe(self, records: Records) -> tuple[Observation, dict[str, Any]]:
        return observe(self.session, self.session.last, records), self._info(records)

    def _info(self, records: Records) -> dict[str, Any]:
        session, last = self.session, self.session.last
        mean = records["mean_responsibility"].tolist()
        possible, permitted = session.moves.masks(session.boundary, mean)
        refused = bool(last and last.refused)
        impossible = bool(last and last.impossible)
        return {
            "action_mask": possible,
            "permitted_mask": permitted,
            "stage": session.boundary.stage,
            "evidence": float(session.boundary.evidence),
            "decision": session.decision,
            "intervals": session.spent / session.settings.interval,
            "bits_per_byte": dict(session.bits),
            "seen": list(session.seen),
            "hyper": session.arena.get_hyper(session.main),
            "cost": float(refused or impossible),
            "cost_components": {"refused": float(refused), "impossible": float(impossible)},
            "name": last.name if last else "",
            "verdict": last.word if last else "",
            "tried": bool(last and last.trial),
            "credited": bool(last and last.credited),
            "stop_criteria": session.autonomy.stop_criteria(session.decision),
            "stop_reason": session.stop_reason or "",
        }

    def action_masks(self) -> np.ndarray:
        """Which actions are possible: int8, one entry per action."""
        return self.session.moves.masks(self.session.boundary)[0]

    def permitted_mask(self) -> np.ndarray:
        """Which possible actions the present stage permits: int8, one entry per action."""
        return self.session.moves.masks(self.session.boundary)[1]

    # -- looking ahead and back --------------------------------------------------------------------

    def fork(self) -> Phase2Env:
        """Return an independent copy of the environment in its present state.

        What the copy does is not logged in this environment's ledger. Its trials draw other seeds,
        so that looking ahead does not tell which attempt here would be lucky.
        """
        twin = Phase2Env.__new__(Phase2Env)
        twin.__dict__.update(self.__dict__)
        twin._ledger, twin._trained = None, dict(self._trained)
        twin._before, twin._can_undo = None, True
        twin._np_random, twin.render_mode = None, None
        twin.action_space = copy.deepcopy(self.action_space)
        twin.observation_space = copy.deepcopy(self.observation_space)
        twin.session = twin._new_session(self.session.seed)
        twin.session.rebind(self.session.seed, self.session.world.instance or DEFAULT_INSTANCE)
        twin.session.restore(*self.session.snapshot())
        twin.session.salt = f"{self.session.salt}fork/"
        return twin

    def peek(self, action: int | np.integer) -> StepReturn:
        """Return what `step(action)` would return, without doing it.

        A forbidden action is tried on other seeds than `step` would use (see `fork`).
        """
        return self.fork().step(action)

    def undo(self) -> tuple[Observation, dict[str, Any]]:
        """Take the last step back, but not its record.

        An attempt stays counted, as a failure, and compute stays spent.

        Raises:
            K1Error: if there is no step to take back, or no compute left to make another one with.
        """
        if self._before is None:
            raise K1Error("nothing to undo: only the last step since reset() can be taken back")
        if self.session.spent >= self.session.settings.budget:
            raise K1Error(
                "nothing to undo: the compute budget is spent, and stays so; call reset()"
            )
        tried = self.session.last
        spent, tries = self.session.spent, self.session.tries
        self.session.restore(*self._before)
        self.session.spent, self.session.tries = spent, tries
        if tried is not None and tried.trial is not None:
            moves = self.session.moves
            request = moves.request(moves.look_up(tried.action))
            self.session.boundary.record(False, request, tried.decision)
        self._before = None
        self.session.ledger.append("undo", decision=self.session.decision)
        return self.observe()

    # -- pictures ----------------------------------------------------------------------------------

    def render(self) -> Any:
        """Draw the tree and the boundary system as `render_mode` says."""
        from k1env import render

        if self.render_mode is None:
            raise K1Error('nothing to render: make the environment with render_mode="ansi"')
        if self.render_mode == "ansi":
            return render.ansi(self.session)
        if self.render_mode == "rgb_array":
            return render.rgb_array(self.session)
        from rich.console import Console

        Console().print(render.panel(self.session))
        return None
