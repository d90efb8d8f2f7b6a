"""The hub's HTTP: routes, answers, and the two servers, the hub itself and the one that large files come from."""

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from .faults import Fault
from .repository import Objects, RefusedError, Repository, is_lfs

PIECE = 1 << 16
DATE = "2026-01-01T00:00:00.000Z"
KINDS = ("model", "dataset", "space")


@dataclass
class Event:
    """One request.

    Attributes:
        number: counts all requests of the hub, from 0.
        host: ``hub``, or ``cdn`` for the server that large files come from and go to.
        method: as sent.
        path: decoded, without the query.
        query: by name.
        range: its ``Range``, or empty.
        authorized: whether it carried a token.
        begun: when it came, in seconds of ``time.monotonic()``.
        ended: when its answer was sent, or None.
        status: of the answer; 0 before, and if the connection was dropped without one.
        sent: bytes of the answer's body.
        received: bytes of the request's body.
    """

    number: int
    host: str
    method: str
    path: str
    query: dict = field(default_factory=dict)
    range: str = ""
    authorized: bool = False
    begun: float = 0.0
    ended: float | None = None
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Identity:
    """Whose token it is, what he may write to, and whether the token may write at all."""

    name: str
    namespaces: tuple
    may_write: bool


@dataclass
class Answer:
    """Status, headers, and a body: bytes, or a file with the range of it that is sent."""

    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes | Path = b""
    begin: int = 0
    end: int | None = None

    @classmethod
    def of_json(cls, document, status=200, headers=()):
        """Returns an answer that is a JSON document."""
        return cls(status, {"Content-Type": "application/json", **dict(headers)}, json.dumps(document).encode())

    @property
    def length(self):
        """Bytes of the body."""
        if isinstance(self.body, bytes):
            return len(self.body)
        return (self.body.stat().st_size if self.end is None else self.end) - self.begin


class DroppedError(Exception):
    """The connection is to be closed here and now."""


ROUTES = []


def route(method, pattern, host="hub"):
    """Registers a method of `LoopbackHub` for requests whose encoded path matches."""

    def register(function):
        ROUTES.append((host, method, re.compile(pattern), function))
        return function

    return register


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset|space)s/{_ID}"
_REVISION = r"(?P<revision>[^/]+)"
_KIND = r"(?:/(?P<kind>dataset|space)s)?"


