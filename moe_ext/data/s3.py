"""Requests for objects in S3 and its likes, signed by hand (AWS Signature Version 4): no SDK needed."""

import configparser
import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

_EMPTY = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class S3Access:
    """Where objects lie and who asks for them; without a key, requests go out unsigned (public buckets)."""

    endpoint: str = ""
    """For example https://minio.example:9000; empty: Amazon's own."""
    region: str = "us-east-1"
    key_id: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "S3Access":
        """What the usual AWS_* variables and `~/.aws/credentials` say."""
        get = environment.get
        profile: Mapping[str, str] = {}
        file = configparser.ConfigParser()
        path = get("AWS_SHARED_CREDENTIALS_FILE") or Path(get("HOME", "/")) / ".aws" / "credentials"
        if file.read(path) and file.has_section(get("AWS_PROFILE", "default")):
            profile = file[get("AWS_PROFILE", "default")]
        return cls(
            endpoint=get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL") or "",
            region=get("AWS_REGION") or get("AWS_DEFAULT_REGION") or "us-east-1",
            key_id=get("AWS_ACCESS_KEY_ID") or profile.get("aws_access_key_id", ""),
            secret=get("AWS_SECRET_ACCESS_KEY") or profile.get("aws_secret_access_key", ""),
            token=get("AWS_SESSION_TOKEN") or profile.get("aws_session_token", ""),
        )

    def request(
        self, url: str, headers: dict[str, str], now: float | None = None
    ) -> tuple[str, dict[str, str]]:
        """(http address, headers) of a GET of `s3://bucket/key`; `now` in seconds since the epoch."""
        parts = urlsplit(url, allow_fragments=False)
        bucket, key = parts.netloc, quote(parts.path.lstrip("/"), safe="/-_.~")
        if self.endpoint:
            place = urlsplit(self.endpoint)
            scheme, host, path = place.scheme, place.netloc, f"{place.path}/{bucket}/{key}"
        else:
            host = f"{bucket}.s3.{self.region}.amazonaws.com"
            scheme, path = "https", f"/{key}"
        signed = self.sign(host, path, headers, now) if self.key_id else headers
        return f"{scheme}://{host}{path}", signed

    def sign(
        self, host: str, path: str, headers: dict[str, str], now: float | None = None
    ) -> dict[str, str]:
        """`headers` and those that prove who asks, for a GET without query or body."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        out = {**headers, "x-amz-date": stamp, "x-amz-content-sha256": _EMPTY}
        if self.token:
            out["x-amz-security-token"] = self.token
        lines = sorted((k.lower(), v.strip()) for k, v in {**out, "host": host}.items())
        names = ";".join(name for name, _ in lines)
        canonical = "\n".join(
            ["GET", path, "", *(f"{name}:{value}" for name, value in lines), "", names, _EMPTY]
        )
        scope = f"{stamp[:8]}/{self.region}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
        key = f"AWS4{self.secret}".encode()
        for part in (stamp[:8], self.region, "s3", "aws4_request", text):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        out["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self.key_id}/{scope},SignedHeaders={names},Signature={key.hex()}"
        )
        return out
