"""From folders to results.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridize.cli.output import Output
from hybridize.cli.talk import Talker, Talking
from hybridize.distillation.run import use_bfloat16
from hybridize.errors import ResourceError, UsageError
from hybridize.evaluation import runner
from hybridize.evaluation.device import pick_dtype
from hybridize.evaluation.provenance import without_home
from hybridize.evaluation.results import write_results
from hybridize.evaluation.runner import evaluate
from hybridize.model.precision import computes_bfloat16
from hybridize.recipe.documents import Document
from hybridize.recipe.probes import AgreementProbe, Evaluate, PerplexityProbe, SamplesProbe
from hybridize.recipe.schema import Data
from hybridize.recipe.sources import TextSource
from tests.tiny import tiny_teacher

SMALL = Evaluate(
    context_tokens=1024,
    precision="float32",
    perplexity=PerplexityProbe(context_tokens=64, max_windows=1),
    agreement=AgreementProbe(context_tokens=64, max_windows=1),
    recall=None,
    samples=SamplesProbe(prompts=("the old",), new_tokens=3),
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, teacher: Any, other: Any, tokenizer: Any) -> Path:
    top = tmp_path_factory.mktemp("models")
    for name, model in (("teacher", teacher), ("student", other)):
        model.save_pretrained(top / name)
        tokenizer.save_pretrained(top / name)
    return top


@pytest.fixture
def texts(tmp_path: Path, documents: list[Document]) -> Path:
    for document in documents[:3]:
        (tmp_path / document.id).write_text(document.text)
    return tmp_path


def measure(folders: Path, texts: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "teacher": str(folders / "teacher"),
        "recipe_evaluate": SMALL,
        "held_out": (TextSource("*.txt"),),
        "base": texts,
    }
    return evaluate(folders / "student", **(arguments | changes))


def test_results_hold_the_measures_and_where_they_come_from(folders: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "results.json"
    results = measure(folders, texts, out=out, seed=4, recipe_sha256="abc", command="hybridize eval")
    written = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written == json.loads(json.dumps(results))
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]
    assert written["schema"] == "hybridize/results/2"
    assert set(written) == {"schema", "model", "teacher", "provenance", "probes"}
    assert set(written["probes"]) == {"state_bytes", "perplexity", "agreement", "samples"}
    assert all(row["status"] == "ok" and row["seconds"] >= 0 for row in written["probes"].values())
    assert written["probes"]["perplexity"]["ratio"] != 1.0
    origin = written["provenance"]
    assert (origin["seed"], origin["recipe_sha256"], origin["command"]) == (4, "abc", "hybridize eval")
    assert (origin["dtype"], origin["settings"]["perplexity"]["context_tokens"]) == ("float32", 64)
    assert torch.__version__.startswith(origin["versions"]["torch"])
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in texts.glob("*.txt")}
    assert {document["id"]: document["sha256"] for document in origin["documents"]} == expected
    assert written["model"]["fingerprint"] != written["teacher"]["fingerprint"]
    assert len(written["teacher"]["fingerprint"]) == 64


def test_held_out_text_may_be_said_by_a_recipes_data(folders: Path, texts: Path) -> None:
    named = Data(train=(TextSource("garden*.txt"),), held_out=(TextSource("river*.txt"),))
    documents = measure(folders, texts, held_out=named, teacher=None)["provenance"]["documents"]
    assert [document["source"] for document in documents] == ["river"]
    shared = Data(train=(TextSource("*.txt"),), held_out_share=0.999999)
    documents = measure(folders, texts, held_out=shared, teacher=None)["provenance"]["documents"]
    assert len(documents) == 3


def test_no_more_held_out_text_is_read_than_said(folders: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_SOURCE_BYTES", 1)
    for data in (
        Data(train=(TextSource("*.txt"),), held_out_share=0.999999),
        Data(train=(TextSource("river*.txt"),), held_out=(TextSource("garden*.txt"),)),
    ):
        assert len(measure(folders, texts, held_out=data, teacher=None)["provenance"]["documents"]) == 1


def test_models_of_two_vocabularies_are_not_compared(
    folders: Path, texts: Path, tmp_path: Path, tokenizer: Any
) -> None:
    tiny_teacher(num_hidden_layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="384 tokens and the teacher 96"):
        measure(folders, texts, teacher=str(tmp_path / "other"))


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    out.write_text("before")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results({"probes": float("nan")}, out)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("results.json", "before")]


def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="disk is full"):
        write_results({}, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/people/somebody"))
    assert without_home("eval /people/somebody/model --out x") == "eval ~/model --out x"
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert without_home("/a/b") == "/a/b"


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu) is torch.float32
    assert pick_dtype("bfloat16", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert pick_dtype("auto", cpu) is torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert pick_dtype("auto", cpu) is torch.float32
    assert pick_dtype("auto", torch.device("meta")) is torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert pick_dtype("auto", cpu) is torch.bfloat16
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe)
    assert pick_dtype("auto", cpu) is torch.float32


@pytest.mark.parametrize("native", [False, True])
def test_one_answer_to_which_type_is_auto(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": native}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # With emulation every GPU would say yes.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    for device in (cpu, cuda):
        assert computes_bfloat16(device) is native
        assert use_bfloat16("auto", device) is native
        assert (pick_dtype("auto", device) is torch.bfloat16) is native
    assert use_bfloat16("bfloat16", cpu)
    assert not use_bfloat16("float32", cpu)


@pytest.mark.parametrize("native", [False, True])
def test_talking_uses_the_same_type(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    asked = []

    def load(model: str, *, dtype: torch.dtype, offline: bool) -> torch.nn.Module:
        asked.append(dtype)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr("hybridize.model.load.load_any", load)
    monkeypatch.setattr("hybridize.model.load.load_tokenizer", lambda model, offline: None)
    monkeypatch.setattr("hybridize.model.precision.computes_bfloat16", lambda device: native)
    Talker("model", Talking(dtype="auto"), output=Output(), offline=True)
    assert asked == [torch.bfloat16 if native else torch.float32]
