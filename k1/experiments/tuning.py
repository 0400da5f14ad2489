"""Settings chosen on validation, for a final run on the test pool."""

from __future__ import annotations

import json
from pathlib import Path

from k1.errors import K1Error
from k1.experiments.plans import Experiment
from k1.experiments.report import Setting, best_settings
from k1.experiments.runner import KEY
from k1.row_file import RowFile


def read_tuned(path: Path, experiment: Experiment) -> dict[str, Setting]:
    """Return the best setting of each method of an experiment, by results on validation.

    Raises:
        K1Error: if the file holds none, is of another experiment, or lacks a method.
    """
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
        del head["format"]
        pool, settings = head["pool"], head["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise K1Error(f"{path} cannot be read as results ({error}): name another file") from None
    if pool != "validation":
        raise K1Error(f"{path} was measured on {pool}: tune on validation")
    if settings != json.loads(json.dumps(experiment.settings())):
        raise K1Error(f"{path} is of an experiment with other settings: name another file")
    found = best_settings(list(RowFile(path, head, KEY).rows.values()))
    missing = [name for name in experiment.methods if name not in found]
    if missing:
        raise K1Error(f"{path} has no runs of {', '.join(missing)}: tune them, or leave them out")
    return {name: found[name] for name in experiment.methods}
