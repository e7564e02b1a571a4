"""Loading of teachers, hybrids and tokenizers, after the checkpoint has been checked; no foreign code is run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from hybridize.checkpoint import (
    CheckpointSource,
    check_folder,
    check_tensors,
    load_state,
    read_config,
    require_usable_weights,
    resolve_source,
)
from hybridize.errors import CheckpointError, RecipeError
from hybridize.families import family, family_of_config
from hybridize.families.base import FamilyAdapter
from hybridize.model.modeling import hybrid_classes
from hybridize.plan.weights import check_teacher_tensors


def as_source(spec: str | Path | CheckpointSource, *, offline: bool = False) -> CheckpointSource:
    """`spec` itself if it is resolved already."""
    return spec if isinstance(spec, CheckpointSource) else resolve_source(spec, offline=offline)


def is_hybrid(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is that of a hybrid."""
    return str(config.get("model_type", "")).startswith("hybridize_")


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences transformers' own bars and notices: one progress style on the screen."""
    verbosity = transformers_logging.get_verbosity()  # the GGUF reader's bar is plain tqdm, hence stderr below
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_teacher(spec: str | Path | CheckpointSource, *, dtype: torch.dtype, offline: bool = False) -> Any:
    """A model of a supported family in its own transformers class, in eval mode.

    Args:
        spec: folder, `.gguf` file, `package:NAME`, Hub id, or a resolved source.
        dtype: of the weights.

    Raises:
        CheckpointError, FamilyError: damaged, incomplete, hostile or unsupported.
        CheckpointError: bytes differ from the folder's manifest, or the weights are zero throughout.
        NumbersError: a weight is not finite.
    """
    source = as_source(spec, offline=offline)
    adapter, geometry = family_of_config(read_config(source))
    check_teacher_tensors(source, adapter, geometry)
    _, _, causal_lm = adapter.base_classes()
    model = _from_pretrained(causal_lm, source, dtype)
    require_usable_weights(source, model.named_parameters())
    return model


def load_hybrid(folder: str | Path, *, dtype: torch.dtype, complete: bool = True) -> Any:
    """A converted or exported folder as its registered hybrid class, in eval mode.

    Args:
        folder: written by `convert` or `export`.
        dtype: of the weights.
        complete: refuse a folder without its manifest; False while it is being written.

    Raises:
        CheckpointError: not a hybrid, not what its manifest says, or tensors missing, extra or misshapen.
        NumbersError: a weight is not finite.
    """
    source = resolve_source(str(folder))
    config = read_config(source)
    if not is_hybrid(config):
        raise CheckpointError("this is not a hybrid.", where=str(folder), hint="Convert it first: hybridize convert.")
    adapter = family(str(config["model_type"]))
    headers = check_folder(source, complete=complete)
    try:
        weights, counters = hybrid_tensor_shapes(adapter, config)
    except RecipeError as error:  # options that a recipe would be blamed for; here it is the file
        raise CheckpointError(
            f"the `hybridize` block does not fit this release: {error}",
            where=str(source.path / "config.json"),
            hint="Use the hybridize release that wrote the folder.",
        ) from error
    check_tensors(headers, weights, optional=("lm_head.weight",), extra_allowed=tuple(counters), where=str(source.path))
    model = _from_pretrained(hybrid_classes(adapter).causal_lm, source, dtype)
    if complete:
        require_usable_weights(source, model.named_parameters())
    return model


def hybrid_tensor_shapes(
    adapter: FamilyAdapter, config: dict[str, Any]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of every tensor that the hybrid of this config.json holds: weights, and integer counters."""
    classes = hybrid_classes(adapter)
    with torch.device("meta"):
        model = classes.causal_lm(classes.config(**config))
    state = model.state_dict()
    weights = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    return weights, {name: tuple(tensor.shape) for name, tensor in state.items() if name not in weights}


def load_any(spec: str | Path, *, dtype: torch.dtype, offline: bool = False) -> Any:
    """A hybrid or a plain model, whichever `spec` is."""
    source = as_source(spec, offline=offline)
    if is_hybrid(read_config(source)):
        return load_hybrid(source.path, dtype=dtype)
    return load_teacher(source, dtype=dtype)


def load_tokenizer(spec: str | Path | CheckpointSource, *, offline: bool = False) -> Any:
    """The tokenizer that comes with a checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    source = as_source(spec, offline=offline)
    arguments = {"gguf_file": source.gguf_file} if source.gguf_file is not None else {}
    try:
        with quiet_loading():
            # Said outright: left open, transformers asks on the terminal whether to run a folder's code.
            return AutoTokenizer.from_pretrained(
                str(source.path), local_files_only=True, trust_remote_code=False, **arguments
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {error}",
            where=source.spec,
            hint="Copy tokenizer.json and tokenizer_config.json of the model into the folder.",
        ) from error


def _from_pretrained(cls: Any, source: CheckpointSource, dtype: torch.dtype) -> Any:
    arguments: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    with quiet_loading():
        if source.gguf_file is not None:
            # Read by us: transformers parses the file's metadata three times, which takes longer than all the rest.
            config = cls.config_class(**read_config(source))
            model, info = cls.from_pretrained(None, config=config, state_dict=load_state(source), **arguments)
        else:
            model, info = cls.from_pretrained(
                str(source.path), local_files_only=True, use_safetensors=True, **arguments
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(info["missing_keys"]) - tied)
    wrong = missing or [str(key) for key in info.get("mismatched_keys") or ()]
    if wrong:
        raise CheckpointError(
            f"tensors are missing or misshapen: {', '.join(wrong[:8])}.",
            where=source.spec,
            hint="The checkpoint does not fit its config.json.",
        )
    return model.eval()
