"""Hostile names and paths, and files that want to run code (goal table, groups II and III)."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from hybridize.checkpoint import (
    check_folder,
    read_config,
    require_usable_weights,
    resolve_source,
)
from tests.checkpoint.files import (
    CONFIG,
    SHARDS,
    assert_refused,
    matrices,
    sharded,
    single,
    true_map,
)

FILE = "model.safetensors"


def check(folder: Path) -> None:
    check_folder(resolve_source(folder))


HOSTILE_NAMES = {
    "parent": "../x.safetensors",
    "parent-inside": "a/../../x.safetensors",
    "absolute": "/etc/x.safetensors",
    "drive": "C:\\x.safetensors",
    "drive-relative": "C:x.safetensors",
    "host": "\\\\host\\x.safetensors",
    "backslash-parent": "..\\x.safetensors",
    "nul": "x\0.safetensors",
    "newline": "x\n.safetensors",
    "sub-folder": "a/x.safetensors",
    "dots": "..",
    "empty": "",
    "too-long": "x" * 5000 + ".safetensors",
    "number": 7,
    "list": ["x.safetensors"],
    "null": None,
    "points-at-bin": "pytorch_model.bin",
}


@pytest.mark.parametrize("case", HOSTILE_NAMES)
def test_hostile_name_in_the_index(case: str, tmp_path: Path) -> None:
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(matrices(("stolen",)))
    folder = sharded(tmp_path / "model", true_map() | {"stolen": HOSTILE_NAMES[case]})
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert_refused(folder, lambda: check(folder), "model.safetensors.index.json")


def test_symlinked_shard_leaving_the_folder(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    (folder / SHARDS[1]).rename(outside)
    (folder / SHARDS[1]).symlink_to(outside)
    assert_refused(folder, lambda: check(folder), SHARDS[1], "leaves")


def test_symlinked_config_leaving_the_folder(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    (folder / "config.json").rename(tmp_path / "secret.json")
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    assert_refused(folder, lambda: read_config(resolve_source(folder)), "config.json", "leaves")


def test_symlink_inside_the_folder_is_followed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / "data").mkdir()
    (folder / SHARDS[1]).rename(folder / "data" / "blob")
    (folder / SHARDS[1]).symlink_to(Path("data") / "blob")
    check(folder)


@pytest.mark.parametrize("blob", ["models--org--name/blobs/abc", "blobs/ab/abcd"], ids=["repository", "shared-store"])
def test_links_of_the_hub_cache_are_followed(blob: str, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    folder = single(snapshot)
    (tmp_path / blob).parent.mkdir(parents=True)
    (folder / FILE).rename(tmp_path / blob)
    (folder / FILE).symlink_to(os.path.relpath(tmp_path / blob, folder))
    check(folder)
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert_refused(folder, lambda: check(folder), "config.json", "leaves")


def test_symlink_loop(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to(SHARDS[1])
    assert_refused(folder, lambda: check(folder), SHARDS[1])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "model.safetensors.index.json"])
def test_fifo_does_not_hang(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert_refused(folder, lambda: check(folder), name, "regular file")


def test_folder_as_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).mkdir()
    assert_refused(folder, lambda: check(folder), SHARDS[1], "regular file")


def test_device_as_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("/dev/zero")
    assert_refused(folder, lambda: check(folder), SHARDS[1])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.q_proj.weight", "{}"], ids=["by-size", "by-count"])
def test_index_of_a_million_entries_is_refused(name: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    file = SHARDS[0] if name != "{}" else "m.safetensors"
    lines = ",".join(f'"{name.format(number)}":"{file}"' for number in range(10**6))
    (folder / "model.safetensors.index.json").write_text('{"weight_map":{' + lines + "}}")
    assert_refused(folder, lambda: check(folder), "model.safetensors.index.json")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".ckpt"])
def test_pickle_only_is_refused_with_advice(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / f"pytorch_model{suffix}").write_bytes(b"not read")
    assert_refused(folder, lambda: check(folder), f"pytorch_model{suffix}", "safetensors")
    file = folder / f"pytorch_model{suffix}"
    assert_refused(folder, lambda: resolve_source(file), f"pytorch_model{suffix}", "safetensors")


def test_zip_renamed_to_safetensors(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    with zipfile.ZipFile(folder / FILE, "w") as archive:
        archive.writestr("archive/data.pkl", b"not read")
    assert_refused(folder, lambda: check(folder), FILE, "zip")


def test_code_of_the_checkpoint_is_never_imported(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    folder = single(tmp_path / "model", config=CONFIG | {"auto_map": auto_map})
    canary = tmp_path / "canary"
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py"):
        (folder / name).write_text(f"open({str(canary)!r}, 'w').close()\n")
    source = resolve_source(folder)
    check_folder(source)
    assert read_config(source)["auto_map"] == auto_map
    require_usable_weights(source)
    assert not canary.exists()


def test_tokenizer_with_custom_code_is_refused(tmp_path: Path) -> None:
    folder = single(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}))
    assert_refused(folder, lambda: check(folder), "tokenizer_config.json", "never run")
