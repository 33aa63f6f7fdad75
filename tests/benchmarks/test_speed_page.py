"""README and docs/ say what the benchmarks' JSON says."""

import pytest

from tests.benchmarks.speed import PAGES, ROOT, TABLES, results, written


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_tables_are_the_measured_ones(page):
    text = page.read_text()
    assert written(text) == text, "python -m tests.benchmarks.speed writes the tables anew"


def test_every_table_has_its_place():
    pages = [path.read_text() for path in PAGES]
    for make in TABLES:
        assert sum(f"<!-- {make.__name__} -->" in page for page in pages) == 1, make.__name__


def test_the_kills_are_those_that_were_counted():
    found, page = results("chaos"), (ROOT / "docs" / "checkpoints.md").read_text()
    told = f"{found['kills']:,} kills in {found['runs_equal']} runs and {found['starts']:,} starts"
    assert told in page
    assert f"{found['steps_compared']:,} steps and {found['samples_compared']:,} samples" in page
    assert found["runs_lost"] == found["samples_lost"] == 0
