"""Retained attention by its Triton kernels: every case that the layout can be in, and the lists they walk."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import eviction_position, retained_attention, use_implementation
from tests.kernels.tolerances import GRADIENT, OUTPUT, assert_close, outputs_and_gradients

PACKAGE = "hybridize_kernels.retained_attention"
plan = import_module(f"{PACKAGE}.plan")
attention = import_module(f"{PACKAGE}.attention")
eviction = import_module(f"{PACKAGE}.eviction")
lists = import_module(f"{PACKAGE}.lists")
layout = import_module(f"{PACKAGE}.layout")
forward = import_module(f"{PACKAGE}.forward")
backward = import_module(f"{PACKAGE}.backward")
reference = import_module(f"{PACKAGE}.reference")
flags = forward.flags
tiles = import_module(f"{PACKAGE}.tiles")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_TILES = "forward=32,16,4,1;query=16,16,4,1;key=16,16,4,1"


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, chunks and scans so short that a few dozen tokens fill many of them."""
    monkeypatch.setenv(tiles.VARIABLE, SMALL_TILES)
    monkeypatch.setattr(plan, "CHUNK", 16)
    monkeypatch.setattr(lists, "SCAN", 32)
    monkeypatch.setattr(lists, "ALONE", 64)
    for name, value in (("LENGTH", 16), ("SCAN", 16), ("CANDIDATES", 16)):
        monkeypatch.setattr(eviction, name, value)
    monkeypatch.setattr(attention, "plan_of", lru_cache(plan.Plan))  # no plan of other chunks and scans


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@dataclass(frozen=True)
class Case:
    """One call. positive: share of the scores above zero; layout: what `arguments` makes of it."""

    time: int
    heads: int = 2
    group: int = 2
    size: int = 16
    window: int = 7
    sinks: int = 2
    budget: int | None = None
    layout: str = "plain"
    positive: float = 0.4
    prefix: int = 0
    batch: int = 2
    dtype: torch.dtype = torch.float32
    scored: bool = True

    def arguments(self) -> tuple[list[Tensor], dict[str, object]]:
        batch = 1 if self.layout == "documents" else self.batch
        keys = self.time + (self.prefix + self.window if self.layout.startswith("continued") else 0)
        shape = (batch, keys, self.heads)
        q = torch.randn(batch, self.time, self.heads * self.group, self.size)
        k, v = torch.randn(*shape, self.size), torch.randn(*shape, self.size)
        score = torch.rand(shape) - 1 + self.positive
        inputs = [x.to(DEVICE, self.dtype) for x in (q, k, v)] + [score.to(DEVICE)] * self.scored
        return inputs, {
            "window": self.window,
            "sinks": self.sinks,
            "budget": self.budget,
            **self.order(keys, batch),
        }

    def order(self, keys: int, batch: int) -> dict[str, object]:
        if self.layout == "padded":
            # The first row is padded at its left, the second anywhere, a third would be all padding.
            positions = torch.full((max(batch, 3), self.time), -1)
            positions[0] = (torch.arange(self.time) - self.time // 3).clamp(min=-1)
            real = torch.rand(self.time) > 0.4
            positions[1, real] = torch.arange(int(real.sum()))
            positions = positions[-batch:].contiguous().to(DEVICE)
            return {"query_positions": positions, "key_positions": positions}
        if self.layout == "documents":
            cuts = sorted(torch.randint(0, self.time + 1, (3,)).tolist())
            return {"cu_seqlens": torch.tensor([0, *cuts, self.time], dtype=torch.int32, device=DEVICE)}
        if self.layout.startswith("continued"):
            # Slots of an earlier cache, some of them empty, then the window's tokens, then new ones.
            seen = 3 * self.window + 2 * self.prefix
            positions = torch.full((batch, keys, self.heads), -1)
            for row in range(batch):
                for head in range(self.heads):
                    held = int(torch.randint(0, self.prefix + 1, ()))
                    slots = torch.randperm(seen - self.window + 1)[:held].sort().values
                    positions[row, self.prefix - held : self.prefix, head] = slots
            positions[:, self.prefix :] = torch.arange(seen - self.window, seen + self.time)[None, :, None]
            if self.layout == "continued short":  # the window was not full: padding after the slots
                positions[0, self.prefix : self.prefix + 3] = -1
            positions = positions.to(DEVICE)
            last = positions[:, keys - self.time :, 0].contiguous()
            return {"query_positions": last, "key_positions": positions, "ordered_from": self.prefix}
        return {}


def op_of(case: Case, options: dict[str, object]) -> Callable[..., tuple[Tensor, Tensor]]:
    def op(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output, log_sum_exp = retained_attention(*inputs, return_log_sum_exp=True, **options)
        return output, torch.where(log_sum_exp.isfinite(), log_sum_exp, 7.0)

    return op


def assert_kernels_agree(case: Case) -> None:
    """Outputs, log-sum-exps and every gradient; twice, with equal bits."""
    inputs, options = case.arguments()
    op = op_of(case, options)
    outputs, gradients = outputs_and_gradients("triton", op, inputs)
    again = outputs_and_gradients("triton", op, inputs)
    assert all(torch.equal(x, y) for x, y in zip(outputs + gradients, again[0] + again[1], strict=True))
    expected, expected_gradients = outputs_and_gradients("reference", op, [x.double() for x in inputs])
    for name, x, y in zip(("output", "log-sum-exp"), outputs, expected, strict=True):
        assert_close(name, x, y, OUTPUT[case.dtype])
    for name, x, y in zip(("dq", "dk", "dv", "dscore"), gradients, expected_gradients, strict=False):
        assert_close(name, x, y, GRADIENT[case.dtype])


CASES = {
    "one token": Case(1),
    "no group": Case(33, group=1, heads=3),
    "group of three": Case(50, group=3, size=20),
    "capped": Case(50, group=3, budget=6),
    "capped, many chunks": Case(90, heads=1, group=4, sinks=0, budget=3),
    "capped, sinks only fit": Case(50, budget=2),
    "nothing retained": Case(40, sinks=0, positive=0.0),
    "nothing retained, capped": Case(40, sinks=0, positive=0.0, budget=4),
    "all retained": Case(40, positive=1.0),
    "all retained, capped": Case(60, positive=1.0, budget=9),
    "sinks without scores": Case(40, scored=False),
    "window alone": Case(40, scored=False, sinks=0),
    "window of one": Case(40, window=1, budget=4),
    "window beyond the text": Case(40, window=100, budget=4),
    "budget of zero": Case(40, budget=0),
    "padded": Case(50, layout="padded"),
    "padded, capped": Case(50, layout="padded", budget=6, group=1),
    "rows of padding": Case(20, layout="padded", batch=1, budget=6),
    "documents": Case(60, layout="documents"),
    "documents, capped": Case(75, layout="documents", budget=4),
    "continued": Case(30, layout="continued", prefix=5),
    "continued, capped": Case(40, layout="continued", prefix=5, budget=5),
    "continued without sinks": Case(30, layout="continued", prefix=4, sinks=0, budget=4, scored=True),
    "continued without slots": Case(30, layout="continued", prefix=0, sinks=2),
    "continued after a short text": Case(30, layout="continued short", prefix=4, sinks=2),
    "continued after a short text, capped": Case(30, layout="continued short", prefix=4, budget=4),
    "continued, sinks alone": Case(30, layout="continued", prefix=2, scored=False),
    # Half precision keeps the parts of a row's sum and pivot apart; bf16 has no products in the interpreter.
    "halves": Case(50, group=3, dtype=torch.float16),
    "halves, capped and padded": Case(50, layout="padded", budget=6, dtype=torch.float16),
    "halves, documents": Case(60, layout="documents", dtype=torch.float16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("small")
def test_outputs_and_gradients_equal_the_reference(case: Case) -> None:
    assert_kernels_agree(case)


@settings(max_examples=20)
@given(
    st.builds(
        Case,
        time=st.integers(1, 60),
        heads=st.integers(1, 2),
        group=st.integers(1, 5),
        size=st.integers(1, 20),
        window=st.integers(1, 40),
        sinks=st.integers(0, 4),
        budget=st.one_of(st.none(), st.integers(0, 12)),
        layout=st.sampled_from(["plain", "padded", "documents", "continued"]),
        positive=st.floats(0, 1),
        prefix=st.integers(0, 6),
        scored=st.booleans(),
    ),
    st.integers(0, 999),
)
def test_any_call_equals_the_reference_property(case: Case, seed: int) -> None:
    if case.layout == "continued" and case.budget is not None:
        # A cache holds no more than its budget.
        case = replace(case, budget=max(case.budget, case.prefix))
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        assert_kernels_agree(case)


def test_default_tiles_run_in_the_interpreter() -> None:
    assert_kernels_agree(Case(130, heads=1, window=40, budget=30, batch=1))


def test_head_sizes_with_room_to_the_next_power_of_two(small: None) -> None:
    assert_kernels_agree(Case(33, size=24))


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"scale": -1.0}, {"ordered_from": 3}, {"query_positions": None}])
def test_bad_arguments_are_refused(change: dict[str, object]) -> None:
    inputs, options = Case(9, layout="padded").arguments()
    with pytest.raises(ValueError, match="retained_attention: "):
        retained_attention(*inputs, **(options | change))


def test_documents_need_one_row() -> None:
    inputs, options = Case(9).arguments()
    with pytest.raises(ValueError, match="cu_seqlens needs one row"):
        retained_attention(*inputs, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32, device=DEVICE), **options)


