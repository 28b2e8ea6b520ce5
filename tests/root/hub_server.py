"""A stand-in for the hub on this machine: as much of its HTTP interface as pushing and reading a model takes.

Repositories with branches, tokens, large files kept by the hash of their content, one commit of many files. It can
be told to break off: `fail_after` large files it answers the next with an error.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_right"
READER = "hf_reader"
LARGE = (".safetensors", ".gguf")


class Hub:
    """What the server holds: repositories {name: {branch: {file: bytes}}}, and large files by hash."""

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.received: list[str] = []  # hashes of large files, each time one is sent
        self.commits = 0
        self.fail_after: int | None = None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def sha(repo: str, branch: str, files: dict[str, bytes]) -> str:
    """A commit's name: of what it holds."""
    return hashlib.sha1(
        repr((repo, branch, sorted((n, hashlib.sha1(d).digest()) for n, d in files.items()))).encode()
    ).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, value=None, headers=None, data: bytes | None = None):
        body = data if data is not None else json.dumps(value).encode()
        self.send_response(status)
        for name, content in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = ""):
        self.answer(
            status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        )

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may_write(self, repo: str) -> bool:
        if self.token() not in (TOKEN, READER):
            self.refuse(401, "Invalid credentials in Authorization header")
        elif self.token() == READER or not repo.startswith("me/"):
            self.refuse(403, "You don't have the rights to create a model under this namespace")
        else:
            return True
        return False

    def do_POST(self):
        path, data = unquote(self.path.partition("?")[0]), self.body()
        for pattern, method in POSTS.items():
            if found := re.fullmatch(pattern, path):
                return method(self, data, *found.groups())
        return self.refuse(404, f"no such place {path}")

    def create(self, data: bytes):
        asked = json.loads(data)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.may_write(repo):
            known = repo in self.hub.repos
            if not known:
                self.hub.repos[repo] = {"main": {}}
                self.hub.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.answer(409 if known else 200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self, data: bytes):
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, data: bytes, repo: str, name: str):
        if self.may_write(repo):
            branches = self.hub.repos[repo]
            known = name in branches
            branches.setdefault(name, dict(branches["main"]))
            self.answer(409 if known else 201, {})

    def preupload(self, data: bytes, repo: str, branch: str):
        names = [file["path"] for file in json.loads(data)["files"]]
        modes = ["lfs" if name.endswith(LARGE) else "regular" for name in names]
        files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
        self.answer(200, {"files": files})

    def batch(self, data: bytes, repo: str):
        objects = []
        for wanted in json.loads(data)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/put/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        self.answer(200, {"transfer": "basic", "objects": objects}, kind)

    def commit_lines(self, data: bytes, repo: str, branch: str):
        if self.may_write(repo):
            self.commit(repo, branch, [json.loads(line) for line in data.splitlines() if line])

    def commit(self, repo: str, branch: str, lines):
        files = dict(self.hub.repos[repo][branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        self.hub.repos[repo][branch] = files
        self.hub.commits += 1
        oid = sha(repo, branch, files)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def do_PUT(self):
        data, oid = self.body(), self.path.rpartition("/")[2]
        if self.hub.fail_after is not None and len(self.hub.received) >= self.hub.fail_after:
            return self.refuse(400, "the line broke")
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self.hub.received.append(oid)
        return self.answer(200, {})

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self.describe(found[1], found[2], found[3] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            for branch, files in self.hub.repos.get(found[1], {}).items():
                oid = sha(found[1], branch, files)
                if found[2] in (branch, oid) and found[3] in files:
                    data = files[found[3]]
                    tag = f'"{hashlib.sha256(data).hexdigest()}"'
                    return self.answer(200, headers={"ETag": tag, "X-Repo-Commit": oid}, data=data)
            return self.refuse(404, "no such file", "EntryNotFound")
        return self.refuse(404, f"no such place {path}")

    def do_HEAD(self):
        self.do_GET()

    def describe(self, repo: str, kind: str | None, branch: str):
        """A repository at a branch or commit: its files, or what it is."""
        if repo not in self.hub.repos:
            return self.refuse(404, "Repository not found", "RepoNotFound")
        named = {sha(repo, name, files): files for name, files in self.hub.repos[repo].items()}
        files = self.hub.repos[repo].get(branch, named.get(branch))
        if files is None:
            return self.refuse(404, "no such revision", "RevisionNotFound")
        if kind == "tree":
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            return self.answer(
                200, [{"type": "file", "path": n, "size": len(d), "oid": oids[n]} for n, d in files.items()]
            )
        oid = branch if branch in named else sha(repo, branch, files)
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": oid, "private": self.hub.private[repo]}
        return self.answer(200, info | {"siblings": [{"rfilename": name} for name in files], "tags": []})


POSTS = {
    r"/api/repos/create": _Handler.create,
    r"/api/validate-yaml": _Handler.validate,
    r"/api/models/([^/]+/[^/]+)/branch/(.+)": _Handler.branch,
    r"/api/models/([^/]+/[^/]+)/preupload/(.+)": _Handler.preupload,
    r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": _Handler.batch,
    r"/api/models/([^/]+/[^/]+)/commit/(.+)": _Handler.commit_lines,
}
