"""What rows of studied systems say: tables, and whether there are specialists.

Each view has tables of its own: windows that stand alone, and documents read from their start.

There are, in a method's systems, if on held-out text

* in each of them the leaves tell more about domains, and the most specialised of them has a larger
  share of one, than with permuted labels (p < 0.01),
* over seeds they tell more than in systems trained on one domain dealt out, and than in systems
  trained on all domains at once (p < 0.01, paired by seed, seeds of one order averaged, with
  Holm's correction over methods and nulls), and
* in each of them every domain's top leaf has at least 90 % of its responsibility from it, and the
  domain loses more than any other without that leaf.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from scipy.stats import spearmanr

from k1.experiments.learner import VIEWS
from k1.experiments.report import NONE, by_order
from k1.experiments.significance import Interval, holm, interval, paired_p
from k1.row_file import Row
from k1.specialisation.sparing import SIGNALS
from k1.specialisation.trained import JOINT, SAME, THREE
from k1.tables import Table

SURE = 0.01
PURE = 0.9
"""Share of one domain in the responsibility of a specialist, at least."""
RESPONSIBILITY = "responsibility"
ORDERED = (RESPONSIBILITY, "routing")
NULLS = (SAME, JOINT)
ANY = "(any)"
Gap = tuple[list[float], float]
"""Differences of bits, and their p, corrected."""


def by_system(rows: Sequence[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """Sort rows by method and situation, and by seed."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["situation"]), {})[row["seed"]] = row
    return found


def bits_of(row: Row, measure: str) -> float:
    """Mutual information of leaf and domain."""
    return float(row["information"][measure]["bits"]["value"])


def is_specialist(top: Row) -> bool:
    """Whether a domain's top leaf is a specialist for it."""
    return bool(top["share"] >= PURE and top["hurts_own_most"])


def information_table(rows: Sequence[Row]) -> Table:
    """How much leaves tell about domains, against permuted labels."""
    lines = []
    for (method, situation), runs in by_system(rows).items():
        cells = []
        for measure in ORDERED:
            found = [row["information"][measure] for row in runs.values()]
            for name in ("bits", "share"):
                cells.append(_spread(runs, [one[name]["value"] for one in found]).show())
                cells.append(_sure([one[name]["p"] for one in found]))
        told = [statistics.fmean(row["accuracy"][name] for row in runs.values())
                for name in ("routing", "bigrams")]  # fmt: skip
        lines.append([method, situation, *cells, *(f"{100 * share:.0f} %" for share in told)])
    names = [h for m in ORDERED for h in (f"bits, {m}", "p < .01", "largest share", "p < .01")]
    title = (
        "what the leaf of a window tells about its domain, in bits, and the largest share of one "
        "domain in a leaf, both by responsibility and by routing: mean ± half a 95 % t-interval "
        "over orders, and in how many systems permuted labels give as much in less than 1 of 100 "
        "cases; how often the domain is told right by routing, and by bigrams"
    )
    return Table(title, ["method", "situation", *names, "routing right", "bigrams right"], lines)


def _spread(runs: dict[int, Row], values: Sequence[float]) -> Interval:
    """Mean and interval of values of systems, of which those of the same order count as one."""
    return interval(by_order(list(runs.values()), values))


def _sure(p_values: Sequence[float]) -> str:
    return f"{sum(p < SURE for p in p_values)} of {len(p_values)}"


def gaps(rows: Sequence[Row], measure: str) -> dict[tuple[str, str], Gap]:
    """Bits of systems trained on domains one after another minus those of nulls, by seed.

    Seeds with the same order are averaged first, if there are several orders.
    """
    systems = by_system(rows)
    differences: dict[tuple[str, str], list[float]] = {}
    p_values = {}
    for (method, situation), runs in systems.items():
        if situation not in NULLS:
            continue
        mine = systems.get((method, THREE), {})
        seeds = [seed for seed in mine if seed in runs]
        pair = [
            by_order([mine[s] for s in seeds], [bits_of(which[s], measure) for s in seeds])
            for which in (mine, runs)
        ]
        if seeds:
            differences[method, situation] = [a - b for a, b in zip(*pair, strict=True)]
            p_values[f"{method} {situation}"] = paired_p(*pair)
    corrected = holm(p_values)
    return {key: (gap, corrected[" ".join(key)]) for key, gap in differences.items()}


