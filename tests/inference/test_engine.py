"""The engine against transformers' own passes: every mixer on every family, rows of any lengths, text in any pieces."""

from __future__ import annotations

import pytest
import torch

from hybridize.errors import UsageError
from hybridize.inference import Engine, Sampling, reader, steps
from hybridize.inference.engine import LOOK_STEPS
from hybridize.inference.sampling import choose
from hybridize.mixers.configs.full_attention import FullAttentionConfig
from tests.contract.settings import DEVICES, tiny_mixer
from tests.inference.hybrids import CASES, MIXER_NAMES, TOLERANCE, continued, logits_of, texts, tiny_hybrid
from tests.tiny import tiny_teacher

pytestmark = pytest.mark.usefixtures("device")
matrix = pytest.mark.parametrize(("mixer", "family"), CASES, ids=[f"{m}-{f}" for m, f in CASES])
mixers = pytest.mark.parametrize("mixer", MIXER_NAMES)
ROOM = 128


def engine_of(mixer, family="llama", batch=2, **options):
    return Engine(tiny_hybrid(mixer, family), batch=batch, **{"context_tokens": ROOM, **options})


def written(engine, new_tokens, sampling=None, **options):
    rows = [[] for _ in range(engine.batch)]
    for new in engine.write(new_tokens, sampling, **options):
        for row, tokens in zip(rows, new, strict=True):
            row.extend(tokens)
    return rows


@matrix
def test_rows_of_different_lengths_are_continued_as_each_by_itself(mixer, family):
    prompts = texts(21, 1, 34)
    plain = tiny_hybrid(mixer, family)
    engine = engine_of(mixer, family, batch=3)
    engine.read(prompts)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(engine.logits[row], logits_of(plain, prompt), **TOLERANCE)
    assert written(engine, 20) == [continued(plain, prompt, 20) for prompt in prompts]
    assert engine.lengths == [41, 21, 54]


