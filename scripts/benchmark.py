"""Measure training steps against ordinary PyTorch, side by side in one process.

python scripts/benchmark.py --json benchmark.json
python scripts/benchmark.py --from benchmark.json --markdown docs/performance.md
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Measure training steps against ordinary PyTorch, side by side in one process."""

    configs: Annotated[str | None, optional("A,B")] = None
    """Sizes (k1/bench/configurations.py), apart by commas (default: what suits the device)."""
    variants: Annotated[str | None, optional("A,B")] = None
    """Ways to make a step (k1/bench/variants.py), apart by commas (default: all)."""
    rounds: int = 5
    """Rounds in which the variants take turns."""
    seconds: float = 3.0
    """Time that each variant is measured for, over all rounds."""
    patience: float = 120.0
    """Longest time in seconds to build, compile and warm up a variant, and for one round."""
    router: Annotated[str | None, optional("NAME")] = None
    """How siblings are mixed: mean, learned or evidence (the configuration's by default)."""
    agreement: int = 0
    """Steps to train for before the probe's culprits are compared with the full batch's; 0: no."""
    agreement_batches: int = 200
    """Batches for that comparison."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: Annotated[int | None, optional("N")] = None
    """Torch's threads for each product on a CPU (default: 1, as in training)."""
    json: Annotated[Path | None, optional("FILE")] = None
    """Write everything measured there, anew after each round and variant."""
    sources: Annotated[
        tuple[Path, ...], tyro.conf.arg(name="from", metavar="FILE...", help_behavior_hint="")
    ] = ()
    """Measure nothing; read what earlier runs wrote with --json."""
    markdown: Annotated[Path | None, optional("FILE")] = None
    """Write the page about performance there."""


def main(arguments: Arguments) -> int:
    """Measure or read, then show and write."""
    from k1.bench.report import markdown, read_results, show
    from k1.tables import console

    page = console()
    if arguments.sources:
        results = [read_results(path) for path in arguments.sources]
    else:
        results = [_measure(arguments)]
    for result in results:
        show(result, page)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results))
    statuses = [
        record["status"]
        for result in results
        for case in result["configurations"].values()
        for record in case["variants"].values()
    ]
    return 1 if "failed" in statuses else 0


def _measure(arguments: Arguments) -> dict[str, Any]:
    import torch

    from k1.bench.whole import Request, measure
    from k1.cli import prepare_torch
    from k1.durable import write_atomically
    from k1.errors import K1Error
    from k1.trainer import pick_device

    if arguments.rounds < 1 or arguments.seconds <= 0 or arguments.patience <= 0:
        raise K1Error("--rounds, --seconds and --patience are positive")
    device = pick_device(arguments.device)
    prepare_torch(device.type)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    request = Request(
        configs=arguments.configs,
        variants=arguments.variants,
        router=arguments.router,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        patience=arguments.patience,
        agreement=arguments.agreement,
        agreement_batches=arguments.agreement_batches,
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def keep(result: dict[str, Any]) -> None:
        if arguments.json:
            write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())

    return measure(request, device, sys.argv, say, keep)


if __name__ == "__main__":
    run(Arguments, main)
