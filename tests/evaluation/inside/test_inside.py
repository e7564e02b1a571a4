"""All parts together: the form of the row, in every type and family."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hybridize.evaluation.inside.ablation import ablation
from hybridize.evaluation.inside.inside import PARTS, inside
from hybridize.evaluation.items import Item
from hybridize.progress import SILENT
from hybridize.recipe.probes import AblationProbe, InsideProbe
from tests.evaluation.inside.hybrids import DELTA, EVICTION, FULL, SPARSE, WINDOW, make_texts, tiny_hybrid
from tests.tiny import FAMILY_NAMES

OF_MIXER = {
    "token_eviction": {"retention", "needles", "shown"},
    "gated_delta_net": {"gates"},
    "native_sparse_attention": {"selection"},
    "sliding_window": set(),
    "full_attention": set(),
}


def look_inside(student: Any, teacher: Any | None, tokenizer: Any) -> dict[str, Any]:
    windows = make_texts(40, 33)
    items = [Item("niah_single_1", windows[0].tokens, ("7",), 8, 40, 0.1, evidence=((4, 9),))]
    with SILENT.task("", None) as task:
        return inside(
            student, teacher, tokenizer, windows, items, InsideProbe(shown_tokens=30), batch_tokens=40, task=task
        )


@pytest.mark.parametrize("mixer", [EVICTION, DELTA, SPARSE, WINDOW, FULL], ids=lambda mixer: mixer["mixer"])
def test_parts_without_layers_are_null(tokenizer: Any, mixer: dict[str, Any]) -> None:
    row = look_inside(tiny_hybrid(FULL, mixer), None, tokenizer)
    assert tuple(row) == PARTS
    assert {name for name, part in row.items() if part is not None} == OF_MIXER[mixer["mixer"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_and_type_gives_finite_numbers(tokenizer: Any, family: str, dtype: torch.dtype) -> None:
    student = tiny_hybrid(EVICTION, DELTA, SPARSE, FULL, family=family).to(dtype)
    teacher = tiny_hybrid(*[FULL] * 4, family=family).to(dtype)
    row = look_inside(student, teacher, tokenizer)
    json.dumps(row, allow_nan=False)
    assert None not in row.values()
    assert len(row["shown"]["pieces"]) == 30
    with SILENT.task("", None) as task:
        found = ablation(student, teacher, make_texts(40, 33), AblationProbe(), batch_tokens=40, task=task)
    json.dumps(found, allow_nan=False)
    assert len(found["layers"]) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_gpu_gives_the_numbers_of_a_cpu(tokenizer: Any, dtype: torch.dtype) -> None:
    student = tiny_hybrid(EVICTION, DELTA, {**SPARSE, "block_tokens": 16}, FULL).to(dtype)
    teacher = tiny_hybrid(*[FULL] * 4).to(dtype)
    there = look_inside(student.to("cuda"), teacher.to("cuda"), tokenizer)
    here = look_inside(student.to("cpu").float(), teacher.to("cpu").float(), tokenizer)
    close = 1e-3 if dtype == torch.float32 else 0.1
    for part, key in (("gates", "decay"), ("gates", "output_gate"), ("selection", "mass"), ("selection", "best")):
        for ours, theirs in zip(here[part]["layers"], there[part]["layers"], strict=True):
            assert [head[key] for head in ours["heads"]] == pytest.approx(
                [head[key] for head in theirs["heads"]], abs=close
            )
    if dtype == torch.float32:
        assert there["shown"] == here["shown"]
        assert there["needles"] == here["needles"]
