"""A real HTTP server with scripted faults: /FAULT/FILE serves FILE the way FAULT says."""

import contextlib
import hashlib
import hmac
import http.server
import re
import socket
import struct
import threading
import time
from collections import Counter
from pathlib import Path


def signed_by(request, secret: str) -> bool:
    """Whether a request carries a Signature Version 4 that the holder of `secret` made for it."""
    stated = request.headers.get("Authorization", "")
    match = re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=\w+/(\d{8})/([\w-]+)/s3/aws4_request,"
        r"SignedHeaders=([\w;-]+),Signature=([0-9a-f]{64})",
        stated,
    )
    if not match:
        return False
    day, region, names, signature = match.groups()
    lines = "".join(f"{name}:{request.headers[name].strip()}\n" for name in names.split(";"))
    payload = request.headers["x-amz-content-sha256"]
    canonical = f"GET\n{request.path}\n\n{lines}\n{names}\n{payload}"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{request.headers['x-amz-date']}\n{day}/{region}/s3/aws4_request\n{hashed}"

    def keyed(key: bytes, message: str) -> bytes:
        return hmac.digest(key, message.encode(), "sha256")

    key = keyed(keyed(keyed(keyed(b"AWS4" + secret.encode(), day), region), "s3"), "aws4_request")
    return keyed(key, text).hex() == signature


class FaultServer:
    """`with FaultServer(folder) as server: server.url("cut-2", "a.tar")`.

    Faults: ok, 503-N and 429-N (the first N requests), 404, 403, cut-N (half the body, N times),
    reset-N (connection reset half-way), stall-N (silent half-way), slow (in small pieces), trickle
    (for ever, a byte at a time), norange-N (cut, and ranges are ignored), short (a file that is
    really shorter, said honestly), garbage (right size, wrong bytes), auth (S3: only requests
    signed with the secret "s").
    """

    def __init__(self, folder: Path):
        self.folder, self.hits, self.ranges = Path(folder), Counter(), []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    server.answer(self)

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        self.stop = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()

    def url(self, fault: str, name: str) -> str:
        return f"{self.base}/{fault}/{name}"

    def answer(self, request) -> None:
        _, fault, name = request.path.split("/", 2)
        fault, _, times = fault.partition("-")
        self.hits[request.path] += 1
        active = not times or self.hits[request.path] <= int(times)
        file = self.folder / name
        if fault == "404" or not file.is_file():
            return request.send_error(404)
        if fault == "auth" and not signed_by(request, "s"):
            return request.send_error(403)
        if fault in ("403", "503", "429") and active:
            request.send_response(int(fault))
            if fault == "429":
                request.send_header("Retry-After", "1")
            request.send_header("Content-Length", "0")
            return request.end_headers()
        data = file.read_bytes()
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "garbage":
            data = data[:600] + bytes(len(data) - 600)
        total, start = len(data), 0
        asked = request.headers.get("Range")
        if asked and fault != "norange":
            start = int(asked.removeprefix("bytes=").split("-")[0])
            self.ranges.append((request.path, start))
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        data = data[start:]
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        half = data[: len(data) // 2]
        if fault in ("cut", "norange", "reset", "stall") and active:
            request.wfile.write(half)
            request.wfile.flush()
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                request.connection.close()
            if fault == "stall":
                self.stop.wait(30)
            request.close_connection = True
        elif fault == "slow":
            for i in range(0, len(data), 4096):
                request.wfile.write(data[i : i + 4096])
                time.sleep(0.01)
        elif fault == "trickle":
            for byte in data:
                request.wfile.write(bytes([byte]))
                request.wfile.flush()
                if self.stop.wait(0.05):
                    return None
        else:
            request.wfile.write(data)
        return None
