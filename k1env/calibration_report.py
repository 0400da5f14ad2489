"""What a calibration of the gate came to: figures from its records, and `docs/gate.md`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from k1.tables import Table
from k1env.boundary import SUCCESSES_TO_ADVANCE
from k1env.calibration import LUCK, NOTHING, ROUNDING, select
from k1env.gate import GateConfig
from k1env.odds import (
    clopper_pearson,
    counted_promotions,
    power,
    promotion_probability,
    promotions,
)
from k1env.verdicts import NAIVE, Evidence, gate_ruling, regroup, shifted

Row = dict[str, Any]
ATTEMPTS = 2_000
"""Attempts of a controller that only has luck."""
EFFECTS = (0.001, 0.002, 0.005, 0.01)
"""Known effects at which power is measured; the first is the margin's default."""
EDGES = (-math.inf, 0.0, 0.001, 0.003, 0.007, 0.015, math.inf)
"""Bounds of the bins of true gains."""
GATE = "K-1's gate"


def rate(hits: int, tries: int) -> str:
    """A rate with its interval, for people."""
    if not tries:
        return "-"
    low, high = clopper_pearson(hits, tries)
    return f"{hits} of {tries} = {hits / tries:.1%} ({low:.1%} to {high:.1%})"


def percent(value: float, digits: int = 2) -> str:
    """A signed share in percent."""
    return f"{100 * value:+.{digits}f} %"


def seen(row: Row) -> Evidence:
    """What rules see of a record."""
    return Evidence(tuple(row["gains"]), row["fell"])


def rules(gate: GateConfig) -> dict[str, Callable[[Row], bool]]:
    """All rules by name, the gate first."""
    found: dict[str, Callable[[Row], bool]] = {GATE: lambda r: gate_ruling(r["gains"], gate)[0]}
    for name, rule in NAIVE.items():
        found[name] = lambda r, rule=rule: rule(seen(r))  # type: ignore[misc]
    return found


def _own_length(rows: list[Row], gate: GateConfig) -> list[Row]:
    return list(select(rows, horizon=gate.horizon, anneal=gate.anneal))


