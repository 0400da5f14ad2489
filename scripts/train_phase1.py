"""Phase 1: train a tree with fixed settings, and save a checkpoint that Phase 2 can start from.

python scripts/train_phase1.py --steps 2000 --mode sparse
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from k1.cli import optional, run


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
    """Sizes: tiny, cpu, gpu or paper."""
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
    """Go on from the newest checkpoint in --run-dir."""
    every: int = 100
    """Steps between evaluations, checkpoints and the printed tree."""


def main(arguments: Arguments) -> int:
    """Train, evaluate, save."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from k1.checkpoint import latest_checkpoint, prune_checkpoints
    from k1.cli import prepare_torch
    from k1.config import Config
    from k1.data import load_data
    from k1.display import error_path, plain_tree, step_line, updated_line, visit_table
    from k1.errors import K1Error
    from k1.trainer import Trainer, pick_device

    if arguments.steps < 1 or arguments.every < 1:
        raise K1Error("--steps and --every are 1 or more")
    device = pick_device(arguments.device).type
    prepare_torch(device)
    config = Config.preset(arguments.preset).replace(update={"mode": arguments.mode})
    if arguments.router:
        config = config.replace(model={"router": arguments.router})
    if arguments.lr is not None:
        config = config.replace(train={"lr": arguments.lr})
    config = config.replace(data={"source": arguments.data})
    folder = arguments.run_dir or Path("runs") / time.strftime("phase1-%Y%m%d-%H%M%S")
    checkpoints = folder / "checkpoints"
    newest = latest_checkpoint(checkpoints) if arguments.resume else None
    if arguments.resume and newest is None:
        raise K1Error(f"there is no checkpoint in {checkpoints}: leave --resume out to start")
    if not arguments.resume and folder.exists() and any(folder.iterdir()):
        raise K1Error(f"{folder} is not empty: go on with --resume or choose another --run-dir")
    data = load_data(config.data)
    print(data.describe())
    if newest is None:
        trainer = Trainer(config, data, seed=arguments.seed, device=device)
        if arguments.domains:
            trainer.set_mix(dict.fromkeys(arguments.domains.split(","), 1.0))
    else:
        trainer = Trainer.load(newest, data, device=device)
        if trainer.config != config or trainer.seed != arguments.seed:
            raise K1Error(f"{folder} was made with other settings: give the same options again")
        print(f"goes on from step {trainer.steps}")
    checkpoints.mkdir(parents=True, exist_ok=True)
    log = (folder / "metrics.jsonl").open("a")
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
                    lr=config.train.lr,
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
            log.write(json.dumps({**entry, "milliseconds": milliseconds}) + "\n")
            log.flush()
            trainer.save(checkpoints / f"step-{trainer.steps:08d}")
            prune_checkpoints(checkpoints, 2)
    print(plain_tree(trainer))
    print(visit_table(trainer))
    final = checkpoints / f"step-{trainer.steps:08d}"
    print(f"checkpoint: {final}")
    print(f"Phase 2 from here: python scripts/run_phase2.py --preset {arguments.preset} "
          f"--data {arguments.data} --start {final}")  # fmt: skip
    return 0


if __name__ == "__main__":
    run(Arguments, main)
