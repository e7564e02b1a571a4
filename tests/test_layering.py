"""The house rules that a syntax tree can check. The tables come first; each rule is one function from a file's name and
source to a list of complaints, and each is tried on a bad example below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BOTTOM = {"errors", "files", "progress", "recipe", "hybridize_kernels"}
MIDDLE = BOTTOM | {"mixers", "families", "checkpoint"}
UPPER = MIDDLE | {"plan", "model"}
MAY_IMPORT: dict[str, set[str]] = {
    "hybridize": UPPER | {"inference", "corpus", "report", "evaluation", "distillation", "cli"},  # the façade
    "cli": UPPER | {"inference", "corpus", "report", "evaluation", "distillation"},
    "corpus": UPPER | {"inference"},
    "report": UPPER,
    "evaluation": UPPER | {"inference"},
    "distillation": UPPER,
    "inference": UPPER,
    "model": MIDDLE | {"plan"},
    "plan": MIDDLE,
    "mixers": BOTTOM | {"families.base"},
    "families": BOTTOM,
    "checkpoint": BOTTOM,
    "recipe": BOTTOM - {"hybridize_kernels"},
    "progress": {"errors"},
    "errors": set(),
    "files": set(),
}
"""What each part of `hybridize` may import besides itself; `a.b` allows that module of `a` alone."""

KERNELS_MAY_IMPORT = {"torch", "triton"}
"""Besides the standard library and, relatively, itself."""

TORCH_FREE = (
    *(
        "hybridize",
        "hybridize.errors",
        "hybridize.files",
        "hybridize.progress",
        "hybridize.recipe.*",
        "hybridize.plan.*",
        "hybridize.cli.*",
    ),
    *("hybridize.checkpoint.*", "hybridize.families.*", "hybridize.mixers.configs.*", "hybridize.mixers.registry"),
    *("hybridize.report.*",),
)
"""Modules that are imported without torch and transformers; `.*` means a package and all in it."""

SLOW_TO_IMPORT = {"torch", "transformers", "peft", "datasets", "accelerate", "triton"}
ONLY_IN_CHECKPOINT = {"safetensors", "gguf"}
PRINTS = ("print", "sys.stdout.write", "sys.stderr.write")
ONLY_SINK = "hybridize/cli/output.py"
CHILD_PROCESS = "hybridize/model/elsewhere.py"
"""Run by itself: it loads the code of a folder that was just written, and answers its parent on standard output."""

UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec"}
ASKS_FOR_THE_GPU = {"is_available", "get_device_capability", "get_device_properties", "get_device_name"}
MAX_LINES = 400

MACHINE = re.compile(
    r"(?<![\w.:/-])/(?:work|root|home|opt|mnt|Users)/\w"  # absolute paths of one machine
    r"|(?<![\w.:/-])/(?:var/)?tmp/[\w.]"
    r"|\b(?:pypi|pythonhosted|download\.pytorch|deb\.debian)\.org\b"  # where packages come from is the user's setting
)
THIRD_PARTY_TEXT = "recipes/text/"


def module_name(path: str) -> str:
    """`kernels/hybridize_kernels/a/__init__.py` -> `hybridize_kernels.a`."""
    parts = path.removeprefix("kernels/").removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The key of MAY_IMPORT that a module of ours belongs to."""
    parts = module.split(".")
    return parts[0] if len(parts) == 1 or parts[0] != "hybridize" else parts[1]


def in_package(module: str, pattern: str) -> bool:
    package = pattern.removesuffix(".*")
    return module == package or module.startswith(f"{package}.")


def is_torch_free(module: str) -> bool:
    return any(in_package(module, rule) if rule.endswith(".*") else module == rule for rule in TORCH_FREE)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def called_module(node: ast.Call) -> str | None:
    """The constant beginning of the name that is given to importlib.import_module."""
    if dotted(node.func).split(".")[-1] not in ("import_module", "__import__") or not node.args:
        return None
    first = node.args[0]
    if isinstance(first, ast.JoinedStr) and first.values:
        first = first.values[0]
    return first.value.rstrip(".") if isinstance(first, ast.Constant) and isinstance(first.value, str) else None


def imports_of(path: str, tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted name, written relatively) of every import, those inside functions too."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}", bool(node.level)
        elif isinstance(node, ast.Call) and (name := called_module(node)):
            yield node.lineno, name, False