def _cells(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by cheat, domain and age."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["cheat"], row["domain"], row["age"]), []).append(row)
    return found


def _pool(rows: Sequence[Row], what: str = "gains") -> list[float]:
    return [gain for row in rows for gain in row[what]]


def false_accepts(rows: list[Row], gate: GateConfig) -> Table:
    """Acceptances of what cannot help, by cheat and cell."""
    table, own = [], _own_length(rows, gate)
    for cheat in (NOTHING, ROUNDING, LUCK):
        chosen = list(select(own, cheat=cheat))
        if not chosen:
            continue
        parts = {" ".join(cell[1:]): part for cell, part in sorted(_cells(chosen).items())}
        for name, part in [*parts.items(), ("all", chosen)]:
            hits = sum(gate_ruling(row["gains"], gate)[0] for row in part)
            same = sum(set(row["gains"]) == {0.0} for row in part)
            spread = statistics.pstdev(_pool(part))
            figures = rate(hits, len(part)), f"{same} of {len(part)}", f"{100 * spread:.2g} %"
            table.append((cheat, name, *figures))
    note = "Accepted with the 95 % interval of Clopper and Pearson. `std` is over single seeds."
    headers = ("cheat", "system", "accepted", "all seeds exactly 0", "std")
    return Table("False acceptances", headers, table, note)


def beside_naive(rows: list[Row], gate: GateConfig) -> Table:
    """What each rule does with changes that cannot help, and where that leads."""
    own = [r for r in _own_length(rows, gate) if r["cheat"] in (NOTHING, ROUNDING, LUCK)]
    table = []
    for name, rule in rules(gate).items():
        cells = []
        for cheat in (NOTHING, LUCK):
            chosen = list(select(own, cheat=cheat))
            cells.append(rate(sum(map(rule, chosen)), len(chosen)))
        verdicts = [rule(row) for row in select(own, cheat=LUCK)]
        if not verdicts:
            continue
        life = (verdicts * math.ceil(ATTEMPTS / len(verdicts)))[:ATTEMPTS]
        chance = sum(verdicts) / len(verdicts)
        opened = promotions(life) if name == GATE else counted_promotions(life)
        to_end = f"{sum(SUCCESSES_TO_ADVANCE) / chance:,.0f}" if chance else "never"
        table.append((name, *cells, str(opened), "-" if name == GATE else to_end))
    note = (
        f"The same records under other rules. Promotions: stages that open in {ATTEMPTS:,} "
        "attempts with `luck`, whose verdicts are those of the records in their order, over and "
        "over if there are fewer. The gate's need evidence too; with a naive rule, "
        "successes are counted (3, 5, 10). The last column is how many attempts the naive rule "
        "takes to stage 4 on average."
    )
    headers = ("rule", "accepts `nothing`", "accepts `luck`", "promotions", "attempts to stage 4")
    return Table("Naive rules beside it", headers, table, note)


def null_promotions(rows: list[Row], gate: GateConfig) -> Table:
    """Probability that luck opens the first stage, at the measured rate and its upper end."""
    chosen = list(select(_own_length(rows, gate), cheat=LUCK))
    hits = sum(gate_ruling(row["gains"], gate)[0] for row in chosen)
    table = []
    if chosen:
        measured, upper = hits / len(chosen), clopper_pearson(hits, len(chosen))[1]
        for name, chance in (
            ("measured", measured),
            ("upper end of its interval", upper),
            ("the gate's alpha", gate.alpha),
        ):
            odds = [
                promotion_probability(chance, ATTEMPTS, needed) for needed in SUCCESSES_TO_ADVANCE
            ]
            table.append((name, f"{chance:.2%}", *[f"{p:.2g}" for p in odds]))
    note = (
        f"Probability that a stage ever opens within {ATTEMPTS:,} attempts that all have the same "
        "rate of acceptance, by arithmetic on the evidence."
    )
    headers = ("rate", "per attempt", "3 successes", "5 successes", "10 successes")
    return Table("Promotion by luck", headers, table, note)


def acceptance_by_gain(rows: list[Row], gate: GateConfig) -> Table:
    """Acceptance against what a change is worth by the other trials of its cell."""
    bins: list[list[bool]] = [[] for _ in EDGES[1:]]
    for cell, part in _cells(_own_length(rows, gate)).items():
        if not cell[0].startswith("lr ") or len(part) < 2:
            continue
        for row in part:
            others = _pool([r for r in part if r is not row])
            if not others:
                continue
            gain = statistics.fmean(others)
            place = next(i for i, edge in enumerate(EDGES[1:]) if gain <= edge)
            bins[place].append(gate_ruling(row["gains"], gate)[0])
    table = []
    for low, high, found in zip(EDGES, EDGES[1:], bins, strict=False):
        name = f"{percent(low, 1)} to {percent(high, 1)}"
        name = f"below {percent(high, 1)}" if math.isinf(low) else name
        name = f"above {percent(low, 1)}" if math.isinf(high) else name
        table.append((name, rate(sum(found), len(found))))
    note = (
        "Learning rates multiplied. What a change is worth is the mean of all **other** trials of "
        "the same change, domain and age, each of eight seeds."
    )
    return Table("Acceptance by what a change is worth", ("true gain", "accepted"), table, note)


def _noises(rows: list[Row], gate: GateConfig) -> list[list[float]]:
    """Differences of each changed learning rate in each cell: the noise that the gate meets."""
    cells = _cells(_own_length(rows, gate))
    pools = [_pool(part) for cell, part in cells.items() if cell[0].startswith("lr ")]
    return [pool for pool in pools if len(pool) >= 2 * gate.seeds]


def known_effects(rows: list[Row], gate: GateConfig) -> Table:
    """Acceptance, cost and power at known effects, for other numbers of seeds and margins."""
    noises = _noises(rows, gate)
    each = 2 * (gate.horizon + gate.anneal)
    table = []
    choices = [
        *[(seeds, gate.margin) for seeds in (4, 6, 8, 12, 16)],
        *[(gate.seeds, margin) for margin in (0.0, 0.0005, 0.002)],
    ]
    for seeds, margin in choices if noises else []:
        config = replace(gate, seeds=seeds, margin=margin)
        cells = []
        for effect in EFFECTS:
            trials = [t for noise in noises for t in regroup(shifted(noise, effect), seeds)]
            verdicts = [gate_ruling(t, config) for t in trials]
            cells.append(f"{sum(ok for ok, _ in verdicts) / len(verdicts):.0%}")
        useless = [t for noise in noises for t in regroup(shifted(noise, 0.0), seeds)]
        cost = sum(gate_ruling(t, config)[1] for t in useless) / len(useless) * each
        figures = f"{len(verdicts)}", f"{seeds * each:,}", f"{cost:,.0f}"
        table.append((str(seeds), percent(margin), *cells, *figures))
    note = (
        "The differences of each changed learning rate in each cell, moved so that their mean is "
        "the effect and cut into trials of so many seeds. Steps are lane steps: of a trial that "
        "runs to its end, and on average of one whose effect is 0."
    )
    headers = ("seeds", "margin", *map(percent, EFFECTS), "trials", "steps", "average")
    return Table("Replicates and margin", headers, table, note)


def power_by_system(rows: list[Row], gate: GateConfig) -> Table:
    """Noise of each system, and the power that follows from it."""
    table = []
    for cell, part in sorted(_cells(_own_length(rows, gate)).items()):
        pool = _pool(part)
        if not cell[0].startswith("lr ") or len(pool) < 2:
            continue
        mean, std = statistics.fmean(pool), statistics.stdev(pool)
        hits = sum(gate_ruling(row["gains"], gate)[0] for row in part)
        odds = [power(e, std, gate.seeds, gate.margin, gate.alpha) for e in EFFECTS[1:]]
        spread = f"{100 * std:.2f} %", percent(mean), f"± {100 * std / math.sqrt(len(pool)):.2f}"
        table.append((*cell, *spread, f"{hits} of {len(part)}", *[f"{p:.0%}" for p in odds]))
    note = (
        "The noise of a difference, the gain over all seeds with its standard error, the trials "
        "accepted, and the power that a t-test has with that noise."
    )
    headers = ("cheat", "domain", "age", "std", "gain", "error", "accepted")
    powers = [f"at {percent(effect, 1)}" for effect in EFFECTS[1:]]
    return Table("By system", (*headers, *powers), table, note)


def by_length(rows: list[Row], gate: GateConfig) -> Table:
    """Gain and noise by horizon and annealing."""
    table = []
    pairs = sorted({(r["horizon"], r["anneal"]) for r in rows if r["cheat"] != LUCK})
    for horizon, anneal in pairs:
        for cheat in ("lr x0.5", "lr x2"):
            for age in ("early", "late"):
                part = list(select(rows, horizon=horizon, anneal=anneal, cheat=cheat, age=age))
                pool = _pool(part)
                if len(pool) < 2:
                    continue
                mean = statistics.fmean(pool)
                stds = [
                    statistics.stdev(_pool(p)) for p in _cells(part).values() if len(_pool(p)) > 1
                ]
                std = math.sqrt(statistics.fmean(s * s for s in stds))
                hits = sum(gate_ruling(row["gains"], gate)[0] for row in part)
                steps = gate.seeds * 2 * (horizon + anneal)
                figures = percent(mean), f"{100 * std:.2f} %", f"{hits} of {len(part)}"
                lengths = str(horizon), str(anneal)
                table.append((*lengths, cheat, age, *figures, f"{steps:,}"))
    note = (
        "Mean over domains; the longest horizon is what the short ones are to foretell. `std` is "
        "within systems."
    )
    headers = ("horizon", "anneal", "cheat", "age", "gain", "std", "accepted", "steps")
    return Table("Horizon and annealing", headers, table, note)


def claims(rows: list[Row], gate: GateConfig) -> Table:
    """Gain claimed at the gate against gain on the sealed test pool."""
    own = [r for r in _own_length(rows, gate) if r["gains"] and r["test"]]
    lr = [r for r in own if r["cheat"].startswith("lr ")]
    accepted = [r for r in own if gate_ruling(r["gains"], gate)[0]]
    small = [r for r in accepted if statistics.fmean(r["gains"]) <= 0.01]
    table = []
    for name, part in (
        ("accepted", accepted),
        ("accepted, gain of at most 1 %", small),
        ("all changed learning rates", lr),
    ):
        if not part:
            table.append((name, "0", "-", "-", "-"))
            continue
        gates = [statistics.fmean(r["gains"]) for r in part]
        tests = [statistics.fmean(r["test"]) for r in part]
        gaps = [a - b for a, b in zip(gates, tests, strict=True)]
        error = 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        gap = f"{percent(statistics.fmean(gaps), 3)} ± {100 * error:.3f}"
        figures = percent(statistics.fmean(gates)), percent(statistics.fmean(tests)), gap
        table.append((name, str(len(part)), *figures))
    note = (
        "The same twins scored on windows of both pools. The gap's interval is 1.96 standard "
        "errors over trials."
    )
    headers = ("trials", "how many", "gain at the gate", "on the test pool", "gap")
    return Table("Gain claimed and gain kept", headers, table, note)


def tables(rows: list[Row], gate: GateConfig) -> list[Table]:
    """All tables of a calibration."""
    made = [
        false_accepts, beside_naive, null_promotions, acceptance_by_gain, known_effects,
        power_by_system, by_length, claims,
    ]  # fmt: skip
    return [make(rows, gate) for make in made]


HEADING = """# The gate, calibrated on K-1 itself

How often the gate accepts what does not help, how often it accepts what does, and what other rules
would have done with the same trials. [theory.md](theory.md#the-gate) says how the gate works and
`k1env/calibration.py` how it was tried. This page is what the command wrote:

"""
AFTER = """
## How to read this

- `luck` is what no controller can bring about: its twins meet different batches, as the gate's own
  never do, and all of their difference is noise. `nothing` is the do-nothing cheat itself. The
  column at the margin of "Replicates and margin" is the worst case: what is just too little.
- Every trial runs all its seeds here; what the gate would have decided, and after how many seeds,
  follows from their differences. In a session the first seed goes on with the system's own stream;
  here all seeds have fresh ones, so that trials of one system are independent of each other.
- A false acceptance is to stay at 1 % or below. Intervals say how much of that is known: with no
  acceptance at all, 368 trials bring the upper end to 1 %.
- Rates are of these systems, sizes and texts. Other presets are other gates.
"""


def markdown(found: Sequence[Table], command: str, about: Sequence[str]) -> str:
    """Write the page."""
    parts = [HEADING, f"```bash\n{command}\n```\n\n", *[f"{line}\n" for line in about]]
    for table in found:
        parts.append(f"\n## {table.title}\n\n{table.note}\n\n")
        parts += [f"{line}\n" for line in table.markdown()]
    return "".join([*parts, AFTER])
