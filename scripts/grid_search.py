"""Find the best fixed lr, top_k and cooldown by a grid search on train worlds.

python scripts/grid_search.py --preset tiny --write
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from k1.cli import optional, run


@dataclass(frozen=True)
class Arguments:
    """Find the best fixed setting by a grid search on train worlds (validation pool)."""

    preset: str = "cpu"
    """Sizes: tiny, cpu, small, gpu or paper."""
    worlds: str = "train"
    """All train worlds, or some of them: train/0,train/5."""
    seeds: int = 1
    """Episodes of each setting in each world."""
    lr: Annotated[str | None, optional("A,B,...")] = None
    """Learning rates (default 0.0003,0.001,0.003,0.01,0.03)."""
    top_k: Annotated[str | None, optional("A,B,...")] = None
    """Values of top_k (default 1,3,6,12)."""
    cooldown: Annotated[str | None, optional("A,B,...")] = None
    """Cooldowns (default 0,5,20)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    num_envs: Annotated[int | None, optional("N")] = None
    """Episodes at once (default: 8, on a GPU 128)."""
    records: Annotated[Path | None, optional("FILE")] = None
    """Keep every finished episode as a line of JSON; what is there already is not repeated."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """Break off after this many minutes; worlds that all settings have finished count."""
    write: bool = False
    """Write the result into policies/static.json, where the policy `static` finds it."""


def main(arguments: Arguments) -> int:
    """Play what is missing, and print the result as JSON."""
    from k1.cli import prepare_torch
    from k1.durable import write_atomically
    from k1.errors import K1Error
    from k1.trainer import pick_device
    from policies.evaluation import Plan, evaluate
    from policies.grid import GRID, choose, settings_of
    from policies.progress import progress_bar
    from policies.schedules import STATIC_FILE, known_statics

    grid = dict(GRID)
    for name in GRID:
        given = getattr(arguments, name)
        if given is not None:
            try:
                grid[name] = tuple(float(value) for value in given.split(","))
            except ValueError:
                raise K1Error(f"--{name} {given}: give numbers, such as 1,3") from None
            if not all(0 <= value < math.inf for value in grid[name]):
                raise K1Error(f"--{name} {given}: give finite numbers, 0 or more")
    settings = settings_of(grid)
    if arguments.worlds.partition("/")[0] != "train":
        raise K1Error(f"--worlds {arguments.worlds}: settings are chosen on train worlds only")
    device = pick_device(arguments.device).type
    prepare_torch(device)
    plan = Plan(
        policies=tuple(settings),
        worlds=tuple(arguments.worlds.split(",")),
        seeds=arguments.seeds,
        preset=arguments.preset,
        device=device,
        num_envs=arguments.num_envs or (8 if device == "cpu" else 128),
        split="validation",
    )
    limit = math.inf if arguments.max_minutes is None else arguments.max_minutes
    if not limit > 0:
        raise K1Error(f"--max-minutes {limit} is not possible: give a number above 0")
    with progress_bar() as progress:
        done = evaluate(plan, arguments.records, max_seconds=60 * limit, progress=progress)
    found = choose(done.records, settings)
    if found is None:
        raise K1Error("no world is finished by all settings: give more time, or fewer settings")
    command = f"python scripts/grid_search.py --preset {arguments.preset}"
    command += f" --worlds {arguments.worlds} --seeds {arguments.seeds}"
    for name, values in grid.items():
        command += f" --{name.replace('_', '-')} {','.join(f'{value:g}' for value in values)}"
    found = {**found, "command": f"{command} --device {device}"}
    if arguments.write:
        whole = {**known_statics(), arguments.preset: found}
        text = json.dumps(dict(sorted(whole.items())), indent=2) + "\n"
        write_atomically(STATIC_FILE, text.encode())
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    run(Arguments, main)
