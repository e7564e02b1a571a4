"""Calls of the gated delta rule at their most awkward, and the comparison of the chunked kernels with fp64 on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from hybridize_kernels import gated_delta_rule, use_implementation
from hybridize_kernels.gated_delta_rule import chunked
from tests.kernels.tolerances import GRADIENT, OUTPUT

Rule = Callable[..., tuple[Tensor, Tensor | None]]

LOOP_TOKENS = 130
"""Up to here the token loop itself is what is expected, beyond it the eager form, which other tests tie to the loop."""
YARDSTICKS = 4.0
"""How many times the yardstick's error a kernel's may be: both are one throw of the dice a number."""
CHUNK = 64


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        heads: of q, k, v and of the state; each of the first three divides the last.
        decay: log decays uniform in [−3, 0] ("mixed"); in every chunk a sum of −1000 and then decays of −0.02 at most
            ("steep"); in [−1e-4, 0] ("weak"); 0 ("none").
        beta: of every token, or None: uniform in [0, 2].
        parallel: keys are one direction a head and 5 % of noise.
        normalize: q and k are normalised by the op; otherwise they come normalised.
        state: with an initial state. final: the final state is asked for.
        lengths: of the sequences packed into one row, whose sum the time is; None: there is no cu_seqlens.
    """

    time: int = 0
    heads: tuple[int, int, int, int] = (2, 2, 2, 2)
    key: int = 16
    value: int = 16
    batch: int = 2
    dtype: torch.dtype = torch.float32
    decay: Literal["mixed", "steep", "weak", "none"] = "mixed"
    beta: float | None = None
    parallel: bool = False
    normalize: bool = True
    scale: float | None = None
    state: bool = True
    final: bool = True
    lengths: tuple[int, ...] | None = None
    device: str = "cpu"

    @property
    def is_hard(self) -> bool:
        """Whether the recurrence amplifies what rounding its operands does, or forgets none of it."""
        return self.parallel or self.beta is not None or self.decay in ("weak", "none")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, time and number of sequences."""
        if self.lengths is None:
            return self.batch, self.time, self.batch
        return 1, sum(self.lengths), len(self.lengths)

    def inputs(self) -> dict[str, Tensor]:
        """q, k and v in the dtype; gates and the initial state, which models keep in fp32, are in fp32 at least."""
        batch, time, sequences = self.shape
        query_heads, key_heads, value_heads, heads = self.heads
        q, k = draw(batch, time, query_heads, self.key), draw(batch, time, key_heads, self.key)
        if self.parallel:
            k = draw(batch, 1, key_heads, self.key) + 0.05 * k
        if not self.normalize:
            q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        beta = 2 * torch.rand(batch, time, heads) if self.beta is None else torch.full((batch, time, heads), self.beta)
        given = {"q": q, "k": k, "v": draw(batch, time, value_heads, self.value)}
        given = {name: x.to(self.dtype) for name, x in given.items()}
        given |= {"log_decay": self._log_decay(batch, time, heads), "beta": beta.to(self.wide)}
        if self.state:
            given["initial_state"] = draw(sequences, heads, self.key, self.value).to(self.wide)
        return {name: x.to(self.device) for name, x in given.items()}

    def _log_decay(self, *shape: int) -> Tensor:
        lowest = {"mixed": -3.0, "steep": -0.02, "weak": -1e-4, "none": 0.0}[self.decay]
        log_decay = lowest * torch.rand(*shape, dtype=torch.float64)
        if self.decay == "steep":
            log_decay[:, torch.arange(shape[1]) % CHUNK < 50] = -20.0
        return log_decay.to(self.wide)

    @property
    def wide(self) -> torch.dtype:
        """Of gates and states."""
        return torch.promote_types(self.dtype, torch.float32)

    def options(self) -> dict[str, Any]:
        """All other arguments of the call."""
        given: dict[str, Any] = {"scale": self.scale, "normalize_qk": self.normalize, "output_final_state": self.final}
        if self.lengths is not None:
            given["cu_seqlens"] = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)
        return given

    def directions(self) -> dict[str, Tensor]:
        """A gradient of the output and of the final state, of numbers that the dtypes of both hold."""
        batch, time, sequences = self.shape
        generator = torch.Generator().manual_seed(3)
        shapes = {"output": (batch, time, self.heads[3], self.value)}
        if self.final:
            shapes["state"] = (sequences, self.heads[3], self.key, self.value)
        dtypes = {"output": self.dtype, "state": self.wide}
        return {
            name: torch.randn(shape, generator=generator).to(dtypes[name]).to(self.device)
            for name, shape in shapes.items()
        }


def draw(*shape: int) -> Tensor:
    """Normal numbers in fp64."""
    return torch.randn(*shape, dtype=torch.float64)


def results(
    rule: Rule, inputs: dict[str, Tensor], directions: dict[str, Tensor], *, of: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Output, final state, and the gradients of the inputs named in `of` (all unless given) as `d_<name>`.

    The gradients are those of the sum of the projections of output and state on the directions that are there.
    """
    names = list(inputs) if of is None else list(of)
    leaves = {name: x.detach().clone().requires_grad_(name in names) for name, x in inputs.items()}
    output, state = rule(**leaves)
    found = {"output": output} if state is None else {"output": output, "state": state}
    # An output without tokens may hang on no input.
    asked = [name for name in directions if found[name].requires_grad]
    gradients = torch.autograd.grad(
        [found[name] for name in asked],
        [leaves[name] for name in names],
        [directions[name].to(found[name].dtype) for name in asked],
        allow_unused=True,
    )
    for name, gradient in zip(names, gradients, strict=True):
        found[f"d_{name}"] = torch.zeros_like(inputs[name]) if gradient is None else gradient
    return {name: x.detach() for name, x in found.items()}


