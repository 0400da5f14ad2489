"""What the rows of an experiment say: tables for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from k1.experiments import metrics
from k1.experiments.significance import Interval, holm, interval, paired_p
from k1.row_file import Row
from k1.tables import Table

NONE = "-"
Setting = tuple[float, float]
Pair = tuple[tuple[str, ...], int]
"""Order and seed: runs of two methods that have these in common are compared."""
SLACK = (0.0, 2.0, 5.0, 10.0)
"""Per cent more new-domain bits than dense at which methods' forgetting is compared."""

MEASURES: dict[str, Callable[[metrics.Matrix], float]] = {
    "final": metrics.final_bits,
    "new": metrics.new_domain_bits,
    "forgetting": metrics.average_forgetting,
    "forgetting %": metrics.forgetting_percent,
    "perplexity %": metrics.forgetting_perplexity_percent,
    "BWT": metrics.backward_transfer,
    "FWT": metrics.forward_transfer,
    "retention": metrics.retention,
}
DIGITS = {"forgetting %": 1, "perplexity %": 1, "retention": 2}


def by_setting(rows: Sequence[Row]) -> dict[str, dict[Setting, list[Row]]]:
    """Sort rows by method, and by learning rate and strength."""
    found: dict[str, dict[Setting, list[Row]]] = {}
    for row in rows:
        setting = row["lr"], row["strength"]
        found.setdefault(row["method"], {}).setdefault(setting, []).append(row)
    return found


def measure(row: Row, name: str, view: str) -> float:
    """One figure of a run."""
    if name == "first":
        return float(metrics.learnt(_matrix(row, view))[0])
    if name == "anytime":
        return metrics.average_anytime(curve_of(row))
    if name == "gap":
        return metrics.stability_gap(_matrix(row, "windows"), curve_of(row))
    return MEASURES[name](_matrix(row, view))


def _matrix(row: Row, view: str) -> metrics.Matrix:
    return metrics.as_matrix(row["bits"][view])


def curve_of(row: Row) -> list[metrics.Point]:
    """Evaluations within a run's stream; a figure that was not finite is NaN."""
    return [(phase, [math.nan if b is None else b for b in bits]) for phase, bits in row["curve"]]


def best_settings(rows: Sequence[Row]) -> dict[str, Setting]:
    """For each method the learning rate and strength with the least mean bits at the end.

    The mean is over the orders and seeds that all its settings have, if there are any.
    """
    return {
        method: min(settings, key=lambda s: (_loss(common(settings)[s], "final"), s))
        for method, settings in by_setting(rows).items()
    }


def _loss(runs: Sequence[Row], name: str, view: str = "windows") -> float:
    """Mean of a figure of which less is better; infinite if a run has diverged."""
    mean = statistics.fmean(measure(row, name, view) for row in runs)
    return mean if math.isfinite(mean) else math.inf


def common(settings: Mapping[Setting, Sequence[Row]]) -> dict[Setting, list[Row]]:
    """The runs of each setting whose order and seed all settings have; all runs if none are."""
    shared = set.intersection(*({_pair(row) for row in runs} for runs in settings.values()))
    return {
        setting: [row for row in runs if not shared or _pair(row) in shared]
        for setting, runs in settings.items()
    }


def _pair(row: Row) -> Pair:
    return tuple(row["order"]), row["seed"]


def best_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each method at its best setting."""
    sorted_rows, best = by_setting(rows), best_settings(rows)
    return {method: sorted_rows[method][setting] for method, setting in best.items()}


def paired(mine: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Runs of two methods with the same order and seed."""
    other = {_pair(row): row for row in theirs}
    return [(row, other[_pair(row)]) for row in mine if _pair(row) in other]


def by_order(runs: Sequence[Row], values: Sequence[float]) -> list[float]:
    """Average values of runs that have the same order of domains, if there are several orders.

    Orders differ by far more than seeds do, so runs of one order are no independent samples.
    """
    groups: dict[tuple[str, ...], list[float]] = {}
    for row, value in zip(runs, values, strict=True):
        groups.setdefault(tuple(row["order"]), []).append(value)
    return [statistics.fmean(group) for group in groups.values()] if len(groups) > 1 else [*values]


def spread(runs: Sequence[Row], name: str, view: str) -> Interval:
    """Mean and interval of a figure."""
    return interval(by_order(runs, [measure(row, name, view) for row in runs]))


