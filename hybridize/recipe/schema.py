"""What a recipe says, as frozen dataclasses: the field names are the keys of the YAML file.

Ranges are checked in `__post_init__`; the reader turns a RecipeError raised there into one with file and line. The
options of a mixer are not known here (its own configuration class checks them); they are carried as they were written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hybridize.errors import RecipeError
from hybridize.recipe.probes import Evaluate, Precision
from hybridize.recipe.sources import TextSource


def _require(condition: bool, key: str, message: str) -> None:
    if not condition:
        raise RecipeError(message, where=key)


def _positive(value: float, key: str) -> None:
    _require(math.isfinite(value) and value > 0, key, f"must be positive, is {value}.")


@dataclass(frozen=True)
class MixerChoice:
    """A mixer and its options, as written under `mixers:` or in a layer rule."""

    mixer: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRule:
    """Which layers a mixer takes. Exactly one of `indices`, `range`, `every` is given.

    Attributes:
        use: a name from `mixers:`, or a mixer's own name with its default options.
        indices: layer numbers from 0.
        range: "first-last", both included.
        every, offset: layers offset, offset + every, ...
    """

    use: str
    indices: tuple[int, ...] | None = None
    range: str | None = None
    every: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        given = [key for key in ("indices", "range", "every") if getattr(self, key) is not None]
        _require(len(given) == 1, "layers", "a rule needs exactly one of indices, range, every.")
        if self.every is not None:
            _require(self.every >= 1, "every", f"must be at least 1, is {self.every}.")
            _require(0 <= self.offset < self.every, "offset", f"must be in 0..{self.every - 1}, is {self.offset}.")


@dataclass(frozen=True)
class LayerPlan:
    """Either a `pattern` of names repeated over the depth ("G T G T"), or `rules`. Layers that no rule names keep
    full attention.

    The letters G, T, S, N, F stand for gated_delta_net, token_eviction, sliding_window, native_sparse_attention and
    full_attention unless `mixers:` gives them another meaning.
    """

    pattern: str | None = None
    rules: tuple[LayerRule, ...] = ()
    allow_no_full_attention: bool = False
    """Opt-in: no layer of the hybrid can look at every past token directly."""

    def __post_init__(self) -> None:
        _require(
            (self.pattern is None) != (not self.rules), "layers", "give either a pattern or a list of rules, not both."
        )


@dataclass(frozen=True)
class Data:
    """Training and held-out documents. Without `held_out` sources, a share of the training documents is held out."""

    train: tuple[TextSource, ...]
    held_out: tuple[TextSource, ...] = ()
    held_out_share: float = 0.05
    sequence_tokens: int = 1024
    """Length of a training sequence; documents are packed, separated by the end-of-sequence token."""
    document_boundaries: bool = True
    """Tokens see only their own document; False: a sequence is read as one text."""
    shuffle_documents: int = 1000
    """Size of the shuffle buffer, in documents."""

    def __post_init__(self) -> None:
        _require(len(self.train) > 0, "train", "needs at least one source.")
        _require(0 <= self.held_out_share < 1, "held_out_share", f"must be in 0..1, is {self.held_out_share}.")
        _require(self.sequence_tokens >= 2, "sequence_tokens", f"must be at least 2, is {self.sequence_tokens}.")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on the teacher's weights."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", f"must be at least 1, is {self.rank}.")
        _positive(self.alpha, "alpha")
        _require(0 <= self.dropout < 1, "dropout", f"must be in 0..1, is {self.dropout}.")


@dataclass(frozen=True)
class Loss:
    """Weights of the losses of a distill or adapt stage.

    Attributes:
        kl: divergence of the student's next-token distribution from the teacher's.
        direction: forward KL(teacher || student), reverse, or the mean of both.
        temperature: of both softmaxes.
        hidden: mean squared error between the last hidden states, relative to the teacher's power.
        cross_entropy: next-token loss on the text itself.
        auxiliary: factor on the mixers' own losses (eviction: budget, future attention, the say of the
            choice; sparse attention: its choice of blocks).
    """

    kl: float = 1.0
    direction: Literal["forward", "reverse", "mixed"] = "forward"
    temperature: float = 1.0
    hidden: float = 0.0
    cross_entropy: float = 0.0
    auxiliary: float = 1.0

    def __post_init__(self) -> None:
        _positive(self.temperature, "temperature")
        for key in ("kl", "hidden", "cross_entropy", "auxiliary"):
            value = getattr(self, key)
            _require(math.isfinite(value) and value >= 0, key, f"must be zero or positive, is {value}.")
        _require(self.kl + self.hidden + self.cross_entropy > 0, "loss", "every weight is zero: nothing to learn from.")


@dataclass(frozen=True)
class Ramp:
    """The eviction budget falls linearly from the sequence length to its final value between two shares of a stage."""

    start: float = 0.0
    end: float = 0.7

    def __post_init__(self) -> None:
        _require(0 <= self.start < self.end <= 1, "ramp", f"needs 0 <= start < end <= 1, is {self.start}..{self.end}.")


@dataclass(frozen=True)
class Curriculum:
    """Short sequences first: their length doubles from `start_tokens` to the stage's own over the first `end` share of
    its steps, each length for as many steps; a step has more of them, so that it has as many tokens."""

    start_tokens: int = 512
    end: float = 0.5

    def __post_init__(self) -> None:
        _require(self.start_tokens >= 2, "start_tokens", f"must be at least 2, is {self.start_tokens}.")
        _require(0 < self.end <= 1, "end", f"must be in 0..1, is {self.end}.")

    def doublings(self, tokens: int, stage: str) -> int:
        """How often `start_tokens` doubles until it is the stage's length.

        Raises:
            RecipeError: it never is.
        """
        most = max(tokens // self.start_tokens, 1).bit_length() - 1
        if self.start_tokens << most == tokens:
            return most
        example = tokens >> min(most, (tokens & -tokens).bit_length() - 1)
        what = f"The curriculum of stage {stage}: {self.start_tokens} tokens do not become {tokens} by doubling."
        raise RecipeError(what, where=f"stage {stage}", hint=f"Begin with {example}, for example.")


@dataclass(frozen=True)
class Stage:
    """One stage of the distillation.

    Attributes:
        kind: "align": every mixer learns its teacher layer's output from the teacher's own input, no gradient between
            layers. "distill": the whole hybrid learns the teacher's logits. "adapt": like distill, by default with
            cross entropy, for longer context.
        steps: optimiser steps.
        batch_sequences: sequences a step and process, before accumulation.
        accumulate: micro-batches added up before an optimiser step.
        learning_rate: peak; warms up over `warmup_steps`, then cosine to `final_share` of it.
        projection_learning_rate: peak for projections trained in full and adapters; None: as `learning_rate`.
        passes: align only: optimiser steps on each captured batch of teacher inputs.
        calibrate_sequences: align as the first stage only: before its first step, mixers that can (gated_delta_net)
            take their start from the teacher's attention over so many training sequences; 0: none. Of several
            processes, which share them, the first one's decide.
        loss: None: KL for distill, cross entropy for adapt.
        sequence_tokens: None: that of `data`.
        curriculum: None: all sequences have that length.
    """

    name: str
    kind: Literal["align", "distill", "adapt"]
    steps: int
    batch_sequences: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-3
    projection_learning_rate: float | None = None
    final_share: float = 0.1
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    passes: int = 1
    calibrate_sequences: int = 0
    sequence_tokens: int | None = None
    curriculum: Curriculum | None = None
    loss: Loss | None = None
    budget_ramp: Ramp | None = None

    @property
    def objective(self) -> Loss:
        """`loss`, or what suits the kind."""
        if self.loss is not None:
            return self.loss
        return Loss(kl=0.0, cross_entropy=1.0) if self.kind == "adapt" else Loss()

    def __post_init__(self) -> None:
        for key in ("steps", "batch_sequences", "accumulate", "passes"):
            _require(getattr(self, key) >= 1, key, f"must be at least 1, is {getattr(self, key)}.")
        _require(self.calibrate_sequences >= 0, "calibrate_sequences", f"is negative: {self.calibrate_sequences}.")
        _require(
            self.calibrate_sequences == 0 or self.kind == "align",
            "calibrate_sequences",
            f"belongs to a stage of kind align, not {self.kind}.",
        )
        _positive(self.learning_rate, "learning_rate")
        if self.projection_learning_rate is not None:
            _positive(self.projection_learning_rate, "projection_learning_rate")
        _positive(self.clip_norm, "clip_norm")
        _require(0 <= self.final_share <= 1, "final_share", f"must be in 0..1, is {self.final_share}.")
        _require(0 <= self.warmup_steps < self.steps, "warmup_steps", f"must be in 0..{self.steps - 1}.")
        _require(
            math.isfinite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", "must be zero or positive."
        )


@dataclass(frozen=True)
class TeacherCache:
    """What the teacher says is stored once, and used again by stages, runs and plans with the same teacher.

    Attributes:
        top_k: most probable next tokens that are kept of each position, at 4 bytes each (6 where the vocabulary exceeds
            65,536 tokens). The student learns them, and all others together as one.
        layer_inputs: keep what goes into the converted layers' attention as well, for align; a layer takes
            2 * hidden_size bytes a position in bfloat16.
        folder: None: `distill/teacher-cache` in the run folder; else a path from the recipe's folder, that runs may
            share.
    """

    top_k: int = 64
    layer_inputs: bool = False
    folder: str | None = None

    def __post_init__(self) -> None:
        _require(self.top_k >= 1, "top_k", f"must be at least 1, is {self.top_k}.")
        _require(self.folder is None or bool(self.folder.strip()), "folder", "is empty.")


@dataclass(frozen=True)
class Distill:
    """How the hybrid is trained. Mixers are trained in every stage; `lora` (None: the old weights stay frozen) in
    every stage but align."""

    stages: tuple[Stage, ...]
    lora: Lora | None = None
    teacher_cache: TeacherCache | None = None
    precision: Precision = "auto"
    """Arithmetic of forward and backward; auto: bfloat16 where the device computes it natively. Trained weights and
    optimiser states are float32 either way."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Layers are computed again in the backward pass instead of kept; auto: as many as the GPU's memory demands."""
    share_weights: bool = True
    """Frozen weights that teacher and student have in common exist once; false keeps two models, as sharding over
    processes does."""
    save_every_steps: int = 100
    keep_checkpoints: int = 2
    log_every_steps: int = 1

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "stages", "needs at least one stage.")
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), "stages", f"stage names must differ: {', '.join(names)}.")
        late = [stage.name for stage in self.stages[1:] if stage.calibrate_sequences]
        _require(not late, "stages", f"calibrate_sequences is for the first stage alone, not for {', '.join(late)}.")
        for key in ("save_every_steps", "keep_checkpoints", "log_every_steps"):
            _require(getattr(self, key) >= 1, key, f"must be at least 1, is {getattr(self, key)}.")
        if self.teacher_cache is not None:
            beyond = [stage.name for stage in self.stages if stage.kind != "align" and not _is_cached(stage.objective)]
            demand = "`hidden` must be 0, and `kl` forward at temperature 1"
            _require(
                not beyond, "teacher_cache", f"does not hold what the loss of {', '.join(beyond)} needs: {demand}."
            )


