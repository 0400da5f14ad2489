"""Training a controller by PPO: the loop, its run folder, and resuming."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat

from k1.checkpoint import (
    checkpoint_exists,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from k1.config import ModelConfig, read_dataclass
from k1.data import TextData, load_data
from k1.errors import ConfigError, K1Error
from k1env.actions import action_table
from k1env.instances import Choice, InstanceSet, instances, instances_over
from k1env.run_folder import RunFolder
from k1env.sb3 import SB3VecEnv
from k1env.settings import Settings
from k1env.vector import Phase2VectorEnv
from policies.learned import BEST, LAST, Controller, NetworkPolicy, save_controller
from policies.network import NetworkSizes
from policies.ppo import TrainingEnv, make_model
from policies.ppo_settings import PPOSettings
from policies.reference import train_on_alone
from policies.training_state import KIND, restore_state, take_state
from policies.validation import Validation, validate

RESUME = "resume"
"""Name of the checkpoint that a training goes on from."""
MOST_SEED = 2**32 - 1
"""NumPy's global generator takes no larger one."""
RECENT = 100
"""Episodes that the running mean of returns is over."""
TIME_SPENT, ALL_STEPS = "time budget spent", "all steps made"
KINDS = tuple(dict.fromkeys(action.kind for action in action_table(ModelConfig())))

_README = f"""\
This folder holds the training of a controller of K-1.

config.json     the settings, the exact command, and the versions that it was started with
metrics.jsonl   one JSON object for each update; null stands for what was not measured
checkpoints/    {BEST}: the weights that did best on validation worlds; {LAST}: the newest ones;
                step-N: those after N decisions, at each validation; {RESUME}: all that it takes to
                go on, environments included unless they were to be left out. Tensors, plain JSON,
                and their SHA-256
tensorboard/    the same figures for TensorBoard, if they were asked for
summary.json    what it came to so far, written when it ends or pauses
run.lock        marks a training in progress; it may stay behind and does no harm

The folder itself, or {BEST}, {LAST} or step-N, can be named as the --policy of run_phase2.py.
A training that was interrupted goes on by: train_ppo.py --run-dir FOLDER --resume
"""


class TrainingFolder(RunFolder):
    """The files of a training."""

    readme = _README
    script = "train_ppo.py"
    fields = ("plan", "tensorboard")


@dataclass(frozen=True)
class Plan:
    """Everything that a training depends on but the text itself."""

    settings: Settings
    """Of the environments."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    network: NetworkSizes = field(default_factory=NetworkSizes)
    algorithm: str = "maskable"
    num_envs: int = 8
    steps: int = 100_000
    """Decisions to learn from, of all environments together."""
    seed: int = 0
    data: str | None = None
    """Text; by default that of the sets of instances."""
    device: str = "cpu"
    wide: bool = False
    """Whether many lanes go through the engine as one batch."""
    starts: int | None = None
    """Seeds that episodes draw theirs from; Phase 1 is run once for each. None: all there are."""
    keep_environments: bool = True
    """Whether the state to go on from holds the episodes under way, a copy of every environment.
    Without, a training that is resumed begins new ones, and takes another course."""
    eval_every: int = 10
    """Updates between validations."""
    eval_worlds: int = 16
    """Validation worlds, the first ones of their set."""

    def __post_init__(self) -> None:
        """Refuse impossible values, naming the field."""
        for name in ("num_envs", "steps", "eval_every", "eval_worlds", "starts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise K1Error(f"{name} = {getattr(self, name)} is not possible: 1 or more")
        if self.ppo.paired and self.starts is None:
            raise K1Error("paired rewards need a number of starts: give --starts, such as 256")
        if not 0 <= self.seed <= MOST_SEED:
            raise K1Error(f"seed = {self.seed} is not possible: 0 to {MOST_SEED}")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON data."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: for an unknown field or an impossible value.
        """
        return read_dataclass(Plan, data, "plan")


@dataclass
class _Saved:
    """What the state to go on from holds besides tensors."""

    training: dict[str, Any]
    update: int
    best: float | None
    recent: list[float]
    metrics_lines: int
    data: str
    """Fingerprint of the text."""
    seconds: float


class Display(Protocol):
    """What shows a training to people."""

    def begin(self, steps: int, total: int) -> None:
        """The training begins or goes on."""

    def advance(self, steps: int) -> None:
        """Decisions are made."""

    def update(self, row: dict[str, Any], plan: Plan, seconds: float) -> None:
        """An update is made; `seconds` is what the whole training has taken so far."""

    def say(self, line: str) -> None:
        """Something else is worth a line."""


