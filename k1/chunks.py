"""Work on lanes that share nothing, side by side where that helps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Piece = Callable[[], None]


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Cut ascending numbers into ranges start..stop without gaps."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def cut(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut lanes start..stop into chunks of `size` lanes; the last may be smaller."""
    return [(low, min(stop, low + size)) for low in range(start, stop, size)]


def run_pieces(jobs: Sequence[Sequence[Piece]], *, threads: bool) -> list[Exception | None]:
    """Do jobs that consist of pieces of work.

    Args:
        jobs: the pieces of each job, none of which depends on another.
        threads: whether pieces run side by side, a thread each, or one after the other.

    Returns:
        For each job, the first error of its pieces, or None. The other jobs are done all the same.
    """
    if not threads or sum(map(len, jobs)) <= 1:
        return [_first_error(pieces) for pieces in jobs]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        futures = [[pool.submit(piece) for piece in pieces] for pieces in jobs]
        return [_first_error([future.result for future in row]) for row in futures]


def _first_error(pieces: Sequence[Callable[[], None]]) -> Exception | None:
    try:
        for piece in pieces:
            piece()
    except Exception as error:
        return error
    return None
