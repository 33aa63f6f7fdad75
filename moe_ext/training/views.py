"""Views of a run beside its JSONL: W&B and TensorBoard. Neither can stop or hang a run.

A view that fails turns itself off with one line on the console. A lock keeps it to one thread at a time:
the watchdog's alert may be what opens it. Since the JSONL is the record, a view is made whole from it:
what a killed process had not written yet is sent again by the next start, and no step is sent twice or
backwards.

Each stage is a run of its own in W&B (`job_type`), all of them and the evaluation in one group; each is
a folder of its own in TensorBoard. Names of values carry no stage, so that one panel serves them all.
"""

import base64
import contextlib
import io
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moe_ext.training.redact import clean_arguments, without_secrets

ID_FILE = "wandb_id"
Values = dict[str, float]
History = Callable[[str], Iterable[tuple[int, Values]]]
"""Stage -> (global step, values) of what the JSONL holds of it, in order of step, each step once."""


class _View:
    """Opened at the first call, by one thread at a time; off with one line after a failure."""

    def __init__(self, farewell: str, say: Callable[[str], None]):
        self._farewell, self._say = farewell, say
        self._opened: Any = None
        """W&B's run of the stage, or TensorBoard's writer."""
        self._lock, self._off = threading.RLock(), False

    def _open(self) -> None:
        """Set `_opened`, or turn the view off."""
        raise NotImplementedError

    def _guard(self, call: Callable[[Any], Any]) -> None:
        with self._lock:
            if self._opened is None and not self._off:
                self._open()
            if self._opened is None:
                return
            try:
                call(self._opened)
            except Exception as error:  # its service died, its disk is full, ...
                self._turn_off(error)

    def _turn_off(self, error: BaseException) -> None:
        self._opened, self._off = None, True
        self._say(f"{self._farewell}: {type(error).__name__}: {_first_line(error)}")


