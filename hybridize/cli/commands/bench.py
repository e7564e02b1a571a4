"""hybridize bench."""

from __future__ import annotations

from pathlib import Path

import click

from hybridize.cli.app import Settings
from hybridize.cli.app import command as make
from hybridize.cli.options import dtype_option


@make(
    name="bench",
    examples=(
        "hybridize bench runs/demo/export",
        "hybridize bench my-hybrid --context 1k,8k,128k --batch 1,16,64 --out speed",
        "hybridize bench my-hybrid --teacher ./teacher --compiled --no-engine-teacher",
    ),
)
@click.argument("model")
@click.option("--teacher", metavar="MODEL", help="Default: the one that the hybrid was made from.")
@click.option("--alone", is_flag=True, help="Measure the model without a teacher.")
@click.option("--context", metavar="TOKENS,...", help="Default: 1k,8k,32k on a GPU, 128,512 on a CPU.")
@click.option("--batch", metavar="SEQUENCES,...", help="Default: 1,16 on a GPU, 1 on a CPU.")
@click.option("--chunk-tokens", metavar="TOKENS", help="Read at once in prefill. Default: 8k on a GPU, 1k on a CPU.")
@click.option(
    "--engine-teacher/--no-engine-teacher", default=True, help="Measure the teacher in our engine, too (default)."
)
@click.option("--compiled", is_flag=True, help="Measure the teacher's step by torch.compile, too.")
@click.option("--seed", type=int, default=0, help="Of the random tokens.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Write rows, tables and charts here.")
@dtype_option
def command(
    settings: Settings,
    model: str,
    teacher: str | None,
    alone: bool,
    context: str | None,
    batch: str | None,
    chunk_tokens: str | None,
    engine_teacher: bool,
    compiled: bool,
    seed: int,
    out: Path | None,
    dtype: str,
) -> None:
    """Time prefill and decode of a hybrid beside its teacher.

    Texts are random tokens, which cost what others cost. The teacher runs by torch's own attention, and in our engine.
    """
    from hybridize.cli.bench_view import bench_parts, counts, notes_on_contexts
    from hybridize.errors import UsageError

    contexts = counts(context, "--context") if context else ()
    batches = counts(batch, "--batch") if batch else ()
    chunk = counts(chunk_tokens, "--chunk-tokens") if chunk_tokens else (None,)
    if len(chunk) != 1:
        raise UsageError("more than one number.", where="--chunk-tokens", hint="Give one, such as 8k.")
    if min((2, *contexts)) < 2:
        raise UsageError(
            "a context of one token has nothing to decode from.", where="--context", hint="Give 2 or more."
        )
    if alone and teacher:
        raise UsageError("--alone and --teacher exclude each other.", hint="Leave one out.")
    from hybridize.inference.bench.run import bench, pick_dtype
    from hybridize.report.inference import write_inference

    found = bench(
        model,
        teacher=None if alone else teacher or _teacher_of(model, settings),
        contexts=contexts,
        batches=batches,
        chunk_tokens=chunk[0],
        engine_teacher=engine_teacher,
        compiled=compiled,
        dtype=pick_dtype(dtype),
        offline=settings.offline,
        reporter=settings.output.reporter(),
        seed=seed,
    )
    for note in notes_on_contexts(found):
        settings.output.note(note)
    written = write_inference(found["machine"], found["rows"], out) if out else []
    values = {"model": model, **found, "files": [str(path) for path in written]}
    settings.output.result("bench", values, [*bench_parts(found), *(str(path) for path in written)])


def _teacher_of(model: str, settings: Settings) -> str | None:
    """The teacher named in a hybrid's plan.json, if it is still where it was."""
    from hybridize.checkpoint import resolve_source
    from hybridize.errors import CheckpointError
    from hybridize.plan import ConversionPlan

    path = Path(model) / "plan.json"
    if not path.is_file():
        return None
    teacher = ConversionPlan.load(path).teacher
    try:
        resolve_source(teacher, offline=settings.offline)
    except CheckpointError as error:
        settings.output.warning(f"Measured alone, for its teacher cannot be read: {error} --teacher names another.")
        return None
    return teacher
