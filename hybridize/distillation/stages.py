"""The two ways to learn from the teacher: layer by layer from its own activations, and from its next-token logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Group, Student
from hybridize.distillation.losses import Head, Target, distillation_terms, next_tokens, relative_error
from hybridize.distillation.teacher import AttentionTrace
from hybridize.mixers.base import Mixer
from hybridize.recipe.schema import Stage

Measured = dict[str, Tensor]
"""Named scalars without gradient. `layer_<i>` is the relative error of layer i and "error" the mean of all; "loss" is
what was minimised."""


class TeacherAnswers(Protocol):
    """What a stage asks of the teacher, live or from a cache."""

    def targets(self, batch: Batch) -> Target:
        """What the student's next-token distributions are compared with."""

    def trace(self, batch: Batch, layers: Iterable[int]) -> dict[int, AttentionTrace]:
        """Input and output of the attention of these layers."""


class Step(Protocol):
    """How a stage learns from one micro-batch."""

    groups: tuple[Group, ...]
    """Parameter groups that are trained."""

    def prepare(self, batch: Batch) -> Any:
        """What the teacher says about a micro-batch; it may be used for several optimiser steps."""

    def backward(self, prepared: Any, share: float, *, measure: bool) -> Measured:
        """Adds `share` times the gradient of the loss to the parameters; measures what it can do without if told to."""

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradient norms are clipped together."""


@runtime_checkable
class TargetLearner(Protocol):
    """A mixer whose new parameters can learn from the teacher's projections alone, which are frozen in align."""

    auxiliary: dict[str, Tensor]

    def align_targets(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """What a batch teaches; it does not change as the mixer learns."""

    def align_loss(self, targets: Any) -> Tensor:
        """A scalar; sets `auxiliary` as a forward pass does."""


@dataclass
class Captured:
    """A layer's trace of some sequences, and its mixer's targets once they are known."""

    trace: AttentionTrace
    sequences: int
    targets: Any = None


class Align:
    """Every mixer learns from its teacher layer alone; no gradient goes between layers.

    The loss of a layer is ||mixer(x) - attention(x)||² / ||attention(x)||², the mean over the sequences, or, where the
    mixer has one, its own loss from the teacher's projections; the error of the output is then only measured. To it
    comes what the mixer adds. Each layer's graph is freed before the next one is built.
    """

    groups: tuple[Group, ...] = ("mixers", "projections")

    def __init__(self, stage: Stage, student: Student, teacher: TeacherAnswers, autocast: torch.autocast) -> None:
        self.stage, self.student, self.teacher, self.autocast = stage, student, teacher, autocast
        self.mixers = tuple(
            (index, mixer) for index, mixer in student.mixers if any(p.requires_grad for p in mixer.parameters())
        )

    def prepare(self, batch: Batch) -> dict[int, Captured]:
        traces = self.teacher.trace(batch, [index for index, _ in self.mixers])
        return {index: Captured(trace, len(batch.tokens)) for index, trace in traces.items()}

    def backward(self, prepared: dict[int, Captured], share: float, *, measure: bool) -> Measured:
        measured: Measured = {}
        auxiliary: dict[str, list[Tensor]] = {}
        total = torch.zeros((), device=next(self.student.model.parameters()).device)
        for index, mixer in self.mixers:
            captured = prepared[index]
            loss, named = self._loss(mixer, captured)
            extra = dict(mixer.auxiliary)  # a forward pass that only measures would leave it empty
            if isinstance(mixer, TargetLearner):
                if measure:
                    measured[f"layer_{index}"] = self._error_in_use(mixer, captured)
            else:
                measured[f"layer_{index}"] = loss.detach()
            loss = loss + self.stage.objective.auxiliary * _sum(extra, loss)
            if loss.requires_grad:
                torch.autograd.backward(loss * share)
            for name, value in (named | extra).items():
                auxiliary.setdefault(name, []).append(value.detach().float())
            total = total + loss.detach()
        errors = [value for name, value in measured.items() if name.startswith("layer_")]
        if len(errors) == len(self.mixers):
            measured["error"] = torch.stack(errors).mean()
        return {"loss": total, **measured, **_means(auxiliary)}

    def _loss(self, mixer: Mixer, captured: Captured) -> tuple[Tensor, Measured]:
        """What a layer minimises beside its auxiliary losses, and the name of it where it is not the error."""
        trace = captured.trace
        with self.autocast:
            if not isinstance(mixer, TargetLearner):
                out, _ = mixer(**trace.inputs())
                return relative_error(out, trace.output, captured.sequences), {}
            targets = captured.targets
            if targets is None:
                targets = mixer.align_targets(**trace.inputs())
                if self.stage.passes > 1:
                    captured.targets = targets
            loss = mixer.align_loss(targets)
        return loss, {"retention_target": loss}

    @torch.no_grad()
    def _error_in_use(self, mixer: Mixer, captured: Captured) -> Tensor:
        """The relative error of the output as in inference, at the final settings."""
        mixer.eval()
        with self.autocast:
            out, _ = mixer(**captured.trace.inputs())
        mixer.train()
        return relative_error(out, captured.trace.output, captured.sequences)

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """One a mixer, since the layers do not know of each other; what mixers share is clipped with the first."""
        seen: set[int] = set()
        groups = []
        for _, mixer in self.mixers:
            own = [p for p in mixer.parameters() if p.requires_grad and id(p) not in seen]
            seen.update(id(p) for p in own)
            groups.append(own)
        return [group for group in groups if group]


class Distil:
    """The whole hybrid learns the teacher's next-token distribution (and what else the stage's loss weighs)."""

    groups: tuple[Group, ...] = ("mixers", "projections", "adapters")

    def __init__(self, stage: Stage, student: Student, teacher: TeacherAnswers, autocast: torch.autocast) -> None:
        self.stage, self.student, self.teacher, self.autocast = stage, student, teacher, autocast

    def prepare(self, batch: Batch) -> tuple[Batch, Target]:
        return batch, self.teacher.targets(batch)

    def backward(self, prepared: tuple[Batch, Target], share: float, *, measure: bool) -> Measured:
        batch, target = prepared
        model = self.student.model
        with self.autocast:
            hidden = model.model(**batch.model_inputs(), use_cache=False).last_hidden_state
        student = Head(hidden, model.lm_head.weight, model.lm_head.bias)
        objective = self.stage.objective
        labels = next_tokens(batch.tokens, batch.labels_mask) if objective.cross_entropy else None
        loss, measured = distillation_terms(
            objective, student, target, labels, measure=measure, sequences=len(batch.tokens)
        )
        found: dict[str, list[Tensor]] = {}
        for _, mixer in self.student.mixers:
            for name, value in mixer.auxiliary.items():
                found.setdefault(name, []).append(value.float())
        auxiliary = _means(found)
        loss = loss + self.stage.objective.auxiliary * _sum(auxiliary, loss)
        torch.autograd.backward(loss * share)
        for _, mixer in self.student.mixers:
            # Checkpointing has made them once more, with a graph that nobody walks and that holds the layer's inputs.
            mixer.auxiliary = {name: value.detach() for name, value in mixer.auxiliary.items()}
        return {"loss": loss.detach(), **measured, **{name: value.detach() for name, value in auxiliary.items()}}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [[parameter for parameter in self.student.trained().values() if parameter.requires_grad]]


def make_step(stage: Stage, student: Student, teacher: TeacherAnswers, autocast: torch.autocast) -> Step:
    """The step of a stage, with its parameters unfrozen."""
    kind = Align if stage.kind == "align" else Distil
    student.train_only(kind.groups)
    return kind(stage, student, teacher, autocast)


def _sum(auxiliary: dict[str, Tensor], like: Tensor) -> Tensor:
    return torch.stack([value.float() for value in auxiliary.values()]).sum() if auxiliary else torch.zeros_like(like)


def _means(values: dict[str, list[Tensor]]) -> Measured:
    """The mean over the layers of each loss."""
    return {name: torch.stack(of_layers).mean() for name, of_layers in values.items()}
