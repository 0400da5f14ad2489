"""What the study of time to loss found: statistics of its record, as tables and as Markdown."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from k1.tables import Table

BUDGETS = (0.25, 0.5, 1.0)
"""Shares of what the dense runs used."""
CONFIDENCE = 0.95
NONE = "-"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    sd: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Summarise one value per seed."""
        return Spread(statistics.fmean(values), _deviation(values))

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if math.isnan(self.sd) else f" ± {self.sd:.3f}")


def mean_bits(method: dict[str, Any], domains: list[str]) -> np.ndarray:
    """Mean bits per byte over domains: [points, seeds], NaN where a run has diverged."""
    bits = np.array([method["curve"]["bits"][domain] for domain in domains], dtype=np.float64)
    return bits.mean(axis=0)


def at_step(method: dict[str, Any], bits: np.ndarray, step: float) -> list[float] | None:
    """Bits per byte of each seed at a step, between evaluations by the logarithm of the step.

    Returns None where the run did not get that far.
    """
    steps = method["curve"]["steps"]
    if step > steps[-1] * (1 + 1e-9):
        return None
    x = np.log1p(steps)
    return [float(np.interp(math.log1p(step), x, lane)) for lane in bits.T]


def step_reaching(method: dict[str, Any], bits: np.ndarray, goals: list[float]) -> list[float]:
    """First step at which each seed reaches its goal, NaN where it does not."""
    x, found = np.log1p(method["curve"]["steps"]), []
    for lane, goal in zip(bits.T, goals, strict=True):
        below = np.flatnonzero(lane <= goal)
        if len(below) == 0:
            found.append(math.nan)
            continue
        i = int(below[0])
        if i == 0:
            found.append(0.0)
            continue
        part = (lane[i - 1] - goal) / (lane[i - 1] - lane[i])
        found.append(float(np.expm1(x[i - 1] + part * (x[i] - x[i - 1]))))
    return found


def half_width(differences: list[float]) -> float:
    """Half the width of the t-interval of a mean; NaN for one seed."""
    from scipy import stats

    n = len(differences)
    if n < 2:
        return math.nan
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return quantile * _deviation(differences) / math.sqrt(n)


