"""A corpus of texts that the teacher itself writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridize.corpus.folder import TRAIN, CorpusFile, Record, corpus_folder, write_corpus
from hybridize.corpus.lengths import quantiles
from hybridize.errors import CheckpointError, UsageError
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.source_files import decode, read_bytes

if TYPE_CHECKING:
    from hybridize.corpus.sampling.choice import Sampling
    from hybridize.corpus.sampling.writer import Openings

NAME = "teacher"
CPU_BATCH = 8
MOST_ROWS = 1024
_MEMORY_SHARE = 0.7
"""Of the memory that is free, for caches and logits."""
_LOGITS_BYTES = 24
"""A row's memory for each token of the vocabulary while the next token is drawn."""
_TEXTS_PER_ROW = 4
"""Whole texts of full length that a row writes at least, unless a batch is asked for: the last one is cut short."""


@dataclass(frozen=True)
class TeacherOptions:
    """What the teacher shall write.

    Attributes:
        tokens: to sample, over all texts.
        sequence_tokens: longest text, in tokens.
        min_tokens: shorter texts are left out.
        sampling: how tokens are drawn.
        batch: texts written side by side; None: chosen by memory.
        seed: of all that is drawn.
    """

    tokens: int
    sampling: Sampling
    sequence_tokens: int = 2048
    min_tokens: int = 64
    batch: int | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The options that decide what is written."""
        return {
            "tokens": self.tokens,
            "sequence_tokens": self.sequence_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
        }


def teacher_corpus(
    model: Any,
    tokenizer: Any,
    options: TeacherOptions,
    out: str | Path,
    *,
    name: str,
    prompts: Sequence[str] = (),
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Samples texts and writes their folder.

    Every text begins after the token that stands between documents in training, or with a prompt drawn at random; it
    goes to the token that ends texts, or to `sequence_tokens`. The texts at which the sampling stops are cut.

    Args:
        model: a plain causal language model in eval mode, on its device.
        name: of the model, for corpus.json.
        prompts: openings; none: the bare separator.

    Returns:
        What corpus.json says.

    Raises:
        UsageError: longer than the model's positions, no text as long as wanted, or the folder is not empty.
        CheckpointError: the tokenizer has no end-of-sequence token.
    """
    longest = model.config.max_position_embeddings
    if not 2 <= options.sequence_tokens <= longest:
        what = f"must be 2 to {longest}, the positions of the model, is {options.sequence_tokens}."
        raise UsageError(what, where="--sequence-tokens")
    if options.min_tokens >= options.sequence_tokens:  # the token before a text is one of its sequence
        what = f"no text of at most {options.sequence_tokens - 1} tokens has {options.min_tokens}."
        raise UsageError(what, where="--min-tokens", hint="Lower it, or raise --sequence-tokens.")
    with corpus_folder(out, overwrite=overwrite) as folder:
        batch = options.batch or default_batch(model, options)
        openings = openings_of(model, tokenizer, prompts, options.sequence_tokens)
        texts = _sample(model, openings, options, batch, reporter)
        long_enough = [text for text in texts if len(text) >= options.min_tokens]
        records = _records(long_enough, tokenizer)
        if not records:
            what = f"none of the {len(texts)} texts has {options.min_tokens} tokens."
            raise UsageError(what, where="--min-tokens", hint="Lower it, or give more --tokens or a smaller --batch.")
        source = {
            "name": NAME,
            "model": name,
            "documents": len(texts),
            "short": len(texts) - len(records),
            "lengths": quantiles([record.length for record in records]),
            "train": {"documents": len(records), "tokens": sum(record.length for record in records)},
        }
        about = {
            "seed": options.seed,
            "made_of": f"Texts that {name} wrote by itself.",
            "options": options.to_json() | {"batch": batch, "prompts": len(prompts)},
            "sources": [source],
            "notes": [],
        }
        return write_corpus(folder, [CorpusFile(TRAIN, NAME, records)], about)


