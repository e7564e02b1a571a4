"""Properties: shards join to what was split, a manifest sees any byte, and damage only ever raises HybridizeError."""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridize.checkpoint import (
    check_folder,
    load_state,
    read_config,
    resolve_source,
    save_tensors,
    verify_folder,
    write_manifest,
)
from hybridize.checkpoint.safetensors_writer import split_shards
from hybridize.errors import HybridizeError, VerificationError
from tests.checkpoint.files import SHARDS, matrices, pack, sharded, single

FUZZ_N = int(os.environ.get("HYBRIDIZE_FUZZ_N", "300"))


@given(sizes=st.lists(st.integers(0, 50), max_size=30), limit=st.integers(1, 100))
def test_splitting_keeps_order_and_limit(sizes: list[int], limit: int) -> None:
    named = {f"t{index}": size for index, size in enumerate(sizes)}
    shards = split_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    for shard in shards:
        assert sum(named[name] for name in shard) <= limit or len(shard) == 1
    for left, right in itertools.pairwise(shards):
        assert left
        assert right
        assert sum(named[name] for name in left) + named[right[0]] > limit


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12).filter(lambda n: n != "__metadata__"),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES)),
    max_size=6,
)


@given(plan=TENSORS, limit=st.sampled_from([1, 40, 100, 10**9]))
def test_what_is_written_is_read(plan: dict[str, tuple[list[int], torch.dtype]], limit: int) -> None:
    state = {name: torch.randn(shape).mul(9).to(dtype) for name, (shape, dtype) in plan.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        save_tensors(folder, state, max_shard_bytes=limit)
        source = resolve_source(folder)
        headers = check_folder(source)
        read = load_state(source)
    assert {name: header.shape for name, header in headers.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert read.keys() == state.keys()
    for key, tensor in state.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)


@given(data=st.data())
def test_manifest_sees_any_changed_byte(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = sharded(Path(name) / "model")
        write_manifest(folder, "export")
        verify_folder(folder)
        path = data.draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.name != "manifest.json")))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        with pytest.raises(VerificationError, match=f"changed: {path.name}"):
            verify_folder(folder)


def mutate(content: bytes, generator: random.Random) -> bytes:
    """One to four small damages: bytes changed, removed, repeated, or numbers and brackets replaced."""
    data = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        position = generator.randrange(max(1, len(data)))
        kind = generator.randrange(5)
        if kind == 0 and data:
            data[position] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del data[position : position + generator.randint(1, 20)]
        elif kind == 2:
            data[position:position] = data[position : position + generator.randint(1, 20)]
        elif kind == 3:
            word = generator.choice(
                [b"-1", b"1e999", b"null", b"true", b"9" * 30, b"[", b"{}", b'"', b"\\u0000", b"\xff"]
            )
            data[position : position + len(word)] = word
        else:
            data = data[:position]
    return bytes(data)


def mutate_header(content: bytes, generator: random.Random) -> bytes:
    """Damage the JSON but keep the length field true, so that the faults lie deeper."""
    length = int.from_bytes(content[:8], "little")
    return pack(mutate(content[8 : 8 + length], generator), content[8 + length :])


def test_damaged_files_only_raise_our_errors(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    generator = random.Random(0)
    names = [SHARDS[0], "config.json", "model.safetensors.index.json"]
    intact = {name: (folder / name).read_bytes() for name in names}
    refused = 0
    for number in range(FUZZ_N):
        name = names[number % 3]
        damage = mutate_header if name == SHARDS[0] and number % 2 else mutate
        (folder / name).write_bytes(damage(intact[name], generator))
        try:
            source = resolve_source(folder)
            read_config(source)
            if check_folder(source):
                load_state(source)
        except HybridizeError as error:
            assert error.hint, error  # noqa: PT017
            refused += 1
        (folder / name).write_bytes(intact[name])
    check_folder(resolve_source(folder))
    assert refused > FUZZ_N // 2


def test_damaged_gguf_only_raises_our_errors(tmp_path: Path) -> None:
    from tests.checkpoint.test_source import write_gguf

    path = write_gguf(tmp_path / "m.gguf")
    intact = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(FUZZ_N):
        # Damage the header, which is the first 4 kB of this file; bodies may hold any bytes.
        path.write_bytes(mutate(intact[:4096], generator) + intact[4096:])
        try:
            source = resolve_source(path)
            read_config(source)
            check_folder(source)
        except HybridizeError as error:
            assert error.hint, error  # noqa: PT017
            refused += 1
    assert refused > FUZZ_N // 4


def test_damaged_manifests_only_raise_our_errors(tmp_path: Path) -> None:
    folder = single(tmp_path / "model", matrices())
    write_manifest(folder, "export", {"note": "x"})
    path = folder / "manifest.json"
    intact = path.read_bytes()
    generator = random.Random(0)
    for _ in range(FUZZ_N):
        path.write_bytes(mutate(intact, generator))
        try:
            verify_folder(folder)
        except HybridizeError as error:
            assert error.hint, error  # noqa: PT017
        else:
            # Only damage to what the manifest does not vouch for (its writer, its provenance) may pass.
            files = json.loads(path.read_bytes())["files"]
            assert files == json.loads(intact)["files"]
