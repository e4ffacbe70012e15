"""Checks that the tests of every op share: the error rule, inputs in awkward layouts, guard regions, backends.

The rule (docs/numerics.md): against an fp64 reference, a kernel's error may be at most twice that of plain torch in the
same dtype, three times for gradients; and the error's RMS at most 0.005 of the reference's. Nothing here may be loosened.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmvae_fast.kernels import backend as registry

VALUE_FACTOR = 2.0
GRAD_FACTOR = 3.0
RMS_RATIO = 0.005

# Each size is here for a reason; kernels differ in what they stumble over.
ODD_SIZES = (
    1,  # a single element: every block is a tail
    2,  # less than one Philox block of four
    5,  # one block and one element
    17,  # one vector of 16 lanes and one element
    31,  # one less than a warp, and odd
    127,  # one less than a power of two
    128,  # exactly a tile
    129,  # a tile and one element
    130,  # a tile and half a Philox block
    257,  # a prime above 256
)


# ---- the error rule ----------------------------------------------------------------------------------------------------


def _compare_nonfinite(name: str, out: torch.Tensor, eager: torch.Tensor) -> torch.Tensor:
    """Where eager torch is not finite, `out` is the same NaN or Inf; returns the mask of finite places."""
    finite = eager.isfinite()
    same = torch.where(eager.isnan(), out.isnan(), out.double() == eager.double())
    wrong = (~same) & ~finite
    assert not wrong.any(), f"{name}: {int(wrong.sum())} Inf/NaN places differ from eager torch's"
    assert out[finite].isfinite().all(), f"{name}: Inf or NaN where eager torch is finite"
    return finite


def assert_within_error_rule(
    name: str,
    out: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    factor: float = VALUE_FACTOR,
    rms_ratio: float = RMS_RATIO,
    terms: float = 0.0,
) -> None:
    """out: the kernel's; eager: plain torch in the same dtype; truth: plain torch in fp64. All of one shape.

    Both the largest and the RMS error must be within `factor` of eager's, plus one rounding of the output dtype at the
    size of the largest value (eager can be exact by luck), or of `terms` where these cancel and leave nothing. Inf and NaN
    must be where eager has them.
    """
    assert out.shape == eager.shape == truth.shape, f"{name}: shapes {out.shape}, {eager.shape}, {truth.shape}"
    assert out.dtype == eager.dtype, f"{name}: dtype {out.dtype} instead of {eager.dtype}"
    if not out.numel():
        return
    finite = _compare_nonfinite(name, out, eager)
    finite &= truth.isfinite()
    if not finite.any():
        return
    o, e, t = (x.detach().double()[finite] for x in (out, eager, truth))
    scale = t.abs().max().item()
    rounding = torch.finfo(out.dtype).eps * (scale or terms) + torch.finfo(out.dtype).tiny
    for kind, norm in (("largest", lambda x: x.abs().max()), ("rms", lambda x: x.square().mean().sqrt())):
        ours, theirs = norm(o - t).item(), norm(e - t).item()
        allowed = factor * theirs + rounding
        assert ours <= allowed, (
            f"{name}: {kind} error {ours:.3e}, allowed {allowed:.3e} = {factor} x {theirs:.3e} + ulp"
        )
    ratio = ((o - t).square().mean().sqrt() / t.square().mean().sqrt().clamp(min=1e-300)).item()
    assert ratio <= rms_ratio or scale == 0.0, f"{name}: rms ratio {ratio:.2e} above {rms_ratio}"


def run_with_grads(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None = None,
    **kwargs,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Run `function(*inputs, **kwargs)` and its backward.

    weights: what each output is multiplied with before summing (drawn here when None, by a fixed seed, as numbers that the
    output's dtype holds exactly: a wider run must be given the same gradient, not one that was not rounded). Returns
    outputs, gradients of the floating inputs, and the weights, to be given to the next call on other dtypes or backends.
    """
    leaves = [x.detach().clone(memory_format=torch.preserve_format) if x.is_floating_point() else x for x in inputs]
    leaves = [
        x if not x.is_floating_point() else _with_layout_of(x, source).requires_grad_()
        for x, source in zip(leaves, inputs, strict=True)
    ]
    outputs = function(*leaves, **kwargs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    if weights is None:
        generator = torch.Generator().manual_seed(7)
        drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        weights = [w.to(o.dtype).double().to(o.device) for w, o in zip(drawn, outputs, strict=True)]
    total = [(w.to(o.dtype), o) for w, o in zip(weights, outputs, strict=True) if o.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad([o for _, o in total], wanted, [w for w, _ in total])
    return [o.detach() for o in outputs], list(grads), list(weights)


def _with_layout_of(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    # A leaf with the strides and storage offset of `source`: cloning would make it dense and hide layout bugs.
    return source.detach() if source.stride() != tensor.stride() or source.storage_offset() else tensor


def assert_op_within_error_rule(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    names: Sequence[str],
    grad_names: Sequence[str],
    **kwargs: Any,
) -> None:
    """The error rule for every output and every gradient. function: the op; reference: plain torch, run once in the inputs'
    own dtype and once in fp64 (both take the same arguments).

    A gradient that is 0 in exact arithmetic (of the score of a token that sees itself alone, say) is a difference of terms as
    large as the other gradients, which eager may take exactly and a kernel, or another processor's BLAS, sums in two orders."""
    outputs, grads, weights = run_with_grads(function, inputs, **kwargs)
    eager_outputs, eager_grads, _ = run_with_grads(reference, inputs, weights, **kwargs)
    wide = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    truth_outputs, truth_grads, _ = run_with_grads(reference, wide, weights, **kwargs)
    for name, *three in zip(names, outputs, eager_outputs, truth_outputs, strict=True):
        assert_within_error_rule(name, *three, factor=VALUE_FACTOR)
    terms = max((grad.nan_to_num(0, 0, 0).abs().max().item() for grad in truth_grads if grad.numel()), default=0.0)
    for name, *three in zip(grad_names, grads, eager_grads, truth_grads, strict=True):
        assert_within_error_rule(f"d{name}", *three, factor=GRAD_FACTOR, terms=terms)


# ---- inputs in awkward layouts -----------------------------------------------------------------------------------------

LAYOUTS = ("dense", "column_slice", "row_step", "transposed", "offset", "expanded")


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (for "expanded": the first row repeated) in another memory layout; the gaps hold NaN.

    dense; column_slice: inner part of wider rows; row_step: every second row; transposed: last two strides swapped;
    offset: starts 1 element into its storage, so that no vector load is aligned; expanded: stride 0 in dimension 0.
    """
    if layout == "dense":
        return tensor.contiguous()
    if layout == "expanded":
        return tensor[:1].contiguous().expand_as(tensor)
    gap = float("nan") if tensor.is_floating_point() else 0
    shape = list(tensor.shape)
    if layout == "column_slice":
        wide = tensor.new_full((*shape[:-1], shape[-1] + 5), gap)
        view = wide[..., 3 : 3 + shape[-1]]
    elif layout == "row_step":
        view = tensor.new_full((2 * shape[0] + 1, *shape[1:]), gap)[1::2][: shape[0]]
    elif layout == "transposed":
        view = tensor.new_full((*shape[:-2], shape[-1], shape[-2]), gap).transpose(-1, -2)
    elif layout == "offset":
        view = tensor.new_full((tensor.numel() + 1,), gap)[1:].view(shape)
    else:
        raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")
    return view.copy_(tensor)


# ---- guard regions -----------------------------------------------------------------------------------------------------

_GUARD = 67  # elements before and after, not a multiple of a vector


class GuardedAllocations(TorchDispatchMode):
    """Inside this mode every tensor that an op of ours allocates lies between guard regions; `check()` looks at them.

    Works for C++ too: our ops are redispatched to their kernel with the mode still on, so their at::empty comes here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket._qualified_op_name
        if packet in ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"):
            made = func(*args, **kwargs)
            return self._guard(made) if made.layout == torch.strided else made
        if packet.startswith("lmvae_fast"):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            key = torch._C.DispatchKey.CUDA if tensors and tensors[0].is_cuda else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        return func(*args, **kwargs)

    def _guard(self, made: torch.Tensor) -> torch.Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(made.shape, made.stride(), strict=True)) if made.numel() else 0
        poison = float("nan") if made.is_floating_point() else 77
        # aten.full, not new_full: the latter would come back here through new_empty
        buffer = torch.full((extent + 2 * _GUARD,), poison, dtype=made.dtype, device=made.device)
        buffer[:_GUARD] = buffer[_GUARD + extent :] = 55
        self.guards.append((buffer[:_GUARD], buffer[_GUARD + extent :]))
        return buffer.as_strided(made.shape, made.stride(), _GUARD)

    def check(self) -> None:
        """Fails when a guard was written over, or when no op allocated anything (then the test would prove nothing)."""
        assert self.guards, "no allocation was seen"
        for before, after in self.guards:
            assert (before == 55).all(), "written before the start of an output"
            assert (after == 55).all(), "written past the end of an output"


# ---- backends ----------------------------------------------------------------------------------------------------------


def backends(op: str, dtype: torch.dtype, device: str = "cpu", **facts: Any) -> list[str]:
    """The backends other than the reference that can run `op` here (cpp, and triton in its interpreter on CPU)."""
    return [b for b in registry.BACKENDS if b != "reference" and registry.why_not(op, b, device, dtype, facts) is None]


def require(op: str, name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **facts: Any) -> None:
    """Skip the test, with the registry's reason, where backend `name` cannot run `op`."""
    reason = registry.why_not(op, name, device, dtype, facts)
    if reason is not None:
        pytest.skip(f"{op} on {name}: {reason}")


def on_backend(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function`, run on backend `name`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with registry.backend(name):
            return function(*args, **kwargs)

    return run


def opcheck(primitive: str, args: tuple, choice: str = "cpp", **kwargs: Any) -> None:
    """torch.library.opcheck of one primitive: schema, fake tensors, autograd registration, AOT dispatch."""
    space = registry.namespace(choice)
    torch.library.opcheck(getattr(getattr(torch.ops, space), primitive).default, args, **kwargs)


def assert_fullgraph_equal(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], compiler: str = "aot_eager", **kwargs: Any
) -> None:
    """`torch.compile(fullgraph=True)` gives the very same outputs and gradients as the plain call."""
    plain_outputs, plain_grads, weights = run_with_grads(function, inputs, **kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    outputs, grads, _ = run_with_grads(compiled, inputs, weights, **kwargs)
    for a, b in zip([*outputs, *grads], [*plain_outputs, *plain_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_deterministic(function: Callable[..., Any], inputs: Sequence[torch.Tensor], runs: int = 3, **kwargs) -> None:
    """The same bits run after run, and on 1 thread as on 2."""
    outputs, grads, weights = run_with_grads(function, inputs, **kwargs)
    threads = torch.get_num_threads()
    try:
        for run in range(runs):
            torch.set_num_threads(1 + run % 2)
            again, again_grads, _ = run_with_grads(function, inputs, weights, **kwargs)
            for a, b in zip([*again, *again_grads], [*outputs, *grads], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def raises_naming(error: type[Exception], *words: Any):
    """The block raises `error` with every one of `words` in its message (argument name, both sizes)."""
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert str(word) in str(caught.value), f"{word!r} is not in {caught.value!s}"


# ---- static check of address arithmetic --------------------------------------------------------------------------------


def assert_int64_addresses(source: Any) -> None:
    """Every @triton.jit function of a file multiplies strides by 64-bit indices only. source: a module or its path.

    Rules, checked on the syntax tree: `tl.program_id(..)` is always followed by `.to(tl.int64)`; wherever a name holding
    "stride" is a factor, the other factor is wide, that is, cast with `.to(tl.int64)` or made from a wide name.
    """
    path = source if isinstance(source, Path) else Path(source.__file__)
    kernels = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert kernels, f"{path} has no @triton.jit function"
    for kernel in kernels:
        problems = _narrow_addresses(kernel)
        assert not problems, f"{path.parent.name}/{path.name} {kernel.name}: " + "; ".join(problems)


def _narrow_addresses(kernel: ast.FunctionDef) -> list[str]:
    problems: list[str] = []
    wide: set[str] = set()

    def is_wide(node: ast.AST) -> bool:
        return any(
            (isinstance(n, ast.Name) and n.id in wide)
            or (isinstance(n, ast.Attribute) and n.attr in ("int64", "uint64"))
            or (isinstance(n, ast.Name) and n.id == "divided_program")  # its results are int64
            for n in ast.walk(node)
        )

    for _ in range(3):  # names are few and chains short: three sweeps reach the fixed point
        for node in ast.walk(kernel):
            if isinstance(node, ast.Assign) and is_wide(node.value):
                for target in node.targets:
                    wide.update(n.id for n in ast.walk(target) if isinstance(n, ast.Name))
            if isinstance(node, ast.AugAssign) and is_wide(node.value) and isinstance(node.target, ast.Name):
                wide.add(node.target.id)
    casts = {
        id(n.func.value)
        for n in ast.walk(kernel)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr == "to"
        and "int64" in ast.unparse(n)
    }
    for node in ast.walk(kernel):
        text = ast.unparse(node) if isinstance(node, (ast.Call, ast.BinOp)) else ""
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.program_id" and id(node) not in casts:
            problems.append(f"line {node.lineno}: {text} without .to(tl.int64)")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = [node.left, node.right]
            strided = [isinstance(s, ast.Name) and "stride" in s.id for s in sides]
            for is_stride, other in zip(strided, reversed(sides), strict=True):
                if is_stride and not is_wide(other):
                    problems.append(f"line {node.lineno}: {text} has a 32-bit index")
    return problems


# ---- compiled code -----------------------------------------------------------------------------------------------------

_COMPILED = """
import sys
sys.path.insert(0, "tools")
import compile_jobs
for job in compile_jobs.jobs_of(sys.argv[1]):
    if job.case.name == sys.argv[2] and job.capability == 90 and job.aligned:
        print(compile_jobs.compiled(job, job.digest())["ptx"])
"""


def compiled_code(op: str, case: str) -> str:
    """What Triton compiles a case of the compile gate to for sm_90 (PTX), with sizes that are multiples of 16."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COMPILED, op, case]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
