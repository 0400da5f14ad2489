"""The page of results, and what it says about how they were made: all of it from the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k1.durable import canonical_json
from k1.errors import K1Error
from k1.experiments.method import Method
from k1.experiments.plans import EXPERIMENTS
from k1.experiments.report import best_settings, tables
from k1.experiments.runner import KEY
from k1.experiments.stream import STREAMS, orders_of
from k1.row_file import Row, read_rows
from k1.tables import Table


@dataclass(frozen=True)
class Results:
    """Rows, and the head of their file: what they are about."""

    head: Row
    rows: Sequence[Row]


FIELDS = ("bits", "curve", "steps", "flops", "parameters", "moved", "seconds", "lanes")
"""What every row has besides its key."""


def read_results(path: Path, methods: Sequence[str] | None = None) -> Results:
    """Read results, whatever they are about.

    Args:
        path: their file.
        methods: the methods whose rows are wanted; None is all.

    Raises:
        K1Error: if the file holds none, or none of a method.
    """
    head, rows = read_rows(path, "experiment", KEY)
    whole = all(name in row for row in rows for name in FIELDS)
    if not whole or not {"pool", "settings", "data"} <= set(head):
        raise K1Error(f"{path} holds no results of an experiment: name another file")
    found = {row["method"] for row in rows}
    missing = [name for name in methods or () if name not in found]
    if missing:
        raise K1Error(f"{path} has no runs of {', '.join(missing)}: choose from {_listed(found)}")
    return Results(head, [row for row in rows if methods is None or row["method"] in methods])


def check_reference(results: Results, reference: str) -> None:
    """See that there are runs of the method that others are compared with.

    Raises:
        K1Error: if not.
    """
    found = {row["method"] for row in results.rows}
    if found and reference not in found:
        raise K1Error(f"no runs of the reference {reference}: choose from {_listed(found)}")


def check_sweep(sweep: Results, head: Row, methods: Iterable[str]) -> None:
    """See that a sweep can be where the settings of some methods are chosen.

    Args:
        sweep: the runs over settings.
        head: what the runs at these settings are about: their `settings` and `data`.
        methods: the methods.

    Raises:
        K1Error: if not.
    """
    if sweep.head["pool"] != "validation":
        raise K1Error(f"the sweep was measured on {sweep.head['pool']}: settings are chosen on "
                      "validation")  # fmt: skip
    for name in ("settings", "data"):
        if canonical_json(sweep.head[name]) != canonical_json(head[name]):
            raise K1Error(f"the sweep has other {name}: name another file")
    missing = set(methods) - {row["method"] for row in sweep.rows}
    if missing:
        raise K1Error(f"the sweep has no runs of {_listed(missing)}: tune them, or leave them out")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def how_made(results: Results) -> list[str]:
    """Lines that tell what rows are about, and the command that makes them, if not some more."""
    head, rows = results.head, results.rows
    settings, test = head["settings"], head["pool"] == "test"
    where = ", ".join(sorted({row.get("made_on") or str(head["device"]) for row in rows}))
    seconds = sum(row["seconds"] / row["lanes"] for row in rows)
    what = "at the settings chosen on validation" if test else "swept over settings"
    return [
        f"{len(rows)} runs on the **{head['pool']}** pool, {what}; device: {where}; "
        f"{seconds:,.0f} s in all.",
        _command(results),
        f"A dense run has {settings['steps']:,} steps in each phase, others "
        + ("use as many FLOPs." if settings["equal_flops"] else "have as many."),
    ]


def _command(results: Results) -> str:
    head, rows = results.head, results.rows
    seeds = max((row["seed"] for row in rows), default=0)
    told = [f"--data DIR --device {head['device']} --seeds {seeds}"]
    steps = head["settings"]["steps"]
    wanted = canonical_json(head["settings"])
    alike = [e for e in EXPERIMENTS if canonical_json(replace(e, steps=steps).settings()) == wanted]
    if not alike:
        return "Made by an experiment that has other settings now."
    names = list(dict.fromkeys(row["method"] for row in rows))
    # Of those with the same settings, the one that the methods are from.
    alike.sort(key=lambda experiment: len(set(names) - set(experiment.methods)))
    orders = _orders(rows, alike[0].orders)
    if orders is not None:
        told.append(f"--orders {orders}")
    if steps != alike[0].steps:
        told.append(f"--steps {steps}")
    if head["pool"] == "test":
        told.append("--test --tuned SWEEP.jsonl")
    else:
        rates = sorted({row["lr"] for row in rows})
        told.append("--rates " + ",".join(f"{rate:g}" for rate in rates))
    told.append("--methods " + ",".join(names))
    return f"`python scripts/experiment.py {alike[0].name} {' '.join(told)} --results FILE`"


def _orders(rows: Sequence[Row], usual: str) -> str | None:
    """What `--orders` has to be for these rows; None if it is what an experiment has anyway."""
    found = {row["seed"]: tuple(row["order"]) for row in rows}
    if not found:
        return None
    domains = set(found[min(found)])
    known = next((stream for stream in STREAMS if set(stream) == domains), tuple(sorted(domains)))
    every = orders_of(known, "all")
    own = dict.fromkeys(found[seed] for seed in sorted(found))
    listed = ",".join(str(every.index(order) + 1) for order in own)
    for wanted in (usual, "all", listed):
        orders = orders_of(known, wanted)
        if all(order == orders[(seed - 1) % len(orders)] for seed, order in found.items()):
            break
    return None if wanted == usual else wanted


def markdown(
    results: Results, reference: str, known: Mapping[str, Method], sweep: Results | None = None
) -> str:
    """Write the page.

    Args:
        results: what it is about.
        reference: the method that others are compared with.
        known: the methods that there are, by name.
        sweep: where the settings were chosen; frontiers are read there.
    """
    rows = results.rows
    found = tables(rows, reference, sweep.rows if sweep else None)
    lines = ["# Results", ""]
    for table in found[:1]:
        lines += table.section()
    lines += ["How it was made:", "", *(f"- {line}" for line in how_made(results))]
    if sweep is not None:
        lines += ["", "Where the settings were chosen:", ""]
        lines += [f"- {line}" for line in how_made(sweep)[:2]]
        chosen = best_settings(sweep.rows)
        off = [m for m, s in best_settings(rows).items() if chosen.get(m, s) != s]
        lines += [f"- Not at their best settings there: {', '.join(off)}."] if off else []
    lines += [
        "",
        "Means ± half a 95 % t-interval, over orders if there are several: runs of the same order "
        "are averaged first. Terms: [experiments.md](experiments.md).",
        "",
    ]
    for table in found[1:]:
        lines += table.section()
    names = list(dict.fromkeys(row["method"] for row in rows))
    legend = [(name, known[name].what if name in known else "-") for name in names]
    lines += Table("", ("method", "what"), legend, numbers=False).markdown()
    return "\n".join([*lines, ""])
