"""The scores that a decoding step completes, of all layers at once: against one layer's ops after the other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridize_kernels import retained_decode, retention_scores_step, token_scorer_step, use_implementation
from hybridize_kernels.dispatch import IMPLEMENTATIONS, Implementation
from hybridize_kernels.retention_scores_step import MAX_CONVOLUTIONS
from hybridize_kernels.token_scorer.step import MAX_LAYERS
from hybridize_kernels.token_scorer.tiles import VARIABLE
from tests.kernels.tolerances import OUTPUT, assert_close

GRID = 2.0**16


@dataclass
class Layers:
    """Layers with a random scorer each, or one for all (shared), and the steps of a few rows of a text.

    k and v `[steps, L, B, H, D]`, positions `[steps, B]`, where a row now and then takes no part.
    """

    layers: int = 3
    batch: int = 2
    heads: int = 2
    size: int = 6
    steps: int = 24
    convolutions: int = 2
    kernel: int = 3
    dilation: int = 1
    window: int = 8
    budget: int = 3
    scorers: int = 2
    shared: bool = False
    threshold: bool = True
    padding: float = 0.2
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.k = self.draw(self.steps, self.layers, self.batch, self.heads, self.size).to(self.dtype)
        self.v = self.draw(self.steps, self.layers, self.batch, self.heads, self.size).to(self.dtype)
        real = torch.rand(self.steps, self.batch) >= self.padding
        self.positions = torch.where(real, real.cumsum(0) - 1, -1).to(self.device)
        widths = [max(1, 2 * self.size >> n) for n in range(self.convolutions + 1)]
        self.weights, self.biases = [], []
        for a, b in pairwise(widths):
            self.weights += [(2.0 / (self.kernel * a)) ** 0.5 * self.parameter(self.kernel * a, b)]
            self.biases += [self.parameter(b)]
        self.output_weight, self.output_bias = self.parameter(widths[-1], 1), self.parameter(1)
        self.thresholds = self.draw(self.layers, self.heads) if self.threshold else None
        self.stored = (self.kernel - 1) * self.dilation
        self.margin = self.convolutions * self.stored // 2
        self.width = self.stored * sum(widths[:-1])

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).float().to(self.device)

    def parameter(self, *shape: int) -> Tensor:
        x = self.draw(1 if self.shared else self.layers, self.scorers, *shape)
        return x.expand(self.layers, *x.shape[1:])

    def empty(self) -> dict[str, Tensor]:
        rows, slots = (self.layers, self.batch, self.heads), self.window + self.budget
        return {
            "history": torch.zeros(*rows, self.width, device=self.device),
            "scores": torch.zeros(*rows, slots, device=self.device),
        }

    def arguments(self, step: int) -> dict[str, Any]:
        return {
            "k": self.k[step],
            "v": self.v[step],
            "positions": self.positions[step],
            "weights": self.weights,
            "biases": self.biases,
            "output_weight": self.output_weight,
            "output_bias": self.output_bias,
            "dilation": self.dilation,
            "window": self.window,
            "threshold": self.thresholds,
        }


def assert_same_caches(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Scores may lie on the next step of the grid: where a sum ends within its rounding of a tie, both are right."""
    assert_close(f"history, {what}", actual["history"], expected["history"], OUTPUT[torch.float32])
    size = max(1.0, float(expected["scores"].abs().max()))
    allowed = 1 / GRID + size * OUTPUT[torch.float32]
    assert (actual["scores"] - expected["scores"]).abs().max() <= allowed, f"scores, {what}"
    on_grid = actual["scores"] * GRID
    assert torch.equal(on_grid, on_grid.round()), what


def check(of: Layers, form: Implementation, **options: Any) -> dict[str, Tensor]:
    caches, expected = of.empty(), of.empty()
    for step in range(of.steps):
        with use_implementation("reference"):
            retention_scores_step(**of.arguments(step), **expected, **options)
        with use_implementation(form):
            retention_scores_step(**of.arguments(step), **caches, **options)
        assert_same_caches(caches, expected, f"step {step} of {of}")
    return caches


@pytest.mark.parametrize("form", ["eager", "triton"])
@pytest.mark.parametrize("score", ["sigmoid", "relu"])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"shared": True, "scorers": 1, "threshold": False},
        {"scorers": 1, "convolutions": 1, "dilation": 3, "window": 5, "budget": 0},
        {"convolutions": 4, "size": 20, "layers": 2, "heads": 1, "scorers": 1, "batch": 1, "padding": 0.0},
        {"kernel": 5, "dilation": 2, "window": 9, "heads": 3, "scorers": 3, "shared": True, "layers": 2},
    ],
    ids=str,
)
def test_every_form_equals_the_reference(
    form: Implementation, score: str, case: dict[str, Any], kernel_device: str
) -> None:
    of = Layers(device=kernel_device, **case)
    scores = check(of, form, score=score)["scores"]
    assert scores[..., : of.window].unique().numel() > 4
    assert not scores[..., of.window :].any()


