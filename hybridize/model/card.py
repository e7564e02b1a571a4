"""The model card: README.md of an exported folder. Torch-free; built from the plan and, once there are any, results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize.files import write_whole

if TYPE_CHECKING:
    from hybridize.mixers.configs.base import MixerConfig
    from hybridize.plan import ConversionPlan

_TOLD = ("window_tokens", "sink_tokens", "budget_tokens", "block_tokens", "selected_blocks")
"""Settings that are shown even where they are the default: they decide the memory."""

_LIMITS = """\
- Decoding states cannot lose their last tokens: assisted decoding, prompt lookup and static caches are refused.
- Attention masks must be 2-D (left or right padding); packed masks with a row for each query are refused.
- Perplexity hides forgetting: look at recall by length before relying on text far back in the context.
"""


def card(
    plan: ConversionPlan,
    *,
    recipe_text: str | None = None,
    tokens: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    metrics_table: str = "",
) -> str:
    """Renders the card.

    Args:
        plan: what was converted.
        recipe_text: the recipe as the user wrote it.
        tokens: training tokens seen.
        metrics: last training metrics (flat numbers).
        metrics_table: a Markdown section of evaluation results, or empty when none were made yet.
    """
    counts = Counter(config.name for config in plan.layers)
    layout = ", ".join(f"{count} × {name}" for name, count in counts.items())
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- hybridize",
        *[f"- {name.replace('_', '-')}" for name in counts],
    ]
    if plan.revision is not None:
        front.append(f"base_model: {plan.model.split('@')[0]}")
    front.append("---")
    teacher = _public_name(plan.model)
    lines = [
        *front,
        "",
        f"# Hybrid of {teacher}",
        "",
        f"Made with hybridize from `{plan.model if plan.model.startswith('package:') else teacher}`"
        + (f" at revision `{plan.revision}`" if plan.revision else "")
        + f" (fingerprint `{plan.fingerprint[:16]}`).",
        "",
        f"**Layers** ({len(plan.layers)}): {layout}.",
        "",
        "| layers | mixer | settings |",
        "|---|---|---|",
        *_layer_rows(plan),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)',
        "```",
        "",
        "The folder carries its own modeling code in plain PyTorch; where `hybridize_kernels` is installed it is used.",
        "",
        "## Memory",
        "",
        "| context (tokens) | state bytes, this model | state bytes, teacher |",
        "|---|---|---|",
        *[
            f"| {context} | {bill['student']:,} | {bill['teacher']:,} |"
            for context, bill in sorted(plan.bill.state_bytes.items())
        ],
        "",
        "Decoding state of one sequence with 2-byte keys and values.",
        "",
        "## Training",
        "",
        f"{tokens:,} tokens of distillation." if tokens else "Not distilled: the weights are those of the conversion.",
    ]
    if metrics:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
        lines += ["", f"Last step: {shown}."]
    if metrics_table:
        lines += ["", metrics_table.strip()]
    lines += ["", "## Limits", "", _LIMITS.rstrip()]
    if recipe_text:
        lines += ["", "## Recipe", "", "```yaml", recipe_text.strip(), "```"]
    return "\n".join(lines) + "\n"


def _default(config: MixerConfig, key: str) -> object:
    return next(field.default for field in fields(config) if field.name == key)


def _no_settings(name: str) -> str:
    return "the teacher’s own layer" if name == "full_attention" else "as by default"


def _public_name(spec: str) -> str:
    """A local path is private: only its last part is told."""
    if spec.startswith("package:"):
        return spec.removeprefix("package:")
    if not ("/" in spec or "\\" in spec):
        return spec
    if spec.startswith(("/", ".", "~")) or spec.count("/") > 1:
        return spec.rstrip("/").rsplit("/", 1)[-1]
    return spec


def _layer_rows(plan: ConversionPlan) -> list[str]:
    groups: dict[tuple[str, str], list[int]] = {}
    for index, config in enumerate(plan.layers):
        chosen = {field.name: getattr(config, field.name) for field in fields(config)}
        unusual = {key: value for key, value in chosen.items() if key in _TOLD or value != _default(config, key)}
        text = ", ".join(f"{key} {value}" for key, value in unusual.items())
        groups.setdefault((config.name, text), []).append(index)
    return [
        f"| {', '.join(map(str, indices))} | `{name}` | {settings or _no_settings(name)} |"
        for (name, settings), indices in groups.items()
    ]


def update_card(export: Path, metrics_table: str) -> None:
    """Puts evaluation results into the card of an exported folder, and the card's new hash into its manifest.

    Run again after an interruption, it heals what was left between the two files.
    """
    from hybridize.checkpoint import read_manifest, replace_in_manifest, sha256_bytes
    from hybridize.plan import ConversionPlan

    manifest = read_manifest(export)
    recipe = export / "recipe.yaml"
    training = manifest.provenance.get("training") or {}
    text = card(
        ConversionPlan.load(export / "plan.json"),
        recipe_text=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        tokens=training.get("tokens"),
        metrics={name: value for name, value in training.items() if name != "tokens"},
        metrics_table=metrics_table,
    )
    recorded = manifest.files.get("README.md")
    if recorded is not None and recorded.sha256 == sha256_bytes(text.encode()):
        return
    write_whole(export / "README.md", text.encode())
    replace_in_manifest(export, ["README.md"])