class Wandb(_View):
    """W&B that can neither stop nor hang: offline without a key or a network, off after an error.

    Args:
        config: the resolved configuration as plain values; secrets are taken out here.
        history: what the JSONL holds, for what W&B lacks of a stage.
        group: joins the runs of a sweep; empty: the stages of this run are the group.
        timeout_s: longest wait for the server at a stage's start, and twice that at its end; three times
            where the client does not end by itself.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        *,
        project: str,
        entity: str = "",
        group: str = "",
        history: History = lambda stage: (),
        say: Callable[[str], None] = print,
        timeout_s: float = 15.0,
    ):
        super().__init__("W&B is off from here on", say)
        self._dir, self._config, self._history = run_dir, config, history
        self._project, self._entity, self._group = project, entity, group
        self._last_s = 3 * timeout_s
        self._timeouts = {"init_timeout": timeout_s, "finish_timeout": 2 * timeout_s}
        self._stage, self._last_step = "", -1
        self._off = os.environ.get("WANDB_MODE") == "disabled"
        self._modes = ["online", "offline"] if _may_be_online() else ["offline"]
        self.id = ""

    # ---- what a tracker calls ----------------------------------------------------------------

    def enter(self, stage: str, known_id: str = "") -> None:
        """From here on values belong to this stage; `known_id` is the id that a checkpoint holds."""
        with self._lock:
            if stage != self._stage:
                self.finish()
            self._stage = stage
            if not self.id:
                self.id = self._identity(known_id)

    def log(self, values: Values, step: int) -> None:
        """Values of a step; a step that W&B has already is left out."""
        self._guard(lambda run: self._log(run, values, step))

    def alert(self, title: str, text: str) -> None:
        self._guard(lambda run: run.alert(title=title, text=text, level="WARN"))

    def summary(self, values: Values) -> None:
        self._guard(lambda run: run.summary.update(values))

    def gallery(self, rows: list[dict[str, Any]]) -> None:
        """A table of held-out images with the captions written for them, and their ranks."""

        def send(run: Any) -> None:
            import wandb

            columns = ["image", "truth", "written", "exact", "rank", "split", "key"]
            data = [
                [wandb.Image(picture(row)), *(row.get(column) for column in columns[1:])]
                for row in rows
            ]
            run.log({"gallery": wandb.Table(columns=columns, data=data)}, step=self._last_step + 1)
            self._last_step += 1

        self._guard(send)

    def artifact(self, folder: Path, metadata: dict[str, Any]) -> None:
        """The extension's folder, manifest included, as one version of an artifact."""

        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{self._dir.name}-extension", "extension", metadata=metadata)
            # Its place as `wandb sync` finds it from any folder; no second copy in the home folder.
            artifact.add_dir(str(folder.absolute()), policy="immutable")
            run.log_artifact(artifact)

        self._guard(send)

    def finish(self, code: int = 0, resumable: bool = False) -> None:
        """End the stage's run, waiting for its last values for at most three times `timeout_s`."""
        with self._lock:
            run, self._opened = self._opened, None
            if run is None:
                return
            try:
                if resumable:
                    run.mark_preempting()
                self._end(run, code)
            except Exception as error:
                self._turn_off(error)

    def _end(self, run: Any, code: int) -> None:
        """The client's own time-out does not count while an alert waits for a server that hangs."""
        errors: list[Exception] = []

        def finish() -> None:
            try:
                run.finish(exit_code=code)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=finish, name="wandb-finish", daemon=True)
        thread.start()
        thread.join(self._last_s)
        if thread.is_alive():
            _kill_service()  # this process's end would wait for it as well
            raise TimeoutError(f"its server did not answer for {self._last_s:g} s")
        if errors:
            raise errors[0]

    # ---- opening -----------------------------------------------------------------------------

    def _identity(self, known: str) -> str:
        """The id that all starts of this run share: the folder's, else the checkpoint's, else new."""
        file = self._dir / ID_FILE
        with contextlib.suppress(OSError):
            if not file.is_file():
                file.write_text(known or secrets.token_hex(4))
            return file.read_text().strip()
        return known or secrets.token_hex(4)

    def _open(self) -> None:
        try:
            import wandb
        except Exception as error:
            self._turn_off(error)
            return
        # The files of a table wait for `wandb sync` in the run's folder, not in a home that a node or a
        # container forgets.
        os.environ.setdefault("WANDB_DATA_DIR", str((self._dir / "wandb").absolute()))
        run_id = f"{self.id}-{self._stage}"
        for mode in list(self._modes):
            try:
                before = self._offline_folders(run_id)
                with clean_arguments():  # it records the command line
                    self._opened = wandb.init(
                        mode=mode, settings=self._settings(wandb), **self._about(run_id)
                    )
                break
            except Exception as error:
                self._modes.remove(mode)  # the next stage does not wait for it again
                self._say(f"W&B {mode} failed: {type(error).__name__}: {_first_line(error)}")
        else:
            self._off = True
            return
        if mode == "offline":
            self._say(f"W&B records offline in {self._dir / 'wandb'}; `wandb sync` sends it later")
        try:
            # Online, the server knows where an earlier start ended. Offline nothing does, and a killed
            # process has lost what it had not written: this folder is made whole and replaces them.
            self._last_step = self._opened.step - 1 if self._opened.resumed else -1
            for step, values in self._history(self._stage):
                self._log(self._opened, values, step)
            for folder in before:
                shutil.rmtree(folder, ignore_errors=True)
        except Exception as error:
            self._turn_off(error)

    def _settings(self, wandb: Any) -> Any:
        return wandb.Settings(silent=True, console="off", x_disable_stats=True, **self._timeouts)

    def _about(self, run_id: str) -> dict[str, Any]:
        return {
            "project": self._project,
            "entity": self._entity or None,
            "name": f"{self._dir.name}/{self._stage}",
            "group": self._group or f"{self._dir.name}-{self.id}",
            "job_type": self._stage,
            "id": run_id,
            "resume": "allow",
            "reinit": "create_new",
            "dir": str(self._dir),
            "config": without_secrets(self._config),
        }

    def _offline_folders(self, run_id: str) -> list[Path]:
        return sorted((self._dir / "wandb").glob(f"offline-run-*-{run_id}"))

    def _log(self, run: Any, values: Values, step: int) -> None:
        if step > self._last_step:
            run.log(values, step=step)
            self._last_step = step


