"""A whole run of Phase 2 in a run folder: decisions, checkpoints, resuming, and the summary."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from k1.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    newest_intact_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from k1.config import read_dataclass
from k1.errors import CheckpointError, ConfigError
from k1.trainer import Trainer
from k1env.env import Phase2Env
from k1env.ledger import GENESIS, Ledger
from k1env.run_folder import RunFolder
from k1env.session import Session
from k1env.settings import Settings

CHECKPOINT_KIND = "phase2"
CHECKPOINTS_KEPT = 2
TIME_SPENT = "time budget spent"
"""Why a run paused that `--max-minutes` ended; it can be resumed."""


@dataclass(frozen=True)
class RunArguments:
    """What a run was asked for, as `config.json` tells."""

    policy: str
    data: str | None
    preset: str
    seed: int
    device: str
    start: str | None

    @staticmethod
    def of(folder: RunFolder) -> RunArguments:
        """Read those of a run.

        Raises:
            ConfigError: if one is missing, unknown or of another type.
        """
        stored = folder.config["arguments"]
        made = read_dataclass(RunArguments, stored, "config.json: arguments", whole=True)
        if made.seed < 0:
            raise ConfigError(f"config.json: seed = {made.seed} is not possible: it is 0 or more")
        return made


@dataclass
class _Saved:
    """What a checkpoint of a run holds besides tensors."""

    session: dict[str, Any]
    controller: dict[str, Any]
    ledger_index: int
    ledger_head: str
    metrics_lines: int
    data: str
    """Fingerprint of the text."""
    seconds: float


class Controller(Protocol):
    """What drives a run (see `policies.base.Policy`)."""

    reason: str

    def act(self, observation: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> int:
        """Choose an action."""

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain JSON data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a memory over."""


class Display(Protocol):
    """What shows a run to people."""

    def start(self, session: Any) -> None:
        """A run begins or goes on."""

    def event(self, kind: str, *, done: int, total: int) -> None:
        """Long work goes on."""

    def outcome(self, outcome: Any) -> None:
        """A decision is made."""

    def promotion(self, stage: int) -> None:
        """A stage opens."""


