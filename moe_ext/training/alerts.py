"""What somebody should look at, found in the step records alone: spikes, dead experts, a slow loader.

An alert is a line on the console, an event in the JSONL and, with W&B, a message to its users. It never
stops a run: that is for the rules of the loop (`stages.*.max_bad_steps`, `parallel.timeout_s`).
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_ext.config import AlertConfig


@dataclass(frozen=True)
class Alert:
    kind: str
    """`loss_spike`, `gradient_spike`, `dead_expert`, `slow_loader` or `stalled`."""
    text: str
    """One line: what was seen, against what, and which setting decides."""


class Alerts:
    """The rules over one stage's records; a kind speaks at most once in `window` records."""

    def __init__(self, settings: AlertConfig):
        self.settings = settings
        self._loss: deque[float] = deque(maxlen=settings.window)
        self._norm: deque[float] = deque(maxlen=settings.window)
        self._waits: deque[tuple[float, float]] = deque(maxlen=settings.window)
        self._unused: dict[tuple[str, int], int] = {}
        self._count = 0
        self._spoke: dict[str, int] = {}

    def look(self, record: dict[str, Any]) -> list[Alert]:
        """The alerts that a step's record gives cause for."""
        self._count += 1
        where = f"[{record['stage']}] step {record['step']}"
        found = [
            self._spike("loss_spike", where, "loss", record["loss"]["nll"], self._loss),
            self._spike("gradient_spike", where, "gradient norm", record["grad_norm"], self._norm),
            self._dead(where, record.get("new_expert_share", {})),
            self._slow(where, record["data_wait_s"], record["step_s"]),
        ]
        return [alert for alert in found if alert is not None and self._may_speak(alert.kind)]

    def _may_speak(self, kind: str) -> bool:
        if self._count - self._spoke.get(kind, -self.settings.window) < self.settings.window:
            return False
        self._spoke[kind] = self._count
        return True

    def _spike(
        self, kind: str, where: str, name: str, value: float, seen: deque[float]
    ) -> Alert | None:
        """A value many times the median of the last ones; half a window of them is needed."""
        ratio = getattr(self.settings, kind)
        known = len(seen)
        usual = statistics.median(seen) if 2 * known >= self.settings.window else None
        seen.append(value)
        if not ratio or usual is None or not value > ratio * usual:  # a NaN is the loop's affair
            return None
        return Alert(
            kind,
            f"{where}: {name} {value:.4g} is {value / max(usual, 1e-30):.3g} times the median of the last "
            f"{known} ({usual:.4g}); tracking.alerts.{kind}={ratio}",
        )

    def _dead(self, where: str, shares: dict[Any, list[float]]) -> Alert | None:
        """New experts that no token of any rank chose in so many records in a row."""
        limit = self.settings.dead_expert
        for layer, of_layer in shares.items():
            for index, share in enumerate(of_layer):
                key = (str(layer), index)
                self._unused[key] = 0 if share > 0 else self._unused.get(key, 0) + 1
        dead = sorted(key for key, count in self._unused.items() if limit and count >= limit)
        if not dead:
            return None
        layer, index = dead[0]
        return Alert(
            "dead_expert",
            f"{where}: {len(dead)} new expert(s) got no token in {limit} records, first number {index} of "
            f"layer {layer}; tracking.alerts.dead_expert={limit}",
        )

    def _slow(self, where: str, wait_s: float, step_s: float) -> Alert | None:
        """Waiting for data takes a large share of the time of a full window."""
        limit = self.settings.slow_loader
        self._waits.append((wait_s, step_s))
        if not limit or len(self._waits) < self.settings.window:
            return None
        share = sum(w for w, _ in self._waits) / max(sum(s for _, s in self._waits), 1e-9)
        if share <= limit:
            return None
        return Alert(
            "slow_loader",
            f"{where}: {share:.0%} of the last {len(self._waits)} steps was waiting for data; raise "
            f"data.num_workers or use data.features=cache; tracking.alerts.slow_loader={limit}",
        )


class Watchdog:
    """Speaks once when nothing was reported for `limit_s`: a loader, a peer or a file system hangs.

    A thread of its own, since the loop cannot notice that it waits. Rank 0's is enough: it waits in a
    collective for whichever rank hangs.
    """

    def __init__(self, limit_s: float, speak: Callable[[float], None]):
        self._limit_s, self._speak = limit_s, speak
        self._last = time.monotonic()
        self._spoke = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._thread.start()

    def report(self) -> None:
        """Something happened."""
        self._last, self._spoke = time.monotonic(), False

    def _look(self) -> None:
        while not self._ended.wait(min(self._limit_s / 4, 5.0)):
            silent_s = time.monotonic() - self._last
            if silent_s >= self._limit_s and not self._spoke:
                self._spoke = True
                self._speak(silent_s)

    def close(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)