def test_keys_in_any_order_have_no_kernel() -> None:
    inputs, options = Case(9, layout="padded").arguments()
    options["key_positions"] = options["key_positions"].flip(1)
    with use_implementation("triton"), pytest.raises(ValueError, match="does not cover this call"):
        retained_attention(*inputs, **options)


def plain_lists(
    score: Tensor, *, window: int, sinks: int, budget: int | None, block: int, chunk: int
) -> tuple[object, object]:
    """The plan and the lists of a call without padding; score: [B, T, H]."""
    batch, time, heads = score.shape
    geometry = layout.Geometry(batch, time, time, heads, 1, 16, min(window, time), 0, 0)
    made = lists.ListPlan(geometry, score.stride(), sinks=sinks, budget=budget, block=block, chunk=chunk)
    return made, lists.retained_lists(made, score, layout.Vectors(), score.device)


@settings(max_examples=25)
@given(
    st.integers(1, 80),
    st.integers(1, 9),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(1, 9)),
    st.integers(0, 99),
)
def test_lists_hold_each_retained_key_once_property(
    time: int, window: int, sinks: int, budget: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    score = torch.randint(-2, 6, (2, time, 3), device=DEVICE).float()
    window = min(window, time)
    block, chunk = 4, 16
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        _, made = plain_lists(score, window=window, sinks=sinks, budget=budget, block=block, chunk=chunk)
    rows = torch.arange(time, device=DEVICE)
    positions = rows.expand(2, -1)
    seen = reference.visible_keys(
        score, positions, positions[..., None].expand(-1, -1, 3), window=window, sinks=sinks, budget=budget
    )
    seen = seen & (rows[:, None] - rows >= window)  # [B, H, T, S]: retained, not in the window
    for b in range(2):
        for h in range(3):
            retained = seen[b, h].any(0).nonzero().flatten().tolist()
            number = int(made.before[b, h, -1])
            assert made.columns[b, h, :number].tolist() == retained
            for column in retained:
                served = seen[b, h, :, column].nonzero().flatten().tolist()
                assert served == list(range(column + window, int(made.exit[b, h, column])))
            if made.chunk_columns is None:
                continue
            for part in range(-(-time // chunk)):
                size, stable = int(made.chunk_size[b, h, part]), int(made.chunk_stable[b, h, part])
                columns = made.chunk_columns[b, h, part, :size].tolist()
                served = seen[b, h, part * chunk : (part + 1) * chunk]
                assert sorted(columns) == served.any(0).nonzero().flatten().tolist()
                assert sorted(columns[:stable]) == served.all(0).nonzero().flatten().tolist()
                for start in range(part * chunk, min((part + 1) * chunk, time), block):
                    end = int(made.block_size[b, h, start // block])
                    now = seen[b, h, start : start + block].any(0).nonzero().flatten().tolist()
                    assert set(now) <= set(columns[:end])


@settings(max_examples=25)
@given(st.integers(1, 90), st.integers(0, 4), st.integers(1, 14), st.integers(1, 40), st.integers(0, 999))
def test_eviction_columns_equal_brute_force_property(
    keys: int, sinks: int, budget: int, levels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    score = torch.randint(-2, levels + 1, (2, keys, 3), device=DEVICE).float()
    positions = torch.arange(keys, device=DEVICE).expand(2, -1)
    with use_implementation("reference"):
        expected = eviction_position(score, positions, sinks=sinks, budget=budget, window=3).transpose(1, 2)
    key = torch.where(score > 0, score.view(torch.int32), -1)
    key[:, :sinks] = 2**31 - 1
    key = key.transpose(1, 2).contiguous()
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        actual = eviction.eviction_columns(key, None, budget)
    kept = key >= 0
    assert torch.equal(actual[kept].long(), expected[kept].clamp(max=2**31 - 1))


def test_memory_of_the_lists_is_linear_in_the_tokens() -> None:
    sizes = []
    for time in (64, 128, 256):
        score = torch.randn(2, time, 1, device=DEVICE)
        planned, made = plain_lists(score, window=8, sinks=0, budget=8, block=16, chunk=16)
        sizes.append(sum(x.numel() for x in made if isinstance(x, Tensor)) + 2 * 1 * planned.part_rows)
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


# On the GPU: every configuration of the table, in its dtype, at lengths around the tiles' edges.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize(
    ("size", "group"), [(64, 3), (64, 1), (96, 4), (128, 4), (128, 7), (256, 2), (32, 4), (32, 16)]
)
def test_every_tile_of_the_table(dtype: torch.dtype, time: int, size: int, group: int) -> None:
    case = Case(time, group=group, size=size, window=70, dtype=dtype, batch=1 if time >= 1000 else 2)
    if time > 1000:  # the reference's matrices
        case = replace(case, heads=1, time=min(time, 4 * 4097 // group))
    assert_kernels_agree(case)
    assert_kernels_agree(replace(case, budget=40, window=129))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("budget", [None, 100])
@pytest.mark.parametrize("layout", ["plain", "padded", "documents", "continued", "continued short"])
@pytest.mark.parametrize("positive", [0.0, 0.2, 1.0])
def test_every_layout(dtype: torch.dtype, budget: int | None, layout: str, positive: float) -> None:
    case = Case(700, size=64, window=90, budget=budget, layout=layout, positive=positive, prefix=80, dtype=dtype)
    assert_kernels_agree(case)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_the_largest_group(size: int) -> None:
    assert_kernels_agree(Case(65, heads=1, group=64, size=size, window=20, budget=12, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 256])
def test_other_gpus_than_hopper(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "is_hopper", lambda device: False)
    monkeypatch.setattr(attention, "plan_of", lru_cache(plan.Plan))
    assert_kernels_agree(Case(300, size=size, window=70, budget=40, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", ["plain", "padded", "documents", "continued"])
def test_offsets_of_64_bits(layout: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forward, backward):
        monkeypatch.setattr(module, "flags", lambda *given: {**flags(*given), "LONG": True})
    assert_kernels_agree(Case(30, group=3, layout=layout, budget=5, prefix=4))


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 256])
def test_a_long_text(budget: int | None) -> None:
    assert_kernels_agree(
        Case(4097, heads=1, group=3, size=64, window=300, budget=budget, batch=1, dtype=torch.bfloat16)
    )


def test_a_plan_is_not_used_for_other_strides(small: None) -> None:
    case = Case(40, budget=6)
    inputs, options = case.arguments()
    op = op_of(case, options)
    outputs, gradients = outputs_and_gradients("triton", op, inputs)

    def turned(*given: Tensor) -> tuple[Tensor, Tensor]:
        # As transformers has them: heads before time.
        return op(*[x.transpose(1, 2).contiguous().transpose(1, 2) for x in given])

    def padded(*given: Tensor) -> tuple[Tensor, Tensor]:
        # Every second head of a larger tensor; the gradient of the output lies with its features apart.
        output, log_sum_exp = op(*[torch.stack((x, x + 1), dim=3).flatten(2, 3)[:, :, ::2] for x in given])
        return output.mT.contiguous().mT, log_sum_exp

    for other in (turned, padded, op):
        found, found_gradients = outputs_and_gradients("triton", other, inputs)
        for x, y in zip(found + found_gradients, outputs + gradients, strict=True):
            assert_close("the same", x, y, 1e-6)


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_gpu() -> None:
    inputs, options = Case(700, size=64, window=90, budget=50, dtype=torch.bfloat16).arguments()
    leaves = [x.requires_grad_() for x in inputs]
    retained_attention(*leaves, **options).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        retained_attention(*leaves, **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_asked_of_a_blind_row_reaches_no_gradient(small: None) -> None:
    inputs, options = Case(24, layout="padded").arguments()
    leaves = [x.requires_grad_() for x in inputs]
    with use_implementation("triton"):
        output, log_sum_exp = retained_attention(*leaves, return_log_sum_exp=True, **options)
    assert log_sum_exp.isneginf().any()
    (output.sum() + log_sum_exp.exp().log().clamp(min=-9).sum()).backward()
    direction = torch.where(log_sum_exp.isneginf(), torch.nan, 1.0)
    with use_implementation("triton"):
        again = retained_attention(*leaves, return_log_sum_exp=True, **options)[1]
    gradients = torch.autograd.grad(again, leaves, direction)
    assert all(gradient.isfinite().all() for gradient in gradients)