def null_table(rows: Sequence[Row]) -> Table:
    """Whether that is more than in systems that should have no specialists."""
    found = [gaps(rows, measure) for measure in ORDERED]
    lines = []
    for key in found[0]:
        cells = []
        for by_key in found:
            gap, p = by_key[key]
            cells += [interval(gap).show(sign=True), NONE if math.isnan(p) else f"{p:.2g}"]
        lines.append([key[0], f"{THREE} - {key[1]}", str(len(found[0][key][0])), *cells])
    title = (
        "bits of domains one after another minus those of a null, paired by seed; p by a two-sided "
        "t-test with Holm's correction over methods and nulls"
    )
    headers = ["method", "difference", "pairs", *(h for m in ORDERED for h in (m, "p"))]
    return Table(title, headers, lines)


def specialist_table(rows: Sequence[Row]) -> Table:
    """The top leaf of each domain: how pure it is, and who needs it."""
    lines = []
    for (method, situation), runs in by_system(rows).items():
        for domain in next(iter(runs.values()))["specialists"]:
            tops = [row["specialists"][domain] for row in runs.values()]
            others = [
                max(lost for name, lost in top["harm"].items() if name != domain) for top in tops
            ]
            of = f" of {len(tops)}"
            lines.append([
                method, situation, domain,
                _spread(runs, [100 * top["share"] for top in tops]).show(0) + " %",
                str(sum(top["share"] >= PURE for top in tops)) + of,
                str(sum(top["hurts_own_most"] for top in tops)) + of,
                str(sum(map(is_specialist, tops))) + of,
                _spread(runs, [top["harm"][domain] for top in tops]).show(2, sign=True),
                _spread(runs, others).show(2, sign=True),
            ])  # fmt: skip
    title = (
        "the top leaf of each domain, by responsibility, of those that have at least a tenth of "
        "the responsibility of the leaf that has most: the share of it that comes from the domain; "
        "in how many systems that is 90 % or more, the domain loses more than any other without "
        "the leaf, or both; bits per byte lost without it in the domain, and in the other that "
        "loses most"
    )
    headers = ["method", "situation", "domain", "share", ">= 90 %", "own hurt most", "both",
               "own", "other"]  # fmt: skip
    return Table(title, headers, lines)


def criterion_table(rows: Sequence[Row]) -> Table:
    """Whether a method's systems have specialists, part by part."""
    systems, found = by_system(rows), gaps(rows, RESPONSIBILITY)
    lines = []
    for (method, situation), runs in systems.items():
        if situation != THREE:
            continue
        tests = [row["information"][RESPONSIBILITY] for row in runs.values()]
        passed: list[bool | None] = [
            all(one[name]["p"] < SURE for one in tests) for name in ("bits", "share")
        ]
        passed += [_above(found.get((method, null))) for null in NULLS]
        domains = list(next(iter(runs.values()))["specialists"])
        pure = [
            domain
            for domain in domains
            if all(is_specialist(row["specialists"][domain]) for row in runs.values())
        ]
        passed.append(len(pure) == len(domains))
        verdict = "no" if False in passed else "unknown" if None in passed else "yes"
        cells = [{True: "yes", False: "no", None: NONE}[part] for part in passed[:-1]]
        of = f"{len(pure)} of {len(domains)}" + (f": {', '.join(pure)}" if pure else "")
        lines.append([method, str(len(runs)), *cells, of, verdict])
    title = (
        "specialists by responsibility: more bits and a larger share than with permuted labels in "
        "every system, more bits than each null over seeds, all at p < .01; domains whose top leaf "
        "is a specialist with every seed; all of it"
    )
    headers = ["method", "seeds", "bits, permuted", "share, permuted", f"bits, {SAME}",
               f"bits, {JOINT}", "domains", "met"]  # fmt: skip
    return Table(title, headers, lines, numbers=False)


