"""Grid search for the best fixed setting, on train worlds and the validation pool."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from policies.comparison import Cells, final
from policies.contestants import static_name

GRID: dict[str, tuple[float, ...]] = {
    "lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "top_k": (1, 3, 6, 12),
    "cooldown": (0, 5, 20),
}


def settings_of(grid: dict[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    """All settings of a grid, by the name of the contestant that holds them."""
    found = {}
    for lr, top_k, cooldown in itertools.product(*(grid[n] for n in ("lr", "top_k", "cooldown"))):
        name = static_name(lr, int(top_k), int(cooldown))
        found[name] = {"lr": lr, "top_k": int(top_k), "cooldown": int(cooldown)}
    return found


def choose(records: Sequence[dict[str, Any]], settings: dict[str, dict[str, float]]) -> Any:
    """Find the setting with the lowest mean final loss over the worlds that all have finished.

    Returns:
        The best setting and every setting's loss, as plain JSON data; None if no world is finished.
    """
    cells = Cells.of(records)
    if not cells.count or set(cells.policies) != set(settings):
        return None
    losses = {
        name: statistics.fmean(x for world in cells.sample(name, final) for x in world)
        for name in settings
    }
    best = min(losses, key=losses.__getitem__)
    return {"best": settings[best], "bits_per_byte": losses, "episodes": cells.count}
