"""Verify a run: its ledger's hash chain, and that its decisions give the same states again.

python scripts/replay.py RUN
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from k1.cli import run


@dataclass(frozen=True)
class Arguments:
    """Verify a run: its ledger's hash chain, and that its decisions give the same states again."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    verify_only: bool = False
    """Check the hash chain alone, without training anything."""


def main(arguments: Arguments) -> int:
    """Verify the chain, then carry the run out again."""
    from k1.errors import LedgerError
    from k1env.ledger import read_ledger
    from k1env.run_folder import RunFolder

    folder = RunFolder.open(arguments.run)
    entries = read_ledger(folder.ledger_path)
    if folder.finished:
        head = folder.summary.get("ledger_head")
        if not entries or entries[-1].hash != head:
            raise LedgerError(f"{folder.ledger_path} does not end as summary.json says: it was cut")
    print(f"chain: {len(entries)} entries, every hash fits")
    if arguments.verify_only:
        return 0

    from k1.cli import prepare_torch
    from k1.trainer import pick_device
    from k1env.replay import replay
    from k1env.runner import RunArguments, open_env

    device = pick_device(str(folder.config.get("device"))).type
    prepare_torch(device)
    session = open_env(folder, device).session
    session.rebind(RunArguments.of(folder).seed)

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rdecision {done + 1}/{total} ", end="", file=sys.stderr, flush=True)

    result = replay(session, folder.ledger_path, show)
    logged = [e.data["state_hash"] for e in entries if "state_hash" in e.data][-1]
    if result.state_hash != logged:
        raise LedgerError(f"the replay ends in {result.state_hash}, the run ended in {logged}")
    print(f"replay: {result.decisions} decisions give the same state hash {logged[:16]}...")
    return 0


if __name__ == "__main__":
    run(Arguments, main)
