"""choose: which layers of a recipe's teacher shall keep full attention, from its training text."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridize.checkpoint import CheckpointSource, read_config, resolve_source, source_fingerprint
from hybridize.distillation.data import DocumentStream
from hybridize.distillation.layer_choice.greedy import Choice, Search, num_measurements, search, uniform
from hybridize.distillation.layer_choice.layer_rules import OtherMixers, other_mixers
from hybridize.distillation.layer_choice.passages import Passage, passages
from hybridize.distillation.layer_choice.windowed import windowed
from hybridize.distillation.token_stream import document_encoder
from hybridize.errors import FamilyError, RecipeError, UsageError
from hybridize.families import AttentionGeometry, family_of_config
from hybridize.mixers.configs.sliding_window import SlidingWindowConfig
from hybridize.model.load import is_hybrid, load_teacher, load_tokenizer
from hybridize.model.precision import computes_bfloat16
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.documents import Document, held_out_keys, is_held_out, read_documents
from hybridize.recipe.lock import package_versions
from hybridize.recipe.schema import Data, Recipe
from hybridize.recipe.sources import TextSource

CPU_TOKENS = 2048
MOST_TOKENS = 2**17
"""That go through a GPU together; more are not faster."""
FREE_SHARE = 0.5
"""Of a GPU's free memory that a batch may take."""


@dataclass(frozen=True)
class ChoiceOptions:
    """How the layers are chosen.

    Attributes:
        count: layers that shall keep full attention; None: as many as in the recipe.
        sequences: of text that the divergence is measured on, of `sequence_tokens` each.
        window_tokens, sink_tokens: what the other layers see meanwhile.
        dtype: "auto" or the name of a torch dtype.
    """

    count: int | None = None
    sequences: int = 12
    sequence_tokens: int = 4096
    window_tokens: int = 256
    sink_tokens: int = 4
    dtype: str = "auto"


