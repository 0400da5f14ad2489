"""Settings chosen on validation, for a final run on the test pool."""

from __future__ import annotations

import json
from pathlib import Path

from k1.errors import K1Error
from k1.experiments.page import read_results
from k1.experiments.plans import Experiment
from k1.experiments.report import Setting, best_settings


def read_tuned(path: Path, experiment: Experiment) -> dict[str, Setting]:
    """Return the best setting of each method of an experiment, by results on validation.

    Raises:
        K1Error: if the file holds none, is of another experiment, or lacks a method.
    """
    results = read_results(path)
    pool, settings = results.head["pool"], results.head["settings"]
    if pool != "validation":
        raise K1Error(f"{path} was measured on {pool}: tune on validation")
    if settings != json.loads(json.dumps(experiment.settings())):
        raise K1Error(f"{path} is of an experiment with other settings: name another file")
    found = best_settings(results.rows)
    missing = [name for name in experiment.methods if name not in found]
    if missing:
        raise K1Error(f"{path} has no runs of {', '.join(missing)}: tune them, or leave them out")
    return {name: found[name] for name in experiment.methods}
