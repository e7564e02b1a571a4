"""The cached teacher: what is stored says what the teacher said, and training does not see whether it was stored."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize.distillation.data import Batch
from hybridize.distillation.teacher import AttentionTrace, Teacher
from hybridize.distillation.teacher_cache import CachedTeacher, open_teacher_cache, row_keys
from hybridize.distillation.top_k import TopK
from hybridize.errors import RecipeError
from hybridize.model.packed_attention import use_packed_attention
from hybridize.recipe.reader import recipe_from_dict
from hybridize.recipe.schema import Distill, Loss, Stage, TeacherCache
from hybridize_kernels import top_k_targets
from tests.distillation.test_top_k import buckets, divergence
from tests.tiny import VOCABULARY, tiny_teacher, tiny_tokens

LENGTH = 24
K = 5


class CountingTeacher(Teacher):
    """A teacher that tells how many rows it was asked to read."""

    rows_read = 0

    def last_hidden(self, batch: Batch) -> Tensor:
        self.rows_read += len(batch.tokens)
        return super().last_hidden(batch)

    def trace(self, batch: Batch, layers: Iterable[int]) -> dict[int, AttentionTrace]:
        self.rows_read += len(batch.tokens)
        return super().trace(batch, layers)


def teacher(model_type: str = "llama", **changes: Any) -> CountingTeacher:
    return CountingTeacher(tiny_teacher(model_type, **changes))


def cached(run: Path, of: Teacher | None = None, **settings: Any) -> CachedTeacher:
    chosen = TeacherCache(**{"top_k": K, **settings})
    return open_teacher_cache(chosen, teacher() if of is None else of, fingerprint="f" * 64, run=run, base=run)


def batch(*rows: int, bounds: list[int] | None = None) -> Batch:
    """Rows of a fixed pool of tokens."""
    tokens = tiny_tokens(8, LENGTH)[list(rows)]
    return Batch(tokens, ("a.txt",), None if bounds is None else torch.tensor(bounds, dtype=torch.int32))


def rows_read(cache: CachedTeacher) -> int:
    assert isinstance(cache.teacher, CountingTeacher)
    return cache.teacher.rows_read


def assert_same_targets(first: TopK, second: TopK) -> None:
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.log_probs, second.log_probs)


def assert_same_traces(first: dict[int, AttentionTrace], second: dict[int, AttentionTrace]) -> None:
    assert first.keys() == second.keys()
    for index, trace in first.items():
        other = second[index]
        assert torch.equal(trace.hidden_states, other.hidden_states)
        assert torch.equal(trace.output, other.output)
        assert all(map(torch.equal, trace.position_embeddings, other.position_embeddings))


# Keys.


def test_key_is_that_of_the_tokens_and_documents() -> None:
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    plain = hashlib.sha256(struct.pack("<4i", 3, 5, 6, 7) + struct.pack("<2i", 0, 3)).hexdigest()
    packed = hashlib.sha256(struct.pack("<4i", 3, 8, 9, 10) + struct.pack("<3i", 0, 1, 3)).hexdigest()
    bounds = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    assert row_keys(Batch(tokens, (), bounds)) == [plain, packed]
    assert row_keys(Batch(tokens, ()))[0] == plain  # a row that is one document is one text
    assert row_keys(Batch(tokens, ()))[1] != packed


def test_key_does_not_depend_on_the_batch() -> None:
    keys = row_keys(batch(0, 1, 2))
    assert row_keys(batch(2, 0)) == [keys[2], keys[0]]
    assert len({*keys, *row_keys(Batch(batch(0).tokens[:, :-1], ()))}) == 4
    middle = batch(0, 1, 2, bounds=[0, LENGTH, LENGTH + 7, 2 * LENGTH, 3 * LENGTH])
    assert row_keys(middle)[1:2] == row_keys(batch(1, bounds=[0, 7, LENGTH]))
    with pytest.raises(ValueError, match="every edge"):
        row_keys(batch(0, 1, bounds=[0, LENGTH + 1, 2 * LENGTH]))


# Targets.


def test_a_row_that_was_computed_gives_the_bits_of_one_that_was_stored(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    first = cache.targets(batch(0, 1, 2))
    assert first.ids.shape == (3, LENGTH, K)
    assert rows_read(cache) == 3
    assert_same_targets(cache.targets(batch(0, 1, 2)), first)  # from memory
    cache.close()
    again = cached(tmp_path)
    assert_same_targets(again.targets(batch(0, 1, 2)), first)  # from the disk
    turned = again.targets(batch(2, 0))
    assert_same_targets(TopK(turned.ids[0], turned.log_probs[0]), TopK(first.ids[2], first.log_probs[2]))
    assert rows_read(again) == 0
    assert again.store.facts() == {**again.store.facts(), "rows": 3, "hits": 5, "misses": 0}


def test_only_rows_that_are_missing_are_computed_and_each_once(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    cache.targets(batch(1))
    found = cache.targets(batch(3, 1, 3, 4, 1))
    assert rows_read(cache) == 1 + 2
    assert torch.equal(found.log_probs[0], found.log_probs[2])
    live = teacher().model(batch(3, 1, 3, 4, 1).tokens).logits.log_softmax(-1)
    assert torch.equal(found.ids[..., 0].long(), live.argmax(-1))
    assert torch.allclose(found.log_probs, live.gather(-1, found.ids.long()), rtol=1e-3, atol=1e-4)


def test_packed_documents(tmp_path: Path) -> None:
    bounds = [0, 9, LENGTH, 2 * LENGTH - 5, 2 * LENGTH]
    cache = cached(tmp_path, packed_teacher())
    first = cache.targets(batch(0, 1, bounds=bounds))
    assert first.ids.shape == (1, 2 * LENGTH, K)
    assert_same_targets(cache.targets(batch(0, 1, bounds=bounds)), first)
    assert rows_read(cache) == 2
    alone = cached(tmp_path / "alone", packed_teacher()).targets(Batch(batch(0).tokens[:, 9:], ()))
    assert torch.equal(first.ids[0, 9:LENGTH], alone.ids[0])
    assert torch.allclose(first.log_probs[0, 9:LENGTH], alone.log_probs[0], rtol=1e-3, atol=1e-4)
    cache.targets(batch(0, bounds=None))  # the same tokens read as one text
    assert rows_read(cache) == 3
    mixed = cache.targets(batch(2, 0, bounds=[0, LENGTH, LENGTH + 9, 2 * LENGTH]))  # of a packed text all is read
    assert rows_read(cache) == 5
    assert torch.equal(mixed.log_probs[0, LENGTH:], first.log_probs[0, :LENGTH])


def packed_teacher(model_type: str = "llama", **changes: Any) -> CountingTeacher:
    made = teacher(model_type, **changes)
    use_packed_attention(made.model)
    return made


def test_all_tokens_of_a_small_vocabulary(tmp_path: Path) -> None:
    cache = cached(tmp_path, top_k=1000)
    found = cache.targets(batch(0))
    assert found.ids.shape[-1] == VOCABULARY
    assert torch.allclose(found.log_probs.logsumexp(-1), torch.zeros(1, LENGTH), atol=1e-6)


def test_loss_of_the_cache_is_bounded_by_the_live_ones(tmp_path: Path) -> None:
    """Against the live k: by the rounding. Against the whole vocabulary: by what lies within the tail."""
    tokens = batch(0, 1, 2)
    found = cached(tmp_path).targets(tokens)
    live = teacher()
    hidden = live.last_hidden(tokens)
    ids, log_probs = top_k_targets(hidden, live.model.lm_head.weight, K)
    assert torch.equal(ids, found.ids)
    student = (hidden + 0.3 * torch.randn_like(hidden)) @ live.model.lm_head.weight.T
    p, q = live.model.lm_head(hidden).double().log_softmax(-1), student.double().log_softmax(-1)
    q_k = buckets(q.gather(-1, ids.long()))
    p_k, stored = buckets(log_probs), buckets(found.log_probs)
    of_cache, of_live, full = divergence(stored, q_k), divergence(p_k, q_k), divergence(p, q)
    error = divergence(p_k, stored)
    assert error.max() < 1e-6
    largest = (p_k - q_k).abs().amax(-1)
    assert ((of_cache - of_live).abs() <= (2 * error).sqrt() * largest * 1.01 + 1e-6).all()
    assert (of_cache - of_live).mean().abs() < 1e-4 * of_live.mean()
    tail, tail_q = p_k[..., -1], q_k[..., -1]
    outside = torch.ones_like(p, dtype=torch.bool).scatter(-1, ids.long(), False)
    within = torch.where(outside, p.exp() * ((p - tail[..., None]) - (q - tail_q[..., None])), 0.0).sum(-1)
    assert (of_live <= full + 1e-6).all()
    assert torch.allclose(full - of_live, within, rtol=0, atol=2e-6)


def test_what_was_lost_is_computed_again_to_the_same_bits(tmp_path: Path) -> None:
    """A run that is killed goes on from its last flush."""
    cache = cached(tmp_path)
    cache.targets(batch(0, 1))
    cache.flush()
    lost = cache.targets(batch(2, 3))
    again = cached(tmp_path)
    assert_same_targets(again.targets(batch(2, 3)), lost)
    again.targets(batch(0, 1))
    assert rows_read(again) == 2


def test_a_teacher_that_fails_is_not_remembered(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    with torch.no_grad():
        norm = cache.teacher.model.model.norm.weight
        good = norm.clone()
        norm.fill_(float("nan"))
        assert cache.targets(batch(0)).log_probs.isnan().any()
        norm.copy_(good)
    assert cache.targets(batch(0)).log_probs.isfinite().all()


# Layer inputs.


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 6}),
        ("llama", {"attn_implementation": "eager"}),
    ],
)
@pytest.mark.parametrize("packs", [False, True])
def test_trace_is_the_teachers(packs: bool, model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    bounds = [0, 9, LENGTH, 2 * LENGTH - 5, 2 * LENGTH] if packs else None
    live = packed_teacher(model_type, **changes) if packs else teacher(model_type, **changes)
    cache = cached(tmp_path, live, layer_inputs=True)
    expected = Teacher.trace(live, batch(0, 1, bounds=bounds), [1, 3])
    found = cache.trace(batch(0, 1, bounds=bounds), [3, 1])
    assert found.keys() == expected.keys()
    for index, trace in expected.items():
        assert torch.equal(found[index].hidden_states, trace.hidden_states)
        assert torch.allclose(found[index].output, trace.output, rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, found[index].position_embeddings, trace.position_embeddings))
        assert found[index].inputs().keys() == trace.inputs().keys()
    assert_same_traces(cache.trace(batch(0, 1, bounds=bounds), [1, 3]), found)
    cache.close()
    again = cached(tmp_path, live, layer_inputs=True)
    assert_same_traces(again.trace(batch(0, 1, bounds=bounds), [1, 3]), found)
    assert live.rows_read == 2


def test_layers_of_another_plan_are_added(tmp_path: Path) -> None:
    cache = cached(tmp_path, layer_inputs=True)
    first = cache.trace(batch(0, 1), [1])
    cache.trace(batch(1, 2), [1, 2])
    assert rows_read(cache) == 2 + 2
    cache.close()
    again = cached(tmp_path, layer_inputs=True)
    assert torch.equal(again.trace(batch(0, 1), [1])[1].hidden_states, first[1].hidden_states)
    assert rows_read(again) == 0
    again.trace(batch(0, 1), [1, 2])
    assert rows_read(again) == 1


def test_without_layer_inputs_the_teacher_is_asked(tmp_path: Path) -> None:
    cache = cached(tmp_path)
    for _ in range(2):
        cache.trace(batch(0), [1])
    assert rows_read(cache) == 2
    assert cache.store.facts()["rows"] == 0


def test_bfloat16_inputs(tmp_path: Path) -> None:
    live = teacher()
    live.model.bfloat16()
    cache = cached(tmp_path, live, layer_inputs=True)
    found = cache.trace(batch(0), [2])[2]
    cache.close()
    assert found.hidden_states.dtype == torch.bfloat16
    again = cached(tmp_path, live, layer_inputs=True)
    assert torch.equal(again.trace(batch(0), [2])[2].hidden_states, found.hidden_states)
    assert live.rows_read == 1


@pytest.mark.gpu
@pytest.mark.parametrize("packs", [False, True])
def test_on_a_gpu_too_hits_and_misses_have_the_same_bits(packs: bool, tmp_path: Path) -> None:
    bounds = [0, 9, LENGTH, 2 * LENGTH, 3 * LENGTH - 5, 3 * LENGTH] if packs else None
    live = packed_teacher()
    live.model.cuda().bfloat16()
    cache = cached(tmp_path, live, layer_inputs=True)
    tokens = batch(0, 1, 2, bounds=bounds).to("cuda")
    targets, traces = cache.targets(tokens), cache.trace(tokens, [1, 3])
    assert targets.ids.is_cuda
    assert_same_targets(cache.targets(tokens), targets)
    assert_same_traces(cache.trace(tokens, [1, 3]), traces)
    cache.flush()
    again = cached(tmp_path, live, layer_inputs=True)
    assert_same_targets(again.targets(tokens, row_keys(tokens)), targets)
    assert_same_traces(again.trace(tokens, [1, 3]), traces)
    assert live.rows_read == 6
    mixed = again.targets(batch(3, 1).to("cuda"))
    if not packs:
        assert torch.equal(mixed.log_probs[1], targets.log_probs[1])


# The recipe.


def test_folder(tmp_path: Path) -> None:
    settings = TeacherCache(top_k=K)
    run, base = tmp_path / "run", tmp_path / "recipes"
    for folder, expected in (
        (None, run / "teacher-cache"),
        ("shared", base / "shared"),
        (str(tmp_path / "x"), tmp_path / "x"),
    ):
        cache = open_teacher_cache(replace(settings, folder=folder), teacher(), fingerprint="f", run=run, base=base)
        assert cache.store.folder == expected
        assert expected.is_dir()


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    cached(tmp_path).close()
    with pytest.raises(RecipeError, match="top_k: 5 → 6"):
        cached(tmp_path, top_k=6)
    with pytest.raises(RecipeError, match='dtype: "float32" → "bfloat16"'):
        cached(tmp_path, CountingTeacher(tiny_teacher().bfloat16()))
    with pytest.raises(RecipeError, match="fingerprint"):
        open_teacher_cache(TeacherCache(top_k=K), teacher(), fingerprint="0", run=tmp_path, base=tmp_path)


def recipe(cache: Any, **loss: Any) -> Distill:
    stage = {"name": "d", "kind": "distill", "steps": 2, **({"loss": loss} if loss else {})}
    document = {
        "model": "a/b",
        "layers": "F",
        "data": {"train": ["text/*.txt"]},
        "distill": {"stages": [stage], "teacher_cache": cache},
    }
    made = recipe_from_dict(document).distill
    assert made is not None
    return made


def test_keys_of_the_recipe() -> None:
    assert recipe(None).teacher_cache is None
    assert recipe({}).teacher_cache == TeacherCache(64, False, None)
    assert recipe({"top_k": 8, "layer_inputs": True, "folder": "c"}).teacher_cache == TeacherCache(8, True, "c")
    for wrong, message in (({"top_k": 0}, "top_k"), ({"folder": " "}, "folder"), ({"topk": 3}, "did you mean 'top_k'")):
        with pytest.raises(RecipeError, match=message):
            recipe(wrong)


@pytest.mark.parametrize("loss", [{"hidden": 0.1}, {"direction": "mixed"}, {"temperature": 2.0}])
def test_losses_that_need_more_than_is_stored(loss: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"teacher_cache: does not hold what the loss of d needs"):
        recipe({}, **loss)
    assert recipe(None, **loss).teacher_cache is None
    align = Stage("a", "align", 1, loss=Loss(hidden=0.1))  # align does not look at these
    Distill((align,), teacher_cache=TeacherCache())
    recipe({}, kl=0.0, cross_entropy=1.0, direction="mixed")
