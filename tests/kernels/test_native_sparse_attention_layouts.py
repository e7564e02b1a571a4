"""Native sparse attention: every form in which positions and compressed blocks are given, and what they mean."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hybridize_kernels import native_sparse_attention, use_implementation
from tests.kernels.native_sparse_cases import DEVICE, FORMS, Case, key_positions_of, op_of
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, assert_form_agrees, outputs_and_gradients

LAYOUTS = [
    Case(37, block_size=4, window=6, past=9, dtype=torch.float64),
    Case(37, block_size=4, window=6, layout="padded left", batch=3, dtype=torch.float64),
    Case(37, block_size=4, window=6, layout="padded middle", batch=3, dtype=torch.float64),
    Case(20, block_size=4, window=6, past=21, layout="lengths left", batch=3, dtype=torch.float64),
    Case(20, block_size=4, window=6, past=21, layout="lengths middle", batch=3, dtype=torch.float64),
    Case(37, block_size=4, window=6, layout="documents", dtype=torch.float64),
]


def in_other_words(case: Case, inputs: list[Tensor], options: dict[str, object]) -> Callable[..., Tensor]:
    """The call with positions of every query and every key written out, and nothing promised of them."""
    named = {name: options[name] for name in ("block_size", "num_selected_blocks", "window", "dense_below")}
    q, k = inputs[:2]
    if case.layout == "documents":
        return partial(one_document_after_the_other, options["cu_seqlens"].tolist(), named, case.names)
    positions = key_positions_of(options, k)
    of_queries = options.get("query_positions", positions[:, k.shape[1] - q.shape[1] :])
    return op_of(case, named | {"query_positions": of_queries.clone(), "key_positions": positions.clone()})


def one_document_after_the_other(bounds, named, names, *inputs):
    outputs = []
    for start, stop in pairwise(bounds):
        document = {name: x[:, start:stop] if x.ndim == 4 else x for name, x in zip(names[:4], inputs, strict=False)}
        positions = torch.arange(stop - start, device=DEVICE)[None]
        outputs.append(
            native_sparse_attention(
                **document,
                **dict(zip(names[4:], inputs[4:], strict=True)),
                **named,
                query_positions=positions,
                key_positions=positions.clone(),
            )
        )
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [{}, {"compression": "learned"}, {"dense_below": 9}])
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.layout)
def test_every_form_of_positions_means_the_positions_written_out(case, change, form):
    case = replace(case, **change)
    inputs, options = case.arguments()
    outputs, gradients = outputs_and_gradients(form, op_of(case, options), inputs)
    expected, expected_gradients = outputs_and_gradients("reference", in_other_words(case, inputs, options), inputs)
    assert_close("output", outputs[0], expected[0], OUTPUT[torch.float64])
    for name, x, y in zip(case.names, gradients, expected_gradients, strict=True):
        assert_close(f"d{name}", x, y, GRADIENT[torch.float64])


@pytest.mark.parametrize("form", FORMS)
def test_keys_in_another_order_are_the_same_keys(form):
    case = replace(LAYOUTS[1], compression="learned")
    (q, k, v, *others), options = case.arguments()
    positions = options.pop("key_positions")
    order = torch.randperm(k.shape[1], device=DEVICE)
    op = op_of(case, options)
    with use_implementation(form):
        expected = op_of(case, options | {"key_positions": positions})(q, k, v, *others)
        op = op_of(case, options | {"key_positions": positions[:, order]})
        turned = op(q, k[:, order], v[:, order], *others)
    assert_close("output", turned, expected, OUTPUT[torch.float64])


def test_empty_slots_are_nothing():
    case = LAYOUTS[3]
    inputs, options = case.arguments()
    empty = torch.arange(case.keys, device=DEVICE) >= options["key_lengths"][:, None]
    assert empty.any(1).all()
    assert empty[-1].all()
    op = op_of(case, options)
    outputs, gradients = outputs_and_gradients("eager", op, inputs)
    for x in inputs[1:3]:
        x[empty] = 1e4
    again, _ = outputs_and_gradients("eager", op, inputs)
    assert torch.equal(outputs[0], again[0])
    assert all((gradient[empty] == 0).all() for gradient in gradients[1:3])
    assert (outputs[0][-1] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.layout)
def test_even_weights_are_the_mean(case, form):
    inputs, options = case.arguments()
    even = torch.full((case.block_size, case.heads, case.size), 1 / case.block_size, dtype=torch.float64, device=DEVICE)
    pooled = op_of(replace(case, compression="learned"), options)
    with use_implementation(form):
        assert_close("output", pooled(*inputs, even, even), op_of(case, options)(*inputs), OUTPUT[torch.float64])


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_picks_the_token_of_its_place(form):
    # With all weight on a block's third token the compressed branch attends to every third token of four.
    q, k, v, gates = Case(16, size=8, group=3, dtype=torch.float64).arguments()[0]
    gates = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=DEVICE).expand(gates.shape)
    weights = torch.zeros(4, 2, 8, dtype=torch.float64, device=DEVICE)
    weights[2] = 1
    op = partial(native_sparse_attention, block_size=4, num_selected_blocks=1, window=1)
    with use_implementation(form):
        output = op(q, k, v, gates, key_pooling=weights, value_pooling=2 * weights)[:, 15:]
    turned = (x.transpose(1, 2) for x in (q[:, 15:], k[:, 2::4], 2 * v[:, 2::4]))
    expected = torch.nn.functional.scaled_dot_product_attention(*turned, enable_gqa=True).transpose(1, 2)
    assert_close("output", output, expected, OUTPUT[torch.float64])


@pytest.mark.parametrize("compression", ["learned", "kept"])
@pytest.mark.parametrize("case", LAYOUTS[:5], ids=lambda case: case.layout)
def test_gradients_of_the_compression_equal_the_reference(case, compression):
    case = replace(case, compression=compression)
    inputs, options = case.arguments()
    op = op_of(case, options)
    assert_form_agrees(op, inputs)
    _, gradients = outputs_and_gradients("eager", op, inputs)
    assert all((gradient != 0).any() for gradient in gradients)


@pytest.mark.parametrize("compression", ["learned", "kept"])
def test_gradients_of_the_compression_equal_finite_differences(compression):
    case = Case(7, 1, 2, 2, block_size=2, window=2, selected=3, batch=1, dtype=torch.float64, compression=compression)
    inputs, options = case.arguments()
    with use_implementation("eager"):
        assert torch.autograd.gradcheck(op_of(case, options), [x.requires_grad_() for x in inputs])


def test_inference_with_learned_weights(kernel_device):
    """A parameter asks for a gradient also where nobody records one."""
    (*inputs, key_pooling, value_pooling), options = Case(40, compression="learned").arguments()
    weights = {"key_pooling": key_pooling, "value_pooling": value_pooling}
    with torch.inference_mode(), use_implementation("triton"):
        wanted = native_sparse_attention(*inputs, **weights, **options)
        weights = {name: torch.nn.Parameter(x) for name, x in weights.items()}
        found = native_sparse_attention(*inputs, **weights, **options)
    assert torch.equal(found, wanted)


def test_gradient_of_the_gates_alone(kernel_device):
    inputs, options = Case(40).arguments()
    found = []
    for asked in (range(4), [3]):
        leaves = [x.detach().requires_grad_(n in asked) for n, x in enumerate(inputs)]
        with use_implementation("triton"):
            native_sparse_attention(*leaves, **options).square().sum().backward()
        assert [x.grad is not None for x in leaves] == [n in asked for n in range(4)]
        found.append(leaves[3].grad)
    assert torch.equal(*found)
