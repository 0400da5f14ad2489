"""What an engine's counters say about the steps that it has made."""

from __future__ import annotations

from k1.bench.methods import CoordinateEngine
from k1.engine import Engine
from k1.flops import step_flops


def flops_per_step(engine: Engine) -> float:
    """FLOPs of a step by formula, on average over all lanes and steps so far."""
    a = engine.arena
    steps = sum(a.host_step)
    if isinstance(engine, CoordinateEngine):
        updated = sum(engine.path_blocks) / steps
    else:
        updated = float(a["blocks_updated"].sum()) / steps + 1  # the root moves too
    return step_flops(a.config, a.vocab_size, len(a.trees[0].blocks), updated)


def updated_per_step(engine: Engine) -> float:
    """Blocks that a step updates, root included, on average over lanes and steps."""
    a = engine.arena
    return float(a["updates"].sum()) / sum(a.host_step)


def visit_spread(engine: Engine) -> list[dict[str, float]] | None:
    """How each lane's visits spread over blocks; None where nothing is visited (dense)."""
    a, result = engine.arena, []
    for lane in range(a.lanes):
        counts = a["visits"][lane].double()
        total = float(counts.sum())
        if total == 0:
            return None
        share = counts[counts > 0] / total
        tree = a.trees[lane]
        open_to_visits = [
            slot
            for slot in tree.blocks
            if isinstance(engine, CoordinateEngine) or tree.is_leaf(slot)
        ]
        result.append(
            {
                "most": float(share.max()),
                "entropy": float(-(share * share.log2()).sum()),
                "visited": len(share),
                "of": len(open_to_visits),
            }
        )
    return result
