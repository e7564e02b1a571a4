"""The base of the mixers: what every one of them shares, and the one method most of them write.

A mixer takes the place of a decoder layer's attention. The base class does the projections, the q/k norms, the head
split, positions under padding and the cache; `mix` does what makes one mixer different from another.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hybridize.errors import UsageError
from hybridize.families.base import AttentionGeometry, AttentionView
from hybridize.mixers.configs.base import MixerConfig
from hybridize.mixers.parts.documents import document_positions
from hybridize.mixers.parts.slots import make_writable
from hybridize.mixers.parts.snapshot import Snapshot
from hybridize_kernels import rotary

NEW_PARAMETERS = "hz_new"
"""Name of the submodule that holds a mixer's new parameters: LoRA, saving and loading find them by it."""


class Rope:
    """Rotary position embedding for queries and keys [B, T, H, D].

    Args:
        cos, sin: [B or 1, T, R] with R <= D rotated dimensions, as transformers' rotary modules return them.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both rotated, each in its own dtype."""
        return rotary(q, k, self.cos, self.sin)


class MixerState(CacheLayerMixin):
    """Decoding state of one mixer; it is a layer of a transformers cache.

    Every tensor has the batch in dimension 0 and lives in `tensors`: beams, repetition and selection are done here.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, tensors: dict[str, Tensor], minus_one: tuple[str, ...] = ()) -> None:
        """minus_one: tensors that hold -1 where there is nothing; the others hold 0."""
        super().__init__()
        self.tensors = tensors
        self.seen_tokens = 0
        """Columns passed through so far, padding included."""
        self.seen_padding = False
        """A prompt had padding: positions cannot be told without a mask from then on."""
        self.workspace: dict[str, Tensor] = {}
        """Scratch memory of a kernel from one step for the next; it knows nothing of the text."""
        self._minus_one = minus_one
        self._devices = {name: tensor.device for name, tensor in tensors.items()}
        self._shapes = {name: tensor.shape[1:] for name, tensor in tensors.items()}
        self.is_initialized = True

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.tensors[name] = value

    def bytes_per_sequence(self) -> int:
        """Bytes held for one sequence of the batch."""
        return sum(t.numel() * t.element_size() // max(t.shape[0], 1) for t in self.tensors.values())

    def snapshot(self) -> Snapshot:
        """The state as it is, copied; what follows `restore` is bit-equal to what followed it."""
        return Snapshot.of(self.tensors, self.seen_tokens, self.seen_padding)

    def restore(self, saved: Snapshot) -> None:
        """Goes back to it: in place where sizes agree, so that a captured graph goes on, else in new tensors."""
        make_writable(self.tensors)
        for name, x in saved.tensors.items():
            held = self[name]
            self[name] = held.copy_(x) if held.shape == x.shape else x.to(held.device, copy=True)
        self.seen_tokens, self.seen_padding = saved.seen_tokens, saved.seen_padding

    # The transformers cache protocol.

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the state is made whole by the mixer."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UsageError(
            f"{type(self).__name__} belongs to a mixer and cannot store an attention layer's keys.",
            hint="Use a fresh cache for every model.",
        )

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        # In place where the size is fixed: a captured graph goes on with the memory it knows.
        make_writable(self.tensors)
        for name, tensor in self.tensors.items():
            nothing = -1 if name in self._minus_one else 0
            if tensor.shape[1:] == self._shapes[name]:
                tensor.fill_(nothing)
            else:
                self.tensors[name] = tensor.new_full((tensor.shape[0], *self._shapes[name]), nothing)
        self.seen_tokens = 0
        self.seen_padding = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """In place with as many indices as rows, so that a captured graph goes on; else in new tensors."""
        make_writable(self.tensors)
        for name, held in self.tensors.items():
            rows = held.index_select(0, indices.to(held.device))
            self[name] = held.copy_(rows) if rows.shape == held.shape else rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tensors = {name: t.repeat_interleave(repeats, dim=0) for name, t in self.tensors.items()}

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UsageError(
                "the state of a hybrid cannot be rolled back: evicted and summarised tokens are gone.",
                hint="Assisted decoding and prompt lookup need that; to go back, `restore` a `snapshot` of each layer.",
            )

    def offload(self) -> None:
        self.tensors = {name: t.to("cpu", non_blocking=True) for name, t in self.tensors.items()}

    def prefetch(self) -> None:
        self.tensors = {name: t.to(self._devices[name], non_blocking=True) for name, t in self.tensors.items()}


def refuse_packing_with(cache: Any, batch: int) -> None:
    """Raises UsageError where packed documents meet a cache or several rows."""
    if cache is not None:
        raise UsageError(
            "packed documents (cu_seqlens) cannot be read into a cache: it would hold the state of the last alone.",
            hint="Pass use_cache=False, or the documents as rows of a padded batch.",
        )
    if batch != 1:
        raise UsageError(
            f"packed documents (cu_seqlens) lie in one row, not in {batch}.",
            hint="Lay the rows end to end, with their edges among the bounds.",
        )


class Mixer(nn.Module):
    """Base of the mixers.

    A subclass sets `config_class`, builds its new parameters as ONE module in `build_new` (or returns None), and
    writes `mix`, `new_state` and, where the teacher tells more than its projections, `initialise`.

    Args:
        config: the mixer's configuration.
        geometry: sizes of the model.
        layer_index: position in the stack.
        scale: the teacher's factor on q·k.
        q_norm, k_norm: norms over the head, or None.
    """

    config_class: ClassVar[type[MixerConfig]]

    @staticmethod
    def project(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """What linear layers make of one input [B, T, width]; the training form puts a faster one in this place."""
        return tuple(module(x) for module in modules)

    def __init__(
        self,
        config: MixerConfig,
        geometry: AttentionGeometry,
        layer_index: int,
        scale: float,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.geometry = geometry
        self.layer_idx = layer_index
        self.scale = scale
        width = geometry.hidden_size
        query_width = geometry.num_query_heads * geometry.head_size
        key_width = geometry.num_key_heads * geometry.head_size
        q_bias, k_bias, v_bias, o_bias = geometry.projection_bias
        self.q_proj = nn.Linear(width, query_width, bias=q_bias)
        self.k_proj = nn.Linear(width, key_width, bias=k_bias)
        self.v_proj = nn.Linear(width, key_width, bias=v_bias)
        self.o_proj = nn.Linear(query_width, width, bias=o_bias)
        self.q_norm = q_norm
        self.k_norm = k_norm
        new = self.build_new()
        if new is not None:
            self.add_module(NEW_PARAMETERS, new)
        self.auxiliary: dict[str, Tensor] = {}
        """Named auxiliary losses of the last training forward (eviction budget, ...)."""
        self.padded = True
        """Whether `positions` may hold padding, as far as is known without asking the device; set before `mix`."""

    @classmethod
    def from_attention(cls, view: AttentionView, config: MixerConfig) -> Self:
        """Builds the mixer from the teacher's attention: its projections and norms are taken over, not copied, and
        the new parameters are set so that the swapped layer starts close to the teacher."""
        with torch.device("meta"):
            mixer = cls(config, view.geometry, view.layer_index, view.scale, view.q_norm, view.k_norm)
        mixer.q_proj, mixer.k_proj = view.q_proj, view.k_proj
        mixer.v_proj, mixer.o_proj = view.v_proj, view.o_proj
        if mixer.new is not None:
            weight = view.q_proj.weight
            mixer.new.to_empty(device=weight.device)
            mixer.new.to(weight.dtype)
            if not weight.is_meta:
                with torch.no_grad():
                    mixer.initialise_new()
        return mixer

    @property
    def new(self) -> Any:
        """The module of new parameters, or None."""
        return getattr(self, NEW_PARAMETERS, None)

    # What a mixer writes.

    def build_new(self) -> nn.Module | None:
        """The module of new parameters and buffers, uninitialised."""
        return None

    def initialise_new(self) -> None:
        """Sets every new parameter and buffer in place (called on allocated tensors; also by `_init_weights`)."""

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden_states: Tensor,
        rope: Rope,
        state: MixerState | None,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Moves information between positions.

        Args:
            q: [B, T, HQ, D] queries, before RoPE. k, v: [B, T, H, D], k before RoPE.
            hidden_states: [B, T, hidden_size], the layer's input.
            rope: applies the rotary embedding to [B, T, *, D].
            state: None in training; else it is read and written: prefill, append or decode by T.
            positions: [B, T] index of each token among the real tokens of its row, -1 for padding.
            cu_seqlens: [N + 1] int32, the bounds of documents packed into one row, or None. Nothing passes between
                two documents, positions count in each, B is 1, there is no padding and `state` is None.

        Returns:
            [B, T, HQ, D], and named auxiliary losses (scalars), empty outside training.
        """
        raise NotImplementedError

    def new_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MixerState:
        """An empty decoding state whose size is what `config.state_bytes` promises."""
        raise NotImplementedError

    def schedule(self, progress: float, sequence_tokens: int) -> None:
        """Told by the trainer before each step: `progress` in 0..1 of the stage's ramp (1 = final setting)."""

    def schedule_key(self) -> Hashable:
        """What of the schedule a training pass takes from the host; None: more than `schedule` tells."""
        return ()

    def take_observations(self) -> list[Any]:
        """What training passes have told the mixer's controller, if it has one, since its last step; it forgets it."""
        controller = getattr(self.new, "controller", None)
        return [] if controller is None else controller.take_observations()  # type: ignore[no-any-return]

    def give_observations(self, observations: Sequence[Any]) -> None:
        """Tells the controller again what `take_observations` gave."""
        if observations:
            self.new.controller.give_observations(observations)

    def after_step(self) -> None:
        """Told by the trainer after each optimiser step (controllers update here)."""

    def metrics(self) -> dict[str, Tensor | float]:
        """What the trainer logs of this mixer (kept tokens a head, ...), scalars on their device: nobody waits."""
        return {}

    def share(self, first: Mixer) -> None:
        """Takes over the parts that `first`, a mixer of an earlier layer, shares with this one; called where the
        configuration's `shared_over_layers` is not None."""

    # What the base does.

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        token_positions: Tensor | None = None,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """The signature of transformers' attention modules; `attention_mask` is unused (see `token_positions`).

        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: (cos, sin), each [B or 1, T, R].
            cache: a transformers cache, or None in training. past_key_values: its name before transformers 5.24.
            token_positions: [B, T] as in `mix`; None means that nothing is padding.
            cu_seqlens: [N + 1] as in `mix`, on the device of hidden_states; token_positions, if given, count in each.

        Raises:
            UsageError: documents are packed into several rows, or come with a cache.
        """
        cache = past_key_values if cache is None else cache
        batch, num_tokens, _ = hidden_states.shape
        if cu_seqlens is not None:
            refuse_packing_with(cache, batch)
        head_size = self.geometry.head_size
        projected = self.project(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.view(batch, num_tokens, -1, head_size) for x in projected)
        q, k = self.normed(q, k, v)
        state = None if cache is None else self.claim_state(cache, batch, k)
        self.padded = token_positions is not None and cu_seqlens is None
        if token_positions is None and cu_seqlens is not None:
            token_positions = document_positions(cu_seqlens, num_tokens)
        elif token_positions is None:
            first = 0 if state is None else state.seen_tokens
            token_positions = torch.arange(first, first + num_tokens, device=q.device).expand(batch, -1)
        elif state is not None and num_tokens > 1:
            # Asked of many tokens only: the answer costs a wait for the GPU, and a step takes padding as it comes.
            known = getattr(cache, "padded", None)
            self.padded = bool((token_positions < 0).any()) if known is None else known
            state.seen_padding |= self.padded
        assert position_embeddings is not None
        rope = Rope(*position_embeddings)
        out, auxiliary = self.mix(q, k, v, hidden_states, rope, state, token_positions, cu_seqlens)
        self.auxiliary = auxiliary
        if state is not None:
            state.seen_tokens += num_tokens
        return self.project(out.reshape(batch, num_tokens, -1), (self.o_proj,))[0], None

    def normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after their norms, if the model has any, in the dtype of the values.

        Under autocast transformers' norms return fp32, which the kernels do not take together with bf16 values.
        """
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)

    def claim_state(self, cache: Any, batch: int, like: Tensor) -> MixerState:
        """This mixer's layer of the cache, made on first use.

        Raises:
            UsageError: the cache is static, or its layer already holds another model's keys.
        """
        while len(cache.layers) <= self.layer_idx:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[self.layer_idx]
        if isinstance(layer, MixerState):
            return layer
        if layer.is_compileable or getattr(layer, "max_cache_len", None) is not None:
            raise UsageError(
                "a hybrid keeps its own fixed-size state and cannot use a static cache.",
                where=f"layer {self.layer_idx}",
                hint="Leave cache_implementation unset.",
            )
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise UsageError(
                "the cache already holds keys of another model.",
                where=f"layer {self.layer_idx}",
                hint="Use a fresh cache for every model.",
            )
        state = self.new_state(batch, like.device, like.dtype)
        cache.layers[self.layer_idx] = state
        return state

    def extra_repr(self) -> str:
        return f"layer={self.layer_idx}, {self.config}"
