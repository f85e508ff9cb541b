"""A Hub server on loopback with repositories in a folder: the requests of the `huggingface_hub` client, and failures.

A repository is one folder: `blobs/` by content hash, and `repository.json` with its branches and the tree of each
commit. Run as a script (`python hub_server.py FOLDER`), it prints its address and serves until it is stopped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_notARealTokenOnlyForTheLoopbackServer"
READ_TOKEN = "hf_notARealTokenThatMayOnlyRead0000000000"
USERS = {TOKEN: "write", READ_TOKEN: "read"}
# In place of a status: close the connection in the middle of a download, before anything else is done; or after it.
CUT, LOST = 0, -1
LARGE = (".safetensors", ".parquet")

Answer = tuple[int, Any]


class Refused(Exception):
    """Error response to a request: status, message, and the error code for the client."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server, a context manager; `fail` makes requests fail, `requests` counts them by "METHOD kind"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.cards: list[dict[str, Any]] = []
        self._failures: list[dict[str, Any]] = []
        self._lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, what: str, status: int, *, times: int = 1000, message: str = "refused by order") -> None:
        """Answer the next `times` requests of a kind (see `_ROUTES`) with `status`, or cut their connection."""
        self._failures.append({"what": what, "status": status, "times": times, "message": message})

    def heal(self) -> None:
        self._failures.clear()

    def failure(self, what: str) -> dict[str, Any] | None:
        with self._lock:
            for failure in self._failures:
                if failure["what"] == what and failure["times"]:
                    failure["times"] -= 1
                    return failure
        return None

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """The contents of a revision by path."""
        known = self._read(repository)
        tree = known["trees"][known["refs"].get(revision, revision)]
        return {path: self._blob(repository, entry["oid"]).read_bytes() for path, entry in tree.items()}

    def is_private(self, repository: str) -> bool:
        return bool(self._read(repository)["private"])

    def _blob(self, repository: str, oid: str) -> Path:
        return self.folder / repository / "blobs" / oid

    def _read(self, repository: str) -> dict[str, Any]:
        file = self.folder / repository / "repository.json"
        if not file.is_file():
            raise Refused(404, "Repository not found", "RepoNotFound")
        content: dict[str, Any] = json.loads(file.read_text())
        return content

    def _write(self, repository: str, content: dict[str, Any]) -> None:
        (self.folder / repository / "blobs").mkdir(parents=True, exist_ok=True)
        (self.folder / repository / "repository.json").write_text(json.dumps(content, indent=1))

    def _commit_of(self, repository: str, revision: str) -> tuple[str, dict[str, Any]]:
        known = self._read(repository)
        commit = known["refs"].get(revision, revision)
        if commit not in known["trees"]:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, known["trees"][commit]

    # Request handlers, with the groups of the route's pattern as arguments.

    def whoami(self, request: _Handler) -> Answer:
        role = request.role()
        return 200, {
            "type": "user",
            "name": "ana",
            "orgs": [{"type": "org", "name": "clinic", "roleInOrg": "write"}],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def create(self, request: _Handler) -> Answer:
        request.writes()
        asked = request.json()
        owner = asked.get("organization") or "ana"
        repository = f"{owner}/{asked['name']}"
        if owner not in ("ana", "clinic"):
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        with self._lock:
            if (self.folder / repository).exists():
                return 409, {"error": "You already created this model repo", "url": f"{self.address}/{repository}"}
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            first = hashlib.sha1(repository.encode()).hexdigest()
            self._write(repository, {"private": private, "refs": {"main": first}, "trees": {first: {}}})
        return 200, {"url": f"{self.address}/{repository}", "name": repository}

    def branch(self, request: _Handler, repository: str, branch: str) -> Answer:
        request.writes()
        with self._lock:
            known = self._read(repository)
            if branch in known["refs"]:
                raise Refused(409, "Reference already exists")
            known["refs"][branch] = known["refs"]["main"]
            self._write(repository, known)
        return 200, {}

    def info(self, request: _Handler, repository: str, revision: str | None = None) -> Answer:
        request.reads(self._read(repository)["private"])
        commit, tree = self._commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(tree)]
        private = self.is_private(repository)
        return 200, {"_id": "0", "id": repository, "sha": commit, "private": private, "tags": [], "siblings": siblings}

    def tree(self, request: _Handler, repository: str, revision: str) -> Answer:
        request.reads(self._read(repository)["private"])
        return 200, [
            {"type": "file", "path": path, "oid": entry["sha1"], "size": entry["size"]}
            | ({"lfs": {"oid": entry["oid"], "size": entry["size"], "pointerSize": 130}} if entry["large"] else {})
            for path, entry in self._commit_of(repository, revision)[1].items()
        ]

    def validate(self, request: _Handler) -> Answer:
        content = request.json()["content"]
        metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        self.cards.append(metadata)
        errors = list(_card_faults(metadata))
        return 400 if errors else 200, {"errors": [{"message": fault} for fault in errors], "warnings": []}

    def preupload(self, request: _Handler, repository: str, revision: str) -> Answer:
        request.writes()
        tree = self._commit_of(repository, revision)[1]
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": (entry := tree.get(file["path"])) and entry["oid" if entry["large"] else "sha1"],
                }
                for file in request.json()["files"]
            ]
        }

    def batch(self, request: _Handler, repository: str) -> Answer:
        request.writes()
        self._read(repository)
        objects = []
        for wanted in request.json()["objects"]:
            there = self._blob(repository, wanted["oid"]).is_file()
            href = f"{self.address}/upload/{repository}/{wanted['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{self.address}/verify/{repository}"}}
            objects.append(wanted | ({} if there else {"actions": actions}))
        return 200, {"transfer": "basic", "objects": objects}

    def xet(self, request: _Handler, repository: str, revision: str) -> Answer:
        request.writes()
        raise Refused(404, "xet storage is not served here")

    def upload(self, request: _Handler, repository: str, oid: str) -> Answer:
        content = request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content has another hash")
        self._blob(repository, oid).write_bytes(content)
        return 200, {}

    def verify(self, request: _Handler, repository: str) -> Answer:
        asked = request.json()
        blob = self._blob(repository, asked["oid"])
        if not blob.is_file() or blob.stat().st_size != asked["size"]:
            raise Refused(404, "Object not found")
        return 200, {}

    def commit(self, request: _Handler, repository: str, revision: str) -> Answer:
        request.writes()
        lines = [json.loads(line) for line in request.body().splitlines()]
        with self._lock:
            known = self._read(repository)
            parent, tree = self._commit_of(repository, revision)
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    oid = hashlib.sha256(content).hexdigest()
                    self._blob(repository, oid).write_bytes(content)
                elif line["key"] == "lfsFile":
                    oid = value["oid"]
                    if not self._blob(repository, oid).is_file():
                        raise Refused(400, f"LFS object {oid} is not there")
                    content = self._blob(repository, oid).read_bytes()
                else:
                    raise Refused(400, f"{line['key']} is not served here")
                sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                large = line["key"] == "lfsFile"
                tree[value["path"]] = {"oid": oid, "sha1": sha1, "size": len(content), "large": large}
            sha = hashlib.sha1(json.dumps([parent, sorted(tree.items())]).encode()).hexdigest()
            answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.address}/{repository}/commit/{sha}"}
            target = revision
            if request.query.get("create_pr") == ["1"]:
                number = 1 + sum(name.startswith("refs/pr/") for name in known["refs"])
                target = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.address}/{repository}/discussions/{number}"
            known["refs"][target] = sha
            known["trees"][sha] = tree
            self._write(repository, known)
        return 200, answer

    def resolve(self, request: _Handler, repository: str, revision: str, path: str) -> Answer:
        request.reads(self._read(repository)["private"])
        commit, tree = self._commit_of(repository, revision)
        if path not in tree:
            raise Refused(404, "Entry not found", "EntryNotFound")
        request.extra = {"X-Repo-Commit": commit, "ETag": f'"{tree[path]["oid"]}"', "Accept-Ranges": "bytes"}
        return 200, self._blob(repository, tree[path]["oid"]).read_bytes()


