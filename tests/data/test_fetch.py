"""Shards over a real HTTP server that misbehaves, and S3: the rows of docs/data.md's fault table."""

import multiprocessing
import time

import pytest

from moe_ext.data import Loader, Manifest, SampleBuilder, ShardError, ShardStream
from moe_ext.data.fetch import Fetcher
from moe_ext.data.manifest import Shard
from moe_ext.data.s3 import S3Access
from tests.data.fault_server import FaultServer
from tests.data.inputs import make_pairs, to_pixels


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """(server, manifest) of 60 pairs in 3 shards of about 60 kB."""
    path = make_pairs(tmp_path_factory.mktemp("remote"), 60, samples_per_shard=20)
    with FaultServer(path.parent) as server:
        yield server, Manifest.load(path)


@pytest.fixture
def fetcher(tmp_path):
    return Fetcher(tmp_path / "cache", timeout_s=0.5, tries=4, backoff_s=0.01, ahead=0)


def fetched(fetcher, server, manifest, fault, shard=0) -> bool:
    entry = manifest.shards[shard]
    path = fetcher(server.url(fault, entry.url), entry)
    with open(path, "rb") as f, open(manifest.url(shard), "rb") as g:
        return f.read() == g.read()


@pytest.mark.parametrize(
    "fault", ["ok", "503-2", "429-1", "cut-2", "reset-2", "stall-1", "slow", "norange-2"]
)
def test_passing_faults_are_cured(remote, fetcher, fault):
    server, manifest = remote
    assert fetched(fetcher, server, manifest, fault)
    url = server.url(fault, manifest.shards[0].url)
    hits = server.hits[f"/{fault}/{manifest.shards[0].url}"]
    assert fetched(fetcher, server, manifest, fault)
    assert server.hits[f"/{fault}/{manifest.shards[0].url}"] == hits, f"{url} came from the cache"


def test_a_cut_download_goes_on_where_it_broke(remote, fetcher):
    server, manifest = remote
    assert fetched(fetcher, server, manifest, "cut-2", shard=1)
    size = manifest.shards[1].size_bytes
    starts = [start for path, start in server.ranges if path.endswith(manifest.shards[1].url)]
    assert starts == [size // 2, size // 2 + (size - size // 2) // 2]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "HTTP 503; gave up after 4 tries"),
        ("404", "HTTP 404"),
        ("403", "HTTP 403"),
        ("stall", "imed out"),
        ("trickle", "bytes a second"),
        ("norange", "ended after"),
        ("short", r"has \d+ bytes, its manifest says"),
        ("garbage", "SHA-256 is not the manifest's"),
    ],
)
def test_lasting_faults_end_in_a_named_error_in_bounded_time(remote, fetcher, fault, message):
    server, manifest = remote
    began = time.monotonic()
    with pytest.raises(OSError, match=message) as caught:
        fetched(fetcher, server, manifest, fault, shard=2)
    assert manifest.shards[2].url in str(caught.value)
    assert time.monotonic() - began < 4 * 0.5 + 4
    assert not fetcher.path_of(server.url(fault, manifest.shards[2].url)).exists()


def test_a_dead_endpoint(fetcher):
    with pytest.raises(ShardError, match="refused"):
        fetcher("http://127.0.0.1:9/a.tar", Shard("a.tar", 1, "", 1))


def test_a_killed_download_is_continued_by_the_next_run(remote, fetcher):
    server, manifest = remote
    entry = manifest.shards[0]
    url = server.url("slow-0", entry.url)
    process = multiprocessing.get_context("fork").Process(target=fetcher, args=(url, entry))
    process.start()
    part = fetcher.path_of(url).with_name(fetcher.path_of(url).name + ".part")
    while not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert fetched(fetcher, server, manifest, "slow-0")
    (start,) = (start for path, start in server.ranges if path == f"/slow-0/{entry.url}")
    assert 0 < start < entry.size_bytes, "the second process began anew"


def test_wrong_bytes_in_an_old_part_are_noticed_and_fetched_anew(remote, fetcher):
    server, manifest = remote
    path = fetcher.path_of(server.url("ok", manifest.shards[0].url))
    path.parent.mkdir(parents=True)
    path.with_name(path.name + ".part").write_bytes(b"old file's bytes")
    assert fetched(fetcher, server, manifest, "ok")
    unknown = server.url("ok", manifest.shards[1].url)
    path = fetcher.path_of(unknown)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".part").write_bytes(bytes(10**6))
    with open(fetcher(unknown), "rb") as f, open(manifest.url(1), "rb") as g:
        assert f.read() == g.read(), "no hash to tell: begun anew"


def test_processes_download_a_shard_once(remote, fetcher):
    server, manifest = remote
    url = server.url("slow", manifest.shards[1].url)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=fetcher, args=(url, manifest.shards[1])) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert server.hits[f"/slow/{manifest.shards[1].url}"] == 1


def test_the_cache_keeps_under_its_limit(remote, tmp_path):
    server, manifest = remote
    sizes = [s.size_bytes for s in manifest.shards]
    fetcher = Fetcher(tmp_path, limit_bytes=sizes[1] + sizes[2], ahead=0)
    paths = []
    for shard in range(3):
        paths.append(fetcher.path_of(server.url("ok", manifest.shards[shard].url)))
        assert fetched(fetcher, server, manifest, "ok", shard)
        time.sleep(0.02)
    assert [p.exists() for p in paths] == [False, True, True]


