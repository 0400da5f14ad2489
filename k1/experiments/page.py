"""The page of results, and what it says about how they were made: all of it from the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k1.durable import canonical_json
from k1.errors import K1Error
from k1.experiments.method import Method
from k1.experiments.plans import EXPERIMENTS
from k1.experiments.report import tables
from k1.experiments.runner import KEY
from k1.row_file import Row, RowFile
from k1.tables import Table


@dataclass(frozen=True)
class Results:
    """Rows, and the head of their file: what they are about."""

    head: Row
    rows: Sequence[Row]


def read_results(path: Path, methods: Sequence[str] | None = None) -> Results:
    """Read results, whatever they are about.

    Args:
        path: their file.
        methods: the methods whose rows are wanted; None is all.

    Raises:
        K1Error: if the file holds none.
    """
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
        about = {name: value for name, value in head.items() if name != "format"}
        if about["kind"] != "experiment" or about["pool"] not in ("validation", "test"):
            raise ValueError("not of an experiment")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise K1Error(f"{path} cannot be read as results ({error}): name another file") from None
    rows = list(RowFile(path, about, KEY).rows.values())
    if methods is None:
        return Results(about, rows)
    found = [row for row in rows if row["method"] in methods]
    if not found:
        raise K1Error(f"{path} has no runs of {', '.join(methods)}: ask for others")
    return Results(about, found)


def how_made(results: Results) -> list[str]:
    """Lines that tell what rows are about, and the command that makes them again."""
    head, rows = results.head, results.rows
    settings, test = head["settings"], head["pool"] == "test"
    where = ", ".join(sorted({row.get("made_on") or str(head["device"]) for row in rows}))
    seconds = sum(row["seconds"] / row["lanes"] for row in rows)
    what = "at the settings chosen on validation" if test else "swept over settings"
    return [
        f"{len(rows)} runs on the **{head['pool']}** pool, {what}; device: {where}; "
        f"{seconds:,.0f} s in all.",
        f"`{_command(results)}`",
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
        return "made by an experiment that has other settings now"
    if steps != alike[0].steps:
        told.append(f"--steps {steps}")
    if head["pool"] == "test":
        told.append("--test --tuned SWEEP.jsonl")
    else:
        rates = sorted({row["lr"] for row in rows})
        told.append("--rates " + ",".join(f"{rate:g}" for rate in rates))
    told.append("--methods " + ",".join(dict.fromkeys(row["method"] for row in rows)))
    return f"python scripts/experiment.py {alike[0].name} {' '.join(told)} --results FILE"


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
    lines += [
        "",
        "Mean over runs ± half a 95 % t-interval. Terms: [experiments.md](experiments.md).",
        "",
    ]
    for table in found[1:]:
        lines += table.section()
    names = list(dict.fromkeys(row["method"] for row in rows))
    legend = [(name, known[name].what if name in known else "-") for name in names]
    lines += Table("", ("method", "what"), legend, numbers=False).markdown()
    return "\n".join([*lines, ""])
