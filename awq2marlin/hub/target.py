"""Where on the Hub a checkpoint goes, as a user says it. Asks nobody."""

from __future__ import annotations

import re
from dataclasses import dataclass

from awq2marlin.arguments import ArgumentError, Checked
from awq2marlin.errors import CheckpointError, printable

DEFAULT_BRANCH = "main"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PushTarget(Checked):
    """Where a checkpoint goes, and what may happen there.

    Attributes:
        repo_id: ``org/name``; also given as ``hf://org/name``, or by its address.
        private: whether a new repository is private; an existing one must then be.
        revision: branch, made if needed, or ``refs/pr/N`` of a pull request; by default ``main``.
        create_pr: whether to open a pull request instead of changing the branch.
        overwrite: whether an earlier checkpoint there is replaced.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks the names.

        Raises:
            ValueError: if they are none, or if a pull request is asked for on another branch than ``main``.
        """
        super().__post_init__()
        if "://" in self.repo_id:
            object.__setattr__(self, "repo_id", self._named())
        if not _REPO_ID.fullmatch(self.repo_id) or ".." in self.repo_id or "--" in self.repo_id:
            found = repr(printable(self.repo_id))
            raise ArgumentError("{found} is not a repository name (org/name)", found=found)
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            raise ArgumentError("{revision} must be a branch, not a commit")
        if self.create_pr and self.branch != DEFAULT_BRANCH:
            raise ArgumentError(f"a pull request is opened on {DEFAULT_BRANCH}; drop {{revision}}")

    def _named(self) -> str:
        """Returns the repository whose address, or name behind ``hf://``, was given."""
        from awq2marlin.hub.name import HubName, parse_source

        try:
            name = parse_source(self.repo_id)
        except CheckpointError as error:
            raise ArgumentError("{said}", said=printable(str(error))) from None
        if not isinstance(name, HubName):
            return self.repo_id
        if name.revision not in (None, self.revision):
            sentence = "{found} names the branch {branch}; give it as {revision}"
            raise ArgumentError(sentence, found=printable(name.repo_id), branch=printable(str(name.revision)))
        return name.repo_id

    @property
    def branch(self) -> str:
        """The branch."""
        return self.revision or DEFAULT_BRANCH
