"""The options of the commands, stated once: what each may be, by default is, and goes with.

Python, the command line and the list of a batch all make one of these, so a rule has one place and one wording. A new
option is a field here, a line in the command's signature, and what the command does with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, fields
from typing import Any, Literal

from awq2marlin.arguments import ArgumentError, Checked, Count, Texts, Workers, kind_of
from awq2marlin.checkpoint.choice import Choice
from awq2marlin.hub.target import PushTarget
from awq2marlin.layout.modules import Unaligned
from awq2marlin.progress import Progress
from awq2marlin.verification.sampling import Device, Modules

#: How many converted modules are compared with the source before the output becomes loadable.
Verify = Count | Literal["all", "none"]

#: Options of a `PushTarget` that stand beside ``push_to`` on the command line and in a list.
TARGET_OPTIONS = tuple(each.name for each in fields(PushTarget) if each.name not in ("repo_id", "overwrite"))

#: All options that say something of the target.
ABOUT_TARGET = ("push_to", *TARGET_OPTIONS, "commit_message")


@dataclass(frozen=True)
class ConvertOptions(Checked):
    """How `convert` works: all its arguments but source, output, executor and progress.

    Attributes:
        unaligned: what to do with modules whose shapes Marlin cannot take; None to keep them in AWQ layout.
        workers: number of threads; None for one per CPU, at most eight.
        overwrite: whether an earlier conversion is removed first.
        verify: how many converted modules are compared with the source.
        dry_run: whether nothing is written.
        device: where the compared modules also run through the Marlin GEMM; None for nowhere.
        low_disk: whether source shards, and with ``push_to`` finished ones, are removed as soon as they can be.
        push_to: repository of the Hub that the result is sent to, ``org/name`` or a `PushTarget`.
        commit_message: first line of the commits' messages.
        to: the format to write, by its layout's name; None for Marlin's, unless the source is of it already.
        carry: patterns of files that are carried over though they would be left behind.
        leave: patterns of files that are left behind.
        follow_links: whether links that lead out of the source's folder are followed.
    """

    unaligned: Unaligned | None = None
    workers: Workers | None = None
    overwrite: bool = False
    verify: Verify = 8
    dry_run: bool = False
    device: Device | None = None
    low_disk: bool = False
    push_to: str | PushTarget | None = None
    commit_message: str | None = None
    to: str | None = None
    carry: Texts = ()
    leave: Texts = ()
    follow_links: bool = False

    def __post_init__(self) -> None:
        """Checks every option, and that they go together.

        Raises:
            ValueError: naming the option, or the two that do not go together.
        """
        super().__post_init__()
        if self.to is not None:
            from awq2marlin.formats.registry import DEFAULT_TARGET, target_named  # brings NumPy along

            is_other = target_named(self.to) is not DEFAULT_TARGET
            if is_other and self.device is not None:
                raise ArgumentError("{device} runs Marlin weights, so it cannot be used with {to}")
            if is_other and self.unaligned is not None:
                raise ArgumentError("{unaligned} is about Marlin's shapes, so it cannot be used with {to}")
        target = self.target  # refuses what is no name of a repository
        if self.device is not None and self.verify in ("none", 0):
            raise ArgumentError("{device} needs {verify}: it runs the modules that are compared")
        if self.device is not None and self.low_disk:
            raise ArgumentError("{device} needs the whole source, which {low_disk} removes; use 'verify' afterwards")
        if self.commit_message is not None and target is None:
            raise _needs_target("commit_message")
        if self.follow_links and target is not None:
            raise ArgumentError(
                "{follow_links} may read files from anywhere on this machine, so it cannot be used "
                "with {push_to}: check the output first, then use 'push'"
            )

    @property
    def target(self) -> PushTarget | None:
        """Where the result goes on the Hub; None if it stays here."""
        return PushTarget(self.push_to) if isinstance(self.push_to, str) else self.push_to

    @property
    def choice(self) -> Choice:
        """What is said of single files of the source."""
        return Choice(self.carry, self.leave)

    @property
    def passes_on(self) -> bool:
        """Whether the result goes to the Hub shard by shard, and nothing of it stays here."""
        return self.low_disk and self.push_to is not None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ConvertOptions:
        """Returns the options among those of a command line or a list, where the target's stand beside the others.

        Args:
            given: values by name; what is neither an option of this class nor of `PushTarget` is left aside.

        Raises:
            ValueError: as the class does, and if an option of the target is given without ``push_to``.
        """
        about_target = [name for name in TARGET_OPTIONS if given.get(name)]
        if given.get("push_to") is not None:
            given = {**given, "push_to": PushTarget.of({**given, "repo_id": given["push_to"]})}
        elif about_target:
            raise _needs_target(about_target[0])
        return super().of(given)


@dataclass(frozen=True)
class RevertOptions(Checked):
    """How `revert` works: all its arguments but those that name folders, executor and progress.

    Attributes:
        workers: number of threads; None for one per CPU, at most eight.
        overwrite: whether the output may have files already: equal ones stay as they are, others are refused.
        dry_run: whether nothing is written.
        low_disk: whether shards of a repository are removed as soon as they are restored.
        follow_links: whether links that lead out of the checkpoint's folder are followed.
    """

    workers: Workers | None = None
    overwrite: bool = False
    dry_run: bool = False
    low_disk: bool = False
    follow_links: bool = False


@dataclass(frozen=True)
class VerifyOptions(Checked):
    """How `verify` works: all its arguments but those that name folders, and progress.

    Attributes:
        modules: how many converted modules are compared value for value; None for what ``layers`` says.
        workers: number of threads; None for one per CPU, at most eight.
        device: where these modules also run through the Marlin GEMM; None for nowhere.
        layers: the earlier name of ``modules``.
        follow_links: whether links that lead out of the checkpoints' folders are followed.
    """

    modules: Modules | None = None
    workers: Workers | None = None
    device: Device | None = None
    layers: Modules = "all"
    follow_links: bool = False

    def __post_init__(self) -> None:
        """Checks every option, and that they go together.

        Raises:
            ValueError: naming the option, or the two that do not go together.
        """
        super().__post_init__()
        if self.modules is not None and self.layers != "all":
            raise ArgumentError("{modules} and {layers} are two names of one argument; give only {modules}")

    @property
    def count(self) -> Modules:
        """How many modules are compared, by whichever name it was given."""
        return self.layers if self.modules is None else self.modules


def check_helpers(executor: Executor | None, progress: Progress | None) -> None:
    """Refuses what cannot do the work, or be told of it, before any work.

    Args:
        executor: as the caller gave it.
        progress: as the caller gave it.

    Raises:
        ArgumentError: naming the argument.
    """
    kind_of(Executor | None).check("executor", executor)
    kind_of(Progress | None).check("progress", progress)


def _needs_target(name: str) -> ArgumentError:
    hint = "; for a revision of the source, write org/name@REVISION" if name == "revision" else ""
    return ArgumentError(f"{{{name}}} needs {{push_to}}{hint}")
