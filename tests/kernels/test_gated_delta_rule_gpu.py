"""On the GPU: the chunked kernels of the gated delta rule by every row of the tables of tiles, at awkward lengths.

A kernel is compiled for each head size, dtype and kind of call, which takes longer than to run it: the configurations
below are the fewest that see every row of the tables in every dtype, and head sizes that differ or are padded.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize_kernels import gated_delta_rule, use_implementation
from hybridize_kernels.gated_delta_rule import chunked, tiles
from tests.kernels.gated_delta_cases import Case, assert_same, check, draw, exactly, kernel_results, results

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMES = (1, 15, 63, 64, 65, 1000, 4097)
SHORT, LONG, LONGEST = 65, 1000, 65536
WHOLE = 1 << 20
"""Chunks of a segment that no sequence fills: so few heads would be cut by themselves."""

COMMON = Case(heads=(1, 1, 2, 2), device=DEVICE)
# What a call has, a state or q and k that come normalised, is spread over the configurations.
CONFIGURATIONS = {
    "64 bf16": replace(COMMON, key=64, value=64, dtype=torch.bfloat16),
    "96 bf16": replace(COMMON, key=96, value=96, dtype=torch.bfloat16, heads=(2, 1, 1, 2)),
    "128 bf16": replace(COMMON, key=128, value=128, dtype=torch.bfloat16),
    "256 bf16": replace(COMMON, key=256, value=256, dtype=torch.bfloat16),
    "64 128 fp16": replace(COMMON, key=64, value=128, dtype=torch.float16, state=False, final=False),
    "128 64 fp16": replace(COMMON, key=128, value=64, dtype=torch.float16, normalize=False),
    "256 128 fp16": replace(COMMON, key=256, value=128, dtype=torch.float16, state=False, final=False),
    "128 fp32": replace(COMMON, key=128, value=128),
    "256 fp32": replace(COMMON, key=256, value=256),
}
CUT = {name: CONFIGURATIONS[name] for name in ("64 bf16", "128 bf16", "256 bf16")}
SMALL = CONFIGURATIONS["64 bf16"]

every_configuration = pytest.mark.parametrize("case", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
every_cut = pytest.mark.parametrize("case", CUT.values(), ids=CUT)


def times_of(case: Case) -> tuple[int, ...]:
    """The widest heads in fp32 are slow, and nobody trains them."""
    return (SHORT,) if case.dtype == torch.float32 and case.key > 128 else TIMES


def test_every_row_of_the_tables_is_run() -> None:
    for table, dtypes in (
        (tiles._TABLE, (torch.bfloat16, torch.float16)),
        (tiles._TABLE_FP32, (torch.float32,)),
    ):
        for dtype in dtypes:
            rows = {
                min(size for size in table if size >= case.key)
                for case in CONFIGURATIONS.values()
                if case.dtype == dtype
            }
            assert rows == set(table), dtype


@every_configuration
def test_lengths(case: Case) -> None:
    for time in times_of(case):
        check(replace(case, time=time), twice=True, segment_chunks=WHOLE)


@every_configuration
def test_decays(case: Case) -> None:
    for time, decay in product({SHORT, LONG, 64} & {*times_of(case)}, ("steep", "weak", "none")):
        check(replace(case, time=time, decay=decay), segment_chunks=WHOLE)


@every_configuration
def test_betas_and_parallel_keys(case: Case) -> None:
    for time, parallel in product({SHORT, LONG} & {*times_of(case)}, (False, True)):
        for beta in (0.0, 1.0, 2.0):
            check(replace(case, time=time, beta=beta, parallel=parallel), segment_chunks=WHOLE)
        check(replace(case, time=time, parallel=True, decay="none"), segment_chunks=WHOLE)


def test_a_state_that_every_token_turns_around() -> None:
    # Nothing fades, so a text's errors add up: in bf16 they would soon be as large as the state. In fp32 the system of
    # a chunk is what is lost, which the yardstick solves exactly.
    for name in ("64 128 fp16", "128 64 fp16", "256 128 fp16"):
        check(replace(CONFIGURATIONS[name], time=200, beta=2.0, parallel=True, decay="none"), segment_chunks=WHOLE)


@every_cut
def test_segments(case: Case) -> None:
    for time in (LONG, TIMES[-1]):
        check(replace(case, time=time), twice=True, segment_chunks=4)
        check(replace(case, time=time, decay="weak"), segment_chunks=4)
    check(replace(case, time=LONG, parallel=True, beta=2.0), segment_chunks=4)
    check(replace(case, time=TIMES[-1], decay="none"))  # as many as it takes by itself


@every_cut
@pytest.mark.parametrize("segment_chunks", [WHOLE, 4])
def test_packed_sequences(case: Case, segment_chunks: int) -> None:
    for lengths in ((0, 1, 64, 65, 0, 700, 3), (63,), (1, 1, 1, 0), (300, 300)):
        check(replace(case, lengths=lengths), twice=True, segment_chunks=segment_chunks)


@every_cut
def test_packed_or_not_is_the_same(case: Case) -> None:
    uniform = replace(case, time=300)
    inputs, directions = uniform.inputs(), uniform.directions()
    ends = torch.arange(case.batch + 1, dtype=torch.int32, device=DEVICE) * 300

    def packed(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[None]

    rule = partial(chunked.gated_delta_rule, **uniform.options(), segment_chunks=WHOLE)
    expected = results(rule, inputs, directions)
    by_sequence = ("state", "initial_state", "d_initial_state")
    inputs, directions = (
        {name: x if name in by_sequence else packed(x) for name, x in given.items()} for given in (inputs, directions)
    )
    for name, x in results(partial(rule, cu_seqlens=ends), inputs, directions).items():
        assert torch.equal(x, expected[name] if name in by_sequence else packed(expected[name])), name


@pytest.mark.parametrize("segment_chunks", [WHOLE, 4])
def test_states_that_are_not_kept_are_made_again(segment_chunks: int) -> None:
    case = replace(SMALL, time=LONG)
    inputs = case.inputs()
    kept, again = (
        kernel_results(case, inputs, store_states=store, segment_chunks=segment_chunks) for store in (True, False)
    )
    for name, x in kept.items():
        assert torch.equal(x, again[name]), name


def test_dtypes_that_differ() -> None:
    case = replace(CONFIGURATIONS["128 fp32"], time=SHORT)
    inputs = case.inputs()
    inputs["q"] = inputs["q"].bfloat16()
    found = kernel_results(case, inputs)
    with use_implementation("reference"):
        rule = partial(gated_delta_rule, **case.options())
        expected = results(rule, exactly(inputs), exactly(case.directions()))
    assert found["d_q"].dtype == torch.bfloat16
    assert_same({"d_q": found.pop("d_q")}, {"d_q": expected.pop("d_q")}, torch.bfloat16)
    assert_same(found, expected, torch.float32)


def test_a_long_text_does_not_drift() -> None:
    case = replace(SMALL, time=LONGEST, batch=1, heads=(2, 2, 2, 2), decay="weak")
    inputs = case.inputs()
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}  # as in training
    output, _ = chunked.gated_delta_rule(**leaves, **case.options())
    with torch.no_grad(), use_implementation("eager"):
        expected, _ = gated_delta_rule(**exactly(inputs), **case.options())

    def error(where: slice) -> float:
        return float((output[:, where].double() - expected[:, where]).norm() / expected[:, where].norm())

    first, last = error(slice(1000)), error(slice(-1000, None))
    assert last <= 2 * first, f"relative error {first:.3g} of the first outputs, {last:.3g} of the last"


@pytest.mark.parametrize("segment_chunks", [WHOLE, 4])
@pytest.mark.parametrize("lengths", [None, (500, 0, 524)], ids=["equal", "packed"])
def test_a_captured_graph_replays_what_a_step_does(lengths: tuple[int, ...] | None, segment_chunks: int) -> None:
    case = replace(SMALL, time=LONG, lengths=lengths)
    leaves = {name: x.requires_grad_() for name, x in case.inputs().items()}
    options, directions = case.options(), list(case.directions().values())

    def step() -> tuple[Tensor, ...]:
        outputs = chunked.gated_delta_rule(**leaves, **options, segment_chunks=segment_chunks)
        return (*outputs, *torch.autograd.grad(outputs, list(leaves.values()), directions))

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                leaves["v"].copy_(draw(*leaves["v"].shape))
            if lengths is not None:
                options["cu_seqlens"][1:3] = torch.tensor([1, 640])
        expected = step()
        graph.replay()
        for n, (x, wanted) in enumerate(zip(replayed, expected, strict=True)):
            assert torch.equal(x, wanted), f"result {n}"


@pytest.mark.parametrize("lengths", [None, (500, 0, 524)], ids=["equal", "packed"])
def test_a_step_does_not_wait_for_the_gpu(lengths: tuple[int, ...] | None) -> None:
    case = replace(SMALL, time=LONG, lengths=lengths)
    leaves = {name: x.requires_grad_() for name, x in case.inputs().items()}
    options: dict[str, Any] = case.options()
    directions = list(case.directions().values())

    def step() -> None:
        outputs = chunked.gated_delta_rule(**leaves, **options, segment_chunks=4)
        torch.autograd.grad(outputs, list(leaves.values()), directions)

    step()
    if lengths is not None:
        options["cu_seqlens"] = options["cu_seqlens"].clone()  # whose tables nobody has made yet
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
