"""Checkpoints written beside training: copied at once, published by all ranks, refused by all."""

import os
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moe_ext.training import publishing, saving
from moe_ext.training.checkpoint import CheckpointError, Piece, Published, Snapshot, published
from moe_ext.training.loop import Position
from moe_ext.training.ownership import claim
from moe_ext.training.publishing import Publisher, publish, write_tensors
from moe_ext.training.saving import Saver
from tests.ranks import run_ranks


@pytest.fixture
def held_writer(monkeypatch):
    """The disk answers once the event is set."""
    free, sync = threading.Event(), os.fsync

    def wait(descriptor):
        free.wait(30)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", wait)
    return free


def _snapshot(weight):
    pieces = [Piece("a", tuple(weight.shape), 0, {"weight": weight})]
    return Snapshot(pieces, {"step": 7}, rank_tensors={"rng": torch.arange(5, dtype=torch.uint8)})


def test_training_goes_on_while_a_copy_is_written(tmp_path, held_writer):
    publisher, weight, reports = Publisher(), torch.ones(6), []
    publisher.start(tmp_path, "step-1", _snapshot(weight), done=reports.append)
    weight.fill_(2.0)  # the next optimizer step
    assert publisher.vote == 0.0
    publisher.advance(publisher.vote)
    assert published(tmp_path) == []
    held_writer.set()
    publisher.wait()
    assert Published(tmp_path / "step-1").tensor("a").tolist() == [1.0] * 6
    assert [r.path.name for r in reports] == ["step-1"]
    sizes = [file.stat().st_size for file in (tmp_path / "step-1").glob("rank-*")]
    assert reports[0].bytes == sum(sizes)
    assert publisher.vote == 0.0


def test_an_event_tells_how_long_training_stood_still_and_how_long_it_was_written(
    tmp_path, held_writer, monkeypatch
):
    events, publisher = [], Publisher()
    run = SimpleNamespace(
        topology=SimpleNamespace(world_size=1),
        tracker=SimpleNamespace(event=lambda kind, **f: events.append((kind, f)), state=dict),
        config=SimpleNamespace(keep_checkpoints=None),
        identity=lambda name: {},
        stage_folder=lambda name: tmp_path / name,
        publisher=publisher,
        others=frozenset(),
    )
    pieces = _snapshot(torch.ones(5)).pieces
    monkeypatch.setattr(saving.resume, "pieces_of", lambda engine, chosen: (pieces, 0))
    monkeypatch.setattr(saving, "statics_of", lambda model, others: {})
    monkeypatch.setattr(saving, "status", lambda *_: None)
    monkeypatch.setattr(
        saving.dist, "all_gather_object", lambda all_, own: all_.__setitem__(0, own)
    )
    monkeypatch.setattr(saving, "merge_states", lambda states: states)
    loader = SimpleNamespace(state_dict=lambda: {"position": 0})
    save = Saver(run, "tune", None, [], None, loader)
    began = time.perf_counter()
    save(Position(step=2))
    stood_still_s = time.perf_counter() - began
    time.sleep(0.2)
    held_writer.set()
    publisher.wait()
    ((kind, fields),) = events
    assert (kind, fields["stage"], fields["step"]) == ("checkpoint", "tune", 2)
    assert 0 < fields["stall_s"] <= stood_still_s
    assert fields["write_s"] >= 0.2
    files = (tmp_path / "tune" / "checkpoints" / "step-0000002").glob("*.safetensors")
    assert fields["bytes"] == sum(file.stat().st_size for file in files)


def test_the_next_one_waits_for_the_one_before(tmp_path, held_writer):
    publisher = Publisher()
    publisher.start(tmp_path, "step-1", _snapshot(torch.ones(3)))
    threading.Timer(0.2, held_writer.set).start()
    publisher.start(tmp_path, "step-2", _snapshot(torch.full((3,), 2.0)))
    assert [p.name for p in published(tmp_path)] == ["step-1"]
    publisher.wait()
    assert [Published(p).tensor("a")[0].item() for p in published(tmp_path)] == [1.0, 2.0]


