"""Controllers x worlds x seeds, all side by side as lanes of one arena, with a record of each.

Records are lines of JSON in a file: a head that says what they are about, then a line for each
finished episode. A comparison that is started again leaves out what is there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k1.data import TextData, load_data
from k1.errors import K1Error
from k1.rng import derive_seed
from k1env.env import Phase2Env
from k1env.instances import Instance, find_instance, instances, instances_over
from k1env.kept import Records
from k1env.schedule import Task
from k1env.settings import Settings
from k1env.vector import Phase2VectorEnv
from policies.contestants import make_contestant
from policies.episode import TimeUp, play

FORMAT = 1
Key = tuple[str, str, int]
"""Policy, world and seed of an episode."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to compare."""

    policies: Sequence[str]
    worlds: Sequence[str]
    """Names of instances ("test/3") or of one set ("test"), all of one set."""
    seeds: int
    preset: str = "cpu"
    data: TextData | str | Path | None = None
    """Text of one's own, over whose domains the worlds are drawn (`instances_over`)."""
    config: Settings | None = None
    """In place of the preset's settings."""
    device: str = "auto"
    num_envs: int = 8
    """Episodes at once."""
    split: str = "test"
    """The pool that systems are measured on."""

    def keys(self, names: Sequence[str]) -> list[Key]:
        """All episodes, ordered so that what is done early can be compared already."""
        seeds = range(self.seeds)
        return [
            (policy, world, seed) for seed in seeds for world in names for policy in self.policies
        ]


def _check_made_by(kept: Records, policy: str, identity: str | None) -> None:
    """See that a policy's episodes were played by what plays under its name now.

    Raises:
        K1Error: if not.
    """
    if any(r["policy"] == policy and r["made_by"] != identity for r in kept.rows.values()):
        raise K1Error(
            f"{kept.path} holds episodes of another {policy} than there is now: name another file"
        )


@dataclass(frozen=True)
class Evaluation:
    """What a comparison came to."""

    records: list[dict[str, Any]]
    """Finished episodes of the plan, in the plan's order."""
    planned: int
    seconds: float
    """What this call took."""
    played: int
    """Episodes that this call finished."""
    head: dict[str, Any]


def evaluate(
    plan: Plan,
    records: Path | None = None,
    *,
    max_seconds: float = float("inf"),
    progress: Progress = lambda done, planned: None,
) -> Evaluation:
    """Play all episodes of a plan that are not recorded yet.

    Raises:
        K1Error: for an impossible plan, or records that are about something else.
    """
    began = time.monotonic()
    if plan.seeds < 1 or plan.num_envs < 1 or not plan.policies:
        raise K1Error("an evaluation takes one policy, one seed and one environment at least")
    settings = plan.config if plan.config is not None else Settings.preset(plan.preset)
    data = _own_text(plan, settings)
    worlds = _worlds(plan, data)
    planned = plan.keys(list(worlds))
    envs = Phase2VectorEnv(
        min(plan.num_envs, len(planned)),
        data=data,
        config=settings,
        device=plan.device,
        instance=_split(plan) if data is None else next(iter(worlds.values())),
    )
    where = envs.envs[0]
    # What is read from files is read once: they may change while episodes are played.
    fixed = {
        policy: one
        for policy in plan.policies
        if (one := make_contestant(policy, envs.actions, seed=0, preset=plan.preset)).identity
    }
    head = {
        "format": FORMAT,
        "preset": plan.preset,
        "settings": where.settings.to_dict(),
        "data": where.data.fingerprint,
        "split": plan.split,
        "device": where.device.type,
    }
    kept = Records.open(records, head, ("policy", "world", "seed"))
    made_by = {
        policy: fixed[policy].identity if policy in fixed else None for policy in plan.policies
    }
    for policy, identity in made_by.items():
        _check_made_by(kept, policy, identity)
    queue = deque(key for key in planned if key not in kept.rows)
    before = len(kept.rows)

    def expired() -> bool:
        return time.monotonic() - began > max_seconds

    def seat(env: Phase2Env) -> Task[None]:
        while queue and not expired():
            policy, world, seed = queue.popleft()
            contestant = fixed.get(policy)
            if contestant is None:
                luck = derive_seed("contestant", policy, world, seed)
                contestant = make_contestant(policy, envs.actions, seed=luck, preset=plan.preset)
            task = play(env, contestant, worlds[world], seed, split=plan.split, expired=expired)
            about = {"policy": policy, "world": world, "seed": seed, "made_by": made_by[policy]}
            kept.add({**about, **(yield from task)})
            progress(sum(key in kept.rows for key in planned), len(planned))

    with suppress(TimeUp):  # what is unfinished is played again another time
        envs.run([seat(env) for env in envs.envs])
    finished = [kept.rows[key] for key in planned if key in kept.rows]
    seconds, played = time.monotonic() - began, len(kept.rows) - before
    return Evaluation(finished, len(planned), seconds, played, head)


def _own_text(plan: Plan, settings: Settings) -> TextData | None:
    """Load a user's own text; None is that of the set of worlds."""
    if plan.data is None or isinstance(plan.data, TextData):
        return plan.data
    if str(plan.data) == "builtin":
        return None
    fields = settings.system.data
    return load_data(
        plan.data,
        tokenizer=fields.tokenizer,
        vocab_size=fields.vocab_size,
        max_bytes=fields.max_bytes,
    )


def _split(plan: Plan) -> str:
    """The set that the worlds are of.

    Raises:
        K1Error: if there is none, or more than one.
    """
    sets = {name.partition("/")[0] for name in plan.worlds}
    if len(sets) != 1:
        raise K1Error(f"worlds {', '.join(plan.worlds) or 'missing'}: name worlds of one set")
    return sets.pop()


def _worlds(plan: Plan, data: TextData | None) -> dict[str, Instance]:
    """The worlds by name.

    Raises:
        K1Error: if there is none, one does not exist, or they are of more than one set.
    """
    split = _split(plan)
    every = instances(split)
    if data is not None:
        every = instances_over(data.domains)[split]
    by_name = {world.name: world for world in every}
    found: dict[str, Instance] = {}
    for name in plan.worlds:
        chosen = by_name if name == split else {name: by_name[find_instance(name, 0).name]}
        found |= chosen
    return found
