"""hybridize generate."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dtype_option

_FILE = click.Path(path_type=Path, dir_okay=False)


@make(
    name="generate",
    examples=(
        "hybridize generate runs/demo/export --prompt 'The sea was'",
        "hybridize generate runs/demo/export --chat                    (an empty line or Ctrl-D ends it)",
        "hybridize generate my-hybrid --prompt 'Once' --temperature 0.8 --top-p 0.95 --seed 1",
        "hybridize generate my-hybrid --prompt-file manual.txt --save-state manual.state",
        "hybridize generate my-hybrid --state manual.state --prompt ' In short,'     (reads nothing again)",
    ),
)
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="What to continue; with --chat, the first question.")
@click.option("--prompt-file", type=_FILE, metavar="FILE", help="A text to read before the prompt.")
@click.option("--chat", is_flag=True, help="Talk, in the model's chat template.")
@click.option("--state", type=_FILE, metavar="FILE", help="Go on from what --save-state has kept.")
@click.option("--save-state", type=_FILE, metavar="FILE", help="Keep what was read and said.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Sample from this share.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Sample from this many tokens; 0: all.")
@click.option("--seed", type=int, default=0, help="Of the sampling.")
@click.option("--context-tokens", type=click.IntRange(1), help="Room in layers whose state grows with the text.")
@click.option("--chunk-tokens", type=click.IntRange(1), help="Most tokens read at once; bounds the memory of prefill.")
@dtype_option
def command(
    settings: Settings,
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    state: Path | None,
    save_state: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    context_tokens: int | None,
    chunk_tokens: int | None,
    dtype: str,
) -> None:
    """Continue a prompt, or chat, with a hybrid or its teacher."""
    from hybridize.errors import UsageError

    only_reads = prompt is None and prompt_file is not None and save_state is not None
    if prompt is None and not chat and prompt_file is None and state is None:
        raise UsageError("there is nothing to continue.", hint="Give --prompt TEXT or --chat.")
    if prompt is None and chat and settings.as_json and not only_reads:
        raise UsageError("a conversation has no JSON form.", hint="Give --prompt TEXT as well.")
    if prompt == "":
        raise UsageError("the prompt is empty.", where="--prompt", hint="Give at least one word.")
    document = "" if prompt_file is None else _text(prompt_file)
    from hybridize.checkpoint import require_place
    from hybridize.cli.talk import Talker, Talking
    from hybridize.inference import Sampling

    sampling = Sampling(temperature, top_p, top_k)
    talking = Talking(max_new_tokens, sampling, seed, dtype, context_tokens, chunk_tokens)
    if save_state is not None:
        require_place(save_state)
    talker = Talker(model, talking, output=settings.output, offline=settings.offline)
    if state is not None:
        talker.restore(state)
    try:
        if not chat:
            said = talker.complete(document + (prompt or ""), write=not only_reads)
        elif prompt is not None or document:
            said = talker.answer(prompt, document)
        else:
            said = {}
        if said:
            settings.output.result("generate", {"model": model, "prompt": prompt, "chat": chat, **said})
        if chat and not settings.as_json and not only_reads:
            while question := settings.output.ask("> "):
                talker.answer(question)
    finally:  # what was said before an error is kept
        if save_state is not None and talker.save(save_state):
            settings.output.note(f"kept in {save_state}")


def _text(path: Path) -> str:
    """A file's text, without white space at its ends.

    Raises:
        UsageError: there is none, or it is not text.
    """
    from hybridize.errors import UsageError

    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file cannot be read: {error}", where=str(path)) from error
    if not text:
        raise UsageError("the file is empty.", where=str(path))
    return text
