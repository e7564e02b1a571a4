"""Which layer gets which mixer, from every way of saying it."""

from __future__ import annotations

from typing import Any

import pytest

from hybridize.errors import RecipeError
from hybridize.mixers.registry import MIXERS
from hybridize.recipe.layers import choose_mixers
from hybridize.recipe.reader import recipe_from_dict

DEPTH = 8


def letters(layers: Any, mixers: dict[str, Any] | None = None) -> str:
    """The first letter of each layer's mixer."""
    recipe = recipe_from_dict({"model": "a/b", "layers": layers, "mixers": mixers or {}})
    chosen = choose_mixers(recipe, DEPTH, tuple(MIXERS))
    return "".join(choice.mixer[0] for _, choice in chosen)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("G F", "gfgfgfgf"),
        ("G,T,F", "gtfgtfgt"),
        ("sliding_window full_attention", "sfsfsfsf"),
        (["F", "F", "F", "F", "F", "F", "F", "N"], "fffffffn"),
        ([{"use": "G", "indices": [7, 0]}], "gffffffg"),
        ([{"use": "T", "range": "2-4"}], "fftttfff"),
        ([{"use": "T", "range": " 2 - 2 "}], "fftfffff"),
        ([{"use": "S", "every": 4, "offset": 1}], "fsfffsff"),
        ([{"use": "S", "every": 3}, {"use": "G", "indices": [1]}, {"use": "F", "indices": [2]}], "sgfsffsf"),
        ({"pattern": "T G", "allow_no_full_attention": True}, "tgtgtgtg"),
    ],
)
def test_ways_to_choose(layers: Any, expected: str) -> None:
    assert letters(layers) == expected


def test_own_names_come_before_letters() -> None:
    assert letters("G F", {"G": {"mixer": "sliding_window"}}) == "sfsfsfsf"
    recipe = recipe_from_dict({"model": "a/b", "layers": "near F", "mixers": {"near": "sliding_window"}})
    assert choose_mixers(recipe, DEPTH, tuple(MIXERS))[0][0] == "mixers.near"


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([{"use": "G", "indices": [32]}], "32 is outside 0..7 (model has 8 layers)"),
        ([{"use": "G", "indices": [-1]}], "-1 is outside 0..7"),
        ([{"use": "G", "range": "4-12"}], "are outside 0..7"),
        ([{"use": "G", "range": "999999999-999999999"}], "999999999 is outside 0..7"),
        ([{"use": "G", "range": "0-999999999"}], "are outside 0..7"),
        ([{"use": "G", "range": "6-4"}], "is not a range of layers"),
        ([{"use": "G", "range": "all"}], "is not a range of layers"),
        ([{"use": "G", "indices": []}], "names no layer"),
        ([{"use": "G", "range": "0-4"}, {"use": "T", "indices": [4]}], "layer 4 is assigned twice"),
        ([{"use": "G", "indices": [1, 1]}], "layer 1 is assigned twice"),
        ("G X", "unknown mixer 'X'"),
        ("sliding_windw F", "did you mean 'sliding_window'?"),
        ("G G G G G G G G F", "names 9 layers and the model has 8"),
        (" , ", "is empty"),
        ("F", "no layer is converted"),
        ([{"use": "F", "indices": [3]}], "no layer is converted"),
        ("G T", "allow_no_full_attention: true"),
    ],
)
def test_refusals(layers: Any, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        letters(layers)
    assert says in str(caught.value)


def test_unknown_mixer_lists_all() -> None:
    with pytest.raises(RecipeError) as caught:
        letters("Q F")
    assert all(name in str(caught.value) for name in MIXERS)


def test_all_faults_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        letters([{"use": "Q", "indices": [0, 99]}, {"use": "G", "indices": [0]}])
    assert len(caught.value.problems) == 3
