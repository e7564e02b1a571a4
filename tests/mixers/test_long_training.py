"""A token-eviction layer of a real model's size trains on long texts, in memory that grows as they do."""

from __future__ import annotations

import pytest
import torch

from hybridize.mixers.configs.token_eviction import TokenEvictionConfig
from tests.mixers.one_layer import OneLayer

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


def step_bytes(layer: OneLayer, tokens: int) -> int:
    """The most memory of a step, forward and back, beside the weights and the input."""
    x = torch.randn(1, tokens, layer.geometry.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cosine_sine = layer.rope(x, torch.arange(tokens, device="cuda")[None])
    direction = torch.randn_like(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = layer.mixer(x, cosine_sine)
        loss = (out * direction).sum() + layer.mixer.auxiliary["eviction_budget"]
    loss.backward()
    taken = torch.cuda.max_memory_allocated() - before
    gradients = [x.grad, *(parameter.grad for parameter in layer.mixer.new.parameters())]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)
    layer.mixer.zero_grad()
    return taken


@pytest.mark.gpu
def test_a_layer_trains_on_128k_tokens_in_memory_linear_in_them() -> None:
    config = TokenEvictionConfig(window_tokens=512, budget_tokens=512)
    layer = OneLayer(config, dtype=torch.bfloat16, **LLAMA_8B)
    layer.mixer.new.float()
    layer.disturb()  # about half of all tokens apply, so that the cap binds
    layer.mixer.to("cuda").train()
    for projection in (layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj, layer.mixer.o_proj):
        torch.nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    layer.model.model.rotary_emb.to("cuda")
    step_bytes(layer, 4096)  # gradients and what is kept between steps
    sizes = {tokens: step_bytes(layer, tokens) for tokens in (32768, 65536, 131072)}
    for tokens, size in sizes.items():
        print(f"{tokens} tokens: {size / 2**30:.2f} GiB, {size / tokens / 1024:.1f} KiB a token")
    assert sizes[131072] <= 1.02 * 2 * sizes[65536]
    assert sizes[65536] <= 1.02 * 2 * sizes[32768]
    assert sizes[131072] < 40 * 2**30
