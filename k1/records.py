"""What a step leaves behind besides weights: its result, text statistics and records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k1.arena import Arena
from k1.attribution import Selection
from k1.evidence import add_counts
from k1.forward import Activations, Text

_MEMORY = 0.95
"""Decay of the running means of loss and responsibility."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, as tensors over lanes."""

    loss: Tensor
    """float32 [L]: nats per token before the update."""
    selection: Selection
    fine: Tensor
    """bool [L]: all gradients that matter were finite."""

    @property
    def skipped(self) -> Tensor:
        """Not fine [L], so nothing was updated (but what inner steps had updated before)."""
        return ~self.fine


@dataclass(frozen=True)
class FullGradients:
    """What a full backward pass leaves."""

    loss: Tensor
    """float32 [L]."""
    measured: Tensor
    """float32 [L, S]: each block's responsibility."""
    by_row: list[tuple[Tensor, Tensor]]
    """Arena rows [M] and their gradients [M, P], part by part."""
    by_shared: Tensor
    """Gradient of the shared rows [L, Q]."""
    values: Activations


def remember(
    arena: Arena, start: int, stop: int, measured: Tensor, due: Tensor | None = None
) -> None:
    """Store responsibilities (of the lanes that are due, bool [L])."""
    last, mean = arena["responsibility"][start:stop], arena["mean_responsibility"][start:stop]
    running = torch.where(mean == 0, measured, mean * _MEMORY + measured * (1 - _MEMORY))
    if due is not None:
        measured = torch.where(due[:, None], measured, last)
        running = torch.where(due[:, None], running, mean)
    finite = torch.isfinite(measured).all(1, keepdim=True)
    arena["responsibility"][start:stop] = torch.where(finite, measured, last)
    arena["mean_responsibility"][start:stop] = torch.where(finite, running, mean)


def count_text(
    arena: Arena,
    start: int,
    stop: int,
    selection: Selection,
    done: Activations,
    text: Text,
    fine: Tensor,
    kernels: bool,
    row: Tensor | None = None,
) -> None:
    """Add the batch's bigrams to the updated blocks, by their share of the routing.

    Kernels look at all blocks, or at those in `row` alone.
    """
    counts, ev = arena["evidence"][start:stop], arena.config.evidence
    levels, shares = arena.index(start, stop)[1:], done.share[1:]
    if not levels:
        return
    if kernels:
        from k1.kernels.evidence import count_fused

        count_fused(counts, levels, shares, selection.scale, fine, text, ev, row)
        return
    moved = (selection.scale > 0) & fine[:, None]
    slots, parts = [], []
    for index, share in zip(levels, shares, strict=True):
        on = moved[:, index.offset : index.offset + index.width]
        most = int(on.sum(1).max())
        order = torch.sort(on.long(), dim=1, descending=True, stable=True).indices[:, :most]
        valid = on.gather(1, order)
        picked = share.detach().gather(1, order[..., None].expand(-1, -1, share.shape[-1]))
        # Not a product: a share may be NaN in a step that is skipped.
        parts.append(torch.where(valid[..., None], picked, 0.0))
        slots.append(torch.where(valid, order + index.offset, arena.scratch))
    share = torch.cat(parts, dim=1)
    if share.shape[1]:
        where = torch.cat(slots, dim=1)
        add_counts(counts, where, share, text.bigram, text.context, text.valid, ev)


def record(arena: Arena, start: int, stop: int, result: StepResult, kernels: bool) -> None:
    """Write a step into the records of its lanes, and go on to their next batch."""
    a, lanes = arena, slice(start, stop)
    if kernels:
        from k1.kernels.select import record_step

        record_step(a.state, lanes, result.selection, result.loss, result.fine, _MEMORY)
        return
    step, fine = a["step"][lanes], result.fine
    updated = (result.selection.scale > 0) & fine[:, None]
    a["updates"][lanes] += updated
    a["last_update"][lanes] = torch.where(updated, step[:, None], a["last_update"][lanes])
    culprits = result.selection.culprits
    slot = torch.where((culprits >= 0) & fine[:, None], culprits, a.scratch)
    hit = torch.zeros_like(updated).scatter_(1, slot, True)
    hit[:, a.scratch] = False
    a["visits"][lanes] += hit
    a["last_culprit"][lanes] = torch.where(hit, step[:, None], a["last_culprit"][lanes])
    a["blocks_updated"][lanes] += updated[:, 1:].sum(1)
    loss = a["loss"][lanes]
    mean = torch.where(loss == 0, result.loss, loss * _MEMORY + result.loss * (1 - _MEMORY))
    a["loss"][lanes] = torch.where(fine, mean, loss)
    a["skipped"][lanes] += result.skipped
    a["step"][lanes] += 1
    a["data_cursor"][lanes] += 1


def culprits_alone(selection: Selection) -> Tensor:
    """Displacements [L, S] of the culprits, 0 for all else."""
    slots = selection.scale.shape[1]
    hit = selection.culprits[..., None] == torch.arange(slots, device=selection.scale.device)
    return torch.where(hit.any(1), selection.scale, 0.0)
