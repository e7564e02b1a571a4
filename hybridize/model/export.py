"""export: a run or a converted checkpoint as an ordinary folder that others can load without hybridize."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybridize.checkpoint import AtomicFolder, read_manifest
from hybridize.errors import CheckpointError, VerificationError
from hybridize.families import family
from hybridize.model import elsewhere
from hybridize.model.bundle import auto_map, bundle
from hybridize.model.card import card
from hybridize.model.convert import save_model, save_tokenizer
from hybridize.model.load import load_hybrid, load_tokenizer, quiet_loading
from hybridize.progress import SILENT, Reporter
from hybridize.recipe.schema import Export

if TYPE_CHECKING:
    from hybridize.plan import ConversionPlan

_CHECK_TOKENS = 24
"""Length of the continuations in the check after writing, and least length of its longer prompt."""
_LONGEST_CHECK = 4096


@dataclass(frozen=True)
class RunParts:
    """What an export is made from.

    Attributes:
        converted: the converted checkpoint.
        adapter: trained weights in PEFT's format, or None: nothing was trained.
        recipe: the recipe's text, or None.
        last_metrics: the last line of metrics.jsonl.
    """

    converted: Path
    adapter: Path | None
    recipe: str | None
    last_metrics: dict[str, Any]


def find_parts(folder: Path) -> RunParts:
    """Reads a run folder, or a converted folder on its own.

    Raises:
        CheckpointError: neither, or the distillation has not finished.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return RunParts(folder, None, None, {})
    converted = folder / "converted"
    if not (converted / "config.json").is_file():
        raise CheckpointError(
            "this is neither a run nor a converted checkpoint.",
            where=str(folder),
            hint="Give the --out folder of `hybridize distill`, `run` or `convert`.",
        )
    adapter = folder / "distill" / "adapter"
    if (folder / "distill").is_dir() and not (adapter / "manifest.json").is_file():
        raise CheckpointError(
            "the distillation of this run has not finished.",
            where=str(folder),
            hint="Run `hybridize distill` again with the same --out; it goes on where it stopped.",
        )
    recipe = folder / "recipe.yaml"
    metrics = folder / "distill" / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    return RunParts(
        converted,
        adapter if adapter.is_dir() else None,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        json.loads(lines[-1]) if lines else {},
    )


def export(
    run: Path,
    out: Path,
    *,
    settings: Export | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> Path:
    """Merges the adapters and writes weights, tokenizer, code, card and manifest.

    Before the folder gets its name it is read back twice: here, where the logits must be bit-equal to the merged
    model's, and in a process that cannot import hybridize, where the greedy tokens must be the same.

    Args:
        run: a run folder, or a converted checkpoint.
        out: folder to write.
        settings: dtype and shard size.

    Raises:
        CheckpointError: the run is incomplete or damaged.
        VerificationError: what was written does not read back as it should.
    """
    from hybridize.plan import ConversionPlan

    settings = settings or Export()
    parts = find_parts(Path(run))
    plan = ConversionPlan.load(parts.converted / "plan.json")
    dtype = getattr(torch, settings.dtype)
    provenance = {
        "teacher": plan.model,
        "revision": plan.revision,
        "fingerprint": plan.fingerprint,
        "converted": _hashes(parts.converted),
        "adapter": _hashes(parts.adapter) if parts.adapter else None,
        "training": _training(parts),
    }
    atomic = AtomicFolder(out, overwrite=overwrite, kind="export", provenance=provenance)
    with atomic as folder, reporter.task("export", total=4) as task:
        task.advance(0, step="merging the adapters")
        model = cast_weights(merged_model(parts), dtype)
        task.advance(1, step="writing")
        adapter = family(model.config.model_type)
        save_model(
            model, folder, max_shard_bytes=settings.max_shard_bytes, extra_config={"auto_map": auto_map(adapter)}
        )
        for name, text in bundle(adapter, [config.name for config in plan.layers]).items():
            (folder / name).write_text(text, encoding="utf-8")
        save_tokenizer(load_tokenizer(parts.converted), folder)
        plan.save(folder / "plan.json")
        if parts.recipe is not None:
            (folder / "recipe.yaml").write_text(parts.recipe, encoding="utf-8")
        (folder / "README.md").write_text(_card(plan, parts), encoding="utf-8")
        task.advance(1, step="reading back")
        prompts = check_prompts(plan)
        _compare_here(model, folder, dtype, prompts)
        task.advance(1, step="reading back without hybridize")
        compare_elsewhere(model, folder, prompts)
        task.advance(1)
    for note in atomic.notes:
        reporter.note(note)
    return Path(out)


def merged_model(parts: RunParts) -> Any:
    """The hybrid in fp32 with its trained weights merged in."""
    model = load_hybrid(parts.converted, dtype=torch.float32)
    if parts.adapter is None:
        return model
    from peft import PeftModel

    with quiet_loading():
        wrapped = PeftModel.from_pretrained(model, str(parts.adapter), is_trainable=False)
        return wrapped.merge_and_unload(safe_merge=True).eval()


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Rounds the parameters in place. Buffers stay as they are, as they do when a model is loaded in that type: rotary
    frequencies rounded to bfloat16 would turn far positions by other angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def check_prompts(plan: ConversionPlan) -> list[list[int]]:
    """Random prompts for the read-back: a short one, and one that is longer than what every window and budget holds, so
    that tokens are evicted on the way (within the teacher's context, and _LONGEST_CHECK at most)."""
    held = [
        getattr(config, "window_tokens", 0) + getattr(config, "budget_tokens", 0) + _CHECK_TOKENS
        for config in plan.layers
    ]
    room = (plan.geometry.max_positions or _LONGEST_CHECK) - _CHECK_TOKENS
    longest = max(_CHECK_TOKENS, min(max(held), room, _LONGEST_CHECK))
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, plan.geometry.vocab_size, (length,), generator=generator).tolist() for length in (5, longest)
    ]


