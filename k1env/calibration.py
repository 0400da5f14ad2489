"""The gate tried on K-1 itself: trials of changes whose worth is known, many side by side.

Trials start from **cells**: systems of one domain, early or late in training. Each trial is the
gate's own (`k1env.gate`), only that it runs all its seeds and scores its twins on the sealed test
pool too, so that one record says what the gate and any other rule would have decided, with any
margin and after any number of seeds. Cheats of a trial:

* `nothing` changes nothing: differences have to be exactly 0;
* `rounding` changes every weight by about a millionth of itself;
* `luck` changes nothing either, but its twins meet other batches of the same text than the
  control's do: differences are pure noise;
* `lr x2` and the like multiply the learning rate: they help or harm, by as much as all trials of
  the same cell show together.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from k1.data import TextData
from k1.engine import Engine
from k1.errors import K1Error
from k1.rng import derive_seed, mix
from k1.row_file import RowFile
from k1.trainer import Trainer
from k1env.gate import CHEAT, Change, Gate, GateConfig, differences
from k1env.schedule import Evaluate, Scheduler, Score, Separate, Task, Train
from k1env.settings import Settings
from k1env.wide import Wide, work_room

FORMAT = 1
NAMES = ("cheat", "domain", "age", "number", "horizon", "anneal")
EARLY, LATE = "early", "late"
NOTHING, ROUNDING, LUCK = "nothing", "rounding", "luck"
FACTORS = (0.5, 1.1, 1.25, 1.5, 2.0, 4.0)
"""By which the learning rate is multiplied; the gains come out as they do."""
LATE_AT = 10
"""The late system has trained so many times as long as the early one."""
ROUNDING_SIZE = 1e-6
TEST_WINDOWS = 2
"""Windows of the test pool, as a multiple of the gate's."""
LONG = 8
"""The longest horizon tried, as a multiple of the gate's."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is tried, and how often."""

    settings: Settings
    data: TextData
    device: torch.device
    trials: int
    """Trials with `luck`, over all cells; the other parts follow from it."""
    seed: int = 0
    at_once: int = 2
    """Trials side by side."""

    def __post_init__(self) -> None:
        """Refuse what cannot be tried."""
        if self.trials < 1 or self.at_once < 1:
            raise K1Error("--trials and --at-once are 1 or more")

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Domain and age of each system that trials start from."""
        return [(domain, age) for domain in self.data.domains for age in (EARLY, LATE)]

    def head(self) -> dict[str, Any]:
        """What has to be the same for records to go together."""
        return {
            "format": FORMAT,
            "settings": self.settings.to_dict(),
            "data": self.data.fingerprint,
            "seed": self.seed,
            "device": self.device.type,
        }


@dataclass(frozen=True)
class Trial:
    """One trial of a plan."""

    cheat: str
    domain: str
    age: str
    number: int
    """Among the trials of the same cheat, cell and length."""
    horizon: int
    anneal: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What its record is found by."""
        return tuple(getattr(self, name) for name in NAMES)


