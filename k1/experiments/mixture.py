"""A flat top-1 mixture of experts (Fedus et al. 2021, "Switch transformers").

A stack of blocks, as many as a path of the tree has, each with attention for all tokens and E
experts instead of one feed-forward layer. A token goes to the expert that its block's router finds
likeliest, and what comes back is multiplied by that likelihood. E is such that the stack has about
as many parameters as the tree; equal FLOPs are then more steps. In training an expert takes
`capacity` times its even share of a batch's tokens at most, those that come first; others pass by.
Nothing is dropped when text is measured. A penalty pushes towards even loads.

In the arena a block is one row: its feed-forward layer is E times as wide, an expert is a part of
it, and the router over children is the one over experts. (The last bias is common to experts.)

Shapes: L lanes, N tokens, E experts, C tokens of an expert at most, d = embed, f = its width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k1.arena import Arena
from k1.block import block_layout, fused_attention
from k1.config import Config
from k1.engine import Engine
from k1.experiments.inferred import InferringLearner, Reading
from k1.forward import Activations, Batch, Text, Weights, arithmetic, embed, lane_loss, token_losses
from k1.path import as_leaf
from k1.records import FullGradients
from k1.rng import derive_seed
from k1.sampling import TokenStore
from k1.topology import Topology

Pieces = dict[str, Tensor]
"""Pieces of `block_layout` of one block in each lane [L, ...]."""


class _Rows(torch.autograd.Function):
    """Rows of a table at some places, zero where there is none; each is asked for once at most.

    So the gradient is found by the inverse, without sums: the same bits on every run.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return F.pad(table, (0, 0, 0, 1)).index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, back = ctx.saved_tensors
        return F.pad(grads[0], (0, 0, 0, 1)).index_select(0, back), None, None


def places(chosen: Tensor, experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Seat tokens with their experts, first come, first served.

    Args:
        chosen: int64 [L, N]: the expert of each token.
        experts: how many there are.
        capacity: seats of each.

    Returns:
        The seat of each token, int64 [L * N], L * E * C for none; and the token on each seat,
        int64 [L * E * C], L * N for none.
    """
    lanes, tokens = chosen.shape
    device = chosen.device
    lane, place = torch.arange(lanes, device=device)[:, None], torch.arange(capacity, device=device)
    there = (chosen[..., None] == torch.arange(experts, device=device)).long()
    number = there.cumsum(1).gather(2, chosen[..., None])[..., 0] - 1
    seat = (lane * experts + chosen) * capacity + number
    seat = torch.where(number < capacity, seat, lanes * experts * capacity)
    # Sorted by their experts, those of each follow one another in order.
    count = there.sum(1)
    at = (count.cumsum(1) - count)[..., None] + place
    order = chosen.argsort(dim=1, stable=True)
    token = order.gather(1, at.flatten(1).clamp(max=tokens - 1)) + lane * tokens
    token = torch.where((place < count[..., None]).flatten(1), token, lanes * tokens)
    return seat.flatten(), token.flatten()


def run_experts(p: Pieces, x: Tensor, width: int, capacity: float) -> tuple[Tensor, Tensor]:
    """Let each token's expert work on it.

    Args:
        p: the blocks' weights.
        x: normed values [L, N, d].
        width: hidden units of an expert, f.
        capacity: tokens that an expert takes, as a multiple of its even share; inf for all.

    Returns:
        What comes back [L, N, d], and the balance of the loads [L]: E times the sum over experts of
        the share of tokens that go there times the mean likelihood of going there; 1 if all are
        even, E if all go to one.
    """
    lanes, tokens, d = x.shape
    experts = p["router.bias"].shape[-1]
    logits = (x @ p["router.weight"].to(x.dtype)).float() + p["router.bias"][:, None]
    likelihood = torch.softmax(logits, -1)
    chosen = likelihood.argmax(-1)
    there = (chosen[..., None] == torch.arange(experts, device=x.device)).float()
    gate = (likelihood * there).sum(-1, keepdim=True)
    balance = experts * (there.mean(1) * likelihood.mean(1)).sum(-1)
    seats = min(tokens, math.ceil(min(capacity, experts) * tokens / experts))
    seat, token = places(chosen, experts, seats)
    seated: Tensor = _Rows.apply(x.reshape(-1, d), token, seat)
    hidden = p["mlp.in"].unflatten(2, (experts, width)).transpose(1, 2).flatten(0, 1).to(x.dtype)
    bias = p["mlp.in_bias"].reshape(lanes * experts, 1, width).to(x.dtype)
    out = p["mlp.out"].reshape(lanes * experts, width, d).to(x.dtype)
    done = F.gelu(torch.baddbmm(bias, seated.view(-1, seats, d), hidden)) @ out
    back: Tensor = _Rows.apply(done.reshape(-1, d), seat, token)
    return back.view_as(x) * gate.to(x.dtype), balance


def run_stack(
    weights: Weights, batch: Batch, config: Config, width: int, capacity: float
) -> tuple[Tensor, Tensor]:
    """Run all blocks: the output [L, N, d], and the sum over blocks of the loads' balance [L]."""
    x = embed(weights.shared_layout.unpack(weights.shared), batch.inputs).to(arithmetic(config))
    lanes, _, time, d = x.shape
    x, balance = x.flatten(1, 2), torch.zeros(lanes, device=x.device)
    for rows in weights.levels:
        p = weights.block_layout.unpack(rows[:, 0])
        qkv = _norm(p, "norm1", x) @ p["attention.qkv"].to(x.dtype)
        attended = fused_attention(qkv.view(-1, time, 3 * d), config.model.heads)
        x = x + attended.reshape(x.shape) @ p["attention.out"].to(x.dtype)
        back, uneven = run_experts(p, _norm(p, "norm2", x), width, capacity)
        x = x + back + p["mlp.out_bias"][:, None].to(x.dtype)
        balance = balance + uneven
    return x, balance


def _norm(p: Pieces, name: str, x: Tensor) -> Tensor:
    gain, shift = (p[f"{name}.{part}"][:, None].to(x.dtype) for part in ("weight", "bias"))
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],)), gain)