def test_host_memory_is_used_again(tmp_path):
    publisher, places = Publisher(), []
    for step in range(3):
        publisher.start(tmp_path, f"step-{step}", _snapshot(torch.full((3,), float(step))), keep=1)
        places.append({n: t.data_ptr() for n, t in publisher._buffers.items()})
    publisher.wait()
    assert places[0] == places[1] == places[2]
    assert Published(tmp_path / "step-2").tensor("a").tolist() == [2.0] * 3
    assert Published(tmp_path / "step-2").rank_tensors(0)["rng"].tolist() == [0, 1, 2, 3, 4]


def test_what_a_killed_start_left_is_removed(tmp_path):
    (tmp_path / ".step-3.dead.partial").mkdir()
    (tmp_path / ".step-1.removed.partial").mkdir()
    publish(tmp_path, "step-4", _snapshot(torch.ones(1)))
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]


def test_the_same_step_again_never_leaves_none(tmp_path, monkeypatch):
    publish(tmp_path, "step-1", _snapshot(torch.ones(1)))
    seen, rename = [], os.rename

    def watched(source, target):
        rename(source, target)
        seen.append([Published(p).tensor("a").item() for p in published(tmp_path)])

    monkeypatch.setattr(os, "rename", watched)
    publish(tmp_path, "step-1", _snapshot(torch.full((1,), 2.0)))
    assert all(seen)  # after each rename, something whole is there
    assert seen[-1] == [2.0]
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_killed_between_its_renames_it_is_published_again(tmp_path, monkeypatch):
    """Each rename of a publication in turn is the last thing that a start does."""
    rename = os.rename
    for last in (1, 2, 3):
        folder = tmp_path / str(last)
        publish(folder, "step-1", _snapshot(torch.ones(1)))
        calls = []

        def dying(source, target, calls=calls, last=last):
            if len(calls) == last:
                raise SystemExit("killed")
            calls.append(source)
            rename(source, target)

        monkeypatch.setattr(os, "rename", dying)
        if last < 3:  # the third is the removal's, which cannot fail any more
            with pytest.raises(CheckpointError):
                publish(folder, "step-1", _snapshot(torch.full((1,), 2.0)))
        else:
            publish(folder, "step-1", _snapshot(torch.full((1,), 2.0)))
        monkeypatch.setattr(os, "rename", rename)
        assert all(Published(p).tensor("a").item() in (1.0, 2.0) for p in published(folder))
        assert published(folder)
        publish(folder, "step-1", _snapshot(torch.full((1,), 3.0)))
        assert [p.name for p in folder.iterdir()] == ["step-1"]
        assert Published(folder / "step-1").tensor("a").item() == 3.0


