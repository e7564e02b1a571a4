"""hybridize generate."""

from __future__ import annotations

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dtype_option


@make(
    name="generate",
    examples=(
        "hybridize generate runs/demo/export --prompt 'The sea was'",
        "hybridize generate runs/demo/export --chat                    (an empty line or Ctrl-D ends it)",
        "hybridize generate my-hybrid --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 1",
    ),
)
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="What to continue; with --chat, the first question.")
@click.option("--chat", is_flag=True, help="Talk, in the model's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Sample from this share.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Sample from this many tokens; 0: all.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@dtype_option
def command(
    settings: Settings,
    model: str,
    prompt: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    dtype: str,
) -> None:
    """Continue a prompt, or chat, with a hybrid or its teacher."""
    from hybridize.errors import UsageError

    if prompt is None and not chat:
        raise UsageError("there is nothing to continue.", hint="Give --prompt TEXT or --chat.")
    if prompt is None and settings.as_json:
        raise UsageError("a conversation has no JSON form.", hint="Give --prompt TEXT as well.")
    if prompt == "":
        raise UsageError("the prompt is empty.", where="--prompt", hint="Give at least one word.")
    from hybridize.cli.talk import Sampling, Talker

    talker = Talker(
        model,
        Sampling(max_new_tokens, temperature, top_p, top_k, seed),
        dtype=dtype,
        output=settings.output,
        offline=settings.offline,
    )
    if prompt is not None:
        answer = talker.answer(prompt) if chat else talker.complete(prompt)
        settings.output.result("generate", {"model": model, "prompt": prompt, "chat": chat, **answer})
    if chat and not settings.as_json:
        while question := settings.output.ask("> "):
            talker.answer(question)
