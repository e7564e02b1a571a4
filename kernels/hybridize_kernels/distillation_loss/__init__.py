"""KL divergence between student and teacher, straight from hidden states, in chunks of tokens."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..dispatch import Implementation, check_shape, choose, untraced
from .eager import distillation_loss as _eager
from .eager import top_k_distillation_loss as _top_k_eager
from .reference import distillation_loss as _reference
from .targets import top_k_targets as _top_k_targets
from .top_k_reference import top_k_distillation_loss as _top_k_reference

DIRECTIONS = ("forward", "reverse", "mixed")
MAX_KERNEL_K = 1024  # of a row, held whole in a tile

__all__ = ["distillation_loss", "top_k_distillation_loss", "top_k_targets"]

Loss = tuple[Tensor, Tensor]


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse", "mixed"] = "forward",
    chunk_tokens: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> Loss:
    """Mean KL divergence of the two next-token distributions, times temperature², and their top-1 agreement.

    forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), mixed the mean of both.

    Args:
        student_hidden, teacher_hidden: `[N, d]` or `[B, T, d]`; the two may differ in d.
        student_head, teacher_head: `[vocabulary, d]`. student_bias, teacher_bias: `[vocabulary]`.
        mask: bool `[N]` or `[B, T]`, the tokens that count; all unless given.
        chunk_tokens: tokens whose logits exist at one time; as many as the device does fast unless given.

    Returns:
        The loss (a scalar, fp32 or fp64; 0 when no token counts), with gradient to the student's tensors only, and the
        share of counted tokens on which both put the same token first (a scalar without gradient).

    Raises:
        ValueError: shapes do not fit, the temperature is not positive, or the direction is unknown.

    Source: Hinton et al., https://arxiv.org/abs/1503.02531 (temperature²); reverse: https://arxiv.org/abs/2306.08543.
    """
    op = "distillation_loss"
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"{op}: student_hidden {list(student_hidden.shape)} and teacher_hidden {list(teacher_hidden.shape)} "
            "differ in their tokens"
        )
    vocabulary = student_head.shape[0]
    check_shape(op, "student_head", student_head, (vocabulary, student_hidden.shape[-1]))
    check_shape(op, "teacher_head", teacher_head, (vocabulary, teacher_hidden.shape[-1]))
    _check_others(
        op, student_hidden, vocabulary, mask, chunk_tokens, student_bias=student_bias, teacher_bias=teacher_bias
    )
    if direction not in DIRECTIONS:
        raise ValueError(f"{op}: unknown direction {direction!r}: choose one of {', '.join(DIRECTIONS)}")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}, expected a positive number")
    form = _form(
        op, vocabulary > 0, student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias
    )
    run: Callable[..., Loss] = _reference if form == "reference" else _eager
    if form == "triton":
        from .kernel import distillation_loss as kernel  # imports Triton, which need not be there

        run = untraced(kernel)
    return run(
        student_hidden,
        teacher_hidden,
        student_head,
        teacher_head,
        mask=mask,
        temperature=temperature,
        direction=direction,
        chunk_tokens=chunk_tokens,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
    )


def top_k_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    top_ids: Tensor,
    top_log_probs: Tensor,
    *,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    student_bias: Tensor | None = None,
) -> Loss:
    """Mean KL(teacher ‖ student) of a teacher kept as its k most probable tokens, and their top-1 agreement.

    The distributions are over k + 1 buckets: each of the k tokens, and all the others as one. With k the whole
    vocabulary this is the divergence itself; otherwise it is never more than that.

    Args:
        student_hidden: `[N, d]` or `[B, T, d]`. student_head: `[vocabulary, d]`. student_bias: `[vocabulary]`.
        top_ids: int32 or int64 `[N, k]` or `[B, T, k]`, distinct in a row, the most probable one first.
        top_log_probs: natural logarithms of their probabilities, of the same shape in any float dtype. What they leave
            of 1 is the rest's; where rounding takes their sum above 1, or there is no rest, they are divided by it.
        mask: bool `[N]` or `[B, T]`, the tokens that count; all unless given.
        chunk_tokens: tokens whose logits exist at one time; as many as the device does fast unless given.

    Returns:
        The loss (a scalar, fp32 or fp64; 0 when no token counts), with gradient to the student's tensors, and the share
        of counted tokens on which the student puts `top_ids[..., 0]` first (a scalar without gradient).

    Raises:
        ValueError: shapes do not fit.
    """
    op = "top_k_distillation_loss"
    vocabulary, k = student_head.shape[0], top_ids.shape[-1]
    check_shape(op, "student_head", student_head, (vocabulary, student_hidden.shape[-1]))
    check_shape(op, "top_ids", top_ids, (*student_hidden.shape[:-1], k))
    check_shape(op, "top_log_probs", top_log_probs, tuple(top_ids.shape))
    if not 1 <= k <= vocabulary:
        raise ValueError(f"{op}: top_ids has k = {k}, expected 1 to the vocabulary's {vocabulary}")
    _check_others(op, student_hidden, vocabulary, mask, chunk_tokens, student_bias=student_bias)
    form = _form(op, k <= MAX_KERNEL_K, student_hidden, student_head, student_bias)
    run: Callable[..., Loss] = _top_k_reference if form == "reference" else _top_k_eager
    if form == "triton":
        from .top_k_kernel import top_k_distillation_loss as kernel  # imports Triton, which need not be there

        run = untraced(kernel)
    return run(
        student_hidden,
        student_head,
        top_ids,
        top_log_probs,
        mask=mask,
        chunk_tokens=chunk_tokens,
        student_bias=student_bias,
    )


def top_k_targets(
    hidden: Tensor, head: Tensor, k: int, *, bias: Tensor | None = None, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """What `top_k_distillation_loss` needs of a teacher: its k most probable tokens, without gradient.

    Args:
        hidden: `[N, d]` or `[B, T, d]`. head: `[vocabulary, d]`. bias: `[vocabulary]`.
        k: 1 to the vocabulary.
        chunk_tokens: tokens whose logits exist at one time; about 2²⁶ logits unless given.

    Returns:
        Ids int32 `[..., k]`, the most probable one first and equal ones by id, and their natural log-probabilities fp32
        `[..., k]`.

    Raises:
        ValueError: shapes do not fit.
    """
    op = "top_k_targets"
    vocabulary = head.shape[0]
    check_shape(op, "head", head, (vocabulary, hidden.shape[-1]))
    if not 1 <= k <= vocabulary:
        raise ValueError(f"{op}: k is {k}, expected 1 to the vocabulary's {vocabulary}")
    _check_others(op, hidden, vocabulary, None, chunk_tokens, bias=bias)
    return _top_k_targets(hidden, head, k, bias=bias, chunk_tokens=chunk_tokens)


def _check_others(
    op: str, hidden: Tensor, vocabulary: int, mask: Tensor | None, chunk_tokens: int | None, **biases: Tensor | None
) -> None:
    for name, bias in biases.items():
        if bias is not None:
            check_shape(op, name, bias, (vocabulary,))
    if mask is not None:
        check_shape(op, "mask", mask, tuple(hidden.shape[:-1]))
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{op}: chunk_tokens is {chunk_tokens}, expected at least 1")


def _form(op: str, fits: bool, *tensors: Tensor | None) -> Implementation:
    """The kernels sum in fp32."""
    fits = fits and all(tensor is None or tensor.dtype != torch.float64 for tensor in tensors)
    return choose(op, *tensors, has_kernel=True, kernel_fits=fits, kernel_has_gradient=True)
