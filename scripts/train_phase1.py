"""Phase 1: train a tree with fixed settings, and save a checkpoint that Phase 2 can start from.

python scripts/train_phase1.py --steps 2000 --mode sparse
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from k1.cli import INTERRUPTED, optional, run

if TYPE_CHECKING:
    from k1.config import Config
    from k1.data import TextData
    from k1.trainer import Trainer
    from k1env.run_folder import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Phase 1: train a tree with fixed settings, and save checkpoints for Phase 2."""

    steps: int = 1000
    """Training steps in all."""
    mode: str = "sparse"
    """dense (every block), exact (full backward, path update) or sparse (probe and path)."""
    data: str = "builtin"
    """Text: builtin, hub or a folder of <domain>/{train,validation,test}.txt."""
    preset: str = "cpu"
    """Sizes: tiny, cpu, small, gpu or paper."""
    router: Annotated[str | None, optional("NAME")] = None
    """How siblings are mixed: mean, learned or evidence (the preset's by default)."""
    domains: Annotated[str | None, optional("A,B")] = None
    """Domains to train on, apart by commas (default: all, in equal shares)."""
    lr: Annotated[float | None, optional("X")] = None
    """Learning rate (the preset's by default)."""
    seed: int = 0
    """Seed of weights and batches."""
    device: str = "auto"
    """auto, cpu or cuda."""
    run_dir: Annotated[Path | None, optional("DIR")] = None
    """Folder for checkpoints and the log (default: runs/phase1-<date>-<time>)."""
    resume: bool = False
    """Go on from the newest checkpoint in --run-dir; give the other options again."""
    every: int = 100
    """Steps between evaluations, checkpoints and printed lines."""


def main(arguments: Arguments) -> int:
    """Train, evaluate, save."""
    from k1.cli import absolute_source, prepare_torch
    from k1.config import Config
    from k1.data import load_data
    from k1.display import plain_tree, visit_table
    from k1.errors import K1Error
    from k1.trainer import pick_device
    from k1env.run_folder import RunFolder

    if arguments.steps < 1 or arguments.every < 1:
        raise K1Error("--steps and --every are 1 or more")
    if arguments.resume and arguments.run_dir is None:
        raise K1Error("--resume needs the run to go on with: name it by --run-dir")
    device = pick_device(arguments.device).type
    prepare_torch(device)
    source = absolute_source(arguments.data)
    config = Config.preset(arguments.preset).replace(
        update={"mode": arguments.mode}, data={"source": source}
    )
    if arguments.router:
        config = config.replace(model={"router": arguments.router})
    if arguments.lr is not None:
        config = config.replace(train={"lr": arguments.lr})
    path = arguments.run_dir or Path("runs") / time.strftime("phase1-%Y%m%d-%H%M%S")
    folder = RunFolder(path, {})
    if arguments.resume and not folder.checkpoints_path.is_dir():
        raise K1Error(f"there is no run in {path}: leave --resume out to start one")
    data = load_data(config.data)
    domains = arguments.domains.split(",") if arguments.domains else data.domains
    start = _Start(config, data, arguments.seed, device, dict.fromkeys(domains, 1.0))
    trainer = None if arguments.resume else start.fresh()  # its mistakes leave no folder behind
    print(data.describe())
    path.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        if trainer is None:
            trainer = _go_on(folder, start)
        else:
            folder.refuse_to_mix()
        folder.checkpoints_path.mkdir(exist_ok=True)
        try:
            _train(trainer, folder, arguments)
        except KeyboardInterrupt:
            print(f"\nInterrupted at step {trainer.steps}. Go on from the newest checkpoint by the "
                  f"same options and\n  --run-dir {shlex.quote(str(path))} --resume",
                  file=sys.stderr)  # fmt: skip
            return INTERRUPTED
    print(plain_tree(trainer))
    print(visit_table(trainer))
    final = folder.checkpoints_path / f"step-{trainer.steps:08d}"
    print(f"checkpoint: {final}")
    words = ["--preset", arguments.preset, "--data", source, "--start", str(final)]
    print(f"Phase 2 from here: python scripts/run_phase2.py {shlex.join(words)}")
    return 0


