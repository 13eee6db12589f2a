"""A Hugging Face Hub on the loopback: as much of its HTTP interface as pushing and loading models takes, in memory.

For tests only. Clients find it through HF_ENDPOINT, which huggingface_hub reads once on import: set it for a new
process, and HF_HUB_DISABLE_XET=1 beside it, for files are uploaded in the two older ways, inside the commit and by Git
LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
"""What a client has to send to write, and to read private repositories."""


class Refused(Exception):
    """An answer other than 200: the status, the Hub's name of the error (or None), what the client is told."""


class BrokenOff(Exception):
    """No answer at all."""


class Repo:
    """Commits as {path: bytes}, and the branches that point to them."""

    def __init__(self, name: str, private: bool) -> None:
        self.name, self.private = name, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.messages: list[str] = []
        self.lfs: set[bytes] = set()
        """Contents that came by Git LFS; their etag is the sha256, and that of others the id of Git's blob."""
        self.commit("main", {".gitattributes": b""})

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        """Moves a branch to a new commit with these files."""
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """{path: bytes} at a branch or commit."""
        return self.commits[self.sha(revision)]

    def sha(self, revision: str) -> str:
        """The commit that a branch or commit hash names."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def oid(self, data: bytes) -> str:
        """The etag of a content."""
        git = hashlib.sha1(b"blob %d\0" % len(data) + data)
        return hashlib.sha256(data).hexdigest() if data in self.lfs else git.hexdigest()


class LoopbackHub(ThreadingHTTPServer):
    """The server: `repos` is what it holds, `requests` the lines it was asked.

    Args:
        regular: repositories whose files are all uploaded inside the commit.
        mute: repositories that cannot be created because the connection breaks off.
        meeting: repositories whose first two commits wait for one another, so that both have the same parent.

    What goes wrong is set on the server and counted down: `cuts` {"me/x/file": times} breaks a download off in the
    middle (until /heal is asked for), `truncates` {"me/x": times} loses the end of an upload by LFS, and `meanwhile`
    {("me/x", message): change} runs right before a commit with this message is looked at, once.
    """

    daemon_threads = True

    def __init__(
        self, regular: tuple[str, ...] = (), mute: tuple[str, ...] = (), meeting: tuple[str, ...] = ()
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.regular, self.mute = regular, mute
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.cuts: dict[str, int] = {}
        self.truncates: dict[str, int] = {}
        self.meanwhile: dict[tuple[str, str], Callable[[Repo], Any]] = {}
        self.meetings = {name: threading.Barrier(2, timeout=90) for name in meeting}

    def meet(self, path: str) -> None:
        """Holds the first two commits of a repository until both are there."""
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path)
        barrier = self.meetings.get(found[1]) if found else None
        if barrier is not None:
            barrier.wait()
            self.meetings.clear()

    def still(self, what: dict[str, int], name: str) -> bool:
        """Whether something goes wrong this time, counted down; a negative number is for ever."""
        left = what.get(name, 0)
        what[name] = left - 1 if left > 0 else left
        return left != 0

    def uploads_by_lfs(self, repo: Repo, path: str) -> bool:
        """As the real Hub decides for safetensors, by the name."""
        return path.endswith(".safetensors") and repo.name not in self.regular


@contextlib.contextmanager
def serving(**repos: tuple[str, ...]) -> Iterator[LoopbackHub]:
    """A hub that answers inside the block; the arguments are those of `LoopbackHub`."""
    with LoopbackHub(**repos) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request: the paths of the Hub's interface, mapped to methods."""

    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps stderr quiet."""

    def handle_any(self) -> None:
        """Answers, with the Hub's error headers where it refuses."""
        self.body = self.read_body()
        self.url = urlsplit(self.path)
        self.stops_at: int | None = None
        if self.command == "POST":
            self.server.meet(unquote(self.url.path))
        with self.server.lock:
            self.server.requests.append(f"{self.command} {unquote(self.url.path)}")
            try:
                status, data, headers = self.route(unquote(self.url.path).strip("/"))
            except BrokenOff:
                self.close_connection = True
                return
            except Refused as refused:
                status, code, message = refused.args
                answer = {"error": message, "errors": [{"message": line} for line in message.splitlines()]}
                data, headers = json.dumps(answer).encode(), {"X-Error-Message": message.partition("\n")[0]}
                headers |= {"X-Error-Code": code} if code else {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: self.stops_at])
            self.close_connection |= self.stops_at is not None

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        """What the client sent, in one piece or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def route(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of the answer."""
        path = path.removeprefix("datasets/").replace("api/datasets/", "api/models/", 1)  # told apart by name alone
        if path.startswith("lfs/"):
            return self.lfs_object(path.removeprefix("lfs/"))
        if self.command == "POST" and path != "api/validate-yaml":
            self.demand_token()
        if path == "heal":
            self.server.cuts.clear()
            return as_json({})
        if path.endswith(".git/info/lfs/objects/batch"):
            return as_json(self.lfs_batch(self.repo(path.partition(".git/")[0])))
        if path == "api/repos/create":
            return self.create(json.loads(self.body))
        if path == "api/validate-yaml":
            if problems := card_problems(json.loads(self.body)["content"]):
                raise Refused(400, None, "\n".join(problems))
            return as_json({"errors": [], "warnings": []})
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/", 3)
            action, argument = (*rest, "", "")[:2]
            methods = {"GET": ("info", "revision", "tree"), "POST": ("preupload", "commit", "branch")}
            if (action or "info") in methods.get(self.command, ()):
                return as_json(getattr(self, action or "info")(self.repo(f"{owner}/{name}"), argument or "main"))
        elif len(parts := path.split("/", 4)) == 5 and parts[2] == "resolve":
            return self.resolve(self.repo("/".join(parts[:2])), parts[3], parts[4])
        raise Refused(404, None, f"no such address: {self.command} {path}")

    def demand_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, None, "Invalid username or password.")

    def repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        if repo.private:
            self.demand_token()
        return repo

    def create(self, request: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if name in self.server.mute:
            raise BrokenOff
        answer = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repos:
            return as_json({**answer, "error": "You already created this model repo"}, status=409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.server.repos[name] = Repo(name, private)
        return as_json(answer)

    def info(self, repo: Repo, revision: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in repo.files(revision)]
        return {"id": repo.name, "sha": repo.sha(revision), "private": repo.private, "siblings": siblings, "tags": []}

    revision = info

    def tree(self, repo: Repo, revision: str) -> list[dict[str, Any]]:
        def entry(path: str, data: bytes) -> dict[str, Any]:
            lfs = {"lfs": {"oid": repo.oid(data), "size": len(data), "pointerSize": 130}} if data in repo.lfs else {}
            return {"type": "file", "path": path, "oid": repo.oid(data)[:40], "size": len(data), **lfs}

        return [entry(path, data) for path, data in repo.files(revision.partition("/")[0]).items()]

    def branch(self, repo: Repo, name: str) -> dict[str, Any]:
        if name in repo.refs:
            raise Refused(409, None, f"Reference already exists: {name}")
        repo.refs[name] = repo.refs["main"]
        return {}

    def preupload(self, repo: Repo, revision: str) -> dict[str, Any]:
        there = repo.files(revision)
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if self.server.uploads_by_lfs(repo, path) else "regular",
                    "shouldIgnore": False,
                    "oid": repo.oid(there[path]) if path in there else None,
                }
                for path in (file["path"] for file in json.loads(self.body)["files"])
            ]
        }

    def commit(self, repo: Repo, revision: str) -> dict[str, Any]:
        entries = [json.loads(line) for line in self.body.splitlines()]
        if change := self.server.meanwhile.pop((repo.name, entries[0]["value"]["summary"]), None):
            change(repo)
        files = dict(repo.files(revision))
        for kind, value in ((entry["key"], entry["value"]) for entry in entries):
            if kind == "header":
                if value.get("parentCommit") not in (None, repo.sha(revision)):
                    raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                repo.lfs.add(files[value["path"]])
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        added = any(value.get("path") == "README.md" for value in (entry["value"] for entry in entries))
        if added and (problems := card_problems(files["README.md"].decode())):
            raise Refused(400, None, "\n".join(problems))
        proposed = parse_qs(self.url.query).get("create_pr") == ["1"]
        sha = repo.commit("refs/pr/1" if proposed else revision, files)
        repo.messages.append(entries[0]["value"]["summary"])
        page = f"{self.server.url}/{repo.name}"
        proposal = {"pullRequestUrl": f"{page}/discussions/1"} if proposed else {}
        return {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "hookOutput": "", **proposal}

    def lfs_batch(self, repo: Repo) -> dict[str, Any]:
        def links(oid: str) -> dict[str, Any]:  # to where the bytes go, which takes them without a token
            return {action: {"href": f"{self.server.url}/lfs/{repo.name}/{oid}"} for action in ("upload", "verify")}

        objects = json.loads(self.body)["objects"]
        return {"transfer": "basic", "objects": [{**item, "actions": links(item["oid"])} for item in objects]}

    def lfs_object(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        name, _, oid = path.rpartition("/")
        if self.command == "PUT":
            if self.server.still(self.server.truncates, name):
                self.body = self.body[:-100]
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, None, "the content is not what its oid says")
            self.server.objects[oid] = self.body
        return 200, b"", {}

    def resolve(self, repo: Repo, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        sha = repo.sha(revision)
        if path not in repo.commits[sha]:
            raise Refused(404, "EntryNotFound", f"Entry not found: {path}")
        data = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{repo.oid(data)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = min(int(asked[1]), len(data)) if asked else 0
        if self.command == "GET" and self.server.still(self.server.cuts, f"{repo.name}/{path}"):
            self.stops_at = 0 if start else len(data) // 2  # what comes after an interruption gets nothing at all
        if asked:
            return 206, data[start:], {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return 200, data, headers


def as_json(answer: Any, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    """An answer in JSON."""
    return status, json.dumps(answer).encode(), {"Content-Type": "application/json"}


LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "bsd-3-clause", "gpl-3.0", "other", "unknown")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
TASKS = ("zero-shot-image-classification", "image-classification", "image-feature-extraction")


def card_problems(card: str) -> list[str]:
    """What the Hub says of a card's header, for the fields that we write."""
    found = re.match(r"\ufeff?\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if found is None:
        return []
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML Parse Error: {' '.join(str(error).split())}"]
    if not isinstance(header, dict):
        return ["the metadata must be an object"]
    problems = [
        f'"{field}" must be one of {known}'
        for field, known in (("license", LICENCES), ("base_model_relation", RELATIONS), ("pipeline_tag", TASKS))
        if field in header and header[field] not in known
    ]
    for field in ("tags", "datasets", "metrics"):
        value = header.get(field, [])
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            problems.append(f'"{field}" must be a list of strings')
    ids = [str(id) for id in (header.get("base_model"), *(header.get("datasets") or [])) if id is not None]
    problems += [
        f'"{id}" is no id' for id in ids if id is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(id))
    ]
    for model in header.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            problems.append('"model-index" needs names and results')
        for result in model.get("results", []):
            known = [result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")]
            known += [metric.get("type") for metric in result["metrics"]]
            if not all(isinstance(name, str) and name for name in known):
                problems.append('"model-index" needs types of task, data set and metric')
            if not all(isinstance(metric.get("value"), (int, float)) for metric in result["metrics"]):
                problems.append('"model-index" needs a value of every metric')
    return problems