def main_table(rows: Sequence[Row], view: str) -> Table:
    """What is learnt and what is forgotten, in one view."""
    names = ["final", "new", *(n for n in MEASURES if n not in ("final", "new"))]
    names += ["anytime", "gap"] if view == "windows" else []
    lines = []
    for method, runs in best_rows(rows).items():
        cells = [spread(runs, name, view).show(DIGITS.get(name, 3)) for name in names]
        setting = f"{runs[0]['lr']:.3g}"
        if runs[0]["strength"]:
            setting += f" / {runs[0]['strength']:.3g}"
        lines.append([method, setting, str(len(runs)), *cells])
    title = {
        "windows": "random windows: mean bits per byte at the end, of new domains after their "
        "phase; what earlier ones lose, in bits, in per cent of bits, of perplexity; transfers; "
        "share of what was learnt that is left; mean over evaluations; worst loss within a phase",
        "passages": "documents read from their start, the router's evidence carried on: the same",
    }[view]
    return Table(title, ["method", "lr", "runs", *names], lines)


def domain_table(rows: Sequence[Row], view: str) -> Table:
    """Who forgets what: bits of each domain after its phase and at the end."""
    best = best_rows(rows)
    domains = list(next(iter(best.values()))[0]["order"])
    lines = []
    for method, runs in best.items():
        cells = []
        for domain in domains:
            pairs = []
            for row in runs:
                if row["order"][-1] == domain:
                    continue  # nothing came after it
                r, j = _matrix(row, view), row["order"].index(domain)
                pairs.append((float(metrics.learnt(r)[j]), float(r[-1, j])))
            if not pairs:
                cells.append(NONE)
                continue
            own, last = (statistics.fmean(values) for values in zip(*pairs, strict=True))
            cells.append(f"{own:.3f} -> {last:.3f} ({100 * (last / own - 1):+.1f} %)")
        lines.append([method, *cells])
    title = (
        f"each domain after its own phase -> at the end, bits per byte, of runs where others came "
        f"after it, {view}"
    )
    return Table(title, ["method", *domains], lines)


def cost_table(rows: Sequence[Row], reference: str) -> Table:
    """What the runs cost."""
    best = best_rows(rows)
    base = best[reference]

    def mean(runs: list[Row], name: str) -> float:
        return statistics.fmean(row[name] for row in runs)

    lines = [
        [
            method,
            " ".join(str(s) for s in runs[0]["steps"]),
            f"{mean(runs, 'flops') / mean(base, 'flops'):.2f}",
            f"{mean(runs, 'parameters') / mean(base, 'parameters'):.2f}",
            f"{mean(runs, 'moved'):.1%}",
            f"{sum(row['seconds'] / row['lanes'] for row in runs) / len(runs):.1f}",
            memory_of(runs),
        ]
        for method, runs in best.items()
    ]
    headers = ["method", "steps", "FLOPs", "parameters", "moved", "seconds", "MiB"]
    title = (
        f"cost: steps by phase; executed FLOPs and living parameters as a multiple of "
        f"{reference}'s; share of the parameters that a step moves; seconds and, on CUDA, peak "
        "memory a run, of those side by side"
    )
    return Table(title, headers, lines)


def memory_of(runs: Sequence[Row]) -> str:
    """MiB of a run, of those side by side, where they were counted in all of them."""
    known = [row["memory"] / row["lanes"] / 2**20 for row in runs if row.get("memory")]
    return f"{statistics.fmean(known):,.0f}" if len(known) == len(runs) else NONE


def frontier_table(rows: Sequence[Row], reference: str, view: str) -> Table:
    """Forgetting at matched new-domain bits, along each method's sweep."""
    settings = by_setting(rows)
    base = min(settings[reference].values(), key=lambda runs: _loss(runs, "new", view))
    lines = []
    for method, found in settings.items():
        points, counts = [], []
        for runs in found.values():
            pairs = paired(runs, base)
            point = (
                _average([_excess(row, other, view) for row, other in pairs]),
                _average([measure(row, "forgetting %", view) for row, _ in pairs]),
            )
            if all(map(math.isfinite, point)):
                points.append(point)
                counts.append(len(pairs))
        if not points:
            continue
        at = [metrics.harm_at(points, slack) for slack in SLACK]
        cells = [NONE if harm is None else f"{harm:.1f}" for harm in at]
        best = f"{min(point[0] for point in points):+.1f} %"
        lines.append([method, str(len(points)), str(min(counts)), best, *cells])
    headers = ["method", "points", "runs", "best new", *(f"+{slack:g} %" for slack in SLACK)]
    title = (
        f"forgetting in per cent of bits at new-domain bits of {reference}'s best (same orders and "
        "seeds) and somewhat more, between the points of each method's sweep, each of so many runs "
        f"at least; {NONE}: it does not learn them so well; {view}"
    )
    return Table(title, headers, lines)


