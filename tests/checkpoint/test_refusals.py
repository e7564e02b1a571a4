"""Bad files: damaged, mixed up, relabelled or incomplete checkpoints are refused by name (goal table, group I)."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from hybridize.checkpoint import (
    check_folder,
    check_tensors,
    load_state,
    read_config,
    require_usable_weights,
    resolve_source,
    tensor_headers,
    verify_folder,
    write_manifest,
)
from hybridize.errors import CheckpointError, NumbersError, VerificationError
from tests.checkpoint.files import (
    CONFIG,
    NAMES,
    SHARDS,
    assert_refused,
    entry,
    matrices,
    pack,
    sharded,
    single,
    true_map,
    write_index,
)

FILE = "model.safetensors"
GOOD = matrices()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 538090408\n"
PAIR = {"a": entry(0, 16, [2, 2]), "b": entry(16, 32, [2, 2])}


def check(folder: Path) -> None:
    check_folder(resolve_source(folder))


# Content of model.safetensors, and what the message must say.
BAD_FILES = {
    "empty": (b"", "empty"),
    "seven-bytes": (b"1234567", "7 bytes"),
    "truncated-header": (GOOD[:40], "truncated"),
    "truncated-body": (GOOD[:-1], "truncated"),
    "trailing-bytes": (GOOD + b"x", "1 bytes trail"),
    "length-2-63": (pack({}, length=2**63), "claims"),
    "length-2-64": (pack({}, length=2**64 - 1), "claims"),
    "not-utf8": (pack(b'{"\xff\xfe": 1}'), "UTF-8"),
    "not-json": (pack(b'{"a": '), "JSON"),
    "not-an-object": (pack(b"[1, 2]"), "begin with"),
    "nested-too-deeply": (pack(b'{"a":' + b"[" * 200_000), "nested"),
    "duplicate-key": (pack(b'{"a": {}, "a": {}}'), "twice"),
    "overlap": (pack(PAIR | {"b": entry(8, 24, [2, 2])}, bytes(24)), "'b' overlaps tensor 'a'"),
    "gap": (pack(PAIR | {"b": entry(20, 36, [2, 2])}, bytes(36)), "'b' leaves a gap"),
    "shape-mismatch": (pack({"a": entry(0, 16, [2, 3])}, bytes(16)), "'a'"),
    "offsets-reversed": (pack({"a": entry(16, 0, [2, 2])}, bytes(16)), "'a'"),
    "overflow": (pack({"a": entry(0, 16, [2**40, 2**40])}, bytes(16)), "overflow"),
    "negative-size": (pack({"a": entry(0, 16, [-2, -2])}, bytes(16)), "'a'"),
    "boolean-size": (pack({"a": entry(0, 4, [True])}, bytes(4)), "'a'"),
    "unknown-dtype": (pack({"a": entry(0, 16, [2, 2], "F33")}, bytes(16)), "F33"),
    "entry-not-a-map": (pack({"a": 7}), "'a'"),
    "metadata-not-texts": (pack({"__metadata__": {"format": 1}}), "__metadata__"),
    "lfs-pointer": (LFS, "git lfs pull"),
    "html-page": (b"<!DOCTYPE html><html><body>403</body></html>", "HTML"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, mention = BAD_FILES[case]
    folder = single(tmp_path / "model", content)
    assert_refused(folder, lambda: check(folder), FILE, mention)


def test_good_folders_are_read(tmp_path: Path) -> None:
    assert list(check_folder(resolve_source(single(tmp_path / "one")))) == list(NAMES)
    headers = check_folder(resolve_source(sharded(tmp_path / "two")))
    assert {name: header.file for name, header in headers.items()} == true_map()


def test_bit_flip_is_found_by_the_manifest(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    write_manifest(folder, "converted")
    content = bytearray((folder / FILE).read_bytes())
    content[-3] ^= 1
    (folder / FILE).write_bytes(content)
    check(folder)  # nothing but the hash can tell
    assert_refused(folder, lambda: require_usable_weights(resolve_source(folder)), FILE)
    assert_refused(folder, lambda: verify_folder(folder), FILE, "changed", kind=VerificationError)


def test_zeroed_body_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path / "model", GOOD[:-64] + bytes(64))
    assert_refused(folder, lambda: require_usable_weights(resolve_source(folder)), NAMES[0], "zero")


def test_weights_in_memory_are_judged_like_files(tmp_path: Path) -> None:
    source = resolve_source(single(tmp_path / "model"))
    state = load_state(source)
    assert require_usable_weights(source, state.items()) == require_usable_weights(source)
    state[NAMES[1]][0, 0] = float("nan")
    with pytest.raises(NumbersError, match=NAMES[1]):
        require_usable_weights(source, state.items())
    for tensor in state.values():
        tensor.zero_()
    with pytest.raises(CheckpointError, match="4 of 4 matrices are zero"):
        require_usable_weights(source, state.items())


def test_one_zero_matrix_is_a_warning(tmp_path: Path) -> None:
    folder = single(tmp_path / "model", GOOD[:-16] + bytes(16))
    (warning,) = require_usable_weights(resolve_source(folder)).warnings
    assert NAMES[3] in warning


@pytest.mark.parametrize("value", [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"], ids=["nan", "inf"])
def test_not_finite_weight_is_named(value: bytes, tmp_path: Path) -> None:
    folder = single(tmp_path / "model", GOOD[:-4] + value)
    assert_refused(folder, lambda: require_usable_weights(resolve_source(folder)), NAMES[3], kind=NumbersError)
    write_manifest(folder, "export")
    assert_refused(folder, lambda: verify_folder(folder), NAMES[3], kind=VerificationError)


@pytest.mark.parametrize(("stated", "label"), [("float16", "BF16"), ("bfloat16", "F16")])
def test_relabelled_dtype_is_refused(stated: str, label: str, tmp_path: Path) -> None:
    content = pack({"a": entry(0, 8, [2, 2], label)}, bytes(8))
    folder = single(tmp_path / "model", content, CONFIG | {"dtype": stated})
    assert_refused(folder, lambda: check(folder), FILE, stated, label, "a")


def test_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / SHARDS[1]).unlink()
    assert_refused(folder, lambda: check(folder), SHARDS[1], "missing")


def test_extra_unlisted_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "model-00003-of-00003.safetensors").write_bytes(matrices(("other",)))
    assert_refused(folder, lambda: check(folder), "model-00003-of-00003.safetensors", "not listed")


def test_single_file_beside_an_index(tmp_path: Path) -> None:
    folder = single(sharded(tmp_path / "model"))
    assert_refused(folder, lambda: check(folder), FILE, "not listed")


def test_shard_beside_a_single_file(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    (folder / SHARDS[0]).write_bytes(matrices(("other",)))
    assert_refused(folder, lambda: check(folder), SHARDS[0])


def test_shards_without_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    assert_refused(folder, lambda: check(folder), "index")


def test_tensor_in_index_not_in_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", true_map() | {"model.layers.2.a.weight": SHARDS[0]})
    assert_refused(folder, lambda: check(folder), "model.layers.2.a.weight", "index")


def test_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", true_map() | {NAMES[0]: SHARDS[1]})
    assert_refused(folder, lambda: check(folder), NAMES[0], "index")


def test_tensor_in_shard_not_in_index(tmp_path: Path) -> None:
    weight_map = true_map()
    del weight_map[NAMES[1]]
    folder = sharded(tmp_path / "model", weight_map)
    assert_refused(folder, lambda: check(folder), NAMES[1], "not in the index")


def test_duplicate_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / SHARDS[1]).write_bytes(matrices((*NAMES[2:], NAMES[0])))
    assert_refused(folder, lambda: check(folder), NAMES[0], SHARDS[0], SHARDS[1])


EXPECTED = dict.fromkeys(NAMES, (2, 2))


@pytest.mark.parametrize(
    ("expected", "mentions"),
    [
        (EXPECTED | {NAMES[1]: (2, 3)}, (NAMES[1], "[2, 2]", "[2, 3]")),
        (EXPECTED | {"model.layers.2.a.weight": (2, 2)}, ("1 missing", "model.layers.2.a.weight")),
        (dict.fromkeys(NAMES[1:], (2, 2)), ("1 unexpected", NAMES[0])),
    ],
    ids=["wrong-shape", "missing-layer", "unexpected"],
)
def test_tensors_that_do_not_fit_the_config(
    expected: dict[str, tuple[int, ...]], mentions: tuple[str, ...], tmp_path: Path
) -> None:
    folder = single(tmp_path / "model")
    headers = tensor_headers(resolve_source(folder))
    assert_refused(folder, lambda: check_tensors(headers, expected, where=str(folder)), *mentions)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = single(tmp_path / "model", pack({"a": entry(0, 4, [2, 2], "I8")}, bytes(4)))
    headers = tensor_headers(resolve_source(folder))
    assert_refused(folder, lambda: check_tensors(headers, {"a": (2, 2)}, where=str(folder)), "a is I8", "unquantised")


def test_long_lists_of_tensors_are_cut(tmp_path: Path) -> None:
    expected = {f"layer.{index:03d}": (1,) for index in range(100)}
    with pytest.raises(CheckpointError, match=r"100 missing: layer.000.*layer.007 and 92 more") as caught:
        check_tensors({}, expected, where="model")
    assert "layer.008" not in str(caught.value)


def test_tied_head_may_be_absent(tmp_path: Path) -> None:
    headers = tensor_headers(resolve_source(single(tmp_path / "model")))
    expected = EXPECTED | {"lm_head.weight": (2, 2)}
    check_tensors(headers, expected, optional=("lm_head.weight",))
    with pytest.raises(CheckpointError, match="lm_head"):
        check_tensors(headers, expected)


def test_tensors_that_nobody_reads_may_be_allowed() -> None:
    from hybridize.checkpoint import TensorHeader

    headers = {"l.rotary_emb.inv_freq": TensorHeader("l.rotary_emb.inv_freq", "F32", (4,), FILE, 16, 0)}
    check_tensors(headers, {}, extra_allowed=(".rotary_emb.inv_freq",))


BAD_CONFIGS = {
    "not-json": "{",
    "not-an-object": "[]",
    "no-model-type": "{}",
    "duplicate-key": '{"model_type": "llama", "model_type": "qwen2"}',
    "huge-number": '{"model_type": "llama", "n": ' + "9" * 10_000 + "}",
    "nested": '{"model_type":' + "[" * 100_000,
    "too-large": '{"model_type": "' + "x" * 9_000_000 + '"}',
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case: str, tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    (folder / "config.json").write_text(BAD_CONFIGS[case])
    assert_refused(folder, lambda: read_config(resolve_source(folder)), "config.json")


def test_no_config(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    (folder / "config.json").unlink()
    assert_refused(folder, lambda: check(folder), "config.json", "missing")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"], ids=["null", "list", "empty", "text"])
def test_index_without_map(weight_map: object, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    write_index(folder, weight_map)  # type: ignore[arg-type]
    assert_refused(folder, lambda: check(folder), "weight_map")


def test_hybrid_without_manifest_is_incomplete(tmp_path: Path) -> None:
    folder = single(tmp_path / "model", config=CONFIG | {"hybridize": {"layers": []}})
    assert_refused(folder, lambda: check(folder), "manifest.json")
    check_folder(resolve_source(folder), complete=False)
    write_manifest(folder, "converted")
    check(folder)
