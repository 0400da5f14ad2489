"""Train a controller of Phase 2 by PPO, on many worlds side by side.

python scripts/train_ppo.py --preset tiny --num-envs 8 --steps 20000
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from k1.cli import INTERRUPTED, optional, run
from policies.ppo_settings import PPOSettings

if TYPE_CHECKING:
    from policies.training import Plan, TrainingFolder

OF_A_RESUME = ("--resume", "--run-dir", "--steps", "--max-minutes", "--save-minutes")
"""Options that may stand beside --resume; all others are the run's own."""


@dataclass(frozen=True)
class Arguments:
    """Train a controller of Phase 2 by PPO, on many worlds side by side."""

    algorithm: str = "maskable"
    """maskable (MaskablePPO: impossible actions are masked) or plain (PPO)."""
    steps: Annotated[int | None, optional("N")] = None
    """Decisions to learn from, of all environments together (default 100,000)."""
    num_envs: int = 8
    """Environments side by side."""
    preset: str = "tiny"
    """Sizes of the systems: tiny, cpu, small, gpu or paper."""
    data: Annotated[str | None, optional("SOURCE")] = None
    """Text, in place of that of the train worlds: worlds are then drawn over its domains."""
    seed: int = 0
    """Seed of the controller's weights, of its exploration and of the episodes."""
    device: str = "auto"
    """auto, cpu or cuda."""
    wide: Annotated[bool | None, optional("BOOL")] = None
    """Many lanes go through the engine as one batch (default: on a GPU)."""
    starts: Annotated[int | None, optional("N")] = None
    """Seeds that episodes draw theirs from, with Phase 1 run once for each (default: all there
    are, and Phase 1 for every episode)."""
    eval_every: int = 10
    """Updates between validations."""
    eval_worlds: int = 16
    """Validation worlds, at most 16."""
    run_dir: Annotated[Path | None, optional("DIR")] = None
    """Folder of the training (default: runs/ppo-<date>-<time>)."""
    resume: bool = False
    """Go on with the training in --run-dir; --steps may then be larger than before."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """Pause before the update that would go beyond this many minutes; it bounds no validation:
    that before the first update is always made, and one that an update ends in is made whole."""
    save_minutes: Annotated[float | None, optional("M")] = 5.0
    """Minutes between states to resume from; they hold all environments. None: weights are saved,
    but no state to resume from."""
    tensorboard: bool = False
    """Log for TensorBoard too (needs the extra: pip install -e ".[tb]")."""
    ppo: PPOSettings = field(default_factory=PPOSettings)


def main(arguments: Arguments) -> int:
    """Set a training up or take it up again, and train."""
    from k1.cli import prepare_torch
    from k1.errors import K1Error

    for name in ("max_minutes", "save_minutes"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < math.inf:
            raise K1Error(f"--{name.replace('_', '-')} {value} is not possible: 0 or more")
    if arguments.resume:
        _refuse_others(sys.argv[1:])
    from k1.checkpoint import checkpoint_exists
    from policies.training import RESUME, TIME_SPENT, Plan, Training, TrainingFolder
    from policies.training_display import TrainingDisplay

    if arguments.resume:
        folder = _open(arguments)
        plan = Plan.from_dict(folder.config["plan"])
        if arguments.steps is not None:
            plan = replace(plan, steps=arguments.steps)
        tensorboard = folder.config["tensorboard"]
    else:
        plan, tensorboard = _plan(arguments), arguments.tensorboard
    prepare_torch(plan.device)
    display = TrainingDisplay()
    training = Training(plan, display, tensorboard=tensorboard)
    if not arguments.resume:  # a mistake in the options leaves no folder behind
        path = arguments.run_dir or Path("runs") / time.strftime("ppo-%Y%m%d-%H%M%S")
        config = {"plan": plan.to_dict(), "tensorboard": tensorboard}
        folder = TrainingFolder.create(path, config, [sys.executable, *sys.argv])
    again = f"python scripts/train_ppo.py --run-dir {folder.path} --resume"
    extended = plan.steps != folder.config["plan"]["steps"]
    unchanged = f"{again} --steps {plan.steps}" if extended else again
    try:
        with display:
            summary = training.run(
                folder,
                resume=arguments.resume,
                max_minutes=arguments.max_minutes,
                save_minutes=arguments.save_minutes,
            )
    except KeyboardInterrupt:
        message = f"Go on from the newest state with:\n  {unchanged}"
        if arguments.save_minutes is None and not checkpoint_exists(
            folder.checkpoints_path / RESUME
        ):
            message = "With --save-minutes None, there is no state to go on from."
        print(f"\nInterrupted. {message}", file=sys.stderr)
        return INTERRUPTED
    print(f"{summary['stop_reason']}: {summary['updates']} updates, {summary['steps']:,} decisions")
    paused = summary["stop_reason"] == TIME_SPENT
    if arguments.save_minutes is not None:
        print(f"go on: {unchanged if paused else f'{again} --steps N'}")
    print(f"use it: python scripts/run_phase2.py --policy {folder.path}")
    return 0


def _open(arguments: Arguments) -> TrainingFolder:
    """Open the folder of the training to go on with."""
    from k1.errors import K1Error
    from policies.training import TrainingFolder

    if arguments.run_dir is None:
        raise K1Error("--resume needs the training to go on with: name it by --run-dir")
    return TrainingFolder.open(arguments.run_dir)


def _plan(arguments: Arguments) -> Plan:
    """Fill in what the options leave open."""
    from k1.cli import absolute_source
    from k1.trainer import pick_device
    from k1env.settings import Settings
    from policies.training import Plan

    device = pick_device(arguments.device).type
    return Plan(
        settings=Settings.preset(arguments.preset),
        ppo=arguments.ppo,
        algorithm=arguments.algorithm,
        num_envs=arguments.num_envs,
        steps=100_000 if arguments.steps is None else arguments.steps,
        seed=arguments.seed,
        data=None if arguments.data is None else absolute_source(arguments.data),
        device=device,
        wide=device != "cpu" if arguments.wide is None else arguments.wide,
        starts=arguments.starts,
        eval_every=arguments.eval_every,
        eval_worlds=arguments.eval_worlds,
    )


def _refuse_others(words: list[str]) -> None:
    """See that a resumed training is not told anything that its folder says already."""
    from k1.errors import K1Error

    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in OF_A_RESUME:
            raise K1Error(
                f"{name} cannot stand beside --resume: a training goes on with the settings in "
                "its config.json; leave the option out, or start a new one in another --run-dir"
            )


if __name__ == "__main__":
    run(Arguments, main)
