"""Training a controller: one that was killed gives the learning curve of one that was not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from rich.console import Console

from k1.checkpoint import load_checkpoint
from k1.errors import CheckpointError, K1Error
from k1env.env import Phase2Env
from k1env.instances import SPLITS
from policies import make_policy
from policies.learned import NetworkPolicy, load_controller
from policies.network import WHOLE_ACTIONS, NetworkSizes
from policies.ppo_settings import PPOSettings
from policies.training import ALL_STEPS, TIME_SPENT, Plan, Training, TrainingFolder
from policies.training_display import TrainingDisplay
from policies.validation import Validation, validate
from tests.phase2_helpers import prepare_run, quick, summary_of, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("training") / "text")


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short episodes, and trees that fit into the arena of the tiny preset."""
    monkeypatch.setattr("k1env.instances.BUDGET", (2, 3))
    monkeypatch.setattr("k1env.instances.SHAPES", {s: ((2, 2),) for s in SPLITS})
    monkeypatch.setattr("k1env.world.ROOM", (2, 2))


def plan(text: Path, **fields: Any) -> Plan:
    base = Plan(
        settings=quick(gate={"seeds": 2, "group": 2}, phase1_steps=2),
        ppo=PPOSettings(n_steps=3, minibatches=2, epochs=2, learning_rate=1e-2),
        network=NetworkSizes(slot=8, domain=4, whole=16, noop_bias=2.0),
        num_envs=2,
        steps=24,
        data=str(text),
        eval_every=3,
        eval_worlds=1,
    )
    return replace(base, **fields)


