"""hybridize corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dtype_option, out_option, overwrite_option


@make(
    name="corpus",
    examples=(
        "hybridize corpus --text 'manuals/*.txt' --text novels.jsonl=20% --out corpus",
        "hybridize corpus --text rfc.txt=0.5 --hold-out-source git.txt --model ./teacher --tokens 30M --out corpus",
        "hybridize corpus --text 'manuals/*.txt' --model ./teacher --facts 0.2 --out corpus",
        "hybridize corpus --from-teacher ./teacher --tokens 10M --out sampled",
    ),
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="[NAME:]PATH[=WEIGHT]",
    help="Training text (repeat). =0.5: half of it; =10%: a tenth of the tokens.",
)
@click.option("--hold-out-source", "held_out", multiple=True, metavar="[NAME:]PATH", help="Text never trained on.")
@click.option(
    "--held-out-share",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.02,
    show_default=True,
    help="Share of the --text documents that is held out.",
)
@click.option("--tokens", metavar="N", help="Length of the training text, such as 30M; default: all there is.")
@click.option("--model", metavar="MODEL", help="Its tokenizer counts the tokens; without, characters are counted.")
@click.option("--min-tokens", type=click.IntRange(0), default=64, show_default=True, help="Drop shorter documents.")
@click.option("--max-repeats", type=click.IntRange(1), default=1, show_default=True, help="Times a document is used.")
@click.option(
    "--facts",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    metavar="SHARE",
    help="Share of the tokens that are documents with facts, which teach to recall.",
)
@click.option("--from-teacher", "teacher", metavar="MODEL", help="Texts that this model writes, instead of --text.")
@click.option(
    "--prompt-file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Openings, a line each."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of the teacher's sampling.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest tokens of this share."
)
@click.option("--batch", type=click.IntRange(1), help="Texts written side by side; default: by memory, or 8 on a CPU.")
@click.option(
    "--sequence-tokens",
    type=click.IntRange(2),
    default=2048,
    show_default=True,
    help="Longest text of the teacher, or document with facts.",
)
@dtype_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order, and of all that is drawn.")
@out_option("Write the corpus here.")
@overwrite_option
def command(
    settings: Settings,
    texts: tuple[str, ...],
    held_out: tuple[str, ...],
    teacher: str | None,
    out: Path,
    overwrite: bool,
    **options: Any,
) -> None:
    """Make training and held-out text for a recipe.

    Duplicates are left out, and nothing like a held-out document is trained on. --from-teacher lets the model write
    the text instead.
    """
    from hybridize.cli.corpus_view import corpus_parts

    _refuse_options_of_the_other_way(teacher is not None)
    if teacher is None:
        values = _of_text(texts, held_out, out, overwrite, options, settings)
    else:
        values = _of_teacher(teacher, out, overwrite, options, settings)
    for note in values["notes"]:
        settings.output.warning(note)
    human = [*corpus_parts(values), "", f"written to {out}; {out / 'README.md'} has the lines for a recipe"]
    settings.output.result("corpus", {"out": str(out), **values}, human)


_OF_TEXT = ("texts", "held_out", "held_out_share", "model", "max_repeats", "facts")
_OF_TEACHER = ("prompt_file", "temperature", "top_p", "batch", "dtype")


def _refuse_options_of_the_other_way(from_teacher: bool) -> None:
    from hybridize.errors import UsageError

    context = click.get_current_context()
    strange = _OF_TEXT if from_teacher else _OF_TEACHER
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
        if parameter.name in strange and given:
            what = "goes with --text, not with --from-teacher." if from_teacher else "needs --from-teacher."
            raise UsageError(what, where=parameter.opts[0], hint="Text and the teacher's writing are two corpora.")


def _of_text(
    texts: tuple[str, ...],
    held_out: tuple[str, ...],
    out: Path,
    overwrite: bool,
    options: dict[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    from hybridize.corpus.ingredients import CorpusOptions, parse_ingredient, parse_source, parse_tokens
    from hybridize.corpus.texts import text_corpus

    wanted = CorpusOptions(
        train=tuple(map(parse_ingredient, texts)),
        held_out=tuple(map(parse_source, held_out)),
        tokens=parse_tokens(options["tokens"]) if options["tokens"] else None,
        **{key: options[key] for key in ("held_out_share", "min_tokens", "max_repeats", "facts", "seed")},
        sequence_tokens=options["sequence_tokens"],
    )
    tokenizer = None
    if options["model"] is not None:
        from hybridize.model.load import load_tokenizer

        tokenizer = load_tokenizer(options["model"], offline=settings.offline)
    return text_corpus(
        wanted,
        out,
        tokenizer=tokenizer,
        offline=settings.offline,
        overwrite=overwrite,
        reporter=settings.output.reporter(),
    )


def _of_teacher(
    teacher: str, out: Path, overwrite: bool, options: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    from hybridize.corpus.folder import corpus_folder
    from hybridize.corpus.ingredients import parse_tokens
    from hybridize.corpus.sampling.choice import Sampling
    from hybridize.corpus.teacher import TeacherOptions, load_writing_teacher, read_prompts, teacher_corpus
    from hybridize.errors import UsageError

    if options["tokens"] is None:
        raise UsageError("how much shall the teacher write?", where="--from-teacher", hint="Give --tokens, as in 10M.")
    wanted = TeacherOptions(
        parse_tokens(options["tokens"]),
        Sampling(options["temperature"], options["top_p"]),
        **{key: options[key] for key in ("sequence_tokens", "min_tokens", "batch", "seed")},
    )
    prompts = read_prompts(options["prompt_file"]) if options["prompt_file"] else ()
    corpus_folder(out, overwrite=overwrite).refuse_existing()
    model, tokenizer = load_writing_teacher(teacher, options["dtype"], offline=settings.offline)
    return teacher_corpus(
        model,
        tokenizer,
        wanted,
        out,
        name=teacher,
        prompts=prompts,
        overwrite=overwrite,
        reporter=settings.output.reporter(),
    )
