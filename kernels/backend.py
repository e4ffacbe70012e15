"""The one registry: which backend runs a call of an op, and why not a faster one.

Backends: `cuda` (csrc/cuda), `flash` (flash-attn's or torch's attention), `triton` (CUDA devices; on CPU tensors only in
Triton's interpreter, for tests), `cpp` (csrc/cpu), `reference` (plain differentiable torch). An op declares what each
backend can take (`register`); a call asks `choose`, which looks at static facts only (device, dtype, what the op declares),
so that it traces under `torch.compile(fullgraph=True)` and never synchronises. Nothing falls back silently: a backend that
was forced and cannot run raises `BackendError` with the reason, and every choice is logged once at INFO.

`LMVAE_BACKEND=reference|cpp|triton|flash|cuda|auto` sets the process-wide choice, `with backend("reference"):` a block's: of
the process where the main thread enters it, of its own thread where another one does.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("lmvae_fast")

BACKENDS = ("cuda", "flash", "triton", "cpp", "reference")  # from the fastest to the one that runs everywhere
_DEVICES = {"cuda": ("cuda",), "flash": ("cuda",), "triton": ("cuda",), "cpp": ("cpu",)}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATS_AND_DOUBLE = (*FLOATS, torch.float64)

#: Triton kernels run in its interpreter, on CPU tensors: decided once, because triton decides when it is imported.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call; the message says why."""


@dataclass(frozen=True)
class Support:
    """What one backend of one op can take.

    dtypes: of the op's main input. primitives: names of the registered torch ops it needs. check: takes the facts given
    to `choose` and returns None, or the reason why it cannot run. The fact ``forward_ad`` (an input carries a tangent) is
    looked at here: no kernel has a formula for it.
    """

    dtypes: tuple[torch.dtype, ...] = FLOATS
    primitives: tuple[str, ...] = ()
    check: Callable[[Mapping[str, Any]], str | None] | None = None


class Row(NamedTuple):
    """One line of `lmvae-fast env`."""

    op: str
    backend: str
    chosen: bool
    reason: str


@dataclass
class _State:
    forced: str = "auto"
    open: list[list[str]] = field(default_factory=list)  # blocks of the main thread, and what was forced outside them
    outside: str = "auto"
    own_blocks: int = 0  # `with backend(...)` blocks that are open in threads other than the main one
    ops: dict[str, dict[str, Support]] = field(default_factory=dict)
    missing: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    chosen: dict[tuple, str] = field(default_factory=dict)
    extension: tuple[bool, str] = (False, "not looked for")
    triton: tuple[bool, str] = (False, "not looked for")


def _check_name(name: str, where: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{where}={name!r} is not a backend; choose one of {', '.join((*BACKENDS, 'auto'))}")
    return name


def _load_extension() -> tuple[bool, str]:
    spec = importlib.util.find_spec("lmvae_fast")
    if spec is None or not spec.submodule_search_locations:
        return False, "the package lmvae_fast is not installed"
    folder = Path(next(iter(spec.submodule_search_locations)))
    library, record = folder / "_C.so", folder / "_build_info.json"
    info = json.loads(record.read_text()) if record.exists() else {}
    if not library.exists():
        return False, info.get("reason") or "csrc was not built (pip install --no-build-isolation . builds it)"
    if info.get("torch") != torch.__version__:
        return False, f"built for torch {info.get('torch')}, running {torch.__version__}: install again to rebuild"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return False, f"_C.so does not load: {error}"
    return True, f"built for torch {info['torch']}, running {torch.ops.lmvae_fast.cpu_isa()} code"


def _find_triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    return True, "triton is installed" + (" (interpreter)" if INTERPRET else "")


class _Own(threading.local):
    """What a block entered by this thread forces, where it is not the main one."""

    forced: str | None = None
    outside: str | None = None

    def __init__(self) -> None:
        self.open: list[list[str]] = []


_own, _own_lock = _Own(), threading.Lock()
_state = _State(forced=_check_name(os.environ.get("LMVAE_BACKEND", "auto") or "auto", "LMVAE_BACKEND"))


def register(op: str, **backends: Support) -> None:
    """Declare an op's backends, e.g. `register("posterior_sample", cpp=Support(...), triton=Support(...))`.

    `reference` is always there and takes everything. Call it after `registration.define` of the op's primitives: which of
    them the C++ extension implements is looked up here, once (the look-up itself cannot be traced).
    """
    for name in backends:
        if name not in BACKENDS or name == "reference":
            raise ValueError(f"{op}: {name!r} is not one of {', '.join(BACKENDS[:-1])}")
        _state.missing[(op, name)] = tuple(p for p in backends[name].primitives if not _implemented(name, p))
    _state.ops[op] = backends


def _implemented(name: str, primitive: str) -> bool:
    """Whether the C++ extension has this primitive; Triton's launchers are registered from Python and always there."""
    if name in ("triton", "flash"):
        return True
    try:
        key = "CPU" if name == "cpp" else "CUDA"
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace(name)}::{primitive}", key)
    except RuntimeError:  # not even its schema exists
        return False


