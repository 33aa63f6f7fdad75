"""docs/scaling.md says what the planner says, and what its prose says of the tables is so."""

import pytest

from tests.planning.known import BASES
from tests.planning.scaling import PAGE, cluster_of, evaluate, frozen_shard, subjects, written


def test_the_page_s_tables_are_the_planner_s():
    page = PAGE.read_text()
    assert written(page) == page, "python -m tests.planning.scaling writes docs/scaling.md anew"


def test_what_the_page_says_of_crossing_nodes():
    found = subjects()
    for name, (_, _, billions) in BASES.items():
        assert found[name].base.total / 1e9 == pytest.approx(billions, rel=2e-3), name
    share_of = {}
    for name in ("Mixtral-8x7B", "OLMoE-1B-7B"):
        time = evaluate(found[name], frozen_shard(8), cluster_of(1)).time
        share_of[name] = time.exchange_within / time.compute
    assert share_of["OLMoE-1B-7B"] > 5 * share_of["Mixtral-8x7B"], "finer experts, dearer exchange"
