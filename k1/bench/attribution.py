"""What attribution costs, and how well the probe's culprit agrees with the full batch's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k1.arena import Arena
from k1.attribution import NEVER, SelectionRules, responsibilities, select_paths
from k1.bench.drivers import SEED, Stream, determinism, make_engine, variant_config
from k1.bench.variants import Variant
from k1.config import Config
from k1.data import TextData
from k1.engine import Engine
from k1.forward import Batch, read_text
from k1.sampling import TokenStore

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share.

    The formula is that of Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 1927.
    """
    share, spread = hits / trials, Z * Z / trials
    centre = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / trials + spread / trials / 4)
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def _median_ms(records: dict[str, dict[str, Any]], name: str) -> float | None:
    return records.get(name, {}).get("median_ms")


def overhead(records: dict[str, dict[str, Any]]) -> float | None:
    """Share of the sparse step's time that attribution takes, None if it was not measured."""
    whole, rest = _median_ms(records, "sparse"), _median_ms(records, "path-only")
    return None if whole is None or rest is None else 1 - rest / whole


def first_culprit(engine: Engine, batch: Batch) -> Tensor:
    """Slot of the culprit that a batch's full backward pass points to, cooldown aside: int64 []."""
    arena, update = engine.arena, engine.arena.config.update
    levels = arena.index(0, 1)
    _, grads, _, _ = engine.gradients(0, 1, batch, read_text(batch, arena.config))
    measured = responsibilities(grads, levels, arena.scratch + 1)
    one = torch.ones(1, dtype=torch.int64, device=arena.device)
    rules = SelectionRules(
        top_k=one * len(levels),
        cooldown=one * 0,
        exploration=torch.zeros(1, device=arena.device),
        scales=update.scales,
        root_scale=update.root_scale,
        min_share=update.min_share,
    )
    rested = torch.full_like(measured, NEVER, dtype=torch.int64)
    uniform = torch.ones(1, measured.shape[1] + 1, device=arena.device)
    chosen = select_paths(measured, rested, one * 0, uniform, arena.leaves(0, 1), rules)
    return chosen.culprits[0, 0]


def agreement(
    config: Config, data: TextData, device: torch.device, train_steps: int, batches: int
) -> dict[str, Any]:
    """Train a tree by sparse steps, then compare the probe's culprit with the full batch's.

    The batches are those that training would have seen next.

    Returns:
        How often both name the same leaf, and the same child of the root, with 95 % intervals; and
        how often the commonest leaf was named (agreement is cheap if that is always).
    """
    variant = Variant("agreement", "", "engine", "sparse", deterministic=True)
    config = variant_config(config, variant)
    store = TokenStore(data, config.model.context, device)
    arena = Arena(config, data.vocab_size, len(data.domains), 1, device)
    arena.reset_lane(0, SEED)
    engine = make_engine(arena, store, variant)
    size = max(1, round(config.train.batch * config.update.probe_fraction))
    stream = Stream(store, config)
    full, probe = [], []
    with determinism(device.type == "cuda"):
        engine.train(0, 1, train_steps)
        stream.cursor = train_steps
        for _ in range(batches):
            batch = stream.next()
            full.append(int(first_culprit(engine, batch)))
            probe.append(int(first_culprit(engine, batch.head(size))))
    tree = arena.trees[0]

    def branch(slot: int) -> int:
        return tree.path(slot)[min(1, tree.blocks[slot].level)]

    leaves = sum(a == b for a, b in zip(full, probe, strict=True))
    branches = sum(branch(a) == branch(b) for a, b in zip(full, probe, strict=True))
    return {
        "train_steps": train_steps,
        "batches": batches,
        "probe_windows": size,
        "windows": config.train.batch,
        "same_leaf": leaves / batches,
        "same_leaf_interval": wilson_interval(leaves, batches),
        "same_branch": branches / batches,
        "same_branch_interval": wilson_interval(branches, batches),
        "commonest_leaf": max(full.count(slot) for slot in full) / batches,
        "distinct_leaves": len(set(full)),
    }
