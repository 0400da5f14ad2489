"""Zips of Stable-Baselines3: weights come out of them, and nothing of them is run."""

from __future__ import annotations

import io
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k1.data import TextData
from k1.errors import CheckpointError
from policies import find_policy, make_policy
from policies.learned import LearnedPolicy
from policies.ppo import ALGORITHMS, make_model
from policies.sb3_zip import MOST_BYTES, load_sb3_zip
from tests.mutations import hostile_files
from tests.test_ppo import LABELS, SIZES, training_env


@pytest.fixture(scope="module")
def model(data: TextData) -> Any:
    env = training_env(data)
    return make_model("maskable", env, env.settings, LABELS, SIZES, seed=3, device="cpu")


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zip") / "model.zip"
    # What of the environment cannot be pickled; the weights are beside it.
    model.save(path, exclude=["_last_obs", "_logger", "ep_info_buffer", "ep_success_buffer"])
    return path


def repacked(
    source: Path, target: Path, change: Callable[[bytes], bytes], inside: str = "policy.pth"
) -> Path:
    """The same zip with another `policy.pth`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name == inside else content)
    return target


def with_weights(saved: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    def again(content: bytes) -> bytes:
        weights = torch.load(io.BytesIO(content), weights_only=True)
        out = io.BytesIO()
        torch.save(change(dict(weights)), out)
        return out.getvalue()

    return repacked(saved, target, again)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_a_saved_model_acts_as_it_did(algorithm: str, data: TextData, tmp_path: Path) -> None:
    env = training_env(data)
    model = make_model(algorithm, env, env.settings, LABELS, SIZES, seed=5, device="cpu")
    model.save(tmp_path / "mine.zip")
    policy = make_policy(str(tmp_path / "mine.zip"), LABELS)
    assert isinstance(policy, LearnedPolicy)
    rows = {name: row[0] for name, row in env.reset().items()}
    logits = model.policy.network.actor({n: torch.as_tensor(r)[None] for n, r in rows.items()})[0]
    info = {"action_mask": np.ones(len(LABELS), np.int8)}
    assert policy.act(rows, info) == int(logits.argmax())
    assert find_policy(str(tmp_path / "mine.zip")) == str(tmp_path / "mine.zip")


def nan(weights: dict[str, Any]) -> dict[str, Any]:
    name = next(iter(weights))
    return weights | {name: weights[name] * float("nan")}


def wide(weights: dict[str, Any]) -> dict[str, Any]:
    """A giant that takes one number of memory."""
    name = "mlp_extractor.network.actor.encoder.slot.0.weight"
    return weights | {name: torch.zeros(1, 1).expand(2**16, 2**40)}


def doubled(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.double() for name, tensor in weights.items()}


def lacking(weights: dict[str, Any]) -> dict[str, Any]:
    return dict(list(weights.items())[1:])


def sparse(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: t.to_sparse() if t.dim() == 2 else t for name, t in weights.items()}


def foreign(weights: dict[str, Any]) -> dict[str, Any]:
    return {f"mlp_extractor.policy_net.{i}.weight": torch.ones(64, 64) for i in (0, 2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, "is not finite"),
        (wide, "do not fit its sizes"),
        (doubled, "is torch.float64"),
        (lacking, r"names differ|another network|has no"),
        (sparse, "holds more than weights"),
        (foreign, "another network than a controller of K-1"),
        (lambda weights: list(weights), "holds no weights"),
        (lambda weights: weights | {"x": 1}, "holds more than weights"),
    ],
)
def test_what_is_no_controller_is_refused(
    change: Callable[..., Any], words: str, saved: Path, tmp_path: Path
) -> None:
    path = with_weights(saved, tmp_path / "odd.zip", change)
    with pytest.raises(CheckpointError, match=words) as caught:
        make_policy(str(path), LABELS)
    assert "\n" not in str(caught.value)


def test_sizes_are_asked_before_anything_is_inflated(saved: Path, tmp_path: Path) -> None:
    bomb = repacked(saved, tmp_path / "bomb.zip", lambda _: bytes(200_000_000))
    assert bomb.stat().st_size < 400_000
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=f"would take more than {MOST_BYTES:,} bytes"):
        load_sb3_zip(bomb)
    assert time.monotonic() - began < 0.5

    def deflated(content: bytes) -> bytes:
        out = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(content)) as old,
            zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name) + bytes(10_000_000) * name.endswith("data/0"))
        return out.getvalue()

    nested = repacked(saved, tmp_path / "nested.zip", deflated)
    with pytest.raises(CheckpointError, match="not written as torch writes"):
        load_sb3_zip(nested)


def test_a_zip_that_lies_about_its_size_is_refused(saved: Path, tmp_path: Path) -> None:
    bomb = repacked(saved, tmp_path / "bomb.zip", lambda _: bytes(200_000_000))
    true, false = (200_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    content = bomb.read_bytes()
    assert true in content
    bomb.write_bytes(content.replace(true, false))
    with pytest.raises(CheckpointError, match="cannot be imported"):
        load_sb3_zip(bomb)


@pytest.mark.parametrize(
    "packed", ["pickle", "text pickle", "torch zip", "old torch file", "SB3 zip"]
)
def test_hostile_pickles_execute_nothing(packed: str, saved: Path, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    content = hostile_files(proof)[packed]
    (tmp_path / "whole.zip").write_bytes(content)
    places = [tmp_path / "whole.zip"]
    for inside in ("policy.pth", "data"):
        target = tmp_path / f"{inside}.zip"
        places.append(repacked(saved, target, lambda _: content, inside))
    for path in places:
        if path.name == "data.zip":  # which is not read at all
            assert isinstance(make_policy(str(path), LABELS), LearnedPolicy)
            continue
        with pytest.raises(CheckpointError):
            make_policy(str(path), LABELS)
    assert not proof.exists()


def test_the_attack_is_real(saved: Path, tmp_path: Path) -> None:
    """Stable-Baselines3 itself runs what such a zip holds."""
    import base64
    import json

    import cloudpickle
    from sb3_contrib import MaskablePPO

    from tests.mutations import Payload

    proof = tmp_path / "executed"

    def poisoned(content: bytes) -> bytes:
        table = json.loads(content)
        packed = base64.b64encode(cloudpickle.dumps(Payload(proof))).decode()
        table["lr_schedule"] = {":type:": "x", ":serialized:": packed}
        return json.dumps(table).encode()

    path = repacked(saved, tmp_path / "poisoned.zip", poisoned, "data")
    make_policy(str(path), LABELS)
    assert not proof.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MaskablePPO.load(path)
    assert proof.exists()


def test_damage_is_refused(saved: Path, tmp_path: Path) -> None:
    import random

    whole, path = saved.read_bytes(), tmp_path / "harmed.zip"
    weights = load_sb3_zip(saved).weights
    for seed in range(150):
        rng = random.Random(seed)
        content = bytearray(whole)
        if seed % 5:
            for _ in range(rng.choice((1, 1, 20))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            found = load_sb3_zip(path).weights
        except CheckpointError:
            continue
        assert all(torch.equal(found[n], t) for n, t in weights.items()), seed
