"""Checkpoints: exact, complete or absent, and never believed without a check."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from k1 import checkpoint
from k1.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from k1.errors import CheckpointError
from tests import helpers
from tests.helpers import CHECKPOINT_FILES as FILES
from tests.helpers import save_step, value_of

STATE = {
    "step": 3,
    "name": "Wurzel \N{SNOWMAN}",
    "lr": 0.1 + 0.2,
    "rng": [2**127 + 1, -0.0],
    "x": None,
}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)  # fmt: skip


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "float32": torch.tensor([[1.0, -0.0], [math.nan, math.inf]]),
        "bfloat16": torch.arange(6).to(torch.bfloat16).reshape(2, 3),
        "float16": torch.tensor([0.1], dtype=torch.float16),
        "float64": torch.tensor(0.1, dtype=torch.float64),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "int32": torch.arange(3, dtype=torch.int32),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "also.empty": torch.empty(2, 0, dtype=torch.int64),
    }


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and torch.equal(raw(left), raw(right))


def refusal(folder: Path, kind: str = "test") -> str:
    return helpers.refusal(lambda: load_checkpoint(folder, kind=kind), CheckpointError)


def test_everything_comes_back_bit_by_bit(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "saved"
    assert save_checkpoint(folder, some_tensors(), STATE, kind="test") == folder
    tensors, state = load_checkpoint(folder, kind="test")
    assert tensors.keys() == some_tensors().keys()
    assert all(same_bits(tensors[name], tensor) for name, tensor in some_tensors().items())
    assert state == STATE
    assert math.copysign(1, state["rng"][1]) == -1
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert list(tmp_path.joinpath("deep").iterdir()) == [folder]


def test_tensors_that_share_memory_come_back_independent(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {
        "base": base,
        "same": base,
        "row": base[1],
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    folder = save_checkpoint(tmp_path / "saved", tensors, {}, kind="test")
    loaded, _ = load_checkpoint(folder, kind="test")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert all(not tensor.requires_grad for tensor in loaded.values())
    loaded["base"].zero_()
    assert torch.equal(loaded["same"], base)
    assert torch.equal(loaded["row"], base[1])
    assert base[0, 1] == 1, "saving must not touch the source"


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    tensors, _ = load_checkpoint(folder, kind="test")
    with (folder / FILES[0]).open("r+b") as file:
        file.truncate(0)
    assert tensors["weight"].sum() == 64
    tensors["weight"] += 1


def test_no_tensors_and_no_state_are_fine(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "saved", {}, {}, kind="test")
    assert load_checkpoint(folder, kind="test") == ({}, {})


def test_the_same_contents_give_the_same_bytes(tmp_path: Path) -> None:
    one = save_checkpoint(tmp_path / "one", some_tensors(), STATE, kind="test")
    two = save_checkpoint(tmp_path / "two", some_tensors(), STATE, kind="test")
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in FILES)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(state=st.dictionaries(st.text(), plain))
@example(state={"\ud800": "\ud800 \u2028 \0"})
def test_any_plain_state_comes_back(tmp_path: Path, state: dict[str, Any]) -> None:
    folder = save_checkpoint(tmp_path / "saved", {}, state, kind="test")
    _, loaded = load_checkpoint(folder, kind="test")
    assert json.dumps(loaded, sort_keys=True) == json.dumps(state, sort_keys=True)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"a": [{"b": math.nan}]}, "state.a[0].b is nan"),
        ({"a": math.inf}, "state.a is inf"),
        ({"a": {1: 2}}, "state.a has the key 1"),
        ({"a": torch.tensor(1)}, "state.a is of type Tensor"),
        ({"a": b"x"}, "state.a is of type bytes"),
        ({"a": {1, 2}}, "state.a is of type set"),
    ],
)
def test_a_state_that_json_would_alter_is_refused(
    tmp_path: Path, state: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "saved", {}, state, kind="test")
    assert named in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(CheckpointError, match="contains itself"):
        save_checkpoint(tmp_path / "saved", {}, state, kind="test")


@pytest.mark.parametrize(
    "tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"]
)
def test_a_tensor_without_dense_values_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="'odd'"):
        save_checkpoint(tmp_path / "saved", {"odd": tensor}, {}, kind="test")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for target in (precious.parent, precious):
        with pytest.raises(CheckpointError, match="is no checkpoint"):
            save_checkpoint(target, {}, {}, kind="test")
    assert precious.read_text() == "years of work"


def test_an_empty_folder_and_a_link_may_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    save_checkpoint(tmp_path / "link", {}, {"n": 1}, kind="test")
    save_checkpoint(tmp_path / "link", {}, {"n": 2}, kind="test")
    assert (tmp_path / "link").is_symlink()
    assert load_checkpoint(tmp_path / "empty", kind="test")[1] == {"n": 2}


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save"):
        save_checkpoint(tmp_path / "file" / "saved", {}, {}, kind="test")


def test_what_is_missing_or_of_another_kind_is_named(tmp_path: Path) -> None:
    assert "there is no checkpoint" in refusal(tmp_path / "nowhere")
    assert "has no manifest.json" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "there is no checkpoint" in refusal(tmp_path / "file")
    folder = save_step(tmp_path, 1)
    assert "kind 'test', but 'policy' is needed" in refusal(folder, kind="policy")


@pytest.mark.parametrize("name", FILES)
def test_a_lost_or_shortened_file_is_named(tmp_path: Path, name: str) -> None:
    folder = save_step(tmp_path, 1)
    content = (folder / name).read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        (folder / name).write_bytes(content[:length])
        assert name in refusal(folder)
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_detected(tmp_path: Path, name: str) -> None:
    folder = save_step(tmp_path, 1)
    path = folder / name
    content = path.read_bytes()
    generator = random.Random(0)
    for position in range(len(content)):
        flip = generator.randrange(1, 256)
        damaged = bytearray(content)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(folder, kind="test")
    path.write_bytes(content)
    assert value_of(folder) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda manifest: manifest | {"format_version": 2}, "upgrade K-1"),
        (lambda manifest: manifest | {"format_version": 0}, "is damaged"),
        (lambda manifest: manifest | {"format_version": True}, "is damaged"),
        (lambda manifest: manifest | {"kind": "other"}, "is damaged"),
        (lambda manifest: {"format_version": 1}, "is damaged"),
        (lambda manifest: [], "is damaged"),
        (lambda manifest: math.nan, "is damaged"),
    ],
)
def test_an_altered_manifest_is_not_believed(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    path = save_step(tmp_path, 1) / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert named in refusal(path.parent)


@pytest.mark.parametrize("manifest", ["{}", '{"files": {}, "kind": "test", "format_version": 1}'])
def test_a_manifest_with_a_right_digest_but_no_files_is_damaged(
    tmp_path: Path, manifest: str
) -> None:
    path = save_step(tmp_path, 1) / "manifest.json"
    path.write_bytes(checkpoint._render(json.loads(manifest)))
    assert "is damaged" in refusal(path.parent)
    assert latest_checkpoint(tmp_path) is None


def test_unreadable_json_is_one_line(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1) / "manifest.json"
    for content in (b"\xff", b"{", b"[" * 100_000, b""):
        path.write_bytes(content)
        assert "cannot read" in refusal(path.parent)


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 100_000_000, 20):
        save_step(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"
    (tmp_path / "step-100000000" / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000020"
    with (tmp_path / "step-00000020" / "tensors.safetensors").open("ab") as file:
        file.write(b"\0")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000009"
    shutil.copytree(tmp_path / "step-00000009", tmp_path / ".step-00000030.tmp-0123")
    shutil.copytree(tmp_path / "step-00000009", tmp_path / "step-30")
    (tmp_path / "step-00000040").touch()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000009"


def test_pruning_keeps_the_newest_and_sweeps_up(tmp_path: Path) -> None:
    for step in range(5):
        save_step(tmp_path, step)
    (tmp_path / "step-00000004" / "state.json").unlink()
    shutil.copytree(tmp_path / "step-00000000", tmp_path / ".step-00000003.old")
    shutil.copytree(tmp_path / "step-00000000", tmp_path / ".step-00000009.tmp-00ff")
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-00000077").write_text("a file of the user's")
    prune_checkpoints(tmp_path, keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes", "step-00000002", "step-00000003", "step-00000077"]
    assert value_of(tmp_path / "step-00000003") == 3
    prune_checkpoints(tmp_path / "nowhere", keep=1)
    with pytest.raises(ValueError, match="at least 1"):
        prune_checkpoints(tmp_path, keep=0)
