"""Settings under which a hybrid must be its teacher."""

from __future__ import annotations

import pytest
import torch

from hybridize.mixers.configs.full_attention import FullAttentionConfig
from hybridize.mixers.registry import config_class
from hybridize.model.swap import swap
from tests.contract.settings import tiny_teacher, tiny_tokens
from tests.tiny import FAMILY_NAMES

TOKENS = 40
families = pytest.mark.parametrize("family", FAMILY_NAMES)


def logits(model, tokens=None):
    with torch.no_grad():
        return model(tiny_tokens(2, TOKENS) if tokens is None else tokens, use_cache=False).logits


def all_layers(family, config):
    teacher = tiny_teacher(family)
    return swap(teacher, [config] * teacher.config.num_hidden_layers)


def open_scorers(model):
    """Makes every scorer keep every token by a wide margin."""
    with torch.no_grad():
        for mixer in model.mixers.values():
            parameters = dict(mixer.new.named_parameters())
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    parameter.zero_()
                if name.endswith("bias"):
                    parameter.fill_(5.0)
    return model


@families
def test_zero_layers_converted_is_bit_equal_to_the_teacher(family):
    assert torch.equal(logits(all_layers(family, FullAttentionConfig())), logits(tiny_teacher(family)))


@families
@pytest.mark.parametrize("window", [TOKENS, TOKENS + 10])
def test_a_window_as_long_as_the_text_is_the_teacher(family, window):
    hybrid = all_layers(family, config_class("sliding_window")(window_tokens=window, sink_tokens=0))
    torch.testing.assert_close(logits(hybrid), logits(tiny_teacher(family)), rtol=1e-4, atol=1e-4)


@families
def test_a_window_one_short_of_the_text_is_not(family):
    hybrid = all_layers(family, config_class("sliding_window")(window_tokens=TOKENS - 1, sink_tokens=0))
    difference = (logits(hybrid) - logits(tiny_teacher(family))).abs()
    assert difference[:, :-1].max() < 1e-4
    assert difference[:, -1].max() > 1e-3


@families
def test_eviction_that_retains_everything_is_the_teacher(family):
    config = config_class("token_eviction")(window_tokens=8, sink_tokens=1, budget_tokens=TOKENS)
    hybrid = open_scorers(all_layers(family, config))
    torch.testing.assert_close(logits(hybrid), logits(tiny_teacher(family)), rtol=1e-4, atol=1e-4)


@families
def test_eviction_with_a_binding_cap_is_not(family):
    config = config_class("token_eviction")(window_tokens=8, sink_tokens=1, budget_tokens=4)
    hybrid = open_scorers(all_layers(family, config))
    assert (logits(hybrid) - logits(tiny_teacher(family))).abs().max() > 1e-3


@families
def test_nsa_with_every_block_and_the_other_branches_shut_is_the_teacher(family):
    config = config_class("native_sparse_attention")(block_tokens=4, selected_blocks=TOKENS // 4, window_tokens=5)
    hybrid = all_layers(family, config)
    with torch.no_grad():
        for mixer in hybrid.mixers.values():
            for name, parameter in mixer.new.named_parameters():
                parameter.zero_()
                if name.endswith("bias"):
                    # [HQ * 3] in the order compressed, selected, window; through a sigmoid.
                    parameter.view(-1, 3)[:] = torch.tensor([-40.0, 40.0, -40.0])
    torch.testing.assert_close(logits(hybrid), logits(tiny_teacher(family)), rtol=1e-4, atol=1e-4)


@families
def test_nsa_below_its_dense_length_is_the_teacher(family):
    config = config_class("native_sparse_attention")(
        block_tokens=4, selected_blocks=3, window_tokens=5, dense_below=TOKENS
    )
    torch.testing.assert_close(logits(all_layers(family, config)), logits(tiny_teacher(family)), rtol=1e-4, atol=1e-4)