def _deviation(values: list[float]) -> float:
    """Standard deviation of a sample; NaN for one value, or where one is NaN."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def difference(values: list[float], reference: list[float]) -> str:
    """Mean difference to a reference, paired by seed, with its interval."""
    each = [value - other for value, other in zip(values, reference, strict=True)]
    half = half_width(each)
    return f"{statistics.fmean(each):+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def cost_table(methods: dict[str, Any]) -> Table:
    """What a step of each method costs, and where its updates go."""
    dense, rows = methods["dense"], []
    for name, method in methods.items():
        low, high = (1000 * s for s in method["step_seconds_quartiles"])
        visits = method["visits"]
        spread = [NONE, NONE]
        if visits:
            most = statistics.fmean(lane["most"] for lane in visits)
            entropy = statistics.fmean(lane["entropy"] for lane in visits)
            most_entropy = statistics.fmean(math.log2(lane["of"]) for lane in visits)
            spread = [f"{most:.1%}", f"{entropy:.2f} of {most_entropy:.2f}"]
        rows.append(
            [
                name,
                f"{method['lr']:.3g}" + ("*" if method["edge"] else ""),
                str(method["curve"]["steps"][-1]),
                f"{1000 * method['step_seconds']:.2f} ({low:.2f}-{high:.2f})",
                f"{method['step_seconds'] / dense['step_seconds']:.2f}",
                f"{method['step_flops'] / dense['step_flops']:.2f}",
                f"{method['updated_blocks']:.1f}",
                *spread,
            ]
        )
    headers = ["method", "lr", "steps", "ms (quartiles)", "time", "FLOPs", "blocks"]
    headers += ["most visited", "entropy, bits"]
    title = (
        "a step: its time, also as a share of dense's, its FLOPs as a share of dense's, blocks "
        "updated; share of visits of the most visited block, and entropy of visits (of its most)"
    )
    return Table(title, headers, rows)


def loss_table(methods: dict[str, Any], domains: list[str], cost: str, title: str) -> Table:
    """Bits per byte at equal cost.

    Args:
        methods: the situation's methods.
        domains: whose mean is reported.
        cost: `step_flops` or `step_seconds`.
        title: of the table.
    """
    dense = methods["dense"]
    total = dense[cost] * dense["curve"]["steps"][-1]
    dense_bits = mean_bits(dense, domains)
    final = [float(value) for value in dense_bits[-1]]
    rows = []
    for name, method in methods.items():
        bits = mean_bits(method, domains)
        at = [at_step(method, bits, share * total / method[cost]) for share in BUDGETS]
        cells = [str(Spread.of(values)) if values else NONE for values in at]
        paired = difference(at[-1], final) if at[-1] and name != "dense" else NONE
        when = [step * method[cost] / total for step in step_reaching(method, bits, final)]
        reached = [share for share in when if not math.isnan(share)]
        text = "not reached"
        if reached:
            text = f"{statistics.fmean(reached):.2f}"
            if len(reached) < len(when):
                text += f" ({len(reached)} of {len(when)} seeds)"
        rows.append([name, *cells, paired, text])
    headers = ["method", *(f"{share:.0%}" for share in BUDGETS)]
    headers += ["minus dense", "reaches dense"]
    return Table(title, headers, rows)


def kept_table(methods: dict[str, Any], old: str) -> Table:
    """Bits per byte of the old domain, at equal FLOPs."""
    dense = methods["dense"]
    total = dense["step_flops"] * dense["curve"]["steps"][-1]
    reference = mean_bits(dense, [old])
    rows = []
    for name, method in methods.items():
        bits = mean_bits(method, [old])
        at = [at_step(method, bits, share * total / method["step_flops"]) for share in BUDGETS]
        cells = [str(Spread.of([float(b) for b in bits[0]]))]
        cells += [str(Spread.of(values)) if values else NONE for values in at]
        last = [float(value) for value in reference[-1]]
        paired = difference(at[-1], last) if at[-1] and name != "dense" else NONE
        rows.append([name, *cells, paired])
    headers = ["method", "before", *(f"{share:.0%}" for share in BUDGETS), "minus dense"]
    return Table(f"{old} (the old domain) at equal FLOPs", headers, rows)


def legend(record: dict[str, Any]) -> dict[str, str]:
    """What each method of a record is."""
    found: dict[str, str] = {}
    for situation in record["situations"].values():
        found |= {name: method["what"] for name, method in situation["methods"].items()}
    return found


def tables(record: dict[str, Any]) -> dict[str, list[Table]]:
    """All tables, by situation; a situation without a finished dense run has none."""
    result: dict[str, list[Table]] = {}
    for name, situation in record["situations"].items():
        methods, target = situation["methods"], situation["target"]
        if "dense" not in methods:
            continue
        what = "bits per byte of " + ", ".join(target)
        result[name] = [
            cost_table(methods),
            loss_table(methods, target, "step_flops", f"{what} at equal FLOPs"),
            loss_table(methods, target, "step_seconds", f"{what} at equal time"),
        ]
        if name == "new-domain":
            result[name].append(kept_table(methods, record["old"]))
    return result


def headings(record: dict[str, Any]) -> dict[str, str]:
    """A title for each situation."""
    return {
        "scratch": "From scratch, on all domains in equal shares",
        "new-domain": f"A tree trained on {record['old']} meets {record['new']}",
    }


def how(record: dict[str, Any]) -> list[str]:
    """What a reader has to know to read the tables, one sentence each."""
    seeds = ", ".join(map(str, record["seeds"]))
    command = re.sub(r"--(json|markdown) \S+", r"--\1 FILE", record["command"])
    lines = [
        f"Command: `{command}`.",
        f"Device: {record['device']}; {record['versions']}.",
        f"Dense runs have {record['steps']} steps; columns in per cent are shares of what they "
        "use, in FLOPs or time. `minus dense` is at 100%; `reaches dense` is the share at which "
        "a run gets to dense's last loss.",
        f"Mean ± standard deviation over seeds {seeds}; differences are paired by seed, "
        f"± half a {CONFIDENCE:.0%} t-interval.",
        f"Learning rates were chosen for each method on seed {record['tune_seed']} by the gate "
        f"pool, in runs of {record['tune_share']:.0%} of the length; * marks one at the edge "
        "of what was tried. Tuning is not part of the cost.",
        "FLOPs are by formula. The time of a step was measured for one lane alone (median of "
        "stretches); seeds ran as lanes side by side, which is faster per lane and not what "
        "the tables use.",
        "Values between evaluations are interpolated in the logarithm of the step; "
        f"`{NONE}` is a budget that a run did not get to.",
    ]
    if "before" in record:
        before, old = record["before"], record["old"]
        bits = Spread.of(before["bits"][old])
        lines.append(
            f"The trained trees of `new-domain` had {before['steps']} dense steps on {old} "
            f"({bits} bits per byte); optimizer moments and records start anew for every method."
        )
    if record["stopped"]:
        lines.append(f"Incomplete: {record['stopped']}.")
    return lines


def markdown(record: dict[str, Any]) -> str:
    """Write the section of a page."""
    lines = ["## Time to loss", "", *(f"- {line}" for line in how(record)), ""]
    methods = Table("", ("method", "what"), list(legend(record).items()), numbers=False)
    lines += [*methods.markdown(), ""]
    for name, found in tables(record).items():
        lines += [f"### {headings(record)[name]}", ""]
        for table in found:
            lines += table.section()
    return "\n".join(lines)
