"""The teacher's most probable next tokens, and how they are stored.

Of a position there are the ids of the k most probable next tokens (two bytes each where the vocabulary has at most
65,536, else four), their log-probabilities relative to the first one's in fp16, and in fp32 the logarithm of what they
have together: 4 k + 4 bytes (6 k + 4), 260 for k = 64. Reading scales the probabilities to that sum, so that the mass
of all other tokens is exact; 1 − Σ p of rounded probabilities may be anything where it is small.

Rounding x = log p − log p₁ by up to ε = 2⁻¹¹ of itself leaves KL(p ‖ p̃) <= ε² E[x²] / 2 nats up to higher orders of ε
between what the teacher said and what is stored: at most 2e-7 for SmolLM2-135M on English text at k = 64, where fp16
log-probabilities without their sum had up to 1e-3 and bf16 5e-3. Because KL(p̃ ‖ q) − KL(p ‖ q) is
Σ (p̃ − p) log(p / q) + KL(p̃ ‖ p), the loss moves by at most about √(2 KL(p ‖ p̃)) max |log(p / q)|; measured: 1e-6 in the
mean over tokens, 3e-4 at one token, of losses of 0.03 to 0.3. What it lacks of the divergence over the whole vocabulary
is the part within the other tokens, which counts as one (data processing inequality): a matter of k, not of storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""Tensors [rows, T, ...] by name, as they are stored."""
TOP_K_NAMES = ("ids", "relative", "log_mass")
_SMALL_VOCABULARY = 2**16


@dataclass(frozen=True)
class TopK:
    """The teacher's k most probable next tokens, most probable first.

    Attributes:
        ids: [B, T, k] int32; [1, B·T, k] of packed documents.
        log_probs: the same shape, fp32, natural logarithms. The other tokens have 1 − Σ exp(log_probs) together.
    """

    ids: Tensor
    log_probs: Tensor


def encode_top_k(ids: Tensor, log_probs: Tensor, vocabulary: int) -> Rows:
    """What is stored of targets [..., k] that are sorted by probability."""
    relative = (log_probs - log_probs[..., :1]).clamp_min(torch.finfo(torch.float16).min)
    return {
        "ids": ids.to(torch.int16 if vocabulary <= _SMALL_VOCABULARY else torch.int32),  # bits; the sign is undone
        "relative": relative.half(),
        "log_mass": log_probs.float().logsumexp(-1).clamp_max(0.0),
    }


def decode_top_k(rows: Mapping[str, Tensor]) -> TopK:
    """The targets that `encode_top_k` stored."""
    ids, relative = rows["ids"], rows["relative"].float()
    whole = ids.int() & (_SMALL_VOCABULARY - 1) if ids.dtype == torch.int16 else ids
    log_probs = relative - relative.logsumexp(-1, keepdim=True) + rows["log_mass"].unsqueeze(-1)
    return TopK(whole, log_probs)
