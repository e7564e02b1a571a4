"""A choice of layers for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybridize.cli.format import table_lines

if TYPE_CHECKING:
    from rich.console import RenderableType


def choice_parts(values: Mapping[str, Any]) -> list[RenderableType]:
    """The search step by step, the choices it is compared with, and the lines for a recipe."""
    settings = values["settings"]
    text = f"{settings['sequences']} sequences of {settings['sequence_tokens']} tokens"
    window = f"a window of {settings['window_tokens']} tokens and {settings['sink_tokens']} sinks"
    return [
        f"KL(teacher || teacher with {window} in the other layers), nats a token, on {text}",
        "",
        *table_lines(_steps(values), left=1),
        "",
        *table_lines(_compared(values), left=2),
        "",
        *values["recipe_lines"],
    ]


def _steps(values: Mapping[str, Any]) -> list[list[str]]:
    alone = {row["layer"]: row["divergence"] for row in values["full_alone"]}
    without = {row["layer"]: row["divergence"] for row in values["windowed_alone"]}
    rows = [["full attention in", "layer", "divergence", "it alone full", "it alone windowed"]]
    rows.append(["no layer", "", _number(values["all_windowed"]), "", ""])
    for number, step in enumerate(values["steps"], start=1):
        layer = step["layer"]
        numbers = (step["divergence"], alone[layer], without[layer])
        rows.append(["1 layer" if number == 1 else f"{number} layers", str(layer), *map(_number, numbers)])
    return rows


def _compared(values: Mapping[str, Any]) -> list[list[str]]:
    chosen = {"name": "chosen", "layers": values["full_attention"], "divergence": values["steps"][-1]["divergence"]}
    rows = [["choice", "layers", "divergence"]]
    for choice in (chosen, *values["compared"]):
        layers = ", ".join(map(str, choice["layers"]))
        rows.append([choice["name"], layers, _number(choice["divergence"])])
    return rows


def _number(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 or value == 0 else f"{value:.1e}"
