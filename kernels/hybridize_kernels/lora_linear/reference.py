"""Linear layers with low-rank adapters, as the paper writes them."""

from collections.abc import Sequence

from torch import Tensor

from .eager import LoraProjection


def lora_linear(
    x: Tensor, projections: Sequence[LoraProjection], *, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """See `hybridize_kernels.lora_linear`."""
    outputs = []
    for weight, bias, down, up, scale in projections:
        y = x @ weight.to(x.dtype).T
        if down is not None and up is not None:
            y = y + scale * (x @ down.to(x.dtype).T) @ up.to(x.dtype).T
        if bias is not None:
            y = y + bias.to(x.dtype)
        outputs.append(y if residual is None else y + residual)
    return tuple(outputs)