@mixers
@pytest.mark.parametrize("chunk_tokens", [1, 5, 16, 64])
def test_a_text_may_be_read_in_chunks(mixer, chunk_tokens):
    (text,) = texts(43)
    expected = logits_of(tiny_hybrid(mixer, "llama"), text)
    engine = engine_of(mixer, batch=1, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(engine.read([text])[0], expected, **TOLERANCE)


@matrix
def test_a_conversation_goes_on_from_where_it_is(mixer, family):
    plain = tiny_hybrid(mixer, family)
    engine = engine_of(mixer, family, batch=3, chunk_tokens=16)
    engine.read(texts(17, 30, 2))
    written(engine, 7)
    engine.read([*texts(9, 0, seed=2), *texts(25, seed=3)])  # the second row asks nothing
    written(engine, 5, rows=[0, 2])
    assert engine.texts is not None
    assert engine.lengths == [38, 37, 39]
    for row, text in enumerate(engine.texts):
        assert len(text) == engine.lengths[row]
        torch.testing.assert_close(engine.logits[row], logits_of(plain, text), **TOLERANCE)


@mixers
def test_one_step_at_a_time_is_the_same_text(mixer):
    (text,) = texts(40)
    plain, engine = tiny_hybrid(mixer, "llama"), engine_of(mixer, batch=2)
    for number, token in enumerate(text):
        logits = engine.step([token, token if number < 11 else -1])
        if number in (0, 10, 39):
            torch.testing.assert_close(logits[0], logits_of(plain, text[: number + 1]), **TOLERANCE)
    torch.testing.assert_close(engine.logits[1], logits_of(plain, text[:11]), **TOLERANCE)


@mixers
def test_a_row_at_rest_stays_as_it_is_bit_for_bit(mixer):
    engine = engine_of(mixer, batch=2)
    engine.read(texts(30, 12))
    before = {name: tensor[1].clone() for name, tensor in engine.states.named()}
    written(engine, 9, rows=[0])
    for name, tensor in engine.states.named():
        assert torch.equal(tensor[1], before[name]), name


@mixers
def test_no_state_ever_moves(mixer):
    engine = engine_of(mixer, batch=2, chunk_tokens=16)
    places = {name: tensor.data_ptr() for name, tensor in engine.states.named()}
    engine.read(texts(40, 3))
    snapshot = engine.snapshot()
    written(engine, 20)
    engine.select([1, 0])
    engine.read(texts(2, 18, seed=5))
    engine.restore(snapshot)
    engine.reset()
    engine.pretend(60)
    assert {name: tensor.data_ptr() for name, tensor in engine.states.named()} == places


@matrix
def test_states_take_the_bytes_that_the_plan_promises(mixer, family):
    engine = engine_of(mixer, family)
    kinds = [tiny_mixer(mixer) if index in (1, 2) else FullAttentionConfig() for index in range(4)]
    promised = sum(kind.state_bytes(engine.geometry, ROOM, element_bytes=4) for kind in kinds)
    assert engine.state_bytes() == promised


@mixers
def test_rows_change_places_and_one_becomes_several(mixer):
    plain, engine = tiny_hybrid(mixer, "llama"), engine_of(mixer, batch=3)
    prompts = texts(20, 31, 6)
    engine.read(prompts)
    engine.select([2, 0, 2])
    engine.read([*texts(4, seed=2), *texts(4, seed=3), *texts(8, seed=4)])
    assert engine.texts is not None
    assert [text[:6] for text in engine.texts] == [prompts[2], prompts[0][:6], prompts[2]]
    for row, text in enumerate(engine.texts):
        torch.testing.assert_close(engine.logits[row], logits_of(plain, text), **TOLERANCE)
    with pytest.raises(UsageError, match="rows"):
        engine.select([0, 3, 1])


@mixers
def test_rolled_back_rows_go_on_bit_for_bit_as_before(mixer):
    engine = engine_of(mixer, batch=2)
    engine.read(texts(37, 14))
    snapshot = engine.snapshot()
    first = written(engine, 23, Sampling(temperature=1.0))
    logits = engine.logits.clone()
    engine.restore(snapshot)
    engine.seed(0)
    assert written(engine, 23, Sampling(temperature=1.0)) == first
    assert torch.equal(engine.logits, logits)


@mixers
def test_a_text_is_the_same_after_another_one(mixer):
    engine = engine_of(mixer, batch=2)
    prompts = texts(33, 8)
    expected = engine.read(prompts).clone()
    written(engine, 12)
    engine.reset()
    assert engine.lengths == [0, 0]
    assert torch.equal(engine.read(prompts), expected)


def test_a_row_stops_at_its_end_and_others_go_on():
    plain, engine = tiny_hybrid("token_eviction", "llama"), engine_of("token_eviction", batch=2)
    prompts = texts(20, 25)
    whole = [continued(plain, prompt, LOOK_STEPS + 8) for prompt in prompts]
    end = whole[0][5]
    engine.read(prompts)
    made = written(engine, LOOK_STEPS + 8, ends=[end, 95])
    for row in range(2):
        cut = [number for number, token in enumerate(whole[row]) if token in (end, 95)]
        assert made[row] == whole[row][: cut[0] + 1 if cut else None]
    assert engine.lengths == [20 + len(made[0]), 25 + len(made[1])]


def test_sampling_follows_the_seed_and_not_the_steps_before():
    engine = engine_of("gated_delta_net", batch=2)
    made = []
    for seed in (3, 4, 3):
        engine.reset()
        engine.seed(seed)
        engine.read(texts(9, 9))
        made.append(written(engine, 30, Sampling(temperature=1.5, top_p=0.9, top_k=40)))
    assert made[0] == made[2] != made[1]


@mixers
def test_run_and_pretend_leave_states_that_go_on(mixer):
    engine = engine_of(mixer, batch=2)
    engine.pretend(70)
    engine.run(20)
    assert engine.lengths == [90, 90]
    assert torch.isfinite(engine.logits).all()
    with pytest.raises(UsageError, match="not known"):
        engine.save("state.safetensors")


def test_what_has_no_room_is_refused_before_anything_is_read():
    engine = engine_of("full_attention", batch=1, context_tokens=16)
    engine.read(texts(10))
    with pytest.raises(UsageError, match="room for 16"):
        engine.read(texts(7))
    with pytest.raises(UsageError, match="room for 16"):
        next(engine.write(7))
    assert engine.lengths == [10]
    with pytest.raises(UsageError, match="outside"):
        engine.read([[96]])
    with pytest.raises(UsageError, match="nothing to go on from"):
        next(engine_of("full_attention", batch=1).write(1))


def test_constant_memory_has_no_end():
    (text,) = texts(200)
    model = tiny_hybrid("token_eviction", "llama", layers=(0, 1, 2, 3))
    expected = logits_of(tiny_hybrid("token_eviction", "llama", layers=(0, 1, 2, 3)), text)
    engine = Engine(model, batch=1, context_tokens=8, chunk_tokens=64)
    torch.testing.assert_close(engine.read([text])[0], expected, **TOLERANCE)


@pytest.mark.parametrize("window", [7, 40])
def test_a_window_of_the_model_s_own_is_a_ring(window):
    """A teacher's, with rows that go on differently, one of which has nothing to read for a while."""
    plain = tiny_teacher("mistral", sliding_window=window).to(DEVICES["device"])
    engine = Engine(
        tiny_teacher("mistral", sliding_window=window).to(DEVICES["device"]),
        batch=3,
        context_tokens=100,
        chunk_tokens=16,
    )
    engine.read(texts(30, 30, 5))
    engine.read([*texts(9, 0, seed=2), *texts(12, seed=3)])
    written(engine, 12)
    engine.read([*texts(3, 3, 3, seed=4)])
    assert engine.texts is not None
    for row, text in enumerate(engine.texts):
        torch.testing.assert_close(engine.logits[row], logits_of(plain, text), **TOLERANCE)


@mixers
def test_pieces_that_are_recorded_read_the_same(mixer, monkeypatch):
    """On a CPU nothing is recorded, but the same piece is called again and again."""
    monkeypatch.setattr(reader, "WORTH_RECORDING", 3)
    made = []
    recorded_piece = reader.RecordedPiece
    monkeypatch.setattr(reader, "RecordedPiece", lambda *args: made.append(recorded_piece(*args)) or made[-1])
    prompts = texts(100, 100, seed=6)
    plain = tiny_hybrid(mixer, "llama", layers=(0, 1, 2, 3))
    model = tiny_hybrid(mixer, "llama", layers=(0, 1, 2, 3))
    engine = Engine(model, batch=2, context_tokens=256, chunk_tokens=32, record_reading=True)
    for _ in range(2):
        engine.read(prompts)
        written(engine, 3)
    assert engine.texts is not None
    for row, text in enumerate(engine.texts):
        torch.testing.assert_close(engine.logits[row], logits_of(plain, text), **TOLERANCE)
    assert len(made) == (0 if mixer in ("full_attention", "native_sparse_attention") else 4)


def test_sparse_attention_beside_a_row_that_is_nearly_full():
    """Together the rows would need more slots than each has, if one went by the longest of both."""
    plain = tiny_hybrid("native_sparse_attention", "llama")
    engine = engine_of("native_sparse_attention", batch=2)
    places = {name: tensor.data_ptr() for name, tensor in engine.states.named()}
    engine.read([texts(ROOM - 13)[0], []])
    engine.read(texts(1, 40, seed=2))
    written(engine, 4)
    assert {name: tensor.data_ptr() for name, tensor in engine.states.named()} == places
    for row, text in enumerate(engine.texts):
        torch.testing.assert_close(engine.logits[row], logits_of(plain, text), **TOLERANCE)


@pytest.mark.parametrize("name", ["sliding_window", "gated_delta_net", "native_sparse_attention"])
def test_a_mixer_without_a_step_of_its_own_decodes_too(name, monkeypatch):
    monkeypatch.delitem(steps._STEPS, name)
    plain, engine = tiny_hybrid(name, "llama"), engine_of(name, batch=2)
    engine.read(texts(30, 2))
    made = written(engine, 15)
    for row, text in enumerate(engine.texts):
        torch.testing.assert_close(engine.logits[row], logits_of(plain, text), **TOLERANCE)
    assert [len(row) for row in made] == [15, 15]


def test_adapters_must_be_merged():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_hybrid("sliding_window", "llama"), LoraConfig(target_modules=["up_proj"], r=2))
    with pytest.raises(UsageError, match="Merge"):
        Engine(model.base_model.model, batch=1, context_tokens=8)


