"""Shards from an S3 server that is not ours: moto's, which checks every signature with botocore.

`make test-store` installs it; without it this file is skipped, and `test_fetch.py` has a server of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ext.data import Manifest, ShardError, ShardStream
from moe_ext.data.commands import main
from moe_ext.data.fetch import Fetcher
from moe_ext.data.s3 import S3Access
from tests.data.inputs import make_pairs

pytest.importorskip("moto")
boto3 = pytest.importorskip("boto3")

SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(600)
"""
PREFIX = "a dir/ü+x~(1)"
"""A folder whose name needs every kind of quoting."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """AWS_* variables of a user who may read and write; bucket "shards" holds 60 pairs in 3 shards."""
    # The first three requests, which make the user, go unchecked; all later ones must be signed.
    variables = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "3"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            place = {"endpoint_url": endpoint, "region_name": "us-east-1"}
            iam = boto3.client("iam", aws_access_key_id="a", aws_secret_access_key="b", **place)
            iam.create_user(UserName="reader")
            key = iam.create_access_key(UserName="reader")["AccessKey"]
            allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
            iam.put_user_policy(UserName="reader", PolicyName="p", PolicyDocument=policy)
            found = {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
                "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
                "AWS_REGION": "us-east-1",
            }
            s3 = boto3.client(
                "s3",
                aws_access_key_id=key["AccessKeyId"],
                aws_secret_access_key=key["SecretAccessKey"],
                **place,
            )
            s3.create_bucket(Bucket="shards")
            folder = tmp_path_factory.mktemp("pairs")
            make_pairs(folder, 60, samples_per_shard=20)
            for path in folder.iterdir():
                s3.put_object(Bucket="shards", Key=f"{PREFIX}/{path.name}", Body=path.read_bytes())
            yield found
        finally:
            server.kill()


def fetcher(environment, folder, **changes):
    access = S3Access.from_environment({**environment, **changes})
    return Fetcher(folder, s3=access, tries=2, backoff_s=0.01, ahead=2)


def test_a_whole_stream(environment, tmp_path):
    local = fetcher(environment, tmp_path)
    manifest = Manifest.load(f"s3://shards/{PREFIX}/shard.json", local.read)
    stream = ShardStream(manifest, split="all", seed=1, window=16, local=local)
    assert sorted(raw["__key__"] for raw in stream.epoch()) == [f"s{i:05d}" for i in range(60)]


def test_a_half_fetched_shard_goes_on_with_a_signed_range(environment, tmp_path):
    whole = fetcher(environment, tmp_path / "whole")
    manifest = Manifest.load(f"s3://shards/{PREFIX}/shard.json", whole.read)
    url, entry = manifest.url(0), manifest.shards[0]
    data = Path(whole(url, entry)).read_bytes()
    half = fetcher(environment, tmp_path / "half")
    part = half.path_of(url).with_name(half.path_of(url).name + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(data[: len(data) // 2])
    starts, transfer = [], half._transfer

    def noted(url, start, *more):
        starts.append(start)
        return transfer(url, start, *more)

    half._transfer = noted
    assert Path(half(url, entry)).read_bytes() == data
    assert starts == [len(data) // 2]


def test_refusals_are_named(environment, tmp_path):
    manifest = Manifest.load(
        f"s3://shards/{PREFIX}/shard.json", fetcher(environment, tmp_path).read
    )
    url, entry = manifest.url(0), manifest.shards[0]
    with pytest.raises(ShardError, match=r"s3://shards/.*shard-000000\.tar: HTTP 403"):
        fetcher(environment, tmp_path / "a", AWS_SECRET_ACCESS_KEY="another")(url, entry)
    with pytest.raises(ShardError, match="HTTP 403"):
        fetcher(environment, tmp_path / "b", AWS_ACCESS_KEY_ID="")(url, entry)
    for missing in (f"s3://shards/{PREFIX}/none.tar", "s3://nobucket/a.tar"):
        with pytest.raises(FileNotFoundError, match=f"^{missing.split('(')[0].replace('+', '.')}"):
            fetcher(environment, tmp_path / "c")(missing, entry)


def test_the_commands_read_s3(environment, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://shards/{PREFIX}/shard.json"
    cache = ["--cache", str(tmp_path / "cache")]
    assert main(["check", url, *cache]) == 0
    assert (
        "3 shards, 60 samples (train 60), 60 images decoded: 0 problems" in capsys.readouterr().out
    )
    page = tmp_path / "page.html"
    assert main(["look", url, "--count", "5", "--out", str(page), *cache]) == 0
    assert page.read_text().count("data:image/jpeg") == 5
    assert main(["look", f"s3://shards/{PREFIX}/none.json", *cache]) == 2
    assert "none.json" in capsys.readouterr().err