def imports_at_load(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a module is loaded: not in functions, not under `if TYPE_CHECKING`."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and dotted(node.test).split(".")[-1] == "TYPE_CHECKING":
            yield from imports_at_load(node.orelse)
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from imports_at_load(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from imports_at_load(handler.body)


def imports_point_downwards(path: str, source: str) -> list[str]:
    own = part_of(module_name(path))
    own = "cli" if own == "__main__" else own
    if own != "hybridize_kernels" and own not in MAY_IMPORT:
        return [f"{path}: no part of the house: give it a place in design and in MAY_IMPORT"]
    complaints = []
    for line, name, relative in imports_of(path, ast.parse(source)):
        top, target = name.split(".")[0], part_of(name)
        if own == "hybridize_kernels":
            wrong = not relative and top not in KERNELS_MAY_IMPORT and top not in sys.stdlib_module_names
        elif top not in ("hybridize", "hybridize_kernels") or target == own or target.startswith("_"):
            wrong = False
        else:
            inner = name.removeprefix("hybridize.")
            wrong = not any(in_package(inner, allowed) for allowed in MAY_IMPORT[own])
        if wrong:
            complaints.append(f"{path}:{line}: {own} may not import {name}")
    return complaints


def loads_without_torch(path: str, source: str) -> list[str]:
    if not is_torch_free(module_name(path)):
        return []
    complaints = []
    for node in imports_at_load(ast.parse(source).body):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        slow = SLOW_TO_IMPORT.intersection(name.split(".")[0] for name in names)
        complaints += [f"{path}:{node.lineno}: imports {name} when it is loaded" for name in sorted(slow)]
    return complaints


def only_checkpoint_opens_model_files(path: str, source: str) -> list[str]:
    if path.startswith("hybridize/checkpoint/"):
        return []
    found = imports_of(path, ast.parse(source))
    return [f"{path}:{line}: imports {name}" for line, name, _ in found if name.split(".")[0] in ONLY_IN_CHECKPOINT]


def only_the_sink_prints(path: str, source: str) -> list[str]:
    if path in (ONLY_SINK, CHILD_PROCESS) or path.startswith("kernels/"):
        return []
    complaints = []
    for node in ast.walk(ast.parse(source)):
        name = dotted(node.func) if isinstance(node, ast.Call) else ""
        if (
            name == "print"
            or name.split(".")[-1] in ("echo", "secho", "Console")
            or name in ("sys.stdout.write", "sys.stderr.write")
        ):
            complaints.append(f"{path}:{node.lineno}: {name}(: only {ONLY_SINK} prints")
    return complaints


def no_remote_code(path: str, source: str) -> list[str]:
    if path == CHILD_PROCESS:
        return []
    complaints = []
    for node in ast.walk(ast.parse(source)):
        values: list[ast.expr] = []
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            values = [node.value]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "trust_remote_code"]
        for value in values:
            if not (isinstance(value, ast.Constant) and value.value is False):
                complaints.append(f"{path}:{value.lineno}: trust_remote_code that is not False")
    return complaints


def no_unsafe_loading(path: str, source: str) -> list[str]:
    tree = ast.parse(source)
    complaints = [
        f"{path}:{line}: imports {name}"
        for line, name, _ in imports_of(path, tree)
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS
    ]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS]
    return complaints + [f"{path}:{node.lineno}: calls {dotted(node.func)}" for node in calls]


