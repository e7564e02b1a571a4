"""The divergence of two rows of logits in Triton: one program a token.

A first pass over both rows takes the largest logits and where they are, the sums of exponentials, and the sums that
the divergence is made of, all relative to the largest logits so far. A second pass writes the gradient over the
student's logits. It may go back from where the first one ended: what that read last is still in the cache, where what
it read first may not be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .chunked import chunked_loss, mask_bytes, product_dtype
from .tiles import ROW, row_numbers, table

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)
"""Below every logit and yet a number: products of its exponential, 0, and its differences are 0, where −∞ gives NaN."""


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
    chunk_tokens: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `hybridize_kernels.distillation_loss`."""
    mask = mask_bytes(mask)
    teacher = _Teacher(
        teacher_hidden.detach().flatten(0, -2).to(product_dtype(teacher_hidden)),
        teacher_head.detach().to(product_dtype(teacher_hidden)),
        None if teacher_bias is None else teacher_bias.detach().contiguous(),
        None if student_bias is None else student_bias.detach().contiguous(),
        mask,
        float(temperature),
        direction,
    )
    return chunked_loss(student_hidden.flatten(0, -2), student_head, student_bias, teacher, mask, chunk_tokens)


@dataclass
class _Teacher:
    """The teacher's side of the loss: hidden states `[N, d]`, head, and both biases."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None
    student_bias: Tensor | None
    mask: Tensor | None
    temperature: float
    direction: str
    _buffer: Tensor | None = None

    @property
    def token_bytes(self) -> int:
        return row_numbers(self.head.shape[0]) * self.hidden.element_size()

    def rows(self, rows: slice, logits: Tensor, loss: Tensor, agrees: Tensor, *, gradient: bool) -> None:
        tokens, vocabulary = logits.shape
        if self._buffer is None:  # the first chunk is the longest
            self._buffer = self.hidden.new_empty(tokens, row_numbers(vocabulary))
        teacher = torch.mm(self.hidden[rows], self.head.T, out=self._buffer[:tokens, :vocabulary])
        student_bias = logits if self.student_bias is None else self.student_bias
        teacher_bias = teacher if self.bias is None else self.bias
        counted = loss if self.mask is None else self.mask[rows]
        tile = table().full.for_vocabulary(vocabulary)
        launch(
            _divergence_kernel,
            (tokens,),
            (logits, teacher, student_bias, teacher_bias, counted, loss, agrees),
            (vocabulary, row_numbers(vocabulary) // ROW, self.temperature),
            FORWARD=self.direction != "reverse",
            REVERSE=self.direction != "forward",
            STUDENT_BIAS=self.student_bias is not None,
            TEACHER_BIAS=self.bias is not None,
            MASKED=self.mask is not None,
            GRADIENT=gradient,
            BLOCK=tile.columns,
            STAGES=tile.stages,
            BACK=bool(tile.back),
            ROW=ROW,
            num_warps=tile.warps,
        )


@triton.jit(do_not_specialize=["vocabulary", "row_units", "temperature"])  # type: ignore[untyped-decorator]
def _divergence_kernel(
    student_ptr,  # [tokens, row_units · ROW]
    teacher_ptr,  # [tokens, row_units · ROW]
    student_bias_ptr,  # [vocabulary]
    teacher_bias_ptr,  # [vocabulary]
    counted_ptr,  # [tokens]
    loss_ptr,  # [tokens]
    agrees_ptr,  # [tokens]
    vocabulary,
    row_units,
    temperature,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    BACK: tl.constexpr,
    ROW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * (row_units * ROW)
    teacher_ptr += row * (row_units * ROW)
    columns = tl.arange(0, BLOCK)
    whole = vocabulary // BLOCK * BLOCK  # columns in whole blocks
    if MASKED:  # noqa: SIM102 (what is known when it is compiled, and what is not)
        if tl.load(counted_ptr + row) == 0:
            tl.store(loss_ptr + row, 0.0)
            tl.store(agrees_ptr + row, 0.0)
            if GRADIENT:
                clear_row(student_ptr, vocabulary, BLOCK)
            return

    # Base 2 throughout: a number is (logit − the largest logit) · to_base_2. To start from, any logit will do.
    to_base_2 = LOG2_E / temperature
    s_max = _first(student_ptr, student_bias_ptr, STUDENT_BIAS)
    t_max = _first(teacher_ptr, teacher_bias_ptr, TEACHER_BIAS)
    s_place, t_place = 0, 0
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    forward = tl.zeros([BLOCK], tl.float32)
    reverse = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        at = start + columns
        s = load_logits(student_ptr, student_bias_ptr, at, vocabulary, STUDENT_BIAS, False)
        t = load_logits(teacher_ptr, teacher_bias_ptr, at, vocabulary, TEACHER_BIAS, False)
        s_max, s_place, s_sum, t_max, t_place, t_sum, forward, reverse = _add_block(
            s, t, at, vocabulary, to_base_2, s_max, s_place, s_sum, t_max, t_place, t_sum, forward, reverse,
            FORWARD, REVERSE,
        )  # fmt: skip
    if whole < vocabulary:
        at = whole + columns
        s = load_logits(student_ptr, student_bias_ptr, at, vocabulary, STUDENT_BIAS, True)
        t = load_logits(teacher_ptr, teacher_bias_ptr, at, vocabulary, TEACHER_BIAS, True)
        s_max, s_place, s_sum, t_max, t_place, t_sum, forward, reverse = _add_block(
            s, t, at, vocabulary, to_base_2, s_max, s_place, s_sum, t_max, t_place, t_sum, forward, reverse,
            FORWARD, REVERSE,
        )  # fmt: skip

    s_total, t_total = tl.sum(s_sum, axis=0), tl.sum(t_sum, axis=0)
    s_log, t_log = tl.log2(s_total), tl.log2(t_total)
    loss = 0.0
    kl_reverse = 0.0
    if FORWARD:
        loss += tl.sum(forward, axis=0) / t_total - t_log + s_log
    if REVERSE:
        kl_reverse = tl.sum(reverse, axis=0) / s_total - s_log + t_log
        loss += kl_reverse
    share = 0.5 if FORWARD and REVERSE else 1.0
    tl.store(loss_ptr + row, loss * (LN_2 * share) * temperature * temperature)
    tl.store(agrees_ptr + row, tl.where(s_place == t_place, 1.0, 0.0))
    if GRADIENT:
        scale = temperature * share
        if whole < vocabulary:
            at = whole + columns
            s = load_logits(student_ptr, student_bias_ptr, at, vocabulary, STUDENT_BIAS, True)
            t = load_logits(teacher_ptr, teacher_bias_ptr, at, vocabulary, TEACHER_BIAS, True)
            log_q, log_p = (s - s_max) * to_base_2 - s_log, (t - t_max) * to_base_2 - t_log
            gradient = _gradient(log_q, log_p, kl_reverse, FORWARD, REVERSE) * scale
            tl.store(student_ptr + at, gradient.to(student_ptr.dtype.element_ty), mask=at < vocabulary)
        for step in tl.range(0, whole, BLOCK, num_stages=STAGES):
            at = (whole - BLOCK - step if BACK else step) + columns
            s = load_logits(student_ptr, student_bias_ptr, at, vocabulary, STUDENT_BIAS, False)
            t = load_logits(teacher_ptr, teacher_bias_ptr, at, vocabulary, TEACHER_BIAS, False)
            log_q, log_p = (s - s_max) * to_base_2 - s_log, (t - t_max) * to_base_2 - t_log
            gradient = _gradient(log_q, log_p, kl_reverse, FORWARD, REVERSE) * scale
            tl.store(student_ptr + at, gradient.to(student_ptr.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _add_block(
    s, t, at, vocabulary, to_base_2, s_max, s_place, s_sum, t_max, t_place, t_sum, forward, reverse,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The running numbers of both rows, with those of one more block.

    Sums stay spread over the columns of a block until the end. Scaling them to a new largest logit is rare after the
    first blocks, so it is done only where there is one; only a larger one takes the place of the first.
    """
    s_most, t_most = tl.split(tl.max(tl.join(s, t), axis=0))  # at once: the threads wait for each other once
    if (s_most > s_max) | (t_most > t_max):
        s_new, t_new = tl.maximum(s_max, s_most), tl.maximum(t_max, t_most)
        s_step, t_step = (s_max - s_new) * to_base_2, (t_max - t_new) * to_base_2
        if FORWARD:
            forward = (forward + (t_step - s_step) * t_sum) * tl.exp2(t_step)
        if REVERSE:
            reverse = (reverse + (s_step - t_step) * s_sum) * tl.exp2(s_step)
        s_sum *= tl.exp2(s_step)
        t_sum *= tl.exp2(t_step)
        s_place = tl.where(s_most > s_max, tl.min(tl.where(s == s_most, at, vocabulary), axis=0), s_place)
        t_place = tl.where(t_most > t_max, tl.min(tl.where(t == t_most, at, vocabulary), axis=0), t_place)
        s_max, t_max = s_new, t_new
    s, t = (s - s_max) * to_base_2, (t - t_max) * to_base_2
    q, p = tl.exp2(s), tl.exp2(t)
    s_sum += q
    t_sum += p
    if FORWARD:
        forward += p * (t - s)
    if REVERSE:
        reverse += q * (s - t)
    return s_max, s_place, s_sum, t_max, t_place, t_sum, forward, reverse


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(log_q, log_p, kl_reverse, FORWARD: tl.constexpr, REVERSE: tl.constexpr):
    """Of KL(p ‖ q), of KL(q ‖ p) or of their sum, by the student's logits over the temperature; logarithms base 2."""
    q = tl.exp2(log_q)
    gradient = tl.zeros_like(q)
    if FORWARD:
        gradient += q - tl.exp2(log_p)
    if REVERSE:
        gradient += q * (log_q - log_p - kl_reverse) * LN_2
    return gradient