def _average(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _excess(row: Row, other: Row, view: str, name: str = "new") -> float:
    """Bits of a run above those of another, in per cent."""
    return 100 * (measure(row, name, view) / measure(other, name, view) - 1)


def sweep(found: Mapping[Setting, Sequence[Row]], view: str) -> list[tuple[float, float]]:
    """New-domain bits and forgetting in per cent at each setting of a method."""
    return [
        (_mean(runs, "new", view), _mean(runs, "forgetting %", view)) for runs in found.values()
    ]


def _mean(runs: Sequence[Row], name: str, view: str) -> float:
    return statistics.fmean(measure(row, name, view) for row in runs)


def test_table(rows: Sequence[Row], reference: str, view: str) -> Table:
    """Differences to a reference, paired by order and seed."""
    best = best_rows(rows)
    names = ("final", "new", "forgetting %")
    cells: dict[str, list[str]] = {}
    for name in names:
        p_values = {}
        for method, runs in best.items():
            pairs = paired(runs, best[reference])
            if method == reference or not pairs:
                continue
            mine, theirs = zip(
                *([measure(row, name, view) for row in pair] for pair in pairs), strict=True
            )
            own = [row for row, _ in pairs]
            averaged = by_order(own, mine), by_order(own, theirs)
            gaps = [a - b for a, b in zip(*averaged, strict=True)]
            cells.setdefault(method, []).append(interval(gaps).show(DIGITS.get(name, 3), sign=True))
            p_values[method] = paired_p(*averaged)
        for method, p in holm(p_values).items():
            cells[method].append(NONE if math.isnan(p) else f"{p:.2g}")
    headers = ["method", *(h for name in names for h in (name, "p"))]
    title = (
        f"minus {reference}, paired by order and seed; p by t-test with Holm's correction; {view}"
    )
    return Table(title, headers, [[method, *line] for method, line in cells.items()])


def headline_table(rows: Sequence[Row], reference: str) -> Table:
    """What matters most, in one table."""
    best = best_rows(rows)
    base = best[reference]

    def mean(runs: list[Row], name: str) -> float:
        return statistics.fmean(row[name] for row in runs)

    lines = []
    for method, runs in best.items():
        forgotten = [spread(runs, "forgetting %", view).show(1) for view in ("windows", "passages")]
        pairs = paired(runs, base)
        own = [row for row, _ in pairs]
        excess = [
            interval(by_order(own, [_excess(*pair, "windows", name) for pair in pairs])).show(
                1, sign=True
            )
            if pairs
            else NONE
            for name in ("new", "first")
        ]
        final = spread(runs, "final", "windows").show()
        lines.append(
            [
                method,
                str(len(runs)),
                *forgotten,
                *excess,
                final,
                f"{mean(runs, 'parameters') / mean(base, 'parameters'):.2f}",
                f"{mean(runs, 'moved'):.0%}",
                f"{mean(runs, 'flops') / mean(base, 'flops'):.2f}",
            ]
        )
    headers = ("method", "runs", "forgetting %, windows", "passages",
               f"new domains, % of {reference}", "first domain", "bits at the end",
               "parameters", "moved a step", "FLOPs")  # fmt: skip
    title = (
        "what earlier domains lose, in per cent of their bits; bits of new domains after their "
        f"phase, and of the first after its own, against {reference}, paired by order and seed; "
        "mean bits per byte of all domains at the end; parameters kept and "
        f"training FLOPs as a multiple of {reference}'s"
    )
    return Table(title, headers, lines)


def tables(rows: Sequence[Row], reference: str, sweep: Sequence[Row] | None = None) -> list[Table]:
    """All tables; those against the reference only if there are runs of it.

    Args:
        rows: the runs.
        reference: the method that others are compared with.
        sweep: runs over settings that frontiers are read from, if others than `rows`.
    """
    if not rows:
        return []
    compared = any(row["method"] == reference for row in rows)
    found = [headline_table(rows, reference)] if compared else []
    found += [main_table(rows, "windows"), main_table(rows, "passages")]
    found += [domain_table(rows, "windows"), domain_table(rows, "passages")]
    if compared:
        found.append(cost_table(rows, reference))
        found += [test_table(rows, reference, view) for view in ("windows", "passages")]
    points = rows if sweep is None else sweep
    if any(row["method"] == reference for row in points):
        found += [frontier_table(points, reference, view) for view in ("windows", "passages")]
    return found
