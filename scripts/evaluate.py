"""Compare controllers: policies x worlds x seeds at equal compute, on the sealed test pool.

python scripts/evaluate.py --policies noop,heuristic,cosine --worlds test --seeds 3
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Compare controllers at equal compute, on the sealed test pool."""

    policies: Annotated[str | None, optional("A,B,...")] = None
    """Controllers (default: all that need no training): noop, random, random-legal, cheat,
    heuristic, constant, cosine, plateau, lookahead, static (if a search found one for the preset),
    pbt, static:LR:TOP_K:COOLDOWN, or what run_phase2.py --policy takes."""
    worlds: str = "test"
    """A set of worlds (test or validation) or some of one: test/0,test/5."""
    seeds: int = 1
    """Episodes of each controller in each world."""
    reference: Annotated[str | None, optional("NAME")] = None
    """The controller that others are compared with (default: heuristic, or else the first)."""
    pairs: bool = False
    """Compare every two controllers."""
    preset: str = "cpu"
    """Sizes: tiny, cpu, small, gpu or paper."""
    data: Annotated[str | None, optional("SOURCE")] = None
    """Own text, over which worlds are drawn: a folder of <domain>/{train,validation,test}.txt."""
    device: str = "auto"
    """auto, cpu or cuda."""
    num_envs: Annotated[int | None, optional("N")] = None
    """Episodes at once (default: 8, on a GPU 128)."""
    records: Annotated[Path | None, optional("FILE")] = None
    """Keep every finished episode as a line of JSON; what is there already is not repeated."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """Break off after this many minutes and report what is finished."""
    json: Annotated[Path | None, optional("FILE")] = None
    """Write statistics and episodes."""
    markdown: Annotated[Path | None, optional("FILE")] = None
    """Write the tables as a section of a page."""
    plot: Annotated[Path | None, optional("FILE")] = None
    """Draw the anytime curves (needs the extra viz)."""


def main(arguments: Arguments) -> int:
    """Play what is missing, and report."""
    from k1.cli import check_outputs, prepare_torch
    from k1.durable import canonical_json, write_atomically
    from k1.errors import K1Error
    from k1.figures import check_plot
    from k1.tables import console
    from k1.trainer import pick_device
    from policies.comparison import compare_all
    from policies.contestants import default_policies
    from policies.evaluation import Plan, evaluate
    from policies.plot import plot
    from policies.progress import progress_bar
    from policies.report import markdown, tables

    policies = default_policies(arguments.preset)
    if arguments.policies is not None:
        policies = tuple(arguments.policies.split(","))
        if not all(policies):
            raise K1Error(f"--policies {arguments.policies!r}: names apart by commas, none empty")
    limit = math.inf if arguments.max_minutes is None else arguments.max_minutes
    if not limit > 0:
        raise K1Error(f"--max-minutes {limit} is not possible: give a number above 0")
    if arguments.plot is not None:
        check_plot(arguments.plot)
    check_outputs(arguments.json, arguments.markdown, arguments.plot, arguments.records)
    reference = arguments.reference or ("heuristic" if "heuristic" in policies else policies[0])
    if reference not in policies:
        raise K1Error(f"--reference {reference} is none of {', '.join(policies)}")
    device = pick_device(arguments.device).type
    prepare_torch(device)
    plan = Plan(
        policies=tuple(dict.fromkeys(policies)),
        worlds=tuple(arguments.worlds.split(",")),
        seeds=arguments.seeds,
        preset=arguments.preset,
        data=arguments.data,
        device=device,
        num_envs=arguments.num_envs or (8 if device == "cpu" else 128),
    )
    with progress_bar() as progress:
        done = evaluate(plan, arguments.records, max_seconds=60 * limit, progress=progress)
    result = compare_all(done.records, reference, arguments.pairs)
    command = " ".join(["python", *sys.argv])
    command = re.sub(r"--(json|markdown|plot|records)[ =]\S+", r"--\1 FILE", command)
    about = [
        f"Command: `{command}`.",
        f"Preset {plan.preset}, {device}; {len(done.records)} of {done.planned} episodes.",
    ]
    if done.played:
        each = done.seconds / done.played
        about.append(f"{done.played} episodes took {done.seconds:.0f} s, {each:.1f} s each.")
    page = console()
    for table in tables(result):
        page.print(table.shown())
    for line in about:
        page.print(line, markup=False, highlight=False)
    if not result["policies"]:
        page.print("No world and seed is finished by all controllers yet.")
    if arguments.json is not None:
        whole = {**done.head, **result, "about": about, "records": done.records}
        write_atomically(arguments.json, (canonical_json(whole) + "\n").encode())
    if arguments.markdown is not None:
        write_atomically(arguments.markdown, markdown(result, about).encode())
    if arguments.plot is not None:
        plot(result, arguments.plot)
    return 0


if __name__ == "__main__":
    run(Arguments, main)
