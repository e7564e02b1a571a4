"""A saved state goes on as if nothing had happened, bit for bit; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch

from hybridize.errors import CheckpointError, ResourceError, UsageError
from hybridize.inference import Engine, Sampling
from tests.inference.hybrids import MIXER_NAMES, texts, tiny_hybrid
from tests.inference.test_engine import engine_of, written

pytestmark = pytest.mark.usefixtures("device")
mixers = pytest.mark.parametrize("mixer", MIXER_NAMES)


@mixers
@pytest.mark.parametrize("room", [128, 80, 200], ids=["same room", "less", "more"])
def test_another_engine_goes_on_bit_for_bit(mixer, room, tmp_path):
    engine = engine_of(mixer, batch=2)
    engine.read(texts(41, 13))
    written(engine, 6)
    engine.save(tmp_path / "state", note={"title": "two texts"})
    question, sampling = texts(3, 9, seed=7), Sampling(temperature=1.2)
    other = engine_of(mixer, batch=2, context_tokens=room)
    other.read(texts(60, 60, seed=9))  # what lies there before is gone
    assert other.load(tmp_path / "state") == {"title": "two texts"}
    assert torch.equal(other.logits, engine.logits)
    assert (other.texts, other.lengths) == (engine.texts, engine.lengths)
    for each in (engine, other):
        each.seed(5)
        each.read(question)
    assert written(other, 11, sampling) == written(engine, 11, sampling)
    if room == 128:
        for (name, tensor), (_, expected) in zip(other.states.named(), engine.states.named(), strict=True):
            assert torch.equal(tensor, expected), name


@mixers
def test_one_document_is_asked_many_questions(mixer, tmp_path):
    reader = engine_of(mixer, batch=1)
    (document,) = texts(50)
    reader.read([document])
    reader.save(tmp_path / "state")
    engine = engine_of(mixer, batch=3)
    engine.load(tmp_path / "state")
    assert engine.lengths == [50, 0, 0]
    engine.select([0, 0, 0])
    questions = texts(4, 7, 2, seed=3)
    engine.read(questions)
    answers = written(engine, 8)
    for question, answer in zip(questions, answers, strict=True):
        reader.load(tmp_path / "state")
        reader.read([question])
        assert written(reader, 8) == [answer]


def test_chosen_rows_are_saved(tmp_path):
    engine = engine_of("gated_delta_net", batch=3)
    engine.read(texts(5, 6, 7))
    engine.save(tmp_path / "state", rows=[2, 0])
    other = engine_of("gated_delta_net", batch=2)
    other.load(tmp_path / "state")
    assert other.lengths == [7, 5]
    assert torch.equal(other.logits, engine.logits[[2, 0]])


def test_a_changed_file_another_model_and_too_little_room_are_refused(tmp_path):
    path = tmp_path / "state"
    engine = engine_of("token_eviction", batch=2)
    engine.read(texts(40, 40))
    engine.save(path)
    with pytest.raises(CheckpointError, match="another model"):
        Engine(tiny_hybrid("token_eviction", "llama", seed=1), batch=2, context_tokens=64).load(path)
    with pytest.raises(CheckpointError, match="another model"):
        Engine(tiny_hybrid("token_eviction", "llama").bfloat16(), batch=2, context_tokens=64).load(path)
    with pytest.raises(UsageError, match="2 rows"):
        engine_of("token_eviction", batch=1).load(path)
    small = engine_of("token_eviction", batch=2, context_tokens=39)
    small.read(texts(9, 8))
    with pytest.raises(UsageError, match="room for 39"):
        small.load(path)
    assert small.lengths == [9, 8]
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-5] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="not those that were saved"):
        engine.load(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        engine.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        engine.load(tmp_path / "elsewhere")


def test_a_file_of_another_kind_is_refused(tmp_path):
    from hybridize.checkpoint import save_file

    save_file(tmp_path / "weights", {"a": torch.zeros(3)}, {})
    with pytest.raises(CheckpointError, match="no saved state"):
        engine_of("sliding_window").load(tmp_path / "weights")


def test_an_old_state_stays_when_a_new_one_cannot_be_written(tmp_path, monkeypatch):
    from hybridize.checkpoint import single_file

    engine = engine_of("sliding_window", batch=1)
    engine.read(texts(5))
    engine.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file, "write_safetensors", full)
    with pytest.raises(OSError, match="No space"):
        engine.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_note_may_have_any_keys(tmp_path):
    engine = engine_of("sliding_window", batch=1)
    engine.read(texts(5))
    note = {"model": "mine", "sha256": "none", "hybridize_state": "good"}
    engine.save(tmp_path / "state", note=note)
    assert engine.load(tmp_path / "state") == note


def test_thresholds_are_part_of_a_model(tmp_path):
    engine = engine_of("token_eviction", batch=1)
    engine.read(texts(5))
    engine.save(tmp_path / "state")
    next(iter(engine.model.mixers.values())).new.controller.num_kept += 1
    with pytest.raises(CheckpointError, match="another model"):
        engine.load(tmp_path / "state")


def test_where_no_file_can_be_is_said(tmp_path):
    engine = engine_of("sliding_window", batch=1)
    engine.read(texts(5))
    for path in (tmp_path, tmp_path / "none" / "state"):
        with pytest.raises(ResourceError, match="folder"):
            engine.save(path)