class MixtureEngine(Engine):
    """Trains a stack of experts."""

    def __init__(
        self,
        arena: Arena,
        store: TokenStore,
        chunk: int | None,
        width: int,
        capacity: float,
        balance: float,
    ) -> None:
        """Bind an arena of chains; arguments as for `run_experts`, and what balance weighs."""
        super().__init__(arena, store, chunk, fused=False)
        self.width, self.capacity, self.balance = width, capacity, balance

    def _all_gradients(self, start: int, stop: int, batch: Batch, text: Text) -> FullGradients:
        forest = self.arena.forest(start, stop)
        rows, shared = as_leaf(forest.rows), as_leaf(forest.shared)
        weights = replace(forest, rows=rows, shared=shared).weights()
        output, uneven = run_stack(weights, batch, forest.config, self.width, self.capacity)
        loss = lane_loss(weights, output, batch)
        by_row, by_shared = torch.autograd.grad(
            (loss + self.balance * uneven).sum(), [rows, shared]
        )
        measured = torch.linalg.vector_norm(by_row, dim=-1)
        everyone = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device)
        values = Activations([], [output.detach()[:, None]], [], [])
        return FullGradients(
            loss.detach(), measured, [(everyone, by_row.flatten(0, 1))], by_shared, values
        )


class MixtureLearner(InferringLearner):
    """A mixture of experts of the tree's parameters.

    Its steps are so cheap that equal FLOPs would be nine times as many, which take too long.
    """

    engine: MixtureEngine
    longest = 3.0

    def __init__(
        self, *args: Any, capacity: float = 1.25, balance: float = 0.01, **kwargs: Any
    ) -> None:
        """Fill an arena.

        Args:
            *args: as for `Learner`.
            capacity: tokens that an expert takes in training, as a multiple of its even share.
            balance: what the balance of the loads weighs, against the loss in nats.
            **kwargs: as for `Learner`.
        """
        self.capacity, self.balance = capacity, balance
        super().__init__(*args, **kwargs)

    @property
    def width(self) -> int:
        """Hidden units of an expert: those of a block of the tree."""
        return self.base.model.feed_forward

    def configure(self, phase: int) -> Config:
        """Return the settings of a chain whose blocks hold all experts side by side."""
        config = super().configure(phase)
        model = config.model
        tree = Topology.full(model.branching, model.level_capacity, model.max_children)
        chain = (1,) * len(model.branching)

        def stack(experts: int) -> Config:
            sizes = {"feed_forward": experts * self.width, "max_children": experts}
            room = {"branching": chain, "spare": 0.0, "spare_levels": 0}
            return config.replace(model={**sizes, **room})

        one, two = (block_layout(stack(experts).model).total for experts in (1, 2))
        each = len(tree.blocks) * block_layout(model).total / (len(chain) + 1)
        return stack(max(1, 1 + round((each - one) / (two - one))))

    def fresh(self, lane: int) -> None:
        """Fill a lane with a fresh system; routers begin at random, as all tokens would tie."""
        super().fresh(lane)
        a, generator = self.arena, torch.Generator()
        generator.manual_seed(derive_seed("router", self.runs[lane].seed))
        for slot in sorted(a.trees[lane].blocks):
            router = a.block_layout.unpack(a["weight"][lane, slot])["router.weight"]
            drawn = torch.randn(router.shape, generator=generator)
            # The variance that Fedus et al. have.
            router.copy_(drawn * math.sqrt(0.1 / a.config.model.embed))

    def make_engine(self) -> Engine:
        """Build an engine for the stack."""
        settings = self.width, self.capacity, self.balance
        return MixtureEngine(self.arena, self.store, self.chunk, *settings)

    def reading(self, start: int, stop: int) -> Reading:
        """Read with the stack, the one reader that there is."""
        forest = self.arena.forest(start, stop)
        weights, head = forest.weights(), forest.shared_layout.unpack(forest.shared)

        def read(batch: Batch) -> Tensor:
            output, _ = run_stack(weights, batch, forest.config, self.width, math.inf)
            return token_losses(head, output, batch.targets)[None]

        return read

    def step_flops(self, lane: int = 0, updated: float | None = None) -> float:
        """A step by the seats of all experts, whether or not tokens sit there."""
        config, model = self.arena.config, self.arena.config.model
        tokens, d = config.train.batch * model.context, model.embed
        experts = model.max_children
        products = 4 * d * d + 2 * d * self.width * min(self.capacity, experts) + d * experts
        block = 2.0 * products + 2.0 * d * model.context
        blocks = len(self.arena.trees[lane].blocks)
        return 3 * tokens * (blocks * block + 2.0 * d * self.arena.vocab_size)
