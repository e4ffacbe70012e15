"""Floats of ops in compiled graphs: more values than torch.compile makes graphs for, each with the figures of a plain call."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch

from lmvae_fast.kernels.backend import backend
from lmvae_fast.kernels.graph_floats import floats, twin_schema
from lmvae_fast.kernels.latent_attention import latent_attention, latent_attention_decode, latent_attention_step
from lmvae_fast.kernels.latent_kv import latent_kv
from lmvae_fast.kernels.latent_kv.adamw import latent_kv_adamw, latent_kv_norm
from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.kernels.posterior import posterior_sample
from lmvae_fast.kernels.sample_token import sample_token
from tests.conftest import REPOSITORY

from .common import require

VALUES = [0.11 + 0.02 * i for i in range(10)]  # torch._dynamo.config.recompile_limit is 8
PAIR = torch.tensor([3, 4])
Call = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


GRADIENT, LATENT, CACHE = draw(2, 2, 3, 1, 2, 4), draw(3, 5), draw(3, 2, 6, 8)
OFFSETS, LENGTHS, PLACES = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([2, 3, 1]), torch.tensor([1, 2, 0])


def attend(number: str, q: torch.Tensor, k: torch.Tensor, memory: torch.Tensor, value: float) -> torch.Tensor:
    options = {"scale": 0.3, "softcap": 2.0, number: value}
    return latent_attention(q, k, k + 1, memory, memory - 1, cu_seqlens=OFFSETS, visibility="prefix", **options)


def decode(number: str, q: torch.Tensor, value: float) -> torch.Tensor:
    options = {"scale": 0.3, "softcap": 2.0, number: value}
    return latent_attention_decode(q, CACHE, CACHE + 1, LENGTHS, **options)


def step(q: torch.Tensor, value: float) -> tuple[torch.Tensor, ...]:
    keys, values, token = CACHE.clone(), CACHE + 1, q[:, :2].contiguous()
    out = latent_attention_step(q, token, token, keys, values, PLACES, PLACES + 1, scale=value)
    return out, keys, values


def adamw(number: str, weight: torch.Tensor, value: float) -> tuple[torch.Tensor, ...]:
    held = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
    options = {"betas": (value, 0.95)} if number == "beta1" else {number: value}
    if number == "dropout":
        options["seeds"] = [PAIR]
    one = torch.ones(())
    latent_kv_adamw(*held, [GRADIENT], [LATENT], step=one, lr=0.1 * one, clip=one, **options)
    return tuple(held)


def norm(weight: torch.Tensor, value: float) -> torch.Tensor:
    return latent_kv_norm(weight, [GRADIENT], [LATENT], dropout=value, seeds=[PAIR])


WEIGHT = (2, 2, 1, 2, 4, 5)
#: name -> (op for the registry, function of tensors and one number, shapes of the tensors, whether they get gradients)
CASES: dict[str, tuple[str, Call, tuple[tuple[int, ...], ...], bool]] = {
    "posterior_sample kl_target": (
        "posterior_sample",
        lambda mu, logvar, t: posterior_sample(mu, logvar, seed=PAIR, kl="free_bits", kl_target=t),
        ((4, 8), (4, 8)),
        True,
    ),
    "latent_kv dropout": (
        "latent_kv",
        lambda z, weight, t: latent_kv(z, weight, dropout=t, seed=PAIR),
        ((3, 5), WEIGHT),
        True,
    ),
    "latent_kv_norm dropout": ("latent_kv", norm, (WEIGHT,), False),
    "latent_kv_adamw eps": ("latent_kv", partial(adamw, "eps"), (WEIGHT,), False),
    "latent_kv_adamw weight_decay": ("latent_kv", partial(adamw, "weight_decay"), (WEIGHT,), False),
    "latent_kv_adamw beta1": ("latent_kv", partial(adamw, "beta1"), (WEIGHT,), False),
    "latent_kv_adamw dropout": ("latent_kv", partial(adamw, "dropout"), (WEIGHT,), False),
    "lm_head_loss softcap": (
        "lm_head_loss",
        lambda h, w, t: lm_head_loss(h, w, torch.arange(4), softcap=t),
        ((4, 8), (11, 8)),
        True,
    ),
    "lm_head_loss logit_scale": (
        "lm_head_loss",
        lambda h, w, t: lm_head_loss(h, w, torch.arange(4), logit_scale=t),
        ((4, 8), (11, 8)),
        True,
    ),
    "latent_attention scale": (
        "latent_attention",
        partial(attend, "scale"),
        ((5, 2, 8), (5, 1, 8), (2, 1, 3, 8)),
        True,
    ),
    "latent_attention softcap": (
        "latent_attention",
        partial(attend, "softcap"),
        ((5, 2, 8), (5, 1, 8), (2, 1, 3, 8)),
        True,
    ),
    "latent_attention_decode scale": ("latent_attention_decode", partial(decode, "scale"), ((3, 4, 8),), False),
    "latent_attention_decode softcap": ("latent_attention_decode", partial(decode, "softcap"), ((3, 4, 8),), False),
    "latent_attention_step scale": ("latent_attention_decode", step, ((3, 4, 8),), False),
    "sample_token temperature": (
        "sample_token",
        lambda x, t: sample_token(x, temperature=t, seed=PAIR),
        ((50, 30),),
        False,
    ),
    "sample_token top_p": ("sample_token", lambda x, t: sample_token(x, top_p=t, seed=PAIR), ((50, 30),), False),
    "sample_token min_p": ("sample_token", lambda x, t: sample_token(x, min_p=t, seed=PAIR), ((50, 30),), False),
    "sample_token repetition_penalty": (
        "sample_token",
        lambda x, t: sample_token(x, repetition_penalty=t, seen=x > 0, seed=PAIR),
        ((50, 30),),
        False,
    ),
}


def run(function: Call, tensors: list[torch.Tensor], value: float, graded: bool) -> list[torch.Tensor]:
    """Outputs of a call, and gradients of a weighted sum of them."""
    leaves = [x.clone().requires_grad_(graded) for x in tensors]
    outputs = function(*leaves, value)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    if graded:
        sum((i + 1) * x.square().sum() for i, x in enumerate(outputs)).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in leaves if graded)]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, None) for name in CASES), ("posterior_sample kl_target", True), ("sample_token temperature", True)],
)
def test_a_number_that_changes_is_an_input_of_one_graph(name, dynamic):
    op, function, shapes, graded = CASES[name]
    require(op, "cpp")
    tensors = [draw(*shape) for shape in shapes]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with backend("cpp"):
        found = [run(compiled, tensors, value, graded) for value in VALUES]
        wanted = [run(function, tensors, value, graded) for value in VALUES]
    for got, want in zip(found, wanted, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    if "seed" not in name:
        assert any(not torch.equal(a, b) for a, b in zip(wanted[0], wanted[-1], strict=True)), "the number does nothing"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, "one for the first value, which might be the only one, and one for all others"


#: What the reference is compiled anew for at every value (docs/debugging.md).
CONSTANTS_OF_THE_REFERENCE = {"kl_target", "dropout", "beta1", "logit_scale", "min_p"}


def test_the_page_lists_what_the_reference_is_compiled_anew_for():
    text = (REPOSITORY / "docs" / "debugging.md").read_text()
    sentence = text[text.index('inside `backend("reference")`') :].split("is compiled once", 1)[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == CONSTANTS_OF_THE_REFERENCE


@pytest.mark.parametrize(
    ("name", "graphs"),
    [("sample_token min_p", 4), ("sample_token temperature", 2), ("latent_kv_adamw eps", 2)],
)
def test_graphs_of_the_reference(name, graphs):
    """One for a value, or one for the first and one for all others; the figures are right either way."""
    _, function, shapes, graded = CASES[name]
    assert (name.split()[1] in CONSTANTS_OF_THE_REFERENCE) == (graphs == 4)
    tensors = [draw(*shape) for shape in shapes]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with backend("reference"):
        for value in VALUES[:4]:
            for got, want in zip(
                run(compiled, tensors, value, graded), run(function, tensors, value, graded), strict=True
            ):
                torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_schemas_of_twins():
    schema = "f(Tensor(a!) x, float y, int? n, float? floated, Tensor[] zs) -> (Tensor, Tensor)"
    assert floats(schema) == {1, 3}
    assert twin_schema(schema) == (
        "f_numbers(Tensor(a!) x, Tensor y, int? n, Tensor? floated, Tensor[] zs) -> (Tensor, Tensor)"
    )
    assert floats("f(Tensor x) -> ()") == frozenset()
