"""Under autocast a kernel gets queries, keys and values of one dtype, whatever norms the family has between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import mixers, swap
from tests.tiny import tiny_teacher, tiny_tokens

MIXERS = ("sliding_window", "token_eviction", "gated_delta_net", "native_sparse_attention")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_queries_keys_and_values_have_one_dtype_under_autocast(family: str) -> None:
    teacher = tiny_teacher(family, num_hidden_layers=len(MIXERS))
    model = swap(teacher, [config_from_dict({"mixer": name}) for name in MIXERS])
    seen: list[set[torch.dtype]] = []
    for _, mixer in mixers(model):

        def watched(q: Tensor, k: Tensor, v: Tensor, *args: Any, mix: Any = mixer.mix) -> Any:
            seen.append({q.dtype, k.dtype, v.dtype})
            return mix(q, k, v, *args)

        mixer.mix = watched  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(tiny_tokens(), use_cache=False)
    assert seen == [{torch.bfloat16}] * len(MIXERS)