def kernel_results(case: Case, inputs: dict[str, Tensor] | None = None, **options: Any) -> dict[str, Tensor]:
    """What the chunked kernels make of a case; options go to `chunked.gated_delta_rule`."""
    inputs = case.inputs() if inputs is None else inputs
    return results(partial(chunked.gated_delta_rule, **case.options(), **options), inputs, case.directions())


def expected_results(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in fp64: by the token loop, or by the eager form where the loop would take minutes."""
    form: Literal["reference", "eager"] = "reference" if case.shape[1] <= LOOP_TOKENS else "eager"
    with use_implementation(form):
        return results(partial(gated_delta_rule, **case.options()), exactly(inputs), exactly(case.directions()))


def errors_of(
    found: dict[str, Tensor], expected: dict[str, Tensor], inputs: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The errors of results, by their names (`error_of`).

    The gradient of a log decay is the sum of q̂·dq̂ − v·dv over the tokens that it decays. Where the two cancel, nearly
    or, without a state to decay, altogether, it is measured by them, since they are what is rounded.
    """
    errors = {name: error_of(x, expected[name], dtype) for name, x in found.items()}
    if expected.get("d_log_decay", torch.empty(0)).numel():
        terms = (inputs["v"].double() * expected["d_v"].double()).sum(-1)
        errors["d_log_decay"] = error_of(
            found["d_log_decay"], expected["d_log_decay"], dtype, least=terms.abs().max().item()
        )
    return errors


def yardstick_errors(case: Case, inputs: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """What products of this dtype lose (see `rounded_chunks`), of each result.

    For gradients it is the largest of any: those of the gates are differences of larger numbers, and by luck one of
    them comes out well in one arithmetic and not in another.
    """
    rule = partial(rounded_chunks, dtype=case.dtype, **case.options())
    found = results(rule, exactly(inputs), exactly(case.directions()))
    errors = errors_of({name: found[name] for name in expected}, expected, inputs, case.dtype)
    of_gradients = max(error for name, error in errors.items() if name.startswith("d_"))
    return {name: of_gradients if name.startswith("d_") else error for name, error in errors.items()}


def exactly(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in fp64."""
    return {name: x.double() for name, x in given.items()}


def error_of(actual: Tensor, expected: Tensor, dtype: torch.dtype, *, least: float = 0.0) -> float:
    """The largest difference over the largest value expected, or over `least`, or the dtype's least normal number.

    Strong decays leave nothing of a state but what fp64 alone can write: a GPU takes a factor below fp32's least normal
    number for zero, and what a state of a few units loses by that counts for nothing.
    """
    if expected.numel() == 0:
        return 0.0
    size = max(expected.double().abs().max().item(), least, torch.finfo(dtype).tiny)
    lost = 8 * torch.finfo(torch.float32).tiny
    difference = (actual.double() - expected.double()).abs().max().item()
    return 0.0 if difference <= lost else difference / size  # NaN is no less than anything


def check(case: Case, *, twice: bool = False, **options: Any) -> None:
    """Output, final state and every gradient of the chunked kernels against fp64, within the table of tolerances.

    A hard case (`Case.is_hard`) may lie further away, by `YARDSTICKS` times what `rounded_chunks` loses in it: with
    nearly parallel keys and beta 2 a transition turns the state around and shrinks nothing, so that what one product
    rounds off is there for all tokens to come.

    twice: again, with equal bits. options: of `chunked.gated_delta_rule`.
    """
    inputs = case.inputs()
    found = kernel_results(case, inputs, **options)
    if twice:
        again = kernel_results(case, inputs, **options)
        for name, x in found.items():
            assert torch.equal(x, again[name]), f"{name} of {case} {options} is another the second time"
    expected = expected_results(case, inputs)
    lost = yardstick_errors(case, inputs, expected) if case.is_hard else dict.fromkeys(found, 0.0)
    dtypes = {"output": case.dtype, "state": case.wide} | {f"d_{name}": x.dtype for name, x in inputs.items()}
    errors = errors_of(found, expected, inputs, case.dtype)
    for name, x in found.items():
        assert x.shape == expected[name].shape, f"{name} of {case} {options}: {list(x.shape)}"
        assert x.dtype == dtypes[name], f"{name} of {case} {options}: {x.dtype}"
        allowed = tolerance(name, case.dtype) + YARDSTICKS * lost[name]
        assert errors[name] <= allowed, f"{name} of {case} {options}: error {errors[name]:.3g} above {allowed:.3g}"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Two ways to the same numbers, within the table of tolerances."""
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.shape == expected[name].shape, f"{name}: {list(x.shape)}"
        error, allowed = error_of(x, expected[name], dtype), tolerance(name, dtype)
        assert error <= allowed, f"{name}: error {error:.3g} above {allowed:.3g}"


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Of the table."""
    return (GRADIENT if name.startswith("d_") else OUTPUT)[dtype]


class _Rounded(torch.autograd.Function):
    """x as numbers of a dtype, and its gradient too, both kept in x's own dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def rounded_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    scale: float | None,
    normalize_qk: bool,
    output_final_state: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The chunked form in fp64, in which nothing is rounded but what it multiplies: a yardstick of what a dtype allows.

    In the words of `walk`, the entering state S, the matrices T and P, X = V − read_key ∘ K S, R = T X and
    write_key ∘ R are rounded to `dtype`, each once a chunk and before the products that it enters, and so are their
    gradients on the way back. Sums, exponentials, the solve and the state that goes on are exact. A chunked kernel on
    tensor cores, which take operands of the dtype, rounds all of these at least: it can be better than this by luck
    alone, and should not be worse by more than a few times.
    """
    heads = log_decay.shape[2]

    def rounded(x: Tensor) -> Tensor:
        result: Tensor = _Rounded.apply(x, dtype)
        return result

    if normalize_qk:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * (k.shape[3] ** -0.5 if scale is None else scale)
    q, k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v))
    state = k.new_zeros(k.shape[0], heads, k.shape[3], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    # [B, HS, C, ...] a chunk
    chunks = zip(*(x.transpose(1, 2).split(CHUNK, dim=2) for x in (q, k, v, log_decay, beta)), strict=True)
    for queries, keys, values, log_a, b in chunks:
        total = log_a.cumsum(-1)
        until, end = total.exp()[..., None], total[..., -1:]
        future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=k.device).triu(1)
        between = (total[..., :, None] - total[..., None, :]).masked_fill(future, float("-inf")).exp() * b[..., None, :]
        system = (keys @ keys.mT * between).tril(-1)
        one = torch.eye(system.shape[-1], dtype=k.dtype, device=k.device).expand_as(system)
        inverse = rounded(torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True))
        inside = rounded(state)
        delta = inverse @ rounded(values - until * (keys @ inside))
        scores = rounded(queries @ keys.mT * between)
        outputs.append(until * (queries @ inside) + scores @ rounded(delta))
        write = ((end - total).exp() * b)[..., None]
        state = state * end.exp()[..., None] + keys.mT @ rounded(write * delta)
    return torch.cat(outputs, dim=2).transpose(1, 2), state
