"""The recurrent gated delta rule as one Triton launch, for a few tokens without a gradient, in place or not.

A program owns one head of one row and a tile of value columns: columns of the state never meet, so the tile stays in
registers from the first token to the last, and is read and written once. Only the norm over a head's output needs
all columns: then a program owns the whole head, as one tile, or tile by tile with the norm after the last.

A token reads the state once. Both what it holds under the key, Sᵀk, and what the query sees of it, Sᵀq, are taken from
the state before the token, because the correction u adds (k·q) u to the latter whatever the state is.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import early_option, launch, launches_early
from ..rotary.inside import tables_of
from .step_token import decay_of_head, finish, gates, load_finish, load_token, of_token


class Tile(NamedTuple):
    """Value columns and warps of a program."""

    columns: int
    warps: int


WARP_NUMBERS = 2048
"""Numbers of the state that a warp holds, 64 a thread: enough bytes on their way, and no register spills."""
PROCESSORS = 132  # of an H100


def tile_of(key_size: int, value_size: int, num_states: int, *, itemsize: int, whole_head: bool) -> Tile:
    """The tile for so many states `[key_size, value_size]` of numbers of so many bytes, as measured on an H100.

    whole_head: a program takes all columns, as one tile or several. Without, few states are spread over as many
    programs of one warp as there can be with rows of 64 bytes, and many take wide rows, which memory serves faster.
    """
    rows, columns = triton.next_power_of_2(key_size), triton.next_power_of_2(value_size)
    if whole_head:
        columns, warps = min(columns, max(16, 8 * WARP_NUMBERS // rows)), 4
    elif num_states > PROCESSORS:
        columns, warps = min(columns, max(64 // itemsize, 4 * WARP_NUMBERS // rows)), 4
    else:
        columns, warps = min(columns, max(64 // itemsize, WARP_NUMBERS // rows)), 1
    return Tile(columns, max(1, min(warps, rows * columns // WARP_NUMBERS)))


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    decay_rate: Tensor | None = None,
    decay_bias: Tensor | None = None,
    beta_ceiling: float | None = None,
    real: Tensor | None = None,
    norm_epsilon: float | None = None,
    output_scale: Tensor | None = None,
    gate: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
    key_last: bool = False,
) -> Tensor:
    """See `hybridize_kernels.gated_delta_rule_step`; computes in fp32 whatever the inputs' dtype.

    tile: instead of that of `tile_of`. key_last: the state is laid out `[S, HS, V, K]`.
    """
    output = v.new_empty(*v.shape[:2], log_decay.shape[2], v.shape[3])
    _run(
        (q, k, v, log_decay, beta),
        state,
        state,
        output,
        slots=slots,
        scale=scale,
        normalize_qk=normalize_qk,
        decay_rate=decay_rate,
        decay_bias=decay_bias,
        beta_ceiling=beta_ceiling,
        real=real,
        norm_epsilon=norm_epsilon,
        output_scale=output_scale,
        gate=gate,
        rotary=rotary,
        tile=tile,
        key_last=key_last,
        early=launches_early(state),
    )
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)  # autograd does not see what a kernel writes
    return output


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    normalize_qk: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See `hybridize_kernels.gated_delta_rule`; the final state is a new tensor, and there is no backward."""
    batch, time, heads = log_decay.shape
    output, final = v.new_empty(batch, time, heads, v.shape[3]), None
    if output_final_state:
        shape = (batch, heads, k.shape[3], v.shape[3])
        final = torch.empty(shape, dtype=torch.float32, device=v.device)
    initial = None if initial_state is None else initial_state.contiguous()
    _run((q, k, v, log_decay, beta), initial, final, output, scale=scale, normalize_qk=normalize_qk)
    return output, final