def _kill_service() -> None:
    """End the process that talks to W&B's server for this one."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-core"):
                child.kill()


def _may_be_online() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return False
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    with contextlib.suppress(OSError):
        if netrc.is_file() and "wandb" in netrc.read_text():
            return True
    return bool(os.environ.get("WANDB_API_KEY"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def picture(row: dict[str, Any]) -> Any:
    """The PIL image of a row of the gallery (base64 PNG)."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(row["image"]))).convert("RGB")


class TensorBoard(_View):
    """TensorBoard's event files, a folder a stage; off with one line after a failure.

    What a killed process had not flushed is written again from the JSONL: a small file remembers up to
    which step everything is on disk, and TensorBoard is told to forget what came after it.
    """

    FLUSH_S = 10.0
    UPTO = "upto"

    def __init__(
        self,
        run_dir: Path,
        *,
        history: History = lambda stage: (),
        say: Callable[[str], None] = print,
    ):
        super().__init__("TensorBoard is off from here on", say)
        self._folder, self._history = run_dir / "tensorboard", history
        self._stage, self._last_step, self._flushed = "", -1, 0.0

    def enter(self, stage: str, known_id: str = "") -> None:
        with self._lock:
            if stage != self._stage:
                self.finish()
            self._stage = stage

    def log(self, values: Values, step: int) -> None:
        self._guard(lambda writer: self._log(writer, values, step))

    def alert(self, title: str, text: str) -> None:
        self._guard(
            lambda writer: writer.add_text("alerts", f"**{title}** {text}", self._last_step)
        )

    def summary(self, values: Values) -> None:
        def send(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, 0)

        self._guard(send)

    def gallery(self, rows: list[dict[str, Any]]) -> None:
        """The images, and their captions as one table."""
        import numpy as np

        def send(writer: Any) -> None:
            lines = ["| key | truth | written | rank |", "|---|---|---|---|"]
            for row in rows:
                writer.add_image(
                    f"gallery/{row['key']}", np.asarray(picture(row)), dataformats="HWC"
                )
                cells = (row.get(name) for name in ("key", "truth", "written", "rank"))
                lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
            writer.add_text("captions", "\n".join(lines))

        self._guard(send)

    def artifact(self, folder: Path, metadata: dict[str, Any]) -> None:
        """TensorBoard keeps no artifacts."""

    def finish(self, code: int = 0, resumable: bool = False) -> None:
        with self._lock:
            writer, self._opened = self._opened, None
            if writer is not None:
                with contextlib.suppress(Exception):
                    self._flush(writer)
                    writer.close()

    def _open(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._folder / self._stage
            upto = folder / self.UPTO
            self._last_step = int(upto.read_text()) if upto.is_file() else -1
            self._opened = SummaryWriter(
                str(folder), purge_step=self._last_step + 1 if upto.is_file() else None
            )
            for step, values in self._history(self._stage):
                self._log(self._opened, values, step)
        except Exception as error:
            self._turn_off(error)

    def _log(self, writer: Any, values: Values, step: int) -> None:
        if step <= self._last_step:
            return
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        self._last_step = step
        if time.monotonic() - self._flushed > self.FLUSH_S:
            self._flush(writer)

    def _flush(self, writer: Any) -> None:
        writer.flush()
        (self._folder / self._stage / self.UPTO).write_text(str(self._last_step))
        self._flushed = time.monotonic()
