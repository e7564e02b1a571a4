"""A decoding step of retained attention told as a story, one row and key head at a time."""

import torch
from torch import Tensor

from ..rotary.reference import rotary as rotate


@torch.no_grad()
def retained_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    last_position: Tensor,
    *,
    window: int,
    sinks: int,
    positions: Tensor,
    scale: float,
    scores: Tensor | None = None,
    retained_positions: Tensor | None = None,
    num_retained: Tensor | None = None,
    fresh_score: Tensor | None = None,
    margin: int = 0,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See `hybridize_kernels.retained_decode`; what the other forms must equal, the cache bit for bit."""
    if rotary is not None:
        q, k = rotate(q, k, *rotary)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, _, query_heads, head_size = q.shape
    heads = keys.shape[1]
    output = torch.zeros_like(q).view(batch, heads, query_heads // heads, head_size)
    for row, position in enumerate(positions[:, 0].tolist()):
        if position < 0:
            continue
        last_position[row] = position
        ring = position % window
        for head in range(heads):
            leaving = position - window
            target = None
            if scores is None or retained_positions is None or num_retained is None:
                num_slots = min(max(leaving + 1, 0), sinks)
                target = leaving if 0 <= leaving < sinks else None
            else:
                of_head, retained = scores[row, head], retained_positions[row, head]
                if fresh_score is not None and 0 < margin <= position:
                    of_head[(position - margin) % window] = fresh_score[row, head]
                if leaving >= 0:
                    target = _slot_for(leaving, of_head, retained, window, sinks)
                if target is not None:
                    num_retained[row, head] += int(retained[target] < 0)
                    retained[target] = leaving
                    of_head[window + target] = of_head[ring]
                of_head[ring] = fresh_score[row, head] if fresh_score is not None and margin == 0 else 0.0
                num_slots = int(num_retained[row, head])
            for slots, new in ((keys[row, head], k[row, 0, head]), (values[row, head], v[row, 0, head])):
                if target is not None:
                    slots[window + target] = slots[ring]
                slots[ring] = new
            seen = [*range(min(position + 1, window)), *range(window, window + num_slots)]
            group = q[row, 0].view(heads, -1, head_size)[head].to(dtype)
            weights = (scale * group @ keys[row, head, seen].to(dtype).T).softmax(-1)
            output[row, head] = (weights @ values[row, head, seen].to(dtype)).to(q.dtype)
    return output.view(batch, 1, query_heads, head_size)


def _slot_for(leaving: int, scores: Tensor, retained: Tensor, window: int, sinks: int) -> int | None:
    """The retained slot that the token at position `leaving` takes, or None; scores `[W + C]`, retained `[C]`."""
    score = float(scores[leaving % window])
    if not (leaving < sinks or score > 0):
        return None
    free = [slot for slot, position in enumerate(retained.tolist()) if position < 0]
    if free:
        return free[0]
    # As pairs that grow with the rank: the score (sinks above any), then the age.
    rank = [
        (float("inf") if position < sinks else float(scores[window + slot]), -position)
        for slot, position in enumerate(retained.tolist())
    ]
    if not rank:
        return None
    lowest = rank.index(min(rank))
    return lowest if rank[lowest] < (score, -leaving) else None
