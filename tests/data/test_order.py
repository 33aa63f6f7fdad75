"""Order is a function: permutations, windows, epochs and mixtures against plain counting."""

from collections import Counter

import numpy as np
import pytest

from moe_ext.data.order import Mixture, Order, apportion, hash64, mix64, permutation


def test_the_functions_never_change():
    """Golden values: a change of any of them would give running jobs other samples on resume."""
    assert int(mix64(np.array([1], np.uint64))[0]) == 0x5692161D100B05E5
    assert hash64(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
    assert permutation(8, 1, 2, 3).tolist() == [5, 0, 7, 3, 6, 1, 4, 2]


def make_order(counts, **options):
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Order(np.arange(starts[-1]), starts, **{"seed": 3, "window": 10, **options})


@pytest.mark.parametrize("window", [1, 7, 10, 1000])
def test_every_epoch_holds_every_sample_once(window):
    order = make_order([5, 0, 13, 1, 20], window=window)
    epochs = [[order.sample_at(e * 39 + p) for p in range(39)] for e in range(3)]
    assert all(sorted(epoch) == list(range(39)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_window_touches_few_shards():
    order = make_order([100] * 50, window=100)
    for first in range(0, 5000, 100):
        shards = {order.sample_at(p) // 100 for p in range(first, first + 100)}
        assert len(shards) <= 2
    assert len({order.sample_at(p) // 100 for p in range(0, 5000, 100)}) > 25


def test_the_answer_does_not_depend_on_what_was_asked_before():
    order = make_order([9, 4, 30])
    forward = [order.sample_at(p) for p in range(200)]
    fresh = make_order([9, 4, 30])
    assert [fresh.sample_at(p) for p in reversed(range(200))] == forward[::-1]


def test_a_split_is_a_subset_in_its_own_order():
    starts = np.array([0, 10, 20, 30])
    order = Order(np.array([3, 4, 25]), starts, seed=0, window=4)
    assert sorted(order.sample_at(p) for p in range(3)) == [3, 4, 25]
    plain = Order(np.array([3, 4, 25]), starts, seed=0, window=4, shuffle=False)
    assert [plain.sample_at(p) for p in range(5)] == [3, 4, 25, 3, 4]


def test_seeds_differ():
    assert [make_order([50], seed=s).sample_at(0) for s in range(20)] != [0] * 20
    a, b = ([make_order([50], seed=s).sample_at(p) for p in range(50)] for s in (1, 2))
    assert a != b


def test_mixture_counts_follow_the_weights_and_positions_run_on():
    mixture = Mixture([1.0, 2.0, 5.0], seed=0)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for position in range(8 * 1024):
        source, inside = mixture.at(position)
        seen[source].append(inside)
    assert [len(seen[s]) for s in range(3)] == [1024, 2048, 5120]
    assert all(inside == list(range(len(inside))) for inside in seen.values())
    half = Counter(mixture.at(p)[0] for p in range(512))
    assert half[0] > 20 and half[2] > 250, "a block mixes its sources"


def test_mixture_spans_keep_a_source_together():
    mixture = Mixture([1.0, 1.0], seed=0, span=6)
    for unit in range(100):
        assert len({mixture.at(unit * 6 + i)[0] for i in range(6)}) == 1


def test_apportion():
    assert apportion([1, 1], 10) == [5, 5]
    assert apportion([1e-9, 1], 1024) == [1, 1023]
    assert sum(apportion([0.3, 0.3, 0.4, 1e-6], 1024)) == 1024
    with pytest.raises(ValueError, match="weight"):
        Mixture([1.0, 0.0], seed=0)
