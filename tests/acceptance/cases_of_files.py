"""Groups I to III of the goal table: bad files, hostile names, code that must not run."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

from tests.acceptance.case import RUN, SHARDED, TEACHER, Case
from tests.acceptance.project import (
    FILE,
    INDEX,
    NORM,
    QUERY,
    SHARDS,
    Break,
    both,
    change,
    header,
    index_names,
    link,
    no_break,
    pack,
    patch_index,
    patch_json,
    pipe,
    recipe,
    remove,
    split,
    tensors,
    write,
)


def bad_file(id: str, content: bytes, *says: str) -> Case:
    return Case(id, write(f"teacher/{FILE}", content), TEACHER, 4, (FILE, *says))


def bad_bytes(id: str, edit: Any, *says: str) -> Case:
    return Case(id, change(f"teacher/{FILE}", edit), TEACHER, 4, (FILE, *says))


def bad_header(id: str, edit: Any, *says: str) -> Case:
    return Case(id, header(edit), TEACHER, 4, (FILE, *says))


def bad_index(id: str, name: object, *says: str) -> Case:
    return Case(id, index_names(name), SHARDED, 4, (INDEX, *says))


def bad_config(id: str, changes: dict[str, Any], *says: str) -> Case:
    return Case(id, patch_json("teacher/config.json", changes), TEACHER, 4, says)


def overlap(entries: dict[str, Any]) -> None:
    """The last tensor begins where the one before it does."""
    *_, before, last = sorted(
        (entry for name, entry in entries.items() if name != "__metadata__"), key=lambda entry: entry["data_offsets"]
    )
    begin, end = last["data_offsets"]
    back = begin - before["data_offsets"][0]
    last["data_offsets"] = [begin - back, end - back]


def zeroed(data: bytes) -> bytes:
    entries, body = split(data)
    return pack(entries, bytes(len(body)))


def zip_file(project: Path) -> None:
    with zipfile.ZipFile(project / "teacher" / FILE, "w") as archive:
        archive.writestr("archive/data.pkl", b"not read")


def only_pickle(suffix: str) -> Break:
    return both(remove(f"teacher/{FILE}"), write(f"teacher/pytorch_model{suffix}", b"\x80\x04not read"))


def as_half(label: str) -> Break:
    """The teacher in 16 bits, with a label of the same size that is wrong."""
    import torch

    def halve(found: dict[str, Any]) -> None:
        found.update({name: tensor.to(torch.bfloat16) for name, tensor in found.items()})

    def relabel(entries: dict[str, Any]) -> None:
        for name, entry in entries.items():
            if name != "__metadata__":
                entry["dtype"] = label

    return both(tensors(halve), header(relabel), patch_json("teacher/config.json", {"dtype": "bfloat16"}))


def leave_folder(project: Path) -> None:
    shutil.move(project / "sharded" / SHARDS[1], project / "outside.safetensors")
    (project / "sharded" / SHARDS[1]).symlink_to(project / "outside.safetensors")


def million_entries(project: Path) -> None:
    entries = ",".join(f'"{number}":"m.safetensors"' for number in range(10**6))
    (project / "sharded" / INDEX).write_text('{"weight_map":{' + entries + "}}")


I_FILES = [
    bad_file("I-empty-file", b"", "empty"),
    bad_file("I-seven-bytes", b"1234567", "7 bytes"),
    bad_bytes("I-truncated-header", lambda data: data[:100], "truncated"),
    bad_bytes("I-truncated-body", lambda data: data[:-1], "truncated"),
    bad_bytes("I-trailing-bytes", lambda data: data + b"xx", "2 bytes trail"),
    bad_file("I-header-length-2-63", pack({}, length=2**63), "claims"),
    bad_file("I-header-not-utf8", pack(b'{"\xff\xfe": 1}'), "UTF-8"),
    bad_file("I-header-not-json", pack(b'{"a": '), "JSON"),
    bad_header("I-overlap", overlap, "overlaps"),
    bad_header("I-shape-offset-mismatch", lambda entries: entries[NORM].update(shape=[25]), NORM),
    bad_header("I-overflow", lambda entries: entries[NORM].update(shape=[2**40, 2**40]), NORM, "overflow"),
    bad_header("I-unknown-dtype", lambda entries: entries[NORM].update(dtype="F33"), NORM, "F33"),
    bad_file("I-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    bad_file("I-html-page", b"<!DOCTYPE html><html><body>403</body></html>", "HTML"),
    Case("I-zeroed-body", change(f"teacher/{FILE}", zeroed), TEACHER, 4, ("teacher", "matrices are zero")),
    Case("I-dtype-relabelled", as_half("F16"), TEACHER, 4, (FILE, "bfloat16", "F16")),
    Case("I-missing-shard", remove(f"sharded/{SHARDS[1]}"), SHARDED, 4, (SHARDS[1], "missing")),
    Case(
        "I-extra-shard",
        write("sharded/model-00003-of-00003.safetensors", pack({})),
        SHARDED,
        4,
        ("model-00003-of-00003.safetensors", "not listed"),
    ),
    bad_index("I-index-names-absent-tensor", SHARDS[0], "stolen"),
    Case(
        "I-unlisted-tensor", patch_index(lambda names: names.pop(NORM)), SHARDED, 4, (INDEX, NORM, "not in the index")
    ),
    Case(
        "I-duplicate-tensor",
        lambda project: shutil.copy(project / "sharded" / SHARDS[0], project / "sharded" / SHARDS[1]),
        SHARDED,
        4,
        SHARDS,
    ),
    bad_config("I-wrong-shape", {"hidden_size": 32}, "teacher", "of the wrong shape", "expected"),
    Case("I-missing-layer", tensors(lambda found: found.pop(QUERY)), TEACHER, 4, ("1 missing", QUERY)),
    Case(
        "I-unexpected-tensor", tensors(lambda found: found.update(x=found[NORM].clone())), TEACHER, 4, ("1 unexpected",)
    ),
    Case("I-no-config", remove("teacher/config.json"), TEACHER, 4, ("config.json", "missing")),
    Case("I-config-not-json", write("teacher/config.json", "{"), TEACHER, 4, ("config.json", "JSON")),
    bad_config("I-unknown-family", {"model_type": "gpt2"}, "gpt2", "llama, qwen2, qwen3, mistral"),
    bad_config("I-model-type-is-no-text", {"model_type": 7}, "config.json", "model_type"),
    bad_config("I-head-count-is-a-text", {"num_attention_heads": "four"}, "config.json"),
    bad_config("I-negative-layers", {"num_hidden_layers": -1}, "config.json", "-1 layers"),
    bad_config("I-hybrid-already", {"hybridize": {"layers": []}}, "hybrid already"),
    Case("I-no-weights-in-verify", remove(f"teacher/{FILE}"), ("verify", "{in}/teacher"), 4, ("no weights",)),
    Case(
        "I-gguf-cut-off",
        write("cut.gguf", b"GGUF\x03"),
        (*TEACHER[:3], "{in}/cut.gguf", *TEACHER[4:]),
        4,
        ("cut.gguf",),
    ),
    Case("I-no-such-model", no_break, (*TEACHER[:3], "{in}/none", *TEACHER[4:]), 4, ("none", "no checkpoint")),
    Case(
        "I-tokenizer-missing",
        both(*(remove(f"teacher/tokenizer{end}.json") for end in ("", "_config"))),
        TEACHER,
        4,
        ("tokenizer",),
    ),
    Case("I-tokenizer-damaged", write("teacher/tokenizer.json", "{"), TEACHER, 4, ("tokenizer",)),
]

II_NAMES = [
    bad_index("II-parent", "../x.safetensors", "does not stay"),
    bad_index("II-parent-inside", "a/../../x.safetensors", "does not stay"),
    bad_index("II-absolute", "/etc/x.safetensors", "does not stay"),
    bad_index("II-drive", "C:\\x.safetensors", "does not stay"),
    bad_index("II-host", "\\\\host\\x.safetensors", "does not stay"),
    bad_index("II-backslash-parent", "..\\x.safetensors", "does not stay"),
    bad_index("II-nul", "x\0.safetensors", "does not stay"),
    bad_index("II-newline", "x\n.safetensors", "does not stay"),
    bad_index("II-number", 7, "not a text"),
    Case("II-link-leaves", leave_folder, SHARDED, 4, (SHARDS[1], "leaves")),
    Case("II-link-loop", link(f"sharded/{SHARDS[1]}", SHARDS[1]), SHARDED, 4, (SHARDS[1],)),
    Case("II-pipe-as-shard", pipe(f"sharded/{SHARDS[1]}"), SHARDED, 4, (SHARDS[1], "regular file")),
    Case("II-pipe-as-file", pipe(f"teacher/{FILE}"), TEACHER, 4, (FILE, "regular file")),
    Case("II-pipe-as-config", pipe("teacher/config.json"), TEACHER, 4, ("config.json", "regular file")),
    Case("II-pipe-as-tokenizer", pipe("teacher/tokenizer.json"), TEACHER, 4, ("tokenizer.json", "regular file")),
    Case("II-pipe-as-recipe", pipe("recipe.yaml"), TEACHER, 3, ("recipe.yaml",)),
    Case("II-device-as-shard", link(f"sharded/{SHARDS[1]}", "/dev/zero"), SHARDED, 4, (SHARDS[1],)),
    Case("II-million-entries", million_entries, SHARDED, 4, (INDEX, "1,000,000")),
    Case("II-pipe-as-text", both(recipe("text/*.txt", "text/0.txt"), pipe("text/0.txt")), RUN, 3, ("text/0.txt",)),
]

CODE = "import pathlib\npathlib.Path({canary!r}).touch()\n"


def plant(name: str) -> Break:
    """Python code that leaves a canary when it is run."""
    return lambda project: (project / name).write_text(CODE.format(canary=str(project / "canary")))


III_CODE = [
    Case("III-bin-only", only_pickle(".bin"), TEACHER, 4, ("pytorch_model.bin", "safetensors")),
    Case("III-pt-only", only_pickle(".pt"), TEACHER, 4, ("pytorch_model.pt", "safetensors")),
    Case("III-pkl-only", only_pickle(".pkl"), TEACHER, 4, ("pytorch_model.pkl", "safetensors")),
    Case(
        "III-pickle-file-named",
        only_pickle(".bin"),
        (*TEACHER[:3], "{in}/teacher/pytorch_model.bin", *TEACHER[4:]),
        4,
        ("pytorch_model.bin", "never read"),
    ),
    bad_index("III-index-names-bin", "pytorch_model.bin", "not a .safetensors file"),
    Case("III-zip-renamed", zip_file, TEACHER, 4, (FILE, "zip")),
    Case(
        "III-tokenizer-code",
        both(
            plant("teacher/tok.py"),
            patch_json("teacher/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tok.Tok", None]}}),
        ),
        TEACHER,
        4,
        ("tokenizer_config.json", "never run"),
    ),
    Case(
        "III-model-code",
        both(
            plant("teacher/modeling_x.py"),
            patch_json("teacher/config.json", {"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.Config"}}),
        ),
        TEACHER,
        4,
        ("'x' is not supported",),
    ),
    Case(
        "III-yaml-tag",
        recipe("model: teacher", "model: !!python/object/apply:os.system [ls]"),
        TEACHER,
        3,
        ("recipe.yaml:1", "is not allowed"),
    ),
]


CASES = [*I_FILES, *II_NAMES, *III_CODE]
