"""The cases of the distillation loss: their inputs, ours on them, the exact result, and what a pass needs at least.

Products of N tokens, d and V: the student's logits, the teacher's logits, and the gradient of the hidden states, each
2 N d V operations; as many again for the head's gradient where it is trained. The loss itself is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridize_kernels import distillation_loss, use_implementation

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""student_hidden, teacher_hidden `[N, d]`, student_head, teacher_head `[V, d]` -> the mean KL(teacher ‖ student)."""


@dataclass(frozen=True)
class Case:
    """N: tokens. V: vocabulary. head: the student's, trained or frozen."""

    N: int
    d: int
    V: int
    head: str

    @property
    def trained(self) -> bool:
        return self.head == "trained"

    @property
    def operations(self) -> int:
        return (4 if self.trained else 3) * 2 * self.N * self.d * self.V


SIZES = [(576, 49152), (2048, 49152), (1536, 151936), (4096, 128256)]
CASES = [Case(8192, *size, head) for head in ("frozen", "trained") for size in SIZES]
TINY = [Case(40, 8, 50, "frozen"), Case(40, 8, 50, "trained")]


def make_inputs(case: Case, device: str) -> list[Tensor]:
    """In the order of `Loss`: a student that is near its teacher, whose logits have a standard deviation of 3.

    What is trained asks for its gradient.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)

    def near(tensor: Tensor) -> Tensor:
        return tensor + 0.3 * torch.randn_like(tensor)

    teacher_hidden = torch.randn(case.N, case.d, device=device)
    teacher_head = torch.randn(case.V, case.d, device=device) * (3 * case.d**-0.5)
    student_head = teacher_head + 0.3 * case.d**-0.5 * torch.randn_like(teacher_head)
    inputs = [near(teacher_hidden), teacher_hidden, student_head, teacher_head]
    inputs = [tensor.to(dtype) for tensor in inputs]
    for leaf in leaves_of(case, inputs):
        leaf.requires_grad_()
    return inputs


def leaves_of(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """The student's hidden states, and its head where it is trained."""
    return [inputs[0], inputs[2]] if case.trained else [inputs[0]]


def ours(*inputs: Tensor, **options: Any) -> Tensor:
    return distillation_loss(*inputs, **options)[0]


def exact(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """The loss and the gradients of its leaves, from the eager form in fp64."""
    doubles = [tensor.detach().double() for tensor in inputs]
    leaves = [leaf.requires_grad_() for leaf in leaves_of(case, doubles)]
    with use_implementation("eager"):
        loss = ours(*doubles, chunk_tokens=256)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]
