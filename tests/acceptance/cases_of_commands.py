"""Groups IV, VII, IX and XI: recipes, numbers, folders of ours, commands; and every reader on the worst files."""

from __future__ import annotations

from tests.acceptance.case import RUN, TEACHER, Case
from tests.acceptance.project import (
    FILE,
    INDEX,
    NORM,
    QUERY,
    Break,
    both,
    change,
    fill,
    no_break,
    patch_json,
    pipe,
    recipe,
    remove,
    write,
)


def bad_recipe(id: str, old: str, new: str, *says: str) -> Case:
    return Case(id, recipe(old, new), TEACHER, 3, ("recipe.yaml:", *says))


def bad_text(id: str, text: bytes | str, *says: str) -> Case:
    return Case(id, write("recipe.yaml", text), TEACHER, 3, ("recipe.yaml", *says))


RULES = "layers: [{{use: T, {}}}]"
TEN = "\n".join(f"wrong_{number}: 1" for number in range(10))

IV_RECIPES = [
    bad_recipe("IV-unknown-key", "layers: F T G F", "layers: F T G F\nsed: 1", "did you mean 'seed'"),
    bad_recipe("IV-wrong-type", "rank: 2", "rank: two", "distill.lora.rank", "whole number"),
    bad_recipe("IV-negative-window", "window_tokens: 14", "window_tokens: -14", "window_tokens", "-14"),
    bad_recipe("IV-layer-out-of-range", "layers: F T G F", RULES.format("indices: [40]"), "40", "outside 0..3"),
    bad_recipe(
        "IV-layer-twice",
        "layers: F T G F",
        "layers: [{use: T, indices: [1]}, {use: G, range: 0-1}]",
        "layer 1 is assigned twice",
    ),
    bad_recipe("IV-none-converted", "layers: F T G F", "layers: F", "no layer is converted"),
    bad_recipe("IV-no-full-attention", "layers: F T G F", "layers: T G", "allow_no_full_attention"),
    bad_recipe("IV-unknown-mixer", "mixer: token_eviction", "mixer: token_evicton", "token_eviction", "sliding_window"),
    bad_recipe("IV-unknown-letter", "layers: F T G F", "layers: F Q", "unknown mixer 'Q'", "gated_delta_net"),
    bad_recipe(
        "IV-unsupported-by-model", "window_tokens: 14", "window_tokens: 14, scorer_layers: 5", "halve the 16 channels"
    ),
    bad_recipe(
        "IV-unknown-loss",
        "steps: 1, learning_rate: 1e-2}\n    - ",
        "steps: 1, learning_rate: 1e-2, loss: {kll: 1}}\n    - ",
        "kll",
        "did you mean 'kl'",
    ),
    bad_recipe(
        "IV-learning-rate-nan",
        "kind: align, steps: 1, learning_rate: 1e-2",
        "kind: align, steps: 1, learning_rate: .nan",
        "learning_rate",
        "nan",
    ),
    bad_text("IV-empty-file", "", "is empty"),
    bad_text("IV-only-comments", "# nothing\n", "is empty"),
    bad_text("IV-tab", "model: teacher\nlayers:\n\tpattern: F\n", "recipe.yaml:3"),
    bad_text("IV-invalid-yaml", "model: teacher\nlayers: [F\n", "recipe.yaml:"),
    bad_recipe("IV-duplicate-key", "layers: F T G F", "layers: F T G F\nlayers: G F", "is there twice"),
    bad_recipe("IV-ten-errors", "layers: F T G F", f"layers: F T G F\n{TEN}", *(f"wrong_{n}:" for n in range(10))),
    bad_text("IV-not-utf8", b"model: \xff\xfe\n", "recipe.yaml:1", "UTF-8"),
    bad_text("IV-too-large", b"#" * 1_000_001, "larger than"),
    bad_text("IV-nested-too-deeply", "model: " + "[" * 100 + "]" * 100, "recipe.yaml:1", "nested"),
    bad_text("IV-anchor", "model: &a teacher\nlayers: *a\n", "recipe.yaml:1", "anchors"),
    bad_text("IV-two-documents", "model: teacher\n---\nmodel: x\n", "recipe.yaml"),
    bad_text("IV-a-list", "[1, 2]", "a group of keys"),
    Case("IV-no-such-recipe", no_break, ("plan", "{in}/none.yaml"), 3, ("none.yaml", "no such recipe")),
    Case("IV-unknown-shipped-recipe", no_break, ("plan", "smollm2-135m--dem"), 3, ("smollm2-135m--demo",)),
    Case("IV-bad-override", no_break, (*TEACHER, "--set", "seed=[1"), 3, ("--set",)),
    Case("IV-override-without-value", no_break, (*TEACHER, "--set", "seed"), 3, ("--set", "seed")),
    Case("IV-override-of-unknown-key", no_break, (*TEACHER, "--set", "distill.lora.rnk=3"), 3, ("rnk", "rank")),
    Case("IV-no-such-text", recipe("train: [text/*.txt]", "train: [none/*.txt]"), RUN, 3, ("none/*.txt",)),
]

