"""How a command ends: errors as messages, exit codes, and nothing on the terminal that a reader cannot use.

Exit codes: 0 done; 2 usage; 3 bad input, or a system that refuses (an LMVAEError: what is wrong, the limit, the remedy); 4 NaN
or Inf in training; 70 a fault of ours, with a log; 130 interrupted, with a usable checkpoint where there is one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import lmvae_fast
from lmvae_fast.cli.common import BAD_INPUT, INTERRUPTED, Terminal, documents_only
from lmvae_fast.errors import ConfigError, DataError, LMVAEError, MemoryLimitError, NumericalError, OutputError

NOT_FINITE, FAULT = 4, 70

errors = Terminal(stderr=True)

# What remedies say in Python, as the commands take it.
_FLAGS = {"missing='skip'": "--skip-missing", "resume=True": "--resume"}

# What torch says of memory that is not there, and of numbers of more than 64 bits.
_NO_MEMORY = ("can't allocate memory", "out of memory")
_TOO_LARGE = (
    "Overflow when unpacking",
    "overflowed",
    "out of range for type",
    "Python int too large",
    "cannot fit 'int'",
)


def wants_json() -> bool:
    """Whether the command line asks for JSON."""
    words = sys.argv[1:]
    return "--json" in (words[: words.index("--")] if "--" in words else words)


def prepare_streams() -> None:
    """Standard output and error that take any text: names of files may hold bytes that are no UTF-8."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def ending(as_json: bool) -> Iterator[None]:
    """Within the block every error becomes a message on standard error and an exit code (SystemExit)."""
    try:
        yield
        _flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        try:
            _flush()
        except BrokenPipeError:
            _forget_output()
        except OSError as error:
            _forget_output()
            report(_of_the_system(error, "standard output"), as_json)
            code = code or BAD_INPUT
        sys.exit(code)
    except KeyboardInterrupt:
        report(None, as_json)
        _leave(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        _forget_output()
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "exit_code"):  # an end that was asked for, or a fault of the command line: typer's to tell
            raise
        known = as_known(error)
        if known is None:
            report_fault(error, as_json)
            _leave(FAULT)
        report(known, as_json)
        _leave(NOT_FINITE if isinstance(known, NumericalError) else BAD_INPUT)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with its errors as messages; its parameters stay."""

    @functools.wraps(command)
    def run(*words: Any, **options: Any) -> Any:
        as_json = wants_json()
        with ending(as_json), documents_only(as_json):
            return command(*words, **options)

    return run


def as_known(error: Exception) -> LMVAEError | None:
    """The error as one that says what to do; None for a fault of ours."""
    if isinstance(error, LMVAEError):
        return error
    message = str(error).strip()
    first = message.splitlines()[0] if message else type(error).__name__
    if isinstance(error, MemoryError) or any(words in message for words in _NO_MEMORY):
        return MemoryLimitError("out of memory", value=first, remedy="ask for less at a time, or use a larger machine")
    if isinstance(error, OverflowError) or any(words in message for words in _TOO_LARGE):
        return ConfigError("a number is too large for what it is used as", value=first, remedy="give a smaller one")
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, UnicodeError):
        return DataError("a text is not what its encoding says", value=first, remedy="give UTF-8")
    from lmvae_fast.kernels.backend import BackendError  # not above: --help need not wait for torch

    if isinstance(error, BackendError):
        return ConfigError(message, remedy="use --backend auto; `lmvae-fast env` says what runs here")
    return None


def _of_the_system(error: OSError, name: str | None = None) -> LMVAEError:
    name = name or (os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None)
    return OutputError(
        f"the system refuses{f': {name}' if name else ''}", value=error.strerror or str(error),
        remedy="free space, check the path and its permissions, or choose another one",
    )  # fmt: skip


def report(error: LMVAEError | None, as_json: bool) -> None:
    """Say what went wrong; None for an interruption. Never fails: there is nobody left to tell."""
    fields = {"problem": "interrupted"} if error is None else error.fields()
    for argument, flag in _FLAGS.items() if "remedy" in fields else ():
        fields["remedy"] = fields["remedy"].replace(argument, flag)
    name = "Interrupted" if error is None else type(error).__name__
    with contextlib.suppress(Exception):
        if as_json:
            print(json.dumps({"error": name, **fields}), file=sys.stderr, flush=True)
            return
        if error is None:
            errors.print("interrupted")
            return
        errors.print(name, style="bold red", end="")
        errors.print(f": {fields.pop('problem')}")
        for field, value in fields.items():
            errors.print(f"  {field:>6}: {value}")


def report_usage(error: Exception) -> bool:
    """Say as JSON what is wrong with a command line; False for an error that is not about it."""
    message = getattr(error, "format_message", None)
    if message is None:
        return False
    with contextlib.suppress(Exception):
        fields = {"error": "Usage", "problem": " ".join(str(message()).split()), "remedy": "see --help"}
        print(json.dumps(fields), file=sys.stderr, flush=True)
    return True


def report_fault(error: BaseException, as_json: bool) -> None:
    """One line on a fault of ours, with the log to send."""
    log = _saved_log(error)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    remedy = f"please report it with {log}" if log else "please report it; its log could not be saved"
    with contextlib.suppress(Exception):
        if as_json:
            fields = {"error": "Fault", "problem": reason, "remedy": remedy, "log": str(log) if log else None}
            print(json.dumps(fields), file=sys.stderr, flush=True)
        else:
            errors.print(f"a fault of lmvae_fast ({reason}); {remedy}")


def _saved_log(error: BaseException) -> Path | None:
    """The file with the traceback and what runs here; None where nothing can be written."""
    from lmvae_fast.pretrained import cache_folder

    text = "\n".join(
        [
            f"lmvae_fast {lmvae_fast.__version__}, Python {platform.python_version()}, {platform.platform()}",
            f"arguments: {sys.argv[1:]!a}",
            "".join(traceback.format_exception(type(error), error, error.__traceback__)),
        ]
    )
    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    for folder in (lambda: cache_folder() / "logs", lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(Exception):
            place = folder()
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return place / name
    return None


def _leave(code: int) -> NoReturn:
    try:
        _flush()
    except OSError:
        _forget_output()
    sys.exit(code)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _forget_output() -> None:
    """What could not be written is dropped, so that Python does not try again at its end."""
    with contextlib.suppress(Exception):
        target = os.open(os.devnull, os.O_WRONLY)
        os.dup2(target, sys.stdout.fileno())
