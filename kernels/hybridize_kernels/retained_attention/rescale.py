"""Rescale an accumulator by factors that are nearly always 1, and skip the products where they all are.

Triton can branch only for a whole block, which would wait for all of its warps. Here each warp decides for itself, by a
vote; the code does not depend on which elements a thread holds.
"""

import triton
import triton.language as tl

MOST = 64
"""Elements of one vote: more need no fewer votes with the tiles in use."""


def elements_of_vote(elements: int, warps: int) -> int:
    """How many elements of a tensor of this size, spread over warps, a thread passes to `rescale` at once."""
    return max(1, min(MOST, elements // (32 * warps)))


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
    """values `[M, D]` (fp32) times factors `[M]` of at most 1; VOTE: see elements_of_vote, 0 to multiply always."""
    factors = tl.broadcast_to(factors[:, None], values.shape)
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