def lengths(gate: GateConfig) -> list[tuple[int, int]]:
    """Horizons and annealing times that are compared, the gate's own left out."""
    h, a = gate.horizon, gate.anneal
    wanted = [(h, 1), (max(1, h // 2), a), (h, 2 * a), (2 * h, a), (LONG * h, a)]
    return [pair for pair in dict.fromkeys(wanted) if pair != (h, a)]


def lr_cheat(factor: float) -> str:
    """Name the cheat that multiplies the learning rate."""
    return f"lr x{factor:g}"


def plan_trials(plan: Plan) -> list[Trial]:
    """All trials of a plan, ordered so that every part is as far as the others at any time."""
    own = plan.settings.gate.horizon, plan.settings.gate.anneal
    parts: list[tuple[str, tuple[int, int], float]] = [(LUCK, own, 1.0)]
    parts += [(ROUNDING, own, 0.25), (NOTHING, own, 0.125)]
    parts += [(lr_cheat(factor), own, 0.25) for factor in FACTORS]
    parts += [(lr_cheat(f), pair, 0.05) for pair in lengths(plan.settings.gate) for f in (0.5, 2.0)]
    ordered = []
    for cheat, (horizon, anneal), share in parts:
        count = math.ceil(plan.trials * share / len(plan.cells))
        for number in range(count):
            ordered += [
                ((number + 0.5) / count, Trial(cheat, *cell, number, horizon, anneal))
                for cell in plan.cells
            ]
    return [trial for _, trial in sorted(ordered, key=lambda pair: pair[0])]


class OtherLuck(Gate):
    """A gate whose cheats meet other batches than the controls do: noise without an effect."""

    def _stream_digests(self, arms: dict[str, int], size: int) -> list[str]:
        digests = super()._stream_digests(arms, size)
        row = self.engine.arena["data_seed"][arms[CHEAT] : arms[CHEAT] + size]
        row.copy_(mix(row))
        return digests


class Calibration:
    """The systems that trials start from, in the first lanes of an arena, and room for trials."""

    def __init__(self, plan: Plan, wide: bool | None = None) -> None:
        """Lay out the arena; nothing is trained yet.

        Args:
            plan: what is to be tried.
            wide: whether many lanes go through the engine as one batch, by default on a GPU.
        """
        self.plan, self.cells = plan, plan.cells
        settings, wide = plan.settings, plan.device.type != "cpu" if wide is None else wide
        self.size = 2 * settings.gate.seeds
        first = len(self.cells)
        lanes = first + plan.at_once * self.size
        area = work_room(lanes) if wide else 0
        trainer = Trainer(settings.system, plan.data, device=plan.device, lanes=lanes + area)
        if wide:
            trainer.arena.roomy = True
            trainer.engine = Engine(trainer.arena, trainer.store, lane_chunk=area)
        self.trainer, self.arena, self.engine = trainer, trainer.arena, trainer.engine
        calls = Wide(self.engine, first, lanes) if wide else Separate(self.engine)
        self.scheduler = Scheduler(calls, range(lanes, lanes))
        self.places = [first + i * self.size for i in range(plan.at_once)]
        self.before: dict[tuple[str, str], float] = {}
        """Validation loss of each cell's system."""
        self.states: dict[tuple[str, str], str] = {}

    def prepare(self) -> None:
        """Train the systems.

        Raises:
            K1Error: if the loss of one is not finite.
        """
        domains = self.plan.data.domains
        self.scheduler.run([self._grow(domain, 2 * i) for i, domain in enumerate(domains)])
        for lane, cell in enumerate(self.cells):
            if not math.isfinite(self.before[cell]):
                raise K1Error(f"the loss of {' '.join(cell)} is not finite: lower the rates")
            self.states[cell] = self.arena.hash_lane(lane)[:16]

    def _grow(self, domain: str, lane: int) -> Task[None]:
        """Train the early system of a domain in one lane, and go on to the late one in the next."""
        settings, own = self.plan.settings, self.trainer.at(lane + 1)
        self.arena.reset_lane(own.lane, derive_seed("calibration", self.plan.seed, domain))
        own.set_mix({domain: 1.0})
        self.arena.set_hyper(own.lane, "lr", settings.phase1_lr)
        yield Train((own.lane,), settings.phase1_steps, mode=settings.phase1_mode)
        self.arena.set_hyper(own.lane, "lr", settings.system.train.lr)
        self.arena.copy_lane(own.lane, lane)
        yield Train((own.lane,), (LATE_AT - 1) * settings.phase1_steps)
        for number, age in enumerate((EARLY, LATE)):
            bits = yield Evaluate(lane + number, "validation", (domain,))
            self.before[domain, age] = bits[domain]

    def attempt(self, trial: Trial, first: int) -> Task[dict[str, Any]]:
        """Make one trial in lanes `first`, ...; returns its record."""
        cell, arena, engine = (trial.domain, trial.age), self.arena, self.engine
        settings, size = self.plan.settings, self.size
        full = replace(
            settings.gate, early=settings.gate.seeds, horizon=trial.horizon, anneal=trial.anneal
        )
        gate = (OtherLuck if trial.cheat == LUCK else Gate)(engine, first, full)
        seed = derive_seed("calibration", self.plan.seed, *trial.key)
        shares = [float(domain == trial.domain) for domain in self.plan.data.domains]
        price = full.compute_price
        result = yield from gate.trial(
            self.cells.index(cell),
            None,
            self._change(trial.cheat, seed),
            seed=seed,
            mix=shares,
            price=lambda lane: price,
            own_stream=False,
        )
        half = size // 2
        seeds = [derive_seed("sealed", seed, i) for i in range(half)]
        batch = engine.store.sample(
            "test",
            torch.tensor(seeds, device=arena.device),
            torch.zeros(half, dtype=torch.int64, device=arena.device),
            torch.tensor(shares, device=arena.device).expand(half, -1),
            TEST_WINDOWS * full.windows,
        )
        both = batch.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)))
        bits = yield Score(first, first + size, both)
        loss = [x + price for x in bits]
        test = differences(loss[:half], loss[half:])
        arena.write_lane(first, gate.adopted[CHEAT])
        after = yield Evaluate(first, "validation", (trial.domain,))
        assert result.control is not None
        return {
            **dict(zip(NAMES, trial.key, strict=True)),
            "state": self.states[cell],
            "gains": list(result.control.differences),
            "test": test if all(map(math.isfinite, test)) else [],
            "fell": after[trial.domain] < self.before[cell],
            "lane_steps": result.lane_steps,
        }

    def _change(self, cheat: str, seed: int) -> Change:
        arena = self.arena
        if cheat in (NOTHING, LUCK):
            return lambda lane: None
        if cheat == ROUNDING:
            generator = torch.Generator().manual_seed(seed)
            factors = {
                name: 1 + ROUNDING_SIZE * torch.randn(arena[name].shape[1:], generator=generator)
                for name in ("weight", "shared")
            }
            factors = {name: factor.to(arena.device) for name, factor in factors.items()}

            def jitter(lane: int) -> None:
                for name, factor in factors.items():
                    arena[name][lane] *= factor

            return jitter
        factor = float(cheat.removeprefix("lr x"))
        rate = self.plan.settings.system.train.lr * factor
        return lambda lane: arena.set_hyper(lane, "lr", rate)