def _compare_here(model: Any, folder: Path, dtype: torch.dtype, prompts: list[list[int]]) -> None:
    reloaded = load_hybrid(folder, dtype=dtype, complete=False)
    with torch.no_grad():
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            if not torch.equal(model(tokens, use_cache=False).logits, reloaded(tokens, use_cache=False).logits):
                raise VerificationError(
                    "the exported weights give other logits than the merged model.",
                    where=str(folder),
                    hint="Please report this; the export was not kept.",
                )


def compare_elsewhere(model: Any, folder: Path, prompts: list[list[int]]) -> None:
    """Loads `folder` in a process without hybridize and compares greedy continuations with `model`'s.

    Raises:
        VerificationError: the folder does not load there, or generates other tokens.
    """
    request = json.dumps({"prompts": prompts, "new_tokens": _CHECK_TOKENS})
    script = str(Path(elsewhere.__file__).resolve())
    done = subprocess.run(
        [sys.executable, "-I", script, str(Path(folder).resolve())],
        input=request,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise VerificationError(f"the export does not load without hybridize: {reason}", where=str(folder))
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if answer["leaked"]:
        raise VerificationError(f"the export imported {answer['leaked'][0]}.", where=str(folder))
    for prompt, elsewhere_tokens in zip(prompts, answer["generated"], strict=True):
        if greedy(model, prompt) != elsewhere_tokens:
            raise VerificationError(
                "without hybridize the export generates other tokens.",
                where=str(folder),
                hint="Please report this; the export was not kept.",
            )


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """The greedy continuation of one prompt, `_CHECK_TOKENS` tokens at most."""
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.no_grad():
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=_CHECK_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    continuation: list[int] = out[0, tokens.shape[1] :].tolist()
    return continuation


def _card(plan: ConversionPlan, parts: RunParts) -> str:
    training = _training(parts)
    tokens = training.pop("tokens", None)
    return card(plan, recipe_text=parts.recipe, tokens=tokens, metrics=training)


def _training(parts: RunParts) -> dict[str, Any]:
    """What the card says of the training: tokens seen, and the last step's losses."""
    return {
        name: parts.last_metrics[name] for name in ("tokens", "kl", "agreement", "loss") if name in parts.last_metrics
    }


def _hashes(folder: Path) -> dict[str, str]:
    return {name: record.sha256 for name, record in read_manifest(folder).files.items()}