def test_a_copy_that_lost_the_folder_touches_nothing(tmp_path):
    theirs = tmp_path / ".step-5.newer.partial"
    theirs.mkdir()

    def refuse():
        raise RuntimeError("belongs to a newer start")

    with pytest.raises(CheckpointError, match="newer start"):
        publish(tmp_path, "step-4", _snapshot(torch.ones(1)), owning=refuse)
    assert theirs.is_dir()


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("when", ["before it writes", "before it renames"])
def test_a_stale_copy_of_a_requeued_job_changes_no_file(tmp_path, monkeypatch, when):
    """Slurm started the job again elsewhere; the copy that it believes dead comes to its next checkpoint."""
    folder = tmp_path / "stages" / "tune" / "checkpoints"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    stale = claim(tmp_path)
    theirs = Publisher(token=stale.token, owning=stale.held)
    publish(folder, "step-2", _snapshot(torch.ones(3)), owning=stale.held)
    if when == "before it renames":
        theirs.start(folder, "step-4", _snapshot(torch.full((3,), 9.0)), keep=1)
        while not theirs.vote:
            time.sleep(0.01)

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    newer = claim(tmp_path)
    newer.write_status("running", "tune", 4)
    (folder / "step-4").mkdir()  # what the newer start has published, and what it is writing
    (folder / "step-4" / "file").write_text("whole")
    unfinished = folder / f".step-6.{newer.token[:8]}.partial"
    unfinished.mkdir()
    (unfinished / "file").write_text("half")
    before = {p: b for p, b in _files(tmp_path).items() if stale.token[:8] not in str(p)}

    if when == "before it writes":
        theirs.start(folder, "step-4", _snapshot(torch.full((3,), 9.0)), keep=1)
    with pytest.raises(CheckpointError, match=r"StaleRunError: .* newer start .*job 12 restart 1"):
        theirs.wait()
    assert _files(tmp_path) == before
    assert not any(stale.token[:8] in path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_files_are_what_safetensors_reads(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(publishing, "CHUNK_BYTES", 64)  # many chunks
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "matrix": torch.arange(210).view(14, 15).to(dtype),
        "strided": torch.arange(210).view(14, 15).to(dtype).t(),
        "nothing": torch.empty(0, 3, dtype=dtype),
        "scalar": torch.tensor(3).to(dtype),
    }
    entry = write_tensors(tmp_path / "x.safetensors", tensors)
    assert entry["bytes"] == (tmp_path / "x.safetensors").stat().st_size
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def _steps_until_the_error(folder, failing_rank, number):
    """Steps of a loop that votes; at which one this rank hears of the failure, and the message."""
    rank = dist.get_rank()
    publisher = Publisher(rank, 2)
    if rank == failing_rank:
        sync = os.fsync
        os.fsync = lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    piece = Piece("a", (4,), 2 * rank, {"weight": torch.ones(2)})
    publisher.start(Path(folder), "step-2", Snapshot([piece], {}))
    try:
        for step in range(1000):
            votes = torch.tensor([publisher.vote])
            dist.all_reduce(votes)
            publisher.advance(votes.item())
            if publisher._job is None:
                return step, "published"
    except CheckpointError as error:
        if rank == failing_rank:
            os.fsync = sync
        partials = list(Path(folder).glob(".*"))
        dist.barrier()
        return step, str(error), len(partials) if rank == 0 else 0
    return 1000, "still under way"


@pytest.mark.parametrize(
    ("failing_rank", "number", "advice"),
    [(1, 28, "make room there"), (0, 30, "make it writable"), (0, 27, "ulimit -f")],
)
def test_a_failing_write_is_raised_on_all_ranks_at_one_step(tmp_path, failing_rank, number, advice):
    publish(tmp_path, "step-1", _snapshot(torch.ones(1)))
    results = run_ranks(_steps_until_the_error, 2, str(tmp_path), failing_rank, number)
    assert results[0] == results[1]  # the same step, the same words, and nothing half left
    _, text, left = results[0]
    assert left == 0
    assert f"rank {failing_rank}: OSError: [Errno {number}]" in text
    assert advice in text
    assert "goes on from step-1" in text
    Published(tmp_path / "step-1").verify()


def _limited_files(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    publish(Path(folder), "step-1", _snapshot(torch.ones(10)))
    try:
        publish(Path(folder), "step-2", _snapshot(torch.ones(10_000)))
    except CheckpointError as error:
        return str(error), [p.name for p in Path(folder).iterdir()]
    return "published", []


def test_a_limit_of_file_sizes_is_named(tmp_path):
    ((text, left),) = run_ranks(_limited_files, 1, str(tmp_path))
    assert "File too large" in text
    assert "ulimit -f" in text
    assert left == ["step-1"]


def _slow_disk(folder):
    """Rank 1's disk takes longer than a collective may wait."""
    rank = dist.get_rank()
    from moe_ext.training.topology import limit_waiting

    limit_waiting(2.0)
    if rank == 1:
        import time

        sync = os.fsync
        os.fsync = lambda d: (time.sleep(4.0), sync(d))[1]
    piece = Piece("a", (4,), 2 * rank, {"weight": torch.ones(2)})
    publisher = Publisher(rank, 2)
    publisher.start(Path(folder), "step-1", Snapshot([piece], {}))
    publisher.wait()
    return published(Path(folder))[0].name


def test_a_slow_disk_is_no_timeout(tmp_path):
    assert run_ranks(_slow_disk, 2, str(tmp_path)) == ["step-1", "step-1"]
