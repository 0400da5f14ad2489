"""Carries an experiment out: runs of a method side by side, a row for each that is finished."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from k1.data import TextData
from k1.durable import canonical_json
from k1.errors import K1Error
from k1.experiments.learner import VIEWS, Learner, Run
from k1.experiments.method import Method
from k1.experiments.methods import METHODS, choose_methods
from k1.experiments.plans import Experiment
from k1.experiments.stream import Views, orders_of, stream_domains, views
from k1.flops import step_flops
from k1.row_file import Row, RowFile
from k1.sampling import TokenStore
from k1.topology import Topology

KEY = ("method", "order", "seed", "lr", "strength")
Chosen = Mapping[str, tuple[float, float]]
"""Learning rate and strength of each method."""


class OutOfTime(Exception):
    """The time is used up."""


@dataclass
class Conditions:
    """Where and how an experiment runs."""

    data: TextData
    source: str
    """What the text was loaded from."""
    device: str
    pool: str = "validation"
    lanes: int = 64
    """Runs side by side, at most."""
    deadline: float = math.inf
    """Of `time.monotonic()`."""
    chosen: Chosen | None = None
    """Run these settings of each method alone."""
    say: Callable[[str], None] = lambda line: None
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    """The methods that there are, by name."""


def open_rows(experiment: Experiment, conditions: Conditions, path: Path | None) -> RowFile:
    """Open the results file of an experiment.

    Raises:
        K1Error: if it holds results of another one, or of methods that were other ones.
    """
    head = {
        "kind": "experiment",
        "settings": experiment.settings(),
        "config": experiment.config("builtin").to_dict(),  # which text, its digest tells
        "data": conditions.data.fingerprint,
        "pool": conditions.pool,
        "device": conditions.device,
    }
    file = RowFile(path, head, KEY)
    check_methods(file, conditions.methods)
    return file


def check_methods(file: RowFile, known: Mapping[str, Method] = METHODS) -> None:
    """See that a file's rows are of methods as they are defined now.

    Raises:
        K1Error: if not.
    """
    names = [row["method"] for row in file.rows.values()]
    now = {method.name: identity(method) for method in choose_methods(names, known)}
    for row in file.rows.values():
        if now.get(row["method"]) != row["identity"]:
            raise K1Error(
                f"{file.path} holds runs of a {row['method']} that is defined otherwise now: name "
                "another file"
            )


def identity(method: Method) -> str:
    """Digest of what a method is told to do, which its code's changes do not show in."""
    told = {
        name: value
        for name, value in vars(method).items()
        if name not in ("name", "what", "strengths", "learner")
    }
    text = canonical_json({**told, "learner": method.learner.__name__})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_experiment(experiment: Experiment, conditions: Conditions, file: RowFile) -> list[Row]:
    """Make all runs that are not in the file yet, as long as there is time.

    Returns:
        The rows of the experiment that there are, in its order.

    Raises:
        K1Error: for unknown methods or orders, text too short, or a file that cannot be written.
    """
    config = experiment.config(conditions.source)
    orders = orders_of(stream_domains(conditions.data), experiment.orders)
    store = TokenStore(conditions.data, config.model.context, conditions.device)
    seen = views(store, conditions.pool, config.train.eval_windows, experiment.passage)
    planned: list[Run] = []
    with file.lock():
        for method in choose_methods(experiment.methods, conditions.methods):
            runs = experiment.runs(method, orders)
            if conditions.chosen is not None:
                setting = conditions.chosen[method.name]
                runs = [run for run in runs if setting == (run.lr, run.strength)]
                if not runs:
                    raise K1Error(
                        f"{method.name} was best at a strength of {setting[1]:g}, which is none of "
                        "its strengths: tune it again"
                    )
            planned += runs
            missing = [run for run in runs if file.key(as_row(run)) not in file.rows]
            for first in range(0, len(missing), conditions.lanes):
                group = missing[first : first + conditions.lanes]
                vocab_size, device = conditions.data.vocab_size, conditions.device
                make = partial(method.learner, method, config, store, vocab_size, group, device)
                try:  # a learner that has no name here is gone before the next one is made
                    rows = go_through(make(**method.options), experiment, seen, conditions.deadline)
                except OutOfTime:
                    conditions.say(f"{method.name}: out of time")
                    break
                for row in rows:
                    file.add({**row, "identity": identity(method)})
                conditions.say(f"{method.name}: {len(rows)} runs, {rows[0]['seconds']:.0f} s")
    keys = [file.key(as_row(run)) for run in planned]
    return [file.rows[key] for key in keys if key in file.rows]


