"""hybridize inspect."""

from __future__ import annotations

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make


@make(
    name="inspect",
    examples=(
        "hybridize inspect runs/demo/export",
        "hybridize inspect HuggingFaceTB/SmolLM2-135M --json",
        "hybridize inspect model.gguf --tensors",
    ),
)
@click.argument("model")
@click.option("--tensors", "list_tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--context", "contexts", type=click.IntRange(1), multiple=True, help="Context length, in tokens (repeat)."
)
def command(settings: Settings, model: str, list_tensors: bool, contexts: tuple[int, ...]) -> None:
    """Show sizes, layers, mixers, tensors and state bytes of a model.

    Reads config.json and tensor headers only.
    """
    from hybridize.cli.inspect_view import inspect_model, inspect_parts
    from hybridize.plan import CONTEXTS

    found = inspect_model(model, offline=settings.offline, contexts=contexts or CONTEXTS)
    settings.output.result("inspect", found.to_json(list_tensors), inspect_parts(found, list_tensors))
