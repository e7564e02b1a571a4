"""Plots as PNG bytes. matplotlib comes with the extra `plots`; it is imported when a plot is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.report.numbers import size, tokens
from hybridize.report.results import Results, probe

_STUDENT, _TEACHER = "#1f6fb4", "#6b6b6b"
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def has_matplotlib() -> bool:
    """Whether plots can be drawn here."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def all_plots(results: Results, metrics: Mapping[str, Sequence[Mapping[str, Any]]] | None) -> dict[str, bytes]:
    """Every plot that there are numbers for: file name -> PNG."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        plots = {
            "perplexity.png": perplexity_plot(results),
            "recall.png": recall_plot(results),
            "state-bytes.png": state_plot(results),
            "training.png": training_plot(metrics) if metrics else None,
        }
    return {name: png for name, png in plots.items() if png is not None}


def perplexity_plot(results: Results) -> bytes | None:
    """Perplexity by position, with standard errors; one point a range, at its middle."""
    ppl = probe(results, "perplexity")
    if ppl is None:
        return None
    rows = ppl["by_position"]
    figure, (axes,) = _figure(1, 5.2, 3.2)
    for name, colour in (("teacher", _TEACHER), ("student", _STUDENT)):
        if rows[0][name] is not None:
            errors = [row[f"{name}_se"] or 0.0 for row in rows]
            axes.errorbar(
                range(len(rows)),
                [row[name] for row in rows],
                errors,
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
                label=name,
            )
    axes.set_xticks(range(len(rows)), [f"{tokens(row['from'])}-{tokens(row['to'])}" for row in rows])
    axes.set(title="Perplexity on held-out text", xlabel="position (tokens)", ylabel="perplexity")
    axes.legend()
    return _png(figure)


def recall_plot(results: Results) -> bytes | None:
    """Share of needles found, length by depth: a row of maps for the teacher above one for the student."""
    recall = probe(results, "recall")
    if recall is None:
        return None
    kinds = list(recall["kinds"])
    names = [name for name in ("teacher", "student") if recall[name] is not None]
    figure, flat = _figure(len(kinds), 2.6 * len(kinds) + 0.8, 2.3 * len(names) + 0.3, num_rows=len(names))
    image = None
    for place, (name, kind) in enumerate((name, kind) for name in names for kind in kinds):
        lengths = list(recall["kinds"][kind].items())
        depths = [row["depth"] for row in lengths[0][1]["depths"]]
        grid = [[cells["depths"][i][name]["share"] for _, cells in lengths] for i in range(len(depths))]
        axes = flat[place]
        image = axes.pcolormesh(grid, vmin=0, vmax=1, cmap="Blues", edgecolors="white", linewidth=1.5)
        axes.invert_yaxis()  # the beginning of the prompt is at the top
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks([x + 0.5 for x in range(len(lengths))], [tokens(int(length)) for length, _ in lengths])
        axes.set_yticks([y + 0.5 for y in range(len(depths))], [f"{depth:.0%}" for depth in depths])
        axes.set(title=f"{name}, {kind.replace('_single_', ' ')}", xlabel="prompt (tokens)", ylabel="depth")
        for y, shares in enumerate(grid):
            for x, share in enumerate(shares):
                colour = "white" if share > 0.6 else "black"
                axes.text(x + 0.5, y + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=flat, label="needles found", format=lambda share, _: f"{share:.0%}")
    return _png(figure)


def state_plot(results: Results) -> bytes | None:
    """State bytes of one sequence over context length, both axes logarithmic."""
    state = probe(results, "state_bytes")
    if state is None:
        return None
    rows = state["by_context"]
    figure, (axes,) = _figure(1, 5.2, 3.2)
    for name, colour in (("teacher", _TEACHER), ("student", _STUDENT)):
        axes.plot([r["tokens"] for r in rows], [r[name] for r in rows], color=colour, marker="o", markersize=4)
        # The teacher's label stands above its curve's end and the student's below, so that equal ends stay readable.
        above = name == "teacher"
        axes.annotate(
            f"{name} {size(rows[-1][name])}",
            (rows[-1]["tokens"], rows[-1][name]),
            textcoords="offset points",
            xytext=(4, 6 if above else -6),
            ha="right",
            va="bottom" if above else "top",
            color=colour,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([row["tokens"] for row in rows], [tokens(row["tokens"]) for row in rows])
    axes.yaxis.set_major_formatter(lambda value, _: size(value))
    axes.margins(0.06, 0.14)
    axes.minorticks_off()
    axes.set(title="Memory to decode one sequence", xlabel="context (tokens)", ylabel="state bytes")
    return _png(figure)


def training_plot(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes | None:
    """The loss of every stage, and its running mean."""
    stages = {name: rows for name, rows in metrics.items() if rows}
    if not stages:
        return None
    figure, flat = _figure(len(stages), 3.2 * len(stages) + 0.6, 2.8)
    for axes, (name, rows) in zip(flat, stages.items(), strict=True):
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        axes.plot(steps, losses, color=_STUDENT, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(losses), color=_STUDENT, linewidth=1.6)
        if min(losses) > 0 and max(losses) > 10 * min(losses):
            axes.set_yscale("log")
        axes.set(title=name, xlabel="step", ylabel="loss")
    return _png(figure)


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """The mean of the values around each, over `share` of the curve."""
    reach = max(1, round(len(values) * share / 2))
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _figure(num_columns: int, width: float, height: float, num_rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure without pyplot, whose global state and choice of window system a library should not touch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False).flat)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
