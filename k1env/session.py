"""Phase 2 without Gymnasium: a K-1 system in its world, under the boundary system.

`Session.act` is the whole of Phase 2: log the intent, carry the action out or try it, train, guard
against divergence, evaluate, log the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k1.arena import LaneState
from k1.data import TextData
from k1.errors import K1Error
from k1.flops import step_flops
from k1.rng import derive_seed
from k1.topology import Topology
from k1.trainer import Trainer
from k1env import actions
from k1env.accounts import (
    log_end,
    log_outcome,
    log_start,
    summarize,
    try_entry,
    verdict_on_cheat,
)
from k1env.actions import Action
from k1env.autonomy import Autonomy, Benchmark, Goal
from k1env.boundary import Boundary, Request, Ruling, hard_limits
from k1env.gate import (
    CHEAT,
    CONTROL,
    FIRST_TRIAL_LANE,
    MAIN,
    SHADOW,
    SHADOW_LANE,
    Gate,
    TrialResult,
)
from k1env.guard import DivergenceGuard
from k1env.instances import Choice
from k1env.moves import Moves
from k1env.outcome import LedgerLike, MemoryLedger, Outcome
from k1env.schedule import Claim, Evaluate, Keep, Scheduler, Separate, Task, Train
from k1env.settings import Settings
from k1env.snapshot import restore_snapshot, take_snapshot
from k1env.world import Worlds

BUDGET_SPENT, ALL_DECISIONS = "compute budget spent", "all decisions made"


@dataclass(frozen=True)
class Seat:
    """Where a session lives among others."""

    trainer: Trainer
    """The system, in a lane of the arena that all share."""
    shadow: int
    """Lane of its shadow."""
    scheduler: Scheduler
    """Runs the session's tasks, and has the lanes for trials."""


