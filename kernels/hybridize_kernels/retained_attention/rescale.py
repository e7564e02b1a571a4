"""The running maximum of an online softmax, for logits that hardly ever move it.

Triton can branch only for a whole block, which would wait for all of its warps. Here each warp decides for itself, by a
vote, whether a maximum has to move and whether an accumulator has to be multiplied.
"""

import triton
import triton.language as tl

MOST = 64
"""Elements of one vote: more need no fewer votes with the tiles in use."""

SLACK = tl.constexpr(8.0)
"""Powers of two by which a weight may exceed 1: far inside fp16's range."""

NOTHING_YET = tl.constexpr(1e30)
"""Minus the pivot of a row that has seen nothing: finite, so that masked logits give weights of 0 and not NaN."""


def elements_of_vote(elements: int, warps: int) -> int:
    """How many elements of a tensor of this size, spread over warps, a thread passes to `rescale` at once."""
    return max(1, min(MOST, elements // (32 * warps)))


@triton.constexpr_function  # type: ignore[untyped-decorator]
def advance_code(slack):
    """PTX for two rows of a thread: minus pivots `$0 $1` in place, factors `$2 $3`, largest logits `$4 $5`, scale `$6`.

    A row lies in the four lanes that differ in the last two bits of their number, as the matrix units leave it.
    """
    lines = [
        "{",
        ".reg .pred over, moves;",
        ".reg .f32 excess, other, top;",
        "fma.rn.f32 excess, $4, $6, $0;",
        f"setp.gt.f32 over, excess, {slack:.1f};",
        "fma.rn.f32 excess, $5, $6, $1;",
        f"setp.gt.or.f32 over, excess, {slack:.1f}, over;",
        "mov.f32 $2, 1.0;",
        "mov.f32 $3, 1.0;",
        "vote.sync.any.pred over, over, 0xffffffff;",
        "@!over bra DONE;",
    ]
    for row in range(2):
        minus, factor, logit = f"${row}", f"${row + 2}", f"${row + 4}"
        lines.append(f"mul.f32 top, {logit}, $6;")
        for lanes in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 other, top, {lanes}, 31, 0xffffffff;")
            lines.append("max.f32 top, top, other;")
        lines += [
            f"add.f32 excess, top, {minus};",
            f"setp.gt.f32 moves, excess, {slack:.1f};",
            "neg.f32 top, top;",
            f"selp.f32 top, top, {minus}, moves;",
            f"sub.f32 excess, top, {minus};",
            f"ex2.approx.ftz.f32 {factor}, excess;",
            f"mov.f32 {minus}, top;",
        ]
    return "\n".join([*lines, "DONE:", "}"])


@triton.jit  # type: ignore[untyped-decorator]
def advance(largest, minus, scale, QUADS: tl.constexpr):
    """Moves the pivots of rows whose largest logit exceeds theirs by more than SLACK powers of two.

    Args:
        largest: `[M, P]` parts of each row's largest logit, before scale (in base 2). minus: `[M, P]`, minus the pivot,
            P times the same.
        QUADS: a row's parts lie in four neighbouring lanes, one in each, and a thread has two rows.

    Returns:
        minus the new pivots, and the factors of at most 1 for what was added up under the old ones; `[M, P]`.
    """
    if QUADS:
        return tl.inline_asm_elementwise(
            advance_code(SLACK),
            "=&f,=&f,=&f,=&f,f,f,f,f,0,1",
            [largest, scale, minus],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        top = tl.max(largest, 1, keep_dims=True) * scale
        now = tl.where(top + minus > SLACK, -top, minus)
        return now, tl.math.exp2(now - minus)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def rescale_code(elements):
    """PTX: `elements` values `$0…` in place, times as many factors of at most 1, if any thread of the warp has one
    below 1. The constraints tie each value's input to its output."""
    factors = [f"${2 * elements + index}" for index in range(elements)]
    lines = ["{", ".reg .pred below;", f".reg .f32 least<{elements}>;"]
    level, used = factors, 0
    while len(level) > 1:
        above = []
        for one, other in zip(level[::2], level[1::2], strict=True):
            lines.append(f"min.f32 least{used}, {one}, {other};")
            above.append(f"least{used}")
            used += 1
        level = above
    lines += [
        f"setp.lt.f32 below, {level[0]}, 0f3F800000;",
        "vote.sync.any.pred below, below, 0xffffffff;",
        "@!below bra DONE;",
        *(f"mul.f32 ${index}, ${index}, {factor};" for index, factor in enumerate(factors)),
        "DONE:",
        "}",
    ]
    return "\n".join(lines)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def rescale_constraints(elements):
    """Outputs, the inputs tied to them, and the factors."""
    return ",".join(["=f"] * elements + [str(index) for index in range(elements)] + ["f"] * elements)


@triton.jit  # type: ignore[untyped-decorator]
def rescale(values, factors, VOTE: tl.constexpr):
    """values (fp32) times factors of at most 1 (of their shape); VOTE: see elements_of_vote, 0 to multiply always."""
    if VOTE > 0:
        return tl.inline_asm_elementwise(
            rescale_code(VOTE),
            rescale_constraints(VOTE),
            [values, factors],
            dtype=tl.float32,
            is_pure=True,
            pack=VOTE,
        )
    else:
        return values * factors