class Training:
    """A controller in training."""

    folder: TrainingFolder

    def __init__(self, plan: Plan, display: Display, *, tensorboard: bool = False) -> None:
        """Make environments and algorithm; `run` trains.

        Raises:
            K1Error: for settings that are not possible, text that cannot be had, or TensorBoard
                where it is not installed.
        """
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise K1Error('TensorBoard is not installed: pip install -e ".[tb]"')
        self.plan, self.display, self.tensorboard = plan, display, tensorboard
        text, train, validation = _worlds(plan)
        vec_env = _environments(plan, plan.num_envs, text, train, plan.starts)
        self.validation_env = _environments(plan, len(validation), text, validation)
        self.env = TrainingEnv(SB3VecEnv(vec_env), plan.ppo, vec_env.envs[0].session.table)
        self.model = make_model(
            plan.algorithm,
            self.env,
            plan.ppo,
            vec_env.actions,
            plan.network,
            seed=plan.seed,
            device=plan.device,
        )
        self.data = vec_env.envs[0].data.fingerprint
        self.update = 0
        self.best: float | None = None
        self.recent: list[float] = []
        self.seconds_before, self.began = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the training, earlier parts of a resumed one included."""
        return self.seconds_before + time.monotonic() - self.began

    def run(
        self,
        folder: TrainingFolder,
        *,
        resume: bool,
        max_minutes: float | None = None,
        save_minutes: float = 5.0,
    ) -> dict[str, Any]:
        """Train to the last step, or for so long; returns the summary, which is written too.

        Args:
            folder: where everything about it is kept.
            resume: go on from the folder's state; where nothing was trained yet, begin.
            max_minutes: pause before the update that would take longer than this.
            save_minutes: how often the state is saved, between updates.

        Raises:
            K1Error: if the folder is in use or damaged, or has lost its state.
        """
        self.folder = folder
        with folder.lock():
            place = str(folder.path / "tensorboard")
            formats = [TensorBoardOutputFormat(place)] if self.tensorboard else []
            self.model.set_logger(Logger(None, [*formats]))
            state = self.folder.checkpoints_path / RESUME
            remove_leftovers(state.parent)
            if resume and checkpoint_exists(state):
                self._continue(state)
            else:
                self._refuse_to_start_over()
                self.folder.truncate_metrics(0)
                if self.plan.ppo.paired:
                    self._play_reference(range(self.plan.starts or 0))
            callback = _Progress(self.display.advance, self.plan.num_envs)
            _, callback = self.model._setup_learn(self.plan.steps, callback, False)
            self.display.begin(self.model.num_timesteps, self.plan.steps)
            if self.folder.metrics_lines == 0:
                self._report({}, self._validate())
                self._save()  # from here on there always is a state to go on from
            longest, saved = 0.0, time.monotonic()
            limit = math.inf if max_minutes is None else 60 * max_minutes
            reason = ALL_STEPS
            while self.model.num_timesteps < self.plan.steps:
                before = time.monotonic()
                if before - self.began + longest > limit:
                    reason = TIME_SPENT
                    break
                self._learn(callback)
                longest = max(longest, time.monotonic() - before)
                if time.monotonic() - saved >= 60 * save_minutes:
                    self._save()
                    saved = time.monotonic()
            self._save()
            summary = self.summary(reason)
            self.folder.write_summary(summary)
            return summary

    def _play_reference(self, starts: range) -> None:
        """Play what rewards are compared with."""
        self.display.say(f"playing the no-op from {len(starts)} starts, to compare rewards with")
        reference = self.env.reference = train_on_alone(self.env.vec_env, starts)
        mean = statistics.fmean(curve[-1] for curve in reference.curves.values())
        self.display.say(f"the no-op's return is {mean:.2f} on average")

    def summary(self, reason: str) -> dict[str, Any]:
        """What the training came to, as plain JSON data."""
        return {
            "stop_reason": reason,
            "updates": self.update,
            "steps": self.model.num_timesteps,
            "return": _mean(self.recent),
            "best_validation_return": self.best,
            "seconds": round(self.seconds, 1),
        }

    def _learn(self, callback: Any) -> None:
        """Make one update, measure and record it."""
        model, before = self.model, time.monotonic()
        collected = model.num_timesteps
        model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        model.train()
        self.update += 1
        ended = self.update % self.plan.eval_every == 0 or model.num_timesteps >= self.plan.steps
        seconds = time.monotonic() - before
        figures = {n.partition("/")[2]: float(v) for n, v in model.logger.name_to_value.items()}
        figures["steps_per_second"] = (model.num_timesteps - collected) / seconds
        self._report(figures, self._validate() if ended else None)

    def _report(self, figures: dict[str, Any], validation: Validation | None) -> None:
        """Write a row of metrics, show it, and keep the weights that it is about if they matter."""
        episodes, counts = self.env.episodes, self.env.counts
        self.recent = [*self.recent, *(episode.total for episode in episodes)][-RECENT:]
        row = {
            "update": self.update,
            "steps": self.model.num_timesteps,
            "episodes": len(episodes),
            "return": _mean([episode.total for episode in episodes]),
            "recent_return": _mean(self.recent),
            "length": _mean([float(episode.length) for episode in episodes]),
            "stage": _mean([float(episode.stage) for episode in episodes]),
            "gain": _mean([episode.gain for episode in episodes if episode.gain is not None]),
            **_shares(counts),
            "reward_scale": self.env.scale.deviation,
            **figures,
            "validation": None if validation is None else asdict(validation),
            "seconds": round(self.seconds, 1),
        }
        self.env.episodes, self.env.counts = [], Counter()
        self.folder.append_metrics(row)
        self.display.update(row, self.plan, self.seconds)
        self._log(row)
        if validation is not None:
            about = self._about(validation)
            steps = self.model.num_timesteps
            save_controller(self.folder.checkpoints_path / f"step-{steps:08d}", about)
            if self.best is None or validation.total > self.best:
                self.best = validation.total
                save_controller(self.folder.checkpoints_path / BEST, about)

    def _log(self, row: dict[str, Any]) -> None:
        """Hand a row to TensorBoard, if it listens."""
        logger, validation = self.model.logger, row["validation"] or {}
        for name, value in row.items():
            if isinstance(value, int | float):
                logger.record(f"train/{name}", value)
        for name, value in validation.items():
            logger.record(f"validation/{name}", value)
        logger.dump(step=row["steps"])

    def _validate(self) -> Validation:
        policy = NetworkPolicy(self.model.policy.network)
        return validate(self.validation_env, policy, range(len(self.validation_env.envs)))

    def _about(self, validation: Validation | None) -> Controller:
        """The present weights, with what is known about them."""
        weights = {n: t.detach().cpu() for n, t in self.model.policy.network.state_dict().items()}
        about = {
            "command": self.folder.command,
            "plan": self.plan.to_dict(),
            "update": self.update,
            "steps": self.model.num_timesteps,
            "validation": None if validation is None else asdict(validation),
        }
        return Controller(self.plan.network, weights, about)

    def _save(self) -> None:
        """Save the newest weights, and the state to go on from."""
        tensors, state = take_state(self.model, self.env, self.plan.keep_environments)
        self.folder.sync_metrics()
        saved = _Saved(
            training=state,
            update=self.update,
            best=self.best,
            recent=self.recent,
            metrics_lines=self.folder.metrics_lines,
            data=self.data,
            seconds=self.seconds,
        )
        place = self.folder.checkpoints_path / RESUME
        save_checkpoint(place, tensors, vars(saved), kind=KIND)
        # After the state, so that where there are newest weights there is a state too.
        save_controller(self.folder.checkpoints_path / LAST, self._about(None))

    def _refuse_to_start_over(self) -> None:
        """See that no training is lost that a folder without a state tells of."""
        places = self.folder.checkpoints_path
        if self.folder.metrics_lines > 1 or checkpoint_exists(places / LAST):
            raise K1Error(
                f"{places / RESUME} is missing, though the training had begun: restore it from a "
                "copy, or start a new training in another --run-dir"
            )

    def _continue(self, place: Path) -> None:
        tensors, state = load_checkpoint(place, kind=KIND)
        saved = read_dataclass(_Saved, state, str(place), whole=True)
        if saved.data != self.data:
            raise K1Error(
                f"{self.folder.path} was made with other text than what is found now: "
                "give the same text, unchanged"
            )
        restore_state(self.model, self.env, tensors, saved.training)
        self.folder.truncate_metrics(saved.metrics_lines)
        self.update, self.best = saved.update, saved.best
        self.recent, self.seconds_before = saved.recent, saved.seconds


def _worlds(plan: Plan) -> tuple[TextData | None, Choice, tuple[Any, ...]]:
    """The text, the worlds to train on, and those to validate on."""
    if plan.data is None:
        names = [world.name for world in instances("validation")]
        return None, "train", _first_worlds(names, plan)
    fields = plan.settings.system.data
    text = load_data(
        plan.data,
        tokenizer=fields.tokenizer,
        vocab_size=fields.vocab_size,
        max_bytes=fields.max_bytes,
    )
    sets = instances_over(text.domains)
    return text, InstanceSet("train", sets["train"]), _first_worlds(sets["validation"], plan)


def _first_worlds(worlds: Sequence[Any], plan: Plan) -> tuple[Any, ...]:
    """The validation worlds that a plan asks for."""
    if plan.eval_worlds > len(worlds):
        raise ConfigError(f"eval_worlds = {plan.eval_worlds} is not possible: 1 to {len(worlds)}")
    return tuple(worlds[: plan.eval_worlds])


def _environments(
    plan: Plan, count: int, text: TextData | None, worlds: Any, starts: int | None = None
) -> Phase2VectorEnv:
    return Phase2VectorEnv(
        count,
        config=plan.settings,
        data=text,
        device=plan.device,
        wide=plan.wide,
        instance=worlds,
        starts=starts,
    )


class _Progress(BaseCallback):
    """Tells how many decisions are made."""

    def __init__(self, advance: Callable[[int], None], environments: int) -> None:
        super().__init__()
        self._advance, self._environments = advance, environments

    def _on_step(self) -> bool:
        self._advance(self._environments)
        return True


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shares(counts: Counter[str]) -> dict[str, float | None]:
    """Shares of the decisions, by kind and by what became of them."""
    made = counts["decisions"]
    names = (*KINDS, "tried", "credited", "impossible")
    return {name: counts[name] / made if made else None for name in names}
