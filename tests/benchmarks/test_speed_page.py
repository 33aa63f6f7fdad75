"""README and docs/ say what the benchmarks' JSON says."""

import pytest

from tests.benchmarks.speed import PAGES, TABLES, written


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_tables_are_the_measured_ones(page):
    text = page.read_text()
    assert written(text) == text, "python -m tests.benchmarks.speed writes the tables anew"


def test_every_table_has_its_place():
    pages = [path.read_text() for path in PAGES]
    for make in TABLES:
        assert sum(f"<!-- {make.__name__} -->" in page for page in pages) == 1, make.__name__
