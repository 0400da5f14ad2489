"""Run Phase 2: a tree of transformer blocks trains, and a controller steers it.

python scripts/run_phase2.py --policy heuristic
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from k1.cli import optional, run

DEFAULTS: dict[str, Any] = {
    "policy": "heuristic",
    "data": None,
    "preset": "cpu",
    "seed": 0,
    "device": "auto",
    "start": None,
}


@dataclass(frozen=True)
class Arguments:
    """Run Phase 2: a tree of transformer blocks trains, and a controller steers it."""

    policy: Annotated[str | None, optional("NAME")] = None
    """Controller: heuristic (default), random, random-legal, cheat, noop, ppo (the trained one that
    comes with K-1), the folder of a training by train_ppo.py, or a zip of Stable-Baselines3 that
    holds such a policy (weights alone are read)."""
    data: Annotated[str | None, optional("SOURCE")] = None
    """Text: builtin, hub or a folder of <domain>/{train,validation,test}.txt."""
    preset: Annotated[str | None, optional("NAME")] = None
    """Sizes: tiny, cpu (default), small, gpu or paper."""
    seed: Annotated[int | None, optional("N")] = None
    """Seed of everything (default 0): the same seed gives the same run on the same machine."""
    device: Annotated[str | None, optional("NAME")] = None
    """auto (default), cpu or cuda."""
    start: Annotated[str | None, optional("DIR")] = None
    """Checkpoint of train_phase1.py to start from (its router too), in place of a short Phase 1."""
    run_dir: Annotated[Path | None, optional("DIR")] = None
    """Run folder (default: runs/phase2-<date>-<time>)."""
    resume: bool = False
    """Go on with the run in --run-dir (default: the newest in runs/)."""
    max_minutes: Annotated[float | None, optional("M")] = None
    """End the run after this many minutes."""
    json: bool = False
    """Print the summary as JSON on standard output, and the log on standard error."""


def main(arguments: Arguments) -> int:
    """Set a run up or take it up again, drive it, and report."""
    from k1.cli import absolute_source, prepare_torch
    from k1env.run_folder import RunFolder
    from policies import find_policy, make_policy

    given = {name: getattr(arguments, name) for name in DEFAULTS}
    # A run can be resumed and replayed in any working directory.
    if given["data"] is not None:
        given["data"] = absolute_source(given["data"])
    if given["start"] is not None:
        given["start"] = str(Path(given["start"]).absolute())
    if given["policy"] is not None:
        given["policy"] = find_policy(given["policy"])
    folder = _open_folder(arguments) if arguments.resume else None
    settings = _settings(given, folder)

    from k1.errors import K1Error
    from k1.trainer import pick_device
    from k1env.dashboard import make_display
    from k1env.env import Phase2Env
    from k1env.plain_log import final_report
    from k1env.runner import TIME_SPENT, Runner
    from k1env.settings import Settings

    if settings["seed"] < 0:
        raise K1Error(f"--seed {settings['seed']} is not possible: it is 0 or more")
    limit = arguments.max_minutes
    if limit is not None and not 0 < limit < math.inf:
        raise K1Error(f"--max-minutes {limit} is not possible: give a number above 0")
    device = pick_device(
        settings["device"] if folder is None else str(folder.config.get("device"))
    ).type
    prepare_torch(device)
    env = Phase2Env(
        settings["preset"],
        config=None if folder is None else Settings.from_dict(folder.config["settings"]),
        data=settings["data"],
        start=settings["start"],
        device=device,
    )
    policy = make_policy(settings["policy"], env.actions, seed=settings["seed"])
    if folder is None:
        path = arguments.run_dir or Path("runs") / time.strftime("phase2-%Y%m%d-%H%M%S")
        config = {"arguments": settings, "settings": env.settings.to_dict()}
        folder = RunFolder.create(path, {**config, "device": device}, [sys.executable, *sys.argv])
    elif not _can_go_on(folder.path):
        print(f"{folder.path} is finished already: this is its summary", file=sys.stderr)
        print(json.dumps(folder.summary, indent=2))
        return 0

    display = make_display(sys.stderr if arguments.json else sys.stdout)
    runner = Runner(
        env, policy, folder, display, seed=settings["seed"], max_minutes=arguments.max_minutes
    )
    try:
        with display:
            summary = runner.run(resume=arguments.resume)
    except KeyboardInterrupt:
        done = env.session.decision
        print(
            f"\nInterrupted. {done} decisions are saved in {folder.path}; go on with:\n"
            f"  python scripts/run_phase2.py --run-dir {folder.path} --resume",
            file=sys.stderr,
        )
        return 130
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print(final_report(summary, folder.path))
        if summary["stop_reason"] == TIME_SPENT:
            print(f"Go on with       python scripts/run_phase2.py --run-dir {folder.path} --resume")
    return 0


def _open_folder(arguments: Arguments) -> Any:
    """Find the run to go on with."""
    from k1.errors import K1Error
    from k1env.run_folder import RunFolder

    path = arguments.run_dir
    if path is None:
        runs = [p for p in Path("runs").glob("phase2-*/") if _can_go_on(p)]
        if not runs:
            raise K1Error("there is no unfinished run in runs/: name one by --run-dir")
        path = max(runs)
    return RunFolder.open(path)


def _can_go_on(path: Path) -> bool:
    """Whether there is a run that was interrupted, or that --max-minutes paused."""
    from k1.errors import K1Error
    from k1env.run_folder import RunFolder
    from k1env.runner import TIME_SPENT

    try:
        folder = RunFolder.open(path)
    except K1Error:
        return False  # not a run folder: another one is looked for
    return not folder.finished or folder.summary.get("stop_reason") == TIME_SPENT


def _settings(given: dict[str, Any], folder: Any) -> dict[str, Any]:
    """Fill defaults in, or take them from the run that goes on and refuse others."""
    from k1.errors import K1Error

    if folder is None:
        return {name: DEFAULTS[name] if v is None else v for name, v in given.items()}
    from k1env.runner import RunArguments

    stored = asdict(RunArguments.of(folder))
    for name, value in given.items():
        if value is not None and value != stored[name]:
            raise K1Error(
                f"{folder.path} was made with --{name} {stored[name]}, not {value}: "
                "leave the option out, or start a new run in another --run-dir"
            )
    return stored


if __name__ == "__main__":
    run(Arguments, main)
