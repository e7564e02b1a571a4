"""Reading: values asked of documents that are in the prompt."""

from hybridize.evaluation.reading.items import make_reading_items
from hybridize.evaluation.reading.row import reading

__all__ = ["make_reading_items", "reading"]
