"""Calibrate the gate on K-1 itself: false acceptances, power, and what other rules would do.

python scripts/calibrate_gate.py --preset tiny --trials 60 --records gate.jsonl
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Calibrate the gate on K-1 itself."""

    preset: str = "tiny"
    """Sizes: tiny, cpu, small, gpu or paper."""
    data: str = "builtin"
    """Text: builtin, hub or a folder of <domain>/{train,validation,test}.txt."""
    device: str = "auto"
    """auto, cpu or cuda."""
    seed: int = 0
    """Decides systems and trials."""
    trials: int = 60
    """Trials of pure luck over all systems; those of known effects follow from it (some three times
    as many)."""
    at_once: Annotated[int | None, optional("N")] = None
    """Trials side by side (default: 2, on a GPU 24)."""
    records: Annotated[Path | None, optional("FILE")] = None
    """Keep every finished trial as a line of JSON; what is there already is not repeated."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """Start no more trials after this many minutes, and report what is finished."""
    json: Annotated[Path | None, optional("FILE")] = None
    """Write tables and trials."""
    markdown: Annotated[Path | None, optional("FILE")] = None
    """Write the page docs/gate.md."""


def main(arguments: Arguments) -> int:
    """Make what is missing, and report."""
    from k1.cli import check_outputs, prepare_torch
    from k1.errors import K1Error
    from k1.trainer import pick_device

    limit = math.inf if arguments.max_minutes is None else arguments.max_minutes
    if not limit > 0:
        raise K1Error(f"--max-minutes {limit} is not possible: give a number above 0")
    if arguments.seed < 0:
        raise K1Error(f"--seed {arguments.seed} is not possible: it is 0 or more")
    check_outputs(arguments.json, arguments.markdown, arguments.records)
    device = pick_device(arguments.device)
    prepare_torch(device.type)

    import platform

    import torch

    from k1.data import load_data
    from k1.durable import canonical_json, write_atomically
    from k1.tables import console
    from k1env.calibration import Plan, calibrate
    from k1env.calibration_report import markdown, tables
    from k1env.settings import Settings
    from policies.progress import progress_bar

    settings = Settings.preset(arguments.preset)
    fields = settings.system.data
    data = load_data(
        arguments.data,
        tokenizer=fields.tokenizer,
        vocab_size=fields.vocab_size,
        max_bytes=fields.max_bytes,
    )
    at_once = arguments.at_once
    if at_once is None:
        at_once = 2 if device.type == "cpu" else 24
    plan = Plan(settings, data, device, arguments.trials, seed=arguments.seed, at_once=at_once)
    with progress_bar("trials") as progress:
        done = calibrate(plan, arguments.records, max_seconds=60 * limit, progress=progress)
    gate = settings.gate
    processor = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    about = [
        f"Preset {arguments.preset}, seed {arguments.seed}; {len(done.rows)} of {done.planned} "
        f"trials; horizon {gate.horizon} + {gate.anneal} steps, {gate.seeds} seeds, margin "
        f"{gate.margin:.1%}, alpha {gate.alpha:g}.",
        f"Device {device.type} ({processor}), Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, data fingerprint {data.fingerprint[:16]}.",
    ]
    if done.made:
        about.append(f"The last {done.made} trials took {done.seconds / 60:.1f} minutes.")
    found = tables(done.rows, gate)
    page = console()
    for table in found:
        page.print(table.shown())
    for line in about:
        page.print(line, markup=False, highlight=False)
    command = shlex.join(["python", *sys.argv])
    command = re.sub(r"--(json|markdown|records)[ =]\S+", r"--\1 FILE", command)
    if arguments.json is not None:
        whole = {**done.head, "tables": [asdict(table) for table in found], "trials": done.rows}
        write_atomically(arguments.json, (canonical_json(whole) + "\n").encode())
    if arguments.markdown is not None:
        write_atomically(arguments.markdown, markdown(found, command, about).encode())
    return 0


if __name__ == "__main__":
    run(Arguments, main)
