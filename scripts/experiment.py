"""Experiments in continual learning: who learns what, who forgets what, and what it costs.

python scripts/experiment.py pilot --data DIR --results pilot.jsonl
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from k1.cli import optional, run

if TYPE_CHECKING:
    from k1.experiments.page import Results


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
    from_: Annotated[
        Path | None, tyro.conf.arg(name="from", metavar="FILE", help_behavior_hint="")
    ] = None
    """Make no runs: report these results (of --methods), and the frontiers of those in --tuned."""


def main(arguments: Arguments) -> int:
    """Make the missing runs, print the tables, write the page."""
    from k1.cli import check_alone, check_outputs
    from k1.figures import check_plot

    if arguments.list:
        return list_all()
    if arguments.plot is not None:
        check_plot(arguments.plot)
    read = (arguments.from_, arguments.tuned)
    check_outputs(arguments.results, arguments.markdown, arguments.plot, inputs=read)

    if arguments.from_ is None:
        return report(arguments, make_runs(arguments), None)

    from k1.experiments.page import check_reference, check_sweep, read_results

    heeded = ("from_", "tuned", "methods", "reference", "plot", "markdown")
    check_alone(arguments, "--from makes no runs", heeded)
    names = _names(arguments.methods)
    results = read_results(arguments.from_, names)
    check_reference(results, arguments.reference)
    if arguments.tuned is None:
        return report(arguments, results, None)
    sweep = read_results(arguments.tuned, names)
    check_sweep(sweep, results.head, {row["method"] for row in results.rows})
    return report(arguments, results, sweep)


def list_all() -> int:
    """Print the experiments and methods."""
    from k1.experiments.methods import METHODS
    from k1.experiments.plans import EXPERIMENTS
    from k1.tables import Table, console
    from policies.continual import CONTROLLED

    methods = (*METHODS.values(), *CONTROLLED.values())
    for title, entries in (("experiment", EXPERIMENTS), ("method", methods)):
        told = [(entry.name, entry.what) for entry in entries]
        console().print(Table("", (title, "what"), told, numbers=False).shown())
    return 0


def make_runs(arguments: Arguments) -> Results:
    """Make the runs that are missing, as long as there is time."""
    import time

    from k1.cli import prepare_torch
    from k1.errors import K1Error
    from k1.tables import console
    from k1.trainer import pick_device

    if arguments.test and arguments.tuned is None:
        raise K1Error("the test pool is for settings that are chosen: give --tuned FILE")
    minutes = math.inf if arguments.max_minutes is None else arguments.max_minutes
    if not minutes > 0 or arguments.lanes < 1:
        raise K1Error("--max-minutes and --lanes are more than 0: leave them out, or give more")
    device = pick_device(arguments.device).type
    prepare_torch(device)

    from k1.data import load_data
    from k1.experiments.methods import METHODS, choose_methods
    from k1.experiments.page import Results
    from k1.experiments.plans import choose_experiment
    from k1.experiments.runner import Conditions, open_rows, run_experiment
    from k1.experiments.tuning import read_tuned
    from policies.continual import CONTROLLED

    began, page = time.monotonic(), console()
    known = {**METHODS, **CONTROLLED}
    experiment = choose_experiment(
        "ci" if arguments.quick else arguments.name,
        methods=_names(arguments.methods),
        rates=arguments.rates and _numbers(arguments.rates),
        orders=arguments.orders,
        seeds=arguments.seeds,
        steps=arguments.steps,
    )
    choose_methods(experiment.methods, known)
    data = load_data(experiment.config(arguments.data).data)
    chosen = None
    if arguments.tuned is not None:
        chosen = read_tuned(arguments.tuned, experiment, data.fingerprint)
        experiment = replace(experiment, rates=tuple(sorted({lr for lr, _ in chosen.values()})))
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
    return Results(file.head, run_experiment(experiment, conditions, file))


def report(arguments: Arguments, results: Results, sweep: Results | None) -> int:
    """Print the tables, and write what is asked for."""
    from k1.durable import write_atomically
    from k1.experiments.methods import METHODS
    from k1.experiments.page import how_made, markdown
    from k1.experiments.pictures import plot
    from k1.experiments.report import tables
    from k1.tables import console
    from policies.continual import CONTROLLED

    page = console()
    for table in tables(results.rows, arguments.reference, sweep.rows if sweep else None):
        page.print(table.shown())
    for line in how_made(results):
        page.print(line, markup=False, highlight=False)
    if arguments.plot is not None:
        plot(results.rows, results.head["settings"]["checks"], arguments.plot)
    if arguments.markdown is not None:
        known = {**METHODS, **CONTROLLED}
        written = markdown(results, arguments.reference, known, sweep)
        write_atomically(arguments.markdown, written.encode())
    return 0


def _names(text: str | None) -> tuple[str, ...] | None:
    """Read names that are apart by commas."""
    return None if text is None else tuple(text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers that are apart by commas."""
    from k1.errors import K1Error

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise K1Error(f"--rates {text!r}: give numbers apart by commas") from None


if __name__ == "__main__":
    run(Arguments, main)