@triton.jit  # type: ignore[untyped-decorator]
def load_logits(logits_ptr, bias_ptr, at, vocabulary, BIAS: tl.constexpr, PARTIAL: tl.constexpr):
    """A row's logits at some columns, in fp32; where PARTIAL, `LOWEST` beyond the vocabulary."""
    if PARTIAL:
        logits = tl.load(logits_ptr + at, mask=at < vocabulary, other=0.0).to(tl.float32)
        if BIAS:
            logits += tl.load(bias_ptr + at, mask=at < vocabulary, other=0.0).to(tl.float32)
        logits = tl.where(at < vocabulary, logits, LOWEST)  # which fp16 does not hold
    else:
        logits = tl.load(logits_ptr + at).to(tl.float32)
        if BIAS:
            logits += tl.load(bias_ptr + at).to(tl.float32)
    return logits


@triton.jit  # type: ignore[untyped-decorator]
def _first(logits_ptr, bias_ptr, BIAS: tl.constexpr):
    first = tl.load(logits_ptr).to(tl.float32)
    if BIAS:
        first += tl.load(bias_ptr).to(tl.float32)
    return first


@triton.jit  # type: ignore[untyped-decorator]
def clear_row(row_ptr, vocabulary, BLOCK: tl.constexpr):
    """Zeros in all of its columns."""
    nothing = tl.zeros([BLOCK], row_ptr.dtype.element_ty)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + at, nothing, mask=at < vocabulary)
