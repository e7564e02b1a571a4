"""How it was measured."""

from __future__ import annotations

from hybridize.report.blocks import Paragraphs, Section
from hybridize.report.names import model_name
from hybridize.report.results import Results


def origin(results: Results) -> Section:
    """Models, machine, texts and versions."""
    made, model, teacher = results["provenance"], results["model"], results["teacher"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    parts = [("Model", f"{model_name(model)}, fingerprint {model['fingerprint'][:16]}.")]
    if teacher is not None:
        parts.append(("Teacher", f"{model_name(teacher)}, fingerprint {teacher['fingerprint'][:16]}."))
    parts += [
        ("When and where", f"{made['created']}, {made['device']}, {made['dtype']}, seed {made['seed']}."),
        ("Texts", f"{len(made['documents'])} held-out documents; their SHA-256 are in results.json."),
        ("Versions", f"{versions}, Python {made['python']}."),
    ]
    return Section("How this was measured", [Paragraphs(parts)])
