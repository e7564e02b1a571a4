"""Native sparse attention: its three branches by hand, its identities, and every gradient."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridize_kernels import native_sparse_attention, retained_attention, use_implementation
from tests.kernels.native_sparse_cases import COMPRESSED, FORMS, POOLING, eager
from tests.kernels.tolerances import OUTPUT, assert_close, assert_form_agrees


def positions_of(time, *padding, device="cpu"):
    """One row an entry of `padding`, left-padded by so many tokens."""
    return torch.stack([(torch.arange(time) - missing).clamp(min=-1) for missing in padding]).to(device)


def make_inputs(time, heads=2, group=3, size=8, *, keys=None, dtype=torch.float64, device="cpu"):
    keys = time if keys is None else keys
    shapes = [(2, time, heads * group, size), (2, keys, heads, size), (2, keys, heads, size)]
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    inputs.append(torch.rand(2, time, heads * group, 3, dtype=torch.float64))
    return [x.to(dtype).to(device) for x in inputs]


def only(branch, like):
    """Gates that let one branch through: 0 compressed, 1 selected, 2 window."""
    gates = torch.zeros_like(like)
    gates[..., branch] = 1
    return gates


def causal_attention(q, k, v):
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("time", [0, 1, 7, 41])
@pytest.mark.parametrize(("heads", "group", "size"), [(2, 1, 60), (1, 3, 8), (2, 4, 5)])
@pytest.mark.parametrize(("block_size", "num_selected_blocks", "dense_below"), [(4, 4, 0), (3, 1, 0), (8, 3, 13)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients_equal_the_reference(
    time, heads, group, size, block_size, num_selected_blocks, dense_below, dtype, device, monkeypatch
):
    monkeypatch.setattr(eager, "QUERY_CHUNK", 16)
    positions = positions_of(time, 0, 3, device=device)
    op = partial(
        native_sparse_attention,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        window=6,
        query_positions=positions,
        key_positions=positions,
        dense_below=dense_below,
    )
    assert_form_agrees(op, make_inputs(time, heads, group, size, dtype=dtype, device=device))


@pytest.mark.parametrize("form", FORMS)
def test_ties_choose_the_lower_block(form):
    # Queries of zero give every complete block the same score; uniform weights over one-hot values show the choice.
    keys = 20
    positions = torch.arange(keys)[None]
    values = torch.eye(keys, dtype=torch.float64)[None, :, None]
    zeros = torch.zeros_like(values)
    gates = only(1, torch.empty(1, keys, 1, 3, dtype=torch.float64))
    with use_implementation(form):
        output = native_sparse_attention(
            zeros,
            zeros,
            values,
            gates,
            block_size=2,
            num_selected_blocks=5,
            window=1,
            query_positions=positions,
            key_positions=positions,
        )
    chosen = [sorted({int(j) // 2 for j in row.nonzero()}) for row in output[0, :, 0]]
    assert chosen[0] == chosen[1] == [0]
    assert chosen[9] == [0, 1, 2, 3, 4]
    assert chosen[12] == [0, 1, 2, 5, 6]
    assert chosen[19] == [0, 1, 2, 8, 9]
    assert output[0, 18, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 16, 17, 18]


@pytest.mark.parametrize("form", FORMS)
def test_selection_takes_the_block_that_matches_the_query(form):
    q, k, v, gates = make_inputs(32, 1, 2, 4)
    k[:, 12:16] = 30 * torch.nn.functional.normalize(q[:, 31].sum(1), dim=-1)[:, None, None]  # block 3
    positions = positions_of(32, 0, 0)
    op = partial(
        native_sparse_attention,
        block_size=4,
        num_selected_blocks=4,
        window=1,
        query_positions=positions[:, 31:],
        key_positions=positions,
    )
    with use_implementation(form):
        output = op(q[:, 31:], k, v, only(1, gates[:, 31:]))
    seen = torch.tensor([*range(4), *range(12, 16), *range(24, 32)])
    k, v = (x[:, seen].repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, 31:].transpose(1, 2), k, v)
    assert_close("output", output, expected.transpose(1, 2), OUTPUT[torch.float64])


@pytest.mark.parametrize("form", FORMS)
def test_compressed_branch_attends_to_the_means_of_complete_blocks(form):
    q, k, v, gates = make_inputs(11)
    positions = positions_of(11, 0, 0)
    with use_implementation(form):
        output = native_sparse_attention(
            q,
            k,
            v,
            only(0, gates),
            block_size=4,
            num_selected_blocks=1,
            window=1,
            query_positions=positions,
            key_positions=positions,
        )
    assert (output[:, :3] == 0).all()
    means_k, means_v = (x[:, :8].unflatten(1, (2, 4)).mean(2).repeat_interleave(3, dim=2) for x in (k, v))
    assert_close("one block", output[:, 3:7], means_v[:, :1].expand(-1, 4, -1, -1), OUTPUT[torch.float64])
    turned = (x.transpose(1, 2) for x in (q[:, 7:], means_k, means_v))
    expected = torch.nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)
    assert_close("two blocks", output[:, 7:], expected, OUTPUT[torch.float64])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 12), st.integers(1, 2), st.integers(1, 4), st.integers(0, 999)
)
def test_identities(time, block_size, window, heads, group, seed):
    torch.manual_seed(seed)
    q, k, v, gates = make_inputs(time, heads, group)
    positions = positions_of(time, 0, 0)
    op = partial(
        native_sparse_attention,
        block_size=block_size,
        window=window,
        query_positions=positions,
        key_positions=positions,
    )
    full = causal_attention(q, k, v)
    every = op(q, k, v, only(1, gates), num_selected_blocks=time)
    assert_close("every block selected", every, full, OUTPUT[torch.float64])
    dense = op(q, k, v, gates, num_selected_blocks=1, dense_below=time)
    assert_close("dense", dense, full, OUTPUT[torch.float64])
    near = op(q, k, v, only(2, gates), num_selected_blocks=1)
    sliding = retained_attention(q, k, v, window=window, query_positions=positions, key_positions=positions)
    assert_close("window", near, sliding, OUTPUT[torch.float64])
    mixed = sum(gates[..., n, None] * op(q, k, v, only(n, gates), num_selected_blocks=2) for n in range(3))
    assert_close("gated sum", op(q, k, v, gates, num_selected_blocks=2), mixed, OUTPUT[torch.float64])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 20), st.integers(1, 7), st.integers(0, 999))
def test_a_cache_sees_what_the_whole_text_sees(past, time, dense_below, block_size, seed):
    torch.manual_seed(seed)
    keys = past + time
    q, k, v, gates = make_inputs(keys)
    positions = positions_of(keys, 0, min(past, 3))
    op = partial(
        native_sparse_attention,
        block_size=block_size,
        num_selected_blocks=4,
        window=5,
        key_positions=positions,
        dense_below=dense_below,
    )
    whole = op(q, k, v, gates, query_positions=positions)
    last = op(q[:, past:], k, v, gates[:, past:], query_positions=positions[:, past:])
    assert_close("last tokens", last, whole[:, past:], OUTPUT[torch.float64])

    means = eager._pool(k, positions, block_size), eager._pool(v, positions, block_size)
    for form in FORMS:
        with use_implementation(form):
            kept = op(
                q[:, past:],
                k,
                v,
                gates[:, past:],
                query_positions=positions[:, past:],
                compressed_k=means[0],
                compressed_v=means[1],
            )
        assert_close("kept means", kept, last, OUTPUT[torch.float64])


def test_padded_queries_give_zeros_and_no_nan():
    positions = positions_of(9, 0, 5)
    leaves = [x.requires_grad_() for x in make_inputs(9)]
    op = partial(native_sparse_attention, block_size=2, num_selected_blocks=2, window=3)
    output = op(*leaves, query_positions=positions, key_positions=positions)
    output.square().sum().backward()
    assert (output[1, :5] == 0).all()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[1].grad[1, :5] == 0).all()


def test_bfloat16_keeps_its_dtype(device):
    positions = positions_of(20, 0, 3, device=device)
    inputs = make_inputs(20, dtype=torch.bfloat16, device=device)
    op = partial(native_sparse_attention, block_size=4, window=5, query_positions=positions, key_positions=positions)
    assert op(*inputs, num_selected_blocks=2).dtype == torch.bfloat16
    # Every block selected: rounding cannot flip a choice, and the comparison is about the arithmetic.
    assert_form_agrees(partial(op, num_selected_blocks=5), inputs)


def test_reference_gradient_equals_finite_differences():
    positions = positions_of(5, 0, 1)
    op = partial(native_sparse_attention, block_size=2, num_selected_blocks=3, window=2)
    inputs = [x.requires_grad_() for x in make_inputs(5, 1, 2, 2)]
    with use_implementation("reference"):
        assert torch.autograd.gradcheck(lambda *x: op(*x, query_positions=positions, key_positions=positions), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"num_selected_blocks": 0}, "num_selected_blocks is 0"),
        ({"window": 0}, "window is 0"),
        ({"scale": 0.0}, "scale is 0.0, expected a positive factor"),
        ({"key_positions": torch.zeros(2, 5, dtype=torch.int64)}, "key_positions has shape"),
        ({"compressed_k": torch.zeros(2, 1, 2, 8)}, "belong together"),
        ({"compressed_k": torch.zeros(2, 2, 2, 8), "compressed_v": torch.zeros(2, 1, 2, 8)}, "compressed_v has shape"),
        ({"compressed_k": torch.zeros(2, 1, 2, 8), "compressed_v": torch.zeros(2, 1, 2, 8)}, "compressed_k has shape"),
        ({"key_pooling": torch.zeros(2, 2, 8)}, "key_pooling and value_pooling belong together"),
        ({"key_pooling": torch.zeros(2, 2, 8), "value_pooling": torch.zeros(3, 2, 8)}, "value_pooling has shape"),
        (
            {name: torch.zeros(2, 2, 2, 8) for name in COMPRESSED} | {name: torch.zeros(2, 2, 8) for name in POOLING},
            "pooled already",
        ),
        ({"key_lengths": torch.zeros(2, dtype=torch.int32)}, "either key_positions or key_lengths"),
        ({"key_positions": None, "key_lengths": torch.zeros(3, dtype=torch.int32)}, "key_lengths has shape"),
        ({"key_positions": None}, "either key_positions or key_lengths"),
        ({"query_positions": None}, "either key_positions or key_lengths"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens needs one row"),
    ],
)
def test_bad_arguments_are_named(change, message):
    positions = positions_of(4, 0, 0)
    options = {
        "block_size": 2,
        "num_selected_blocks": 2,
        "window": 2,
        "query_positions": positions,
        "key_positions": positions,
    }
    with pytest.raises(ValueError, match=message):
        native_sparse_attention(*make_inputs(4), **(options | change))


def test_documents_have_one_row_and_no_cache():
    q, k, v, gates = make_inputs(4)
    op = partial(native_sparse_attention, block_size=2, num_selected_blocks=2, window=2)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens needs one row"):
        op(q, k, v, gates, cu_seqlens=bounds)
    q, k, v, gates = (x[:1] for x in (q, k, v, gates))
    with pytest.raises(ValueError, match="cu_seqlens needs one row"):
        op(q[:, 2:], k, v, gates[:, 2:], cu_seqlens=bounds)
    with pytest.raises(ValueError, match="expected the bounds"):
        op(q, k, v, gates, cu_seqlens=bounds[:1])
    with pytest.raises(ValueError, match="belong to a cache"):
        op(q, k, v, gates, cu_seqlens=bounds, compressed_k=k[:, :2], compressed_v=v[:, :2])


def test_more_queries_than_keys_need_positions():
    q, k, v, gates = make_inputs(4, keys=3)
    with pytest.raises(ValueError, match="cannot be the last of 3 keys"):
        native_sparse_attention(q, k, v, gates, block_size=2, num_selected_blocks=2, window=2)
