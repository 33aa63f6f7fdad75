"""Stop requests: a signal sets a flag, all ranks agree at a step's end, publish, and leave together.

Slurm sends SIGUSR2 some time before a time limit and at a preemption (launchers/slurm.sbatch asks for
it), a launcher or a person sends SIGTERM, a terminal SIGINT. None of them may interrupt a collective:
the handler only sets the flag, and the loop asks once a step, after the optimizer:

    with StopFlag() as stop:
        for step in ...:
            ...
            if stop.agreed(group):
                checkpoint.publish(...)
                sys.exit(STOPPED_EXIT_CODE)
"""

import signal
from types import FrameType

import torch
import torch.distributed

STOPPED_EXIT_CODE = 75
"""What a run that stopped on request, published and resumable, exits with (EX_TEMPFAIL: try again)."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequested(Exception):
    """Some rank was asked to stop between training steps; raised on all ranks at the same place."""


class StopFlag:
    """Set by STOP_SIGNALS while the context is open; a second SIGINT interrupts at once.

    Usable from the main thread only, as Python's signal handlers are.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Name of the signal that this rank received; empty without one."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
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
        """Whether this rank was signalled. Ranks may differ: act on `agreed` only."""
        return bool(self.reason)

    def agreed(
        self, group: "torch.distributed.ProcessGroup | None" = None, device: str = "cpu"
    ) -> bool:
        """Whether any rank was signalled: equal on all ranks. A collective where a process group exists.

        A loop that reduces some count at every step anyway can carry `requested` along in that and
        save this call.
        """
        if not torch.distributed.is_initialized():
            return self.requested
        flag = torch.tensor([float(self.requested)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
        return bool(flag.item())