def test_two_engines_share_one_model():
    model = tiny_hybrid("token_eviction", "llama")
    engines = [Engine(model, batch=1, context_tokens=ROOM) for _ in range(2)]
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight *= 1.5
    (text,) = texts(30)
    for engine in engines:
        engine.read([text[:20]])
        for token in text[20:]:
            engine.step([token])
    assert torch.equal(engines[0].logits, engines[1].logits)
    torch.testing.assert_close(engines[0].logits[0], logits_of(model, text), **TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        lambda engine: engine.step([5, -1]),
        lambda engine: engine.read([[], [7]]),
        lambda engine: engine.select([1, 0]),
        lambda engine: engine.restore(engine.snapshot()),
        lambda engine: next(engine.write(3)),
        lambda engine: engine.run(2),
        lambda engine: engine.reset(),
        lambda engine: engine.pretend(9),
    ],
)
def test_a_writer_notices_that_rows_were_changed(change):
    engine = engine_of("token_eviction", batch=2)
    engine.read(texts(20, 20))
    writer = engine.write(3 * LOOK_STEPS)
    next(writer)
    change(engine)
    with pytest.raises(UsageError, match="changed while one was writing"):
        next(writer)


def test_a_writer_may_be_left():
    plain, engine = tiny_hybrid("token_eviction", "llama"), engine_of("token_eviction", batch=1)
    engine.read(texts(20))
    next(engine.write(100 - LOOK_STEPS))
    written(engine, 5)
    assert engine.lengths == [20 + LOOK_STEPS + 5]
    torch.testing.assert_close(engine.logits[0], logits_of(plain, engine.texts[0]), **TOLERANCE)


