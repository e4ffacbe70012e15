"""aggregate_logpdf inside torch's machinery, its memory, and what is refused."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from lmvae_fast.kernels import backend as registry
from lmvae_fast.kernels.aggregate_logpdf import aggregate_logpdf
from lmvae_fast.kernels.aggregate_logpdf.op import LARGEST_JOINT_DIM
from lmvae_fast.kernels.backend import BackendError, backend

from .common import (
    GuardedAllocations,
    assert_deterministic,
    assert_fullgraph_equal,
    on_backend,
    opcheck,
    raises_naming,
    require,
)
from .test_aggregate_logpdf import (
    FAST,
    FORMS,
    inputs,
    offsets,
)

# ---- what every op keeps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
def test_nothing_is_written_outside_the_outputs(name):
    require("aggregate_logpdf", name)
    for per_dim, dim in itertools.product(FORMS, (1, 5, 130)):
        arguments = [x.requires_grad_() for x in inputs((2, 7, dim), 7)]
        with GuardedAllocations() as guards, backend(name):
            aggregate_logpdf(*arguments, per_dim=per_dim, cu_posteriors=offsets([3, 4])).sum().backward()
        guards.check()


@pytest.mark.parametrize("per_dim", FORMS)
def test_memory_is_that_of_the_arguments(per_dim):
    """Nothing of all rows by all posteriors by dimension is allocated, forward or backward."""
    require("aggregate_logpdf", "cpp")
    samples, posteriors, dim = 16, 64, 32
    arguments = [x.requires_grad_() for x in inputs((samples, posteriors, dim), posteriors)]
    with GuardedAllocations() as made, backend("cpp"):
        aggregate_logpdf(*arguments, per_dim=per_dim).sum().backward()
    total = sum(before.untyped_storage().nbytes() for before, _ in made.guards)
    assert total < 6 * samples * posteriors * dim * 4  # the dense tensor has 64 times the elements of z


@pytest.mark.parametrize("per_dim", FORMS)
def test_same_bits_run_to_run_and_for_any_number_of_threads(per_dim):
    require("aggregate_logpdf", "cpp")
    options = {"per_dim": per_dim, "cu_z": offsets([301, 4, 95]), "cu_posteriors": offsets([20, 1, 9])}
    assert_deterministic(on_backend(aggregate_logpdf, "cpp"), inputs((3, 400, 65), 30), **options)


@pytest.mark.parametrize("per_dim", FORMS)
def test_a_row_does_not_depend_on_its_batch(per_dim):
    require("aggregate_logpdf", "cpp")
    z, mu, logvar = inputs((50, 19), 23)
    whole = aggregate_logpdf(z, mu, logvar, per_dim=per_dim)
    alone = torch.cat([aggregate_logpdf(z[i : i + 1], mu, logvar, per_dim=per_dim) for i in range(50)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=0)


@pytest.mark.parametrize("choice", FAST)
@pytest.mark.parametrize("per_dim", FORMS)
def test_opcheck(choice, per_dim):
    require("aggregate_logpdf", choice)
    z, mu, logvar = (x.requires_grad_() for x in inputs((2, 3, 6), 4))
    cu_z, cu_posteriors = offsets([1, 2]), offsets([3, 1])
    opcheck("aggregate_logpdf_fwd", (z, mu, logvar, None, None, per_dim, 0.0), choice)
    opcheck("aggregate_logpdf_fwd", (z, mu, logvar, cu_z, cu_posteriors, per_dim, 1e-4), choice)
    shape = (2, 3, 6) if per_dim else (2, 3)
    tensors = (torch.randn(shape), torch.randn(shape), z.detach(), mu.detach(), logvar.detach(), cu_z, cu_posteriors)
    for needed in ((True, True), (True, False), (False, True)):
        opcheck("aggregate_logpdf_bwd", (*tensors, per_dim, 1e-4, *needed), choice)


@pytest.mark.parametrize("name", ["auto", "cpp", "triton", "reference"])
@pytest.mark.parametrize("per_dim", FORMS)
def test_fullgraph_compile_gives_the_same(name, per_dim):
    if name != "auto":
        require("aggregate_logpdf", name)
    with backend(name):
        arguments = inputs((2, 5, 6), 5)
        assert_fullgraph_equal(aggregate_logpdf, arguments, per_dim=per_dim)
        assert_fullgraph_equal(
            aggregate_logpdf, arguments, per_dim=per_dim, cu_posteriors=offsets([2, 3]), min_var=1e-4
        )
        assert_fullgraph_equal(aggregate_logpdf, arguments, per_dim=per_dim, groups=torch.tensor([4, 1, 4, 4, 1]))


def test_a_changing_constant_and_changing_sizes_do_not_break_the_graph():
    require("aggregate_logpdf", "cpp")
    torch._dynamo.reset()
    compiled = torch.compile(aggregate_logpdf, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, min_var in ((3, 0.1), (5, 0.2), (7, 0.3)):
        arguments = inputs((rows, 6), 4)
        expected = aggregate_logpdf(*arguments, per_dim=True, min_var=min_var)
        torch.testing.assert_close(compiled(*arguments, per_dim=True, min_var=min_var), expected, rtol=0, atol=0)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The C++ of older CPUs, in a process of its own: the choice is made once."""
    require("aggregate_logpdf", "cpp")
    if isa == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this CPU has no AVX-512")
    code = (
        "import itertools, torch; from tests.kernels import test_aggregate_logpdf as t;"
        f"assert torch.ops.lmvae_fast.cpu_isa() == '{isa}'; torch.manual_seed(0);"
        "[t.check('cpp', t.inputs((9, d), 7, k), per_dim=p, min_var=1e-4)"
        " for d, k, p in itertools.product((17, 33, 130), (torch.float32, torch.bfloat16, torch.float16), t.FORMS)];"
        "[t.test_fp64_is_fp64(p, s) for p in t.FORMS for s in (5.0, 30.0)]"
    )
    environment = {**os.environ, "LMVAE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_autocast_keeps_the_input_dtype():
    arguments = inputs((3, 8), 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = aggregate_logpdf(*arguments, per_dim=True)
    torch.testing.assert_close(found, aggregate_logpdf(*arguments, per_dim=True), rtol=0, atol=0)


# ---- what is refused -------------------------------------------------------------------------------------------------------


def test_vmap_is_refused():
    z, mu, logvar = inputs((2, 3, 8), 4)
    with raises_naming(TypeError, "aggregate_logpdf", "vmap"):
        torch.func.vmap(lambda x: aggregate_logpdf(x, mu, logvar, per_dim=True))(z)


@pytest.mark.parametrize("name", FAST)
def test_second_derivatives_are_refused_not_wrong(name):
    require("aggregate_logpdf", name)
    z, mu, logvar = (x.requires_grad_() for x in inputs((3, 8), 4))
    with backend(name):
        found = aggregate_logpdf(z, mu, logvar, per_dim=False)
    grad = torch.autograd.grad(found.sum(), mu, create_graph=True)[0]
    with raises_naming(RuntimeError, "aggregate_logpdf", "second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", FAST)
def test_forward_mode_is_refused_not_wrong(name):
    require("aggregate_logpdf", name)
    z, mu, logvar = inputs((3, 8), 4)
    with backend(name), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        with raises_naming(RuntimeError, "aggregate_logpdf", "forward-mode"):
            aggregate_logpdf(dual, mu, logvar, per_dim=True)
    with backend("reference"):
        _, tangent = torch.func.jvp(
            lambda x: aggregate_logpdf(x, mu, logvar, per_dim=True), (z,), (torch.ones_like(z),)
        )
    with backend(name), raises_naming(RuntimeError, "aggregate_logpdf", "forward-mode"):
        torch.func.jvp(lambda x: aggregate_logpdf(x, mu, logvar, per_dim=True), (z,), (torch.ones_like(z),))
    _, by_itself = torch.func.jvp(lambda x: aggregate_logpdf(x, mu, logvar, per_dim=True), (z,), (torch.ones_like(z),))
    torch.testing.assert_close(by_itself, tangent, rtol=0, atol=0)  # with no backend forced, the reference runs
    leaf = z.clone().requires_grad_()
    grad = torch.autograd.grad(aggregate_logpdf(leaf, mu, logvar, per_dim=True).sum(), leaf)[0]
    torch.testing.assert_close(tangent, grad)


def test_a_changed_input_is_noticed():
    """Backward reads its inputs again: one that was written to in between would give gradients of other values."""
    require("aggregate_logpdf", "cpp")
    z, mu, logvar = (x.requires_grad_() for x in inputs((3, 8), 4))
    with backend("cpp"):
        found = aggregate_logpdf(z, mu, logvar, per_dim=True)
    with torch.no_grad():
        mu.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_bad_tensors_are_named():
    z, mu, logvar = inputs((4, 8), 4)
    with raises_naming(TypeError, "z is torch.float64", "mu torch.float32"):
        aggregate_logpdf(z.double(), mu, logvar, per_dim=True)
    with raises_naming(TypeError, "logvar", "list"):
        aggregate_logpdf(z, mu, [1.0], per_dim=True)
    with raises_naming(TypeError, "logvar is torch.bfloat16", "mu torch.float32"):
        aggregate_logpdf(z, mu, logvar.bfloat16(), per_dim=True)
    with raises_naming(TypeError, "z", "int64"):
        aggregate_logpdf(z.long(), mu.long(), logvar.long(), per_dim=True)
    with raises_naming(ValueError, "mu", "[4, 8]", "logvar", "[4, 7]"):
        aggregate_logpdf(z, mu, logvar[:, :7], per_dim=True)
    with raises_naming(ValueError, "z", "D = 8", "[4, 7]"):
        aggregate_logpdf(z[:, :7], mu, logvar, per_dim=True)
    with raises_naming(ValueError, "z", "[8]"):
        aggregate_logpdf(z[0], mu, logvar, per_dim=True)
    with raises_naming(ValueError, "mu", "[N, D]", "[8]"):
        aggregate_logpdf(z, mu[0], logvar[0], per_dim=True)
    with raises_naming(ValueError, "mu", "[4, 0]"):
        aggregate_logpdf(z[:, :0], mu[:, :0], logvar[:, :0], per_dim=True)
    with raises_naming(ValueError, "z [4, 8]", "mu [0, 8]", "no posterior"):
        aggregate_logpdf(z, mu[:0], logvar[:0], per_dim=True)
    with raises_naming(ValueError, "z is on meta", "cpu"):
        aggregate_logpdf(z.to("meta"), mu, logvar, per_dim=True)
    for bad in (-1e-4, float("nan"), float("inf"), "0"):
        with raises_naming(ValueError, "min_var"):
            aggregate_logpdf(z, mu, logvar, per_dim=True, min_var=bad)


@pytest.mark.parametrize("name", ["reference", *FAST])
def test_bad_groups_are_named(name):
    require("aggregate_logpdf", name)
    z, mu, logvar = inputs((5, 8), 4)

    def call(**options):
        with backend(name):
            aggregate_logpdf(z, mu, logvar, per_dim=False, **options)

    with raises_naming(ValueError, "z", "5 rows", "4", "cu_z"):
        call(cu_posteriors=offsets([4]))
    with raises_naming(ValueError, "z", "5 rows", "4", "groups="):
        call(groups=torch.zeros(4).long())
    with raises_naming(ValueError, "cu_z", "without cu_posteriors"):
        call(cu_z=offsets([5]))
    with raises_naming(ValueError, "groups", "cu_z", "one of them"):
        call(cu_z=offsets([5]), cu_posteriors=offsets([4]), groups=torch.zeros(4).long())
    with raises_naming(ValueError, "cu_z", "[3]", "cu_posteriors", "[2]"):
        call(cu_z=offsets([5, 0]), cu_posteriors=offsets([4]))
    with raises_naming(TypeError, "cu_z", "int64"):
        call(cu_z=offsets([5]).long(), cu_posteriors=offsets([4]))
    with raises_naming(ValueError, "cu_posteriors", "0 to the 4", "0 to 3"):
        call(cu_z=offsets([5]), cu_posteriors=offsets([3]))
    with raises_naming(ValueError, "cu_z", "must not decrease", "group 1", "-1"):
        call(cu_z=torch.tensor([0, 3, 2, 5], dtype=torch.int32), cu_posteriors=offsets([1, 2, 1]))
    with raises_naming(ValueError, "group 1", "2 rows of z and no posterior"):
        call(cu_z=offsets([3, 2]), cu_posteriors=offsets([4, 0]))
    with raises_naming(TypeError, "groups", "ids of z", "list"):
        call(groups=([0] * 5, torch.zeros(4).long()))
    with raises_naming(TypeError, "groups", "float32"):
        call(groups=(torch.zeros(5), torch.zeros(4).long()))
    with raises_naming(ValueError, "groups", "ids of the posteriors", "[4]", "[3]"):
        call(groups=(torch.zeros(5).long(), torch.zeros(3).long()))


def test_the_kernel_itself_looks_at_offsets():
    """Compiled code does not come past the checks in Python."""
    require("aggregate_logpdf", "cpp")
    z, mu, logvar = inputs((1, 5, 8), 4)
    run = torch.ops.lmvae_fast.aggregate_logpdf_fwd
    for cu_z, cu_posteriors in (([6], [4]), ([5], [3]), ([7, -2], [2, 2]), ([5, 0], [0, 4])):
        with pytest.raises(ValueError, match=r"must run|must not decrease|no posterior"):
            run(z, mu, logvar, offsets(cu_z), offsets(cu_posteriors), True, 0.0)


def test_a_forced_backend_that_cannot_run_is_an_error():
    z, mu, logvar = inputs((2, 4), 2)
    with backend("triton"), raises_naming(BackendError, "aggregate_logpdf", "float64"):
        aggregate_logpdf(z.double(), mu.double(), logvar.double(), per_dim=True)
    if registry.why_not("aggregate_logpdf", "triton", "cpu", torch.float32, {}) is None:
        wide = torch.zeros(1, LARGEST_JOINT_DIM + 1)
        with backend("triton"), raises_naming(BackendError, "aggregate_logpdf", str(LARGEST_JOINT_DIM)):
            aggregate_logpdf(wide, wide, wide, per_dim=False)