def _run(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    initial: Tensor | None,
    final: Tensor | None,
    output: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    decay_rate: Tensor | None = None,
    decay_bias: Tensor | None = None,
    beta_ceiling: float | None = None,
    real: Tensor | None = None,
    norm_epsilon: float | None = None,
    output_scale: Tensor | None = None,
    gate: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    tile: Tile | None = None,
    key_last: bool = False,
    early: bool = False,
) -> None:
    """One launch from the initial state (None: zeros) to the final one (None: not kept), which may be the same.

    early: it may begin before the kernel before it has ended; that one does not write the initial state.
    """
    q, k, v = (_rows_of_heads(x) for x in inputs[:3])
    log_decay, beta = (x if x.stride(2) == 1 else x.contiguous() for x in inputs[3:])
    batch, time, heads, value_size = output.shape
    key_size = k.shape[3]
    if batch * heads * value_size == 0:
        return
    normed = norm_epsilon is not None
    itemsize = 4 if final is None else final.element_size()
    columns, warps = tile or tile_of(key_size, value_size, batch * heads, itemsize=itemsize, whole_head=normed)
    tiles = triton.cdiv(value_size, columns)
    absent = output  # stands for what is not given, and is not looked at
    tables = tables_of(rotary, absent)
    gated, gate = gate is not None, absent if gate is None else _rows_of_heads(gate)
    given = (decay_rate, decay_bias, real, slots, output_scale)
    launch(
        _step_kernel,
        # The longest axis goes first: the others end at 65535.
        (batch * heads, 1 if normed else tiles),
        (
            *(q, k, v, log_decay, beta, gate, tables.cos, tables.sin),
            *(absent if x is None else x.contiguous() for x in given),
            *(absent if x is None else x for x in (initial, final)),
            output,
        ),
        (
            key_size**-0.5 if scale is None else float(scale),
            0.0 if beta_ceiling is None else float(beta_ceiling),
            0.0 if norm_epsilon is None else float(norm_epsilon),
            time,
            heads,
            *(stride for x in (q, k, v, log_decay, beta, gate) for stride in x.stride()[:2]),
            *(tables.row, tables.token),
        ),
        K=key_size,
        V=value_size,
        R=tables.size,
        QUERY_GROUP=heads // q.shape[2],
        KEY_GROUP=heads // k.shape[2],
        VALUE_GROUP=heads // v.shape[2],
        BLOCK_K=triton.next_power_of_2(key_size),
        BLOCK_V=columns,
        BLOCK_OUTPUT=triton.next_power_of_2(value_size),
        TILES=tiles if normed else 1,
        SINGLE=time == 1,
        HAS_SLOTS=slots is not None,
        HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        NORMALIZE=normalize_qk,
        RAW_DECAY=decay_rate is not None,
        RAW_BETA=beta_ceiling is not None,
        HAS_REAL=real is not None,
        NORMED=normed,
        SCALED=output_scale is not None,
        GATED=gated,
        KEY_LAST=key_last,
        EARLY=early,
        num_warps=warps,
        **early_option(early),
    )


def _rows_of_heads(x: Tensor) -> Tensor:
    """x `[B, T, H, D]` itself if a token's heads lie one after the other, as in a share of a wider projection."""
    in_line = x.shape[2] == 1 or x.stride(2) == x.shape[3]
    return x if x.stride(3) == 1 and in_line else x.contiguous()


STRIDES = [f"{name}_{of}" for name in ("q", "k", "v", "log_decay", "beta", "gate", "cos") for of in ("row", "token")]


