"""Native sparse attention by its Triton kernels: every layout, group and compression."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import native_sparse_attention, use_implementation
from tests.kernels.native_sparse_cases import (
    DEVICE,
    PACKAGE,
    Case,
    assert_kernels_agree,
    eager,
    op_of,
    shrink,
    smallest_gap,
)
from tests.kernels.tolerances import OUTPUT, assert_close, outputs_and_gradients

LAYOUTS = ["plain", "padded left", "padded middle", "lengths left", "lengths middle", "documents"]

CASES = {
    "one token": Case(1, heads=1),
    "one token after others": Case(1, heads=1, past=100, group=3, selected=5, batch=1),
    "a block but one": Case(15, heads=1, group=3, batch=1),
    "a block": Case(16, group=1, batch=1),
    "a block and one": Case(17, heads=1, group=4, batch=1),
    "nothing seen but what always is": Case(63, heads=1, selected=1, window=1, batch=1),
    "group of four": Case(100, heads=1, group=4, selected=5, batch=1),
    "window beyond the text": Case(50, heads=1, window=100, batch=1),
    "earlier context": Case(30, heads=1, group=3, size=24, past=77, batch=1),
    "padded at the left": Case(24, group=3, heads=1, layout="padded left", batch=3),
    "keys by position": Case(17, heads=1, past=90, layout="lengths left", batch=3, compression="kept"),
    "keys by position, padded anywhere": Case(35, heads=1, group=1, past=50, layout="lengths middle"),
    "keys by position, no earlier ones": Case(20, heads=1, layout="lengths left"),
    "documents": Case(65, heads=1, group=3, layout="documents"),
    "documents, dense at their beginnings": Case(60, heads=1, layout="documents", dense_below=20),
    "learned compression": Case(70, group=1, compression="learned", batch=1),
    "learned compression, padded": Case(40, heads=1, size=24, layout="padded left", compression="learned"),
    "kept compression": Case(40, heads=1, past=60, compression="kept", batch=1),
    "dense at its beginning": Case(75, heads=1, dense_below=40, batch=1),
    "dense everywhere": Case(30, heads=1, dense_below=100, layout="padded left"),
    "blocks of 32": Case(135, heads=1, block_size=32, batch=1),
    "halves": Case(80, heads=1, group=3, dtype=torch.float16, batch=1),
    "halves, padded": Case(40, heads=1, layout="padded middle", compression="learned", dtype=torch.float16),
}
REPEATED = {"one token", "kept compression"}


SMALL = {
    "no group": Case(100, heads=2, group=1, selected=5, batch=1),
    "group of three": Case(100, heads=1, group=3, selected=5, batch=1),
    "earlier context of whole tiles": Case(17, heads=1, group=4, past=96, selected=5, batch=1),
    "padded anywhere": Case(110, heads=1, group=1, layout="padded middle"),
    "keys by position": Case(17, heads=1, past=90, layout="lengths left", batch=3, selected=5, compression="kept"),
    "documents": Case(135, heads=1, group=1, layout="documents", selected=5, compression="learned"),
}
"""Of small tiles, where most chosen blocks are too many for a union."""


@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_gradients_beyond_the_unions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    assert_kernels_agree(SMALL[name], repeats=False)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_reference(name: str) -> None:
    assert_kernels_agree(CASES[name], repeats=name in REPEATED)


def chooses(case: Case) -> bool:
    return bool(smallest_gap(case, *case.arguments()).isfinite().any())


def test_the_cases_leave_something_to_choose() -> None:
    assert all(chooses(case) for case in SMALL.values())
    assert sum(map(chooses, CASES.values())) > len(CASES) // 3


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=1 if settings().max_examples <= 25 else 40, phases=[Phase.generate])  # interpreted: slow
@given(
    st.builds(
        Case,
        time=st.integers(1, 40),
        heads=st.integers(1, 2),
        group=st.integers(1, 5),
        size=st.integers(1, 24),
        selected=st.integers(1, 6),
        window=st.integers(1, 40),
        dense_below=st.sampled_from([0, 0, 30]),
        batch=st.integers(1, 2),
        compression=st.sampled_from(["mean", "learned"]),
    ),
    st.integers(0, 80),
    st.integers(0, 999),
)
def test_any_call_equals_the_reference_property(layout: str, case: Case, past: int, seed: int) -> None:
    torch.manual_seed(seed)
    has_past = layout == "plain" or layout.startswith("lengths")
    assert_kernels_agree(replace(case, layout=layout, past=past if has_past else 0), repeats=False)


@pytest.mark.parametrize("layout", ["plain", "documents"])
def test_every_block_selected_is_dense_attention(layout: str) -> None:
    case = Case(70, group=3, heads=1, selected=5, layout=layout, batch=1)
    inputs, options = case.arguments()
    inputs[3] = torch.tensor([0.0, 1.0, 0.0], device=DEVICE).expand(inputs[3].shape)
    outputs, gradients = outputs_and_gradients("triton", op_of(case, options), inputs)
    dense = replace(case, dense_below=100, window=1, selected=1)
    expected, expected_gradients = outputs_and_gradients(
        "reference", op_of(dense, options | {"dense_below": 100}), [x.double() for x in inputs]
    )
    assert_close("output", outputs[0], expected[0], OUTPUT[torch.float32])
    for name, x, y in zip(case.names[:3], gradients, expected_gradients, strict=False):
        assert_close(f"d{name}", x, y, 2e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_ties_choose_the_lower_block(group: int) -> None:
    # Queries of zero give every complete block the same score; a value that names its block shows the choice.
    time, block = 160, 16
    values = torch.eye(block, device=DEVICE)[torch.arange(time, device=DEVICE) // block][None, :, None]
    gates = torch.tensor([0.0, 1.0, 0.0], device=DEVICE).expand(1, time, group, 3)
    q = torch.zeros(1, time, group, block, device=DEVICE)
    with use_implementation("triton"):
        output = native_sparse_attention(
            q, torch.randn_like(values), values, gates, block_size=block, num_selected_blocks=5, window=1
        )
    chosen = [sorted(row.nonzero().flatten().tolist()) for row in output[0, :, -1]]
    assert chosen[0] == chosen[15] == [0]
    assert chosen[79] == [0, 1, 2, 3, 4]
    assert chosen[111] == [0, 1, 2, 5, 6]
    assert chosen[112] == [0, 1, 2, 6, 7]
    assert chosen[159] == [0, 1, 2, 8, 9]


@pytest.mark.parametrize("group", [1, 3])
def test_scores_of_blocks_are_probabilities_summed_over_the_group(group: int) -> None:
    compressed = import_module(f"{PACKAGE}.compressed")
    pooling, layout = import_module(f"{PACKAGE}.pooling"), import_module(f"{PACKAGE}.layout")
    case = Case(100, heads=2, group=group, size=24, past=20, batch=2)
    (q, k, v, _), _ = case.arguments()
    table = layout.equal_layout(2, case.time, case.keys, case.block_size, q.device)
    mean_k, mean_v = (pooling.pool(x, table, case.block_size, None) for x in (k, v))
    scale = case.size**-0.5
    _, log_sums = compressed.attend_blocks(q, mean_k, mean_v, table, case.block_size, scale)
    tiles = len(table.tiles)
    scores = compressed.block_scores(q, mean_k, log_sums, table, case.block_size, scale, 0, tiles)
    expected = _scores(q.double(), k.double(), case)
    for tile, (row, token, low, high, position, *_) in enumerate(table.tiles.tolist()):
        for lane in range(max(low - token, 0), min(high - token, layout.TILE)):
            complete = (position + lane + 1) // case.block_size
            actual = scores[:, tile, lane, :complete]
            assert_close("scores", actual, expected[row, :, token + lane, :complete], OUTPUT[torch.float32])


def _scores(q: Tensor, k: Tensor, case: Case) -> Tensor:
    """`[B, H, T, blocks]`: the probabilities of eager, summed over the group."""
    positions = torch.arange(case.keys, device=q.device).expand(len(q), -1)
    means = eager._pool(k, positions, case.block_size).transpose(1, 2)
    query = q.unflatten(2, (case.heads, case.group)).permute(0, 2, 3, 1, 4)
    position = positions[:, None, case.past :, None]
    _, weights = eager._compressed(query, means, means, position, case.block_size, case.size**-0.5)
    return weights.sum(2)


def turned(x: Tensor) -> Tensor:
    """As transformers has them: heads before time."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def apart(x: Tensor) -> Tensor:
    """Every second head of a larger tensor."""
    return torch.stack((x, x + 1), dim=3).flatten(2, 3)[:, :, ::2]


