"""The recurrent gated delta rule as one Triton kernel, for a few tokens without a gradient.

A program owns one value head of one row and a tile of value columns: columns of the state never meet, so the state
stays in registers from the first token to the last and is read and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_VALUE_TILE = 32  # with K = 256 a tile of the state is 8192 floats, 64 registers a thread of four warps


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
    """See `hybridize_kernels.gated_delta_rule`; computes in fp32 whatever the inputs' dtype, and has no backward."""
    batch, time, heads, key_size = q.shape
    value_heads, value_size = v.shape[2:]
    q, k, v, log_decay, beta = (x.contiguous() for x in (q, k, v, log_decay, beta))
    output = torch.empty_like(v)
    final_state = None
    if output_final_state:
        final_state = torch.empty(batch, value_heads, key_size, value_size, dtype=torch.float32, device=q.device)
    if batch * value_heads * value_size == 0:
        return output, final_state
    tile = min(MAX_VALUE_TILE, triton.next_power_of_2(value_size))
    # The longest axis goes first: the others end at 65535.
    grid = (batch * value_heads, triton.cdiv(value_size, tile))
    with torch.cuda.device_of(q):
        _decode_kernel[grid](
            q,
            k,
            v,
            log_decay,
            beta,
            q if initial_state is None else initial_state.contiguous(),
            output,
            output if final_state is None else final_state,
            key_size**-0.5 if scale is None else float(scale),
            time,
            heads,
            value_heads,
            K=key_size,
            V=value_size,
            BLOCK_K=triton.next_power_of_2(key_size),
            BLOCK_V=tile,
            HAS_INITIAL=initial_state is not None,
            STORE_FINAL=final_state is not None,
            NORMALIZE=normalize_qk,
            num_warps=4,
        )
    return output, final_state


@triton.jit(do_not_specialize=["time", "heads", "value_heads"])  # type: ignore[untyped-decorator]
def _decode_kernel(
    q_ptr,  # [B, T, H, K]
    k_ptr,
    v_ptr,  # [B, T, HV, V]
    log_decay_ptr,  # [B, T, HV]
    beta_ptr,
    initial_ptr,  # [B, HV, K, V]
    output_ptr,
    final_ptr,
    scale,
    time,
    heads,
    value_heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)  # offsets pass 2**31 long before memory ends
    row = row_head // value_heads
    value_head = row_head % value_heads
    key_head = value_head // (value_heads // heads)
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k = rows < K
    in_v = columns < V
    in_state = in_k[:, None] & in_v[None, :]
    state_offset = row_head * K * V + rows[:, None] * V + columns[None, :]

    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + state_offset, mask=in_state, other=0.0).to(tl.float32)
    for t in range(time):
        token = row * time + t
        key_offset = (token * heads + key_head) * K + rows
        gate_offset = token * value_heads + value_head
        value_offset = gate_offset * V + columns
        query = tl.load(q_ptr + key_offset, mask=in_k, other=0.0).to(tl.float32)
        key = tl.load(k_ptr + key_offset, mask=in_k, other=0.0).to(tl.float32)
        value = tl.load(v_ptr + value_offset, mask=in_v, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(log_decay_ptr + gate_offset).to(tl.float32))
        beta = tl.load(beta_ptr + gate_offset).to(tl.float32)
        if NORMALIZE:
            query = query * tl.rsqrt(tl.sum(query * query, axis=0) + 1e-6)
            key = key * tl.rsqrt(tl.sum(key * key, axis=0) + 1e-6)
        state = state * decay
        delta = beta * (value - tl.sum(state * key[:, None], axis=0))
        state = state + key[:, None] * delta[None, :]
        result = scale * tl.sum(state * query[:, None], axis=0)
        tl.store(output_ptr + value_offset, result.to(output_ptr.dtype.element_ty), mask=in_v)
    if STORE_FINAL:
        tl.store(final_ptr + state_offset, state, mask=in_state)
