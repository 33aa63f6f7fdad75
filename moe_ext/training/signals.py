"""Stop requests: a signal or a file sets a flag, all ranks agree once a step, publish at its end, and leave.

Slurm sends SIGUSR2 some time before a time limit and at a preemption (launchers/slurm.sbatch asks for
it), a person sends SIGTERM, a terminal SIGINT. A launcher and `moe-ext jobs --stop` leave a file in the
run's folder, which rank 0 looks for: it reaches ranks on any host, also while they are still starting.
Neither may interrupt a collective: they only set the flag. The training loop sends it along in the
reduction between backward and step (`loop.step_numbers`); other loops ask:

    with StopFlag(run_dir / STOP_FILE) as stop:
        for step in ...:
            ...
            if stop.agreed(group):
                checkpoint.publish(...)
                sys.exit(STOPPED_EXIT_CODE)
"""

import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed

STOPPED_EXIT_CODE = 75
"""What a run that stopped on request, published and resumable, exits with (EX_TEMPFAIL: try again)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STOP_FILE = "stop"
"""In a run's folder: whoever made it wants the run to publish, end, and stay away until started again."""
LOOK_EVERY_S = 1.0


class StopRequested(Exception):
    """Some rank was asked to stop between training steps; raised on all ranks at the same place."""


class StopFlag:
    """Set by STOP_SIGNALS while the context is open, or by a file; a second SIGINT interrupts at once.

    Usable from the main thread only, as Python's signal handlers are. Signals that the launcher blocked
    while Python started (launchers/rank.sh) are let through when the context opens.

    Args:
        request: the file to look for, at most once a second; None on the ranks that leave it to rank 0.
    """

    def __init__(self, request: Path | None = None) -> None:
        self.reason = ""
        """Name of the signal that this rank received, or the file's; empty without one."""
        self.for_good = False
        """Whether it was the file: no scheduler is to start the run again by itself."""
        self._request, self._looked = request, -LOOK_EVERY_S
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether this rank was asked. Ranks may differ: act on what all agreed on."""
        now = time.monotonic()
        if self._request is not None and not self.for_good and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if self._request.exists():
                self.for_good, self.reason = True, self._request.name
        return bool(self.reason)

    def answered(self) -> None:
        """The run has published and said so: the file has done its work."""
        if self.for_good and self._request is not None:
            self._request.unlink(missing_ok=True)

    def agreed(
        self, group: "torch.distributed.ProcessGroup | None" = None, device: str = "cpu"
    ) -> bool:
        """Whether any rank was asked: equal on all ranks. A collective where a process group exists.

        A loop that reduces some count at every step anyway can carry `requested` along in that and
        save this call.
        """
        if not torch.distributed.is_initialized():
            return self.requested
        flag = torch.tensor([float(self.requested)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
        return bool(flag.item())