class LoopbackHub:
    """The hub; a context manager.

    Attributes:
        endpoint: for ``HF_ENDPOINT``.
        token: of ``user``, who may write to his own namespace and that of ``organization``.
        read_token: of the same user, for reading only.
        stranger_token: of a user who owns nothing.
        multipart_from: uploads of at least so many bytes are asked for in parts of ``part_size``.
        page_size: entries of one page of a listing.
    """

    def __init__(self, folder):
        self.user, self.organization = "ada", "org"
        self.token, self.read_token, self.stranger_token = (f"hf_{secrets.token_hex(17)}" for _ in range(3))
        both = (self.user, self.organization)
        self.identities = {
            self.token: Identity(self.user, both, True),
            self.read_token: Identity(self.user, both, False),
            self.stranger_token: Identity("eve", ("eve",), True),
        }
        self.objects = Objects(folder / "objects")
        self.multipart_from, self.part_size, self.page_size = 50_000_000, 16_000_000, 1000
        self.moved = {}
        self._repositories = {}
        self._faults = []
        self._events = []
        self._parts = {}
        self._signature = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._servers = {name: _Server(self, name) for name in ("hub", "cdn")}
        self.endpoint, self._cdn = (f"http://127.0.0.1:{each.server_port}" for each in self._servers.values())

    def __enter__(self):
        self._threads = [
            threading.Thread(target=each.serve_forever, args=(0.01,), daemon=True) for each in self._servers.values()
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error):
        for fault in self._faults:
            if fault.hold:
                fault.hold.set()
        for server in self._servers.values():
            server.shutdown()
            server.close_connections()
            server.server_close()
        for thread in self._threads:
            thread.join()

    # --- for tests ------------------------------------------------------------------------------------------

    def add_repository(self, repo_id, files=(), *, kind="model", private=False, gated=False):
        """Makes a repository; ``files`` is a folder, or bytes or paths by name."""
        repository = Repository(repo_id, self.objects, kind=kind, private=private, gated=gated)
        self._repositories[kind, repo_id] = repository
        if isinstance(files, Path):
            files = {each.relative_to(files).as_posix(): each for each in files.rglob("*") if each.is_file()}
        if files:
            repository.add(files)
        return repository

    def repository(self, repo_id, kind="model"):
        """Returns a repository; a KeyError if there is none."""
        return self._repositories[kind, repo_id]

    def repositories(self):
        """Returns the ids of all models."""
        return [repo_id for kind, repo_id in self._repositories if kind == "model"]

    def misbehave(self, path="*", **fault):
        """Lets chosen requests go wrong from now on; see `Fault`. Returns it."""
        self._faults.append(Fault(path, **fault))
        return self._faults[-1]

    def behave(self):
        """Ends all misbehaviour."""
        self._faults.clear()

    def requests(self, method="*", path="*"):
        """Returns the requests so far that match both shell patterns, in the order they came."""
        with self._lock:
            events = list(self._events)
        return [each for each in events if fnmatchcase(each.method, method) and fnmatchcase(each.path, path)]

    def wait_until_idle(self):
        """Returns when every request has ended; a client may have its answer a moment before that."""
        deadline = time.monotonic() + 10
        while any(each.ended is None for each in self.requests()):
            assert time.monotonic() < deadline, "a request does not end"
            time.sleep(0.001)

    def forget_requests(self):
        """Forgets the requests so far."""
        with self._lock:
            self._events.clear()

    # --- one request ----------------------------------------------------------------------------------------

    def begin(self, host, method, path, query, headers):
        """Notes a request; returns its event and the faults that strike it."""
        event = Event(0, host, method, path, query, headers.get("Range", ""), "Authorization" in headers)
        with self._lock:
            event.number, event.begun = len(self._events), time.monotonic()
            self._events.append(event)
        return event, [fault for fault in list(self._faults) if fault.strikes(method, path)]

    def answer(self, request):
        """Returns the answer to a request."""
        try:
            request.identity = self._identity(request)
            for host, method, pattern, function in ROUTES:
                match = pattern.fullmatch(request.raw_path)
                if host == request.host and method == request.method and match:
                    return function(
                        self, request, **{key: unquote(value or "") for key, value in match.groupdict().items()}
                    )
            return _refusal(RefusedError(404, f"no such page: {request.method} {request.raw_path}"))
        except RefusedError as refused:
            return _refusal(refused)

    def _identity(self, request):
        header = request.headers.get("Authorization")
        if header is None:
            return None
        identity = self.identities.get(header.removeprefix("Bearer "))
        if identity is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return identity

    def _repository(self, request, kind, repo_id, *, write=False):
        """Returns a repository that the caller may read, or write to."""
        found, identity = self._repositories.get((kind or "model", repo_id)), request.identity
        if repo_id in self.moved:
            raise RefusedError(307, request.target.replace(repo_id, self.moved[repo_id], 1))
        mine = identity is not None and repo_id.partition("/")[0] in identity.namespaces
        if found is None or (found.private and not mine):
            if identity is None:
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if write and identity is None:
            raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
        if write and not (mine and identity.may_write):
            raise RefusedError(403, f"Forbidden: you don't have write access to {repo_id} with this token")
        return found

    def _check_gate(self, request, repository):
        identity = request.identity
        if not repository.gated or (
            identity is not None
            and (repository.namespace in identity.namespaces or identity.name in repository.granted)
        ):
            return
        message = f"Access to model {repository.repo_id} is restricted; visit {self.endpoint}/{repository.repo_id}"
        raise RefusedError(401 if identity is None else 403, message, "GatedRepo")

    # --- reading --------------------------------------------------------------------------------------------

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request):
        identity = request.identity
        if identity is None:
            raise RefusedError(401, "Invalid username or password.")
        return Answer.of_json(
            {
                "type": "user",
                "name": identity.name,
                "orgs": [{"name": each, "roleInOrg": "write"} for each in identity.namespaces if each != identity.name],
                "auth": {"accessToken": {"displayName": "test", "role": "write" if identity.may_write else "read"}},
            }
        )

    @route("GET", rf"{_API}(?:/revision/{_REVISION})?")
    def _info(self, request, kind, repo_id, revision):
        repository = self._repository(request, kind, repo_id)
        commit = repository.commit(revision or "main")
        blobs = "blobs" in request.query
        return Answer.of_json(
            {
                "_id": hashlib.md5(repo_id.encode()).hexdigest()[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repository.namespace,
                "sha": commit.oid,
                "lastModified": DATE,
                "createdAt": DATE,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [
                    {"rfilename": name, **(_blob(file) if blobs else {})} for name, file in sorted(commit.files.items())
                ],
            }
        )

    @route("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<folder>.*))?")
    def _tree(self, request, kind, repo_id, revision, folder):
        files = self._repository(request, kind, repo_id).files(revision)
        folder = folder.strip("/")
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        entries = _tree_entries(files, f"{folder}/" if folder else "", recursive)
        if folder and not entries:
            raise RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        return self._page(request, entries)

    def _page(self, request, entries):
        """Returns one page of a listing, with a link to the next."""
        begin = int(request.query.get("cursor", ["0"])[0])
        end = begin + self.page_size
        query = "&".join(f"{name}={quote(value)}" for name, (value, *_) in request.query.items() if name != "cursor")
        link = f'<{self.endpoint}{request.raw_path}?{query}&cursor={end}>; rel="next"'
        return Answer.of_json(entries[begin:end], headers={"Link": link} if end < len(entries) else {})

    @route("POST", rf"{_API}/paths-info/{_REVISION}")
    def _paths_info(self, request, kind, repo_id, revision):
        files = self._repository(request, kind, repo_id).files(revision)
        everything = {each["path"]: each for each in _tree_entries(files, "", True)}
        paths = parse_qs(request.read().decode()).get("paths", [])
        return Answer.of_json([everything[path] for path in paths if path in everything])

    @route("GET", rf"{_API}/refs")
    def _refs(self, request, kind, repo_id):
        refs = self._repository(request, kind, repo_id).refs

        def under(folder):
            return [
                {"name": ref.removeprefix(folder), "ref": ref, "targetCommit": oid}
                for ref, oid in refs.items()
                if ref.startswith(folder)
            ]

        pull_requests = {"pullRequests": under("refs/pr/")} if "include_prs" in request.query else {}
        return Answer.of_json(
            {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": [], **pull_requests}
        )

    @route("GET", rf"{_API}/commits/{_REVISION}")
    def _commits(self, request, kind, repo_id, revision):
        history = self._repository(request, kind, repo_id).history(revision)
        entries = [
            {
                "id": each.oid,
                "title": each.title,
                "message": each.description,
                "authors": [{"user": "ada"}],
                "date": DATE,
            }
            for each in reversed(history)
        ]
        return self._page(request, entries)

    @route("HEAD", rf"{_KIND}/{_ID}/resolve/{_REVISION}/(?P<name>.+)")
    @route("GET", rf"{_KIND}/{_ID}/resolve/{_REVISION}/(?P<name>.+)")
    def _resolve(self, request, kind, repo_id, revision, name):
        repository = self._repository(request, kind, repo_id)
        self._check_gate(request, repository)
        commit = repository.commit(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        try:
            file = repository.file(name, revision)
        except RefusedError as refused:
            return _refusal(refused, headers)
        headers["ETag"] = f'"{file.etag}"'
        if not file.is_lfs:
            return self._content(request, file, headers)
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"{self._cdn}/cdn/{repo_id}/{file.sha256}/{quote(name)}?Signature={self._signature}"
        return Answer(302, headers)

    @route("HEAD", r"/cdn/[^/]+/[^/]+/(?P<sha256>[0-9a-f]{64})/.+", host="cdn")
    @route("GET", r"/cdn/[^/]+/[^/]+/(?P<sha256>[0-9a-f]{64})/.+", host="cdn")
    def _download(self, request, sha256):
        self._check_signature(request)
        if sha256 not in self.objects:
            raise RefusedError(404, "no such object")
        return self._content(request, self.objects.stored(sha256, True), {"ETag": f'"{sha256[:32]}"'})

    def _content(self, request, file, headers):
        """Returns a file, or the range of it that was asked for."""
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if not asked or asked[0] == "bytes=-":
            return Answer(200, headers, file.path)
        first, last = asked.groups()
        begin = int(first) if first else max(0, file.size - int(last))
        end = min(int(last) + 1, file.size) if first and last else file.size
        if begin >= file.size or begin >= end:
            return Answer(416, {**headers, "Content-Range": f"bytes */{file.size}"})
        return Answer(206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{file.size}"}, file.path, begin, end)

    def _check_signature(self, request):
        """The second server knows links that the first one signed, and no tokens."""
        if request.query.get("Signature") != [self._signature]:
            raise RefusedError(403, "the signature is wrong or missing")
        if request.identity is not None:
            raise RefusedError(400, "a token was sent to a server that is not the hub")

    # --- writing --------------------------------------------------------------------------------------------

    @route("POST", "/api/repos/create")
    def _create(self, request):
        wanted, identity = request.json(), request.identity
        if identity is None:
            raise RefusedError(401, "Invalid username or password.")
        kind, namespace = wanted.get("type") or "model", wanted.get("organization") or identity.name
        repo_id = f"{namespace}/{wanted['name']}"
        url = f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if not identity.may_write or namespace not in identity.namespaces:
            raise RefusedError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        with self._lock:
            if (kind, repo_id) in self._repositories:
                headers = {"X-Error-Message": f"You already created this {kind} repo"}
                return Answer.of_json({"url": url, "error": headers["X-Error-Message"]}, 409, headers)
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.add_repository(repo_id, kind=kind, private=private)
        return Answer.of_json({"url": url, "name": repo_id, "id": repo_id})

    @route("DELETE", "/api/repos/delete")
    def _delete(self, request):
        wanted = request.json()
        repo_id = f"{wanted.get('organization') or request.identity.name}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        self._repository(request, kind, repo_id, write=True)
        del self._repositories[kind, repo_id]
        return Answer.of_json({})

    @route("POST", rf"{_API}/(?P<what>branch|tag)/{_REVISION}")
    def _make_ref(self, request, kind, repo_id, what, revision):
        repository = self._repository(request, kind, repo_id, write=True)
        wanted = request.json()
        ref = f"refs/heads/{revision}" if what == "branch" else f"refs/tags/{wanted['tag']}"
        if ref in repository.refs:
            raise RefusedError(409, f"Reference already exists: {ref}")
        start = wanted.get("startingPoint") or "main" if what == "branch" else revision
        repository.refs[ref] = repository.commit(start).oid
        return Answer.of_json({})

    @route("DELETE", rf"{_API}/(?P<what>branch|tag)/{_REVISION}")
    def _delete_ref(self, request, kind, repo_id, what, revision):
        repository = self._repository(request, kind, repo_id, write=True)
        if revision == "main":
            raise RefusedError(403, "the branch main cannot be deleted")
        del repository.refs[repository.ref_of(f"refs/{'heads' if what == 'branch' else 'tags'}/{revision}")]
        return Answer.of_json({})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request):
        errors, warnings = _card_complaints(request.json()["content"])
        document = {
            "errors": [{"message": each} for each in errors],
            "warnings": [{"message": each} for each in warnings],
        }
        return Answer.of_json(document, 400 if errors else 200)

    def _writable(self, request, kind, repo_id):
        """Returns a repository that may be written to; a pull request needs reading only."""
        if "create_pr" not in request.query:
            return self._repository(request, kind, repo_id, write=True)
        repository = self._repository(request, kind, repo_id)
        if request.identity is None or not request.identity.may_write:
            raise RefusedError(403, "this token may not open pull requests")
        return repository

    @route("POST", rf"{_API}/preupload/{_REVISION}")
    def _preupload(self, request, kind, repo_id, revision):
        files = self._writable(request, kind, repo_id).files(revision)
        return Answer.of_json(
            {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if is_lfs(each["path"], each["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": files[each["path"]].etag if each["path"] in files else None,
                    }
                    for each in request.json()["files"]
                ]
            }
        )

    @route("POST", rf"{_KIND}/{_ID}\.git/info/lfs/objects/batch")
    def _batch(self, request, kind, repo_id):
        repository = self._repository(request, kind, repo_id)
        if request.identity is None or not request.identity.may_write:
            raise RefusedError(403, f"Forbidden: you don't have write access to {repository.repo_id} with this token")
        wanted = request.json()
        assert wanted["operation"] == "upload"
        assert wanted["hash_algo"] == "sha256"
        objects = [self._upload_action(each["oid"], each["size"], wanted["transfers"]) for each in wanted["objects"]]
        return Answer.of_json({"transfer": "basic", "objects": objects})

    def _upload_action(self, oid, size, transfers):
        known = {"oid": oid, "size": size}
        if oid in self.objects:
            return known
        signed = f"?Signature={self._signature}"
        verify = {"href": f"{self.endpoint}/lfs/verify"}
        if "multipart" not in transfers or size < self.multipart_from:
            upload = {"href": f"{self._cdn}/lfs/upload/{oid}{signed}"}
            return {**known, "actions": {"upload": upload, "verify": verify}}
        parts = range(1, -(-size // self.part_size) + 1)
        header = {str(part): f"{self._cdn}/lfs/part/{oid}/{part}{signed}" for part in parts}
        upload = {
            "href": f"{self.endpoint}/lfs/complete/{oid}{signed}",
            "header": {"chunk_size": str(self.part_size), **header},
        }
        return {**known, "actions": {"upload": upload, "verify": verify}}

    @route("PUT", r"/lfs/upload/(?P<oid>[0-9a-f]{64})", host="cdn")
    def _upload(self, request, oid):
        self._check_signature(request)
        path, sha256 = request.save(self.objects.folder)
        return self._keep_upload(oid, path, sha256)

    def _keep_upload(self, oid, path, sha256):
        if sha256 != oid:
            path.unlink()
            raise RefusedError(400, "the content does not match its SHA-256")
        path.replace(self.objects.path(oid))
        return Answer(200, {"ETag": f'"{oid[:32]}"'})

    @route("PUT", r"/lfs/part/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", host="cdn")
    def _upload_part(self, request, oid, part):
        self._check_signature(request)
        path, sha256 = request.save(self.objects.folder)
        self._parts[oid, int(part)] = path, sha256
        return Answer(200, {"ETag": f'"{sha256[:32]}"'})

    @route("POST", r"/lfs/complete/(?P<oid>[0-9a-f]{64})")
    def _complete(self, request, oid):
        sha256, whole = hashlib.sha256(), self.objects.folder / f"{secrets.token_hex(8)}.whole"
        with whole.open("wb") as target:
            for each in request.json()["parts"]:
                path, etag = self._parts.pop((oid, each["partNumber"]))
                if each["etag"] != f'"{etag[:32]}"':
                    raise RefusedError(400, f"part {each['partNumber']} is another one")
                data = path.read_bytes()
                sha256.update(data)
                target.write(data)
                path.unlink()
        return self._keep_upload(oid, whole, sha256.hexdigest())

    @route("POST", "/lfs/verify")
    def _verify(self, request):
        wanted = request.json()
        if wanted["oid"] not in self.objects or self.objects.path(wanted["oid"]).stat().st_size != wanted["size"]:
            raise RefusedError(404, "no such object")
        return Answer.of_json({})

    @route("POST", rf"{_API}/commit/{_REVISION}")
    def _commit(self, request, kind, repo_id, revision):
        repository = self._writable(request, kind, repo_id)
        lines = [json.loads(line) for line in request.read().splitlines()]
        header = lines[0]["value"]
        added, deleted = {}, []
        for each in lines[1:]:
            name = each["value"]["path"]
            if each["key"] == "file":
                data = base64.b64decode(each["value"]["content"])
                added[name] = self.objects.stored(self.objects.add(data), False)
            elif each["key"] == "lfsFile":
                if each["value"]["oid"] not in self.objects:
                    raise RefusedError(400, f"the LFS object of {name} was not uploaded")
                added[name] = self.objects.stored(each["value"]["oid"], True)
            else:
                deleted.append(name if each["key"] == "deletedFile" else name.rstrip("/") + "/")
        with self._lock:
            head = repository.commit(revision)
            if header.get("parentCommit", head.oid) != head.oid:
                raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            pull_request = repository.open_pull_request(revision) if "create_pr" in request.query else None
            ref = f"refs/pr/{pull_request}" if pull_request else repository.ref_of(revision)
            commit = repository.write(ref, added, deleted, header["summary"], header["description"])
        return Answer.of_json(
            {
                "success": True,
                "commitOid": commit.oid,
                "commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit.oid}",
                **({"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/{pull_request}"} if pull_request else {}),
            }
        )


def _refusal(refused, headers=()):
    if refused.status == 307:
        return Answer(307, {"Location": refused.message})
    told = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
    return Answer.of_json({"error": refused.message}, refused.status, {**dict(headers), **told})


def _blob(file):
    """Returns what model info says of a file."""
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}} if file.is_lfs else {}
    return {"blobId": file.blob_id, "size": file.size, **lfs}


def _tree_entries(files, folder, recursive):
    """Returns what a listing says of the files and folders in a folder, sorted."""
    entries = {}
    for name, file in files.items():
        if not name.startswith(folder):
            continue
        parts = name.removeprefix(folder).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            path = folder + "/".join(parts[:depth])
            entries[path] = {
                "type": "directory",
                "path": path,
                "oid": hashlib.sha1(path.encode()).hexdigest(),
                "size": 0,
            }
        if recursive or len(parts) == 1:
            entry = {"type": "file", "path": name, "oid": file.blob_id, "size": file.size}
            if file.is_lfs:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            entries[name] = entry
    return [entries[path] for path in sorted(entries)]


def _card_complaints(content):
    """Returns what the Hub would refuse in a model card's metadata, and what it would warn of."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)(?:^---[ \t]*$)", content.lstrip("\ufeff"), re.DOTALL | re.MULTILINE)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    errors = []
    for key in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if not isinstance(data.get(key, ""), str | list if key == "license" else str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "base_model", "language", "datasets"):
        value = data.get(key, [])
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            errors.append(f'"{key}" must be a string or a list of strings')
    if data.get("base_model_relation", "quantized") not in ("quantized", "finetune", "adapter", "merge"):
        errors.append('"base_model_relation" is unknown')
    return errors, []


# --- the servers ----------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub, name):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.name = hub, name
        self._open = set()

    def process_request(self, request, client_address):
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self):
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """A client that is killed leaves in the middle of a request; that is no error here."""


class _Request:
    """A request as the routes see it."""

    def __init__(self, handler, event, faults):
        self._handler, self._event, self._faults = handler, event, faults
        self.host, self.method, self.headers = event.host, event.method, handler.headers
        self.target = handler.path
        self.raw_path, self.query = urlsplit(handler.path).path, event.query
        self.identity = None

    def pieces(self):
        """Yields the body as it comes, or drops the connection in the middle of it."""
        limit = min((fault.drop_after for fault in self._faults if fault.drop_after is not None), default=-1)
        links = [fault.link for fault in self._faults if fault.link]
        for piece in self._handler.read_body():
            for link in links:
                link.carry(len(piece))
            self._event.received += len(piece)
            if 0 <= limit < self._event.received and self.method in ("PUT", "POST"):
                raise DroppedError
            yield piece

    def read(self):
        """Returns the body."""
        return b"".join(self.pieces())

    def json(self):
        """Returns the body, read as JSON."""
        return json.loads(self.read())

    def save(self, folder):
        """Writes the body to a file; returns its path and SHA-256."""
        path, sha256 = folder / f"{secrets.token_hex(8)}.upload", hashlib.sha256()
        try:
            with path.open("wb") as stream:
                for piece in self.pieces():
                    sha256.update(piece)
                    stream.write(piece)
        except BaseException:
            path.unlink()
            raise
        return path, sha256.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *_arguments):
        """Says nothing."""

    def do_GET(self):
        """Answers."""
        parts = urlsplit(self.path)
        server = self.server
        event, faults = server.hub.begin(
            server.name, self.command, unquote(parts.path), parse_qs(parts.query), self.headers
        )
        self._left = None
        try:
            self._answer(_Request(self, event, faults), event, faults)
        except (DroppedError, OSError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            event.ended = time.monotonic()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self, request, event, faults):
        for fault in faults:
            if fault.hold:
                fault.hold.wait(60)
        struck = next((fault for fault in faults if fault.status), None)
        if struck:
            refused = RefusedError(struck.status, struck.message or HTTPStatus(struck.status).phrase, struck.code)
            answer = _refusal(refused, struck.headers)
        else:
            answer = self.server.hub.answer(request)
            for fault in faults:
                answer.headers.update(fault.headers)
        for _piece in request.pieces():
            pass  # what was not read would be taken for the next request
        if any(fault.drop_after == -1 for fault in faults):
            raise DroppedError
        self._send(answer, event, faults)

    def read_body(self):
        """Yields what is left of the request's body, whose length is told or which comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            if self._left == 0:
                return
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._exactly(size)
                self.rfile.readline()
            self.rfile.readline()
            self._left = 0
            return
        if self._left is None:
            self._left = int(self.headers.get("Content-Length") or 0)
        while self._left:
            piece = self._exactly(min(PIECE, self._left))
            self._left -= len(piece)
            yield piece

    def _exactly(self, count):
        data = self.rfile.read(count)
        if len(data) < count:
            raise DroppedError
        return data

    def _send(self, answer, event, faults):
        missing = sum(fault.short_by for fault in faults)
        length = max(0, answer.length - missing)
        event.status = answer.status
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(answer, length, event, faults)
        self.wfile.flush()

    def _send_body(self, answer, length, event, faults):
        drop = min((fault.drop_after for fault in faults if fault.drop_after is not None), default=None)
        links = [fault.link for fault in faults if fault.link]
        corrupt = any(fault.corrupt for fault in faults)
        with answer.body.open("rb") if isinstance(answer.body, Path) else BytesIO(answer.body) as stream:
            stream.seek(answer.begin)
            while event.sent < length:
                piece = stream.read(min(PIECE, length - event.sent))
                if drop is not None:
                    piece = piece[: max(0, drop - event.sent)]
                if corrupt and event.sent == 0 and piece:
                    piece = bytes([piece[0] ^ 0xFF]) + piece[1:]
                for link in links:
                    link.carry(len(piece))
                event.sent += len(piece)  # before the client can know of it
                self.wfile.write(piece)
                if drop is not None and event.sent >= drop:
                    self.wfile.flush()
                    raise DroppedError
