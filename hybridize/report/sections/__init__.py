"""The sections of a report: one file for what belongs together, each a function from results to a section or None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridize.report.blocks import Section
from hybridize.report.results import Results
from hybridize.report.sections.ablation import ablation
from hybridize.report.sections.answers import answers
from hybridize.report.sections.baselines import baselines
from hybridize.report.sections.cost import cost
from hybridize.report.sections.gated_delta_net import gates
from hybridize.report.sections.held_out import held_out
from hybridize.report.sections.opening import opening
from hybridize.report.sections.origin import origin
from hybridize.report.sections.recall import recall
from hybridize.report.sections.retention import retention
from hybridize.report.sections.samples import samples
from hybridize.report.sections.selection import selection
from hybridize.report.sections.training import training

Metrics = Mapping[str, Sequence[Mapping[str, Any]]]


def all_sections(results: Results, metrics: Metrics | None) -> list[Section]:
    """Every section that there are numbers for, the summary first."""
    makers = (
        opening,
        recall,
        held_out,
        answers,
        cost,
        ablation,
        retention,
        baselines,
        gates,
        selection,
        samples,
    )
    sections = [*(maker(results) for maker in makers), training(metrics or {}), origin(results)]
    return [section for section in sections if section is not None and section.blocks]
