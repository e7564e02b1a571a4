"""The self-contained code of an exported folder: our own source files, flattened.

transformers loads remote code from files that lie side by side, so `hybridize.mixers.base` becomes
`hybridize_mixers_base.py` and its imports become relative ones. Nothing is rewritten but import lines. The ops come
from an installed `hybridize_kernels` where there is one, else from a copy of their plain PyTorch form.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from hybridize.families.base import FamilyAdapter
from hybridize.mixers.registry import MIXERS

ENTRY = "modeling_hybridize"
_REGISTRY = "hybridize.mixers.registry"
_KERNELS = "hybridize_kernels"

_HEADER = "# Written by `hybridize export` from the module {module}; Apache-2.0.\n"

_ENTRY_TEMPLATE = '''"""The hybrid model of this folder: load it with AutoModelForCausalLM, allowing remote code."""

from .{modeling} import hybrid_classes
from .{family} import ADAPTER

{prefix}Config, {prefix}Model, {prefix}ForCausalLM = hybrid_classes(ADAPTER, __name__)
'''

_REGISTRY_TEMPLATE = '''"""The mixers of this model."""

{imports}

_CONFIGS = {{{configs}}}
_MIXERS = {{{mixers}}}


def config_from_dict(values):
    options = dict(values)
    return _CONFIGS[options.pop("mixer")](**options)


def mixer_class(name):
    return _MIXERS[name]
'''


def bundle(adapter: FamilyAdapter, mixer_names: Iterable[str]) -> dict[str, str]:
    """The code files of an export.

    Args:
        adapter: the model's family.
        mixer_names: the mixers it uses; `full_attention` needs none.

    Returns:
        file name -> source text.
    """
    names = sorted({name for name in mixer_names if MIXERS[name].mixer_class is not None})
    family_module = type(adapter).__module__
    files = {
        f"{ENTRY}.py": _ENTRY_TEMPLATE.format(
            modeling=_flat("hybridize.model.modeling"), family=_flat(family_module), prefix=adapter.hybrid_prefix
        ),
        f"{_flat(_REGISTRY)}.py": _registry(names),
    }
    waiting = ["hybridize.model.modeling", family_module]
    waiting += [f"hybridize.mixers.{part}{name}" for name in names for part in ("", "configs.")]
    while waiting:
        module = waiting.pop()
        file = f"{_flat(module)}.py"
        if file in files:
            continue
        text, needed = _flatten(module)
        files[file] = _HEADER.format(module=module) + text
        waiting += needed
    return dict(sorted(files.items()))


def auto_map(adapter: FamilyAdapter) -> dict[str, str]:
    """The `auto_map` block of config.json."""
    return {
        "AutoConfig": f"{ENTRY}.{adapter.hybrid_prefix}Config",
        "AutoModelForCausalLM": f"{ENTRY}.{adapter.hybrid_prefix}ForCausalLM",
    }


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _registry(names: list[str]) -> str:
    imports, configs, mixers = [], [], []
    for name in names:
        entry = MIXERS[name]
        imports.append(f"from .hybridize_mixers_{name} import {entry.mixer_class}")
        imports.append(f"from .hybridize_mixers_configs_{name} import {entry.config_class}")
        configs.append(f'"{name}": {entry.config_class}')
        mixers.append(f'"{name}": {entry.mixer_class}')
    return _REGISTRY_TEMPLATE.format(imports="\n".join(imports), configs=", ".join(configs), mixers=", ".join(mixers))


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"{module} has no source file to export")
    return Path(spec.origin).read_text(encoding="utf-8")


def _flatten(module: str) -> tuple[str, list[str]]:
    """Source of `module` with its imports of our packages made relative, and the modules they name."""
    text = _source(module)
    lines = text.splitlines()
    needed: list[str] = []
    # From the end, so that line numbers above stay valid.
    for node in reversed([n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]):
        origin = node.module or ""
        if origin.split(".")[0] not in ("hybridize", _KERNELS):
            continue
        if node.level:
            raise ImportError(f"{module}:{node.lineno}: exported modules must not use relative imports")
        indent = " " * node.col_offset
        if origin.split(".")[0] == _KERNELS:
            new, modules = _kernel_import(node, indent)
        else:
            imported = ", ".join(f"{a.name} as {a.asname}" if a.asname else a.name for a in node.names)
            new, modules = [f"{indent}from .{_flat(origin)} import {imported}"], [origin]
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = new
        needed += [name for name in modules if name != _REGISTRY]
    return "\n".join(lines) + "\n", needed


def _op_package(module: str, name: str) -> str:
    """The op's package that defines `name`: `hybridize_kernels.retained_attention` for `retained_attention`."""
    origin: str = getattr(importlib.import_module(module), name).__module__
    return ".".join(origin.split(".")[:2])


def _kernel_import(node: ast.ImportFrom, indent: str) -> tuple[list[str], list[str]]:
    """`from hybridize_kernels import op` tries the installed package and falls back to the op's eager form."""
    lines, modules = [], []
    for alias in node.names:
        eager = f"{_op_package(node.module or _KERNELS, alias.name)}.eager"
        name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
        lines += [
            f"{indent}try:",
            f"{indent}    from {node.module} import {name}",
            f"{indent}except ImportError:",
            f"{indent}    from .{_flat(eager)} import {name}",
        ]
        modules.append(eager)
    return lines, modules
