"""A side of a comparison as a process of its own: one JSON request a line in, one JSON answer a line out.

Own processes, because LangVAE needs another transformers, and because the peak memory of a process is only known whole.
Standard library only: the side that runs in LangVAE's environment imports this file, too.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time


class Worker:
    """The caller's end: starts the process, and asks it."""

    def __init__(
        self, command: list[str], environment: dict[str, str], name: str, folder: str | os.PathLike[str] | None = None
    ) -> None:
        """folder: where the process runs, and so whose `benchmarks` it imports; default this process's own."""
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
            cwd=folder,
        )  # fmt: skip

    def ask(self, request: str, **arguments: object) -> dict:
        """Send a request and wait for its answer; RuntimeError if the process has failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()} at {request!r}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peak_bytes() -> int:
    """The most memory this process has held (its resident set's high-water mark)."""
    # Not getrusage where it can be helped: what that tells begins with the size of the process that started this one.
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(side: object) -> None:
    """Answer requests with the methods of `side` until the input ends; `peak` is answered here."""
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        request = arguments.pop("request")
        if request == "peak":
            answer = {"bytes": peak_bytes()}
        else:
            start = time.perf_counter()
            answer = getattr(side, request)(**arguments) or {}
            answer["seconds"] = time.perf_counter() - start
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
