"""Replaying a run: its ledger's actions are carried out again and must give the same entries."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k1.errors import LedgerError
from k1env.ledger import GENESIS, Ledger, read_ledger
from k1env.session import Session


@dataclass(frozen=True)
class ReplayResult:
    """What a replay found."""

    entries: int
    decisions: int
    state_hash: str
    """Hash of the system at the end, as logged and as computed again."""


def replay(
    session: Session, ledger_path: Path, progress: Callable[[int, int], None] | None = None
) -> ReplayResult:
    """Carry out a ledger's decisions again and compare every entry, state hashes included.

    Args:
        session: a fresh session of the run's settings, data, seed and device.
        ledger_path: the run's ledger; it is only read.
        progress: called with (decisions done, decisions).

    Raises:
        LedgerError: if the chain is broken or an entry is not reproduced.
    """
    entries = read_ledger(ledger_path)
    logged = [e.data.get("state_hash") for e in entries if e.kind in ("start", "outcome", "end")]
    if not logged:
        raise LedgerError(f"{ledger_path} has no finished decision yet: there is nothing to replay")
    finished = [e for e in entries if e.kind == "outcome"]
    intents = [e for e in entries if e.kind == "intent"][: len(finished)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "ledger.jsonl"
        shutil.copyfile(ledger_path, copy)
        session.ledger = Ledger.resume(copy, index=0, head=GENESIS)
        session.begin()
        for number, intent in enumerate(intents):
            if progress:
                progress(number, len(intents))
            session.act(intent.data["action"])
        more = [e for e in entries[session.ledger.index :] if e.kind != "intent"]
        if more:  # but an intent, whose decision a kill cut short
            raise LedgerError(
                f"entry {more[0].index} of {ledger_path} ({more[0].kind!r}) does not follow from "
                "the decisions before: treat the run as void from there on"
            )
    return ReplayResult(len(entries), len(intents), session.trainer.state_hash())
