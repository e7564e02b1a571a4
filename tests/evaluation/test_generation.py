"""The greedy loop and what it is told of a tokenizer's habits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridize.evaluation.generation import CHECK_STEPS, Decoder, greedy, prompt_ids
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap, undo
from tests.evaluation.conftest import VOCABULARY
from tests.evaluation.scripted import Scripted
from tests.tiny import tiny_teacher

MIXERS = (
    {"mixer": "token_eviction", "window_tokens": 8, "budget_tokens": 6},
    {"mixer": "gated_delta_net"},
    {"mixer": "sliding_window", "window_tokens": 7},
    {"mixer": "native_sparse_attention", "block_tokens": 4, "selected_blocks": 3, "window_tokens": 6},
)


@pytest.fixture(params=["plain", "hybrid"])
def model(request: pytest.FixtureRequest) -> Any:
    model = tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=4)
    return model if request.param == "plain" else swap(model, [config_from_dict(dict(m)) for m in MIXERS])


def argmax_loop(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Without a cache: the whole text again for every token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            following = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if following == 2:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("lengths", [(23, 23, 23), (3, 30, 17)], ids=["equal", "padded"])
def test_greedy_equals_an_argmax_loop_without_cache(model: Any, tokenizer: Any, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    assert greedy(model, tokenizer, prompts, 12) == [argmax_loop(model, prompt, 12) for prompt in prompts]


def test_greedy_equals_transformers_generate(model: Any, tokenizer: Any) -> None:
    prompts = [prompt_ids(tokenizer, text) for text in ("the old king", "a quiet river and stone", "trees")]
    for prompt, new in zip(prompts, greedy(model, tokenizer, prompts, 9), strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=2)[
            0, len(prompt) :
        ].tolist()
        assert new == (out[: out.index(2)] if 2 in out else out)


def test_only_unequal_prompts_are_read_with_a_mask(model: Any) -> None:
    masks: list[Any] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    with torch.inference_mode():
        decoder = Decoder(model)
        decoder.read([[3, 4, 5], [6, 7, 8]])
        decoder.step(torch.tensor([3, 4]))
        assert masks == [None, None]
        decoder.read([[3, 4, 5], [6]])
        decoder.step(torch.tensor([3, 4]))
    assert [mask.tolist() for mask in masks[2:]] == [[[1, 1, 1], [0, 0, 1]], [[1, 1, 1, 1], [0, 0, 1, 1]]]


def test_what_follows_the_end_token_is_cut_and_the_loop_stops_soon(tokenizer: Any) -> None:
    model = Scripted(tokenizer, lambda prompt: " 12")
    length = len(tokenizer(" 12")["input_ids"])
    (answer,) = greedy(model, tokenizer, [prompt_ids(tokenizer, "So it is")], 200)
    assert answer == tokenizer(" 12")["input_ids"]
    assert length < len(model.batches) <= length + CHECK_STEPS


def test_no_more_tokens_than_asked_for(tokenizer: Any) -> None:
    model = Scripted(tokenizer, lambda prompt: " and so on" * 9)
    (answer,) = greedy(model, tokenizer, [[5, 6]], 3)
    assert len(answer) == len(model.batches) == 3


def test_a_prompt_loses_the_end_token_that_a_tokenizer_adds(tokenizer: Any) -> None:
    class Ending:
        eos_token_id, eos_token = 2, "</s>"

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], 2]}

    assert prompt_ids(Ending(), "the king") == tokenizer("the king")["input_ids"]


def test_the_teacher_is_whole_again() -> None:
    teacher = tiny_teacher(num_hidden_layers=4)
    tokens = torch.arange(3, 20)[None]
    before = teacher(tokens).logits
    undo(swap(teacher, [config_from_dict(dict(m)) for m in MIXERS]))
    assert torch.equal(teacher(tokens).logits, before)
