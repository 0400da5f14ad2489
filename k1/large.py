"""The frozen forward pass of large blocks on CUDA: one after the other.

A large block's products fill the device alone. Run by itself, it leaves its memory to the next one,
so a pass takes that of a block instead of a level's, and its biases are added within its products,
which batched ones cannot do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from k1.block import Folded, fold, fused_attention
from k1.config import Config
from k1.levels import LevelIndex
from k1.mixing import flat_index

_LARGE_BYTES = 32 * 2**20
"""Size of a block's largest value from which on the block is run by itself."""


def runs_alone(x: Tensor, config: Config) -> bool:
    """Whether blocks with inputs [..., N, d] are large, and run here without gradients."""
    if not x.is_cuda or torch.is_grad_enabled():
        return False
    widest = max(3 * config.model.embed, config.model.feed_forward)
    return x.shape[-2] * widest * x.element_size() >= _LARGE_BYTES


def run_alone(
    pieces: dict[str, Tensor], above: Tensor, index: LevelIndex, time: int, heads: int
) -> Tensor:
    """Run the blocks of a level without gradients.

    Args:
        pieces: of `block_layout`, each [L * W, ...].
        above: outputs of the level above [L, W_above, N, d]; the roots' inputs for the roots.
        index: the level.
        time: T.
        heads: attention heads.

    Returns:
        [L, W, N, d].
    """
    _, width_above, tokens, d = above.shape
    source = flat_index(index.parent, width_above)
    inputs = above.flatten(0, 1)
    out = above.new_empty(len(source), tokens, d)
    for i, y in enumerate(out):
        own = fold({name: piece[i : i + 1] for name, piece in pieces.items()}, above.dtype)
        _run_block(own, inputs.index_select(0, source[i : i + 1])[0], time, heads, y)
    return out.view(*index.alive.shape, tokens, d)


def _run_block(p: Folded, x: Tensor, time: int, heads: int, y: Tensor) -> None:
    """Write the output of one block with inputs x [N, d] to y [N, d]."""
    d = x.shape[1]
    qkv = torch.addmm(p.qkv_bias[0], F.layer_norm(x, (d,)), p.qkv[0])
    attended = fused_attention(qkv.view(-1, time, 3 * d), heads).view(x.shape)
    middle = torch.addmm(x, attended, p.out[0])
    hidden = torch.addmm(p.mlp_in_bias[0], F.layer_norm(middle, (d,)), p.mlp_in[0])
    torch.add(middle, p.mlp_out_bias[0], out=y).addmm_(torch.ops.aten.gelu_(hidden), p.mlp_out[0])