@pytest.mark.parametrize(("layout", "arrange"), [("plain", apart), ("padded left", turned)])
def test_other_strides_change_nothing(layout: str, arrange: Callable[[Tensor], Tensor]) -> None:
    case = Case(20, heads=2, group=1, layout=layout)
    inputs, options = case.arguments()
    op = op_of(case, options)

    def other(*given: Tensor) -> Tensor:
        # Where heads are apart, the gradient of the output lies with its features apart.
        output = op(*map(arrange, given))
        return output if arrange is turned else output.mT.contiguous().mT

    expected, found = (outputs_and_gradients("triton", form, inputs) for form in (op, other))
    for x, y in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert_close("the same", x, y, 1e-6)


def test_a_part_of_the_gradients_is_enough() -> None:
    case = Case(20, heads=1, group=1, compression="learned", batch=1)
    inputs, options = case.arguments()
    op = op_of(case, options)
    _, gradients = outputs_and_gradients("triton", op, inputs)
    for needed in range(len(inputs)):
        leaves = [x.clone().requires_grad_(n == needed) for n, x in enumerate(inputs)]
        with use_implementation("triton"):
            output = op(*leaves)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(output, leaves[needed], direction.to(DEVICE, output.dtype))
        assert_close(case.names[needed], gradient, gradients[needed], 1e-6)


def test_no_gradient_is_asked_for() -> None:
    case = Case(20, heads=1, layout="padded left")
    inputs, options = case.arguments()
    op = op_of(case, options)
    with torch.no_grad(), use_implementation("triton"):
        output = op(*inputs)
    assert torch.equal(output, outputs_and_gradients("triton", op, inputs)[0][0])


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 8},
        {"key_positions": torch.arange(20).expand(2, -1).contiguous()},
    ],
)
def test_what_the_kernels_do_not_cover_is_refused(change: dict[str, object]) -> None:
    inputs, options = Case(20, layout="padded left").arguments()
    change = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in change.items()}
    op = partial(native_sparse_attention, **(options | change))
    with use_implementation("triton"), pytest.raises(ValueError, match="does not cover this call"):
        op(*inputs)
