"""What came of a decision, and what logs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from k1.config import read_dataclass
from k1env.gate import TrialResult


class LedgerLike(Protocol):
    """Whatever takes entries: a run folder's ledger or a list in memory."""

    def append(self, kind: str, /, **data: Any) -> Any:
        """Log one entry."""


class MemoryLedger:
    """A ledger that is not kept."""

    def __init__(self) -> None:
        """Start empty."""
        self.entries: list[tuple[str, dict[str, Any]]] = []

    def append(self, kind: str, /, **data: Any) -> None:
        """Log one entry."""
        self.entries.append((kind, data))


class Unlogged:
    """A ledger for those who need none: nothing is kept, and no state is hashed for it."""

    def append(self, kind: str, /, **data: Any) -> None:
        """Forget an entry."""


UNLOGGED = Unlogged()


@dataclass
class Outcome:
    """What came of one decision."""

    decision: int
    action: int
    kind: str
    name: str
    stage: int
    """Stage in which it was decided."""
    permitted: bool = False
    rule: str = ""
    impossible: str | None = None
    trial: TrialResult | None = None
    applied: bool = False
    credited: bool = False
    verdict: str = ""
    """One line for people."""
    promoted: bool = False
    rolled_back: bool = False
    spent: int = 0
    """Lane steps."""
    fall: float = 0.0
    """Fall of the mean bits per byte over the domains seen."""
    stopped: bool = False
    stop_reason: str | None = None
    stop_criteria: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether a forbidden action was tried and not allowed."""
        return self.trial is not None and not self.applied

    @property
    def outweighs_harm(self) -> bool:
        """Whether what was accepted gains more over the system than over its shadow.

        Then the controller's changes were harmful. After a stop nothing is left to repair.
        """
        if self.trial is None or not self.trial.accepted or self.stopped:
            return False
        control, shadow = self.trial.control, self.trial.shadow
        return control is not None and shadow is not None and control.mean > shadow.mean

    @property
    def word(self) -> str:
        """The verdict without what a trial measured: all that a controller is told."""
        if self.impossible is not None:
            return "impossible"
        if self.trial is None:
            return "permitted"
        if not self.applied:
            return "refused"
        return "credited" if self.credited else "allowed"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Outcome:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            ConfigError: if it is no outcome.
        """
        return read_dataclass(cls, data, "outcome", whole=True)
