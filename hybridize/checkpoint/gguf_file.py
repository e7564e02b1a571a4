"""GGUF files read as checkpoints: configuration, tensor headers and dequantised tensors in transformers' names.

The metadata is parsed here, because plan answers in 2 s and the gguf library spends that on the vocabulary alone; the
library supplies quantisation sizes and dequantisation. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hybridize.checkpoint.files import open_regular
from hybridize.checkpoint.safetensors_header import TensorHeader
from hybridize.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_ENTRIES = 1_000_000
_MAX_ARRAY = 16_000_000
_DAMAGED = "The file is damaged or was not copied whole; download it again."

_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>[a-z_]+)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensor headers of one GGUF file.

    Attributes:
        metadata: keys and values as written; of an array of texts only its length is kept, as an int.
        headers: by transformers' names.
    """

    metadata: dict[str, Any]
    headers: dict[str, TensorHeader]


class _Cursor:
    """Reads little-endian values and raises CheckpointError at the end of the file."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self.file, self.size, self.where = file, size, where

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if 0 <= count <= self.size else b""
        if len(data) != count:
            raise self.fail("The header is truncated.")
        return data

    def scalar(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("A text of the header is not UTF-8.") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.fail(f"The header holds an unknown value type, {kind}.")
        item, count = self.scalar("I"), self.scalar("Q")
        if count > _MAX_ARRAY:
            raise self.fail(f"The header holds an array of {count:,} items.")
        if item == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
            return count
        if item not in _SCALARS:
            raise self.fail(f"The header holds an array of an unknown type, {item}.")
        width = struct.calcsize("<" + _SCALARS[item])
        return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * width)))

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=self.where, hint=_DAMAGED)


def read_gguf(folder: Path, name: str) -> GgufFile:
    """Parse the header of ``folder/name``; tensor bodies are not read.

    Raises:
        CheckpointError: not GGUF, damaged, split over files, or with tensors this project has no name for.
    """
    file, size = open_regular(folder, name)
    where = str(folder / name)
    with file:
        cursor = _Cursor(file, size, where)
        if file.read(4) != b"GGUF":
            raise cursor.fail("This is not a GGUF file.")
        version, num_tensors, num_keys = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
        if version not in (2, 3) or num_tensors > _MAX_ENTRIES or num_keys > _MAX_ENTRIES:
            raise cursor.fail(f"GGUF version {version} with {num_tensors:,} tensors is not readable.")
        metadata = {cursor.text(): cursor.value(cursor.scalar("I")) for _ in range(num_keys)}
        if int(metadata.get("split.count", 1) or 1) > 1:
            hint = "Merge the parts first (llama-gguf-split --merge)."
            raise CheckpointError("The model is split over several GGUF files.", where=where, hint=hint)
        headers = _read_tensor_headers(cursor, name, num_tensors, metadata)
    return GgufFile(metadata, headers)


def _read_tensor_headers(
    cursor: _Cursor, file_name: str, num_tensors: int, metadata: dict[str, Any]
) -> dict[str, TensorHeader]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    raw: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(num_tensors):
        name, num_dims = cursor.text(), cursor.scalar("I")
        if num_dims > 4:
            raise cursor.fail(f"Tensor {name[:200]!r} has {num_dims} dimensions.")
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_dims)]))
        raw.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"The alignment {alignment!r} is not a power of two.")
    start = -(-cursor.file.tell() // alignment) * alignment
    headers: dict[str, TensorHeader] = {}
    for name, shape, kind, offset in raw:
        try:
            quantisation = GGMLQuantizationType(kind)
        except ValueError:
            raise cursor.fail(f"Tensor {name[:200]!r} has the unknown type {kind}.") from None
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
        count = math.prod(shape)
        if not shape or shape[-1] % block or start + offset + count // block * block_bytes > cursor.size:
            raise cursor.fail(f"Tensor {name[:200]!r} of shape {shape} does not fit into the file.")
        target = _transformers_name(name, cursor.where)
        if target in headers:
            raise cursor.fail(f"Tensor {name[:200]!r} is there twice.")
        headers[target] = TensorHeader(
            target, quantisation.name, shape, file_name, count // block * block_bytes, start + offset
        )
    return headers


def _transformers_name(name: str, where: str) -> str:
    match = _TENSOR.fullmatch(name)
    if match and match["layer"] is None and match["part"] in _TOP_NAMES:
        return f"{_TOP_NAMES[match['part']]}.{match['kind']}"
    if match and match["layer"] is not None and match["part"] in _LAYER_NAMES:
        return f"model.layers.{int(match['layer'])}.{_LAYER_NAMES[match['part']]}.{match['kind']}"
    raise CheckpointError(
        f"The GGUF tensor {name[:200]!r} belongs to no architecture that is read from GGUF.",
        where=where,
        hint="Use the model's safetensors checkpoint; GGUF is read for llama, mistral, qwen2 and qwen3.",
    )


def gguf_config(file: GgufFile, *, where: str) -> dict[str, Any]:
    """The configuration in config.json's words, from GGUF metadata.

    Raises:
        CheckpointError: an architecture, RoPE scaling or missing key that would give a wrong model.
    """
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ("llama", "mistral", "qwen2", "qwen3"):
        what = f"The GGUF architecture {str(architecture)[:60]!r} is not read."
        hint = "GGUF is read for llama, mistral, qwen2 and qwen3; use the safetensors checkpoint."
        raise CheckpointError(what, where=where, hint=hint)

    def key(name: str, kind: type = int, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, kind)):
            what = f"The GGUF key {architecture}.{name} is missing or not one number."
            raise CheckpointError(what, where=where, hint=_DAMAGED)
        return value

    if metadata.get(f"{architecture}.rope.scaling.type", "none") != "none":
        hint = "Use the model's safetensors checkpoint, whose config.json states the scaling in full."
        raise CheckpointError("The GGUF file scales RoPE, which is not read from GGUF.", where=where, hint=hint)
    heads, hidden = key("attention.head_count"), key("embedding_length")
    if heads < 1 or key("block_count") < 1:
        raise CheckpointError("The GGUF file states no heads or no layers.", where=where, hint=_DAMAGED)
    is_mistral = architecture == "mistral" or "mistral" in str(metadata.get("general.name", "")).lower()
    model_type = "mistral" if is_mistral else architecture
    config: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", default=heads),
        "head_dim": key("attention.key_length", default=hidden // heads),
        "vocab_size": key("vocab_size", default=metadata.get("tokenizer.ggml.tokens")),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon", float)),
        "rope_parameters": {"rope_theta": float(key("rope.freq_base", float, 10000.0)), "rope_type": "default"},
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in file.headers,
        "dtype": "float32",
        "use_cache": True,
    }
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if model_type == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in file.headers
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in file.headers
    if model_type == "mistral":
        config["sliding_window"] = metadata.get(f"{architecture}.attention.sliding_window")
    for name, word in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if isinstance(metadata.get(f"tokenizer.ggml.{name}_token_id"), int):
            config[f"{word}_token_id"] = metadata[f"tokenizer.ggml.{name}_token_id"]
    return config


def load_gguf_tensors(folder: Path, file: GgufFile, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield dequantised fp32 tensors, in transformers' row order, one at a time."""
    import numpy
    import torch
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    architecture = file.metadata.get("general.architecture")
    heads = int(file.metadata[f"{architecture}.attention.head_count"])
    key_heads = int(file.metadata.get(f"{architecture}.attention.head_count_kv", heads))
    for name in names:
        header = file.headers[name]
        handle, _ = open_regular(folder, header.file)
        with handle:
            handle.seek(header.offset_bytes)
            raw = numpy.frombuffer(handle.read(header.size_bytes), dtype=numpy.uint8)
        try:
            rows = raw.reshape(*header.shape[:-1], -1)
            values = dequantize(rows, GGMLQuantizationType[header.dtype]).astype(numpy.float32, copy=False)
        except (NotImplementedError, ValueError, KeyError) as error:
            what = f"Tensor {name!r} of type {header.dtype} cannot be dequantised ({error})."
            hint = "Use a file quantised to Q8_0, Q4_1, a K quant, F16 or BF16."
            raise CheckpointError(what, where=str(folder / header.file), hint=hint) from None
        values = values.reshape(header.shape)
        # llama.cpp interleaves the two RoPE halves of each head in the llama architecture; undo it.
        if architecture in ("llama", "mistral") and ".self_attn.q_proj." in name:
            values = _halves_apart(values, heads)
        elif architecture in ("llama", "mistral") and ".self_attn.k_proj." in name:
            values = _halves_apart(values, key_heads)
        yield name, torch.from_numpy(numpy.array(values, order="C"))


def _halves_apart(values: Any, heads: int) -> Any:
    """[H * D, ...] with each head's rows as (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...)."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
