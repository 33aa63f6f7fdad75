"""Several real hosts on this machine: each a network, UTS, PID and mount namespace with its own name,
address and sshd, joined by a bridge that lives in a namespace of its own.

The machine itself gets no interface and no changed file: `ip netns exec` binds `/etc/netns/NAME/*`
over `/etc` inside a namespace, and that is where hosts, keys and ssh settings lie. Addresses are of a
private range that is visible inside these namespaces alone.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import psutil

from tests.infra.machine import PATH, needs, wait_until

NEEDED = needs("ip", "sshd", "ssh-keygen", "pdsh", "nsenter", "unshare")
NETWORK = "10.77.0"
CONTROL = "ctl"

SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
UseDNS no
PidFile none
"""
SSH = """\
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ServerAliveInterval 5
  ServerAliveCountMax 2
  ConnectTimeout 5
"""
# The first process of a host: it starts sshd, reaps, and takes the whole host along when it ends.
FIRST_PROCESS = (
    "hostname {name}; /usr/sbin/sshd -D -e -f {folder}/sshd_config >>{folder}/sshd.{name}.log 2>&1 & "
    "while :; do wait -n || sleep 1; done"
)


class HostNetwork:
    """`with HostNetwork(folder, ["n1", "n2"]) as hosts:`; needs root, iproute2, openssh-server, pdsh."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self.names = names
        self.prefix = f"moe{os.getpid()}-"
        self.first_pid: dict[str, int] = {}

    def namespace(self, name: str) -> str:
        return self.prefix + name

    def address(self, name: str) -> str:
        return f"{NETWORK}.{1 if name == CONTROL else 11 + self.names.index(name)}"

    def inside(self, name: str, words: list[str], folder: Path = Path("/")) -> list[str]:
        """The command line that runs `words` on a host (`ctl`: the machine that launches), in a folder."""
        if name == CONTROL:
            as_control = [
                "unshare",
                "--uts",
                "sh",
                "-c",
                f'hostname {CONTROL}; cd {folder}; exec "$@"',
                "sh",
            ]
            return ["ip", "netns", "exec", self.namespace(CONTROL), *as_control, *words]
        target = str(self.first_pid[name])
        return [
            "nsenter",
            "-t",
            target,
            "-n",
            "-u",
            "-p",
            "-m",
            f"--wd={folder}",
            "--",
            *words,
        ]

    def __enter__(self) -> "HostNetwork":
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        for name in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        keys = self.folder / "authorized_keys"
        keys.write_text((self.folder / "key.pub").read_text())
        keys.chmod(0o600)
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)
        try:
            self._namespace(CONTROL)
            self._ip(CONTROL, "link", "add", "br0", "type", "bridge")
            self._ip(CONTROL, "addr", "add", f"{self.address(CONTROL)}/24", "dev", "br0")
            self._ip(CONTROL, "link", "set", "br0", "up")
            for name in self.names:
                self._start_host(name)
            for name in self.names:
                wait_until(lambda name=name: self._answers(name), 15, f"sshd of {name}")
        except BaseException:
            self.stop()
            raise
        return self

    def _namespace(self, name: str) -> None:
        namespace = self.namespace(name)
        _run("ip", "netns", "add", namespace)
        etc = Path("/etc/netns") / namespace
        (etc / "ssh").mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost"]
        lines += [f"{self.address(each)} {each}" for each in (CONTROL, *self.names)]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        (etc / "hostname").write_text(name + "\n")
        (etc / "ssh" / "ssh_config").write_text(SSH.format(folder=self.folder))
        self._ip(name, "link", "set", "lo", "up")

    def _start_host(self, name: str) -> None:
        self._namespace(name)
        mine, control = self.namespace(name), self.namespace(CONTROL)
        cable = f"v-{name}"
        _run(
            *("ip", "link", "add", "eth0", "netns", mine),
            *("type", "veth", "peer", "name", cable, "netns", control),
        )
        self._ip(CONTROL, "link", "set", cable, "master", "br0", "up")
        self._ip(name, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        self._ip(name, "link", "set", "eth0", "up")
        unshare = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        first = FIRST_PROCESS.format(name=name, folder=self.folder)
        starter = subprocess.Popen(
            ["ip", "netns", "exec", mine, *unshare, "bash", "-c", first],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PATH": PATH},
        )
        wait_until(lambda: bool(psutil.Process(starter.pid).children()), 10, f"host {name}")
        self.first_pid[name] = psutil.Process(starter.pid).children()[0].pid

    def _answers(self, name: str) -> bool:
        probe = self.inside(CONTROL, ["ssh", name, "hostname"])
        done = subprocess.run(
            probe, capture_output=True, text=True, env=os.environ | {"PATH": PATH}
        )
        return done.stdout.strip() == name

    def _ip(self, name: str, *words: str) -> None:
        _run("ip", "-n", self.namespace(name), *words)

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process that the kernel says lives in these namespaces, and remove them."""
        for name in (*self.names, CONTROL):
            namespace = self.namespace(name)
            for _ in range(5):
                listing = _run("ip", "netns", "pids", namespace, check=False)
                for pid in listing.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                if not listing.split():
                    break
            _run("ip", "netns", "del", namespace, check=False)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PATH": PATH})
    assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
