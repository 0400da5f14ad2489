"""What the agents of a run are there for, or where each part of a text goes, and why.

python scripts/explain.py RUN --text FILE
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Explain a run's system: its agents, or what it makes of a text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of run_phase2.py or train_phase1.py, or a checkpoint of the latter."""
    text: Annotated[Path | None, optional("FILE")] = None
    """Explain this text, documents apart by a blank line (default: study the agents on the
    validation pool, which takes a minute or so)."""
    data: Annotated[str | None, optional("SOURCE")] = None
    """The text that the run was made on, where it has moved since."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print JSON."""


def main(arguments: Arguments) -> int:
    """Load the system, look at it, print what was found."""
    from rich.console import Console, RenderableType

    text = None if arguments.text is None else _read(arguments.text)

    from k1.cli import prepare_torch
    from k1.trainer import pick_device
    from k1env.runner import load_system

    device = pick_device(arguments.device).type
    prepare_torch(device)

    from k1.specialisation.agents import WINDOWS, Study, study
    from k1.specialisation.explain import Explanation, explain
    from k1.specialisation.show import show_explanation, show_study

    trainer = load_system(arguments.run, device, arguments.data)
    tokenizer = trainer.data.tokenizer
    found: Study | Explanation
    shown: RenderableType
    if text is None:
        domains = trainer.data.domains
        windows = {d: trainer.store.spread("validation", d, WINDOWS) for d in domains}
        found = study(trainer.engine, trainer.lane, windows, tokenizer)
        shown = show_study(found)
    else:
        found = explain(trainer.engine, trainer.lane, tokenizer, text)
        shown = show_explanation(found)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0
    Console(emoji=False).print(shown)
    return 0


def _read(path: Path) -> str:
    """Read a text.

    Raises:
        DataError: if it cannot be read.
    """
    from k1.errors import DataError

    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; name a text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from error


if __name__ == "__main__":
    run(Arguments, main)
