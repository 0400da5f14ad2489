"""The doctor: what it tells is so, through the real entry point."""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest
import torch

from k1.config import Config
from k1.data import TextData
from k1.trainer import Trainer
from k1env.env import Phase2Env
from policies import doctor
from tests.phase2_helpers import ROOT, call

DOCTOR = ROOT / "scripts" / "doctor.py"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    done = call(DOCTOR, "--preset", "tiny", "--device", "cpu", "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_tells_versions_and_settings(table: dict[str, Any]) -> None:
    assert table["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        table["versions"]["torch"] == torch.__version__
    )
    assert table["versions"]["python"] == platform.python_version()
    assert {"k1", "gymnasium", "stable-baselines3", "triton"} <= table["versions"].keys()
    assert (table["device"], table["why"]) == ("cpu", "asked for")
    assert table["threads"]["torch"] == 1
    assert table["determinism"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_its_sizes_are_those_of_a_run(table: dict[str, Any], data: TextData) -> None:
    config = Config.preset("tiny")
    trainer, sizes = Trainer(config, data), table["estimate"]
    parameters = sum(piece.numel() for piece in trainer.state_dict().values())
    assert (sizes["blocks"], sizes["parameters"]) == (7, parameters)
    lane = sum(t.nbytes for t in trainer.arena.read_lane(0).tensors.values())
    # Shares of the stream are by domain: the text here has more of them than the doctor's.
    assert sizes["lane_bytes"] == lane - 4 * (len(data.domains) - 1)
    assert sizes["lanes"] == Phase2Env("tiny", data=data).session.arena.lanes
    assert 0 < sizes["step_seconds"] < 10
    assert sizes["run_seconds"] > 4000 * sizes["step_seconds"]


def test_the_text_holds_it_all(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.Installation(**{n: v for n, v in table.items() if n != "estimate"})
    text = doctor.as_text(found, doctor.Estimate(**table["estimate"]))
    assert all(f"{name} " in text and version in text for name, version in found.versions.items())
    assert f"{table['estimate']['parameters']:,}" in text and "preset tiny" in text
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_missing_comes_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = ["torch>=2", 'absent-a>1; extra == "viz"', 'absent-b; extra == "dev" and x == "y"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: needs)
    found = doctor.examine("cpu", "tiny")
    assert found.missing == {"viz": ["absent-a"], "dev": ["absent-b"]}
    assert found.remedies == ['pip install -e ".[viz]"', 'pip install -e ".[dev]"']
    text = doctor.as_text(found, doctor.Estimate("tiny", 1, 1, 1, 1, 1.0, 9000.0))
    assert 'absent-a: pip install -e ".[viz]"' in text and "about 2.5 h" in text


def test_a_mistake_is_one_line() -> None:
    done = call(DOCTOR, "--preset", "huge")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown preset 'huge'")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_checkout_that_was_never_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "k1-that-nobody-installed")
    found = doctor.examine("cpu", "tiny")
    assert found.missing == {"": ["k1-that-nobody-installed"]}
    assert found.remedies == ["pip install -e ."]
    assert found.versions["k1-that-nobody-installed"] == doctor.NOT_INSTALLED
