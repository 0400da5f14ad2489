"""What the tests of Phase 2 share: small settings, a small text, sessions and run folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from k1.config import Config
from k1env.boundary import Boundary, Bounds, Request, hard_limits
from k1env.env import Phase2Env
from k1env.gate import GateConfig
from k1env.outcome import MemoryLedger
from k1env.run_folder import RunFolder
from k1env.session import Session
from k1env.settings import Settings
from tests.conftest import DOMAINS, markov_documents

ROOT = Path(__file__).parent.parent
RUN, REPLAY, PHASE_1, PPO, MEASURE, EVALUATE, GRID, EXPLAIN, SPECIALISTS = (
    ROOT / "scripts" / f"{name}.py"
    for name in (
        "run_phase2",
        "replay",
        "train_phase1",
        "train_ppo",
        "measure",
        "evaluate",
        "grid_search",
        "explain",
        "specialists",
    )
)
QUICK_GATE = GateConfig(horizon=2, anneal=2, windows=4)


def quick(gate: dict[str, Any] | None = None, **fields: Any) -> Settings:
    """The tiny preset with hardly any training; `gate` and `fields` change what they name."""
    system = Config.preset("tiny").replace(train={"eval_windows": 2})
    start: dict[str, Any] = {
        "system": system,
        "gate": replace(QUICK_GATE, **(gate or {})),
        "phase1_steps": 4,
        "interval": 2,
    }
    return replace(Settings.preset("tiny"), **{**start, **fields})


def smallest(gate: dict[str, Any] | None = None, **fields: Any) -> Settings:
    """The smallest system, decisions and trials that there are: some 20 ms a step, 100 ms a trial.

    Its action table is that of `quick`.
    """
    gate = {"seeds": 2, "horizon": 1, "anneal": 1, "windows": 1, **(gate or {})}
    start = {"phase1_steps": 2, "interval": 1, "phase_decisions": 4, "max_decisions": 100}
    made = quick(gate, **{**start, **fields})
    system = made.system.replace(
        model={"embed": 8, "feed_forward": 8, "context": 8},
        evidence={"buckets": 64, "context_buckets": 16, "window": 4},
        train={"eval_windows": 1, "batch": 2},
    )
    return replace(made, system=system)


def write_text(folder: Path, size: int = 6_000) -> Path:
    """Write three domains; whole runs on them through the command lines stay quick."""
    for number, domain in enumerate(DOMAINS):
        (folder / domain).mkdir(parents=True)
        for seed, split in enumerate(("train", "validation", "test")):
            text = markov_documents(number, seed, 2 * size if split == "train" else size)
            (folder / domain / f"{split}.txt").write_text(text)
    return folder


def index_of(where: Session | Phase2Env, label: str) -> int:
    """Number of the action with a label."""
    table = where.session.table if isinstance(where, Phase2Env) else where.table
    return next(action.index for action in table if action.label == label)


def kinds(session: Session) -> list[str]:
    """Kinds of the entries in a session's ledger in memory."""
    assert isinstance(session.ledger, MemoryLedger)
    return [kind for kind, _ in session.ledger.entries]


def entry(session: Session, kind: str, number: int = -1) -> dict[str, Any]:
    """Data of one entry of a kind."""
    assert isinstance(session.ledger, MemoryLedger)
    return [data for name, data in session.ledger.entries if name == kind][number]


def boundary_at(stage: int, capacity: int = 60, **bounds: Any) -> Boundary:
    """A boundary as it is when a stage opens after successes that widened nothing."""
    made = Boundary(hard_limits(capacity))
    tune = Request(_noop(), None, 12)
    while made.stage < stage:
        made.record(True, tune, 0)
    if bounds:
        made.bounds = Bounds.from_dict({**made.to_dict()["bounds"], **bounds})
    return made


def _noop() -> Any:
    from k1env.actions import action_table

    return action_table(Config.preset("tiny").model)[0]


# -- the gate ------------------------------------------------------------------------------------


def seen_windows(base: Session, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[int, list]]:
    """Record the windows that each lane draws, by pool. Training asks lane range by lane range."""
    record: dict[str, dict[int, list]] = {"train": {}, "gate": {}}
    engine, original = base.engine, base.engine.store.sample
    step = engine.step
    here: dict[int, tuple[int, int]] = {}

    def sample(pool: str, *rest: Any) -> Any:
        batch = original(pool, *rest)
        first = here.get(threading.get_ident(), (0, 0))[0] if pool == "train" else 0
        for i in range(batch.inputs.shape[0]):
            rows = record[pool].setdefault(first + i, [])
            rows.append(batch.inputs[i].numpy().tobytes())
        return batch

    def spy(start: int, stop: int, *rest: Any) -> Any:
        here[threading.get_ident()] = (start, stop)
        return step(start, stop, *rest)

    monkeypatch.setattr(engine.store, "sample", sample)
    monkeypatch.setattr(engine, "step", spy)
    return record


def fake(base: Session, monkeypatch: pytest.MonkeyPatch, **by_arm: list[float]) -> list[int]:
    """Replace the losses: a list for each arm, in the order of lanes. Returns the groups' sizes."""
    arms = list(by_arm)
    sizes: list[int] = []

    def losses(start: int, stop: int, batch: Any) -> torch.Tensor:
        size, done = (stop - start) // len(arms), sum(sizes)
        sizes.append(size)
        values = [by_arm[arm][done : done + size] for arm in arms]
        return torch.tensor(values, dtype=torch.float64).flatten()

    monkeypatch.setattr(base.engine, "bits_per_byte", losses)
    monkeypatch.setattr(base.engine, "train", lambda *_: None)
    return sizes


# -- command lines -------------------------------------------------------------------------------


def command(script: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(script), *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def call(
    script: Path, *arguments: object, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    return subprocess.run(
        command(script, *arguments),
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env=environment(**more),
        timeout=240,
    )


def prepare_run(
    path: Path, data: Path, *, policy: str = "heuristic", seed: int = 0, **fields: Any
) -> RunFolder:
    """Make the folder of a run with quick settings; `run_phase2.py --resume` then starts it."""
    arguments = {
        "policy": policy, "data": str(data), "preset": "tiny", "seed": seed, "device": "cpu",
        "start": None,
    }  # fmt: skip
    settings = quick(**{"phase_decisions": 3, "max_decisions": 8, **fields})
    config = {"arguments": arguments, "settings": settings.to_dict(), "device": "cpu"}
    return RunFolder.create(path, config, command(RUN))


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what depends on the clock."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def summary_of(path: Path) -> dict[str, Any]:
    """The results of a run, without the digest that seals them."""
    summary: dict[str, Any] = json.loads((path / "summary.json").read_text())
    del summary["digest"]
    return summary
