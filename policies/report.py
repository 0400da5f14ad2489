"""Tables of a comparison: for a terminal, and as a section of a Markdown page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from k1.tables import Table
from policies.comparison import estimate
from policies.contestants import PRIVILEGED
from policies.episode import TEST_WINDOWS

NONE = "-"
NOTES = (
    "Equal compute: an episode may execute as many operations (by formula) as its starting tree "
    "takes to train through the world's budget and be measured after each decision. Trials, forks "
    "and population members are charged; measuring on the test pool is not.",
    "`final` and `anytime`: bits per byte on the sealed test pool (lower is better), when the "
    "budget is spent and averaged over it. Domains count from when the stream brings them to a "
    "system that is only trained on, so all controllers are measured on the same ones. `final, "
    "own`: over those that the episode's own stream got to, which differ between controllers.",
    "Interquartile means over worlds x seeds with stratified bootstrap 95 % intervals (seeds are "
    "resampled within worlds; with one seed, worlds are).",
    "Differences are means over worlds, paired by world and seed; their bootstrap 95 % intervals, "
    "and those of the probability of improvement, resample worlds (of one world, seeds).",
    "`compute`, `decisions`, `stage`, `tried`, `refused`, `credited` (forbidden actions) and "
    "`return` are means over episodes. * marks controllers that are not held to the bounds of the "
    "stages; they have no return.",
)


def text_of(row: list[float | None] | None, digits: int = 3, sign: str = "") -> str:
    """An estimate with its interval."""
    if row is None:
        return NONE
    found = estimate(row)
    value = f"{found.value:{sign}.{digits}f}"
    if math.isnan(found.low):
        return value
    return f"{value} [{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]"


def _marked(policy: str) -> str:
    return policy + ("*" if policy.partition(":")[0] in PRIVILEGED else "")


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def tables(result: dict[str, Any]) -> list[Table]:
    """All tables of a comparison's statistics."""
    if not result["policies"]:
        return []
    found = [_main(result)]
    found += [_against(rows, reference) for reference, rows in result["against"].items()]
    return [*found, _domains(result)]


def _main(result: dict[str, Any]) -> Table:
    rows = []
    for policy, row in result["policies"].items():
        rows.append(
            [
                _marked(policy),
                text_of(row["final"]),
                text_of(row["anytime"]),
                f"{row['final_seen'][0]:.3f}",
                f"{row['compute']:.0%}",
                *(_number(row[n], 1) for n in ("decisions", "stage", "tried", "refused")),
                *(_number(row[n], d) for n, d in (("credited", 1), ("return", 1))),
            ]
        )
    headers = ["policy", "final", "anytime", "final, own", "compute", "decisions", "stage", "tried"]
    title = (
        f"test bits per byte of {result['episodes']} episodes each, in {result['worlds']} worlds"
    )
    return Table(title, [*headers, "refused", "credited", "return"], rows)


def _against(rows: dict[str, Any], reference: str) -> Table:
    body = [
        [
            _marked(policy),
            text_of(row["final"], 4, "+"),
            text_of(row["final_improves"], 2),
            text_of(row["anytime"], 4, "+"),
            text_of(row["anytime_improves"], 2),
            text_of(row["return"], 2, "+"),
        ]
        for policy, row in rows.items()
    ]
    headers = ["policy", "final", "P(final lower)", "anytime", "P(anytime lower)", "return"]
    return Table(f"minus {reference}, paired by world and seed", headers, body)


def _domains(result: dict[str, Any]) -> Table:
    policies = result["policies"]
    domains = list(next(iter(policies.values()))["domains"])
    rows = [
        [_marked(policy), *(f"{row['domains'][domain][0]:.3f}" for domain in domains)]
        for policy, row in policies.items()
    ]
    title = "final test bits per byte by domain, over the worlds that have it"
    return Table(title, ["policy", *domains], rows)


def markdown(result: dict[str, Any], about: Sequence[str]) -> str:
    """Write a section of a page.

    Args:
        result: what `compare_all` returned.
        about: sentences on how the figures were made.
    """
    windows = f"A measurement takes {TEST_WINDOWS} times the windows of the validation loss."
    lines = ["## Comparison of controllers", ""]
    lines += [f"- {line}" for line in (*about, *NOTES, windows)]
    lines.append("")
    for table in tables(result):
        lines += table.section()
    return "\n".join(lines)
