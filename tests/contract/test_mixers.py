"""What every mixer promises, on every family: what a new one passes before anything else is asked of it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hybridize.errors import UsageError
from hybridize.mixers.base import MixerState
from hybridize.mixers.parts.preallocated import SPARE_FRACTION, SPARE_TOKENS
from hybridize.model.swap import mixers, undo
from tests.contract.settings import CASES, DEVICES, MIXER_NAMES, tiny_hybrid, tiny_mixer, tiny_teacher, tiny_tokens

TOKENS = 34  # longer than window + budget of every tiny setting
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

matrix = pytest.mark.parametrize(("mixer", "family"), CASES, ids=[f"{m}-{f}" for m, f in CASES])


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, use_cache=False, **kwargs).logits


def cached_logits(model, tokens, splits, attention_mask=None):
    """Logits of `tokens` fed in pieces of the given sizes through one cache."""
    cache, pieces, start = DynamicCache(config=model.config), [], 0
    for size in splits:
        end = start + size
        mask = None if attention_mask is None else attention_mask[:, :end]
        position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        with torch.no_grad():
            out = model(
                tokens[:, start:end],
                past_key_values=cache,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=True,
            )
        pieces.append(out.logits)
        start = end
    return torch.cat(pieces, dim=1), cache


def left_padded(tokens, padding):
    """The rows of `tokens`, each with its own number of padding columns in front."""
    width = tokens.shape[1] + max(padding)
    out = tokens.new_zeros(len(padding), width)
    mask = torch.zeros_like(out)
    for row, pad in enumerate(padding):
        length = width - pad
        out[row, pad:] = (
            tokens[row, :length]
            if length <= tokens.shape[1]
            else torch.nn.functional.pad(tokens[row], (0, length - tokens.shape[1]), value=5)
        )
        mask[row, pad:] = 1
    return out, mask


@matrix
def test_no_output_depends_on_later_tokens(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(1, TOKENS)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 7) % 90 + 3
    before, after = logits(model, tokens), logits(model, changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


@matrix
@pytest.mark.parametrize("splits", [(1,) * TOKENS, (TOKENS,), (13, 1, 1, 19), (3, 30, 1)], ids=str)
def test_cached_pieces_agree_with_the_whole(mixer, family, splits):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, TOKENS)
    pieces, _ = cached_logits(model, tokens, splits)
    torch.testing.assert_close(pieces, logits(model, tokens), **TOLERANCE)


@matrix
def test_left_padding_changes_nothing(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, TOKENS)
    padded, mask = left_padded(tokens, (11, 0))
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, padded, attention_mask=mask, position_ids=position_ids)
    alone = logits(model, padded[:1, 11:])
    torch.testing.assert_close(whole[:1, 11:], alone, **TOLERANCE)
    torch.testing.assert_close(whole[1:], logits(model, padded[1:]), **TOLERANCE)
    pieces, _ = cached_logits(model, padded, (14, 1, 1, padded.shape[1] - 16), mask)
    torch.testing.assert_close(pieces[:1, 11:], alone, **TOLERANCE)


@matrix
def test_rows_do_not_depend_on_their_batch(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(3, TOKENS)
    together = logits(model, tokens)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], logits(model, tokens[row : row + 1]), **TOLERANCE)


@matrix
def test_greedy_generation_of_a_padded_batch_is_that_of_each_row(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, 20)
    padded, mask = left_padded(tokens, (7, 0))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = model.generate(padded, attention_mask=mask, **options)
    for row, pad in enumerate((7, 0)):
        prompt = padded[row : row + 1, pad:]
        single = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert batch[row, padded.shape[1] :].tolist() == single[0, prompt.shape[1] :].tolist()


@matrix
def test_beams_with_a_cache_are_beams_without(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, 15)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    with_cache = model.generate(tokens, attention_mask=mask, use_cache=True, **options)
    without = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert with_cache.tolist() == without.tolist()


@matrix
def test_a_conversation_continues_from_its_cache(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(1, TOKENS)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = tokens[:, :17]
    turn = model.generate(first, attention_mask=torch.ones_like(first), return_dict_in_generate=True, **options)
    history = torch.cat([turn.sequences, tokens[:, 17:25]], dim=1)
    mask = torch.ones_like(history)
    continued = model.generate(history, attention_mask=mask, past_key_values=turn.past_key_values, **options)
    assert continued.tolist() == model.generate(history, attention_mask=mask, **options).tolist()


@matrix
def test_gradient_reaches_every_parameter_of_the_mixer(mixer, family):
    model = tiny_hybrid(mixer, family).train()
    model.zero_grad()
    out = model(tiny_tokens(2, TOKENS))
    loss = out.logits.float().log_softmax(-1).square().mean()
    for module in model.mixers.values():
        loss = loss + sum(module.auxiliary.values())
    loss.backward()
    for index, module in model.mixers.items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"layer {index}: {name} got no gradient"
            assert torch.isfinite(parameter.grad).all(), f"layer {index}: {name}"
            assert parameter.grad.abs().sum() > 0, f"layer {index}: {name} got a zero gradient"


@matrix
def test_no_gradient_reaches_frozen_parameters(mixer, family):
    model = tiny_hybrid(mixer, family).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("hz_new" in name)
    if mixer in ("full_attention", "sliding_window"):
        assert not any(p.requires_grad for p in model.parameters())
        return
    model(tiny_tokens(1, TOKENS)).logits.sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "hz_new" not in name)


@matrix
def test_state_bytes_are_what_the_plan_promises(mixer, family):
    model, config = tiny_hybrid(mixer, family), tiny_mixer(mixer)
    geometry = model.hybrid_adapter.geometry(model.config.to_dict())
    for length in (3, TOKENS):
        _, cache = cached_logits(model, tiny_tokens(2, length), (length,))
        promised = config.state_bytes(geometry, length, element_bytes=4)
        layer = cache.layers[1]
        if isinstance(layer, MixerState):
            held = layer.bytes_per_sequence()
        else:
            held = (layer.keys.numel() + layer.values.numel()) // 2 * 4
            # The room for it is larger by a bounded part, which the plan does not count.
            assert length <= layer.capacity <= length + max(SPARE_TOKENS, length // SPARE_FRACTION)
        assert held == promised


@matrix
def test_saved_and_loaded_hybrids_give_the_same_logits(mixer, family, tmp_path):
    from hybridize.model.convert import save_model
    from hybridize.model.load import load_hybrid

    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, TOKENS)
    save_model(model, tmp_path)
    again = load_hybrid(tmp_path, dtype=torch.float32, complete=False).to(DEVICES["device"])
    assert type(again) is type(model)
    found, expected = logits(again, tokens), logits(model, tokens)
    # On CUDA a product's kernel is chosen by how its operands lie in memory too.
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if found.device.type == "cpu" else 1e-5)


@matrix
def test_a_swap_undone_is_the_teacher_bit_for_bit(mixer, family):
    tokens = tiny_tokens(2, TOKENS)
    expected = logits(tiny_teacher(family), tokens)
    restored = undo(tiny_hybrid(mixer, family))
    assert type(restored) is type(tiny_teacher(family))
    assert torch.equal(logits(restored, tokens), expected)


@pytest.mark.parametrize("mixer", [name for name in MIXER_NAMES if name != "full_attention"])
def test_every_layer_may_be_swapped(mixer):
    model, tokens = tiny_hybrid(mixer, "llama", layers=(0, 1, 2, 3)), tiny_tokens(2, TOKENS)
    pieces, _ = cached_logits(model, tokens, (10, 1, 23))
    torch.testing.assert_close(pieces, logits(model, tokens), **TOLERANCE)


@pytest.mark.parametrize("mixer", [name for name in MIXER_NAMES if name != "full_attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_stays_near_fp32(mixer, dtype):
    tokens = tiny_tokens(2, TOKENS)
    exact = logits(tiny_hybrid(mixer, "llama"), tokens)
    model = tiny_hybrid(mixer, "llama").to(dtype)
    out = logits(model, tokens)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    # A discrete choice (a kept token, a block) may differ in few rows: compare the bulk.
    error = (out.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.median() < 0.1


@pytest.mark.parametrize("mixer", [name for name in MIXER_NAMES if name != "full_attention"])
def test_what_cannot_work_is_refused(mixer):
    model, tokens = tiny_hybrid(mixer, "llama"), tiny_tokens(1, 12)
    with pytest.raises(UsageError, match="static cache"):
        model.generate(tokens, max_new_tokens=3, cache_implementation="static", pad_token_id=0)
    with pytest.raises(ValueError, match=r"stateful|assisted|prompt_lookup"):
        model.generate(tokens, max_new_tokens=3, prompt_lookup_num_tokens=2, pad_token_id=0)
    with pytest.raises(UsageError, match="2-D attention mask"):
        model(tokens, attention_mask=torch.ones(1, 1, 12, 12, device=tokens.device))
    teacher = tiny_teacher("llama")
    cache = DynamicCache(config=teacher.config)
    with torch.no_grad():
        teacher(tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(UsageError, match="another model"):
        model(tokens, past_key_values=cache, attention_mask=torch.ones(1, 24, device=tokens.device))


@pytest.mark.parametrize("mixer", [name for name in MIXER_NAMES if name != "full_attention"])
def test_gradient_checkpointing_gives_the_same_gradients(mixer):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_hybrid(mixer, "llama").train()
        for _, module in mixers(model):  # dropout draws would differ between the two runs
            for part in module.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(tiny_tokens(2, TOKENS)).logits.square().mean()
        loss = loss + sum(sum(m.auxiliary.values()) for _, m in mixers(model))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixer", [name for name in MIXER_NAMES if name != "full_attention"])
def test_a_reset_state_is_a_new_one(mixer):
    model, tokens = tiny_hybrid(mixer, "llama"), tiny_tokens(2, TOKENS)
    _, cache = cached_logits(model, tokens, (TOKENS,))
    state = cache.layers[1]
    state.reset()
    fresh = model.mixers[1].new_state(2, tokens.device, torch.float32)
    assert state.get_seq_length() == 0
    assert state.tensors.keys() == fresh.tensors.keys()
    for name, tensor in fresh.tensors.items():
        assert torch.equal(state[name], tensor), name