class Runner:
    """Drives one environment with one controller, and keeps the run folder.

    Every decision ends with a checkpoint, so a run that is killed loses one decision at most; on
    resuming, that decision is made again and must reproduce what the ledger already holds of it.
    """

    def __init__(
        self,
        env: Phase2Env,
        controller: Controller,
        folder: RunFolder,
        display: Display,
        *,
        seed: int,
        max_minutes: float | None = None,
    ) -> None:
        """Bind the parts of a run; `run` does it."""
        self.env, self.controller, self.folder, self.display = env, controller, folder, display
        self.seed = seed
        self.limit = max_minutes * 60 if max_minutes is not None else None
        self.seconds_before = 0.0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, earlier parts of a resumed run included."""
        return self.seconds_before + time.monotonic() - self.began

    def run(self, *, resume: bool) -> dict[str, Any]:
        """Run to the end and return the summary, which is written to the folder too.

        Raises:
            K1Error: if the folder is in use, damaged, or does not reproduce.
        """
        with self.folder.lock():
            session = self.env.session
            places = self.folder.checkpoints_path
            checkpoint = newest_intact_checkpoint(places) if resume else None
            session.notify = self.display.event
            if checkpoint is not None:
                self._continue(checkpoint)
                self.display.start(session)
            else:
                self._begin(resume)
            longest = 0.0
            while not session.finished:
                here = time.monotonic() - self.began
                if self.limit is not None and here + longest > self.limit:
                    break
                before = time.monotonic()
                self._decide()
                longest = max(longest, time.monotonic() - before)
            self._save()
            summary = self.summary()
            self.folder.write_summary(summary)
            return summary

    def _begin(self, resume: bool) -> None:
        path = self.folder.ledger_path
        if resume and path.exists():
            ledger = Ledger.resume(path, index=0, head=GENESIS)
        else:
            ledger = Ledger.create(path)
        self.folder.truncate_metrics(0)
        self.env.bind_ledger(ledger)
        self.env.session.rebind(self.seed)
        self.display.start(self.env.session)
        self.env.reset(seed=self.seed)
        self._save()

    def _continue(self, checkpoint: Path) -> None:
        tensors, state = _read_checkpoint(checkpoint, self.env, self.folder)
        self.env.session.rebind(self.seed)
        self.env.session.restore(tensors, state.session)
        try:
            self.controller.load_state_dict(state.controller)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CheckpointError(
                f"{checkpoint} holds no memory of this policy ({error}): go on with the policy and "
                "the version of K-1 that the run began with"
            ) from error
        ledger = Ledger.resume(
            self.folder.ledger_path, index=state.ledger_index, head=state.ledger_head
        )
        self.folder.truncate_metrics(state.metrics_lines)
        self.env.bind_ledger(ledger)
        self.seconds_before = state.seconds

    def _decide(self) -> None:
        observation, info = self.env.observe()
        action = self.controller.act(observation, info)
        _, reward, _, _, info = self.env.step(action)
        session = self.env.session
        outcome = session.last
        assert outcome is not None
        self.display.outcome(outcome)
        if outcome.promoted:
            self.display.promotion(session.boundary.stage)
        comparison = outcome.trial.control if outcome.trial else None
        self.folder.append_metrics(
            {
                "decision": outcome.decision,
                "action": outcome.name,
                "reason": self.controller.reason,
                "permitted": outcome.permitted,
                "tried": outcome.trial is not None,
                "credited": outcome.credited,
                "rolled_back": outcome.rolled_back,
                "gain": comparison.mean if comparison else None,
                "p_value": comparison.p_value if comparison else None,
                "stage": session.boundary.stage,
                "evidence": session.boundary.evidence,
                "reward": reward,
                "bits_per_byte": session.bits,
                "domain": session.world.current(outcome.decision),
                "train_loss": float(session.arena["loss"][0]),
                "skipped_steps": int(session.arena["skipped"][0]),
                "agents": session.tree.agents,
                **info["hyper"],
                "spent": session.spent,
                "seconds": round(self.seconds, 1),
            }
        )
        self._save()

    def _save(self) -> None:
        """Save a checkpoint of the run after its last decision."""
        session, folder = self.env.session, self.folder
        tensors, state = session.snapshot()
        folder.sync_metrics()
        ledger = self.env.ledger
        assert isinstance(ledger, Ledger)
        save_checkpoint(
            folder.checkpoints_path / f"step-{session.decision:08d}",
            tensors,
            vars(
                _Saved(
                    session=state,
                    controller=self.controller.state_dict(),
                    ledger_index=ledger.index,
                    ledger_head=ledger.head,
                    metrics_lines=folder.metrics_lines,
                    data=self.env.data.fingerprint,
                    seconds=self.seconds,
                )
            ),
            kind=CHECKPOINT_KIND,
        )
        prune_checkpoints(folder.checkpoints_path, CHECKPOINTS_KEPT)

    def summary(self) -> dict[str, Any]:
        """What the run came to."""
        summary = self.env.session.summary()
        ledger = self.env.ledger
        assert isinstance(ledger, Ledger)
        summary |= {"ledger_entries": ledger.index, "ledger_head": ledger.head}
        if summary["stop_reason"] is None:
            summary["stop_reason"] = TIME_SPENT
        return {**summary, "seconds": round(self.seconds, 1)}


def _read_checkpoint(
    checkpoint: Path, env: Phase2Env, folder: RunFolder
) -> tuple[dict[str, Tensor], _Saved]:
    """Read a run's checkpoint and see that it belongs to the environment's text."""
    tensors, state = load_checkpoint(checkpoint, kind=CHECKPOINT_KIND)
    saved = read_dataclass(_Saved, state, str(checkpoint), whole=True)
    if saved.data != env.data.fingerprint:
        raise CheckpointError(
            f"{folder.path} was made with other text than what is found now: "
            "give the same --data, unchanged"
        )
    return tensors, saved


def open_env(folder: RunFolder, device: str, data: str | None = None) -> Phase2Env:
    """Build the environment that a run was made in; `data` says where its text is now."""
    arguments = RunArguments.of(folder)
    return Phase2Env(
        config=Settings.from_dict(folder.config["settings"]),
        data=arguments.data if data is None else data,
        start=arguments.start,
        device=device,
    )


def load_system(path: Path, device: str, data: str | None = None) -> Trainer:
    """Load the newest system of a run folder of either phase, or a checkpoint of Phase 1.

    Args:
        path: the folder.
        device: cpu or cuda.
        data: where its text is now, if it has moved.

    Raises:
        K1Error: if there is none, it is damaged, or the text is another.
    """
    if (path / "config.json").exists():
        return load_run(path, device, data).trainer
    newest = latest_checkpoint(path / "checkpoints")
    return Trainer.load(newest or path, data, device=device)


def load_run(path: Path, device: str, data: str | None = None) -> Session:
    """Load a run's system in its newest state, to look at it; `data` says where its text is now.

    Raises:
        K1Error: if the folder or its newest checkpoint is damaged, or the text is another.
    """
    folder = RunFolder.open(path)
    newest = latest_checkpoint(folder.checkpoints_path)
    if newest is None:
        raise CheckpointError(f"{path} has no checkpoint yet: run it first, or --resume it")
    env = open_env(folder, device, data)
    tensors, saved = _read_checkpoint(newest, env, folder)
    env.session.rebind(RunArguments.of(folder).seed)
    env.session.restore(tensors, saved.session)
    return env.session