def only_dispatch_asks_for_the_gpu(path: str, source: str) -> list[str]:
    if not path.startswith("kernels/hybridize_kernels/") or path.endswith("/dispatch.py"):
        return []
    calls = [(node.lineno, dotted(node.func)) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    asked = [(line, name) for line, name in calls if ".cuda." in name and name.split(".")[-1] in ASKS_FOR_THE_GPU]
    return [f"{path}:{line}: {name}: only dispatch.py asks what GPU this is" for line, name in asked]


def not_too_long(path: str, source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{path}: {lines} lines; ask what it is two of"] if lines > MAX_LINES else []


def names_no_machine(path: str, source: str) -> list[str]:
    found = ((number, MACHINE.search(line)) for number, line in enumerate(source.splitlines(), 1))
    return [f"{path}:{number}: {match.group()!r} is one machine's" for number, match in found if match]


RULES: list[Callable[[str, str], list[str]]] = [
    imports_point_downwards,
    loads_without_torch,
    only_checkpoint_opens_model_files,
    only_the_sink_prints,
    no_remote_code,
    no_unsafe_loading,
    only_dispatch_asks_for_the_gpu,
    not_too_long,
]

BAD: list[tuple[Callable[[str, str], list[str]], str, str]] = [
    (imports_point_downwards, "hybridize/recipe/reader.py", "from hybridize.model import convert"),
    (imports_point_downwards, "hybridize/recipe/reader.py", "def f():\n    import hybridize.plan"),
    (imports_point_downwards, "hybridize/recipe/reader.py", "from hybridize import cli"),
    (imports_point_downwards, "hybridize/recipe/reader.py", "from ..checkpoint import reader"),
    (imports_point_downwards, "hybridize/mixers/a.py", "from hybridize.families import llama"),
    (imports_point_downwards, "hybridize/families/a.py", "from hybridize.mixers.base import Mixer"),
    (imports_point_downwards, "hybridize/checkpoint/a.py", "import hybridize.families.base"),
    (imports_point_downwards, "hybridize/report/a.py", "from hybridize.evaluation import runner"),
    (imports_point_downwards, "hybridize/plan.py", "from hybridize.model.convert import convert"),
    (imports_point_downwards, "hybridize/plan.py", "import importlib\nimportlib.import_module(f'hybridize.cli.{x}')"),
    (imports_point_downwards, "hybridize/odds_and_ends.py", ""),
    (imports_point_downwards, "kernels/hybridize_kernels/a/forward.py", "import hybridize.errors"),
    (imports_point_downwards, "kernels/hybridize_kernels/a/forward.py", "import transformers"),
    (imports_point_downwards, "kernels/hybridize_kernels/a/forward.py", "from hybridize_kernels import dispatch"),
    (loads_without_torch, "hybridize/plan.py", "import torch.nn"),
    (loads_without_torch, "hybridize/recipe/reader.py", "import torch"),
    (
        loads_without_torch,
        "hybridize/cli/plan.py",
        "try:\n    from transformers import A\nexcept E:\n    pass",
    ),
    (loads_without_torch, "hybridize/families/a.py", "class A:\n    import torch"),
    (
        only_checkpoint_opens_model_files,
        "hybridize/model/a.py",
        "def f():\n    from safetensors import a",
    ),
    (only_the_sink_prints, "hybridize/model/a.py", "print('done')"),
    (only_the_sink_prints, "hybridize/cli/plan.py", "click.echo('done')"),
    (only_the_sink_prints, "hybridize/report/a.py", "from rich.console import Console\nConsole().rule()"),
    (no_remote_code, "hybridize/model/a.py", "load(x, trust_remote_code=True)"),
    (no_remote_code, "hybridize/model/a.py", "load(x, trust_remote_code=flag)"),
    (no_remote_code, "hybridize/model/a.py", "load(x, **{'trust_remote_code': True})"),
    (no_unsafe_loading, "hybridize/model/a.py", "import torch\ntorch.load('x', weights_only=True)"),
    (no_unsafe_loading, "hybridize/model/a.py", "from torch import load"),
    (no_unsafe_loading, "hybridize/recipe/a.py", "yaml.load(text, Loader=L)"),
    (no_unsafe_loading, "hybridize/recipe/a.py", "def f():\n    import pickle"),
    (only_dispatch_asks_for_the_gpu, "kernels/hybridize_kernels/a/b.py", "torch.cuda.get_device_capability()"),
    (not_too_long, "hybridize/a.py", "x = 1\n" * 401),
    (names_no_machine, "README.md", "see /" + "home/ada/model"),
    (names_no_machine, "README.md", "`/" + "tmp/x`"),
    (names_no_machine, "Makefile", "pip install -i https://pypi" + ".org/simple"),
]

GOOD = """
from typing import TYPE_CHECKING
from hybridize.errors import RecipeError
from hybridize.families.base import AttentionView
from hybridize import __version__
import importlib
importlib.import_module(f"hybridize.mixers.{name}")
if TYPE_CHECKING:
    import torch
def f(path):
    import torch
    return load(path, trust_remote_code=False), yaml.safe_load(path)
"""


def sources() -> list[tuple[str, str]]:
    files = [*ROOT.glob("hybridize/**/*.py"), *ROOT.glob("kernels/hybridize_kernels/**/*.py")]
    return [(path.relative_to(ROOT).as_posix(), path.read_text()) for path in sorted(files)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_keeps_the_rule(rule: Callable[[str, str], list[str]]) -> None:
    files = sources()
    assert {part_of(module_name(path)) for path, _ in files} >= {"mixers", "families", "errors", "hybridize_kernels"}
    assert [complaint for path, source in files for complaint in rule(path, source)] == []


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_rule_sees_a_bad_example(rule: Callable[[str, str], list[str]], path: str, source: str) -> None:
    assert len(rule(path, source)) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_passes_a_good_example(rule: Callable[[str, str], list[str]]) -> None:
    assert rule("hybridize/mixers/registry.py", GOOD) == []


def test_every_rule_has_a_bad_example() -> None:
    assert {rule for rule, _, _ in BAD} == {*RULES, names_no_machine}


def test_tracked_files_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0") if listed.stdout else [path for path, _ in sources()]  # an unpacked archive
    files = [ROOT / name for name in names if name and not name.startswith(THIRD_PARTY_TEXT)]
    texts = ((path, path.read_bytes()) for path in files if path.is_file())
    readable = [(path, data.decode()) for path, data in texts if b"\0" not in data]
    assert len(readable) > 10
    assert [c for path, text in readable for c in names_no_machine(path.relative_to(ROOT).as_posix(), text)] == []


def test_torch_free_modules_leave_torch_alone() -> None:
    """By running them: an import of an import counts too."""
    modules = [module_name(path) for path, _ in sources() if is_torch_free(module_name(path))]
    modules = [name for name in modules if not name.endswith("__main__")]  # importing it would run the command
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"sys.exit(', '.join(sorted({SLOW_TO_IMPORT!r} & set(sys.modules))) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"imported on the way: {result.stderr}"
    assert len(modules) > 10