_R = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, tuple[str, str]] = {
    "whoami": ("GET", "/api/whoami-v2"),
    "create": ("POST", "/api/repos/create"),
    "validate": ("POST", "/api/validate-yaml"),
    "branch": ("POST", f"/api/models/{_R}/branch/([^/]+)"),
    "preupload": ("POST", f"/api/models/{_R}/preupload/([^/]+)"),
    "xet": ("GET", f"/api/models/{_R}/xet-write-token/([^/]+)"),
    "commit": ("POST", f"/api/models/{_R}/commit/([^/]+)"),
    "tree": ("GET", f"/api/models/{_R}/tree/([^/]+)"),
    "info": ("GET", f"/api/models/{_R}(?:/revision/([^/]+))?"),
    "batch": ("POST", rf"/{_R}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", f"/upload/{_R}/([0-9a-f]+)"),
    "verify": ("POST", f"/verify/{_R}"),
    "resolve": ("GET", f"/{_R}/resolve/([^/]+)/(.+)"),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Hub
    query: dict[str, list[str]]
    extra: dict[str, str]

    def body(self) -> bytes:
        return self._body

    def json(self) -> Any:
        return json.loads(self._body)

    def role(self) -> str:
        role = USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if role is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return role

    def writes(self) -> None:
        if self.role() != "write":
            raise Refused(403, "Forbidden: this token has no write access")

    def reads(self, private: bool) -> None:
        if private and USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer ")) is None:
            raise Refused(401, "Invalid username or password.", "RepoNotFound")

    def handle_any(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self._body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        self.query, self.extra = parse_qs(url.query), {}
        method = "GET" if self.command == "HEAD" else self.command
        for what, (known, pattern) in _ROUTES.items():
            if known == method and (found := re.fullmatch(pattern, url.path)):
                self.owner.requests[f"{self.command} {what}"] += 1
                return self._answer(what, [group and unquote(group) for group in found.groups()])
        self._send(404, b"{}", {"X-Error-Message": f"{self.command} {url.path} is not served here"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _answer(self, what: str, groups: list[str | None]) -> None:
        failure = self.owner.failure(what) if self.command != "HEAD" else None
        if failure and failure["status"] > 0:
            return self._send(failure["status"], json.dumps({"error": failure["message"]}).encode(), {})
        if failure and failure["status"] == CUT and what != "resolve":
            self.close_connection = True
            return
        try:
            serve: Callable[..., Answer] = getattr(self.owner, what)
            status, content = serve(self, *groups)
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            return self._send(refused.status, json.dumps({"error": str(refused)}).encode(), headers)
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or len(body) - 1), len(body) - 1)
            self.extra["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            status, body = 206, body[first : last + 1]
        self._send(status, body, self.extra, cut=failure is not None)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args: Any) -> None:
        """Nothing on standard error."""


def _card_faults(metadata: Any) -> list[str]:
    """Violations of the Hub's rules for model card metadata, as far as they can be checked locally.

    https://huggingface.co/docs/hub/model-cards#model-card-metadata
    """
    if not isinstance(metadata, dict):
        return ["metadata is no mapping"]
    faults = []
    kinds = {"tags": list, "license": str, "library_name": str, "pipeline_tag": str, "model-index": list}
    faults += [
        f"{key} is {metadata[key]!r}" for key in kinds.keys() & metadata if not isinstance(metadata[key], kinds[key])
    ]
    if not all(isinstance(tag, str) for tag in metadata.get("tags") or []):
        faults.append("tags are not all strings")
    base = metadata.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
        faults.append(f"base_model {base!r} is not on the Hub")
    for model in metadata.get("model-index") or []:
        if not model.get("name"):
            faults.append("a model of the model-index has no name")
        for result in model.get("results") or [{}]:
            if not result.get("task", {}).get("type"):
                faults.append("a result has no task")
            if not {"type", "name"} <= result.get("dataset", {}).keys():
                faults.append("a result has no data set")
            if not all({"type", "value"} <= metric.keys() for metric in result.get("metrics") or [{}]):
                faults.append("a metric has no value")
    return faults


if __name__ == "__main__":
    with Hub(Path(sys.argv[1])) as server:
        print(server.address, flush=True)
        threading.Event().wait()