@dataclass(frozen=True)
class Calibrated:
    """What a calibration came to."""

    rows: list[dict[str, Any]]
    """Records of finished trials of the plan, in the plan's order."""
    planned: int
    made: int
    """Trials that this call finished."""
    seconds: float
    head: dict[str, Any]


def calibrate(
    plan: Plan,
    records: Path | None = None,
    *,
    max_seconds: float = math.inf,
    progress: Progress = lambda done, planned: None,
) -> Calibrated:
    """Make all trials of a plan that are not recorded yet.

    Raises:
        K1Error: for records that are about something else, or a plan that cannot be carried out.
    """
    began = time.monotonic()
    head = plan.head()
    kept = RowFile(records, head, NAMES)
    planned = plan_trials(plan)
    queue = deque(trial for trial in planned if trial.key not in kept.rows)
    before, left = len(kept.rows), len(queue)

    def expired() -> bool:
        return time.monotonic() - began >= max_seconds

    def work(calibration: Calibration, first: int) -> Task[None]:
        while queue and not expired():
            trial = queue.popleft()
            kept.add((yield from calibration.attempt(trial, first)))
            progress(len(planned) - left + len(kept.rows) - before, len(planned))

    if queue and not expired():
        calibration = Calibration(plan)
        calibration.prepare()
        _check_states(kept, calibration.states)
        calibration.scheduler.run([work(calibration, first) for first in calibration.places])
    rows = [kept.rows[trial.key] for trial in planned if trial.key in kept.rows]
    seconds = time.monotonic() - began
    return Calibrated(rows, len(planned), len(kept.rows) - before, seconds, head)


def _check_states(kept: RowFile, states: Mapping[tuple[str, str], str]) -> None:
    """See that records start from the systems that are there now.

    Raises:
        K1Error: if not.
    """
    for row in kept.rows.values():
        if row.get("state") != states.get((row["domain"], row["age"])):
            raise K1Error(
                f"{kept.path} holds trials of other systems than this code and machine train: name "
                "another file"
            )


def select(rows: list[dict[str, Any]], **wanted: Any) -> Iterator[dict[str, Any]]:
    """Those of some records whose fields are as wanted."""
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            yield row
