"""Checkpoints that are complete or absent: tensors, plain state, and a manifest of both.

A checkpoint is a folder of three files. `tensors.safetensors` and `state.json` hold the contents,
`manifest.json` their sizes and SHA-256. The folder is written under a temporary name, forced to the
disk, and renamed. No code is ever loaded from one: there is no pickle.

Where a checkpoint replaces another of the same name, the old one waits beside it as
`.<name>.old` for the moment between two renames. Readers look there too, so a crash at any point
leaves a complete checkpoint under the name that was asked for.

The SHA-256 show damage. They are no signature: who makes a checkpoint can make them fit it, so what
it says is checked once more by those who use it.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from k1.durable import (
    canonical_json,
    digest_of,
    fsync_file,
    fsync_folder,
    parse_json,
    read_ordinary,
    write_durably,
)
from k1.errors import CheckpointError

FORMAT_VERSION = 1

_LOG = logging.getLogger(__name__)
_MOST_MANIFEST = 2**20
_MOST_STATE = 2**29
"""Bytes beyond which a file is no manifest, or no state; parsed, it takes many times that."""

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_MANIFEST = "manifest.json"
_CONTENTS = (_TENSORS, _STATE)
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(?:tmp-[0-9a-f]+|old)")
_HALF_WRITTEN = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_GO_BACK = "resume from an earlier checkpoint, or start the run anew"


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], *, kind: str
) -> Path:
    """Writes a checkpoint so that a crash at any moment leaves a complete one or none.

    Args:
        folder: Where it shall be; a checkpoint that is there is replaced, anything else is not.
        tensors: Dense tensors of any device, type and layout. Those that share memory are written
            in full, each on its own, and come back independent.
        state: Plain data that JSON holds exactly: strings, numbers, booleans, None, lists and
            dicts with string keys. Tuples come back as lists.
        kind: What the checkpoint is of; loading asks for the same kind.

    Returns:
        The folder.

    Raises:
        CheckpointError: The state is not finite plain data, a tensor cannot be stored, the folder
            holds other files, or the disk refuses. An older checkpoint of this name can still be
            loaded.
    """
    place = Path(folder).resolve()
    try:
        state_text = canonical_json(dict(state), "state")
    except ValueError as error:
        raise CheckpointError(
            f"cannot save {folder}: {error}; turn it into finite plain data first"
        ) from error
    temporary = place.with_name(f".{place.name}.tmp-{secrets.token_hex(4)}")
    try:
        _refuse_to_replace_strangers(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _write_tensors(temporary / _TENSORS, tensors)
        write_durably(temporary / _STATE, state_text.encode())
        write_durably(temporary / _MANIFEST, _render(_describe(temporary, kind)))
        fsync_folder(temporary)
        _put_in_place(temporary, place)
    except OSError as error:
        raise CheckpointError(
            f"cannot save {folder}: {error.strerror or error}; "
            "free space or choose a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(folder)


def load_checkpoint(
    folder: Path, *, kind: str, device: str | torch.device = "cpu"
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads a checkpoint after checking every byte of it against its manifest.

    Args:
        folder: The checkpoint.
        kind: The kind that it was saved as.
        device: Where the tensors shall be.

    Returns:
        The tensors, which share no memory with each other or with the file, and the state.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, of another kind or of a newer format.
    """
    source = _where_it_is(Path(folder).resolve())
    if not source.is_dir():
        raise CheckpointError(
            f"there is no checkpoint at {folder}; name a folder that holds a {_MANIFEST}"
        )
    manifest = _read_manifest(source)
    if manifest["kind"] != kind:
        raise CheckpointError(
            f"{source} is a checkpoint of kind {manifest['kind']!r}, but {kind!r} is needed; "
            "name another folder"
        )
    _verify_contents(source, manifest)
    try:
        content = read_ordinary(source / _STATE, _MOST_STATE)
        state = parse_json(content)
        # Other spellings of the same say something twice, or what JSON cannot hold.
        if canonical_json(state).encode() != content:
            raise ValueError(f"{_STATE} is not written as K-1 writes")
        stored = load_file(source / _TENSORS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {source}: {_one_line(error)}; {_GO_BACK}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{source / _STATE} is no JSON object; {_GO_BACK}")
    # The loader's tensors may be windows into the mapped file.
    return {name: tensor.to(device, copy=True) for name, tensor in stored.items()}, state


def checkpoint_exists(folder: Path) -> bool:
    """Says whether `load_checkpoint` would find a folder, be it by the name a crash left it by."""
    return _where_it_is(Path(folder).resolve()).is_dir()


def remove_leftovers(parent: Path) -> None:
    """Deletes what crashes left of checkpoints half written, whatever their names.

    Only the process that writes the checkpoints may call it.

    Args:
        parent: The folder that holds the checkpoints; it need not exist.

    Raises:
        CheckpointError: A folder cannot be listed or deleted.
    """
    for path in _list(Path(parent)):
        if _HALF_WRITTEN.fullmatch(path.name) and path.is_dir():
            _delete(path)


def latest_checkpoint(parent: Path) -> Path | None:
    """Finds the newest complete checkpoint among the `step-XXXXXXXX` folders.

    A folder counts as complete if its manifest can be read and the sizes match it; hashes are left
    to `load_checkpoint`. Temporary and torn folders are passed over.

    Args:
        parent: The folder that holds the checkpoints; it need not exist.

    Returns:
        The checkpoint with the highest step, as a path for `load_checkpoint`, or None.

    Raises:
        CheckpointError: The parent cannot be listed.
    """
    return next(_newest_first(Path(parent)), None)


def newest_intact_checkpoint(parent: Path) -> Path | None:
    """Finds the newest checkpoint whose hashes verify, to go on from after a crash.

    Newer ones that are damaged are passed over, and a warning names them; None if there is none.

    Raises:
        CheckpointError: The parent cannot be listed, or all that it holds are damaged.
    """
    damage: list[CheckpointError] = []
    for folder in _newest_first(Path(parent)):
        try:
            _verify_contents(place := _where_it_is(folder), _read_manifest(place))
        except CheckpointError as error:
            damage.append(error)
            continue
        for passed_over in damage:
            _LOG.warning("passed over a damaged checkpoint: %s", passed_over)
        return folder
    if damage:
        raise damage[0]
    return None


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Deletes all but the newest complete checkpoints, and whatever crashes left behind.

    Only the process that writes the checkpoints may call it: the temporary folder of another
    writer would be taken for a leftover.

    Args:
        parent: The folder that holds the checkpoints; it need not exist.
        keep: How many complete checkpoints to keep, at least 1.

    Raises:
        ValueError: `keep` is below 1.
        CheckpointError: A folder cannot be listed or deleted.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    parent = Path(parent)
    needed = {_where_it_is(folder) for folder in islice(_newest_first(parent), keep)}
    ours = [
        path
        for path in _list(parent)
        if (_STEP_FOLDER.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name)) and path.is_dir()
    ]
    for path in sorted(ours):
        if path in needed:
            continue
        _delete(path)