def _above(gap: Gap | None) -> bool | None:
    """Whether differences are surely above 0; None where nobody can tell."""
    if gap is None or math.isnan(gap[1]):
        return None
    return statistics.fmean(gap[0]) > 0 and gap[1] < SURE


def sparing_table(rows: Sequence[Row]) -> Table:
    """What it costs to lose a leaf, by how it is chosen; rows of other views say nothing of it."""
    lines = []
    for (method, situation), runs in by_system([r for r in rows if "spared" in r]).items():
        for chooser in (*SIGNALS, ANY):
            found = zip(*[_chosen(row["spared"], chooser) for row in runs.values()], strict=True)
            cells = [_known(runs, values) for values in found]
            lines.append([method, situation, chooser, *cells])
    title = (
        "windows: losing a leaf: how well a signal ranks leaves by what deleting them costs "
        "(Spearman); bits per byte lost, mean over domains, if the leaf with the least of it is "
        "deleted, or merged into the sibling that inherits its text (the first, where nothing has "
        "been counted). Signals: running responsibility, updates, and the share of them that help "
        "while a copy trains on by ordinary steps, of leaves that moved then. Of leaves with as "
        "little, and of any leaf: the mean"
    )
    headers = ["method", "situation", "chosen by", "rank correlation", "deleted", "merged"]
    return Table(title, headers, lines)


def _known(runs: dict[int, Row], values: Sequence[float]) -> str:
    """Mean and interval of the values that there are, and of how many systems if not of all."""
    own = {seed: value for seed, value in zip(runs, values, strict=True) if not math.isnan(value)}
    if not own:
        return NONE
    text = _spread({seed: runs[seed] for seed in own}, list(own.values())).show(sign=True)
    return text if len(own) == len(runs) else f"{text} ({len(own)} of {len(runs)})"


def _chosen(spared: Sequence[Row], chooser: str) -> tuple[float, float, float]:
    """Rank correlation of a signal, and what it costs to delete or merge the leaf that it names.

    Each is NaN where a signal does not tell leaves apart, or none that it names can be merged.
    """
    if not spared:  # a root alone
        return math.nan, math.nan, math.nan
    told = spared
    rank = math.nan
    if chooser != ANY:
        known = [leaf for leaf in spared if leaf["signals"][chooser] is not None]
        signal = [leaf["signals"][chooser] for leaf in known]
        if len(set(signal)) < 2:
            return math.nan, math.nan, math.nan
        deleted = [_mean_harm(leaf["deleted"]) for leaf in known]
        if len(set(deleted)) > 1:
            rank = float(spearmanr(signal, deleted).statistic)
        told = [leaf for leaf in known if leaf["signals"][chooser] == min(signal)]
    merged = [_mean_harm(leaf["merged"]) for leaf in told if leaf["merged"] is not None]
    return (
        rank,
        statistics.fmean(_mean_harm(leaf["deleted"]) for leaf in told),
        statistics.fmean(merged) if merged else math.nan,
    )


def _mean_harm(harm: dict[str, float]) -> float:
    return statistics.fmean(harm.values())


def tables(rows: Sequence[Row]) -> list[Table]:
    """All tables that there are rows for, view by view, and that of leaves to spare."""
    made = (information_table, null_table, specialist_table, criterion_table)
    found = []
    for view in VIEWS:
        own = [row for row in rows if row["view"] == view]
        found += [
            replace(table, title=f"{view}: {table.title}") for table in (f(own) for f in made)
        ]
    found.append(sparing_table(rows))
    return [table for table in found if table.rows]


def markdown(rows: Sequence[Row], about: Sequence[str]) -> str:
    """Write a page of the tables."""
    lines = ["# Specialists", "", *(f"- {line}" for line in about), ""]
    for table in tables(rows):
        lines += table.section()
    return "\n".join(lines)
