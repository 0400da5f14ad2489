"""Time to loss: dense, sparse and other ways to train a tree, at equal compute and equal time.

python scripts/time_to_loss.py --data DIR --preset gpu --device cuda --json study.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Compare ways to train a tree by the loss that they reach for the same compute and time."""

    data: str = "builtin"
    """Text: builtin, hub or a folder of <domain>/{train,validation,test}.txt."""
    preset: str = "cpu"
    """Sizes: tiny, cpu, small, gpu or paper."""
    device: str = "auto"
    """auto, cpu or cuda."""
    steps: int = 600
    """Steps of a dense run; the others run until they have used as much."""
    seeds: int = 3
    """Runs of each method, with seeds 1, 2, ...; seed 0 is for tuning."""
    methods: str = "all"
    """Methods, apart by commas; dense always runs first (k1/bench/methods.py lists them)."""
    situations: str = "scratch,new-domain"
    """scratch (all domains), new-domain (a tree trained on --old meets --new), or both."""
    old: str = "code"
    """Domain that the trained tree knows."""
    new: str = "wikitext"
    """Domain that it meets."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """Stop after this time and report what is complete (default: no limit)."""
    json: Annotated[Path | None, optional("FILE")] = None
    """Write the record here, after every method."""
    markdown: Annotated[Path | None, optional("FILE")] = None
    """Write the report here, as a section of a page."""


def main(arguments: Arguments) -> int:
    """Run the study, print its tables, write its files."""
    import math
    import platform
    import shlex

    from k1.cli import prepare_torch
    from k1.errors import K1Error
    from k1.trainer import pick_device

    if arguments.steps < 1 or arguments.seeds < 1:
        raise K1Error("--steps and --seeds are 1 or more")
    device = pick_device(arguments.device).type
    prepare_torch(device)

    import torch

    from k1.bench.methods import choose_methods
    from k1.bench.study import Plan, Study
    from k1.bench.study_report import headings, how, legend, markdown, tables
    from k1.config import Config
    from k1.data import load_data
    from k1.durable import write_atomically
    from k1.tables import console

    config = Config.preset(arguments.preset).replace(data={"source": arguments.data})
    minutes = math.inf if arguments.max_minutes is None else arguments.max_minutes
    plan = Plan(
        steps=arguments.steps,
        seeds=tuple(range(1, arguments.seeds + 1)),
        tune_seed=0,
        methods=choose_methods(arguments.methods),
        situations=tuple(arguments.situations.split(",")),
        old=arguments.old,
        new=arguments.new,
        seconds=60 * minutes,
    )
    page = console()
    data = load_data(config.data)
    page.print(data.describe(), highlight=False)
    study = Study(config, data, device, plan, lambda line: page.print(line, highlight=False))
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    study.record.update(
        command=shlex.join(["python", *sys.argv]),
        device=f"{device} ({processor}, {torch.get_num_threads()} torch threads)",
        versions=f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    )

    for path in (arguments.json, arguments.markdown):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)

    def save(record: dict[str, Any]) -> None:
        if arguments.json:
            content = json.dumps(record, indent=1, allow_nan=False)
            write_atomically(arguments.json, content.encode())
        if arguments.markdown:
            write_atomically(arguments.markdown, markdown(record).encode())

    study.run(save)
    for line in how(study.record):
        page.print(line, highlight=False)
    for name, what in legend(study.record).items():
        page.print(f"  {name:14} {what}", highlight=False)
    for name, found in tables(study.record).items():
        page.rule(headings(study.record)[name])
        for table in found:
            page.print(table.shown())
    return 0


if __name__ == "__main__":
    run(Arguments, main)
