"""What an agent is good for: the loss on each domain without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from k1.engine import Engine
from k1.errors import TopologyError
from k1.experiments.reading import read_with
from k1.forward import Batch, Forest
from k1.measure import forest_bits
from k1.specialisation.observe import HeldOut
from k1.topology import ROOT_SLOT

WAYS = ("removed", "bypassed")
"""removed: its routing weight goes to its siblings in proportion to theirs. bypassed: it keeps its
weight, and its subtree hands its input on unchanged."""
_NOTHING = -1e9
"""A log prior that no evidence makes up for."""
_OUTPUTS = ("attention.out", "mlp.out", "mlp.out_bias")
"""What a block adds to its input."""


def without(engine: Engine, lane: int, slot: int, way: str) -> Forest:
    """A lane's tree without what an agent and its subtree do; the lane itself stays as it is.

    Raises:
        TopologyError: for the root, a slot without a block, or a way that an only child cannot be
            ablated by.
    """
    arena = engine.arena
    tree, forest = arena.trees[lane], arena.forest(lane, lane + 1)
    if slot == ROOT_SLOT or slot not in tree.blocks:
        raise TopologyError(f"slot {slot} holds no agent: choose a living agent")
    if way == "removed":
        if len(tree.children(tree.blocks[slot].parent)) == 1:
            raise TopologyError(f"{tree.name(slot)} has no sibling to step in: bypass it")
        block = tree.blocks[slot]
        priors = [prior.clone() for prior in forest.router.log_prior]
        priors[block.level][0, slot - tree.offset[block.level]] = _NOTHING
        return replace(forest, router=replace(forest.router, log_prior=priors))
    if way != "bypassed":
        raise ValueError(f"no way {way!r} to ablate an agent")
    rows = forest.rows.clone()
    for below in tree.subtree(slot):
        pieces = forest.block_layout.unpack(rows[0, below])
        for name in _OUTPUTS:
            pieces[name].zero_()
    return replace(forest, rows=rows)


def bits(engine: Engine, forest: Forest, texts: Mapping[str, HeldOut]) -> dict[str, float]:
    """Bits per byte of one tree on each domain's text."""

    def of(text: HeldOut) -> float:
        if isinstance(text, Batch):
            return float(forest_bits(engine, forest, text)[0])
        return read_with(engine, forest, text)[0]

    return {name: of(text) for name, text in texts.items()}


def harm(
    engine: Engine, lane: int, slots: Iterable[int], texts: Mapping[str, HeldOut]
) -> dict[int, dict[str, float]]:
    """Bits per byte that each domain's text loses without each of some agents."""
    whole = bits(engine, engine.arena.forest(lane, lane + 1), texts)
    found = {}
    for slot in slots:
        less = bits(engine, without(engine, lane, slot, way_for(engine, lane, slot)), texts)
        found[slot] = {name: less[name] - value for name, value in whole.items()}
    return found


def way_for(engine: Engine, lane: int, slot: int) -> str:
    """How an agent is ablated: removed if it has siblings."""
    tree = engine.arena.trees[lane]
    return WAYS[0] if len(tree.children(tree.blocks[slot].parent)) > 1 else WAYS[1]
