"""The lists of retained keys that the kernels walk, and the columns of eviction, against brute force."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridize_kernels import eviction_position, use_implementation
from tests.kernels.retained_cases import DEVICE, PACKAGE, eviction, lists, shrink

layout = import_module(f"{PACKAGE}.layout")
reference = import_module(f"{PACKAGE}.reference")


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
