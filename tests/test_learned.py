"""Controllers from folders of weights: loading, acting, and driving runs that resume and replay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k1.checkpoint import save_checkpoint
from k1.config import Config
from k1.errors import CheckpointError, K1Error
from k1env.actions import action_table
from k1env.observation import SYSTEM_FIELDS
from k1env.replay import replay
from k1env.run_folder import RunFolder
from k1env.runner import Runner, open_env
from policies import find_policy, learned, make_policy
from policies.learned import Controller, LearnedPolicy, load_controller, save_controller
from policies.network import ControllerNetwork, Layout, NetworkSizes
from tests.phase2_helpers import metrics_of, prepare_run, write_text

LABELS = [action.label for action in action_table(Config.preset("tiny").model)]
SIZES = NetworkSizes(slot=8, domain=4, whole=16, noop_bias=0.0, slot_bias=0.0)


def controller(seed: int = 0) -> Controller:
    """Untrained weights that do not prefer anything much."""
    torch.manual_seed(seed)
    network = ControllerNetwork(Layout.of(LABELS), SIZES)
    return Controller(SIZES, dict(network.state_dict()), {"seed": seed})


def scene(possible: list[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    widths = {
        "system": len(SYSTEM_FIELDS),
        "hyper": 6,
        "boundary": 10,
        "agents": 7 * 14,
        "domains": 12,
    }
    rows = {name: np.full(width, 0.5, np.float32) for name, width in widths.items()}
    return rows, {"action_mask": np.array([label in possible for label in LABELS], np.int8)}


def test_weights_come_back_as_they_went(tmp_path: Path) -> None:
    save_controller(tmp_path / "best", saved := controller())
    found = load_controller(tmp_path / "best")
    assert found.sizes == SIZES and found.about == {"seed": 0}
    assert found.weights.keys() == saved.weights.keys()
    assert all(torch.equal(found.weights[n], t) for n, t in saved.weights.items())


def test_the_folder_of_a_training_stands_for_its_best_weights(tmp_path: Path) -> None:
    inside = tmp_path / "checkpoints"
    save_controller(inside / "last", controller(1))
    assert load_controller(tmp_path).about == {"seed": 1}
    save_controller(inside / "best", controller(2))
    assert load_controller(tmp_path).about == {"seed": 2}
    assert load_controller(inside / "last").about == {"seed": 1}
    (inside / "best").rename(inside / ".best.old")  # a crash between two renames leaves this
    assert load_controller(tmp_path).about == {"seed": 2}


def torn(folder: Path) -> None:
    file = folder / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def foreign(folder: Path) -> None:
    shutil.rmtree(folder)
    save_checkpoint(folder, {}, {}, kind="phase2")


def of_another_table(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    shutil.rmtree(folder)
    state["actions"] = state["actions"][1:]
    save_checkpoint(folder, controller().weights, state, kind=learned.KIND)


def of_other_fields(folder: Path) -> None:
    shutil.rmtree(folder)
    save_checkpoint(folder, controller().weights, {"sizes": {}}, kind=learned.KIND)


def of_other_sizes(folder: Path) -> None:
    shutil.rmtree(folder)
    save_controller(folder, replace(controller(), sizes=NetworkSizes()))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (torn, "bytes instead of"),
        (foreign, "is a checkpoint of kind 'phase2'"),
        (of_another_table, "knows other actions"),
        (of_other_fields, "another version"),
        (of_other_sizes, "do not fit its sizes"),
        (shutil.rmtree, "unknown policy"),
    ],
)
def test_what_cannot_be_loaded_is_a_mistake_of_one_line(
    harm: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    save_controller(folder, controller())
    harm(folder)
    with pytest.raises(K1Error, match=words) as caught:
        make_policy(str(folder), LABELS)
    assert "\n" not in str(caught.value)


def test_the_controller_that_comes_along() -> None:
    policy = make_policy("ppo", LABELS)
    assert isinstance(policy, LearnedPolicy)
    assert sum(file.stat().st_size for file in learned.SHIPPED.iterdir()) < 5_000_000
    about = learned.load_shipped().about
    assert about["command"][:2] == ["python", "scripts/train_ppo.py"]
    assert about["validation"]["worlds"] == 16


def test_without_a_controller_that_comes_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(learned, "SHIPPED", tmp_path / "weights")
    with pytest.raises(CheckpointError, match="comes without a trained controller: train one"):
        make_policy("ppo", LABELS)
    save_controller(tmp_path / "weights", controller())
    assert isinstance(make_policy("ppo", LABELS), LearnedPolicy)


def test_a_path_holds_in_any_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_policy("run") == str(tmp_path / "run") and find_policy("noop") == "noop"
    with pytest.raises(K1Error, match=r"unknown policy 'magic'.*or the folder of a training"):
        find_policy("magic")


def test_it_takes_the_best_possible_action() -> None:
    policy = LearnedPolicy(LABELS, controller())
    rows, info = scene(LABELS)
    batch = {name: torch.from_numpy(row)[None] for name, row in rows.items()}
    ranked = policy.network.actor(batch)[0].argsort(descending=True).tolist()
    assert policy.act(rows, info) == ranked[0] and "probability" in policy.reason
    rows, info = scene([LABELS[i] for i in ranked[5:9]])
    assert policy.act(rows, info) == ranked[5]


def test_a_run_goes_on_with_the_same_weights_only() -> None:
    policy = LearnedPolicy(LABELS, controller())
    state = json.loads(json.dumps(policy.state_dict()))
    LearnedPolicy(LABELS, controller()).load_state_dict(state)
    with pytest.raises(CheckpointError, match="other weights than when this run began"):
        LearnedPolicy(LABELS, controller(1)).load_state_dict(state)


class Silent:
    """A display that shows nothing."""

    def start(self, session: Any) -> None: ...

    def event(self, kind: str, *, done: int, total: int) -> None: ...

    def outcome(self, outcome: Any) -> None: ...

    def promotion(self, stage: int) -> None: ...


def test_a_run_that_it_drives_resumes_and_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text")
    save_controller(tmp_path / "weights", controller())

    def run(name: str, *, resume: bool = False, stop_at: int | None = None) -> None:
        path = tmp_path / name
        folder = prepare_run(path, text, policy="x", max_decisions=4) if not path.exists() else None
        folder = folder or RunFolder.open(path)
        env = open_env(folder, "cpu")
        policy = make_policy(str(tmp_path / "weights"), env.actions)
        if stop_at is not None:
            act = policy.act

            def interrupted(observation: Any, info: Any) -> int:
                if info["decision"] == stop_at:
                    raise KeyboardInterrupt
                return act(observation, info)

            monkeypatch.setattr(policy, "act", interrupted)
        Runner(env, policy, folder, Silent(), seed=0).run(resume=resume)

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("halved", stop_at=2)
    run("halved", resume=True)
    ledgers = [tmp_path / name / "ledger.jsonl" for name in ("whole", "halved")]
    assert ledgers[0].read_bytes() == ledgers[1].read_bytes()
    rows = metrics_of(tmp_path / "halved")
    assert len(rows) == 4 and all(row["reason"].startswith("learned") for row in rows)
    folder = prepare_run(tmp_path / "again", text, max_decisions=4)
    session = open_env(folder, "cpu").session
    session.rebind(0)
    assert replay(session, ledgers[1]).decisions == 4