def _sample(model: Any, openings: Openings, options: TeacherOptions, batch: int, reporter: Reporter) -> list[list[int]]:
    """The tokens of each text, without the one that ends it."""
    from hybridize.corpus.sampling.writer import Writer

    writer = Writer(
        model,
        openings,
        options.sampling,
        batch=batch,
        sequence_tokens=options.sequence_tokens,
        seed=options.seed,
    )
    steps = -(-options.tokens // batch)
    with reporter.task("sampling", steps * batch) as task:

        def heard() -> Iterator[tuple[Any, Any]]:
            for tokens, ended in writer.write(steps):
                task.advance(tokens.size)
                yield tokens, ended

        rows = split_texts(heard())
    ends = set(openings.ends)
    return [row[:-1] if row[-1] in ends else row for row in rows]


def load_writing_teacher(spec: str, dtype: str, *, offline: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer), the model on the GPU if there is one.

    Args:
        dtype: "auto" or the name of a torch dtype.

    Raises:
        UsageError: it is a hybrid. CheckpointError, FamilyError: see `load_teacher`.
    """
    import torch

    from hybridize.checkpoint import read_config
    from hybridize.model.load import as_source, is_hybrid, load_teacher, load_tokenizer
    from hybridize.model.precision import computes_bfloat16

    source = as_source(spec, offline=offline)
    if is_hybrid(read_config(source)):
        raise UsageError("a hybrid does not write corpora.", where=spec, hint="Give its teacher.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = torch.bfloat16 if computes_bfloat16(device) else torch.float32
    model = load_teacher(source, dtype=auto if dtype == "auto" else getattr(torch, dtype), offline=offline)
    return model.to(device), load_tokenizer(source, offline=offline)


def read_prompts(path: Path) -> list[str]:
    r"""The lines of a file that hold text; `\n` in them is a line end.

    Raises:
        CheckpointError: it cannot be read, or has no such line.
    """
    lines = decode(read_bytes(path), str(path)).splitlines()
    prompts = [line.replace("\\n", "\n") for line in lines if line.strip()]
    if not prompts:
        raise CheckpointError("The file holds no prompt.", where=str(path), hint="Write one a line.")
    return prompts


def openings_of(model: Any, tokenizer: Any, prompts: Sequence[str], sequence_tokens: int) -> Openings:
    """The separator of documents, as training has it, with each prompt after it.

    Raises:
        CheckpointError: the tokenizer has no end-of-sequence token.
        UsageError: a prompt leaves no room for a text.
    """
    from hybridize.corpus.sampling.writer import Openings

    closing = tokenizer.eos_token_id
    if closing is None:
        hint = "Add eos_token to tokenizer_config.json."
        raise CheckpointError("The tokenizer has no end-of-sequence token.", where="--from-teacher", hint=hint)
    first = tokenizer("a").input_ids[:1]
    opening = first[0] if first and first[0] == tokenizer.bos_token_id else closing
    asked = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts] or [[]]
    longest = max(asked, key=len)
    if len(longest) + 2 > sequence_tokens:
        what = f"a prompt of {len(longest)} tokens leaves no room in texts of {sequence_tokens}."
        raise UsageError(what, where="--prompt-file", hint="Shorten it, or raise --sequence-tokens.")
    settings = model.generation_config.eos_token_id
    ends = {closing, *([settings] if isinstance(settings, int) else settings or [])}
    return Openings([[opening, *tokens] for tokens in asked], sorted(ends))


def default_batch(model: Any, options: TeacherOptions) -> int:
    """Rows that fit the GPU's free memory, but not so many that few of them get to write whole texts."""
    import torch

    if model.device.type != "cuda":
        return CPU_BATCH
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * model.dtype.itemsize
    row_bytes = cache * options.sequence_tokens + _LOGITS_BYTES * config.vocab_size
    free, _ = torch.cuda.mem_get_info(model.device)
    fits = int(free * _MEMORY_SHARE / row_bytes)
    useful = options.tokens // (_TEXTS_PER_ROW * options.sequence_tokens)
    return max(1, min(fits, MOST_ROWS, max(useful, CPU_BATCH)))


def split_texts(blocks: Iterable[tuple[Any, Any]]) -> list[list[int]]:
    """The texts in blocks of tokens [steps, B] with their endings, in the order in which they ended.

    Those that have not ended come last, row by row.
    """
    texts: list[list[int]] = []
    rows: list[list[int]] = []
    for tokens, ended in blocks:
        rows = rows or [[] for _ in range(tokens.shape[1])]
        begins = [0] * len(rows)
        for step, row in zip(*ended.nonzero(), strict=True):
            texts.append(rows[row] + tokens[begins[row] : step + 1, row].tolist())
            rows[row], begins[row] = [], step + 1
        for row, begin in enumerate(begins):
            rows[row] += tokens[begin:, row].tolist()
    return texts + [row for row in rows if row]


def _records(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[Record]:
    records = []
    for number, row in enumerate(rows):
        # A text that is cut may end within a character.
        text = tokenizer.decode(row, clean_up_tokenization_spaces=False).rstrip("\ufffd")
        if text.strip():
            records.append(Record(text, f"{NAME}#{number}", NAME, len(row)))
    return records
