"""Ways to harm files: bytes, JSON, tensors and what stands in a file's place."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Harm = Callable[[Path, random.Random], None]
"""Changes something in a folder."""

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308,
    -1e308, "", "x", "..", "../../../etc/passwd", "/etc/passwd", "\0", "\ud800", "x" * 1000,
    [], {}, [[]], [1, 2], {"x": 1}, {"../x": 0}, ["/etc/passwd"],
)  # fmt: skip
ODD_NAMES = ("", "../../outside", "/etc/passwd", "__class__", "__reduce__", "x", "digest", "\0")


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.proof}'",)


def hostile_files(proof: Path) -> dict[str, bytes]:
    """Real files that make `proof` when something unpickles them, by how they are packed."""
    payload = {"weight": Payload(proof)}
    packed, legacy, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(payload, packed)
    torch.save(payload, legacy, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("data", pickle.dumps(payload))
        archive.writestr("policy.pth", packed.getvalue())
        archive.writestr("pytorch_variables.pth", packed.getvalue())
    return {
        "pickle": pickle.dumps(payload),
        "text pickle": pickle.dumps(payload, protocol=0),
        "torch zip": packed.getvalue(),
        "old torch file": legacy.getvalue(),
        "SB3 zip": zipped.getvalue(),
    }


# -- bytes ---------------------------------------------------------------------------------------


def _harm_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat, zero or swap bytes."""
    size = max(1, len(content))
    at, length = rng.randrange(size), rng.choice((1, 2, 8, 64, size))
    harmed = bytearray(content)
    kind = rng.randrange(9)
    if kind <= 2 and harmed:
        harmed[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del harmed[at:]
    elif kind == 4:
        harmed[at:at] = rng.randbytes(length % 1000)
    elif kind == 5:
        harmed[at : at + length] = bytes(min(length, size - at))
    elif kind == 6:
        harmed[at:at] = harmed[at : at + length]
    elif kind == 7:
        harmed += rng.choice((b"\0", b"\n", b" ", b"{}", b"\n{}\n", rng.randbytes(30)))
    else:
        del harmed[at : at + length]
    return bytes(harmed)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def harm_bytes(folder: Path, rng: random.Random) -> None:
    file = rng.choice(files_of(folder))
    file.write_bytes(_harm_bytes(file.read_bytes(), rng))


def swap_files(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(files_of(folder), 2)
    left, right = one.read_bytes(), other.read_bytes()
    one.write_bytes(right)
    other.write_bytes(left)


def replace_file(folder: Path, rng: random.Random) -> None:
    """Put something else in a file's place: nothing, a folder, a pipe, a link to elsewhere."""
    file = rng.choice(files_of(folder))
    outside = folder.parent / "outside"
    outside.write_bytes(b"a stranger's hands off\n")
    file.unlink()
    kind = rng.randrange(8)
    if kind == 0:
        file.mkdir()
    elif kind == 1:
        os.mkfifo(file)
    elif kind == 2:
        file.symlink_to(outside)
    elif kind == 3:
        file.symlink_to(file)
    elif kind == 4:
        file.symlink_to("/dev/zero")
    elif kind == 5:
        file.symlink_to("../../../../../../../../etc/passwd")
    elif kind == 6:
        file.write_bytes(rng.choice((b"[" * 10**5, b'{"a":' * 10**5, b"1" * 10**5, b"\xff" * 99)))


def replace_folder(folder: Path, rng: random.Random) -> None:
    """Put a link to elsewhere, or nothing, in the place of a folder within."""
    inner = sorted(path for path in folder.rglob("*") if path.is_dir())
    if not inner:
        replace_file(folder, rng)
        return
    place = rng.choice(inner)
    if rng.random() < 0.5:
        place.rename(folder.parent / "elsewhere")
        place.symlink_to(folder.parent / "elsewhere")
    else:
        shutil.rmtree(place)


# -- JSON ----------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values within a value, itself included."""
    found = [path]
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        found += places(item, (*path, key))
    return found


def harm_value(value: Any, rng: random.Random) -> Any:
    """Change plain data in one place."""
    value = json.loads(json.dumps(value))
    *way, last = rng.choice(places(value)[1:] or [()]) or (None,)
    if last is None:
        return rng.choice(ODD_VALUES)
    holder = value
    for key in way:
        holder = holder[key]
    kind = rng.randrange(6)
    if kind <= 2:
        holder[last] = rng.choice(ODD_VALUES)
    elif kind == 3:
        del holder[last]
    elif isinstance(holder, dict):
        item = holder[last] if kind == 4 else holder.pop(last)
        holder[rng.choice(ODD_NAMES)] = item
    elif kind == 4:
        holder.insert(last, holder[last])
    else:
        rng.shuffle(holder)
    return value


def harm_json(folder: Path, rng: random.Random) -> None:
    """Change one value of a JSON file, spelled as before; or spell it in another way."""
    file = rng.choice([path for path in files_of(folder) if path.suffix in (".json", ".jsonl")])
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    at = rng.randrange(max(1, len(lines)))
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError):
        return
    text = lines[at]
    layout: dict[str, Any] = {"indent": 2} if text.count("\n") > 1 else {"separators": (",", ":")}
    kind = rng.randrange(8)
    if kind <= 4:
        value = harm_value(value, rng)
        lines[at] = json.dumps(value, **layout) + ("\n" if file.suffix == ".json" else "")
    elif kind == 5:  # a key twice
        key = rng.choice(list(value)) if isinstance(value, dict) and value else "x"
        lines[at] = text.replace("{", "{" + json.dumps(key) + ": 1, ", 1)
    elif kind == 6:  # no JSON, though Python reads it
        numbers = [i for i, letter in enumerate(text) if letter.isdigit()]
        where = rng.choice(numbers)
        lines[at] = text[:where] + rng.choice(("NaN", "Infinity", "1e999")) + text[where + 1 :]
    else:
        lines[at] = text.replace(":", " :", 1)
    end = "\n" if file.suffix == ".jsonl" else ""
    file.write_text("".join(line + end for line in lines))


# -- tensors -------------------------------------------------------------------------------------


def harm_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """Change one tensor: its values, type, shape or name."""
    changed = dict(tensors)
    name = rng.choice(sorted(changed))
    tensor = changed[name].clone()
    kind = rng.randrange(8)
    if kind <= 2:
        odd = rng.choice((0, -1, 1, 2**40, -(2**62), float("nan"), float("inf"), 1e38))
        if not tensor.is_floating_point():
            odd = 0 if odd != odd or abs(odd) > 2**62 else int(odd)
        if tensor.dtype in (torch.uint8, torch.bool):
            odd = abs(int(odd)) % 256
        tensor.reshape(-1)[: 1 if kind == 0 else None] = odd
        changed[name] = tensor
    elif kind == 3:
        changed[name] = tensor.to(rng.choice((torch.float64, torch.int32, torch.float16)))
    elif kind == 4:
        changed[name] = tensor.flatten()[:-1] if tensor.numel() else torch.ones(3)
    elif kind == 5:
        del changed[name]
    elif kind == 6:
        changed[rng.choice(ODD_NAMES) or "y"] = changed.pop(name)
    else:
        changed["../" + name] = tensor
    return changed
