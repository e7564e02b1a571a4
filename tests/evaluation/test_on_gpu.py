"""The fast way on a GPU (batches, kernels, caches) finds what the slow one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybridize.evaluation.asking import answers, target_shares
from hybridize.evaluation.generation import greedy
from hybridize.evaluation.items import Item
from hybridize.mixers.registry import config_from_dict
from hybridize.model.swap import swap
from hybridize.progress import SILENT
from tests.evaluation.conftest import VOCABULARY
from tests.tiny import tiny_teacher

pytestmark = pytest.mark.gpu

MIXERS = (
    {"mixer": "token_eviction", "window_tokens": 64, "budget_tokens": 32},
    {"mixer": "gated_delta_net"},
    {"mixer": "sliding_window", "window_tokens": 48},
    {"mixer": "native_sparse_attention", "block_tokens": 16, "selected_blocks": 3, "window_tokens": 32},
)


@pytest.fixture(scope="module", params=["plain", "hybrid"])
def model(request: pytest.FixtureRequest) -> Any:
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 1024}
    model = tiny_teacher(vocab_size=VOCABULARY, num_hidden_layers=4, **sizes)
    if request.param == "hybrid":
        model = swap(model, [config_from_dict(dict(mixer)) for mixer in MIXERS])
    return model.cuda().eval()


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def alone(model: Any, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
    """Without batch and cache: the whole text again for every token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        with torch.inference_mode():
            following = int(model(torch.tensor([tokens], device="cuda"), use_cache=False).logits[0, -1].argmax())
        if following == 2:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("lengths", [(300,) * 6, (300, 17, 128, 65)], ids=["equal", "padded"])
def test_a_batch_with_a_cache_writes_what_each_prompt_alone_does(
    model: Any, tokenizer: Any, lengths: tuple[int, ...]
) -> None:
    asked = prompts(*lengths)
    assert greedy(model, tokenizer, asked, 24) == [alone(model, prompt, 24) for prompt in asked]


def test_answers_do_not_depend_on_the_batches(model: Any, tokenizer: Any) -> None:
    items = [Item("t", prompt, ("x",), 6 + n, len(prompt)) for n, prompt in enumerate(prompts(200, 300, 200, 300, 300))]
    written = [tokenizer.decode(alone(model, i.prompt, i.answer_tokens), skip_special_tokens=True) for i in items]
    with SILENT.task("", None) as task:
        for batch_tokens in (1, 2**16):
            assert answers(model, tokenizer, items, batch_tokens=batch_tokens, task=task) == written


def test_targets_do_not_depend_on_the_batches(model: Any) -> None:
    items = []
    for prompt in prompts(200, 300, 200, 300):
        with torch.inference_mode():
            best = model(torch.tensor([prompt], device="cuda"), use_cache=False).logits[0].argmax(-1).tolist()
        items.append(Item("t", prompt, (), 0, len(prompt), targets=tuple((i, best[i]) for i in range(20, 190, 10))))
    with SILENT.task("", None) as task:
        for batch_tokens in (1, 2**16):
            assert target_shares(model, items, batch_tokens=batch_tokens, task=task) == [1.0] * 4
