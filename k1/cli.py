"""What all command lines share: lazy set-up, and errors that a person can act on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from k1.errors import K1Error

Arguments = TypeVar("Arguments")

MISTAKE = 2
"""Exit status for a user's mistake."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""
OUT_OF_MEMORY = (
    "take a smaller preset, fewer environments or trials side by side, or another --device; what "
    "was saved is whole"
)


def run(arguments: type[Arguments], main: Callable[[Arguments], int | None]) -> None:
    """Parse the command line into a dataclass and run `main`; never returns.

    A `K1Error`, of `main` or of the dataclass itself, becomes one line on standard error and exit
    status 2; so does a device without enough memory.
    """
    import tyro

    try:
        code = main(tyro.cli(arguments, config=(tyro.conf.OmitArgPrefixes,)))
    except K1Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        told = _first_sentences(str(error)) or "out of memory"
        print(f"error: {told}; {OUT_OF_MEMORY}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(code or 0)


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, as Python or torch tells of it; torch need not have been imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "can't allocate memory" in str(error)


def _first_sentences(text: str) -> str:
    """What torch says of memory that ran out, without its advice."""
    return ". ".join(text.partition("\n")[0].split(". ")[:2]).rstrip(".")


def optional(metavar: str) -> Any:
    """Describe an option that may be left out; its help text says what happens then."""
    import tyro

    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def check_outputs(*paths: Path | None, inputs: Sequence[Path | None] = ()) -> None:
    """See that files can be written, before the work that they are to hold.

    Args:
        *paths: the files, as far as they are asked for.
        inputs: files that are read, which nothing may be written over.

    Raises:
        K1Error: if one cannot, or is named for something else too.
    """
    import os

    taken = {path.resolve() for path in inputs if path is not None}
    for path in paths:
        if path is None:
            continue
        if path.resolve() in taken:
            raise K1Error(f"{path} is named twice and would be written over: name another file")
        taken.add(path.resolve())
        folder = path.absolute().parent
        if not folder.is_dir():
            raise K1Error(f"the folder of {path} does not exist: make it, or name another")
        if path.is_dir():
            raise K1Error(f"{path} is a folder: name a file")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise K1Error(f"{path} cannot be written: name another file")


def check_alone(arguments: Any, option: str, heeded: Collection[str]) -> None:
    """See that nothing is given that an option leaves unheeded.

    Args:
        arguments: a dataclass of options with defaults.
        option: the option, with what it does: `--from makes no runs`.
        heeded: fields that go with it.

    Raises:
        K1Error: if something else differs from its default.
    """
    from dataclasses import fields

    given = [
        field.name.rstrip("_").replace("_", "-")
        for field in fields(arguments)
        if field.name not in heeded and getattr(arguments, field.name) != field.default
    ]
    if given:
        raise K1Error(f"{option}: leave {', '.join(given)} out")


def absolute_source(data: str) -> str:
    """Make the path of a `--data` folder hold in any working directory."""
    import os

    named = data.partition(":")[0] == "builtin" or data in ("hub", "")
    return data if named else os.path.abspath(data)


def prepare_torch(device: str) -> None:
    """Make runs reproducible on this machine, and set torch's threads up for small blocks.

    Args:
        device: cpu or cuda.
    """
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if device == "cpu":
        torch.set_num_threads(1)  # threads work on lanes, not on products (k1.engine)
        _keep_memory()
    if device == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("high")


def _keep_memory() -> None:
    """Let malloc keep what a step frees for the next one, where malloc is glibc's.

    It would give the top of the heap back after every step, and the next one would pay for each of
    its pages again.
    """
    import ctypes

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # the numbers of malloc.h
        libc.mallopt(trim_threshold, 2**30)
        libc.mallopt(mmap_threshold, 2**25)  # the most it takes