def test_more_rows_than_a_tile(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "step=16,16,4,2")
    check(Layers(batch=37, layers=2, steps=9, device=kernel_device), "triton")


def test_half_precision_keys_are_scored_in_float32(kernel_device: str) -> None:
    check(Layers(dtype=torch.float16, steps=12, device=kernel_device), "triton")


@pytest.mark.parametrize("margin_short_of_window", [1, 5])
@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_state_is_that_of_scoring_before_the_attention(
    margin_short_of_window: int, threshold: bool, batch: int
) -> None:
    """Bit for bit, over a run in which many retained tokens give way to better ones.

    With one row eager multiplies for all layers at once; the library then adds up in another order than for one layer.
    """
    window = 4 + margin_short_of_window
    of = Layers(steps=320 // batch, dilation=2, window=window, budget=5, threshold=threshold, batch=batch)
    assert of.margin == 4
    today, at_the_end = whole_state(of), whole_state(of)
    replaced = 0
    for step in range(of.steps):
        position = of.positions[step]
        query = of.draw(of.layers, of.batch, 1, 2 * of.heads, of.size)
        outputs = []
        for state, in_advance in ((today, True), (at_the_end, False)):
            before = state["retained_positions"].clone()
            outputs += [[attend(of, state, layer, step, query[layer], in_advance) for layer in range(of.layers)]]
            replaced += int(((state["retained_positions"] != before) & (before >= 0)).sum())
        retention_scores_step(
            **of.arguments(step) | {"positions": position[:, None]},
            history=at_the_end["history"],
            scores=at_the_end["scores"],
        )
        both = {name: (tensor, at_the_end[name]) for name, tensor in today.items()}
        for name, (one, other) in (both | {"outputs": tuple(torch.stack(x) for x in outputs)}).items():
            if batch > 1 or not one.is_floating_point():
                assert torch.equal(one, other), f"{name} after step {step}"
            elif name == "scores":
                assert (one - other).abs().max() <= 2.0**-16, f"{name} after step {step}"
            else:
                assert_close(f"{name} after step {step}", one, other, OUTPUT[torch.float32])
    assert replaced > 100


def whole_state(of: Layers) -> dict[str, Tensor]:
    rows, slots = (of.layers, of.batch, of.heads), of.window + of.budget
    return {
        **of.empty(),
        "keys": torch.zeros(*rows, slots, of.size),
        "values": torch.zeros(*rows, slots, of.size),
        "retained_positions": torch.full((*rows, of.budget), -1, dtype=torch.int32),
        "num_retained": torch.zeros(*rows, dtype=torch.int32),
        "last_position": torch.full(rows[:2], -1, dtype=torch.int32),
    }


def attend(
    of: Layers, state: dict[str, Tensor], layer: int, step: int, query: Tensor, scored_in_advance: bool
) -> Tensor:
    """A layer's attention as token eviction does it; scored in advance, the step's scores go with it."""
    position, cache = of.positions[step], {name: tensor[layer] for name, tensor in state.items() if name != "history"}
    k, v = of.k[step, layer, :, None], of.v[step, layer, :, None]
    options: dict[str, Any] = {}
    if scored_in_advance:
        x = token_scorer_step(
            k,
            v,
            state["history"][layer],
            (position >= 0).to(torch.int32),
            cache["last_position"] + 1,
            [weight[layer] for weight in of.weights],
            [bias[layer] for bias in of.biases],
            of.output_weight[layer],
            of.output_bias[layer],
            dilation=of.dilation,
        )[:, 0]
        if of.thresholds is not None:
            x = x - of.thresholds[layer]
        score = torch.sigmoid(x) - 0.5
        options = {"fresh_score": torch.round(score * GRID) / GRID, "margin": of.margin}
    return retained_decode(query, k, v, **cache, window=of.window, sinks=1, positions=position[:, None], **options)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_row_without_a_token_stays_as_it_is(form: Implementation, kernel_device: str) -> None:
    of = Layers(padding=0.0, device=kernel_device)
    caches = {name: torch.randn_like(tensor) for name, tensor in of.empty().items()}
    before = {name: tensor.clone() for name, tensor in caches.items()}
    given = of.arguments(0) | {"positions": torch.tensor([-1, 50], device=kernel_device)}
    given["k"][:, 0] = torch.nan
    with use_implementation(form):
        retention_scores_step(**given, **caches)
    for name, tensor in caches.items():
        assert torch.equal(tensor[:, 0], before[name][:, 0]), name
        assert not torch.equal(tensor[:, 1], before[name][:, 1]), name


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_scores_before_the_text_are_not_written(form: Implementation, kernel_device: str) -> None:
    of = Layers(padding=0.0, device=kernel_device)
    caches = of.empty()
    with use_implementation(form):
        for step in range(of.margin):
            retention_scores_step(**of.arguments(step), **caches)
        assert not caches["scores"].any()
        retention_scores_step(**of.arguments(of.margin), **caches)
    assert caches["scores"][..., 0].all()
    assert not caches["scores"][..., 1:].any()


@pytest.mark.parametrize("form", ["eager", "triton"])
def test_inputs_may_be_parts_of_something_wider(form: Implementation, kernel_device: str) -> None:
    of = Layers(scorers=1, padding=0.0, device=kernel_device)
    caches, apart = of.empty(), of.empty()
    for step in range(of.steps):
        wide = torch.randn(of.batch, of.layers, of.heads, 3 * of.size, device=kernel_device)
        wide[..., : of.size], wide[..., 2 * of.size :] = of.k[step].transpose(0, 1), of.v[step].transpose(0, 1)
        position = of.positions[step, :1].to(torch.int32).expand(of.batch)
        k, v = wide[..., : of.size].transpose(0, 1), wide[..., 2 * of.size :].transpose(0, 1)
        across = [weight.transpose(2, 3).contiguous().transpose(2, 3) for weight in of.weights]
        with use_implementation(form):
            retention_scores_step(**of.arguments(step), **caches)
            retention_scores_step(
                **of.arguments(step) | {"k": k, "v": v, "positions": position, "weights": across}, **apart
            )
    assert_same_caches(apart, caches, form)


def test_scorers_that_the_kernel_does_not_cover_run_in_eager() -> None:
    assert MAX_CONVOLUTIONS == MAX_LAYERS
    of = Layers(convolutions=MAX_CONVOLUTIONS + 1, steps=8)
    check(of, "eager")
    with use_implementation("triton"), pytest.raises(ValueError, match="does not cover this call"):
        retention_scores_step(**of.arguments(0), **of.empty())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "a score needs 2 later tokens, expected 1 to 1"),
        ({"dilation": 0, "history": torch.zeros(3, 2, 2, 0)}, "a score needs 0 later tokens"),
        ({"window": 12}, "scores has shape"),
        ({"k": torch.zeros(2, 2, 6)}, "k has shape"),
        ({"v": torch.zeros(3, 2, 2, 5)}, "v has shape"),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, "positions has shape"),
        ({"history": torch.zeros(3, 2, 2, 7)}, "history has shape"),
        ({"scores": torch.zeros(3, 2, 11, 2).transpose(2, 3)}, "scores is updated in place"),
        ({"threshold": torch.zeros(2)}, "threshold has shape"),
        ({"weights": []}, "0 weights and 2 biases"),
        ({"output_bias": torch.zeros(2, 1)}, "output_bias has shape"),
        ({"score": "tanh"}, "no score 'tanh'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    of = Layers()
    with pytest.raises(ValueError, match=message):
        retention_scores_step(**{**of.arguments(0), **of.empty(), **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "convolutions"), [(64, 3), (128, 2), (256, 3)])
@pytest.mark.parametrize(("batch", "scorers", "shared"), [(1, 4, False), (20, 1, True)])
def test_the_kernel_on_a_gpu(
    size: int, convolutions: int, batch: int, scorers: int, shared: bool, dtype: torch.dtype
) -> None:
    """Real sizes, replayed from one CUDA graph, against the eager form in fp64; a ReLU shows a logit's whole error."""
    of = Layers(
        layers=4, batch=batch, heads=4, size=size, steps=60, convolutions=convolutions, window=40, scorers=scorers,
        shared=shared, dtype=dtype, device="cuda",
    )  # fmt: skip
    caches = of.empty()
    exact = {name: tensor.double() for name, tensor in of.empty().items()}
    given = {**of.arguments(0), **{name: of.arguments(0)[name].clone() for name in ("k", "v", "positions")}}
    kept = {name: tensor.clone() for name, tensor in caches.items()}
    retention_scores_step(**given, **caches, score="relu")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        retention_scores_step(**given, **caches, score="relu")
    for name, tensor in caches.items():
        tensor.copy_(kept[name])
    for step in range(of.steps):
        now = of.arguments(step)
        for name in ("k", "v", "positions"):
            given[name].copy_(now[name])
        graph.replay()
        with use_implementation("eager"):
            retention_scores_step(**now, **exact, score="relu")
    # As in test_token_scorer: the matrix units cut off where others round.
    assert_close("history", caches["history"], exact["history"], 2 * OUTPUT[torch.float32])
    size_of_all = float(exact["scores"].abs().max())
    assert (caches["scores"] - exact["scores"]).abs().max() <= 1 / GRID + 2 * OUTPUT[torch.float32] * size_of_all