class Session:
    """One run of Phase 2.

    By itself it has an arena of its own: lane 0 is the system, lane 1 its shadow, the others are
    for trials. With a `Seat` it shares one with other sessions. What takes time is a task
    (`begin_task`, `act_task`), so that many sessions can go on together (`k1env.schedule`).
    """

    def __init__(
        self,
        settings: Settings,
        data: TextData,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        ledger: LedgerLike | None = None,
        start: LaneState | None = None,
        instance: Choice | None = None,
        seat: Seat | None = None,
    ) -> None:
        """Set the world up; `begin` runs Phase 1 and starts Phase 2.

        Args:
            settings: everything but data and seed.
            data: the text.
            seed: decides the instance, the weights and all batches.
            device: where everything is held.
            ledger: where decisions are logged.
            start: a trained system to start from, in place of Phase 1.
            instance: the world, in place of `settings.instance` (see `Worlds`).
            seat: where to live among other sessions; by itself by default.
        """
        self.data, self.seed = data, seed
        self.worlds = Worlds(settings, data.domains, instance)
        self.ledger: LedgerLike = ledger if ledger is not None else MemoryLedger()
        self.start = start
        alone = seat is None
        if seat is None:
            lanes = FIRST_TRIAL_LANE + Gate.lanes_needed(settings.gate)
            trainer = Trainer(settings.system, data, seed=seed, device=device, lanes=lanes)
            scheduler = Scheduler(Separate(trainer.engine), range(FIRST_TRIAL_LANE, lanes))
            seat = Seat(trainer.at(MAIN), SHADOW_LANE, scheduler)
        self.trainer, self.shadow, self.scheduler = seat.trainer, seat.shadow, seat.scheduler
        self.main = self.trainer.lane
        self.arena, self.engine = self.trainer.arena, self.trainer.engine
        self.gate = Gate(self.engine, FIRST_TRIAL_LANE, settings.gate)
        self.moves = Moves(self.arena, self.main)
        self.table = self.moves.table
        self.guard = DivergenceGuard(self.arena, self.main, settings.divergence)
        self.notify: Callable[..., None] = lambda kind, **data: None
        """Called with ("phase1" | "train" | "trial", done=..., total=...) as work goes on."""
        self.salt = ""
        """Set in a fork, whose trials must not tell how those of this session will end."""
        self.bytes_per_token = float(self.trainer.store.mean_token_bytes())
        self.keeps_trained = alone
        self.trained: LaneState | None = None
        """The system as Phase 1 left it, if it is kept."""
        self.rebind(seed)

    def rebind(self, seed: int, instance: Choice | None = None) -> None:
        """Choose another seed, and with it another world; `begin` comes next.

        Raises:
            ConfigError: if the instance does not exist, or needs other text or a larger tree.
        """
        self.world = self.worlds.draw(seed, instance)
        self.settings = self.world.settings
        self.salt = ""
        self.seed = self.trainer.seed = seed
        self._clear()

    def _clear(self) -> None:
        capacity = self.arena.scratch - 1
        self.guard.reset()
        self.boundary = Boundary(hard_limits(capacity))
        self.boundary.history.append(
            {"stage": 1, "decision": 0, "attempted": 0, "accepted": 0, "evidence": 1.0}
        )
        self.autonomy = Autonomy()
        self.last: Outcome | None = None
        self.decision = self.spent = self.first_own = 0
        self.shadow_diverged = False
        self.visited: list[str] = []
        self.tries: list[dict[str, Any]] = []
        """One entry for each forbidden action tried: what, when, and what came of it."""
        self.bits: dict[str, float] = {}
        self.bits_start: dict[str, float] = {}
        self.agents_start = 0
        self.reference_flops = 1.0
        self.stop_reason: str | None = None
        self.stop_criteria: list[str] = []

    # -- life ------------------------------------------------------------------------------------

    @property
    def tree(self) -> Topology:
        """The system's tree."""
        return self.arena.trees[self.main]

    @property
    def seen(self) -> tuple[str, ...]:
        """Domains that have been in the stream so far, this decision's included."""
        return self.world.seen(self.decision)

    @property
    def finished(self) -> bool:
        """Whether the episode is over."""
        return self.stop_reason is not None

    @property
    def out_of_budget(self) -> bool:
        """Whether the episode is over because compute or decisions are used up."""
        return self.stop_reason in (BUDGET_SPENT, ALL_DECISIONS)

    def possible(self, action: Action) -> bool:
        """Whether an action can be done at all, permitted or not."""
        return self.moves.why_impossible(action, self.boundary) is None

    def begin(self) -> None:
        """Run Phase 1 (or take the given start) and measure where Phase 2 starts.

        Raises:
            K1Error: if the loss is not finite there.
        """
        self.scheduler.run([self.begin_task()])

    def begin_task(self) -> Task[None]:
        """Do what `begin` does, as a task."""
        self._clear()
        train = self.settings.system.train
        if self.start is not None:
            self.arena.write_lane(self.main, self.start)
        else:
            self.arena.reset_lane(self.main, self.world.seed, self.world.branching)
            for name in ("cooldown", "top_k", "exploration"):
                self.arena.set_hyper(self.main, name, getattr(train, name))
            self.arena.set_hyper(self.main, "lr", self.settings.phase1_lr)
            self.trainer.set_mix(self.world.mix(0))
            total, chunk, mode = self.settings.phase1_steps, 20, self.settings.phase1_mode
            for done in range(0, total, chunk):
                self.notify("phase1", done=done, total=total)
                steps = min(chunk, total - done)
                yield Train((self.main,), steps, mode=mode)
            self.notify("phase1", done=total, total=total)
        self.trained = self.arena.read_lane(self.main) if self.keeps_trained else None
        for name in ("lr", "cooldown", "top_k", "exploration"):
            self.arena.set_hyper(self.main, name, getattr(train, name))
        self.arena["data_seed"][self.main] = derive_seed("phase 2", self.world.seed)
        self.trainer.set_mix(self.world.mix(0))
        self.agents_start = self.tree.agents
        self.reference_flops = self.step_flops(self.main)
        measured = yield self._evaluation
        if not all(math.isfinite(bits) for bits in measured.values()):
            raise K1Error(
                "Phase 2 cannot start: the loss after Phase 1 is not finite; lower phase1_lr, "
                "or start from another checkpoint"
            )
        self.bits = self.bits_start = measured
        self.visited = [self.moves.signature(self.main)]
        self.first_own = self.tree.next_id
        yield from self._remember(self.world.phase(0), self.bits[self.world.current(0)])
        log_start(self)

    def act(self, index: int) -> Outcome:
        """Carry out or try one action, then train for an interval.

        Raises:
            ActionError: if there is no such action; then nothing has happened.
        """
        return self.scheduler.run([self.act_task(index)])[0]

    def act_task(self, index: int) -> Task[Outcome]:
        """Do what `act` does, as a task."""
        action = self.moves.look_up(index)
        self.trainer.set_mix(self.world.mix(self.decision))
        request = self.moves.request(action)
        impossible = self.moves.why_impossible(action, self.boundary)
        ruling = self.boundary.rule(request)
        outcome = Outcome(
            self.decision, index, action.kind, self.moves.name(action), self.boundary.stage,
            permitted=ruling.permitted and impossible is None, rule=ruling.rule,
            impossible=impossible,
        )  # fmt: skip
        self.ledger.append(
            "intent",
            decision=self.decision,
            action=index,
            name=outcome.name,
            stage=self.boundary.stage,
            permitted=outcome.permitted,
            rule=ruling.rule if impossible is None else f"impossible: {impossible}",
        )
        before = dict(self.bits)
        if impossible is not None:
            outcome.verdict = f"impossible: {impossible}"
            yield from self._train(outcome)
        elif ruling.permitted:
            yield from self._carry_out(action, outcome)
        else:
            yield from self._try(request, outcome)
        yield from self._measure(outcome, before)
        if outcome.trial is not None:
            self._credit(request, ruling, outcome)
        self._log(outcome)
        self.last = outcome
        return outcome

    def _carry_out(self, action: Action, outcome: Outcome) -> Task[None]:
        """Do what is permitted."""
        outcome.applied, outcome.verdict = True, f"permitted: {outcome.rule}"
        if action.kind == actions.STOP:
            outcome.stopped, outcome.stop_reason = True, "the controller stopped"
            outcome.stop_criteria = self.autonomy.stop_criteria(self.decision)
            held = ", ".join(outcome.stop_criteria) or "no criterion held"
            outcome.verdict = f"stopped: {held}"
            return
        if action.kind == actions.BENCHMARK:
            self.autonomy.benchmarks.append(Benchmark(int(action.value), self.decision))
        elif action.kind == actions.GOAL:
            mean = sum(self.bits[d] for d in self.seen) / len(self.seen)
            self.autonomy.goals.append(Goal(int(action.value), self.decision, mean))
        elif action.kind != actions.NOOP:
            if not self.shadow_diverged:
                self.arena.copy_lane(self.main, self.shadow)
                self.shadow_diverged = True
            self.moves.change(action, self.main)
            self._visit()
        if action.structural:
            self.autonomy.structural_tries.append(self.decision)
        yield from self._train(outcome)

    def _try(self, request: Request, outcome: Outcome) -> Task[None]:
        """Try what is forbidden, and allow it if it really improves things."""
        action = request.action
        if self.shadow_diverged:
            self.arena.copy_mix(self.main, self.shadow)
        if action.structural:
            self.autonomy.structural_tries.append(self.decision)
        shares = [1.0 / len(self.seen) if d in self.seen else 0.0 for d in self.data.domains]
        room = yield Claim(Gate.lanes_needed(self.gate.config, 3 if self.shadow_diverged else 2))
        self.gate.first = room.start
        try:
            trial = yield from self.gate.trial(
                self.main,
                self.shadow if self.shadow_diverged else None,
                lambda lane: self.moves.change(action, lane),
                seed=derive_seed("attempt", self.world.seed, self.salt, self.boundary.attempted),
                mix=shares,
                price=self._price,
                stop=action.kind == actions.STOP,
                own_stream=not self.salt,
                progress=lambda done, total: self.notify("trial", done=done, total=total),
            )
        except RuntimeError as error:  # for example out of memory: it counts as a failure
            trial = TrialResult(False, f"it crashed ({type(error).__name__})", None, None, 0, 0)
        finally:
            room.release()
        adopted = self.gate.adopted
        outcome.trial, outcome.applied, outcome.spent = trial, trial.accepted, trial.lane_steps
        if trial.accepted:
            self.arena.write_lane(self.main, adopted[CHEAT])
            if action.kind == actions.STOP:
                outcome.stopped, outcome.stop_reason = True, "the controller stopped (cheat)"
                outcome.stop_criteria = ["going on was shown to gain less than the margin"]
        elif trial.seeds_run == 0:
            yield from self._train(outcome)
        else:
            self.arena.write_lane(self.main, adopted[CONTROL])
        if outcome.outweighs_harm:  # or repairing the harm would earn more
            was, fewest = adopted[CONTROL].tree, self.boundary.hard.min_agents
            self.moves.follow(action, self.shadow, was, fewest)
            self.arena["data_seed"][self.shadow] = self.arena["data_seed"][self.main]
            yield Train((self.shadow,), self.gate.config.horizon)
            outcome.spent += self.gate.config.horizon
        elif trial.seeds_run and SHADOW in adopted:
            self.arena.write_lane(self.shadow, adopted[SHADOW])

    def _credit(self, request: Request, ruling: Ruling, outcome: Outcome) -> None:
        """Count an attempt, once it is known whether the system stands it."""
        action = request.action
        if outcome.trial is not None and outcome.trial.accepted:
            before = self.gate.adopted[CONTROL].tree
            news = self.moves.is_news(action, self.visited, before, self.first_own)
            outcome.credited = news and not outcome.rolled_back
            self._visit()
            # What was taken back is no new start: the controller's earlier changes still count.
            if outcome.rolled_back and outcome.outweighs_harm:
                self.arena.write_lane(self.shadow, self.gate.adopted[SHADOW])
            self.shadow_diverged &= outcome.rolled_back or outcome.outweighs_harm
        if outcome.credited and action.structural:
            self.autonomy.last_structural_gain = self.decision
        outcome.promoted = self.boundary.record(outcome.credited, request, self.decision)
        outcome.verdict = verdict_on_cheat(outcome, ruling)
        self.tries.append(try_entry(outcome))

    def _train(self, outcome: Outcome) -> Task[None]:
        """Train the system (and its shadow, if it has gone another way) for an interval."""
        lanes: tuple[int, ...] = (self.main,)
        if self.shadow_diverged:
            lanes = (self.main, self.shadow)
            self.arena.copy_mix(self.main, self.shadow)
        self.notify("train", done=0, total=self.settings.interval)
        yield Train(lanes, self.settings.interval)
        outcome.spent += len(lanes) * self.settings.interval

    def _measure(self, outcome: Outcome, before: dict[str, float]) -> Task[None]:
        """Evaluate the system, and go back if it has diverged."""
        self.bits = yield self._evaluation
        self.spent += outcome.spent
        if not outcome.stopped:
            outcome.rolled_back = yield from self._guard()
        seen = self.seen
        outcome.fall = sum(before[d] - self.bits[d] for d in seen) / len(seen)
        self.autonomy.observe(self.decision, self.bits, seen, outcome.spent)

    def _log(self, outcome: Outcome) -> None:
        """Log what came of a decision, and see whether the episode is over."""
        log_outcome(self, outcome)
        self.decision += 1
        if outcome.stopped:
            self.end(outcome.stop_reason or "stopped", outcome.stop_criteria)
        elif self.guard.in_a_row > self.settings.max_rollbacks:
            self.end("divergence beyond rollback")
        elif self.spent >= self.settings.budget:
            self.end(BUDGET_SPENT)
        elif self.decision >= self.settings.max_decisions:
            self.end(ALL_DECISIONS)

    def end(self, reason: str, criteria: list[str] | None = None) -> None:
        """End the episode and log why."""
        self.stop_reason, self.stop_criteria = reason, list(criteria or [])
        log_end(self)

    def summary(self) -> dict[str, Any]:
        """What the run came to so far, as plain JSON data."""
        return summarize(self)

    def _guard(self) -> Task[bool]:
        """Go back to the best state if the system has diverged."""
        phase, loss = self.world.phase(self.decision), self.bits[self.world.current(self.decision)]
        finite = all(math.isfinite(bits) for bits in self.bits.values())
        went_back = self.guard.check(phase, loss, finite)
        if went_back:
            self.bits = yield self._evaluation
        else:
            yield from self._remember(phase, loss)
        return went_back

    def _remember(self, phase: int, loss: float) -> Task[None]:
        """Let the guard have the present state if it is the best so far."""
        if self.guard.is_best(phase, loss):
            self.guard.remember((yield Keep(self.main)), loss)

    @property
    def _evaluation(self) -> Evaluate:
        return Evaluate(self.main, "validation", self.world.domains)

    def _visit(self) -> None:
        if self.moves.signature(self.main) not in self.visited:
            self.visited.append(self.moves.signature(self.main))

    def step_flops(self, lane: int) -> float:
        """Operations of a training step of a lane with its present tree and settings."""
        blocks = len(self.arena.trees[lane].blocks)
        updated = min(self.arena.host_top_k[lane], blocks - 1) + 1
        return step_flops(self.settings.system, self.data.vocab_size, blocks, updated)

    def _price(self, lane: int) -> float:
        return self.settings.gate.compute_price * self.step_flops(lane) / self.reference_flops

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a later `restore` needs: tensors and plain JSON data."""
        return take_snapshot(self)

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a snapshot.

        Raises:
            CheckpointError: if it belongs to another configuration.
        """
        restore_snapshot(self, tensors, state)
