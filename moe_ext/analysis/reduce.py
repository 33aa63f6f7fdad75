"""The one place of analysis that knows about ranks: who does what, and adding it up."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This rank among `size` ranks that evaluate together; the default is one rank alone."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)
    """Where the process group reduces: the GPU under NCCL."""

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on the CPU. A collective when there is more than one rank."""
        if self.size == 1:
            return tensor.cpu()
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def rows(self, count: int, together: int) -> list[tuple[list[int], int]]:
        """This rank's part of `count` rows as groups of `together` rows, equally many on every rank.

        Under expert parallelism every rank must make the same number of passes, so short groups are
        filled with repeated rows. Each group comes with how many of its rows are this rank's own to
        count; a rank with nothing left repeats row 0 and counts none.
        """
        own = list(range(self.rank, count, self.size))
        most = -(-count // self.size)
        groups = []
        for start in range(0, most, together):
            rows = own[start : start + together]
            full = min(together, most - start)
            groups.append((rows + [rows[-1] if rows else 0] * (full - len(rows)), len(rows)))
        return groups
