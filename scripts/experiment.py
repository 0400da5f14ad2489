"""Experiments in continual learning: who learns what, who forgets what, and what it costs.

python scripts/experiment.py pilot --data DIR --results pilot.jsonl
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Run a named experiment, or go on with one, and report it."""

    name: Annotated[str, tyro.conf.Positional] = "pilot"
    """Which experiment (--list tells)."""
    list: bool = False
    """List the experiments and methods and do nothing."""
    quick: bool = False
    """The experiment `ci`: under a minute on two cores, on the built-in text."""
    data: str = "builtin"
    """Text: builtin, hub or a folder of <domain>/{train,validation,test}.txt."""
    device: str = "auto"
    """auto, cpu or cuda."""
    results: Annotated[Path | None, optional("FILE")] = None
    """Keep a row of JSON for each finished run; what is there already is not repeated."""
    methods: Annotated[str | None, optional("A,B,...")] = None
    """Methods (default: the experiment's)."""
    orders: Annotated[str | None, optional("N,...")] = None
    """Orders of the domains: numbers from 1, or all (default: the experiment's)."""
    seeds: Annotated[int | None, optional("N")] = None
    """Seeds 1..N (default: the experiment's)."""
    rates: Annotated[str | None, optional("LR,...")] = None
    """Learning rates that every method is swept over (default: the experiment's)."""
    steps: Annotated[int | None, optional("N")] = None
    """Steps of a dense run in each phase (default: the experiment's)."""
    lanes: int = 64
    """Runs side by side, at most."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """Stop after this time and report what is finished (default: no limit)."""
    reference: str = "dense"
    """The method that others are compared with."""
    test: bool = False
    """Measure on the test pool instead of validation; needs --tuned."""
    tuned: Annotated[Path | None, optional("FILE")] = None
    """Run each method at its best setting in these results alone."""
    plot: Annotated[Path | None, optional("FILE")] = None
    """Draw frontiers and anytime curves; needs the extra viz."""
    markdown: Annotated[Path | None, optional("FILE")] = None
    """Write the page of results, such as docs/results.md."""


def main(arguments: Arguments) -> int:
    """Make the missing runs, print the tables, write the page."""
    import time

    from k1.cli import check_outputs, prepare_torch
    from k1.errors import K1Error
    from k1.figures import check_plot
    from k1.tables import Table, console
    from k1.trainer import pick_device

    page = console()
    if arguments.list:
        from k1.experiments.methods import METHODS
        from k1.experiments.plans import EXPERIMENTS
        from policies.continual import CONTROLLED

        methods = (*METHODS.values(), *CONTROLLED.values())
        for title, entries in (("experiment", EXPERIMENTS), ("method", methods)):
            told = [(entry.name, entry.what) for entry in entries]
            page.print(Table("", (title, "what"), told, numbers=False).shown())
        return 0
    if arguments.test and arguments.tuned is None:
        raise K1Error("the test pool is for settings that are chosen: give --tuned FILE")
    minutes = math.inf if arguments.max_minutes is None else arguments.max_minutes
    if not minutes > 0 or arguments.lanes < 1:
        raise K1Error("--max-minutes and --lanes are more than 0: leave them out, or give more")
    if arguments.plot is not None:
        check_plot(arguments.plot)
    check_outputs(arguments.results, arguments.markdown, arguments.plot)
    device = pick_device(arguments.device).type
    prepare_torch(device)

    import platform

    import torch

    from k1.data import load_data
    from k1.durable import write_atomically
    from k1.experiments.methods import METHODS, choose_methods
    from k1.experiments.pictures import plot
    from k1.experiments.plans import choose_experiment
    from k1.experiments.report import markdown, tables
    from k1.experiments.runner import Conditions, open_rows, run_experiment
    from k1.experiments.tuning import read_tuned
    from policies.continual import CONTROLLED

    known = {**METHODS, **CONTROLLED}
    began = time.monotonic()
    experiment = choose_experiment(
        "ci" if arguments.quick else arguments.name,
        methods=arguments.methods and tuple(arguments.methods.split(",")),
        rates=arguments.rates and _numbers(arguments.rates),
        orders=arguments.orders,
        seeds=arguments.seeds,
        steps=arguments.steps,
    )
    choose_methods(experiment.methods, known)
    chosen = None
    if arguments.tuned is not None:
        chosen = read_tuned(arguments.tuned, experiment)
        experiment = choose_experiment(
            experiment.name,
            methods=experiment.methods,
            rates=tuple(sorted({lr for lr, _ in chosen.values()})),
            orders=experiment.orders,
            seeds=experiment.seeds,
            steps=experiment.steps,
        )
    data = load_data(experiment.config(arguments.data).data)
    page.print(data.describe(), highlight=False)
    conditions = Conditions(
        data,
        arguments.data,
        device,
        pool="test" if arguments.test else "validation",
        lanes=arguments.lanes,
        deadline=began + 60 * minutes,
        chosen=chosen,
        say=lambda line: page.print(line, highlight=False),
        methods=known,
    )
    file = open_rows(experiment, conditions, arguments.results)
    rows = run_experiment(experiment, conditions, file)
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    command = " ".join(["python", *sys.argv])
    command = re.sub(r"--(results|markdown|plot|tuned|data)[ =]\S+", r"--\1 ...", command)
    about = [
        f"Command: `{command}`, {time.monotonic() - began:.0f} s in this call.",
        f"Device: {device} ({processor}); PyTorch {torch.__version__}.",
        f"{len(rows)} runs of {experiment.name} ({experiment.what}), measured on the "
        f"{conditions.pool} pool; a dense run has {experiment.steps} steps in each phase, others "
        "use as many FLOPs.",
        "Mean over runs ± half a 95 % t-interval.",
    ]
    for table in tables(rows, arguments.reference):
        page.print(table.shown())
    for line in about:
        page.print(line, markup=False, highlight=False)
    if arguments.plot is not None:
        plot(rows, experiment.checks, arguments.plot)
    if arguments.markdown is not None:
        what = {name: method.what for name, method in known.items()}
        written = markdown(rows, arguments.reference, about, what)
        write_atomically(arguments.markdown, written.encode())
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers that are apart by commas."""
    from k1.errors import K1Error

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise K1Error(f"--rates {text!r}: give numbers apart by commas") from None


if __name__ == "__main__":
    run(Arguments, main)
