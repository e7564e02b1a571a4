"""KL divergence between student and teacher, straight from hidden states, in chunks of tokens."""

from typing import Literal

from torch import Tensor

from ..dispatch import check_shape, choose
from .eager import distillation_loss as _eager
from .reference import distillation_loss as _reference

DIRECTIONS = ("forward", "reverse", "mixed")

__all__ = ["distillation_loss"]


def distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse", "mixed"] = "forward",
    chunk_tokens: int = 1024,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean KL divergence of the two next-token distributions, times temperature², and their top-1 agreement.

    forward is KL(teacher ‖ student), reverse KL(student ‖ teacher), mixed the mean of both.

    Args:
        student_hidden, teacher_hidden: `[N, d]` or `[B, T, d]`; the two may differ in d.
        student_head, teacher_head: `[vocabulary, d]`. student_bias, teacher_bias: `[vocabulary]`.
        mask: bool `[N]` or `[B, T]`, the tokens that count; all unless given.
        chunk_tokens: tokens whose logits exist at one time.

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
    for name, bias in (("student_bias", student_bias), ("teacher_bias", teacher_bias)):
        if bias is not None:
            check_shape(op, name, bias, (vocabulary,))
    if mask is not None:
        check_shape(op, "mask", mask, tuple(student_hidden.shape[:-1]))
    if direction not in DIRECTIONS:
        raise ValueError(f"{op}: unknown direction {direction!r}: choose one of {', '.join(DIRECTIONS)}")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}, expected a positive number")
    if chunk_tokens < 1:
        raise ValueError(f"{op}: chunk_tokens is {chunk_tokens}, expected at least 1")
    run = _reference if choose(op, student_hidden, teacher_hidden) == "reference" else _eager
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
