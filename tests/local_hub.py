"""A Hub on the loopback interface, over real HTTP, that checks what the Hub checks and fails when it is told to.

It speaks what `huggingface_hub` 2 speaks without Xet: repositories, branches, commits, the LFS batch API with its
uploads, and downloads. Nothing is kept on disk.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# What the Hub writes into a new repository; the patterns that matter here.
GITATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n"
    for suffix in (".bin", ".ckpt", ".msgpack", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors", ".zip")
)
LARGEST_REGULAR_FILE = 10 * 1024 * 1024


@dataclass
class User:
    """Whom a token belongs to; `role` is "write" or "read"."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()


@dataclass
class File:
    """One file of a commit: its bytes, and whether LFS keeps them."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub compares: sha256 of an LFS file, otherwise the hash of the git blob."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, File]


@dataclass
class Repository:
    """A model, a Space or a data set."""

    kind: str
    private: bool
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # what LFS keeps, by sha256

    def add_commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        tree = "".join(f"{path}{file.oid}" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}{message}{tree}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """Path and content of every file that was pushed."""
        return {path: file.content for path, file in self.at(branch).files.items() if path != ".gitattributes"}

    def history(self, branch: str = "main") -> list[str]:
        """Commits of a branch, the latest first."""
        oids, oid = [], self.branches[branch]
        while oid is not None:
            oids.append(oid)
            oid = self.commits[oid].parent
        return oids


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path fit."""

    pattern: str
    method: str
    times: int
    status: int | None = None  # answer this instead
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    after_bytes: int | None = None  # read so much of the request, then hang up
    lose_answer: bool = False  # do what was asked, then hang up


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HangUp(Exception):
    """The connection is to be cut."""