VII_NUMBERS = [
    Case("VII-nan-weight", fill(QUERY, float("nan")), TEACHER, 6, ("NaN", QUERY)),
    Case("VII-inf-weight", fill(NORM, float("inf")), TEACHER, 6, ("Inf", NORM)),
    Case("VII-nan-weight-in-run", fill(QUERY, float("nan")), RUN, 6, ("NaN", QUERY)),
    Case("VII-nan-weight-in-verify", fill(QUERY, float("nan")), ("verify", "{in}/teacher"), 6, ("NaN", QUERY)),
]


def flip(name: str, position: int) -> Break:
    """One bit."""

    def edit(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[position] ^= 1
        return bytes(changed)

    return change(name, edit)


VERIFY = ("verify", "{in}/hybrid")
GENERATE = ("generate", "{in}/hybrid", "--prompt", "the sea", "-q")

IX_HYBRIDS = [
    Case("IX-bit-flip-in-weights", flip(f"hybrid/{FILE}", -3), VERIFY, 7, (FILE, "changed")),
    Case("IX-bit-flip-in-config", flip("hybrid/config.json", -1), VERIFY, 7, ("config.json", "changed")),
    Case("IX-file-missing", remove("hybrid/plan.json"), VERIFY, 7, ("plan.json", "missing")),
    Case("IX-file-added", write("hybrid/extra.py", "x"), VERIFY, 7, ("extra.py",)),
    Case("IX-no-manifest", remove("hybrid/manifest.json"), VERIFY, 4, ("manifest.json",)),
    Case("IX-no-manifest-in-generate", remove("hybrid/manifest.json"), GENERATE, 4, ("manifest.json",)),
    Case("IX-manifest-damaged", write("hybrid/manifest.json", "{"), VERIFY, 4, ("manifest.json",)),
    Case(
        "IX-manifest-climbs-out",
        patch_json("hybrid/manifest.json", {"files": {"../recipe.yaml": {}}}),
        VERIFY,
        4,
        ("manifest.json",),
    ),
    Case(
        "IX-unknown-mixer-in-config",
        patch_json("hybrid/config.json", {"hybridize": {"version": 1, "layers": [{"index": 0, "mixer": "x"}]}}),
        ("inspect", "{in}/hybrid"),
        4,
        ("hybridize",),
    ),
    Case("IX-export-of-no-run", no_break, ("export", "{in}/text", "--out", "{out}"), 4, ("neither a run",)),
    Case(
        "IX-export-without-plan",
        remove("hybrid/plan.json"),
        ("export", "{in}/hybrid", "--out", "{out}"),
        4,
        ("plan.json",),
    ),
    Case(
        "IX-export-with-damaged-plan",
        write("hybrid/plan.json", "[]"),
        ("export", "{in}/hybrid", "--out", "{out}"),
        4,
        ("plan.json",),
    ),
    Case("IX-hybrid-as-teacher", no_break, (*TEACHER[:3], "{in}/hybrid", *TEACHER[4:]), 4, ("hybrid already",)),
    Case(
        "IX-report-of-damaged-results",
        write("results.json", "{"),
        ("report", "{in}/results.json", "--out", "{out}"),
        2,
        ("results.json",),
    ),
]

XI_COMMANDS = [
    Case("XI-unknown-command", no_break, ("distil",), 2, ("No such command 'distil'", "distill")),
    Case("XI-unknown-option", no_break, (*TEACHER, "--overwrit"), 2, ("--overwrite",)),
    Case("XI-missing-option", no_break, TEACHER[:4], 2, ("--out",)),
    Case("XI-missing-argument", no_break, ("plan",), 2, ("RECIPE",)),
    Case("XI-value-out-of-range", no_break, (*GENERATE[:-1], "--max-new-tokens", "0"), 2, ("--max-new-tokens",)),
    Case("XI-value-of-wrong-type", no_break, ("plan", "{in}/recipe.yaml", "--seed", "x"), 2, ("--seed",)),
    Case("XI-unknown-choice", no_break, (*GENERATE[:-1], "--dtype", "float8"), 2, ("--dtype", "float32")),
    Case("XI-nothing-to-continue", no_break, GENERATE[:2], 2, ("nothing to continue",)),
    Case("XI-unknown-subcommand", no_break, ("recipes", "lss"), 2, ("lss", "ls")),
    Case("XI-no-results", no_break, ("report", "{in}/text"), 2, ("no results",)),
    Case("XI-resume-of-no-run", no_break, ("distill", *RUN[1:], "--resume"), 2, ("no run to go on with",)),
    Case(
        "XI-eval-of-no-model",
        no_break,
        ("eval", "{in}/none", "--text", "{in}/held/x.txt", "--alone", "--out", "{out}"),
        4,
        ("none",),
    ),
    Case(
        "XI-eval-of-no-text",
        no_break,
        ("eval", "{in}/teacher", "--text", "{in}/none.txt", "--alone", "--out", "{out}"),
        3,
        ("none.txt",),
    ),
    Case(
        "XI-eval-with-bad-gate",
        no_break,
        ("eval", "{in}/teacher", "--text", "{in}/held/x.txt", "--gate", "x", "--out", "{out}"),
        2,
        ("is not a condition",),
    ),
]

# Every command that reads a model refuses the worst of them, not only `convert`.
READERS = {
    "inspect": ("inspect", "{in}/teacher"),
    "verify": ("verify", "{in}/teacher"),
    "generate": ("generate", "{in}/teacher", "--prompt", "the sea"),
    "eval": ("eval", "{in}/teacher", "--text", "{in}/held/x.txt", "--alone", "--out", "{out}"),
    "plan": ("plan", "{in}/recipe.yaml", "--model", "{in}/teacher", "--out", "{out}"),
    "run": RUN,
    "distill": ("distill", *RUN[1:]),
}
FAULTS: dict[str, tuple[Break, str]] = {
    "cut-off": (change(f"teacher/{FILE}", lambda data: data[:-1]), "truncated"),
    "pickle": (
        both(remove(f"teacher/{FILE}"), write("teacher/pytorch_model.bin", b"\x80\x04not read")),
        "pytorch_model.bin",
    ),
    "climbing-name": (
        both(remove(f"teacher/{FILE}"), write(f"teacher/{INDEX}", '{"weight_map": {"x": "../x.safetensors"}}')),
        "does not stay",
    ),
    "pipe": (pipe("teacher/config.json"), "regular file"),
}
EVERYWHERE = [
    Case(f"{command}-{fault}", breaks, READERS[command], 4, (says,))
    for command in READERS
    for fault, (breaks, says) in FAULTS.items()
]


CASES = [*IV_RECIPES, *VII_NUMBERS, *IX_HYBRIDS, *XI_COMMANDS, *EVERYWHERE]
