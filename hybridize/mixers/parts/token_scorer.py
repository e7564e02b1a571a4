"""The CNN that says how much a token is worth keeping (arXiv 2510.20787)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT_GAIN = 0.01
"""On the last projection's Kaiming scale. The paper trains from scratch with 1; a pretrained model has keys of any
size, and with a small last projection every logit starts near its bias: everything is kept, as the teacher does."""


class TokenScorer(nn.Module):
    """Dilated convolutions over time, each halving the channels, then a projection to one logit a token and head.

    c_0 = 2 D; layer l: dropout, convolution c_l -> c_{l+1} with zeros on both sides, padding masked, SiLU. The
    convolutions are matrix products over gathered taps, so that all heads run at once with their own weights.

    Args:
        widths: channels c_0, c_1, ...
        kernel, dilation: of every convolution.
        num_scorers: H for one a head, 1 for one that serves all heads.
        dropout: before each convolution, in training.
    """

    def __init__(self, widths: tuple[int, ...], kernel: int, dilation: int, num_scorers: int, dropout: float) -> None:
        super().__init__()
        self.kernel = kernel
        self.dilation = dilation
        self.dropout = dropout
        self.weights = nn.ParameterList(torch.empty(num_scorers, kernel * a, b) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.empty(num_scorers, b) for b in widths[1:])
        self.output_weight = nn.Parameter(torch.empty(num_scorers, widths[-1], 1))
        self.output_bias = nn.Parameter(torch.empty(num_scorers, 1))

    @torch.no_grad()
    def initialise(self, bias: float) -> None:
        """Kaiming-normal weights (ReLU gain), uniform biases, `bias` for the last one."""
        for weight, layer_bias in zip(self.weights, self.biases, strict=True):
            fan_in = weight.shape[1]
            weight.normal_(0.0, (2.0 / fan_in) ** 0.5)
            layer_bias.uniform_(-(fan_in**-0.5), fan_in**-0.5)
        self.output_weight.normal_(0.0, OUTPUT_GAIN * (2.0 / self.output_weight.shape[1]) ** 0.5)
        self.output_bias.fill_(bias)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Scores tokens.

        Args:
            x: [B, T, H, 2 D] keys before RoPE and values, side by side.
            real: [B, T] bool, False for padding, which must not lie between real tokens.

        Returns:
            [B, T, H] logits in float32, whatever the type of x.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        real = real[:, :, None, None]
        x = torch.where(real, x, 0.0)
        num_tokens = x.shape[1]
        reach = self.dilation * (self.kernel - 1) // 2
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.dropout(x, self.dropout, self.training)
            x = F.pad(x, (0, 0, 0, 0, reach, reach))
            taps = [x[:, tap * self.dilation : tap * self.dilation + num_tokens] for tap in range(self.kernel)]
            # Masked before SiLU (SiLU(0) = 0), a padded row equals one whose text starts at the edge.
            x = F.silu(torch.where(real, _project(torch.cat(taps, dim=-1), weight, bias), 0.0))
        # Under autocast this one stays in float32: rounded logits would tie, and ties are decided by age.
        with torch.autocast(x.device.type, enabled=False):
            return _project(x.float(), self.output_weight, self.output_bias).squeeze(-1)


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, T, H, C] by weight [H or 1, C, C'] and bias [H or 1, C'] -> [B, T, H, C']."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if weight.shape[0] == 1:
        return x @ weight[0] + bias
    return torch.einsum("bthc,hcd->bthd", x, weight) + bias