@dataclass(frozen=True)
class _Start:
    """What the options ask for."""

    config: Config
    data: TextData
    seed: int
    device: str
    mix: dict[str, float]
    """Share of each domain."""

    def fresh(self) -> Trainer:
        """Build an untrained system."""
        from k1.trainer import Trainer

        trainer = Trainer(self.config, self.data, seed=self.seed, device=self.device)
        trainer.set_mix(self.mix)
        return trainer


def _go_on(folder: RunFolder, start: _Start) -> Trainer:
    """Load the newest checkpoint, and drop the metrics that were written after it.

    Raises:
        K1Error: if the run was made with other options.
    """
    from k1.checkpoint import newest_intact_checkpoint
    from k1.errors import K1Error
    from k1.trainer import Trainer

    newest = newest_intact_checkpoint(folder.checkpoints_path)
    if newest is None:  # it was killed before the first one
        folder.truncate_metrics(0)
        return start.fresh()
    trainer = Trainer.load(newest, start.data, device=start.device)
    mix = trainer.arena["mix"][0].tolist()
    trainer.set_mix(start.mix)
    theirs, ours = trainer.config.to_dict(), start.config.to_dict()
    differ = [
        f"{section}.{name} {value}, not {ours[section][name]}"
        for section, fields in theirs.items()
        for name, value in fields.items()
        if value != ours[section][name]
    ]
    if trainer.seed != start.seed:
        differ.append(f"--seed {trainer.seed}, not {start.seed}")
    if trainer.arena["mix"][0].tolist() != mix:
        used = ",".join(d for d, share in zip(trainer.data.domains, mix, strict=True) if share)
        differ.append(f"--domains {used}, not {','.join(start.mix)}")
    if differ:
        raise K1Error(
            f"{folder.path} was made with {'; '.join(differ)}: give the same options again, "
            "or start anew in another --run-dir"
        )
    whole = folder.metrics_lines
    lines = folder.metrics_path.read_bytes().split(b"\n")[:whole] if whole else []
    folder.truncate_metrics(sum(json.loads(line)["step"] <= trainer.steps for line in lines))
    print(f"goes on from step {trainer.steps}")
    return trainer


def _train(trainer: Trainer, folder: RunFolder, arguments: Arguments) -> None:
    """Train to the last step; evaluate, log and save on the way."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from k1.checkpoint import prune_checkpoints
    from k1.display import error_path, step_line, updated_line

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as progress:
        bar = progress.add_task("training", total=arguments.steps, completed=trainer.steps)
        while trainer.steps < arguments.steps:
            began = time.monotonic()
            count = min(arguments.every - trainer.steps % arguments.every,
                        arguments.steps - trainer.steps)  # fmt: skip
            for _ in range(count):
                report = trainer.step()
                progress.advance(bar)
            milliseconds = (time.monotonic() - began) / count * 1000
            bits = trainer.evaluate("validation")
            progress.console.print(
                step_line(
                    report,
                    trainer=trainer,
                    lr=trainer.config.train.lr,
                    milliseconds=milliseconds,
                ),
                soft_wrap=True,
            )
            if report.path:
                progress.console.print(error_path(trainer, report), soft_wrap=True)
            progress.console.print(updated_line(report))
            shown = "  ".join(f"{domain} {value:.3f}" for domain, value in bits.items())
            progress.console.print(f"validation bits per byte: {shown}")
            entry = {"step": trainer.steps, "loss": report.loss, "bits_per_byte": bits}
            folder.append_metrics({**entry, "milliseconds": milliseconds})
            folder.sync_metrics()
            trainer.save(folder.checkpoints_path / f"step-{trainer.steps:08d}")
            prune_checkpoints(folder.checkpoints_path, 2)


if __name__ == "__main__":
    run(Arguments, main)
