"""Which rank is missing: what a survivor can say when a collective failed.

A collective that waits in vain says that it did, and neither for whom nor why. So a thread of every
rank counts in the store by which the ranks met, over a connection of its own. Whoever fails writes down why
and then looks: a rank whose count stands still is dead, stopped or cut off; one that counts and has
not failed itself did not come. Nothing is exchanged but a few bytes a rank and second, and no answer is
ever waited for by the thread that trains.
"""

import json
import socket
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

TELL_S = 0.5
"""Between two signs of life."""
LOOK_S = 4 * TELL_S
"""How long a survivor looks at the others' counts before it calls one silent."""
KEY = "moe_ext/peers/"

LOST = ("onnection", "imed out", "imeout", "showed no sign of life")
"""Words of gloo, NCCL, the store and `share_work` when a rank did not answer."""


@dataclass
class Sign:
    """What a rank last wrote down about itself."""

    count: int
    host: str
    failed: str = ""
    """Why it gave up: the last line of its traceback; empty while it has not."""


class Peers:
    """This rank's signs of life, and its view of the others'.

    Args:
        store: every rank's connection to one store; it gets a connection of its own. None: one rank.
        timeout_s: of a collective, for the message.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int, timeout_s: float):
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._sign = Sign(0, socket.gethostname())
        self._first: dict[int, Sign] = {}
        """Signs when this rank began to look, and..."""
        self._now: dict[int, Sign] = {}
        """... the newest ones."""
        self._hosts: dict[int, str] = {}
        self._unreachable = False
        self._looking, self._told, self._wake = False, threading.Event(), threading.Event()
        self._over = store is None
        self._store = store
        self._thread: threading.Thread | None = None
        if store is not None:
            self._thread = threading.Thread(target=self._live, name="signs of life", daemon=True)
            self._thread.start()

    # ---- the thread ------------------------------------------------------------------------

    def _live(self) -> None:
        assert self._store is not None
        try:
            store = self._store.clone()  # type: ignore[attr-defined]
            while not self._over:
                self._sign.count += 1
                store.set(f"{KEY}{self.rank}", json.dumps(vars(self._sign)))
                if self._sign.failed:
                    self._told.set()
                    if not self._looking:
                        return  # the store ends with rank 0, and torch would fill the log with that
                if self._looking or len(self._hosts) < self.world_size:
                    self._look(store)
                self._wake.wait(TELL_S / 4 if self._looking else TELL_S)
        except Exception:  # noqa: BLE001 (whatever the store's client raises: its server is gone)
            self._unreachable = True
            self._told.set()

    def _look(self, store: dist.Store) -> None:
        for rank in range(self.world_size):
            if rank == self.rank or (rank in self._hosts and not self._looking):
                continue
            key = f"{KEY}{rank}"
            if store.check([key]):  # a `get` of what is not there would wait
                sign = Sign(**json.loads(store.get(key)))
                self._hosts[rank] = sign.host
                if self._looking:
                    self._first.setdefault(rank, sign)
                    self._now[rank] = sign

    # ---- what the main thread asks ---------------------------------------------------------

    def explain(self, reason: str, lost: bool) -> str:
        """Tell the others that this rank gives up, and say which rank is missing; "" where none is.

        Takes LOOK_S at most, and that only when a collective failed.

        Args:
            reason: the last line of this rank's traceback.
            lost: a collective failed, the cause is elsewhere.
        """
        if self._thread is None:
            return ""
        self._sign.failed, self._looking = reason, lost
        self._wake.set()
        self._told.wait(LOOK_S)
        end = time.monotonic() + LOOK_S
        while lost and time.monotonic() < end and not (self._unreachable or self._cause()):
            if len(self._now) == self.world_size - 1 and all(s.failed for s in self._now.values()):
                break  # everybody waited for somebody
            time.sleep(TELL_S / 4)
        self._over = True
        return self._verdict() if lost else ""

    def _cause(self) -> list[int]:
        """Ranks that failed by themselves, and not because another one did."""
        return [r for r, sign in self._now.items() if sign.failed and not is_lost(sign.failed)]

    def _verdict(self) -> str:
        others = [r for r in range(self.world_size) if r != self.rank]
        if cause := self._cause():
            return f"{self._name(cause)} failed: {self._now[cause[0]].failed}"
        if (self._unreachable or not self._now) and self.rank:
            return (
                f"{self._name([0])} does not answer, by which the ranks know of each other: it died, was "
                "stopped or is cut off from this host"
            )
        if silent := [r for r in others if self._is_silent(r)]:
            return f"{self._name(silent)} showed no sign of life: dead, stopped or cut off"
        if absent := [r for r in others if not self._now[r].failed]:
            return (
                f"{self._name(absent)} lives but did not come within "
                f"parallel.timeout_s={self.timeout_s:g}: it hangs, or is that slow"
            )
        return "every rank lives and waited: the network between some of them is cut"

    def _is_silent(self, rank: int) -> bool:
        if rank not in self._now:
            return True
        return not self._now[rank].failed and self._now[rank].count == self._first[rank].count

    def _name(self, ranks: list[int]) -> str:
        named = [f"{r} (host {self._hosts.get(r, 'unknown')})" for r in ranks[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"

    def close(self) -> None:
        """No more signs of life."""
        self._over = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(LOOK_S)  # it may wait for a store that does not answer


def watch(topology: Any) -> Peers:
    """The peers of a topology that has been started."""
    store = None
    if topology.world_size > 1:
        store = dist.distributed_c10d._get_default_store()
    return Peers(store, topology.rank, topology.world_size, topology.timeout_s)


def headline(error: BaseException) -> str:
    """An error's kind and the first line of what it says; some of torch's go on for pages."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]


def is_lost(reason: str) -> bool:
    """Whether a headline is a collective's that lost a rank, as far as its words tell."""
    kind, _, words = reason.partition(":")
    ours = kind == "RuntimeError" or kind.startswith("torch.distributed.")
    return ours and any(word in words for word in LOST)