def test_after_an_error_in_the_midst_of_a_text_every_row_is_empty():
    engine = engine_of("token_eviction", batch=2, chunk_tokens=16)
    expected = engine.read(texts(40, 40)).clone()

    def interrupted(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.read(texts(30, 30, seed=2), on_tokens=interrupted)
    assert engine.lengths == [0, 0]
    assert torch.equal(engine.read(texts(40, 40)), expected)


def test_wrong_arguments_are_refused_before_anything_happens():
    engine = engine_of("token_eviction", batch=2)
    engine.read(texts(20, 20))
    with pytest.raises(UsageError, match="no row -1"):
        next(engine.write(1, rows=[-1]))
    with pytest.raises(UsageError, match="outside"):
        engine.step([96, 1])
    with pytest.raises(UsageError, match="2 rows"):
        engine.step([1])
    with pytest.raises(UsageError, match="chunk_tokens"):
        engine_of("token_eviction", chunk_tokens=0)
    assert engine.lengths == [20, 20]


def test_an_engine_made_in_inference_mode_works_outside():
    model = tiny_hybrid("gated_delta_net", "llama")
    with torch.inference_mode():
        engine = Engine(model, batch=1, context_tokens=ROOM)
    engine.read(texts(20))
    assert len(written(engine, 3)[0]) == 3


def test_a_temperature_near_0_takes_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, -2.0]])
    for sampling in (Sampling(1e-40), Sampling(1e-40, top_p=0.5), Sampling(1e-40, top_k=2)):
        assert choose(logits, torch.tensor([0.3, 0.99]), sampling).tolist() == [1, 0]
