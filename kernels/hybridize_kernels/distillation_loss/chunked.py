"""What both losses share on a GPU: chunks of the student's logits, turned into their gradient where they lie.

Logits and their gradient share one buffer, which all chunks use in turn; the matrix products read and write it as it
is. Gradients of hidden states, head and bias are taken while it holds a chunk. They are sums over the tokens until the
backward pass divides by their number as it scales, so that fp16 does not lose what is small. Nothing here waits for
the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import is_nvidia
from .tiles import chunk_size, row_numbers


class Divergence(Protocol):
    """What a token's row of logits is compared with."""

    @property
    def token_bytes(self) -> int:
        """Bytes of its own that `rows` needs for each token of a chunk."""

    def rows(self, rows: slice, logits: Tensor, loss: Tensor, agrees: Tensor, *, gradient: bool) -> None:
        """Writes the loss and the agreement of some tokens, 0 where one does not count, into fp32 `[rows]`.

        logits: the student's `[rows, vocabulary]` of these tokens, without bias; where `gradient`, the loss's gradient
        takes their place, in their dtype.
        """


def chunked_loss(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    divergence: Divergence,
    mask: Tensor | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor]:
    """The mean loss and agreement of hidden states `[N, d]` through a head `[vocabulary, d]`: two fp32 scalars."""
    if not torch.is_grad_enabled():  # which the function below is not told
        hidden, head, bias = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    loss, agreement = _ChunkedLoss.apply(hidden, head, bias, divergence, mask, chunk_tokens)
    return loss, agreement


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        divergence: Divergence,
        mask: Tensor | None,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_head, want_bias = ctx.needs_input_grad[:3]
        ctx.dtypes = (hidden.dtype, head.dtype, None if bias is None else bias.dtype)
        dtype = product_dtype(hidden)
        hidden, head = hidden.to(dtype), head.to(dtype)
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
        grad_head = hidden.new_zeros(head.shape, dtype=torch.float32) if want_head else None
        grad_bias = hidden.new_zeros(head.shape[0], dtype=torch.float32) if want_bias else None
        gradient = any(ctx.needs_input_grad)

        tokens, vocabulary = hidden.shape[0], head.shape[0]
        if chunk_tokens is None:
            token_bytes = row_numbers(vocabulary) * hidden.element_size() + divergence.token_bytes
            chunk_tokens = chunk_size(tokens, token_bytes, trained=want_head)
        by_token = hidden.new_empty(2, row_numbers(tokens), dtype=torch.float32)[:, :tokens]  # losses, agreements
        for rows, buffer in chunks_of_logits(tokens, vocabulary, chunk_tokens, hidden):
            logits = torch.mm(hidden[rows], head.T, out=buffer)
            divergence.rows(rows, logits, by_token[0, rows], by_token[1, rows], gradient=gradient)
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[rows])
            if grad_head is not None:
                _add_product(grad_head, logits.T, hidden[rows])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)

        counted = torch.full((), max(1, tokens), device=hidden.device, dtype=torch.float32)
        if mask is not None:
            counted = mask.sum(dtype=torch.float32).clamp(min=1)
        loss, agreement = (by_token.sum(1) / counted).unbind()
        loss, agreement = loss.clone(), agreement.clone()
        ctx.mark_non_differentiable(agreement)
        ctx.save_for_backward(grad_hidden, grad_head, grad_bias, counted)
        return loss, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *grads, counted = ctx.saved_tensors
        factor = grad_loss / counted
        scaled = [
            None if grad is None else torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask of any shape as a kernel reads it: `[N]`, one byte a token."""
    return None if mask is None else mask.flatten().bool().contiguous().view(torch.uint8)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """What these hidden states are multiplied in: their dtype, or autocast's, where that is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def chunks_of_logits(tokens: int, vocabulary: int, chunk_tokens: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's tokens and the place for its logits `[rows, vocabulary]`, which is the same one every time."""
    buffer = like.new_empty(min(tokens, chunk_tokens), row_numbers(vocabulary))
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(tokens, start + chunk_tokens))
        yield rows, buffer[: rows.stop - start, :vocabulary]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total `[M, N]` += left `[M, K]` right `[K, N]`, in fp32 whatever the dtype of the two."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.is_cuda and is_nvidia():
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)
