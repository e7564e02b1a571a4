"""A plan, or the layers of a hybrid, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridize.cli.format import bytes_text, count_text, ranges_text, seconds_text, table_lines
from hybridize.mixers.configs.base import MixerConfig
from hybridize.plan import ConversionPlan
from hybridize.recipe.layers import LETTERS

if TYPE_CHECKING:
    from rich.console import RenderableType

_ROW = 32
_STYLES = {
    "full_attention": "bold",
    "gated_delta_net": "cyan",
    "token_eviction": "magenta",
    "sliding_window": "green",
    "native_sparse_attention": "yellow",
}


def plan_parts(plan: ConversionPlan) -> list[RenderableType]:
    """The layer map, the bill and the state bytes."""
    bill = plan.bill
    sizes = plan.geometry
    heads = f"{sizes.num_query_heads} query and {sizes.num_key_heads} key heads of {sizes.head_size}"
    revision = f"@{plan.revision[:12]}" if plan.revision else ""
    return [
        f"{plan.model}{revision}  ({plan.family}, {sizes.num_layers} layers, {heads})",
        "",
        *layer_parts(plan.layers),
        "",
        f"parameters   {count_text(bill.teacher_parameters)} of the teacher, {count_text(bill.new_parameters)} new, "
        f"{count_text(bill.trained_parameters)} trained",
        f"checkpoint   {bytes_text(bill.checkpoint_bytes)} ({plan.dtype})",
        f"disk         {bytes_text(bill.disk_bytes)} for the whole run",
        f"memory       {bytes_text(bill.convert_memory_bytes)} to convert",
        f"training     {count_text(bill.train_tokens)} tokens" if bill.train_tokens else "training     none",
        "",
        *state_lines(bill.state_bytes),
    ]


def layer_parts(layers: Sequence[MixerConfig]) -> list[RenderableType]:
    """One letter a layer in rows of 32, then what the letters mean."""
    from rich.text import Text

    legend: dict[MixerConfig, list[int]] = {}
    for index, config in enumerate(layers):
        legend.setdefault(config, []).append(index)
    glyphs = _glyphs(list(legend))
    parts: list[RenderableType] = []
    for start in range(0, len(layers), _ROW):
        row = Text(f"{start:>4}  ")
        for config in layers[start : start + _ROW]:
            row.append(f"{glyphs[config]} ", style=_STYLES.get(config.name, ""))
        row.rstrip()
        parts.append(row)
    for config, indices in legend.items():
        options = ", ".join(f"{key} {value}" for key, value in _changed_options(config).items())
        line = Text(f"   {glyphs[config]}  ", style=_STYLES.get(config.name, ""))
        line.append(
            f"{config.name} in {len(indices)} of {len(layers)} layers ({ranges_text(indices)})", style="default"
        )
        parts.append(line)
        if options:
            parts.append(Text(f"      {options}"))
    return parts


def _glyphs(configs: Sequence[MixerConfig]) -> dict[MixerConfig, str]:
    """The mixer's letter; where one mixer comes with several settings, the letters after the first are small."""
    letters = {name: letter for letter, name in LETTERS.items()}
    used: set[str] = set()
    glyphs = {}
    for config in configs:
        letter = letters.get(config.name, config.name[0].upper())
        choices = [letter, letter.lower(), *"abcdehijklmopqruvwxyz", "?"]
        glyphs[config] = next((choice for choice in choices if choice not in used), "?")
        used.add(glyphs[config])
    return glyphs


def _changed_options(config: MixerConfig) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    values, defaults = config.to_dict(), type(config)().to_dict()
    return {key: value for key, value in values.items() if value != defaults[key]}


def state_lines(state_bytes: Mapping[int, Mapping[str, int]]) -> list[str]:
    """Decoding memory of one sequence by context length."""
    rows = [["tokens", "student", "teacher", "share"]]
    for context, by_model in state_bytes.items():
        student, teacher = by_model["student"], by_model["teacher"]
        share = f"{student / teacher:.0%}" if teacher else "-"
        rows.append([f"{context:,}", bytes_text(student), bytes_text(teacher), share])
    return ["state of one sequence while decoding", *(f"  {line}" for line in table_lines(rows))]


def calibration_parts(calibration: Mapping[str, Any]) -> list[RenderableType]:
    """What the distillation will take, from the `calibration` block of a plan."""
    rows = [["stage", "steps", "sequences x tokens", "s/step", "tokens/s", "time", "memory"]]
    for stage in calibration["stages"]:
        for part in stage["shapes"]:
            shape = f"{part['shape']['sequences']} x {part['shape']['tokens']:,}"
            shape += f" x {part['accumulate']}" if part["accumulate"] > 1 else ""
            seconds = part["steps"] * part["seconds_per_step"]
            rows.append(
                [
                    stage["name"] + (" (ramp)" if part["ramping"] else ""),
                    f"{part['steps']:,}",
                    shape,
                    f"{part['seconds_per_step']:.3g}",
                    f"{part['tokens_per_s']:,.0f}",
                    seconds_text(seconds),
                    bytes_text(part["peak_bytes"]) + (" *" if part["extrapolated"] else ""),
                ]
            )
    capacity = calibration["capacity_bytes"]
    room = f" of {bytes_text(capacity)}" if capacity else ""
    versions = ", ".join(f"{name} {version}" for name, version in calibration["versions"].items())
    saving = sum(stage["saving_seconds"] for stage in calibration["stages"]) + calibration["end_seconds"]
    starred = any(part["extrapolated"] for stage in calibration["stages"] for part in stage["shapes"])
    return [
        f"distillation on {calibration['device']} ({versions})",
        *(f"  {line}" for line in table_lines(rows, left=1)),
        *(["  * rehearsed with fewer tokens, and scaled in proportion"] if starred else []),
        f"time         {seconds_text(calibration['total_seconds'])} in all, of it "
        f"{seconds_text(calibration['start_seconds'])} to start and {seconds_text(saving)} to save",
        f"memory       {bytes_text(calibration['peak_bytes'])}{room} at the peak",
        f"disk         {bytes_text(calibration['disk_bytes'])} for checkpoints and adapter",
        f"rehearsed    in {seconds_text(calibration['calibration_seconds'])}, with tokens {calibration['tokens']}",
        *(f"problem      {problem}" for problem in calibration["problems"]),
    ]
