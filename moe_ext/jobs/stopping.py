"""`moe-ext jobs --stop` and `--cancel`: the end of a run, whatever started it, and what is in a start's way."""

from pathlib import Path

from moe_ext.compose import ConfigError, load
from moe_ext.jobs import processes, slurm
from moe_ext.jobs.deepspeed_launcher import end_processes, running_launcher
from moe_ext.jobs.runs import RESOLVED_FILE, PlannedRun
from moe_ext.jobs.slurm import Submitted
from moe_ext.training.ownership import joined, read_owner, read_status
from moe_ext.training.signals import STOP_FILE


def stop(run_dir: Path, submitted: Submitted | None) -> str:
    """What was done to make the run publish, end and stay away; empty when it is not under way."""
    said = []
    alive = submitted.alive if submitted else []
    waiting = [job for job in alive if submitted and submitted.states[job].startswith("PENDING")]
    if waiting:  # nothing of them runs, so nothing is to be published
        complaint = slurm.cancel(waiting)
        said.append(complaint or f"job {', '.join(waiting)} left the queue")
    status = read_status(run_dir)
    is_running = status is not None and status.state == "running" and not processes.is_gone(run_dir)
    is_running = bool(running_launcher(run_dir)) or (
        is_running and not (submitted and submitted.known)
    )
    if is_running or set(alive) - set(waiting):
        (run_dir / STOP_FILE).touch()
        said.append("asked to publish at the end of its step, and to end")
    return "; ".join(said)


def cancel(run_dir: Path, submitted: Submitted | None) -> str:
    """What was done to end the run at once; empty when nothing of it was found."""
    if submitted and submitted.alive:
        return slurm.cancel(submitted.alive) or f"cancelled job {', '.join(submitted.alive)}"
    status, resolved = read_status(run_dir), run_dir / "launch" / RESOLVED_FILE
    if status is None or status.state != "running" or not resolved.is_file():
        return ""
    said = end_processes(resolved, load(Path(), [], resolved).launcher)
    owner = read_owner(run_dir)
    if processes.is_gone(run_dir) or (owner and owner["host"] in said):
        joined(run_dir).write_status("cancelled", status.stage, status.step)
    return said


def in_the_way(run: PlannedRun) -> str:
    """Why the run must not be started now: it is under way; empty when nothing is known of that."""
    submitted = slurm.submitted_below(run.run_dir).get(run.run_dir)
    if submitted and submitted.alive:
        job = submitted.alive[0]
        return f"it is Slurm's job {job} ({submitted.states[job]})"
    if pid := running_launcher(run.run_dir):
        return f"process {pid} here has it under way"
    return ""


def check_free(run: PlannedRun) -> None:
    """Raise ConfigError when the run is under way: two starts would take the folder from each other."""
    if reason := in_the_way(run):
        raise ConfigError(
            f"{run.run_id} was started before: {reason}. Wait for it, or end it: moe-ext jobs --stop {run.run_dir}"
        )
