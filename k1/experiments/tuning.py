"""Settings chosen on validation, for a final run on the test pool."""

from __future__ import annotations

from pathlib import Path

from k1.experiments.page import check_sweep, read_results
from k1.experiments.plans import Experiment
from k1.experiments.report import Setting, best_settings


def read_tuned(path: Path, experiment: Experiment, data: str) -> dict[str, Setting]:
    """Return the best setting of each method of an experiment, by results on validation.

    Args:
        path: the results.
        experiment: what is to be run.
        data: fingerprint of its text.

    Raises:
        K1Error: if the file holds none, is of another experiment or text, or lacks a method.
    """
    sweep = read_results(path)
    check_sweep(sweep, {"settings": experiment.settings(), "data": data}, experiment.methods)
    found = best_settings(sweep.rows)
    return {name: found[name] for name in experiment.methods}
