"""The code that an export carries."""

from __future__ import annotations

import ast

import pytest

from hybridize.families import FAMILIES, family
from hybridize.mixers.registry import MIXERS
from hybridize.model.bundle import auto_map, bundle


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_copy_imports_nothing_of_ours_and_nothing_that_is_missing(model_type, mixer):
    files = bundle(family(model_type), [mixer])
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom | ast.Import):
                continue
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "hybridize" for alias in node.names), name
                continue
            assert (node.module or "").split(".")[0] != "hybridize", f"{name}:{node.lineno}"
            if node.level:
                assert f"{node.module}.py" in files, f"{name}:{node.lineno} needs {node.module}"


def test_an_op_is_taken_from_the_installed_kernels_where_there_are_any():
    text = bundle(family("llama"), ["gated_delta_net"])["hybridize_mixers_gated_delta_net.py"]
    tries = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Try)]
    assert any("hybridize_kernels" in ast.unparse(node.body[0]) for node in tries)
    assert any(".hybridize_kernels_gated_delta_rule_eager" in ast.unparse(node.handlers[0]) for node in tries)


def test_only_the_mixers_in_use_are_carried():
    files = bundle(family("llama"), ["sliding_window", "full_attention"])
    assert "hybridize_mixers_sliding_window.py" in files
    assert not any("gated_delta" in name for name in files)


def test_the_auto_map_names_classes_of_the_entry_module():
    entry = bundle(family("qwen3"), ["sliding_window"])["modeling_hybridize.py"]
    for target in auto_map(family("qwen3")).values():
        module, name = target.split(".")
        assert module == "modeling_hybridize"
        assert name in entry
