"""The parts of a report that are sentences: what was lost, samples, and the course of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.report.numbers import percent, size, tokens, with_error
from hybridize.report.results import Results, probe
from hybridize.report.sparkline import sparkline
from hybridize.report.tables import recall_by_length


def verdict(results: Results) -> str:
    """What was lost and what was saved, in plain words; losses first."""
    sentences = [_perplexity(results), _recall(results), _agreement(results), _state(results)]
    return " ".join(sentence for sentence in sentences if sentence)


def _perplexity(results: Results) -> str:
    ppl = probe(results, "perplexity")
    if ppl is None:
        return ""
    if ppl["ratio"] is None:
        return f"Perplexity on held-out text is {with_error(ppl, 'student')}."
    change = (ppl["ratio"] - 1) * 100
    error = "" if ppl["ratio_se"] is None else f" ± {ppl['ratio_se'] * 100:.1f}"
    word = "above" if change >= 0 else "below"
    return (
        f"Perplexity on held-out text is {ppl['student']:.2f} against the teacher's {ppl['teacher']:.2f}: "
        f"{abs(change):.1f}{error} % {word} it."
    )


def _recall(results: Results) -> str:
    recall = probe(results, "recall")
    if recall is None:
        return ""
    by_length = recall_by_length(recall).items()
    if recall["teacher"] is None:
        parts = [f"{percent(cells['student']['share'])} in {tokens(length)} tokens" for length, cells in by_length]
        return f"Of the needles it finds {', '.join(parts)}."
    parts = [
        f"{percent(cells['student']['share'])} in {tokens(length)} tokens "
        f"(teacher {percent(cells['teacher']['share'])})"
        for length, cells in by_length
    ]
    return f"Of the needles hidden in a long text it finds {', '.join(parts)}."


def _agreement(results: Results) -> str:
    close = probe(results, "agreement")
    return "" if close is None else f"At {percent(close['top1'])} of the positions both models rank one token first."


def _state(results: Results) -> str:
    state = probe(results, "state_bytes")
    if state is None:
        return ""
    return (
        f"Decoding one sequence of {tokens(state['tokens'])} tokens takes {size(state['student'])} of state instead of "
        f"{size(state['teacher'])} ({percent(state['ratio'])})."
    )


def samples_section(results: Results) -> str:
    """Prompts with both continuations, as quotations."""
    found = probe(results, "samples")
    if found is None:
        return ""
    parts = ["## Samples", f"Greedy, at most {found['new_tokens']} tokens."]
    for row in found["samples"]:
        for name in ("teacher", "student"):
            if row[name] is not None:
                parts.append(f"{name.capitalize()}:\n\n{_quoted(row['prompt'], row[name])}")
    return "\n\n".join(parts)


def _quoted(prompt: str, continuation: str) -> str:
    """Shown as code: models may write Markdown, HTML or links, which must not become part of the report."""
    text = prompt + continuation
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest


def training_section(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line for each stage: steps, the loss as a curve, first and last loss, speed."""
    lines = []
    for name, rows in metrics.items():
        losses = [float(row["loss"]) for row in rows]
        speeds = [float(row["tokens_per_s"]) for row in rows if "tokens_per_s" in row]
        speed = f"{sum(speeds) / len(speeds):,.0f}" if speeds else "-"
        lines.append(
            f"| {name} | {rows[-1]['stage_step']} | {sparkline(losses, 24)} "
            f"| {losses[0]:.4g} | {losses[-1]:.4g} | {speed} |"
        )
    if not lines:
        return ""
    header = ["| stage | steps | loss | first | last | tokens/s |", "|---|---:|---|---:|---:|---:|"]
    return "\n".join(["## Training", "", *header, *lines])
