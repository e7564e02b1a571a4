"""The two ways to learn from the teacher: layer by layer from its own activations, and from its next-token logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybridize.distillation.data import Batch
from hybridize.distillation.lora import Group, Student
from hybridize.distillation.losses import Head, distillation_terms, relative_error
from hybridize.distillation.teacher import AttentionTrace, Teacher
from hybridize.recipe.schema import Stage

Measured = dict[str, Tensor]
"""Named scalars without gradient. `layer_<i>` is the relative error of layer i and "error" their mean; "loss" is
what was minimised."""


class Step(Protocol):
    """How a stage learns from one micro-batch."""

    groups: tuple[Group, ...]
    """Parameter groups that are trained."""

    def prepare(self, batch: Batch) -> Any:
        """What the teacher says about a micro-batch; it may be used for several optimiser steps."""

    def backward(self, prepared: Any, share: float) -> Measured:
        """Adds `share` times the gradient of the loss to the parameters."""

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradient norms are clipped together."""


class Align:
    """Every mixer maps its teacher layer's own input to that layer's output; no gradient goes between layers.

    The loss of a layer is ||mixer(x) - attention(x)||² / ||attention(x)||², to which the mixer adds its own terms; the
    layers' losses are summed, and each layer's graph is freed before the next one is built.
    """

    groups: tuple[Group, ...] = ("mixers", "projections")

    def __init__(self, stage: Stage, student: Student, teacher: Teacher, autocast: torch.autocast) -> None:
        self.stage, self.student, self.teacher, self.autocast = stage, student, teacher, autocast
        self.mixers = tuple(
            (index, mixer) for index, mixer in student.mixers if any(p.requires_grad for p in mixer.parameters())
        )

    def prepare(self, batch: Batch) -> dict[int, AttentionTrace]:
        return self.teacher.trace(batch.tokens, [index for index, _ in self.mixers])

    def backward(self, prepared: dict[int, AttentionTrace], share: float) -> Measured:
        measured: Measured = {}
        total = torch.zeros((), device=next(self.student.model.parameters()).device)
        for index, mixer in self.mixers:
            trace = prepared[index]
            with self.autocast:
                out, _ = mixer(trace.hidden_states, position_embeddings=trace.position_embeddings)
            error = relative_error(out, trace.output)
            loss = error + self.stage.loss.auxiliary * _sum(mixer.auxiliary, error)
            if loss.requires_grad:
                torch.autograd.backward(loss * share)
            measured[f"layer_{index}"] = error.detach()
            for name, value in mixer.auxiliary.items():
                measured[name] = measured.get(name, 0.0) + value.detach().float()
            total = total + loss.detach()
        errors = [value for name, value in measured.items() if name.startswith("layer_")]
        return {"loss": total, "error": torch.stack(errors).mean(), **measured}

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

    def __init__(self, stage: Stage, student: Student, teacher: Teacher, autocast: torch.autocast) -> None:
        self.stage, self.student, self.teacher, self.autocast = stage, student, teacher, autocast

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.tokens, self.teacher.last_hidden(batch.tokens)

    def backward(self, prepared: tuple[Tensor, Tensor], share: float) -> Measured:
        tokens, teacher_hidden = prepared
        model = self.student.model
        with self.autocast:
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        student = Head(hidden, model.lm_head.weight, model.lm_head.bias)
        head = self.teacher.model.lm_head
        teacher = Head(teacher_hidden, head.weight, head.bias)
        loss, measured = distillation_terms(self.stage.loss, student, teacher, tokens)
        auxiliary: Measured = {}
        for _, mixer in self.student.mixers:
            for name, value in mixer.auxiliary.items():
                auxiliary[name] = auxiliary.get(name, 0.0) + value.float()
        loss = loss + self.stage.loss.auxiliary * _sum(auxiliary, loss)
        torch.autograd.backward(loss * share)
        return {"loss": loss.detach(), **measured, **{name: value.detach() for name, value in auxiliary.items()}}

    def clip_groups(self) -> list[list[nn.Parameter]]:
        return [[parameter for parameter in self.student.trained().values() if parameter.requires_grad]]


def make_step(stage: Stage, student: Student, teacher: Teacher, autocast: torch.autocast) -> Step:
    """The step of a stage, with its parameters unfrozen and the mixers told what they learn from."""
    kind = Align if stage.kind == "align" else Distil
    student.train_only(kind.groups)
    for _, mixer in student.mixers:
        if hasattr(mixer, "align_targets"):
            setattr(mixer, "align_targets", stage.kind == "align")  # noqa: B010 - not every mixer declares it
    return kind(stage, student, teacher, autocast)


def _sum(auxiliary: dict[str, Tensor], like: Tensor) -> Tensor:
    return torch.stack([value.float() for value in auxiliary.values()]).sum() if auxiliary else torch.zeros_like(like)
