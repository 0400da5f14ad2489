"""Environment steps a second: many lanes, one lane, single environments in processes, a plain loop.

python scripts/throughput.py --lanes 1,8,64
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Measure how many environment steps a second there are, with and without learning."""

    preset: str = "tiny"
    """Sizes: tiny, cpu, small, gpu or paper."""
    lanes: str = "1,8,64"
    """Numbers of environments in one arena, apart by commas; the first is compared with."""
    processes: Annotated[int | None, optional("N")] = None
    """Single environments in processes of their own (default: one for each core of the CPU)."""
    tiers: str = "no-op,random,inference,learning"
    """What is measured, apart by commas (policies/throughput.py lists it)."""
    rounds: int = 5
    """Rounds in which the sides take turns."""
    seconds: float = 10.0
    """Time that each side and tier is measured for, over all rounds."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: Annotated[Path | None, optional("FILE")] = None
    """Write everything measured there, anew after each tier."""
    markdown: Annotated[Path | None, optional("FILE")] = None
    """Write a section of a page there."""


def main(arguments: Arguments) -> int:
    """Measure, show, write down."""
    from k1.cli import check_outputs, prepare_torch
    from k1.errors import K1Error
    from k1.trainer import pick_device

    if not re.fullmatch(r"\d+(,\d+)*", arguments.lanes):
        raise K1Error(f"--lanes {arguments.lanes!r}: give numbers apart by commas, such as 1,8,64")
    check_outputs(arguments.json, arguments.markdown)
    device = pick_device(arguments.device)
    prepare_torch(device.type)

    import torch

    from k1.durable import write_atomically
    from k1.tables import console
    from k1env.settings import Settings
    from k1env.setup import set_up
    from policies.throughput import Plan, markdown, measure, table

    setup = set_up(arguments.preset, data=None, config=None, start=None, device=device.type)
    processes = arguments.processes
    plan = Plan(
        settings=Settings.preset(arguments.preset),
        data=setup.data,
        device=device,
        lanes=tuple(int(n) for n in arguments.lanes.split(",")),
        processes=(os.cpu_count() or 1) if processes is None else processes,
        tiers=tuple(arguments.tiers.split(",")),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    cuda = device.type == "cuda"
    result: dict[str, Any] = {
        "command": re.sub(
            r"--(json|markdown)[ =]\S+", r"--\1 FILE", shlex.join(["python", *sys.argv])
        ),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "about": f"preset {arguments.preset}, {plan.settings.interval} training steps for each "
        f"environment step, {os.cpu_count()} CPU cores",
        "rounds": arguments.rounds,
    }

    def keep(records: list[dict[str, Any]]) -> None:
        peak = torch.cuda.max_memory_allocated(device) if cuda else None
        result.update(records=records, peak_bytes=peak)
        if arguments.json:
            write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())

    measure(plan, say, keep)
    shown = table(result["records"])
    console().print(shown.shown())
    if arguments.markdown:
        write_atomically(arguments.markdown, markdown(result).encode())
    return 0


if __name__ == "__main__":
    run(Arguments, main)
