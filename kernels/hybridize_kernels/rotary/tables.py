"""Cosines and sines that a decoding step applies itself: what is asked of them."""

from torch import Tensor

from ..dispatch import check_shape


def check_tables(op: str, rotary: tuple[Tensor, Tensor] | None, batch: int, time: int, head_size: int) -> None:
    """Raise ValueError unless rotary is None, or cos and sin `[B or 1, T, R]`, R even and at most the head size."""
    if rotary is None:
        return
    cos, sin = rotary
    size = cos.shape[-1] if cos.ndim == 3 else 0
    if size % 2 or not 0 < size <= head_size or cos.shape[1] != time or cos.shape[0] not in (1, batch):
        raise ValueError(
            f"{op}: cos has shape {list(cos.shape)}, expected [{batch} or 1, {time}, even and at most {head_size}]"
        )
    check_shape(op, "sin", sin, tuple(cos.shape))
