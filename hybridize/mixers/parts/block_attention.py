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

EVERY = 8
"""One query of so many is asked: neighbours choose nearly the same blocks."""


class Blocks(NamedTuple):
    """The blocks of all rows, those of one document after the other; some at the end may be empty.

    Attributes:
        members: [B, T, N] float, 1 where a token belongs to a block.
        place: [B, N] int64, of a block in its document; -1: it is incomplete or empty.
        document: [B, N] int64.
    """

    members: Tensor
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
    every: int = EVERY,
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
        every: of so many queries one is asked.

    Returns:
        A scalar, the mean over these queries and all query heads; 0 where no query has a choice.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.float(), k.float()
        document = torch.zeros_like(positions)
        if cu_seqlens is not None:
            document = document_of_tokens(cu_seqlens, positions.shape[1])[None]
        blocks = _blocks(positions, document, block_tokens, 1 if cu_seqlens is None else len(cu_seqlens) - 1)
        pooled = _pooled(k, positions, blocks, block_tokens, key_pooling)
        asked = slice(every - 1, None, every)
        position, own = positions[:, asked, None], document[:, asked, None]
        free = (blocks.place > 0)[:, None] & (blocks.place[:, None] < position // block_tokens - 1)
        free = free & (blocks.document[:, None] == own) & (position >= first_position)
        free = free[:, None, None]  # [B, 1, 1, A, N]
        groups = q[:, asked].unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, H, G, A, D]
        with torch.no_grad():
            seen = (positions >= 0)[:, None] & (positions[:, None] <= position) & (document[:, None] == own)
            logit = scale * groups @ k.permute(0, 2, 3, 1)[:, :, None]
            weight = logit.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
            wanted = (weight @ blocks.members[:, None, None]).masked_fill(~free, 0.0)
        logit = (scale * groups @ pooled.permute(0, 2, 3, 1)[:, :, None]).masked_fill(~free, -torch.inf)
        # Rows without a choice have no finite logit; what they say is left out below, and must have no gradient either.
        logit = logit.masked_fill(~free.any(-1, keepdim=True), 0.0)
        error = wanted.xlogy(wanted / wanted.sum(-1, keepdim=True)) - wanted * logit.log_softmax(-1)
        asking = (position >= 0).sum().clamp(min=1) * q.shape[2]
        loss: Tensor = error.where(wanted > 0, 0.0).sum() / asking
        return loss


def _blocks(positions: Tensor, document: Tensor, block_tokens: int, num_documents: int) -> Blocks:
    """positions, document: [B, T]."""
    real = positions >= 0
    starts = real & (positions % block_tokens == 0)
    number = (starts.cumsum(1) - 1).clamp(min=0)  # of each token's block in its row
    most = positions.shape[1] // block_tokens + num_documents
    members = (number[..., None] == torch.arange(most, device=positions.device)) & real[..., None]
    place = (members * (positions // block_tokens)[..., None]).amax(1)
    complete = members.sum(1) == block_tokens
    of_document = (members * document[..., None]).amax(1)
    return Blocks(members.float(), place.where(complete, -1), of_document)


def _pooled(k: Tensor, positions: Tensor, blocks: Blocks, block_tokens: int, key_pooling: Tensor | None) -> Tensor:
    """[B, N, H, D], the compressed keys."""
    if key_pooling is None:
        k = k / block_tokens
    else:
        k = k * key_pooling.float()[positions.clamp(min=0) % block_tokens]
    return torch.einsum("btn,bthd->bnhd", blocks.members, k)
