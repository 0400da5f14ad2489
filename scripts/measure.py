"""Measure a finished run or a checkpoint in bits per byte, on a held-out pool.

python scripts/measure.py RUN --split test
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Measure a run, or a checkpoint of Phase 1, in bits per byte."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of run_phase2.py or train_phase1.py, or a checkpoint of the latter."""
    split: str = "test"
    """test (sealed until now: nothing in a run reads it) or validation."""
    data: Annotated[str | None, optional("SOURCE")] = None
    """The text that the run was made on, where it has moved since."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print JSON."""


def main(arguments: Arguments) -> int:
    """Load the system, measure it, print a line per domain."""
    from k1.cli import prepare_torch
    from k1.errors import K1Error
    from k1.trainer import pick_device
    from k1env.runner import load_system

    if arguments.split not in ("test", "validation"):
        raise K1Error(f"unknown split {arguments.split!r}: choose test or validation")
    device = pick_device(arguments.device).type
    prepare_torch(device)
    trainer = load_system(arguments.run, device, arguments.data)
    bits = trainer.evaluate(arguments.split)
    if arguments.json:
        print(json.dumps({"split": arguments.split, "bits_per_byte": bits}))
        return 0
    print(f"{arguments.split} bits per byte after {trainer.steps} steps")
    for domain, value in bits.items():
        print(f"  {domain:12} {value:.3f}")
    return 0


if __name__ == "__main__":
    run(Arguments, main)
