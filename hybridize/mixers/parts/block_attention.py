"""What a block is worth to a query: the attention that its tokens get, and a loss by which compressed keys foretell it.

The choice of blocks has no gradient, so nothing in the loss of a model says which block should have been chosen. A
sharp look at one token is lost in the mean of its block. Here queries and keys learn to be found by it: the compressed
probabilities are fitted to full attention, summed over the tokens of each block, as the indexer of DeepSeek-V3.2 is
(https://arxiv.org/abs/2512.02556); here over the blocks among which a query has a choice, by its attention to them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridize.mixers.parts.documents import document_of_tokens
from hybridize.mixers.parts.slots import take

QUERIES = 512
"""Of a row that are asked, at most: neighbours choose nearly the same blocks, and memory grows as the text does."""


class Blocks(NamedTuple):
    """The blocks of all rows, those of one document after the other; some may be empty.

    Attributes:
        tokens: [B, N, block] int64, the columns of a block's tokens; any where there is none.
        place: [B, N] int64, of a block in its document; -1: it is incomplete or empty.
        document: [B, N] int64.
    """

    tokens: Tensor
    place: Tensor
    document: Tensor


def block_attention_loss(
    q: Tensor,
    k: Tensor,
    *,
    block_tokens: int,
    positions: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
    key_pooling: Tensor | None = None,
    first_position: int = 0,
    queries: int = QUERIES,
) -> Tensor:
    """KL(attention to blocks || compressed attention), each over the blocks that a query may choose or leave.

    These are the complete ones but the first, the current and the previous, which are always chosen. Full attention
    itself is no subject of the gradient. A query counts by the attention that it pays to these blocks.

    Args:
        q: [B, T, HQ, D], k: [B, T, H, D], RoPE applied. positions: [B, T], -1 for padding.
        scale: factor on q·k.
        cu_seqlens: [N + 1], the bounds of documents of one row; None: one text a row.
        key_pooling: [block_tokens, H, D], see `native_sparse_attention`; None: the mean.
        first_position: queries below choose nothing.
        queries: at most so many of a row are asked, at equal distances.

    Returns:
        A scalar, the mean over these queries and all query heads; 0 where no query has a choice.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.float(), k.float()
        document = torch.zeros_like(positions)
        if cu_seqlens is not None:
            document = document_of_tokens(cu_seqlens, positions.shape[1])[None]
        blocks = _blocks(positions, document, block_tokens, 1 if cu_seqlens is None else len(cu_seqlens) - 1)
        in_blocks = take(k, blocks.tokens.flatten(1)).unflatten(1, blocks.tokens.shape[1:])  # [B, N, block, H, D]
        pooled = in_blocks.mean(2) if key_pooling is None else (in_blocks * key_pooling.float()).sum(2)
        distance = max(1, -(-positions.shape[1] // queries))
        asked = slice(distance - 1, None, distance)
        position, own = positions[:, asked, None], document[:, asked, None]
        free = (blocks.place > 0)[:, None] & (blocks.place[:, None] < position // block_tokens - 1)
        free = free & (blocks.document[:, None] == own) & (position >= first_position)
        free = free[:, None, None]  # [B, 1, 1, A, N]
        groups = q[:, asked].unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, H, G, A, D]
        with torch.no_grad():
            seen = (positions >= 0)[:, None] & (positions[:, None] <= position) & (document[:, None] == own)
            logit = scale * groups @ k.permute(0, 2, 3, 1)[:, :, None]
            weight = logit.masked_fill_(~seen[:, None, None], -torch.inf).softmax(-1)  # the largest tensors here
            of_tokens = weight.take_along_dim(blocks.tokens.flatten(1)[:, None, None, None], dim=-1)
            wanted = of_tokens.unflatten(-1, blocks.tokens.shape[1:]).sum(-1).masked_fill(~free, 0.0)
        logit = (scale * groups @ pooled.permute(0, 2, 3, 1)[:, :, None]).masked_fill(~free, -torch.inf)
        # Rows without a choice have no finite logit; what they say is left out below, and must have no gradient either.
        logit = logit.masked_fill(~free.any(-1, keepdim=True), 0.0)
        error = wanted.xlogy(wanted / wanted.sum(-1, keepdim=True)) - wanted * logit.log_softmax(-1)
        asking = (position >= 0).sum().clamp(min=1) * q.shape[2]
        loss: Tensor = error.where(wanted > 0, 0.0).sum() / asking
        return loss


def _blocks(positions: Tensor, document: Tensor, block_tokens: int, num_documents: int) -> Blocks:
    """positions, document: [B, T]."""
    batch, num_tokens = positions.shape
    real = positions >= 0
    number = (real & (positions % block_tokens == 0)).cumsum(1) - 1  # of each token's block in its row
    most = num_tokens // block_tokens + num_documents
    slot = torch.where(real, number * block_tokens + positions % block_tokens, most * block_tokens)
    column = torch.arange(num_tokens, device=positions.device).expand(batch, -1)
    # One slot behind the last is for padding.
    tokens = positions.new_full((batch, most * block_tokens + 1), -1).scatter(1, slot, column)
    tokens = tokens[:, :-1].unflatten(1, (most, block_tokens))
    complete = (tokens >= 0).all(-1)
    tokens = tokens.clamp(min=0)
    first = tokens[..., 0]
    place = torch.where(complete, positions.gather(1, first) // block_tokens, -1)
    return Blocks(tokens, place, document.expand(batch, -1).gather(1, first))