def choose_layers(
    recipe: Recipe,
    options: ChoiceOptions,
    *,
    base: Path | None = None,
    texts: Sequence[TextSource] = (),
    offline: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Looks for the layers that the teacher can least do without, over long distances.

    The divergence is KL(teacher || teacher with a sliding window in the other layers). Nothing is trained.

    Args:
        base: folder that the recipe's text paths start from; None: the current one.
        texts: instead of the recipe's training text; paths start from the current folder. What the recipe holds out
            is left out of them too.

    Returns:
        Plain data: what was found, on which text, with what.

    Raises:
        UsageError: the options do not fit each other, the model or the text.
        RecipeError: the recipe's layers do not fit the model, or it has no text and none is given.
        CheckpointError, FamilyError: the teacher or a text cannot be read.
        NumbersError: a divergence is not finite.
    """
    source = resolve_source(recipe.model, offline=offline)
    config = read_config(source)
    if is_hybrid(config):
        raise FamilyError("this model is a hybrid already.", where=recipe.model, hint="Give its teacher.")
    _, geometry = family_of_config(config)
    others = other_mixers(recipe, geometry.num_layers)
    count = _settled_count(options, others, geometry)
    _check_lengths(options, geometry)
    found = _passages(recipe, options, load_tokenizer(source, offline=offline), base or Path(), texts, offline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(options.dtype, device)
    model = load_teacher(source, dtype=dtype, offline=offline).to(device)
    tokens = torch.tensor([passage.tokens for passage in found], device=device)
    result = _search(model, tokens, options, count, others, reporter)
    return {
        "teacher": _about_teacher(recipe, source),
        "settings": {
            **asdict(options),
            "count": count,
            "seed": recipe.seed,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "num_layers": geometry.num_layers,
        **_numbers(result),
        **others.lines(result.chosen.layers, geometry.num_layers),
        "sequences": [passage.to_json() for passage in found],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "versions": package_versions(),
    }


def _settled_count(options: ChoiceOptions, others: OtherMixers, geometry: AttentionGeometry) -> int:
    """How many layers are to be found."""
    count = len(others.full) if options.count is None else options.count
    if not 1 <= count < geometry.num_layers:
        what = f"must be 1 to {geometry.num_layers - 1}, for {geometry.num_layers} layers, and is {count}."
        hint = "It is how many layers keep full attention"
        hint += "; so many do in the recipe. Give --count." if options.count is None else "."
        raise UsageError(what, where="--count", hint=hint)
    wide = sum(window is None or window > options.window_tokens for window in geometry.windows)
    if count > wide:
        what = f"only {wide} layers of the model see more than {options.window_tokens} tokens, not {count}."
        raise UsageError(what, where="--count", hint="Lower it, or --window.")
    return count


def _check_lengths(options: ChoiceOptions, geometry: AttentionGeometry) -> None:
    seen = options.window_tokens + options.sink_tokens
    if seen >= options.sequence_tokens:
        what = f"a window of {options.window_tokens} tokens with {options.sink_tokens} sinks leaves nothing unseen in"
        hint = "Lower --window, or raise --sequence-tokens."
        raise UsageError(f"{what} sequences of {options.sequence_tokens}.", where="--window", hint=hint)
    if geometry.max_positions and options.sequence_tokens > geometry.max_positions:
        what = f"the model has {geometry.max_positions} positions, fewer than {options.sequence_tokens}."
        raise UsageError(what, where="--sequence-tokens", hint="Lower it.")


def _passages(
    recipe: Recipe, options: ChoiceOptions, tokenizer: Any, base: Path, texts: Sequence[TextSource], offline: bool
) -> list[Passage]:
    data = recipe.data
    if data is None and not texts:
        hint = "Give --text PATH, or add `data` with training text."
        raise RecipeError("the recipe has no text.", where="data", hint=hint)
    sources = tuple(texts) or (data.train if data is not None else ())
    read = _training_text(data, Path() if texts else base, base, offline)
    buffer = data.shuffle_documents if data is not None else Data.shuffle_documents
    return passages(
        [DocumentStream(read(source), f"{recipe.seed}:{index}", buffer) for index, source in enumerate(sources)],
        [source.weight for source in sources],
        document_encoder(tokenizer),
        num_sequences=options.sequences,
        sequence_tokens=options.sequence_tokens,
    )


def _training_text(
    data: Data | None, text_base: Path, data_base: Path, offline: bool
) -> Callable[[TextSource], Callable[[], Iterator[Document]]]:
    """How to read a source without what the recipe holds out."""
    keys = frozenset() if data is None else held_out_keys(data, data_base, offline=offline)
    share = 0.0 if data is None or data.held_out else data.held_out_share

    def reader(source: TextSource) -> Callable[[], Iterator[Document]]:
        def read() -> Iterator[Document]:
            for document in read_documents(source, text_base, offline=offline):
                if not is_held_out(document, share) and document.key not in keys:
                    yield document

        return read

    return reader


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    found: torch.dtype = getattr(torch, name)
    return found


def batch_sequences(model: Any, sequence_tokens: int, device: torch.device) -> int:
    """Sequences that go through together: by the free memory of a GPU; on a CPU more at once are not faster."""
    tokens = CPU_TOKENS
    if device.type == "cuda":
        config = model.config
        # The MLP and the attention of one layer, hidden states and the loss's copies; no logits exist whole.
        token_bytes = model.dtype.itemsize * (4 * config.intermediate_size + 16 * config.hidden_size)
        free, _ = torch.cuda.mem_get_info(device)
        tokens = min(MOST_TOKENS, int(FREE_SHARE * free / token_bytes))
    return max(1, tokens // sequence_tokens)


def _search(
    model: Any, tokens: Tensor, options: ChoiceOptions, count: int, others: OtherMixers, reporter: Reporter
) -> Search:
    config = SlidingWindowConfig(window_tokens=options.window_tokens, sink_tokens=options.sink_tokens)
    batch = batch_sequences(model, options.sequence_tokens, tokens.device)
    with windowed(model, tokens, config, batch) as measured:
        compared = dict(uniform(measured.layers, count))
        if others.full:
            compared["of the recipe"] = others.full
        total = num_measurements(len(measured.layers), count, len(compared))
        with reporter.task("choosing layers", total) as task:
            measured.told = task.advance
            return search(measured, count, compared)


def _about_teacher(recipe: Recipe, source: CheckpointSource) -> dict[str, Any]:
    fingerprint = source_fingerprint(source, headers_only=True)
    return {"model": recipe.model, "revision": source.revision, "fingerprint": fingerprint}


def _numbers(found: Search) -> dict[str, Any]:
    def row(choice: Choice) -> dict[str, Any]:
        return {"name": choice.name, "layers": list(choice.layers), "divergence": choice.divergence}

    def by_layer(values: Mapping[int, float]) -> list[dict[str, Any]]:
        return [{"layer": layer, "divergence": value} for layer, value in sorted(values.items())]

    return {
        "all_windowed": found.all_windowed,
        "steps": [{"layer": layer, "divergence": value} for layer, value in found.steps],
        "compared": [row(choice) for choice in found.compared],
        "full_alone": by_layer(found.full_alone),
        "windowed_alone": by_layer(found.windowed_alone),
    }
