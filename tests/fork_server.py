"""Starts ``ddim`` processes by fork, after torch has been imported once. Reads and answers a line at a time."""

import json
import os
import signal
import sys

import ddim_cli.sampling.executor  # noqa: F401
from ddim_cli.cli.app import main


def become_ddim(question: dict) -> None:
    """In the child: run the command, and end with its exit code."""
    code = 99
    try:
        # Of pipes, in the order in which the test opens its ends.
        if question["piped"]:
            os.dup2(os.open(f"{question['streams']}.in", os.O_RDONLY), 0)
        for number, ending in ((1, "out"), (2, "err")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{question['streams']}.{ending}", flags), number)
        # Tests that run in the background of a shell have it ignored, and so would their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(question["cwd"])
        os.environ.update(question["env"])
        exec(question["before"], {})
        sys.argv = ["ddim", *question["args"]]
        main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout and sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(question: dict) -> int:
    if "wait" in question:
        return os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
    pid = os.fork()
    if pid == 0:
        become_ddim(question)
    return pid


if __name__ == "__main__":
    for line in sys.stdin:
        print(answer(json.loads(line)), flush=True)
