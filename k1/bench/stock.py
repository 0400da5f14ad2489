"""The same tree in ordinary PyTorch: what K-1's own step is held against.

A loop over `nn.Module` blocks, one fused projection for queries, keys and values, torch's own
attention, cross-entropy and fused AdamW. On CUDA the blocks are bfloat16 and the optimizer keeps
float32 master weights: autocast, the other usual way, keeps the residual stream in float32 and
casts every weight in every step; it is measured too.

The routers are `mean` and `learned`. K-1's `evidence` has no counterpart in ordinary modules; the
learned router stands in for it, which spares this side the work of the evidence.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k1.config import Config
from k1.topology import Topology


class Block(nn.Module):
    """A pre-norm transformer block with a router over its children."""

    def __init__(self, d: int, feed_forward: int, heads: int, children: int, learned: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, feed_forward)
        self.down = nn.Linear(feed_forward, d)
        self.router = nn.Linear(d, children) if children and learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on [B, T, d]."""
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def weights(self, y: Tensor) -> Tensor | None:
        """Weights [B, T, children] of the children for the block's output, None for equal ones."""
        if self.router is None:
            return None
        logits = self.router(F.layer_norm(y, (y.shape[-1],)))
        return torch.softmax(logits.float(), dim=-1).to(y.dtype)


class Tree(nn.Module):
    """The whole model; block 0 is the root."""

    def __init__(self, config: Config, vocab_size: int, children: list[list[int]]) -> None:
        """Build the modules.

        Args:
            config: sizes and router.
            vocab_size: width of the head.
            children: for every block the numbers of its children.
        """
        super().__init__()
        m = config.model
        learned = m.router != "mean"
        self.tree = children
        self.embedding = nn.Embedding(vocab_size, m.embed)
        self.position = nn.Parameter(torch.zeros(m.context, m.embed))
        self.blocks = nn.ModuleList(
            Block(m.embed, m.feed_forward, m.heads, len(c), learned) for c in children
        )
        self.norm = nn.LayerNorm(m.embed)
        self.head = nn.Linear(m.embed, vocab_size, bias=False)

    def mixed(self, number: int, x: Tensor) -> Tensor:
        """Run a subtree: the block's output where it is a leaf, else its children's average."""
        block = self.blocks[number]
        assert isinstance(block, Block)
        y: Tensor = block(x)
        if not self.tree[number]:
            return y
        parts = torch.stack([self.mixed(child, y) for child in self.tree[number]], dim=-2)
        weights = block.weights(y)
        return parts.mean(-2) if weights is None else (parts * weights[..., None]).sum(-2)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token of int64 [B, T] tokens."""
        x = self.embedding(inputs) + self.position[: inputs.shape[-1]]
        logits = self.head(self.norm(self.mixed(0, x)))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def path(self, leaf: int) -> list[int]:
        """Numbers of the blocks from a leaf up to the root."""
        parent = {child: number for number, own in enumerate(self.tree) for child in own}
        chain = [leaf]
        while chain[-1] in parent:
            chain.append(parent[chain[-1]])
        return chain


def children_of(tree: Topology) -> list[list[int]]:
    """Number a tree's blocks by their slots and list each one's children by rank."""
    number = {slot: i for i, slot in enumerate(sorted(tree.blocks))}
    return [[number[child] for child in tree.children(slot)] for slot in sorted(tree.blocks)]


def fresh_tree(config: Config, vocab_size: int, device: torch.device) -> Tree:
    """Build the full tree with new weights, drawn on the device: normal(0.02)."""
    m = config.model
    children = children_of(Topology.full(m.branching, m.level_capacity, m.max_children))
    with torch.device(device):
        model = Tree(config, vocab_size, children)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


_RENAMED = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attention.qkv": "qkv.weight",
    "attention.out": "out.weight",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.in": "up.weight",
    "mlp.in_bias": "up.bias",
    "mlp.out": "down.weight",
    "mlp.out_bias": "down.bias",
}


def named_as_modules(state: dict[str, Tensor], tree: Topology) -> dict[str, Tensor]:
    """Rename what `Trainer.state_dict` calls its pieces (parameters or gradients) to `Tree`'s.

    Unused columns of the routers, those of no child, are left out.
    """
    shared = {name: state[f"shared.{name}"] for name in ("norm.weight", "norm.bias", "position")}
    out = {**shared, "embedding.weight": state["shared.embedding"]}
    out["head.weight"] = state["shared.head"].T
    for number, slot in enumerate(sorted(tree.blocks)):
        block = tree.blocks[slot]
        for ours, theirs in _RENAMED.items():
            piece = state[f"block.{block.id}.{ours}"]
            out[f"blocks.{number}.{theirs}"] = piece.T if piece.dim() == 2 else piece
        ranks = [tree.blocks[child].rank for child in tree.children(slot)]
        if ranks:
            router = state[f"block.{block.id}.router.weight"]
            out[f"blocks.{number}.router.weight"] = router[:, ranks].T
            out[f"blocks.{number}.router.bias"] = state[f"block.{block.id}.router.bias"][ranks]
    return out


class StockTrainer:
    """Trains a `Tree` as one does: loss, backward, clipping, fused AdamW."""

    def __init__(
        self,
        model: Tree,
        config: Config,
        *,
        autocast: bool = False,
        compiled: str | None = None,
        regional: bool = False,
        toggle: bool = False,
    ) -> None:
        """Set the optimizer up.

        Args:
            model: float32 modules; they become bfloat16 if the configuration asks for that and
                `autocast` does not.
            config: optimizer settings and precision.
            autocast: keep the modules in float32 and cast as torch sees fit.
            compiled: mode for `torch.compile` of the whole loss; None is eager.
            regional: compile each block by itself instead.
            toggle: in every step, only one path and the shared part require gradients.
        """
        o, half = config.optimizer, config.train.precision == "bfloat16"
        self.model, self.clip, self.toggle = model, o.clip, toggle
        self.autocast, self.copies = autocast and half, half and not autocast
        self.device_type = model.position.device.type
        self.parameters = list(model.parameters())
        self.masters = self.parameters
        if self.copies:
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.parameters]
            self.wide = [torch.empty_like(master) for master in self.masters]
            model.bfloat16()
        self.optimizer = torch.optim.AdamW(
            self.masters, config.train.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, fused=True
        )
        self.compiled = compiled is not None
        self.loss: Any = model
        if self.compiled and regional:
            for block in model.blocks:
                block.compile(mode=compiled, dynamic=False)
        elif self.compiled:
            self.loss = torch.compile(model, mode=compiled, dynamic=False)
        leaves = [number for number, own in enumerate(model.tree) if not own]
        self.paths = [set(model.path(leaf)) for leaf in leaves]
        self.steps = 0

    def _choose_path(self) -> None:
        """Let only the next path require gradients; the leaves take turns."""
        path = self.paths[self.steps % len(self.paths)]
        for number, block in enumerate(self.model.blocks):
            block.requires_grad_(number in path)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Make one training step on int64 [B, T] tokens; returns the loss before it."""
        if self.toggle:
            self._choose_path()
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        half = torch.autocast(self.device_type, torch.bfloat16) if self.autocast else nullcontext()
        with half:
            loss: Tensor = self.loss(inputs, targets)
        loss.backward()
        moved = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if self.copies:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_copy_([self.wide[i] for i in moved], grads)
            for parameter in self.parameters:
                parameter.grad = None
            for i in moved:
                self.masters[i].grad = self.wide[i]
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(
                    [self.parameters[i] for i in moved], [self.masters[i] for i in moved]
                )
        self.steps += 1
        return loss.detach()
