"""The divergence of a row of logits from a teacher's most probable tokens in Triton: one program a token.

The logits of those tokens are taken out of the row first, so that both passes see the tail alone: the first one takes
its largest logit and its sum of exponentials, the second one writes the gradient over it. The gradients of the tokens
that were taken out are put in their places at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .chunked import chunked_loss, mask_bytes
from .kernel import LN_2, LOG2_E, LOWEST, clear_row, load_logits
from .tiles import ROW, row_numbers, table


def top_k_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    *,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    student_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.top_k_distillation_loss`."""
    mask = mask_bytes(mask)
    targets = _Targets(
        top_ids.flatten(0, -2).contiguous(),
        top_log_probs.detach().flatten(0, -2).contiguous(),
        None if student_bias is None else student_bias.detach().contiguous(),
        mask,
    )
    return chunked_loss(student_hidden.flatten(0, -2), student_head, student_bias, targets, mask, chunk_tokens)


@dataclass
class _Targets:
    """The teacher's side of the loss, `[N, k]`, and the student's bias."""

    ids: Tensor
    log_probs: Tensor
    student_bias: Tensor | None
    mask: Tensor | None

    @property
    def token_bytes(self) -> int:
        return 0

    def rows(self, rows: slice, logits: Tensor, loss: Tensor, agrees: Tensor, *, gradient: bool) -> None:
        tokens, vocabulary = logits.shape
        k = self.ids.shape[-1]
        bias = logits if self.student_bias is None else self.student_bias
        counted = loss if self.mask is None else self.mask[rows]
        tile = table().top_k.for_vocabulary(vocabulary)
        launch(
            _top_k_kernel,
            (tokens,),
            (logits, bias, self.ids[rows], self.log_probs[rows], counted, loss, agrees),
            (vocabulary, row_numbers(vocabulary) // ROW, k),
            TAIL=k < vocabulary,
            BIAS=self.student_bias is not None,
            MASKED=self.mask is not None,
            GRADIENT=gradient,
            BLOCK=tile.columns,
            BLOCK_K=triton.next_power_of_2(k),
            STAGES=tile.stages,
            BACK=bool(tile.back),
            ROW=ROW,
            num_warps=tile.warps,
        )


@triton.jit(do_not_specialize=["vocabulary", "row_units", "k"])  # type: ignore[untyped-decorator]
def _top_k_kernel(
    student_ptr,  # [tokens, row_units · ROW]
    bias_ptr,  # [vocabulary]
    ids_ptr,  # [tokens, k]
    log_probs_ptr,  # [tokens, k]
    counted_ptr,  # [tokens]
    loss_ptr,  # [tokens]
    agrees_ptr,  # [tokens]
    vocabulary,
    row_units,
    k,
    TAIL: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BACK: tl.constexpr,
    ROW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * (row_units * ROW)
    columns = tl.arange(0, BLOCK)
    whole = vocabulary // BLOCK * BLOCK  # columns in whole blocks
    if MASKED:  # noqa: SIM102 (what is known when it is compiled, and what is not)
        if tl.load(counted_ptr + row) == 0:
            tl.store(loss_ptr + row, 0.0)
            tl.store(agrees_ptr + row, 0.0)
            if GRADIENT:
                clear_row(student_ptr, vocabulary, BLOCK)
            return

    member = tl.arange(0, BLOCK_K)
    in_k = member < k
    ids = tl.load(ids_ptr + row * k + member, mask=in_k, other=0)
    log_p = tl.load(log_probs_ptr + row * k + member, mask=in_k, other=0.0).to(tl.float32) * LOG2_E
    top = tl.load(student_ptr + ids, mask=in_k, other=0.0).to(tl.float32)
    if BIAS:
        top += tl.load(bias_ptr + ids, mask=in_k, other=0.0).to(tl.float32)
    log_p, top = tl.where(in_k, log_p, LOWEST), tl.where(in_k, top, LOWEST)
    tl.debug_barrier()  # a number may be loaded by several threads, and is overwritten by one of them
    taken_out = tl.full([BLOCK_K], float("-inf"), student_ptr.dtype.element_ty)
    tl.store(student_ptr + ids, taken_out, mask=in_k)
    tl.debug_barrier()  # the passes read what other threads took out

    # Base 2 throughout: a number is (logit − the largest logit) · log2 e.
    tail_max, tail_place = tl.full([], LOWEST, tl.float32), 0
    tail_sum = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        at = start + columns
        logits = load_logits(student_ptr, bias_ptr, at, vocabulary, BIAS, False)
        tail_max, tail_place, tail_sum = _add_block(logits, at, vocabulary, tail_max, tail_place, tail_sum)
    if whole < vocabulary:
        at = whole + columns
        logits = load_logits(student_ptr, bias_ptr, at, vocabulary, BIAS, True)
        tail_max, tail_place, tail_sum = _add_block(logits, at, vocabulary, tail_max, tail_place, tail_sum)

    # The tail's sum is relative to its own largest logit, so that it is above 0 however little the tail weighs.
    tail_total = tl.sum(tail_sum, axis=0)
    most = tl.maximum(tl.max(top, axis=0), tail_max)
    top_total = tl.sum(tl.exp2((top - most) * LOG2_E), axis=0)
    shift = (tail_max - most) * LOG2_E
    log_total = tl.log2(top_total + tail_total * tl.exp2(shift))
    log_q = (top - most) * LOG2_E - log_total

    # Rounded probabilities may sum to a little more than 1.
    mass = tl.sum(tl.exp2(log_p), axis=0)
    if TAIL:
        mass = tl.maximum(mass, 1.0)
    log_p -= tl.log2(mass)
    p = tl.exp2(log_p)
    loss = tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), axis=0)
    tail_scale = 0.0
    if TAIL:
        tail_p = tl.maximum(1.0 - tl.sum(p, axis=0), 0.0)
        log_tail_q = tl.log2(tail_total) + shift - log_total
        loss += tl.where(tail_p > 0, tail_p * (tl.log2(tail_p) - log_tail_q), 0.0)
        tail_scale = (tl.exp2(log_tail_q) - tail_p) / tail_total
    tl.store(loss_ptr + row, loss * LN_2)
    # The teacher's first token is the student's if no other is larger, nor as large with a lower id.
    first_id = tl.load(ids_ptr + row * k)
    first = tl.max(tl.where(member == 0, top, LOWEST), axis=0)
    better = (top > first) | ((top == first) & (ids < first_id) & in_k)
    better_tail = (tail_max > first) | ((tail_max == first) & (tail_place < first_id))
    tl.store(agrees_ptr + row, 1.0 - tl.maximum(tl.max(better.to(tl.float32), axis=0), better_tail.to(tl.float32)))

    if GRADIENT:
        if whole < vocabulary:
            at = whole + columns
            logits = load_logits(student_ptr, bias_ptr, at, vocabulary, BIAS, True)
            gradient = tl.exp2((logits - tail_max) * LOG2_E) * tail_scale
            tl.store(student_ptr + at, gradient.to(student_ptr.dtype.element_ty), mask=at < vocabulary)
        for step in tl.range(0, whole, BLOCK, num_stages=STAGES):
            at = (whole - BLOCK - step if BACK else step) + columns
            logits = load_logits(student_ptr, bias_ptr, at, vocabulary, BIAS, False)
            gradient = tl.exp2((logits - tail_max) * LOG2_E) * tail_scale
            tl.store(student_ptr + at, gradient.to(student_ptr.dtype.element_ty))
        tl.debug_barrier()  # zeros were written where the tokens that were taken out belong
        gradient = tl.exp2(log_q) - p
        tl.store(student_ptr + ids, gradient.to(student_ptr.dtype.element_ty), mask=in_k)


@triton.jit  # type: ignore[untyped-decorator]
def _add_block(logits, at, vocabulary, tail_max, tail_place, tail_sum):
    """The running numbers of the tail, with those of one more block; see the full divergence's."""
    most = tl.max(logits, axis=0)
    if most > tail_max:
        tail_sum *= tl.exp2((tail_max - most) * LOG2_E)
        tail_place = tl.min(tl.where(logits == most, at, vocabulary), axis=0)
        tail_max = most
    tail_sum += tl.exp2((logits - tail_max) * LOG2_E)
    return tail_max, tail_place, tail_sum
