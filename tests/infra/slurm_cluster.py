"""A real Slurm on this machine: its own munged, slurmctld and slurmds, loopback only, in one folder.

Debian's slurmd takes `-N name`, so several nodes run side by side without namespaces. Stopping signals
only processes whose environment names this cluster's configuration.
"""

import contextlib
import os
import socket
import stat
import subprocess
import time
from pathlib import Path

import psutil

from tests.infra.machine import PATH, needs, wait_until

NEEDED = needs("slurmctld", "slurmd", "srun", "munged")
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "slurmscriptd", "sackd")

# cred_expire: a requeued job waits that long before it may start (121 s by default).
# preempt_send_user_signal: --signal is sent at a preemption too, GraceTime before the end.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
ReturnToService=2
MinJobAge=600
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/finished.txt
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

# What squeue calls a job that is over.
ENDS = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
    | {"TIMEOUT"}
)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class SlurmCluster:
    """`with SlurmCluster(folder) as cluster:`; needs root, and slurm-wlm, slurm-client, munge."""

    def __init__(self, folder: Path, num_nodes: int = 2, cpus: int = 2, gpus: int = 0):
        self.folder = folder
        self.num_nodes = num_nodes
        self.cpus = cpus
        self.gpus = gpus  # of each node, by name only
        self.configuration = folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's programs need to find this cluster, and nothing of an outer Slurm job."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return outer | {"PATH": PATH, "SLURM_CONF": str(self.configuration)}

    def run(self, *words: str) -> str:
        """Output of a program of Slurm's; CalledProcessError when it fails."""
        return subprocess.run(
            words, env=self.environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout

    def __enter__(self) -> "SlurmCluster":
        for name in ("munge", "state"):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        controller_port, *ports = free_ports(1 + self.num_nodes)
        gpus = f"Gres=gpu:{self.gpus} " if self.gpus else ""
        nodes = [
            f"NodeName=node{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            f"RealMemory=8000 {gpus}State=UNKNOWN"
            for i, port in enumerate(ports, 1)
        ]
        if self.gpus:
            for i in range(
                self.gpus
            ):  # slurmd believes in a device that it finds: the null device again
                os.mknod(self.folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            devices = f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n"
            (self.folder / "gres.conf").write_text(devices)
            nodes.insert(0, "GresTypes=gpu")
        self.configuration.write_text(
            CONFIGURATION.format(
                folder=self.folder, controller_port=controller_port, nodes="\n".join(nodes)
            )
        )
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        munge = self.folder / "munge"
        # --force: root may run it, and the system's own munged stays untouched.
        self.run(
            "munged",
            "--force",
            f"--key-file={munge / 'key'}",
            f"--socket={munge / 'socket'}",
            f"--pid-file={munge / 'pid'}",
            f"--log-file={munge / 'log'}",
            f"--seed-file={munge / 'seed'}",
        )
        self.run("slurmctld")
        for i in range(1, self.num_nodes + 1):
            (self.folder / f"spool.node{i}").mkdir()
            self.run("slurmd", "-N", f"node{i}")
        wait_until(self._all_idle, 30, f"{self.num_nodes} idle nodes, see {self.folder}")

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to a node's slurmd; what it started lives on."""
        for process in psutil.process_iter(["name", "cmdline"]):
            is_it = process.info["name"] == "slurmd" and node in process.info["cmdline"]
            if is_it and self._is_ours(process):
                process.kill()
                process.wait(5)

    def start_daemon(self, node: str) -> None:
        """The node comes back, by ReturnToService; nothing runs meanwhile."""
        self.run("slurmd", "-N", node)
        wait_until(self._all_idle, 30, f"{node} to come back")

    def _all_idle(self) -> bool:
        words = ["sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D"]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip() == str(self.num_nodes)

    def states(self, job: str) -> dict[str, str]:
        """Task -> state of a job that the controller still knows (it does for MinJobAge)."""
        listing = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T")
        return dict(line.split() for line in listing.splitlines())

    def wait(self, job: str, timeout_s: float = 120) -> dict[str, str]:
        """The tasks' last states, once they are ends and stay the same for three seconds.

        A job on its way back into the queue passes through states that look like an end.
        """
        seen, since = self.states(job), time.monotonic()

        def ended() -> bool:
            nonlocal seen, since
            now = self.states(job)
            if now != seen:
                seen, since = now, time.monotonic()
            return bool(seen) and set(seen.values()) <= ENDS and time.monotonic() - since >= 3

        wait_until(ended, timeout_s, f"job {job} to end")
        return seen

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Cancel all jobs and end every process of this cluster."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--user=root")
            time.sleep(0.5)
        for kill in (False, True):
            ours = [process for process in psutil.process_iter(["name"]) if self._is_ours(process)]
            for process in ours:
                with contextlib.suppress(psutil.Error):
                    process.kill() if kill else process.terminate()
            psutil.wait_procs(ours, timeout=5)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            named = process.info["name"].startswith(PROGRAMS)
            return named and process.environ().get("SLURM_CONF") == str(self.configuration)
        except psutil.Error:
            return False
