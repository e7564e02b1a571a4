"""What the recurrent kernel does with a token beside the state: its numbers loaded, its gates, its output finished."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rotary.inside import load_angles, load_rotated


@triton.jit  # type: ignore[untyped-decorator]
def load_token(
    t,
    time,
    live,
    q_ptr,
    k_ptr,
    v_ptr,
    log_decay_ptr,
    beta_ptr,
    real_ptr,
    gate_ptr,
    cos_ptr,
    sin_ptr,
    q_token,
    k_token,
    v_token,
    log_decay_token,
    beta_token,
    gate_token,
    cos_token,
    rows,
    columns,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    HAS_REAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """Whether there is a token t, and what it says; of padding, which may hold anything, that is not to be used.

    Padding is read all the same: nothing waits for the answer whether a token is some.
    """
    inside = live & (t < time)
    gate = load_finish(gate_ptr + t * gate_token, columns, inside, V, GATED)
    value = tl.load(v_ptr + t * v_token + columns, mask=(columns < V) & inside, other=0.0)
    log_decay = tl.load(log_decay_ptr + t * log_decay_token, mask=inside, other=0.0)
    beta = tl.load(beta_ptr + t * beta_token, mask=inside, other=0.0)
    cos, sin = load_angles(cos_ptr + t * cos_token, sin_ptr + t * cos_token, rows, inside, R)
    query = load_rotated(q_ptr + t * q_token, rows, (rows < K) & inside, cos, sin, R)
    key = load_rotated(k_ptr + t * k_token, rows, (rows < K) & inside, cos, sin, R)
    there = inside
    if HAS_REAL:
        there = inside & tl.load(real_ptr + t, mask=t < time, other=0).to(tl.int1)
    return there, query, key, value, log_decay, beta, gate


@triton.jit  # type: ignore[untyped-decorator]
def load_finish(ptr, columns, there, V: tl.constexpr, GIVEN: tl.constexpr):
    """What these columns of a head's output are finished with; any numbers where it is not given."""
    x = columns.to(tl.float32)
    if GIVEN:
        x = tl.load(ptr + columns, mask=(columns < V) & there, other=0.0).to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def of_token(there, x, HAS_REAL: tl.constexpr):
    """A token's numbers in fp32; 0 where no token is."""
    x = x.to(tl.float32)
    if HAS_REAL:
        x = tl.where(there, x, 0.0)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def decay_of_head(decay_rate_ptr, decay_bias_ptr, head, RAW_DECAY: tl.constexpr):
    """The rate and the bias that raw decays of this head go through."""
    rate, bias = 0.0, 0.0
    if RAW_DECAY:
        rate = tl.exp(tl.load(decay_rate_ptr + head).to(tl.float32))
        bias = tl.load(decay_bias_ptr + head).to(tl.float32)
    return rate, bias


@triton.jit  # type: ignore[untyped-decorator]
def gates(there, log_decay, beta, rate, bias, beta_ceiling, RAW_DECAY: tl.constexpr, RAW_BETA: tl.constexpr):
    """a and b; 1 and 0, which leave the state as it is, where no token is."""
    log_decay, beta = log_decay.to(tl.float32), beta.to(tl.float32)
    if RAW_DECAY:
        log_decay += bias
        # softplus, in a form that does not overflow
        log_decay = -rate * (tl.maximum(log_decay, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(log_decay))))
    if RAW_BETA:
        beta = beta_ceiling * tl.sigmoid(beta)
    return tl.where(there, tl.exp(log_decay), 1.0), tl.where(there, beta, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def finish(
    result,
    there,
    gate,
    output_scale,
    epsilon,
    V: tl.constexpr,
    NORMED: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
):
    """Norm over all columns, scale and gate of a token's output."""
    if NORMED:
        result = result * tl.rsqrt(tl.sum(result * result, axis=0) / V + epsilon)
    if SCALED:
        result = result * output_scale
    if GATED:
        result = result * (2.0 * tl.sigmoid(gate))
    return tl.where(there, result, 0.0)