@triton.jit(do_not_specialize=["time", "heads", *STRIDES])  # type: ignore[untyped-decorator]
def _step_kernel(
    q_ptr,  # [B, T, HQ, K], as k and v with strides of rows and tokens
    k_ptr,  # [B, T, H, K]
    v_ptr,  # [B, T, HV, V]
    log_decay_ptr,  # [B, T, HS], as beta with strides of rows and tokens
    beta_ptr,
    gate_ptr,  # [B, T, HS, V], with strides of rows and tokens
    cos_ptr,  # [B or 1, T, R], as sin with strides of rows and tokens
    sin_ptr,
    decay_rate_ptr,  # [HS]
    decay_bias_ptr,
    real_ptr,  # [B, T]
    slots_ptr,  # [B]
    output_scale_ptr,  # [HS, V]
    initial_ptr,  # [S, HS, K, V], or [S, HS, V, K]
    final_ptr,
    output_ptr,  # [B, T, HS, V]
    scale,
    beta_ceiling,
    epsilon,
    time,
    heads,
    q_row,
    q_token,
    k_row,
    k_token,
    v_row,
    v_token,
    log_decay_row,
    log_decay_token,
    beta_row,
    beta_token,
    gate_row,
    gate_token,
    cos_row,
    cos_token,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,  # numbers of a query or key that are rotated
    QUERY_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_OUTPUT: tl.constexpr,
    TILES: tl.constexpr,
    SINGLE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RAW_DECAY: tl.constexpr,
    RAW_BETA: tl.constexpr,
    HAS_REAL: tl.constexpr,
    NORMED: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    KEY_LAST: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads).to(tl.int64)  # offsets pass 2**31 long before memory ends
    slot = row
    if HAS_SLOTS:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        slot = tl.load(slots_ptr + row).to(tl.int64)
    live = slot >= 0
    q_ptr += row * q_row + head // QUERY_GROUP * K
    k_ptr += row * k_row + head // KEY_GROUP * K
    v_ptr += row * v_row + head // VALUE_GROUP * V
    log_decay_ptr += row * log_decay_row + head
    beta_ptr += row * beta_row + head
    gate_ptr += row * gate_row + head * V
    cos_ptr += row * cos_row
    sin_ptr += row * cos_row
    output_ptr += (row * time * heads + head) * V
    output_scale_ptr += head * V
    real_ptr += row * time
    initial_ptr += (slot * heads + head) * (K * V)
    final_ptr += (slot * heads + head) * (K * V)
    if not EARLY:
        rate, bias = decay_of_head(decay_rate_ptr, decay_bias_ptr, head, RAW_DECAY)
    rows = tl.arange(0, BLOCK_K)
    FINISH_GATED: tl.constexpr = GATED and TILES == 1

    for part in range(TILES):
        columns = (tl.program_id(1) * TILES + part) * BLOCK_V + tl.arange(0, BLOCK_V)
        in_state = (rows < K)[:, None] & (columns < V)[None, :] & live
        if KEY_LAST:
            place = rows[:, None] + columns[None, :] * K
        else:
            place = rows[:, None] * V + columns[None, :]
        # All that the first token needs is on its way before any of it is waited for.
        if HAS_INITIAL:
            state = tl.load(initial_ptr + place, mask=in_state, other=0.0)
        else:
            state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
        if EARLY:
            # Of all that is read, the state alone does not hang on the kernel before this one; it also takes longest.
            tl.extra.cuda.gdc_wait()
            rate, bias = decay_of_head(decay_rate_ptr, decay_bias_ptr, head, RAW_DECAY)
        state = state.to(tl.float32)
        output_scale = load_finish(output_scale_ptr, columns, live, V, SCALED and TILES == 1)
        there, query, key, value, log_decay, beta, gate = load_token(
            0, time, live, q_ptr, k_ptr, v_ptr, log_decay_ptr, beta_ptr, real_ptr, gate_ptr, cos_ptr, sin_ptr,
            q_token, k_token, v_token, log_decay_token, beta_token, gate_token, cos_token, rows, columns,
            K, V, R, HAS_REAL, FINISH_GATED,
        )  # fmt: skip
        for t in range(1 if SINGLE else time):
            now, gate_now = there, gate
            q, k, v = of_token(now, query, HAS_REAL), of_token(now, key, HAS_REAL), of_token(now, value, HAS_REAL)
            a, b = gates(there, log_decay, beta, rate, bias, beta_ceiling, RAW_DECAY, RAW_BETA)
            if not SINGLE:
                there, query, key, value, log_decay, beta, gate = load_token(
                    t + 1, time, live, q_ptr, k_ptr, v_ptr, log_decay_ptr, beta_ptr, real_ptr, gate_ptr,
                    cos_ptr, sin_ptr, q_token, k_token, v_token, log_decay_token, beta_token, gate_token, cos_token,
                    rows, columns, K, V, R, HAS_REAL, FINISH_GATED,
                )  # fmt: skip
            if NORMALIZE:
                q = q * tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6)
                k = k * tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)
            held = tl.sum(state * k[:, None], axis=0)
            seen = tl.sum(state * q[:, None], axis=0)
            u = b * (v - a * held)
            state = a * state + k[:, None] * u[None, :]
            result = scale * (a * seen + tl.sum(k * q, axis=0) * u)
            if TILES == 1:
                result = finish(result, now, gate_now, output_scale, epsilon, V, NORMED, SCALED, GATED)
            tl.store(output_ptr + t * heads * V + columns, result.to(output_ptr.dtype.element_ty), mask=columns < V)
        if STORE_FINAL:
            tl.store(final_ptr + place, state.to(final_ptr.dtype.element_ty), mask=in_state)

    if TILES > 1:
        # Other threads wrote what is read again here.
        tl.debug_barrier()
        columns = tl.arange(0, BLOCK_OUTPUT)
        output_scale = load_finish(output_scale_ptr, columns, live, V, SCALED)
        for t in range(1 if SINGLE else time):
            there = live
            if HAS_REAL:
                there = there & tl.load(real_ptr + t).to(tl.int1)
            output = output_ptr + t * heads * V + columns
            result = tl.load(output, mask=columns < V, other=0.0).to(tl.float32)
            gate = load_finish(gate_ptr + t * gate_token, columns, there, V, GATED)
            result = finish(result, there, gate, output_scale, epsilon, V, NORMED, SCALED, GATED)
            tl.store(output, result.to(output_ptr.dtype.element_ty), mask=columns < V)
