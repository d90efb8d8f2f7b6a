"""A model hub on 127.0.0.1, for tests with the real ``huggingface_hub`` client.

It speaks the Hub's HTTP interface as that client uses it: repositories, revisions, tree listings, downloads with
redirects, ranges and ETags, upload by LFS (basic and in parts), commits, pull requests. It stores what it is given,
remembers every request and commit with its time, and misbehaves on demand. Xet is not spoken.

How to use it:

* The fixture ``hub`` (tests/conftest.py) starts one and points the client at it: the environment for processes that
  the test starts, and the constants of ``huggingface_hub``, which were read from it at import, for this process. So
  code under test, in either, needs no endpoint argument. ``HF_HOME`` is a folder of the test's own, ``HF_TOKEN`` is
  ``hub.token`` and may write to ``hub.user`` and ``hub.organization``; ``monkeypatch.delenv("HF_TOKEN")`` and
  ``monkeypatch.setenv("HF_TOKEN", hub.read_token)`` make another caller of us.
* ``hub.add_repository("org/name", folder)`` puts a folder there, or a dictionary of names and bytes.
* ``hub.misbehave(path="*.safetensors", status=500, times=2)``: see `faults.Fault` for everything it can do. Downloads
  of LFS files are one request to ``/org/name/resolve/...`` and one to ``/cdn/org/name/.../file``, on another port;
  uploads go to ``/lfs/...``.
* ``hub.requests("GET", "/cdn/*")`` are the requests so far, with ``begun`` and ``ended`` in seconds of
  ``time.monotonic()``, which is one clock for all processes of a machine; ``hub.repository("org/name").history()`` are
  the commits, oldest first, with ``at`` on the same clock. A client can have its answer a moment before the request has
  ``ended``: ``hub.wait_until_idle()`` waits for that.
* The client keeps what it received in whole pieces of ``huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE``, 10 MB: only
  from there does it resume a download. Tests with smaller files make the pieces smaller.
* The client waits one second and more between two tries; the fixture ``no_waiting`` makes it wait 0.01 s.
"""
