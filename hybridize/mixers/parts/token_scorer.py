"""The CNN that says how much a token is worth keeping (arXiv 2510.20787)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from hybridize_kernels import token_scorer, token_scorer_step

OUTPUT_GAIN = 0.01
"""On the last projection's Kaiming scale. The paper trains from scratch with 1; a pretrained model has keys of any
size, and with a small last projection every logit starts near its bias: everything is kept, as the teacher does."""


class TokenScorer(nn.Module):
    """Dilated convolutions over time, each halving the channels, then a projection to one logit a token and head.

    c_0 = 2 D; layer l: dropout, convolution c_l -> c_{l+1} with zeros on both sides, padding masked, SiLU.
    The mathematics is the op `token_scorer`; this module holds its parameters.

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

    @property
    def margin_tokens(self) -> int:
        """m: the logit of token j depends on the tokens j - m .. j + m."""
        return len(self.weights) * (self._stored // 2)

    @property
    def history_width(self) -> int:
        """Float32 numbers that streaming keeps for a row and head: every convolution's last inputs."""
        inputs: int = sum(weight.shape[1] for weight in self.weights) // self.kernel
        return self._stored * inputs

    @property
    def _stored(self) -> int:
        return (self.kernel - 1) * self.dilation

    def forward(self, k: Tensor, v: Tensor, real: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Scores tokens.

        In evaluation the products are those of float32, since prefill and decode must take the same decisions; in
        training under autocast they are autocast's.

        Args:
            k, v: [B, T, H, D] keys before RoPE and values.
            real: [B, T] bool, False for padding, which must not lie between real tokens; None: there is none.
            cu_seqlens: [N + 1], the bounds of documents of one row that are scored each by itself; None: one text a
                row.

        Returns:
            [B, T, H] logits in float32, whatever the type of k and v.
        """
        device = k.device.type
        mixed = self.training and torch.is_autocast_enabled(device)
        return token_scorer(
            k,
            v,
            tuple(self.weights),
            tuple(self.biases),
            self.output_weight,
            self.output_bias,
            real,
            dilation=self.dilation,
            dropout=self.dropout if self.training else 0.0,
            compute_dtype=torch.get_autocast_dtype(device) if mixed else None,
            cu_seqlens=cu_seqlens,
        )

    def extend(self, k: Tensor, v: Tensor, history: Tensor, num_new: Tensor, num_before: Tensor) -> Tensor:
        """Scores that further tokens complete, equal to those of `forward` on the whole text. No gradient.

        Args:
            k, v: [B, T, H, D]; the first num_new columns of a row are its tokens, the others are ignored.
            history: [B, H, history_width] float32, written in place; zero before the first token.
            num_new: [B] int. num_before: [B] int, tokens seen before this call.

        Returns:
            [B, T, H] logits in float32; column t < num_new is that of token num_before + t - margin_tokens of the
            text, and means nothing where that is negative.
        """
        return token_scorer_step(
            k,
            v,
            history,
            num_new,
            num_before,
            tuple(self.weights),
            tuple(self.biases),
            self.output_weight,
            self.output_bias,
            dilation=self.dilation,
        )
