"""Do agents specialise, is it more than chance, and does it matter? Over methods and seeds.

python scripts/specialists.py --data DIR --results specialists.jsonl
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from k1.cli import optional, run

if TYPE_CHECKING:
    from k1.row_file import Row


@dataclass(frozen=True)
class Arguments:
    """Train systems on domains one after another and on nulls, and study their specialists.

    Tells too what it costs to delete or merge each leaf, and what would have told.
    """

    experiment: str = "pilot"
    """Whose settings they are trained by (scripts/experiment.py --list tells)."""
    methods: str = "k1-full-path,k1-own-grow,k1-evidence"
    """Methods whose system is one tree (of versions, the last), apart by commas."""
    situations: str = "three,same,joint"
    """Domains one after another (three), one domain dealt out to as many (same), all at once
    (joint)."""
    same: Annotated[str | None, optional("DOMAIN")] = None
    """The domain that is dealt out (default: the first)."""
    seeds: int = 3
    """Seeds 1..N, side by side; each has an order of the domains, in turn."""
    steps: Annotated[int | None, optional("N")] = None
    """Steps of a dense run in each phase (default: the experiment's)."""
    data: str = "builtin"
    """Text: builtin, hub or a folder of <domain>/{train,validation,test}.txt."""
    device: str = "auto"
    """auto, cpu or cuda."""
    results: Annotated[Path | None, optional("FILE")] = None
    """Keep a row of JSON for each system that was studied; what is there is not repeated."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """Train nothing more after this time, and report what is finished (default: no limit)."""
    markdown: Annotated[Path | None, optional("FILE")] = None
    """Write the tables as a page."""
    from_: Annotated[
        Path | None, tyro.conf.arg(name="from", metavar="FILE", help_behavior_hint="")
    ] = None
    """Train nothing: report the rows in this file."""


def main(arguments: Arguments) -> int:
    """Make and study the missing systems, print the tables, write the page."""
    from k1.cli import check_alone, check_outputs

    check_outputs(arguments.results, arguments.markdown, inputs=(arguments.from_,))
    if arguments.from_ is None:
        return report(arguments, *make_studies(arguments))

    from k1.specialisation.trained import read_studies

    check_alone(arguments, "--from trains nothing", ("from_", "markdown"))
    head, rows = read_studies(arguments.from_)
    about = [
        f"{systems(rows)} systems trained on {head['device']}, {head['settings']['steps']} "
        f"steps of a dense run in each phase, at a learning rate of {head['lr']:g}, studied on the "
        f"{head['pool']} pool."
    ]
    return report(arguments, rows, about)


def make_studies(arguments: Arguments) -> tuple[list[Row], list[str]]:
    """Make and study the missing systems; returns all rows, and how they were made."""
    import time

    from k1.cli import prepare_torch
    from k1.errors import K1Error
    from k1.tables import console
    from k1.trainer import pick_device

    minutes = math.inf if arguments.max_minutes is None else arguments.max_minutes
    if not minutes > 0:
        raise K1Error("--max-minutes is more than 0: leave it out, or give more")
    device = pick_device(arguments.device)
    prepare_torch(device.type)

    from k1.data import load_data
    from k1.experiments.methods import choose_methods
    from k1.experiments.plans import choose_experiment
    from k1.experiments.runner import Conditions, made_on
    from k1.specialisation.trained import ask, open_rows, run_studies

    began, page = time.monotonic(), console()
    experiment = choose_experiment(
        arguments.experiment,
        methods=tuple(arguments.methods.split(",")),
        seeds=arguments.seeds,
        steps=arguments.steps,
        orders="all",
    )
    choose_methods(experiment.methods)
    data = load_data(experiment.config(arguments.data).data)
    asked = ask(experiment, arguments.situations.split(","), data, arguments.same)
    page.print(data.describe(), highlight=False)
    conditions = Conditions(
        data,
        arguments.data,
        device.type,
        deadline=began + 60 * minutes,
        say=lambda line: page.print(line, highlight=False),
    )
    rows = run_studies(asked, conditions, open_rows(asked, conditions, arguments.results))
    command = re.sub(r"--(results|markdown|data)[ =]\S+", r"--\1 ...", " ".join(sys.argv))
    return rows, [
        f"Command: `python {command}`, {time.monotonic() - began:.0f} s in this call.",
        f"Device: {made_on(device)}.",
        f"{systems(rows)} systems trained as in {experiment.name}, {experiment.steps} steps of a "
        f"dense run in each phase, at a learning rate of {experiment.rates[-1]:g}, studied on "
        f"windows and passages of the {conditions.pool} pool.",
    ]


def systems(rows: list[Row]) -> int:
    """How many systems rows are about; each has a row for each view."""
    return len({(row["method"], row["situation"], row["seed"]) for row in rows})


def report(arguments: Arguments, rows: list[Row], about: list[str]) -> int:
    """Print the tables, and write what is asked for."""
    from k1.durable import write_atomically
    from k1.specialisation.summary import markdown, tables
    from k1.tables import console

    page = console()
    for table in tables(rows):
        page.print(table.shown())
    for line in about:
        page.print(line, markup=False, highlight=False)
    if arguments.markdown is not None:
        write_atomically(arguments.markdown, markdown(rows, about).encode())
    return 0


if __name__ == "__main__":
    run(Arguments, main)
