"""The errors a person can cause or meet, each with the exit code of the command that meets it."""

from __future__ import annotations


class DdimError(Exception):
    """Something to say to a person in a sentence; ``exit_code`` is what the command ends with."""

    exit_code = 1


class RunError(DdimError):
    """The run itself failed: out of memory, a full disk, a NaN."""

    exit_code = 1


class UsageError(DdimError):
    """What was typed cannot be done: a bad option, a folder that cannot be used."""

    exit_code = 2


def missing_extra(what: str, package: str, extra: str) -> UsageError:
    """The error of an option that needs a package which is not installed, and comes with an extra of this one."""
    return UsageError(f"{what} needs {package}, which is not installed: pip install 'ddim-cli[{extra}]'")


def first_line(error: BaseException, most: int | None = 300) -> str:
    """What a library's error says, its first line, cut to ``most`` characters; the name of one that says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class ConfigError(UsageError):
    """Settings that are unknown, of the wrong type, out of bounds or contradictory.

    ``problems`` has one line for each; the message is these lines.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class ModelError(UsageError):
    """A model that does not exist, cannot be read, or is not one this tool can sample from."""


class DifferenceError(DdimError):
    """verify, compare or replay --check found a difference; the list of them is printed by the command."""

    exit_code = 3


class InterruptedRunError(DdimError):
    """Ctrl-C: what was finished is on disk, and the same command goes on."""

    exit_code = 130