def as_row(run: Run) -> Row:
    """The part of a row that tells which run it is of."""
    return {
        "method": run.method,
        "order": list(run.order),
        "seed": run.seed,
        "lr": run.lr,
        "strength": run.strength,
    }


def budget(learner: Learner, experiment: Experiment) -> float:
    """Operations that a dense run of the starting tree uses in a phase."""
    model = learner.base.model
    tree = Topology.full(model.branching, model.level_capacity, model.max_children)
    config = learner.base.replace(update={"mode": "dense"})
    return experiment.steps * step_flops(config, learner.arena.vocab_size, len(tree.blocks), 0)


def phase_steps(learner: Learner, experiment: Experiment) -> int:
    """Steps of a learner's present phase."""
    if not experiment.equal_flops:
        return experiment.steps
    most = learner.longest * experiment.steps
    return max(1, round(min(budget(learner, experiment) / learner.step_flops(), most)))


def go_through(
    learner: Learner, experiment: Experiment, seen: Views, deadline: float = math.inf
) -> list[Row]:
    """Take a method's runs through their streams; returns a row for each.

    Raises:
        OutOfTime: if the time is used up before they are done.
    """
    measure_memory_anew(learner.arena.device)
    began, lanes, phases = time.monotonic(), range(learner.lanes), len(learner.runs[0].order)
    matrix: dict[str, list[list[list[float]]]] = {view: [] for view in VIEWS}
    curve: list[tuple[int, list[list[float]]]] = []
    steps: list[int] = []
    for phase in range(phases):
        learner.begin(phase)
        if phase == 0:
            for view in VIEWS:
                matrix[view].append(learner.measure(seen, view))
        total = phase_steps(learner, experiment)
        done = 0
        for share in (*experiment.checks, 1.0):
            goal = max(done + 1, round(share * total))
            if goal > total:
                continue
            advance(learner, done, goal, total, deadline)
            done = goal
            if done < total:
                curve.append((phase, learner.measure(seen, "windows")))
        learner.end()
        for view in VIEWS:
            matrix[view].append(learner.measure(seen, view))
        curve.append((phase, matrix["windows"][-1]))
        steps.append(total)
    seconds = time.monotonic() - began
    a, memory = learner.arena, peak_memory(learner.arena.device)
    return [
        {
            **as_row(learner.runs[lane]),
            "bits": {v: [_plain(m[lane]) for m in matrix[v]] for v in VIEWS},
            "curve": [[phase, _plain(bits[lane])] for phase, bits in curve],
            "steps": steps,
            "flops": learner.flops[lane],
            "parameters": learner.parameters(lane),
            "blocks": len(a.trees[lane].blocks),
            "moved": learner.moved[lane],
            "skipped": int(a["skipped"][lane]),
            "seconds": seconds,
            "memory": memory,
            "lanes": learner.lanes,
            "made_on": made_on(learner.arena.device),
            **learner.remarks(lane),
        }
        for lane in lanes
    ]


def made_on(device: torch.device) -> str:
    """Name what a run was made with."""
    cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})"
    return f"{processor}, PyTorch {torch.__version__}"


def measure_memory_anew(device: torch.device) -> None:
    """Forget the peak of a device's memory; what is held now counts in the next one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors have held on a device; None on a CPU, where nobody counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


STRETCH = 50
"""Steps between looks at the clock."""


def advance(learner: Learner, done: int, goal: int, total: int, deadline: float) -> None:
    """Train from one step to another, with looks at the clock.

    Raises:
        OutOfTime: if the time is used up.
    """
    while done < goal:
        if time.monotonic() > deadline:
            raise OutOfTime
        count = min(STRETCH, goal - done)
        learner.train(done, count, total)
        done += count


def _plain(values: Sequence[float]) -> list[Any]:
    """Figures that JSON can hold: None for one that is not finite."""
    return [value if math.isfinite(value) else None for value in values]
