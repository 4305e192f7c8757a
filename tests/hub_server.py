"""A small hub on the loopback device: enough of its HTTP interface for push and pull."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {file: bytes}}; every request's method and path in `requests`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.commits: dict[str, int] = {}
        self.requests: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo}{self.commits.get(repo, 0)}".encode()).hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def _reply(self, status=200, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status, code, text):
        self._reply(status, {"error": text}, X_Error_Code=code, X_Error_Message=text)

    def do_POST(self):
        self.server.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "Unauthorized", "Invalid username or password.")
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] == "strangers":
                return self._fail(403, "Forbidden", "You don't have the rights")
            if repo in self.server.repos:
                return self._reply(409, {"error": "exists", "url": f"{self.server.address}/{repo}"})
            self.server.repos[repo] = {}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(repo)
            return self._reply(body={"url": f"{self.server.address}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self._reply(body={"errors": [], "warnings": []})
        repo, action = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path
        ).groups()
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._reply(body={"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        self.server.commits[repo] = self.server.commits.get(repo, 0) + 1
        sha = self.server.sha(repo)
        address = f"{self.server.address}/{repo}/commit/{sha}"
        return self._reply(body={"commitUrl": address, "commitOid": sha, "success": True})

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or tree or file
        repo = found[1] if found else ""
        if repo not in self.server.repos:
            return self._fail(404, "RepoNotFound", "Repository not found")
        sha = self.server.sha(repo)
        if found[2] not in (None, "main", sha):
            return self._fail(404, "RevisionNotFound", "Invalid rev id")
        files = self.server.repos[repo]
        if info:
            siblings = [{"rfilename": name} for name in files]
            return self._reply(body={"id": repo, "sha": sha, "siblings": siblings})
        if tree:
            listed = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": _digest(data),
                }
                for name, data in files.items()
            ]
            return self._reply(body=listed)
        if file[3] not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        data = files[file[3]]
        tag = f'"{_digest(data)}"'
        return self._reply(body=data, ETag=tag, X_Repo_Commit=sha)

    do_HEAD = do_GET
