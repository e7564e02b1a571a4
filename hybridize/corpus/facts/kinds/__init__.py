"""All kinds of facts; tables of data, by what they are about."""

from __future__ import annotations

from hybridize.corpus.facts.kinds.computing import COMPUTING
from hybridize.corpus.facts.kinds.daily import DAILY
from hybridize.corpus.facts.kinds.kind import Kind
from hybridize.corpus.facts.kinds.people import PEOPLE
from hybridize.corpus.facts.kinds.science import SCIENCE
from hybridize.corpus.facts.kinds.trade import TRADE

KINDS: tuple[Kind, ...] = (*PEOPLE, *DAILY, *COMPUTING, *TRADE, *SCIENCE)

__all__ = ["KINDS", "Kind"]
