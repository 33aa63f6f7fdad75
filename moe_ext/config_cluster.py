"""The machines that `moe-ext plan` and `parallel=auto` plan for: numbers a rank, and their rules.

Nothing here changes a result by itself, so nothing here is part of a run's identity.
"""

from dataclasses import dataclass


@dataclass
class ClusterConfig:
    """Ranks, their memory, their links and their speed. A rank is a GPU, or a core of a CPU."""

    name: str = "cpu2"
    nodes: int = 1
    ranks_per_node: int = 2
    memory_gib: float = 4.0
    """Memory of a rank."""
    usable_share: float = 0.9
    """Share of it that tensors may take; the rest is the allocator's, the kernels' and the driver's."""
    intra_gb_per_s: float = 1.4
    """10^9 bytes a second that a rank sends to the others of its node, one direction."""
    inter_gb_per_s: float = 1.4
    """The same to ranks of other nodes."""
    intra_latency_us: float = 260.0
    """What an exchange inside a node costs whatever it carries."""
    inter_latency_us: float = 260.0
    """The same where it crosses nodes."""
    peak_tflops: float = 0.18
    """10^12 products and sums a second of a rank in the run's precision."""
    achieved_share: float = 0.44
    """Share of `peak_tflops` that a training step reaches (its MFU)."""

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def memory_bytes(self) -> float:
        """What tensors may take of a rank's memory."""
        return self.memory_gib * 2**30 * self.usable_share


def check_cluster(cluster: ClusterConfig) -> None:
    """Raise ValueError for the first rule that the numbers break."""
    for key in ("nodes", "ranks_per_node"):
        if getattr(cluster, key) < 1:
            raise ValueError(f"cluster.{key}={getattr(cluster, key)} must be at least 1")
    for key in ("memory_gib", "intra_gb_per_s", "inter_gb_per_s", "peak_tflops"):
        if not getattr(cluster, key) > 0:
            raise ValueError(f"cluster.{key}={getattr(cluster, key)} must be above 0")
    for key in ("intra_latency_us", "inter_latency_us"):
        if getattr(cluster, key) < 0:
            raise ValueError(f"cluster.{key}={getattr(cluster, key)} must be at least 0")
    for key in ("usable_share", "achieved_share"):
        if not 0 < getattr(cluster, key) <= 1:
            raise ValueError(f"cluster.{key}={getattr(cluster, key)} is a share above 0, at most 1")
