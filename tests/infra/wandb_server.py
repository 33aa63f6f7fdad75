"""A stand-in for W&B's server on loopback, for its real client: enough of its GraphQL and file stream
for a run to be opened, written, alerted and ended, and faults that can be switched on and off."""

import gzip
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

FAULTS = ("none", "500", "401", "hang")


class WandbServer:
    """`with WandbServer() as server:`; `server.url` is the base URL, `server.fault` what goes wrong.

    Args:
        fault: `500` and `401` are the answers to everything, `hang` never answers.
        after: the fault begins after so many posts to the file stream.
    """

    def __init__(self, fault: str = "none", after: int = 0):
        assert fault in FAULTS
        self.fault, self.after = fault, after
        self.operations: list[tuple[str, dict[str, Any]]] = []
        """(name, variables) of every GraphQL request."""
        self.streams: dict[str, list[dict[str, Any]]] = {}
        """Run id -> bodies posted to its file stream."""
        self.uploads: dict[str, bytes] = {}
        """Path -> content of what was put there; an artifact's files lie below its id."""
        self.artifacts: list[dict[str, Any]] = []
        """What was said of each artifact at its creation, with its `id` and whether it is `committed`."""
        self.last_step: dict[str, int] = {}
        self.posts = 0

    def __enter__(self) -> "WandbServer":
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def fault_now(self) -> str:
        return self.fault if self.posts >= self.after else "none"

    def variables(self, name: str) -> list[dict[str, Any]]:
        """The variables of every request of that name."""
        return [variables for operation, variables in self.operations if operation == name]

    def files_of(self, artifact: dict[str, Any]) -> dict[str, bytes]:
        """Name -> content of an artifact's files."""
        folder = f"/{artifact['id']}/"
        return {p.removeprefix(folder): c for p, c in self.uploads.items() if p.startswith(folder)}

    def history(self, run: str) -> list[dict[str, Any]]:
        """The history as the server would hold it: each post's lines at their offset."""
        lines: dict[int, str] = {}
        for body in self.streams.get(run, []):
            for name, chunk in (body.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    lines |= dict(enumerate(chunk["content"], start=chunk["offset"]))
        return [json.loads(lines[i]) for i in sorted(lines)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed cuts its connection: no matter."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: ClassVar[WandbServer]

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, code: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _faulty(self) -> bool:
        fault = self.server_state.fault_now
        if fault == "hang":
            time.sleep(600)
        elif fault != "none":
            self._answer(int(fault), {"error": "as the test wants it"})
        return fault != "none"

    def do_GET(self) -> None:
        if not self._faulty():
            self._answer(200, {})

    def do_PUT(self) -> None:
        self.server_state.uploads[self.path] = self._body()
        if not self._faulty():
            self._answer(200, {})

    def do_POST(self) -> None:
        state, body = self.server_state, self._body()
        is_stream = "file_stream" in self.path
        if is_stream:
            state.posts += 1
        if self._faulty():
            return
        if is_stream:
            run = self.path.split("/")[-2]
            state.streams.setdefault(run, []).append(json.loads(body))
            self._answer(200, {"limits": {}})
            return
        if self.path != "/graphql":  # its own telemetry
            self._answer(200, {})
            return
        request = json.loads(body)
        found = re.search(r"(?:query|mutation)\s+(\w+)", request.get("query", ""))
        name, variables = found[1] if found else "", request.get("variables") or {}
        state.operations.append((name, variables))
        self._answer(200, {"data": self._data(name, variables)})

    def _data(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = variables.get("project") or variables.get("modelName") or "p"
        run = variables.get("name") or variables.get("run") or "r"
        owner = {"id": "UDox", "name": project, "entity": {"id": "RTox", "name": "tester"}}
        bucket = {
            "id": "UnVuOjE=",
            "name": run,
            "displayName": variables.get("displayName") or run,
            "description": None,
            "config": "{}",
            "sweepName": None,
            "historyLineCount": None,
            "project": owner,
        }
        viewer = {
            "id": "VQ==",
            "entity": "tester",
            "username": "tester",
            "flags": "{}",
            "teams": {"edges": []},
        }
        upload = {"id": "VXA=", "uploadHeaders": [], "runID": "UnVuOjE=", "files": []}
        for file in variables.get("files") or []:
            upload["files"].append({"name": file, "uploadUrl": f"{self.server_state.url}/{file}"})
        answers: dict[str, Callable[[], dict[str, Any]]] = {
            "UpsertBucket": lambda: {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "Viewer": lambda: {"viewer": viewer},
            "RunResumeStatus": lambda: {"model": owner | {"bucket": self._resume(run)}},
            "CreateRunFiles": lambda: {"createRunFiles": upload},
            "NotifyScriptableRunAlert": lambda: {"notifyScriptableRunAlert": {"success": True}},
            "CreateArtifact": lambda: {"createArtifact": {"artifact": self._artifact(variables)}},
            "ClientIDMapping": lambda: {"clientIDMapping": {"serverID": self._id_of(variables)}},
            "CreateArtifactManifest": lambda: {
                "createArtifactManifest": {"artifactManifest": self._manifest(variables)}
            },
            "UpdateArtifactManifest": lambda: {
                "updateArtifactManifest": {"artifactManifest": self._manifest(variables)}
            },
            "CreateArtifactFiles": lambda: {
                "createArtifactFiles": {"files": {"edges": self._places(variables)}}
            },
            "CommitArtifact": lambda: {"commitArtifact": {"artifact": self._commit(variables)}},
            "ServerInfo": lambda: {
                "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None},
            },
        }
        return answers[name]() if name in answers else {}

    # ---- artifacts ---------------------------------------------------------------------------

    def _artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifacts = self.server_state.artifacts
        artifacts.append(given["input"] | {"id": f"artifact-{len(artifacts)}", "committed": False})
        sequence = {"id": f"sequence-{len(artifacts)}", "latestArtifact": None}
        return {"id": artifacts[-1]["id"], "state": "PENDING", "artifactSequence": sequence}

    def _id_of(self, given: dict[str, Any]) -> str | None:
        found = [a["id"] for a in self.server_state.artifacts if a["clientID"] == given["clientID"]]
        return found[0] if found else None

    def _manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        manifest = given.get("artifactManifestID") or f"manifest-{given['artifactID']}"
        url = f"{self.server_state.url}/manifests/{manifest}"
        return {"id": manifest, "file": {"id": manifest, "uploadUrl": url, "uploadHeaders": []}}

    def _places(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        nodes = []
        for file in given["input"]["artifactFiles"]:
            path = f"{file['artifactID']}/{file['name']}"
            url = f"{self.server_state.url}/{path}"
            node = {"storagePath": path, "uploadUrl": url, "uploadHeaders": []}
            nodes.append(
                node | {"uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
            )
        return [{"node": node} for node in nodes]

    def _commit(self, given: dict[str, Any]) -> dict[str, Any]:
        (artifact,) = (a for a in self.server_state.artifacts if a["id"] == given["artifactID"])
        artifact["committed"] = True
        return {"id": artifact["id"], "digest": artifact["digest"]}

    def _resume(self, run: str) -> dict[str, Any] | None:
        """What the server says of a run that it has: null for one it has not."""
        history = self.server_state.history(run)
        if not history:
            return None
        return {
            "name": run,
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(history[-1])]),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(history[-1]),
            "config": "{}",
            "tags": [],
            "wandbConfig": "{}",
        }
