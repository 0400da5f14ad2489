"""What the tests of comparisons share: short worlds, arenas for them, episodes, made-up records."""

from __future__ import annotations

from typing import Any

from k1.data import TextData
from k1env.instances import Instance
from k1env.vector import Phase2VectorEnv
from policies.episode import SHARES, Contestant, play
from tests.conftest import DOMAINS
from tests.phase2_helpers import quick


def short_world(**fields: Any) -> Instance:
    """A world of few decisions that begins on fresh weights."""
    usual: dict[str, Any] = {
        "name": "test/0", "domains": DOMAINS[:2], "shifts": (3,), "branching": (2, 2), "lr": 1e-3,
        "cooldown": 5, "top_k": 2, "exploration": 0.0, "pretrained": False, "budget": 12, "seed": 1,
    }  # fmt: skip
    return Instance(**{**usual, **fields})


def arena_for(data: TextData, count: int = 1, **fields: Any) -> Phase2VectorEnv:
    """An arena with quick settings; episodes may have any short world."""
    return Phase2VectorEnv(
        count, config=quick(**fields), data=data, device="cpu", instance=short_world()
    )


def episode(envs: Phase2VectorEnv, who: Contestant, **fields: Any) -> dict[str, Any]:
    """Play one episode in the first environment."""
    return envs.run([play(envs.envs[0], who, short_world(**fields), 0)])[0]


def record(policy: str, world: str, seed: int, *levels: float, **fields: Any) -> dict[str, Any]:
    """A made-up record with one constant loss for each domain."""
    domains = [f"d{i}" for i in range(len(levels))]
    usual = {
        "policy": policy, "world": world, "seed": seed, "domains": domains, "seen": len(levels),
        "brought": [len(levels)] * len(SHARES), "budget_flops": 2.0, "flops": 1.0, "decisions": 3,
        "bits": {d: [x] * len(SHARES) for d, x in zip(domains, levels, strict=True)}, "stage": 1,
        "tried": 0, "refused": 0, "credited": 0, "return": 1.0,
    }  # fmt: skip
    return {**usual, **fields}
