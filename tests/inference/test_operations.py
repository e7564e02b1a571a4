"""Whatever is done to an engine's rows, in any order, each holds the text that it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize.inference import Engine, Sampling
from hybridize.model.swap import swap
from tests.contract.settings import DEVICES, tiny_mixer
from tests.inference.hybrids import TOLERANCE, logits_of, texts
from tests.tiny import tiny_teacher

ROWS = 3
LAYERS = ("token_eviction", "gated_delta_net", "full_attention", "native_sparse_attention", "sliding_window")

lengths = st.lists(st.sampled_from([0, 0, 1, 2, 7, 23]), min_size=ROWS, max_size=ROWS)
operations = st.one_of(
    st.tuples(st.just("read"), lengths, st.integers(0, 99)),
    st.tuples(st.just("write"), st.integers(1, 9), st.sets(st.integers(0, ROWS - 1), min_size=1)),
    st.tuples(st.just("step"), st.lists(st.sampled_from([-1, 5, 17, 80]), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("select"), st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("keep")),
    st.tuples(st.just("return")),
    st.tuples(st.just("reset")),
)


def model_of_all() -> Any:
    teacher = tiny_teacher("qwen3", num_hidden_layers=len(LAYERS))
    return swap(teacher, [tiny_mixer(name) for name in LAYERS]).eval().to(DEVICES["device"])


def do(engine: Engine, operation: tuple[Any, ...], expected: list[list[int]], kept: dict[str, Any]) -> list[list[int]]:
    """The texts of the rows after the operation, said by a list of lists and not by the engine."""
    name, *arguments = operation
    if name == "read":
        more = texts(*arguments[0], seed=arguments[1])
        engine.read(more)
        return [text + new for text, new in zip(expected, more, strict=True)]
    if name == "write":
        rows = [row for row in sorted(arguments[1]) if expected[row]]
        new: list[list[int]] = [[] for _ in expected]
        for tokens in engine.write(arguments[0], Sampling(temperature=1.0, top_k=9), rows=rows):
            new = [own + some for own, some in zip(new, tokens, strict=True)]
        assert [len(own) for own in new] == [arguments[0] * (row in rows) for row in range(ROWS)]
        return [text + own for text, own in zip(expected, new, strict=True)]
    if name == "step":
        engine.step(arguments[0])
        return [text + [token] * (token >= 0) for text, token in zip(expected, arguments[0], strict=True)]
    if name == "select":
        engine.select(arguments[0])
        return [expected[row] for row in arguments[0]]
    if name == "keep":
        kept.update(snapshot=engine.snapshot(), texts=expected)
    elif name == "return" and kept:
        engine.restore(kept["snapshot"])
        return list(kept["texts"])
    elif name == "reset":
        engine.reset()
        return [[] for _ in expected]
    return expected


@pytest.mark.usefixtures("device")
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@settings(max_examples=20)
@given(st.lists(operations, min_size=3, max_size=9), st.sampled_from([8, 64]))
def test_property_rows_hold_their_texts(done: list[tuple[Any, ...]], chunk_tokens: int) -> None:
    # What the operations can come to, so that some rows end nearly full.
    most = sum(max(op[1]) if op[0] == "read" else op[1] if op[0] == "write" else op[0] == "step" for op in done)
    engine = Engine(model_of_all(), batch=ROWS, context_tokens=max(most, 1), chunk_tokens=chunk_tokens)
    plain, expected, kept = model_of_all(), [[] for _ in range(ROWS)], {}
    for operation in done:
        expected = do(engine, operation, expected, kept)
    assert engine.texts == expected
    for row, text in enumerate(expected):
        if text:
            torch.testing.assert_close(engine.logits[row], logits_of(plain, text), **TOLERANCE)