def _delete(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot delete {path}: {error.strerror or error}; delete it by hand"
        ) from error


def _refuse_to_replace_strangers(folder: Path) -> None:
    """Keeps a mistyped path from costing a user the files of some other folder."""
    if not folder.exists():
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {*_CONTENTS, _MANIFEST}:
        raise CheckpointError(
            f"cannot save {folder}: it exists and is no checkpoint; choose another name"
        )


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    own_copies = {}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(
                f"cannot save the tensor {name!r}: it is not an ordinary dense tensor; "
                "convert it to one first"
            )
        resolved = tensor.detach().resolve_conj().resolve_neg()
        own_copies[name] = resolved.to(
            device="cpu", copy=True, memory_format=torch.contiguous_format
        )
    try:
        save_file(own_copies, path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot save the tensors: {_one_line(error)}; free space or use a common data type"
        ) from error
    fsync_file(path)


def _describe(folder: Path, kind: str) -> dict[str, Any]:
    files = {
        name: {"sha256": _sha256(folder / name), "size": (folder / name).stat().st_size}
        for name in _CONTENTS
    }
    return {
        "files": files,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "versions": {name: _version(name) for name in ("k1", "torch")},
    }


def _render(manifest: Mapping[str, Any]) -> bytes:
    """Gives a manifest its only spelling, with a digest of itself, so that any change shows."""
    sealed = {**manifest, "digest": digest_of(manifest)}
    return (json.dumps(sealed, indent=2, sort_keys=True) + "\n").encode()


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Renames a finished checkpoint to its name; a complete one exists at every moment."""
    old = _old_name(folder)
    if folder.exists():
        if _is_complete(folder):
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        else:
            # What waits under the old name may be the only complete one, so it stays.
            shutil.rmtree(folder)
    os.rename(temporary, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _where_it_is(folder: Path) -> Path:
    """Follows a checkpoint to its old name if a crash fell between the two renames."""
    old = _old_name(folder)
    return old if not folder.exists() and old.is_dir() else folder


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        content = read_ordinary(path, _MOST_MANIFEST)
        manifest = parse_json(content)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: it has no {_MANIFEST}; {_GO_BACK}"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {_one_line(error)}; {_GO_BACK}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, but this K-1 reads up to {FORMAT_VERSION}; "
            "upgrade K-1"
        )
    if version != FORMAT_VERSION or not _is_intact(manifest, content):
        raise CheckpointError(f"{path} is damaged; {_GO_BACK}")
    assert isinstance(manifest, dict)
    return manifest


def _is_intact(manifest: dict[str, Any], content: bytes) -> bool:
    try:
        if _render(manifest) != content:
            return False
        files = manifest["files"]
        return isinstance(manifest["kind"], str) and all(
            isinstance(files[name]["size"], int) and isinstance(files[name]["sha256"], str)
            for name in _CONTENTS
        )
    except (KeyError, TypeError, ValueError):
        return False


def _verify_contents(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name in _CONTENTS:
        _verify(folder / name, manifest["files"][name])


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or no ordinary file; {_GO_BACK}")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"{path} has {size} bytes instead of {expected['size']}; {_GO_BACK}"
            )
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is not the saved one; {_GO_BACK}"
            )
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}; {_GO_BACK}"
        ) from error


def _is_complete(folder: Path) -> bool:
    try:
        content = read_ordinary(folder / _MANIFEST, _MOST_MANIFEST)
        manifest = parse_json(content)
        return (
            isinstance(manifest, dict)
            and _is_intact(manifest, content)
            and all(
                (folder / name).stat().st_size == manifest["files"][name]["size"]
                for name in _CONTENTS
            )
        )
    except (OSError, ValueError):
        return False


def _step_folders(parent: Path) -> list[Path]:
    """Lists the checkpoints by step, each by the name that it was saved under."""
    names = set()
    for path in _list(parent):
        leftover = _LEFTOVER.fullmatch(path.name)
        if _STEP_FOLDER.fullmatch(path.name):
            names.add(path.name)
        elif leftover and path.name.endswith(".old"):
            names.add(leftover[1])
    by_step = sorted(names, key=lambda name: int(name.removeprefix("step-")))
    return [parent / name for name in by_step]


def _newest_first(parent: Path) -> Iterator[Path]:
    """Yields the complete checkpoints; no crash of ours leaves others, so they are told of."""
    for path in reversed(_step_folders(parent)):
        if _is_complete(_where_it_is(path)):
            yield path
        else:
            _LOG.warning("passed over %s: it is no complete checkpoint", path)


def _list(parent: Path) -> list[Path]:
    try:
        return list(parent.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot list {parent}: {error.strerror or error}; name a folder that can be read"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