def why_not(op: str, name: str, device: str, dtype: torch.dtype, facts: Mapping[str, Any]) -> str | None:
    """None when backend `name` can run this call of `op`, else the reason why it cannot."""
    if name == "reference":
        return None
    support = _state.ops[op].get(name)
    if support is None:
        return f"{op} has no {name} implementation"
    if facts.get("forward_ad"):
        return f"{name} has no forward-mode derivatives; the reference has"
    interpreted = name == "triton" and device == "cpu"
    if device not in _DEVICES[name] and not interpreted:
        return f"{name} runs on {' and '.join(_DEVICES[name])} tensors, these are on {device}"
    if interpreted and not INTERPRET:
        return "triton runs CPU tensors only in its interpreter (set TRITON_INTERPRET=1 before the first import)"
    if dtype not in support.dtypes:
        return f"{name} takes {', '.join(str(d).removeprefix('torch.') for d in support.dtypes)}, not {dtype}"
    if name == "triton" and not _state.triton[0]:
        return _state.triton[1]
    if name in ("cpp", "cuda"):
        if not _state.extension[0]:
            return f"the C++ extension is not loaded: {_state.extension[1]}"
        if _state.missing[(op, name)]:
            return f"the C++ extension was built without {', '.join(_state.missing[(op, name)])}"
    return support.check(facts) if support.check is not None else None


def _decide(op: str, device: str, dtype: torch.dtype, facts: Mapping[str, Any]) -> str:
    forced = current()
    if forced != "auto":
        reason = why_not(op, forced, device, dtype, facts)
        if reason is not None:
            raise BackendError(f"{op}: backend {forced!r} was asked for and cannot run: {reason}")
        return forced
    for name in BACKENDS:
        if name == "triton" and device == "cpu":
            continue  # the interpreter is never the faster choice
        if why_not(op, name, device, dtype, facts) is None:
            return name
    raise AssertionError("reference takes everything")


def _choose_and_log(op: str, device: str, dtype: torch.dtype, facts: Mapping[str, Any]) -> str:
    name = _decide(op, device, dtype, facts)
    _state.chosen[(op, current(), device, dtype, *facts.items())] = name
    logger.info("%s on %s %s %s: %s", op, device, dtype, dict(facts) or "", name)
    return name


def choose(op: str, tensor: torch.Tensor, **facts: Any) -> str:
    """The backend that runs this call of `op`: a name of BACKENDS.

    tensor: the op's main input (its device and dtype decide). facts: hashable static values that the op's `Support.check`
    functions look at (head_dim=64, needs_grad=True, ...). Raises BackendError when a forced backend cannot run.
    """
    device, dtype = tensor.device.type, tensor.dtype
    if torch.compiler.is_compiling():
        return _decide(op, device, dtype, facts)
    name = _state.chosen.get((op, _own.forced or _state.forced, device, dtype, *facts.items()))
    return name if name is not None else _choose_and_log(op, device, dtype, facts)


def namespace(name: str, device: str = "cpu") -> str:
    """The torch.ops namespace that holds a backend's primitives.

    `lmvae_fast` serves cpp (CPU key) and triton (CUDA key); interpreted triton and csrc/cuda each have their own, because
    a dispatch key holds one implementation.
    """
    if name == "cuda":
        return "lmvae_fast_cuda"
    return "lmvae_fast_interpret" if name == "triton" and device == "cpu" and INTERPRET else "lmvae_fast"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every op called inside the block: "reference", "cpp", "triton", "flash", "cuda", or "auto".

    A block of the main thread holds for the process, like LMVAE_BACKEND: also for the threads that serve it (autograd's,
    a server's). A block of another thread is its own, and goes before. Calls that it cannot run raise BackendError.
    """
    _check_name(name, "backend")
    # Inside a traced function the block opens and closes while it is traced: nothing is left behind for other threads.
    if torch.compiler.is_compiling():
        before, _state.forced = _state.forced, name
        try:
            yield
        finally:
            _state.forced = before
    elif threading.current_thread() is threading.main_thread():
        with _opened(_state, name):
            yield
    else:
        with _own_lock:
            _state.own_blocks += 1
        try:
            with _opened(_own, name):
                yield
        finally:
            with _own_lock:
                _state.own_blocks -= 1


@contextmanager
def _opened(place: Any, name: str) -> Iterator[None]:
    """`place.forced` is that of the block opened last among those that are still open: blocks of coroutines and generators
    close in any order."""
    block = [name]
    if not place.open:
        place.outside = place.forced
    place.open.append(block)
    place.forced = name
    try:
        yield
    finally:
        place.open[:] = [other for other in place.open if other is not block]
        place.forced = place.open[-1][0] if place.open else place.outside


def current() -> str:
    """The backend that is forced here, or "auto"."""
    if not torch.compiler.is_compiling():
        return _own.forced or _state.forced
    if _state.own_blocks:  # a graph is guarded by what the process has, and runs in any thread
        raise BackendError(
            "a thread other than the main one is inside `with backend(...)`, which torch.compile cannot follow: enter the "
            "block in the main thread, or set LMVAE_BACKEND"
        )
    return _state.forced


def extension() -> tuple[bool, str]:
    """Whether csrc is loaded, and what `lmvae-fast env` says about it."""
    return _state.extension


def report(device: str = "cpu", dtype: torch.dtype = torch.float32, **facts: Any) -> list[Row]:
    """Op by op, each backend, whether it is the one that would run, and why not where it is not.

    Knows the ops imported so far. A forced backend that cannot run an op gives rows without a chosen one.
    """
    rows = []
    for op in sorted(_state.ops):
        try:
            winner, error = _decide(op, device, dtype, facts), ""
        except BackendError as refused:
            winner, error = "", str(refused)
        for name in BACKENDS:
            reason = why_not(op, name, device, dtype, facts)
            if name == winner:
                text = f"forced to {name}" if current() != "auto" else "the fastest that can run"
            elif reason is None:
                text = error or (f"forced to {winner}" if current() != "auto" else f"{winner} comes first")
            else:
                text = reason
            rows.append(Row(op, name, name == winner, text))
    return rows


_state.extension = _load_extension()
_state.triton = _find_triton()