class Started:
    """A training and its folder, which is made if it is not there yet."""

    def __init__(self, path: Path, chosen: Plan) -> None:
        if (path / "config.json").exists():
            self.folder = TrainingFolder.open(path)
        else:
            config = {"plan": chosen.to_dict(), "tensorboard": False}
            self.folder = TrainingFolder.create(path, config, ["test"])
        assert Plan.from_dict(self.folder.config["plan"]) == replace(chosen, steps=24)
        self.training = Training(chosen, TrainingDisplay(Console(quiet=True)))

    def run(self, **options: Any) -> dict[str, Any]:
        return self.training.run(self.folder, **options)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The metrics, without what depends on the clock."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    clock = ("seconds", "steps_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def kill_in_update(training: Training, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a training in the middle of collecting decisions, as a kill would."""
    step, made = training.env.step_wait, 0

    def dies() -> Any:
        nonlocal made
        made += 1
        if made > 3 * (number - 1) + 1:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(training.env, "step_wait", dies)


@pytest.mark.parametrize("kind", ["separate", "wide", "paired"])
def test_a_killed_training_goes_on_to_the_same_learning_curve(
    kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = plan(text, wide=kind == "wide")
    if kind == "paired":
        chosen = replace(chosen, starts=3, ppo=replace(chosen.ppo, paired=True))
    whole = Started(tmp_path / "whole", chosen)
    assert whole.run(resume=False)["stop_reason"] == ALL_STEPS
    killed = Started(tmp_path / "killed", chosen)
    kill_in_update(killed.training, 4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        killed.run(resume=False, save_minutes=0)
    (tmp_path / "killed" / "checkpoints" / ".resume.tmp-0123abcd").mkdir()
    np.random.seed(99)
    torch.manual_seed(99)
    again = Started(tmp_path / "killed", chosen)
    again.run(resume=True)
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "killed")
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["validation"] is not None for row in rows] == [True, False, False, True, True]
    assert sum(row["episodes"] for row in rows) > 2, "episodes end, and others begin"
    assert sum(row["tried"] or 0 for row in rows) > 0, "trials are among what is repeated"
    one, other = (t.training.model.policy.state_dict() for t in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    names = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert names == {"best", "last", "resume", "step-00000000", "step-00000018", "step-00000024"}
    for name in ("best", "last", "step-00000024"):
        left, right = (
            load_controller(tmp_path / path / "checkpoints" / name) for path in ("whole", "killed")
        )
        assert all(torch.equal(t, right.weights[n]) for n, t in left.weights.items())
        assert left.about == right.about


def test_validation_plays_whole_episodes_as_single_environments_do(text: Path) -> None:
    training = Training(plan(text), TrainingDisplay(Console(quiet=True)))
    network = training.model.policy.network
    with torch.no_grad():  # so that it does something
        network.actor.whole_head.bias[:] = torch.linspace(2, 0, len(WHOLE_ACTIONS))
        network.actor.whole_head.bias[0] = 0
    policy = NetworkPolicy(network)
    envs = training.validation_env
    found = validate(envs, policy, [5])
    assert validate(envs, policy, [5]) == found, "always the same"
    world = envs.envs[0].session.world.instance
    assert world is not None
    single = Phase2Env(config=plan(text).settings, data=envs.envs[0].data, instance=world)
    observation, info = single.reset(seed=5)
    total, over = 0.0, False
    while not over:
        action = policy.act(observation, info)
        observation, reward, ended, truncated, info = single.step(action)
        total, over = total + reward, ended or truncated
    session = single.session
    met = session.world.domains[: session.world.phase(session.decision - 1) + 1]
    bits = sum(session.bits[domain] for domain in met) / len(met)
    assert session.boundary.attempted > 0
    assert found == Validation(total, bits, session.decision, 1, worlds=1)


def test_it_pauses_and_goes_on_further_than_was_planned(text: Path, tmp_path: Path) -> None:
    chosen = plan(text)
    paused = Started(tmp_path / "run", chosen).run(resume=False, max_minutes=0)
    assert (paused["stop_reason"], paused["updates"]) == (TIME_SPENT, 0)
    on = Started(tmp_path / "run", replace(chosen, steps=6)).run(resume=True)
    assert (on["stop_reason"], on["steps"]) == (ALL_STEPS, 6)
    on = Started(tmp_path / "run", replace(chosen, steps=9)).run(resume=True)
    assert (on["updates"], on["steps"]) == (2, 12)
    assert summary_of(tmp_path / "run") == on
    assert [row["steps"] for row in rows_of(tmp_path / "run")] == [0, 6, 12]


def test_a_state_without_environments_goes_on_with_new_episodes(text: Path, tmp_path: Path) -> None:
    chosen = plan(text, keep_environments=False)
    Started(tmp_path / "run", chosen).run(resume=False, max_minutes=0)
    resume = tmp_path / "run" / "checkpoints" / "resume"
    for steps in (6, 12):
        Started(tmp_path / "run", replace(chosen, steps=steps)).run(resume=True)
        tensors, state = load_checkpoint(resume, kind="controller training")
        assert not any(name.startswith("environment.") for name in tensors)
        assert state["training"]["environments"] is None
        assert state["training"]["timesteps"] == steps
    assert [row["steps"] for row in rows_of(tmp_path / "run")] == [0, 6, 12]


def test_a_training_that_lost_its_state_does_not_start_over(text: Path, tmp_path: Path) -> None:
    chosen = plan(text, steps=6)
    path = tmp_path / "run"
    Started(path, replace(chosen, steps=24)).run(resume=False, max_minutes=0)
    shutil.rmtree(path / "checkpoints" / "resume")
    refused = "resume is missing, though the training had begun: restore it from a copy, or start"
    with pytest.raises(K1Error, match=refused):
        Started(path, chosen).run(resume=True)
    shutil.rmtree(path / "checkpoints" / "last")
    assert Started(path, chosen).run(resume=True)["updates"] == 1, "nothing was trained before"
    for name in ("resume", "last"):
        shutil.rmtree(path / "checkpoints" / name)
    before = (path / "metrics.jsonl").read_bytes()
    with pytest.raises(K1Error, match=refused):
        Started(path, chosen).run(resume=True)
    assert (path / "metrics.jsonl").read_bytes() == before


def test_a_training_killed_in_its_first_update_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Started(tmp_path / "run", plan(text))
    kill_in_update(killed.training, 1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        killed.run(resume=False)
    on = Started(tmp_path / "run", plan(text, steps=6)).run(resume=True)
    assert on["updates"] == 1
    assert [row["update"] for row in rows_of(tmp_path / "run")] == [0, 1]


def test_the_state_is_of_one_training_and_one_text(text: Path, tmp_path: Path) -> None:
    chosen = plan(text)
    Started(tmp_path / "run", chosen).run(resume=False, max_minutes=0)
    started = Started(tmp_path / "run", chosen)
    more = started.training
    tensors, state = load_checkpoint(
        tmp_path / "run" / "checkpoints" / "resume", kind="controller training"
    )
    from policies.training_state import restore_state

    environments = state["training"]["environments"]["environments"]
    with pytest.raises(CheckpointError, match="is of 1 environments, not 2"):
        less = {**state["training"], "environments": {"environments": environments[:1]}}
        restore_state(more.model, more.env, tensors, less)
    with pytest.raises(CheckpointError, match="of another training or another version"):
        restore_state(more.model, more.env, tensors, {**state["training"], "numpy": {}})
    other = write_text(tmp_path / "other", size=4_000)
    stranger = Training(replace(chosen, data=str(other)), more.display)
    with pytest.raises(K1Error, match="made with other text than what is found now"):
        stranger.run(started.folder, resume=True)


def test_tensorboard_that_is_asked_for_has_to_be_there(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(K1Error, match=r'TensorBoard is not installed: pip install -e "\.\[tb\]"'):
        Training(plan(text), TrainingDisplay(), tensorboard=True)


def test_impossible_plans_are_refused(text: Path) -> None:
    for field in ("num_envs", "steps", "eval_every", "eval_worlds", "starts"):
        with pytest.raises(K1Error, match=f"{field} = 0 is not possible"):
            plan(text, **{field: 0})
    for seed in (-1, 2**32):
        with pytest.raises(K1Error, match=f"seed = {seed} is not possible: 0 to 4294967295"):
            plan(text, seed=seed)
    for data in (str(text), None):
        with pytest.raises(K1Error, match="eval_worlds = 17 is not possible: 1 to 16"):
            Training(plan(text, data=data, eval_worlds=17), TrainingDisplay(Console(quiet=True)))


def test_what_it_says_to_go_on_by(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("scripts.train_ppo")
    path = tmp_path / "ppo"
    config = {"plan": plan(text, steps=6).to_dict(), "tensorboard": False}
    TrainingFolder.create(path, config, ["test"])
    again = f"python scripts/train_ppo.py --run-dir {path} --resume"

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", "--run-dir", str(path), *words])
        arguments = tyro.cli(script.Arguments, config=(tyro.conf.OmitArgPrefixes,))
        status: int = script.main(arguments)
        return status

    assert call("--resume", "--max-minutes", "0") == 0
    assert f"go on: {again}\n" in capsys.readouterr().out
    assert call("--resume", "--steps", "600", "--max-minutes", "0") == 0
    assert f"go on: {again} --steps 600\n" in capsys.readouterr().out
    assert call("--resume") == 0
    assert f"go on: {again} --steps N\n" in capsys.readouterr().out

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "_learn", interrupted)
    assert call("--resume", "--steps", "600") == 130
    assert capsys.readouterr().err.endswith(f"with:\n  {again} --steps 600\n")


def test_the_command_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module("scripts.train_ppo")

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train_ppo.py", *words])
        arguments = tyro.cli(script.Arguments, config=(tyro.conf.OmitArgPrefixes,))
        status: int = script.main(arguments)
        return status

    path = tmp_path / "ppo"
    chosen = plan(text, steps=6, num_envs=2, eval_every=9)
    config = {"plan": chosen.to_dict(), "tensorboard": False}
    TrainingFolder.create(path, config, ["test"])
    assert call("--run-dir", str(path), "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["validation", "update", "validation"]
    assert "return" in lines[1] and "kl" in lines[1]
    assert lines[-1] == f"use it: python scripts/run_phase2.py --policy {path}"
    assert "tensorboard" in (path / "README.txt").read_text()
    assert summary_of(path)["updates"] == 1
    assert make_policy(str(path), ["no-op", "stop"]).state_dict().keys() == {"weights"}
    with pytest.raises(K1Error, match="--seed cannot stand beside --resume"):
        call("--run-dir", str(path), "--resume", "--seed=3")
    strange = prepare_run(tmp_path / "phase2", text)
    with pytest.raises(K1Error, match="is no folder of train_ppo"):
        call("--run-dir", str(strange.path), "--resume")
    with pytest.raises(K1Error, match="--resume needs the training to go on with"):
        call("--resume")
    with pytest.raises(K1Error, match="--max-minutes -1"):
        call("--max-minutes", "-1")
    began = ("--preset", "tiny", "--data", str(text), "--num-envs", "2", "--eval-worlds", "1")
    with pytest.raises(K1Error, match="minibatches = 3 does not cut 8 decisions"):
        call(*began, "--n-steps", "4", "--minibatches", "3", "--run-dir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    assert (
        call(*began, "--n-steps", "4", "--max-minutes", "0", "--run-dir", str(tmp_path / "new"))
        == 0
    )
    stored = Plan.from_dict(TrainingFolder.open(tmp_path / "new").config["plan"])
    assert stored.ppo.n_steps == 4 and stored.data == str(text) and stored.steps == 100_000
