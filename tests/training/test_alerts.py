"""Which records give cause for an alert, and which do not."""

import pytest

from moe_ext.config import AlertConfig
from moe_ext.training.alerts import Alerts


def _record(step, nll=2.0, norm=1.0, shares=None, wait_s=0.01):
    return {
        "stage": "tune",
        "step": step,
        "loss": {"nll": nll},
        "grad_norm": norm,
        "data_wait_s": wait_s,
        "step_s": 1.0,
        **({} if shares is None else {"new_expert_share": shares}),
    }


def _kinds(settings, records):
    """(step, kind) of every alert that the records give."""
    alerts = Alerts(settings)
    return [(r["step"], alert.kind) for r in records for alert in alerts.look(r)]


def test_a_quiet_run_gives_none():
    records = [_record(s, nll=8 / (1 + s / 50), shares={3: [0.1]}) for s in range(1, 300)]
    assert _kinds(AlertConfig(), records) == []


def test_a_spike_is_seen_against_the_median_and_told_once_a_window():
    settings = AlertConfig(window=10)
    values = [2.0] * 8 + [3.5, 2.0, 3.5] + [2.0] * 12 + [3.5]
    records = [_record(step, nll=v) for step, v in enumerate(values, 1)]
    assert _kinds(settings, records) == [(9, "loss_spike"), (24, "loss_spike")]


def test_the_first_values_and_nan_are_no_spikes():
    values = [9.0, 2.0, 2.0, 2.0, float("nan"), float("nan"), 2.0]
    assert _kinds(AlertConfig(window=10), [_record(s, nll=v) for s, v in enumerate(values)]) == []


def test_a_gradient_spike_names_value_median_and_setting():
    alerts = Alerts(AlertConfig(window=4))
    for step in range(4):
        assert alerts.look(_record(step, norm=0.5)) == []
    (alert,) = alerts.look(_record(5, norm=6.0))
    assert alert.kind == "gradient_spike"
    for part in ("[tune] step 5", "6 ", "12 times", "(0.5)", "tracking.alerts.gradient_spike=10"):
        assert part in alert.text


def test_an_expert_is_dead_after_so_many_records_without_a_token():
    settings = AlertConfig(dead_expert=3)
    shares = [[0.2, 0.0], [0.2, 0.0], [0.2, 0.1], [0.2, 0.0], [0.2, 0.0], [0.2, 0.0], [0.2, 0.0]]
    records = [_record(s, shares={"7": share}) for s, share in enumerate(shares, 1)]
    assert _kinds(settings, records) == [(6, "dead_expert")]
    alerts = Alerts(settings)
    (text,) = [a.text for r in records for a in alerts.look(r)]
    assert "number 1 of layer 7" in text


def test_a_loader_is_slow_over_a_whole_window_only():
    settings = AlertConfig(window=4, slow_loader=0.5)
    waits = [0.9, 0.0, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9]
    records = [_record(s, wait_s=w) for s, w in enumerate(waits, 1)]
    assert _kinds(settings, records) == [(7, "slow_loader")]


@pytest.mark.parametrize("rule", ["loss_spike", "gradient_spike", "dead_expert", "slow_loader"])
def test_zero_switches_a_rule_off(rule):
    records = [_record(s, shares={3: [0.0]}, wait_s=0.9) for s in range(1, 9)]
    records += [_record(9, nll=99.0, norm=99.0, shares={3: [0.0]}, wait_s=0.9)]
    settings = {"window": 8, "dead_expert": 5}
    everything = {kind for _, kind in _kinds(AlertConfig(**settings), records)}
    assert rule in everything
    without = {kind for _, kind in _kinds(AlertConfig(**settings | {rule: 0}), records)}
    assert without == everything - {rule}
