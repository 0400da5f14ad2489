"""Look at the installation, and tell what a preset takes: text to paste into a report of a bug.

python scripts/doctor.py --preset cpu
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from k1.cli import run


@dataclass(frozen=True)
class Arguments:
    """Look at the installation, and tell what a preset takes, to paste into a report of a bug."""

    preset: str = "cpu"
    """Sizes to look at: tiny, cpu, small, gpu or paper."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print JSON."""


def main(arguments: Arguments) -> int:
    """Examine, estimate, print."""
    from policies.doctor import as_table, as_text, estimate, examine

    found = examine(arguments.device, arguments.preset)
    taken = estimate(arguments.preset, arguments.device)
    print(json.dumps(as_table(found, taken), indent=2) if arguments.json else as_text(found, taken))
    return 0


if __name__ == "__main__":
    run(Arguments, main)
