"""Results for people: tables in a terminal, and the page about performance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from k1.bench.variants import REFERENCE
from k1.errors import K1Error
from k1.tables import Table

Result = dict[str, Any]

COLUMNS = (
    "variant",
    "ms a step",
    "IQR",
    f"against {REFERENCE}",
    "warm-up s",
    "peak GB",
    "kernels",
    "GFLOP counted",
    "GFLOP formula",
    "% of floor",
)

STEPS = ("sparse", "path-only")
"""Variants of which it is told what they cost beside the frozen forward pass."""
_BLOCKS = ("_forward", "_fold")
"""Kernels that run blocks forward."""


def read_results(path: Path) -> Result:
    """Read what `--json` wrote.

    Raises:
        K1Error: if the file is missing or something else.
    """
    try:
        result = json.loads(path.read_text())
        if "configurations" not in result:
            raise ValueError("it has no configurations")
    except (OSError, ValueError, TypeError) as error:
        raise K1Error(f"{path} holds no benchmark ({error}): write one with --json") from error
    return dict(result)


def number(value: float | None, digits: int = 2) -> str:
    """Write a number, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """Write three digits of a number, or a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def row(name: str, record: Result) -> list[str]:
    """Cells of one variant."""
    flops = [record.get("flops_counted"), record.get("flops_formula")]
    giga = [significant(None if f is None else f / 1e9) for f in flops]
    if record["status"] != "ok":
        return [name, record["status"], *["-"] * 5, *giga, "-"]
    peak = record["peak_bytes"]
    return [
        name,
        significant(record["median_ms"]),
        significant(record["iqr_ms"]),
        number(record["ratio"]),
        number(record["build_seconds"], 1),
        number(None if peak is None else peak / 1e9),
        number(record["kernels"], 0),
        *giga,
        number(100 * record["floor_share"], 1),
    ]


def title(name: str, case: Result) -> str:
    """One line about a configuration."""
    model, train = case["config"]["model"], case["config"]["train"]
    return (
        f"{name}: {case['blocks']} blocks, d {model['embed']}, feed-forward "
        f"{model['feed_forward']}, {case['parameters'] / 1e6:,.1f} M parameters, batch "
        f"{train['batch']} x {model['context']}, {train['precision']}, router {model['router']}, "
        f"text {case['text']}"
    )


def best_stock(case: Result) -> tuple[str, float] | None:
    """The fastest dense step in ordinary modules and its time, None if there is none."""
    found = {
        name: record["median_ms"]
        for name, record in case["variants"].items()
        if name.startswith("stock-") and name != "stock-toggle" and record["status"] == "ok"
    }
    best = min(found, key=lambda name: found[name], default=None)
    return None if best is None else (best, found[best])


def best_own_dense(case: Result) -> tuple[str, float] | None:
    """K-1's fastest dense step and its time, None if there is none."""
    found = {
        name: record["median_ms"]
        for name, record in case["variants"].items()
        if name.split("-")[0] == "dense" and record["status"] == "ok"
    }
    best = min(found, key=lambda name: found[name], default=None)
    return None if best is None else (best, found[best])


def beside_forward_ms(records: dict[str, Result], step: str) -> float | None:
    """Time of a step's kernels beside the frozen forward pass: backward pass, optimizer, the rest.

    It is the time of all kernels that `frozen-forward` does not launch: drawing windows, choosing
    paths, the head, the backward pass, the update, records, and of `sparse` also the probe's. In
    addition it is how much longer than in `frozen-forward` those kernels take that run blocks: for
    chosen blocks run once more or keep what their gradients need, and a probe runs all. What else
    both launch mixes or routes; in a step, some of that runs beside the blocks and takes as long as
    it waits for a place there, so no difference of it would tell a cost.

    Where blocks are many, the difference of two steps' times is a small one of large numbers;
    this is mostly a sum. It is no part of a step's time, for what runs side by side counts in full.

    Args:
        records: of a configuration's variants.
        step: one of the variants.

    Returns:
        ms a step; None if kernels were not timed, or if blocks run by products of a library, whose
        names do not tell forward from backward.
    """
    whole, frozen = (records.get(name, {}).get("kernel_ms") for name in (step, "frozen-forward"))
    if not whole or not frozen or any(name not in whole or name not in frozen for name in _BLOCKS):
        return None
    beside = sum(ms for name, ms in whole.items() if name not in frozen)
    return beside + sum(whole[name] - frozen[name] for name in _BLOCKS)