class LocalHub:
    """The server and everything it keeps.

    Attributes:
        endpoint: Its address, for `HF_ENDPOINT`.
        users: Whom each token belongs to. The token "hf_writer" is that of the user `me`, who may write.
        repositories: By kind ("model", "space", "dataset") and id.
        requests: `(method, path, status or None if cut, token or None)` of every request, in order.
    """

    def __init__(self) -> None:
        self.users = {
            "hf_writer": User("me", organizations=("team",)),
            "hf_reader": User("me", role="read"),
            "hf_other": User("someone-else"),
        }
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, int | None, str | None]] = []
        self.faults: list[Fault] = []
        self.paying = True  # False: gradio Spaces cost money
        self.signatures: dict[str, tuple[Repository, str, int]] = {}
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # the default poll of half a second is what closing a server would wait for
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Stop; later requests are refused by the operating system."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def model(self, repo_id: str) -> Repository:
        return self.repositories["model", repo_id]

    def space(self, repo_id: str) -> Repository:
        return self.repositories["space", repo_id]

    def add_dataset(self, repo_id: str, files: dict[str, str], private: bool = False) -> str:
        """Put a data set there; returns its revision."""
        repository = self.repositories["dataset", repo_id] = Repository("dataset", private)
        content = {path: File(text.encode(), lfs=False) for path, text in files.items()}
        return repository.add_commit("main", "data", content).oid

    def fail(self, pattern: str, status: int, *, method="*", times=1, headers=None, body=b'{"error": "no"}') -> None:
        """Answer the next `times` requests whose path contains `pattern` with an error."""
        self.faults.append(Fault(pattern, method, times, status, headers or {}, body))

    def cut(self, pattern: str, *, after_bytes: int, method="*", times=1) -> None:
        """Hang up on the next `times` such requests when `after_bytes` of their body were read."""
        self.faults.append(Fault(pattern, method, times, after_bytes=after_bytes))

    def lose_answer(self, pattern: str, *, method="*", times=1) -> None:
        """Do what the next `times` such requests ask and hang up before the answer."""
        self.faults.append(Fault(pattern, method, times, lose_answer=True))

    def asked(self, pattern: str, method: str = "*") -> list[tuple[str, str, int | None, str | None]]:
        """The requests whose path contains `pattern`."""
        return [entry for entry in self.requests if pattern in entry[1] and method in ("*", entry[0])]

    def environment(self, home, token: str | None = None, **variables: str) -> dict[str, str]:
        """Variables for a fresh process that knows no other Hub and no other token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        ours = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # evaluate would ask another host
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        return kept | ours | ({"HF_TOKEN": token} if token else {}) | variables

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("*", method) and fault.pattern in path:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the client to acknowledge the headers

    def log_message(self, *_args) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = unquote(url.path)
        fault = self.hub.take_fault(self.command, path)
        status = None
        try:
            if fault is not None and fault.after_bytes is not None:
                self.rfile.read(min(fault.after_bytes, int(self.headers.get("Content-Length") or 0)))
                raise HangUp
            body = self.read_body()
            if fault is not None and fault.status is not None:
                status = fault.status
                self.answer(status, fault.body, fault.headers)
                return
            status, content, headers = self.outcome(url.path, body)
            if fault is not None and fault.lose_answer:
                raise HangUp
            self.answer(status, content, headers)
        except HangUp:
            status = None
            self.hang_up()
        finally:
            self.hub.requests.append((self.command, path, status, self.token()))

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def outcome(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        try:
            with self.hub.lock:
                answer = self.route(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            return refusal.status, json.dumps({"error": refusal.message}).encode(), headers
        if isinstance(answer, tuple):
            return answer
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}

    def route(self, path: str, body: bytes):
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                found = {name: unquote(value) for name, value in match.groupdict().items() if value}
                return action(self, body, **found)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    # What is asked -------------------------------------------------------------------------------------------------

    def whoami(self, _body):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"name": user.name, "type": "user", "orgs": [{"name": name} for name in user.organizations]}

    def create(self, body):
        wanted = json.loads(body)
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        kind, namespace = wanted.get("type", "model"), wanted.get("organization") or user.name
        repo_id = f"{namespace}/{wanted['name']}"
        if user.role != "write" or namespace not in (user.name, *user.organizations):
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.endpoint}/{prefix}{repo_id}", "name": repo_id}
        if (kind, repo_id) in self.hub.repositories:
            return 409, json.dumps(answer | {"error": f"You already created this {kind} repo"}).encode(), {}
        if kind == "space" and wanted.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, f"Invalid sdk {wanted.get('sdk')!r}")
        if wanted.get("sdk") in ("gradio", "docker") and not self.hub.paying:
            raise Refusal(402, "Gradio Spaces on cpu-basic need a PRO subscription")
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))  # newer and older clients
        repository = Repository(kind, private, wanted.get("sdk"))
        repository.add_commit("main", "initial commit", {".gitattributes": File(GITATTRIBUTES.encode(), lfs=False)})
        self.hub.repositories[kind, repo_id] = repository
        return answer

    def validate_yaml(self, body):
        wanted = json.loads(body)
        errors = metadata_errors(wanted["content"], wanted["repoType"])
        if errors:
            return 400, json.dumps({"errors": [{"message": error} for error in errors], "warnings": []}).encode(), {}
        return {"errors": [], "warnings": []}

    def branch(self, body, kind, repo_id, branch):
        repository = self.repository(kind, repo_id, write=True)
        start = json.loads(body).get("startingPoint", "main")
        if branch.startswith("refs/") or re.search(r"[\s~^:?*\[\\]|\.\.|^-|/$|\.lock$", branch):
            raise Refusal(400, f"Invalid reference for a branch: {branch}")
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        repository.branches[branch] = self.commit_at(repository, start).oid
        return {}

    def refs(self, _body, kind, repo_id):
        repository = self.repository(kind, repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def info(self, _body, kind, repo_id, revision="main"):
        repository = self.repository(kind, repo_id)
        commit = self.commit_at(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        answer = {"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings, "tags": []}
        readme = commit.files.get("README.md")
        front_matter = re.match(r"---\n(.*?)\n---\n", readme.content.decode(), flags=re.DOTALL) if readme else None
        answer |= {
            "gated": False,
            "lastModified": "2020-01-01T00:00:00.000Z",
            "cardData": yaml.safe_load(front_matter[1]) if front_matter else {},
        }
        return answer | ({"modelId": repo_id} if kind == "model" else {"sdk": repository.sdk})

    def tree(self, _body, kind, repo_id, revision, folder=""):
        commit = self.commit_at(self.repository(kind, repo_id), revision)
        entries = []
        for path, file in sorted(commit.files.items()):
            if path.startswith(f"{folder}/" if folder else ""):
                entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                lfs = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
                entries.append(entry | ({"lfs": lfs} if file.lfs else {}))
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return entries

    def preupload(self, body, kind, repo_id, revision):
        repository = self.repository(kind, repo_id, write=True)
        commit = self.commit_at(repository, revision)
        files = []
        for file in json.loads(body)["files"]:
            lfs = self.is_lfs(commit, file["path"], file["size"], base64.b64decode(file["sample"]))
            known = commit.files.get(file["path"])
            mode = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append(mode | ({"oid": known.oid} if known else {}))
        return {"files": files, "commitOid": commit.oid}

    def batch(self, body, repo_id, kind="model"):
        repository = self.repository(kind.rstrip("s"), repo_id, write=True)
        wanted = json.loads(body)
        if wanted.get("operation") != "upload" or wanted.get("hash_algo") != "sha256":
            raise Refusal(422, "Only uploads hashed with sha256 are known")
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repository.objects:
                signature = secrets.token_hex(8)
                self.hub.signatures[signature] = (repository, item["oid"], item["size"])
                href = f"{self.hub.endpoint}/_storage/{item['oid']}?signature={signature}"
                verify = f"{self.hub.endpoint}/_verify/{kind.rstrip('s')}/{repo_id}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def store(self, body, oid):
        repository, expected, size = self.hub.signatures.get(self.query["signature"][0], (None, None, None))
        if repository is None or expected != oid:
            raise Refusal(403, "SignatureDoesNotMatch")
        if len(body) != size:
            raise Refusal(400, f"Expected {size} bytes, found {len(body)}")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "The SHA256 of the content is not the one that was declared")
        repository.objects[oid] = body
        return {}

    def verify(self, body, kind, repo_id):
        wanted = json.loads(body)
        content = self.repository(kind, repo_id, write=True).objects.get(wanted["oid"])
        if content is None:
            raise Refusal(404, "Object not found")
        if len(content) != wanted["size"]:
            raise Refusal(422, f"Expected {wanted['size']} bytes, found {len(content)}")
        return {}

    def commit(self, body, kind, repo_id, revision):
        repository = self.repository(kind, repo_id, write=True)
        if revision not in repository.branches:
            if repository.at(revision):
                raise Refusal(400, f"{revision} is a commit, not a branch")
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = repository.at(revision)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, parent.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self.apply(repository, files, operation["key"], operation["value"])
        readme = files.get("README.md")
        errors = metadata_errors(readme.content.decode(), kind) if readme else []
        if errors:
            raise Refusal(400, "; ".join(errors))
        # An unchanged tree still becomes a commit, as on the Hub: the client has to notice.
        commit = repository.add_commit(revision, header["value"]["summary"], files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""}

    def apply(self, repository, files, key, value):
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/") or path.split("/")[0] == ".git":
            raise Refusal(400, f"Invalid path {path!r}")
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if self.is_lfs(Commit("", None, "", files), path, len(content), content[:512]) and content:
                raise Refusal(400, f"Your push was rejected because {path} must be an LFS file")
            files[path] = File(content, lfs=False)
        elif key == "lfsFile":
            content = repository.objects.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise Refusal(422, f"The LFS pointer of {path} points to a file that does not exist")
            files[path] = File(content, lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            raise Refusal(400, f"Unknown operation {key}")

    def resolve(self, _body, repo_id, revision, path, kind="models"):
        commit = self.commit_at(self.repository(kind.rstrip("s"), repo_id), revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            return 404, b"Entry not found", headers | {"X-Error-Code": "EntryNotFound", "Content-Type": "text/plain"}
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not found:
            return 200, file.content, headers
        start, stop = int(found[1]), int(found[2] or len(file.content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(file.content)}"
        return 206, file.content[start:stop], headers

    # Who asks, and for what ----------------------------------------------------------------------------------------

    def token(self) -> str | None:
        found = re.fullmatch(r"Bearer (.+)", self.headers.get("Authorization") or "")
        return found[1] if found else None

    def user(self) -> User | None:
        token = self.token()
        if token is not None and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def repository(self, kind: str, repo_id: str, write: bool = False) -> Repository:
        user, found = self.user(), self.hub.repositories.get((kind, repo_id))
        member = user is not None and repo_id.split("/")[0] in (user.name, *user.organizations)
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if found is None or (found.private and not member):  # a private one does not show that it is there
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and not (member and user.role == "write"):
            raise Refusal(403, f"You don't have write access to {repo_id}")
        return found

    @staticmethod
    def commit_at(repository: Repository, revision: str) -> Commit:
        commit = repository.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    @staticmethod
    def is_lfs(commit: Commit, path: str, size: int, sample: bytes) -> bool:
        attributes = commit.files.get(".gitattributes", File(b"", lfs=False)).content.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        named = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        return named or size > LARGEST_REGULAR_FILE or b"\0" in sample

    # Bytes ---------------------------------------------------------------------------------------------------------

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise HangUp
            return body
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def hang_up(self) -> None:
        self.close_connection = True
        # no time to linger: the peer sees a reset, as when a machine goes away
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)


def metadata_errors(content: str, kind: str) -> list[str]:
    """What the Hub says of the front matter of a README."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, flags=re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error.__class__.__name__}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    errors = []
    if kind == "space":
        if data.get("sdk") not in ("gradio", "docker", "static"):
            errors.append('"sdk" must be one of [gradio, docker, static]')
        if data.get("sdk") == "gradio" and not isinstance(data.get("sdk_version", ""), str):
            errors.append('"sdk_version" must be a string')
        colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
        errors += [f'"{key}" is not a color' for key in ("colorFrom", "colorTo") if data.get(key, "red") not in colors]
    for entry in data.get("model-index") or []:
        if not entry.get("name") or not isinstance(entry.get("results"), list):
            errors.append('"model-index" needs a name and results')
    return errors


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>model|space|dataset)s/{_REPO}"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("GET HEAD", rf"{_API}(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/((?P<kind>spaces)/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/_storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", rf"/_verify/(?P<kind>model|space)/{_REPO}", _Handler.verify),
    ("GET HEAD", rf"/((?P<kind>spaces|datasets)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
