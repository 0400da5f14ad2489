"""An independent K-1: one block at a time, recursion over the tree, evidence by plain loops.

Written from the design and from the formulae documented beside the code, without its forward pass.
It shares with it only the names of the parameters and the blocks of a `Topology`. It is slow, and
exact enough (float64) to judge the batched one. Below it: helpers that the tests share.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from k1.attribution import Selection
from k1.config import Config, EvidenceConfig, ModelConfig, OptimizerConfig, TrainConfig
from k1.forward import Batch
from k1.topology import Topology
from k1.trainer import Trainer

UNIT = 256
"""Counts are integers in units of 1/256 token."""


def normalise(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x: Tensor, dim: int) -> Tensor:
    e = (x - x.max(dim, keepdim=True).values).exp()
    return e / e.sum(dim, keepdim=True)


def bucket_of(before: int, token: int, buckets: int) -> int:
    mixed = (before * 0x9E3779B1 + token * 0x85EBCA77) & 0x7FFFFFFF
    return (mixed ^ (mixed >> 15)) % buckets


def count_text(tokens: list[int], config: EvidenceConfig, weight: int = UNIT) -> Tensor:
    """Count the bigrams of one document: int64 [3, buckets + context_buckets], all current."""
    table = [0] * (config.buckets + config.context_buckets)
    for before, token in pairwise(tokens):
        table[bucket_of(before, token, config.buckets)] += weight
        table[config.buckets + before % config.context_buckets] += weight
    counts = torch.zeros(3, len(table), dtype=torch.int64)
    counts[2] = torch.tensor(table)
    return counts


def loop_evidence(
    tables: list[list[float]], tokens: list[int], starts: list[bool], config: EvidenceConfig
) -> list[list[float]]:
    """Evidence [child][t] of siblings with the given counts (in tokens) over one window."""
    n, strength = config.buckets, config.strength
    total = [0.0] * len(tables)
    out: list[list[float]] = [[] for _ in tables]
    for t, token in enumerate(tokens):
        if starts[t]:
            total = [0.0] * len(tables)
        elif t > 0:
            both_at = bucket_of(tokens[t - 1], token, n)
            before_at = n + tokens[t - 1] % config.context_buckets
            pooled = sum(table[both_at] for table in tables) + strength / n
            pooled /= sum(table[before_at] for table in tables) + strength
            for i, table in enumerate(tables):
                own = (table[both_at] + strength * pooled) / (table[before_at] + strength)
                total[i] += config.tau * math.log(own / pooled)
        for i, value in enumerate(total):
            out[i].append(value)
    return out


class Reference:
    """A K-1 in ordinary torch. Blocks are named by their ids."""

    def __init__(
        self,
        state: dict[str, Tensor],
        tree: Topology,
        prior: dict[int, float],
        counts: dict[int, Tensor],
        config: Config,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.config = config
        self.router = config.model.router
        self.shared: dict[str, Tensor] = {}
        self.block: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            value = value.detach().to(dtype).clone().requires_grad_()
            if name.startswith("shared."):
                self.shared[name.removeprefix("shared.")] = value
            else:
                _, number, piece = name.split(".", 2)
                self.block.setdefault(int(number), {})[piece] = value
        at = {block.slot: block.id for block in tree.blocks.values()}
        self.path: set[int] | None = None
        """Blocks that have a gradient (the others enter as constants); None for all."""
        self.rank = {block.id: block.rank for block in tree.blocks.values()}
        self.parent = {b.id: at[b.parent] for b in tree.blocks.values() if b.id != 0}
        self.prior = prior
        self.counts = {i: (c.sum(0).double() / UNIT).tolist() for i, c in counts.items()}

    @classmethod
    def of(cls, trainer: Trainer, dtype: torch.dtype = torch.float64) -> Reference:
        """Copy the system in lane 0 of a trainer."""
        blocks = trainer.tree.blocks
        prior = {b.id: float(trainer.arena["log_prior"][0, s]) for s, b in blocks.items()}
        counts = {b.id: trainer.arena["evidence"][0, s] for s, b in blocks.items()}
        return cls(trainer.state_dict(), trainer.tree, prior, counts, trainer.config, dtype)

    def children(self, block: int) -> list[int]:
        found = [child for child, parent in self.parent.items() if parent == block]
        return sorted(found, key=lambda child: self.rank[child])

    def run_block(self, block: int, x: Tensor) -> Tensor:
        p, d = self.block[block], x.shape[-1]
        width, time = d // self.config.model.heads, x.shape[-2]
        h = normalise(x) * p["norm1.weight"] + p["norm1.bias"]
        q, k, v = (h @ p["attention.qkv"][:, i * d : (i + 1) * d] for i in range(3))
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        heads = []
        for start in range(0, d, width):
            cut = slice(start, start + width)
            score = q[..., cut] @ k[..., cut].transpose(-1, -2) / math.sqrt(width)
            heads.append(softmax(score.masked_fill(future, -torch.inf), -1) @ v[..., cut])
        x = x + torch.cat(heads, -1) @ p["attention.out"]
        h = normalise(x) * p["norm2.weight"] + p["norm2.bias"]
        h = gelu(h @ p["mlp.in"] + p["mlp.in_bias"])
        return x + h @ p["mlp.out"] + p["mlp.out_bias"]

    def routing(self, block: int, y: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
        """Weights [B, T, children] of a block over its children, by rank."""
        kids = self.children(block)
        columns = []
        for child in kids:
            column = torch.full(y.shape[:-1], self.prior[child], dtype=y.dtype)
            if self.router != "mean":
                p, rank = self.block[block], self.rank[child]
                column = column + normalise(y) @ p["router.weight"][:, rank]
                column = column + p["router.bias"][rank]
            columns.append(column)
        logits = torch.stack(columns, -1)
        if self.router == "evidence":
            tables = [self.counts[child] for child in kids]
            rows = zip(tokens.tolist(), starts.tolist(), strict=True)
            found = [loop_evidence(tables, *row, self.config.evidence) for row in rows]
            logits = logits + torch.tensor(found, dtype=y.dtype).transpose(1, 2)
        return softmax(logits, -1)

    def mixed(self, block: int, x: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
        y = self.run_block(block, x)
        kids = self.children(block)
        if not kids:
            return y
        weight = self.routing(block, y, tokens, starts)
        parts = []
        for child in kids:
            part = self.mixed(child, y, tokens, starts)
            if self.path is not None and child not in self.path:
                part = part.detach() + (y - y.detach())  # but for residual connections
            parts.append(part)
        return sum(weight[..., i, None] * part for i, part in enumerate(parts))

    def logits(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, vocabulary] of tokens [B, T]."""
        if starts is None:
            starts = torch.zeros_like(tokens, dtype=torch.bool)
        s = self.shared
        x = s["embedding"][tokens] + s["position"][: tokens.shape[-1]]
        out = self.mixed(0, x, tokens, starts)
        return (normalise(out) * s["norm.weight"] + s["norm.bias"]) @ s["head"]

    def loss(self, batch: Batch, lane: int = 0) -> Tensor:
        """Mean nats per token of a lane's windows."""
        logits = self.logits(batch.inputs[lane], batch.starts[lane])
        picked = logits.gather(-1, batch.targets[lane][..., None])[..., 0]
        return (logits.logsumexp(-1) - picked).mean()

    def value(self, batch: Batch, lane: int = 0) -> float:
        """The loss as a number."""
        return float(self.loss(batch, lane).detach())

    def gradients(self, batch: Batch, lane: int = 0) -> dict[int, dict[str, Tensor]]:
        """Gradients of every block's own parameters; the shared ones under -1."""
        loss = self.loss(batch, lane)
        groups = {**self.block, -1: self.shared}
        return {
            i: dict(zip(p, torch.autograd.grad(loss, list(p.values()), retain_graph=True,
                                               allow_unused=True, materialize_grads=True),
                        strict=True))
            for i, p in groups.items()
        }  # fmt: skip