def remarks(case: Result) -> list[str]:
    """What the table does not say by itself, line by line."""
    lines = [
        f"`{name}`: {record['status']}: {record['reason']}."
        for name, record in case["variants"].items()
        if record.get("reason")
    ]
    lines += [
        f"`{name}`: unfinished; a step took some {significant(record['first_ms'])} ms at first."
        for name, record in case["variants"].items()
        if record["status"] == "unfinished" and "first_ms" in record
    ]
    by_backend: dict[str, list[str]] = {}
    for name, record in case["variants"].items():
        if "backend" in record:
            by_backend.setdefault(record["backend"], []).append(f"`{name}`")
    lines += [f"Blocks of {', '.join(names)}: {what}." for what, names in by_backend.items()]
    sparse = case["variants"].get(REFERENCE, {})
    for label, best in (
        ("best dense step in ordinary modules", best_stock(case)),
        ("K-1's best dense step", best_own_dense(case)),
    ):
        if best and "median_ms" in sparse:
            other = case["variants"][best[0]]
            text = f"`sparse` is {best[1] / sparse['median_ms']:.2f}x as fast as the {label}"
            if label.startswith("K-1"):
                text = f"`sparse` is {best[1] / sparse['median_ms']:.2f}x as fast as {label}"
            text += f" (`{best[0]}`)"
            if sparse["peak_bytes"] and other["peak_bytes"]:
                text += f", with {sparse['peak_bytes'] / other['peak_bytes']:.2f}x its peak memory"
            lines.append(text + ".")
    graphs = case["variants"].get("stock-graphs", {})
    if best_stock(case) and sparse.get("kernels") and graphs.get("status") != "ok":
        lines.append(
            "`stock-graphs` was not measured. Without it the host launches each kernel of the "
            "ordinary modules, which may be what bounds them: the ratio to them says nothing of "
            "the best that PyTorch can do."
        )
    if case["attribution_overhead"] is not None:
        share = 100 * case["attribution_overhead"]
        lines.append(f"Attribution takes {share:.1f} % of the `sparse` step.")
    for step in STEPS:
        value = beside_forward_ms(case["variants"], step)
        if value is not None:
            lines.append(f"Kernels of `{step}` beside the frozen forward pass: {value:.2f} ms.")
    found = case.get("agreement")
    if found:
        low, high = (100 * x for x in found["same_leaf_interval"])
        lines.append(
            f"After {found['train_steps']} sparse steps, a probe of {found['probe_windows']} "
            f"windows named the same leaf as all {found['windows']} in "
            f"{100 * found['same_leaf']:.1f} % of {found['batches']} batches (95 % interval "
            f"{low:.1f}-{high:.1f} %), the same child of the root in "
            f"{100 * found['same_branch']:.1f} %; {found['distinct_leaves']} leaves were named, "
            f"the commonest in {100 * found['commonest_leaf']:.1f} %."
        )
    return lines


def growth(result: Result) -> list[str]:
    """How the costs of a step grow from `default` to `thousand` blocks, line by line."""
    small, large = (result["configurations"].get(name) for name in ("default", "thousand"))
    lines: list[str] = []
    if not small or not large:
        return lines
    blocks = f"From {small['blocks']} to {large['blocks']:,} blocks"
    for step in STEPS:
        before, after = (beside_forward_ms(case["variants"], step) for case in (small, large))
        if before is not None and after is not None:
            change = 100 * (after / before - 1)
            lines.append(
                f"{blocks}, the time of kernels of `{step}` beside the frozen forward pass grows "
                f"{change:+.1f} %, from {before:.2f} to {after:.2f} ms."
            )
    times = [case["variants"].get("frozen-forward", {}).get("median_ms") for case in (small, large)]
    if None not in times:
        lines.append(f"{blocks}, the frozen forward pass takes {times[1] / times[0]:.1f}x.")
    return lines


def show(result: Result, console: Console) -> None:
    """Print the tables of a result."""
    for name, case in result["configurations"].items():
        console.print(_table(name, case).shown())
        for line in remarks(case):
            console.print(line)
    for line in growth(result):
        console.print(line)


METHOD = """\
How it is measured: in one process the variants take turns, round after round; a step's time is the
median over the rounds, by device events on CUDA and by the clock on a CPU, with the range between
the quartiles beside it. Building, compiling and warming up are apart. All variants train on the
same batches; ordinary modules and `dense-compiled` are handed theirs, K-1's engine draws them
within its time. K-1's engine runs with torch's deterministic algorithms on CUDA, nothing else does.
Counted operations are those of the same step run plainly, by PyTorch's own counter, which takes
causal attention for full; the formula (`k1/flops.py`) is for the plain step too. % of floor is the
time that the formula's operations would take at the rate of a large matrix product, as a share of
the time measured. Peak memory is what a variant adds, at most, to what others hold; it is not
measured on a CPU, where variants in one process cannot be told apart. Variants that do not fit
together in memory are measured in further rounds, and each that is compiled in rounds of its own;
the reference takes part in all of them. The time of a step's kernels beside the frozen forward pass
is that of all that `frozen-forward` does not launch, and how much longer than there those take that
run blocks; what runs side by side counts in full.
"""


def _table(name: str, case: Result) -> Table:
    rows = [row(variant, record) for variant, record in case["variants"].items()]
    return Table(title(name, case), COLUMNS, rows)


def markdown(results: list[Result]) -> str:
    """Write the page about performance from results of one or more runs."""
    parts = [
        "# Performance\n",
        "This page is written by `scripts/benchmark.py --from FILE... --markdown "
        "docs/performance.md`.\n",
        METHOD,
        "## Variants\n",
    ]
    about = {
        name: record["about"]
        for result in results
        for case in result["configurations"].values()
        for name, record in case["variants"].items()
    }
    parts.append("".join(f"- `{name}`: {text}\n" for name, text in about.items()))
    for result in results:
        device, versions = result["device"], result["versions"]
        parts.append(f"## {device['name']}\n")
        parts.append(f"```bash\n{result['command']}\n```\n")
        shown = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
        threads = f", {device['threads']} thread(s)" if "threads" in device else ""
        parts.append(
            f"{shown}{threads}; {result['rounds']} rounds; a large matrix product reaches "
            f"{device['matmul_flops'] / 1e12:.3g} TFLOP/s.\n"
        )
        if not result["complete"]:
            parts.append("This run was stopped before its end.\n")
        for name, case in result["configurations"].items():
            parts.append(f"### {title(name, case)}\n")
            parts.append("\n".join(_table(name, case).markdown()) + "\n")
            parts.append("".join(f"- {line}\n" for line in remarks(case)))
        lines = growth(result)
        if lines:
            parts.append("### Growth\n")
            parts.append("".join(f"- {line}\n" for line in lines))
    return "\n".join(part for part in parts if part)
