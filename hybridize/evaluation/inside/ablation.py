"""What each mixer is worth: the loss of agreement when it is replaced by a window.

A mixer that the model has learned to bypass can be taken away without anybody noticing, whatever the scores say; here
that shows as a change near zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from hybridize.evaluation.inside.layers import layers_of
from hybridize.evaluation.inside.substitutes import replaced, windows_instead
from hybridize.evaluation.parts import Row, between
from hybridize.evaluation.scores import WindowScores, score_windows, window_batches
from hybridize.evaluation.statistics import clustered_mean
from hybridize.evaluation.windows import Window
from hybridize.progress import SILENT, Task
from hybridize.recipe.probes import AblationProbe

_LARGEST_EXPONENT = 700.0  # as in perplexity.py: exp beyond it is not a double

Layers = tuple[int, ...]


class _Sums(NamedTuple):
    """Over the scored tokens of one window, in nats."""

    kl: float
    negative_log_likelihood: float
    tokens: int


def ablation(
    student: Any,
    teacher: Any | None,
    windows: Sequence[Window],
    probe: AblationProbe,
    *,
    batch_tokens: int,
    task: Task,
) -> Row:
    """KL from the teacher with each mixer in turn replaced by a window, all its layers at once and layer by layer.

    Args:
        student: a hybrid, or a plain model, in eval mode; it is changed in between and is what it was afterwards.
        teacher: None: the KL is from the student as it is.
        windows: held-out text; what is compared is paired over them.
        batch_tokens: tokens that go through a model at once.
        task: advances by the number of windows in all.

    Returns:
        "whole": kl and perplexity of the student as it is; "mixers" and "layers": rows with kl, kl_change (both in nats
        a token, with `_se`, the standard error over windows, None with one window) and perplexity; window_tokens,
        tokens, windows.
    """
    substitutes = windows_instead(student, probe.window_tokens)
    names = {layer.index: layer.mixer for layer in layers_of(student)}
    kinds: dict[str, Layers] = {
        name: tuple(index for index in substitutes if names[index] == name)
        for name in dict.fromkeys(names[index] for index in substitutes)
    }
    singles: list[Layers] = [(index,) for index in substitutes] if probe.layers else []
    found: dict[Layers, list[_Sums]] = {case: [] for case in ((), *kinds.values(), *singles)}
    with torch.inference_mode():
        for batch in window_batches(windows, batch_tokens):
            known = _remembered(student if teacher is None else teacher, batch)
            for case, sums in found.items():
                with replaced(student, {index: substitutes[index] for index in case}), SILENT.task("", None) as nobody:
                    scores = score_windows(student, known, batch, batch_tokens=batch_tokens, task=nobody)
                sums += [_sums(score) for score in scores]
                task.advance(len(batch) / len(found))
    whole = found[()]
    return {
        "whole": {"kl": _mean_kl(whole), "perplexity": _perplexity(whole)},
        "window_tokens": probe.window_tokens,
        "mixers": [
            {"mixer": name, "layers": list(case), **_numbers(found[case], whole)} for name, case in kinds.items()
        ],
        "layers": [{"index": index, "mixer": names[index], **_numbers(found[(index,)], whole)} for (index,) in singles],
        "tokens": sum(sums.tokens for sums in whole),
        "windows": len(whole),
    }


def _remembered(model: Any, batch: Sequence[Window]) -> Any:
    """What `score_windows` asks of a teacher, with the hidden states of this batch computed once for all ablations."""
    tokens = torch.tensor([window.tokens for window in batch], device=model.device)
    outputs = SimpleNamespace(last_hidden_state=model.model(input_ids=tokens, use_cache=False).last_hidden_state)
    return SimpleNamespace(model=lambda **_: outputs, lm_head=model.lm_head)


def _sums(score: WindowScores) -> _Sums:
    scored = between(score, 0, len(score.window.tokens))
    if scored is None or scored.kl is None:
        return _Sums(0.0, 0.0, 0)
    return _Sums(float(scored.kl.sum()), float(scored.student.sum()), scored.student.numel())


def _numbers(ablated: Sequence[_Sums], whole: Sequence[_Sums]) -> Row:
    tokens = [sums.tokens for sums in whole]
    kl = clustered_mean([sums.kl for sums in ablated], tokens)
    change = clustered_mean([a.kl - w.kl for a, w in zip(ablated, whole, strict=True)], tokens)
    return {
        "kl": kl.value,
        "kl_se": kl.standard_error,
        "kl_change": change.value,
        "kl_change_se": change.standard_error,
        "perplexity": _perplexity(ablated),
    }


def _mean_kl(sums: Sequence[_Sums]) -> float:
    return clustered_mean([s.kl for s in sums], [s.tokens for s in sums]).value


def _perplexity(sums: Sequence[_Sums]) -> float:
    mean = clustered_mean([s.negative_log_likelihood for s in sums], [s.tokens for s in sums]).value
    return math.exp(min(mean, _LARGEST_EXPONENT))
