"""A real Docker engine with a socket and data of its own, and a local base image to build on.

No registry of images is needed: the base is a Debian made by mmdebstrap, with Python. Inside, packages
come from pip's own index, and torch from an index served here, which holds the one wheel that this
machine's own pip chooses: what `--build-arg TORCH_INDEX` is for.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.infra.machine import PATH, ROOT, needs, wait_until

NEEDED = needs("dockerd", "containerd", "runc", "docker-compose", "mmdebstrap")
BASE = "moe_ext-test-base"
# Debian's docker has BuildKit built in; a newer one on PATH may need a plugin for it.
PROGRAM = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

# `docker` as the pages' commands find it. A build is given what needs a registry and a network of its own:
# BASE and TORCH_INDEX, whose values are in the environment.
DOCKER = """\
#!/bin/sh
if [ "$1" = build ]; then
    shift
    set -- build --progress plain --network host --build-arg BASE --build-arg TORCH_INDEX "$@"
fi
exec {program} "$@"
"""
BASE_DOCKERFILE = """\
FROM debian-local
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \\
    && rm -rf /var/lib/apt/lists/*
COPY certificates.crt /certificates.crt
ENV PIP_CERT=/certificates.crt
"""


class DockerEngine:
    """`with DockerEngine(folder) as engine:`; needs root, docker.io, containerd, runc, mmdebstrap.

    Its images are kept in the folder, so the second use of a folder starts in seconds.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.socket = f"unix://{folder}/docker.sock"
        self._daemon: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PATH": PATH, "DOCKER_HOST": self.socket, "DOCKER_BUILDKIT": "1"}

    def run(
        self, *words: str, check: bool = True, timeout_s: float = 1500, **variables: str
    ) -> str:
        """Output of a program that talks to this engine; AssertionError with it when it fails."""
        done = subprocess.run(
            words,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}\n{done.stdout[-6000:]}"
        return done.stdout

    def docker(self, *words: str, check: bool = True) -> str:
        return self.run(PROGRAM, *words, check=check)

    def shell(self, line: str) -> tuple[list[str], dict[str, str]]:
        """Words and environment of the shell that runs a page's command with this engine."""
        path = f"{self.folder}/bin:{PATH}"
        return ["bash", "-o", "pipefail", "-c", line], self.environment | {
            "PATH": path,
            "BASE": BASE,
        }

    def sh(self, line: str, **variables: str) -> str:
        """Output of a page's command, run in the project's folder; AssertionError when it fails."""
        words, environment = self.shell(f"cd {ROOT} && {line}")
        return self.run(*words, **environment | variables)

    def __enter__(self) -> "DockerEngine":
        program = self.folder / "bin" / "docker"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(DOCKER.format(program=PROGRAM))
        program.chmod(0o755)
        words = [
            *("dockerd", "-H", self.socket, "--data-root", f"{self.folder}/data"),
            *("--exec-root", f"{self.folder}/exec", "--pidfile", f"{self.folder}/docker.pid"),
            *("--iptables=false", "--ip6tables=false", "--bridge=none"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs"),
        ]
        with open(self.folder / "dockerd.log", "w") as log:
            self._daemon = subprocess.Popen(
                words, stdout=log, stderr=log, start_new_session=True, env=self.environment
            )
        try:
            wait_until(self._answers, 60, f"dockerd, see {self.folder}/dockerd.log")
            self._make_base()
        except BaseException:
            self.stop()
            raise
        return self

    def _answers(self) -> bool:
        return "Server" in self.docker("version", check=False)

    def _has(self, image: str) -> bool:
        return bool(self.docker("images", "-q", image).strip())

    def _make_base(self) -> None:
        if self._has(BASE):
            return
        if not self._has("debian-local"):
            archive = self.folder / "debian.tar"
            self.run("mmdebstrap", "--variant=minbase", "bookworm", str(archive))
            self.docker("import", str(archive), "debian-local")
            archive.unlink()
        context = self.folder / "base"
        shutil.rmtree(context, ignore_errors=True)
        context.mkdir()
        (context / "Dockerfile").write_text(BASE_DOCKERFILE)
        shutil.copy(CERTIFICATES, context / "certificates.crt")
        self.docker("build", "--network", "host", "-t", BASE, str(context))

    @contextlib.contextmanager
    def torch_index(self) -> Iterator[str]:
        """Address of a package index on this machine's loopback with the locked torch alone."""
        folder = self.folder / "index"
        (folder / "torch").mkdir(parents=True, exist_ok=True)
        if not list((folder / "torch").glob("*.whl")):
            lock = (ROOT / "requirements.lock").read_text()
            (torch,) = (line for line in lock.splitlines() if line.startswith("torch=="))
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            self.run(*pip, "--dest", str(folder / "torch"), torch)
        handler = partial(_Quiet, directory=str(folder))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the containers and end the engine; images stay in the folder."""
        if self._daemon is None:
            return
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            for container in self.docker("ps", "-q", check=False).split():
                self.docker("kill", container, check=False)
        self._daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._daemon.wait(timeout=30)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted(mounts, reverse=True):
            if mount.startswith(f"{self.folder}/"):
                subprocess.run(["umount", mount], capture_output=True)


class _Quiet(SimpleHTTPRequestHandler):
    """Folders as pages of links: what pip takes for an index."""

    def log_message(self, *_: object) -> None:
        pass
