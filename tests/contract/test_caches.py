"""What the cache of a hybrid promises, whatever the mixer: it is written in place, and can be put back as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from hybridize.errors import UsageError
from hybridize.mixers.base import MixerState
from hybridize.mixers.parts.position_slots import PositionState
from hybridize.mixers.parts.preallocated import PreallocatedLayer
from tests.contract.settings import CASES, MIXER_NAMES, tiny_hybrid, tiny_tokens

TOKENS = 34  # longer than window + budget of every tiny setting

matrix = pytest.mark.parametrize(("mixer", "family"), CASES, ids=[f"{m}-{f}" for m, f in CASES])
mixers = pytest.mark.parametrize("mixer", MIXER_NAMES)


@torch.no_grad()
def follow(model, cache, tokens, splits, mask=None):
    """Logits of `tokens` in pieces of these sizes, after what the cache holds."""
    pieces, start = [], 0
    for size in splits:
        new = tokens[:, start : start + size]
        seen = None if mask is None else mask[:, : cache.get_seq_length() + size]
        pieces.append(model(new, past_key_values=cache, attention_mask=seen, use_cache=True).logits)
        start += size
    return torch.cat(pieces, dim=1)


def held_tensors(cache):
    """(layer, name) -> tensor."""
    found = {}
    for index, layer in enumerate(cache.layers):
        tensors = layer.tensors if isinstance(layer, MixerState) else {"keys": layer.keys, "values": layer.values}
        found.update({(index, name): x for name, x in tensors.items()})
    return found


def addresses(cache):
    return {name: x.data_ptr() for name, x in held_tensors(cache).items() if x.numel()}


def snapshots(cache):
    return [layer.snapshot() for layer in cache.layers]


def restore(cache, saved):
    for layer, snapshot in zip(cache.layers, saved, strict=True):
        layer.restore(snapshot)


def with_room(model, batch, tokens):
    """A cache in which nothing has to move for so many tokens."""
    cache = DynamicCache(config=model.config)
    follow(model, cache, tiny_tokens(batch, 1), (1,))
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PositionState):
            layer.reserve(model.mixers[index].config.capacity(tokens))
        elif isinstance(layer, PreallocatedLayer):
            layer.reserve(tokens)
    cache.reset()
    return cache


@matrix
def test_no_token_moves_an_address_between_growths(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, 2 * TOKENS)
    cache = with_room(model, 2, 2 * TOKENS)
    follow(model, cache, tokens[:, :4], (4,))
    before = addresses(cache)
    follow(model, cache, tokens[:, 4:], (9, 1, 1, 20, 1, *(1,) * 32))
    assert addresses(cache) == before
    assert cache.get_seq_length() == 2 * TOKENS
    cache.reset()
    follow(model, cache, tokens[:, :30], (29, 1))
    assert addresses(cache) == before


@matrix
def test_room_kept_in_advance_changes_no_logits(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, TOKENS)
    splits = (13, 1, 1, 19)
    plain = follow(model, DynamicCache(config=model.config), tokens, splits)
    roomy = follow(model, with_room(model, 2, 2 * TOKENS), tokens, splits)
    torch.testing.assert_close(roomy, plain, rtol=1e-5, atol=1e-5)


@matrix
def test_beams_change_places_in_the_memory_they_have(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(4, TOKENS)
    cache, order = with_room(model, 4, TOKENS), torch.tensor([2, 2, 0, 3])
    follow(model, cache, tokens[:, :20], (19, 1))
    expected = {name: x[order.to(x.device)].clone() for name, x in held_tensors(cache).items()}
    before = addresses(cache)
    cache.reorder_cache(order.to(tokens.device))
    assert addresses(cache) == before
    for name, x in held_tensors(cache).items():
        assert torch.equal(x, expected[name]), name
    other = DynamicCache(config=model.config)
    follow(model, other, tokens[order.to(tokens.device), :20], (19, 1))
    rest = tokens[:, 20:]
    found, wanted = (follow(model, one, rest, (1, 3, rest.shape[1] - 4)) for one in (cache, other))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@matrix
def test_rows_are_chosen_and_repeated(mixer, family):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(3, TOKENS)
    cache = DynamicCache(config=model.config)
    follow(model, cache, tokens[:, :20], (20,))
    cache.batch_select_indices(torch.tensor([2, 0], device=tokens.device))
    cache.batch_repeat_interleave(2)
    rows = tokens[[2, 2, 0, 0]]
    other = DynamicCache(config=model.config)
    follow(model, other, rows[:, :20], (20,))
    found, wanted = (follow(model, one, rows[:, 20:], (1, 13)) for one in (cache, other))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@matrix
@pytest.mark.parametrize("reserved", [False, True])
def test_a_saved_state_goes_on_bit_for_bit(mixer, family, reserved):
    model, tokens = tiny_hybrid(mixer, family), tiny_tokens(2, TOKENS)
    mask = torch.ones(2, 3 * TOKENS, dtype=torch.long, device=tokens.device)
    mask[1, :6] = 0
    cache = with_room(model, 2, 3 * TOKENS) if reserved else DynamicCache(config=model.config)
    follow(model, cache, tokens[:, :20], (19, 1), mask)
    saved, copies = snapshots(cache), copy.deepcopy(snapshots(cache))
    rest, splits = tokens[:, 20:], (1, 1, 9, 3)
    first = follow(model, cache, rest, splits, mask)
    before = addresses(cache)
    follow(model, cache, tiny_tokens(2, TOKENS, seed=8), (1, TOKENS - 2, 1), mask)
    restore(cache, saved)
    assert cache.get_seq_length() == 20
    assert torch.equal(follow(model, cache, rest, splits, mask), first)
    if reserved or mixer != "native_sparse_attention":  # whose unreserved slots go back to their number, elsewhere
        assert addresses(cache) == before
    for snapshot, as_it_was in zip(saved, copies, strict=True):
        for name, x in as_it_was.tensors.items():
            assert torch.equal(snapshot.tensors[name], x), "no later token changes it"


@mixers
def test_a_saved_state_returns_to_another_number_of_rows(mixer):
    model, tokens = tiny_hybrid(mixer, "llama"), tiny_tokens(2, TOKENS)
    cache = DynamicCache(config=model.config)
    follow(model, cache, tokens[:, :20], (20,))
    saved = snapshots(cache)
    first = follow(model, cache, tokens[:, 20:], (1, 13))
    cache.batch_repeat_interleave(3)
    restore(cache, saved)
    assert torch.equal(follow(model, cache, tokens[:, 20:], (1, 13)), first)


@mixers
def test_what_inference_mode_made_may_be_used_outside_of_it(mixer):
    model, tokens = tiny_hybrid(mixer, "llama"), tiny_tokens(2, TOKENS)
    cache, other = (DynamicCache(config=model.config) for _ in range(2))
    order = torch.tensor([1, 0], device=tokens.device)
    with torch.inference_mode():
        follow(model, cache, tokens[:, :20], (20,))
        saved = snapshots(cache)
    cache.reorder_cache(order)
    follow(model, cache, tokens[:, 20:22], (1, 1))
    restore(cache, saved)
    found = follow(model, cache, tokens[:, 20:], (1, 13))
    follow(model, other, tokens[:, :20], (20,))
    torch.testing.assert_close(found, follow(model, other, tokens[:, 20:], (1, 13)), rtol=1e-5, atol=1e-5)


@mixers
def test_a_cache_may_be_offloaded_and_copied(mixer):
    model, tokens = tiny_hybrid(mixer, "llama"), tiny_tokens(2, TOKENS)
    cache = DynamicCache(config=model.config)
    follow(model, cache, tokens[:, :20], (19, 1))
    twin = copy.deepcopy(cache)
    expected = follow(model, cache, tokens[:, 20:], (1, 13))
    for layer in twin.layers:
        layer.offload()
        layer.prefetch()
    torch.testing.assert_close(follow(model, twin, tokens[:, 20:], (1, 13)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixer", [name for name in MIXER_NAMES if name != "full_attention"])
def test_what_is_evicted_is_not_taken_back_but_a_saved_state_is_named(mixer):
    model = tiny_hybrid(mixer, "llama")
    cache = DynamicCache(config=model.config)
    follow(model, cache, tiny_tokens(1, 12), (12,))
    cache.layers[1].crop(0)
    with pytest.raises(UsageError, match="rolled back") as refused:
        cache.layers[1].crop(-1)
    assert "snapshot" in str(refused.value.hint)