# -- helpers -------------------------------------------------------------------------------------


def small_config(**sections: dict[str, Any]) -> Config:
    """A tree of 7 blocks with 16 numbers a token; `sections` as in `Config.replace`."""
    base = Config(
        model=ModelConfig(
            branching=(2, 2), embed=16, feed_forward=24, heads=2, context=16, max_children=4
        ),
        evidence=EvidenceConfig(buckets=256, context_buckets=32, window=8, tau=1.0),
        optimizer=OptimizerConfig(warmup=1),
        train=TrainConfig(batch=4, eval_windows=4, cooldown=0),
    )
    return base.replace(**sections)


def make_ragged(trainer: Trainer) -> Trainer:
    """Edit a (2, 2) tree: leaves 8, 3 and 7 on the levels 1 to 3, holes among ranks and slots."""
    trainer.add_agent(6)
    trainer.delete_agent(5)
    new = trainer.add_agent(0)
    for slot in trainer.tree.children(trainer.tree.slot_of(new)):
        trainer.delete_agent(trainer.tree.blocks[slot].id)
    trainer.delete_agent(4)
    return trainer


def shake(trainer: Trainer, seed: int = 0, size: float = 0.2) -> Trainer:
    """Move every living number away from its simple start: weights, routers, priors, counts."""
    arena, tree = trainer.arena, trainer.tree
    g = torch.Generator().manual_seed(seed)
    for slot in sorted(tree.blocks):
        row = torch.randn(arena.block_layout.total, generator=g) * size
        pieces = arena.block_layout.unpack(row)
        ranks = {tree.blocks[child].rank for child in tree.children(slot)}
        for rank in set(range(tree.max_children)) - ranks:
            pieces["router.weight"][:, rank] = 0
            pieces["router.bias"][rank] = 0
        arena["weight"][0, slot] += row
        if slot:
            arena["log_prior"][0, slot] = torch.randn((), generator=g)
            shape = arena["evidence"][0, slot].shape
            draw = torch.rand(shape, generator=g) ** 4 * 3 * UNIT
            arena["evidence"][0, slot] = draw.long()
    arena["shared"][0] += torch.randn(arena.shared_layout.total, generator=g) * size
    return trainer


def next_batch(trainer: Trainer, windows: int | None = None, lane: int = 0) -> Batch:
    """The batch that lane's next training step will see."""
    a, rows = trainer.arena, slice(lane, lane + 1)
    return trainer.store.sample(
        "train", a["data_seed"][rows], a["data_cursor"][rows], a["mix"][rows],
        windows or trainer.config.train.batch,
    )  # fmt: skip


def select(trainer: Trainer, *culprits: int, scale: float = 1.0) -> Selection:
    """Select the paths to blocks, by id, every block on them with the same scale."""
    tree = trainer.tree
    slots = [tree.slot_of(culprit) for culprit in culprits]
    on_path = torch.zeros(1, trainer.arena.scratch + 1, dtype=torch.bool)
    for slot in slots:
        on_path[0, tree.path(slot)] = True
    return Selection(on_path.float() * scale, on_path, torch.tensor([slots]))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree bit for bit (NaN equals NaN, 0 differs from -0)."""
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