def _is_cached(loss: Loss) -> bool:
    """Whether the most probable tokens are all that a loss asks of the teacher."""
    return loss.hidden == 0 and (loss.kl == 0 or (loss.direction == "forward" and loss.temperature == 1))


@dataclass(frozen=True)
class Export:
    """The exported folder."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    max_shard_bytes: int = 5_000_000_000


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read from, so that later checks can still name file and line.

    Attributes:
        path: the recipe file.
        lines: "file:line" (or "--set ...") by dotted key.
        overrides: the `--set` texts, in order.
    """

    path: Path
    lines: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @property
    def base(self) -> Path:
        """The folder that relative text paths start from."""
        return self.path.parent

    def where(self, key: str) -> str:
        """The place of a dotted key, or of its nearest parent that was written."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines.get(key, str(self.path))


@dataclass(frozen=True)
class Recipe:
    """A whole recipe file.

    Attributes:
        model: the teacher: a folder, a Hub id `org/name@revision`, a `.gguf` file, or `package:NAME`.
        layers: which layer gets which mixer.
        mixers: named settings that `layers` refers to.
        dtype: type of the converted weights; auto: that of the checkpoint (float32 for GGUF).
        origin: where it was read from; None for a recipe made in Python. Not a key of the file.
    """

    model: str
    layers: LayerPlan
    version: int = 1
    mixers: Mapping[str, MixerChoice] = field(default_factory=dict)
    dtype: Precision = "auto"
    seed: int = 0
    data: Data | None = None
    distill: Distill | None = None
    export: Export = field(default_factory=Export)
    evaluate: Evaluate = field(default_factory=Evaluate)
    origin: Origin | None = field(default=None, compare=False, repr=False, metadata={"in_file": False})

    def __post_init__(self) -> None:
        _require(self.version == 1, "version", f"this hybridize reads version 1 recipes, not {self.version}.")
        _require(bool(self.model.strip()), "model", "is empty.")
        if self.distill is None or self.data is None:
            return
        for stage in self.distill.stages:
            if stage.curriculum is not None:  # a fault in it would else be found when the stage begins
                stage.curriculum.doublings(stage.sequence_tokens or self.data.sequence_tokens, stage.name)
