"""lm_head_loss inside torch's machinery, its memory, and bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from lmvae_fast.kernels import lm_head_loss as package
from lmvae_fast.kernels.backend import backend, extension
from lmvae_fast.kernels.lm_head_loss import lm_head_loss, reference
from tests.kernels.test_lm_head_loss import (
    EVERY,
    FAST,
    _seed,  # noqa: F401
    call,
    inputs,
)

from .common import (
    assert_deterministic,
    assert_fullgraph_equal,
    assert_int64_addresses,
    assert_within_error_rule,
    on_backend,
    opcheck,
    raises_naming,
    require,
)

# ---- integration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic(name, dtype):
    require("lm_head_loss", name, dtype)
    shape = (200, 40, 2100) if name == "cpp" else (20, 24, 300)
    assert_deterministic(on_backend(call(lm_head_loss), name), inputs(*shape, dtype))


@pytest.mark.parametrize("name", EVERY)
def test_fullgraph(name):
    require("lm_head_loss", name)
    assert_fullgraph_equal(on_backend(call(lm_head_loss), name), inputs(7, 12, 30), softcap=4.0)


def test_opcheck():
    require("lm_head_loss", "cpp")
    hidden, weight, bias, token_weights, labels = inputs(5, 8, 30)
    for want in ((True, True, True), (True, False, False), (False, False, False)):
        leaves = [x.clone().requires_grad_(w) for x, w in zip((hidden, weight, bias), want, strict=True)]
        opcheck("lm_head_loss_fwd", (leaves[0], leaves[1], labels, leaves[2], token_weights, 0.0, 1.0, 0, *want))


def test_autocast_casts_as_linear_does():
    require("lm_head_loss", "cpp", torch.bfloat16)
    hidden, weight, bias, token_weights, labels = inputs(7, 16, 30)
    hidden.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, nll = call(lm_head_loss)(hidden, weight, bias, token_weights, labels)
    loss.backward()
    assert nll.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32
    half = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    truth = [x.detach().double() for x in (hidden, weight, bias, token_weights)]
    _, eager = call(reference.lm_head_loss)(*half, token_weights, labels)
    assert_within_error_rule("nll", nll.detach(), eager, call(reference.lm_head_loss)(*truth, labels)[1])


def test_vmap_is_refused():
    hidden, weight, _, _, labels = inputs(4, 8, 20)
    with raises_naming(TypeError, "lm_head_loss", "vmap"):
        torch.func.vmap(lambda h: lm_head_loss(h, weight, labels)[0])(torch.stack([hidden, hidden]))


def test_triton_addresses_are_64_bit():
    require("lm_head_loss", "triton")
    pytest.importorskip("triton", reason="triton is not installed")
    from lmvae_fast.kernels.lm_head_loss import triton as module

    assert_int64_addresses(module)


@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_other_instruction_sets(isa):
    """The engine through torch's BLAS and the copies for older CPUs, each in a process of its own."""
    if not extension()[0]:
        pytest.skip(extension()[1])
    tests = "test_error_rule_with_softcap_and_scale or test_error_rule_over or test_inf_and_nan or test_deterministic"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", f"({tests}) and not triton"]
    done = subprocess.run(command, env={**os.environ, "LMVAE_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_memory_has_no_vocabulary_dimension():
    """The frozen head at [300 tokens, 64, 20,000]: full logits would take 24 MB; the resident set grows by less than 4."""
    require("lm_head_loss", "cpp")
    program = """
import resource, torch
from lmvae_fast.kernels.lm_head_loss import lm_head_loss
torch.set_num_threads(1)
h, w, y = torch.randn(300, 64, requires_grad=True), torch.randn(20000, 64), torch.randint(0, 20000, (300,))
def step(n): lm_head_loss(h[:n], w, y[:n])[0].backward()
step(2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(300)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 1024, f"{done.stdout.strip()} kB"


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "cpp"])
@pytest.mark.parametrize("label", [20, -1, -101, 2**40])
def test_labels_out_of_range(name, label):
    require("lm_head_loss", name)
    hidden, weight, _, _, labels = inputs(4, 8, 20)
    labels[3] = label
    with backend(name), raises_naming(ValueError, "labels[3]", label, "[0, 20)"):
        lm_head_loss(hidden, weight, labels)


def test_label_out_of_range_is_nan_on_the_device():
    """No host synchronisation on CUDA: the token's nll and gradients are NaN, the others' are not."""
    require("lm_head_loss", "triton")
    hidden, weight, _, _, labels = inputs(4, 8, 20)
    labels[3] = 20
    hidden.requires_grad_()
    with backend("triton"):
        loss, nll = lm_head_loss(hidden, weight, labels)
    loss.backward()
    assert nll.isnan().tolist() == [False, False, False, True]
    assert hidden.grad.isnan().any(dim=1).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(hidden=torch.randn(2, 4, 8)), ValueError, ("hidden", "(2, 4, 8)")),
        (dict(weight=torch.randn(20, 9)), ValueError, ("weight", "(20, 9)", "(4, 8)")),
        (dict(weight=torch.randn(0, 8)), ValueError, ("weight", "0 rows")),
        (dict(weight=torch.randn(20, 8, dtype=torch.bfloat16)), TypeError, ("weight", "bfloat16", "float32")),
        (dict(hidden=torch.ones(4, 8, dtype=torch.int64)), TypeError, ("hidden", "int64")),
        (dict(labels=torch.zeros(5, dtype=torch.int64)), ValueError, ("labels", "(5,)", "(4,)")),
        (dict(labels=torch.zeros(4, dtype=torch.int32)), TypeError, ("labels", "int32")),
        (dict(labels=torch.zeros(4, dtype=torch.int64, device="meta")), ValueError, ("labels", "meta", "cpu")),
        (dict(bias=torch.zeros(19)), ValueError, ("bias", "(19,)", "(20,)")),
        (dict(token_weights=torch.zeros(3)), ValueError, ("token_weights", "(3,)", "(4,)")),
        (dict(token_weights=torch.zeros(4, dtype=torch.int64)), TypeError, ("token_weights", "int64")),
        (dict(softcap=0.0), ValueError, ("softcap", "0.0")),
        (dict(softcap=math.nan), ValueError, ("softcap", "nan")),
        (dict(logit_scale=math.inf), ValueError, ("logit_scale", "inf")),
        (dict(chunk=0), ValueError, ("chunk", "0")),
    ],
)
def test_bad_input(change, error, words):
    good = dict(hidden=torch.randn(4, 8), weight=torch.randn(20, 8), labels=torch.zeros(4, dtype=torch.int64))
    with raises_naming(error, *words):
        lm_head_loss(**{**good, **change})


def test_face():
    assert package.__all__ == ["lm_head_loss"]