def rebased(manifest, server, faults):
    """The manifest with its shards at the server, shard i under fault i."""
    shards = [
        Shard(server.url(f, s.url), s.size_bytes, s.sha256, s.num_samples)
        for f, s in zip(faults, manifest.shards, strict=True)
    ]
    return Manifest(
        shards,
        manifest.offset_N,
        manifest.nbytes_N,
        manifest.split_N,
        manifest.split_names,
        base=".",
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_shard_is_skipped_in_place_and_counted(remote, tmp_path, tokenizer, num_workers):
    server, manifest = remote
    build = SampleBuilder(tokenizer, to_pixels, 4, prompt="A", max_length=64)

    def keys(manifest, local):
        stream = ShardStream(manifest, seed=3, window=8, local=local)
        loader = Loader(stream, build, sequences_per_rank=10, num_workers=num_workers)
        batches = [b for _, b in zip(range(6), loader, strict=False)]
        return [k for b in batches for k in b.sample_keys], loader.skips

    whole, none = keys(manifest, lambda url, shard: url)
    fetcher = Fetcher(tmp_path, timeout_s=0.5, tries=2, backoff_s=0.01, ahead=2)
    broken, skips = keys(rebased(manifest, server, ["cut-1", "garbage", "ok"]), fetcher)
    assert not none and len(skips) == 20
    assert all(whole[s.position] in {f"s{i:05d}" for i in range(20, 40)} for s in skips)
    bad = {s.position for s in skips}
    assert [k for i, k in enumerate(broken) if i not in bad] == [
        k for i, k in enumerate(whole) if i not in bad
    ]
    assert all("SHA-256" in s.reason and "garbage/shard-000001.tar" in s.key for s in skips)


def test_a_manifest_over_http(remote, tmp_path):
    server, local = remote
    fetcher = Fetcher(tmp_path, ahead=1)
    manifest = Manifest.load(server.url("503-1", "shard.json"), fetcher.read)
    assert manifest.identity == local.identity
    stream = ShardStream(manifest, split="all", shuffle=False, local=fetcher)
    assert [raw["__key__"] for raw in stream.epoch()] == [f"s{i:05d}" for i in range(60)]


def test_shards_ahead_arrive_before_they_are_read(remote, tmp_path):
    server, manifest = remote
    fetcher = Fetcher(tmp_path, ahead=2)
    stream = ShardStream(
        rebased(manifest, server, ["ok"] * 3), shuffle=False, window=20, local=fetcher
    )
    stream.raw(0)
    deadline = time.monotonic() + 5
    second = fetcher.path_of(server.url("ok", manifest.shards[1].url))
    while not second.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert second.exists() and 1 not in stream.files.files


def test_urls_that_could_run_commands_are_refused(fetcher):
    for url in ("pipe:touch /tmp/owned", "exec://x"):
        with pytest.raises(ShardError, match="not (pipe|exec)"):
            fetcher(url, Shard("a.tar", 1, "", 1))


def test_s3_signature_is_amazons_own_example():
    """docs.aws.amazon.com, "Signature Calculations: Example: GET Object"."""
    access = S3Access(
        key_id="AKIAIOSFODNN7EXAMPLE", secret="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    )
    url = "s3://examplebucket/test.txt"
    host = "examplebucket.s3.amazonaws.com"
    headers = access.sign(host, "/test.txt", {"range": "bytes=0-9"}, now=1369353600.0)
    assert headers["x-amz-date"] == "20130524T000000Z"
    assert headers["Authorization"].endswith(
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )
    assert "SignedHeaders=host;range;x-amz-content-sha256;x-amz-date" in headers["Authorization"]
    assert access.request(url, {})[0] == "https://examplebucket.s3.us-east-1.amazonaws.com/test.txt"
    assert "wJalr" not in repr(access) and "AKIA" not in repr(access)


def test_s3_objects(remote, tmp_path):
    server, manifest = remote
    access = S3Access.from_environment(
        {"AWS_ENDPOINT_URL": server.base, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    )
    fetcher = Fetcher(tmp_path / "a", s3=access, tries=2, backoff_s=0.01, ahead=0)
    entry = manifest.shards[0]
    with (
        open(fetcher(f"s3://auth/{entry.url}", entry), "rb") as f,
        open(manifest.url(0), "rb") as g,
    ):
        assert f.read() == g.read()
    with open(fetcher(f"s3://cut-1/{entry.url}", entry), "rb") as f:
        assert len(f.read()) == entry.size_bytes
    with pytest.raises(OSError, match="404"):
        fetcher("s3://auth/none.tar", entry)
    wrong = S3Access(endpoint=server.base, key_id="k", secret="another")
    with pytest.raises(ShardError, match="403"):
        Fetcher(tmp_path / "c", s3=wrong)(f"s3://auth/{entry.url}", entry)
    with pytest.raises(ShardError, match="403"):
        Fetcher(tmp_path / "b", s3=S3Access(endpoint=server.base))(f"s3://auth/{entry.url}", entry)
