"""Exports are read back by children of one process."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_exports(exports_read_by_children: None) -> None:
    """Of every test here that does not ask for another way."""
