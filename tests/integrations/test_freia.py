"""FrEIA 0.2 is the oracle of the flow: a converted sequence is the same function, with the same gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.freia import convert

Ff = pytest.importorskip("FrEIA.framework")
Fm = pytest.importorskip("FrEIA.modules")


def mlp(*hidden: int, activation: type = nn.ReLU):
    def build(c_in: int, c_out: int) -> nn.Sequential:
        widths, layers = [c_in, *hidden, c_out], []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        return nn.Sequential(*layers[:-1])

    return build


def sequence(dim: int, blocks: list, cond_dim: int = 0, double: bool = False) -> nn.Module:
    torch.manual_seed(0)
    inn = Ff.SequenceINN(dim)
    for cls, options in blocks:
        conditional = {"cond": 0, "cond_shape": (cond_dim,)} if cond_dim and "subnet_constructor" in options else {}
        inn.append(cls, **conditional, **options)
    with torch.no_grad():  # away from the special values of the initialisation (scale 1, offset 0)
        for name, p in inn.named_parameters():
            if p.is_floating_point() and "w_perm" not in name and "subnet" not in name:
                p.add_(0.1 * torch.randn_like(p))
    for module in inn:
        if isinstance(module, Fm.ActNorm):
            module.init_on_next_batch = False
    return inn.double() if double else inn


ALLINONE = (Fm.AllInOneBlock, {"subnet_constructor": mlp(32)})
SEQUENCES = {
    "allinone": (16, [ALLINONE] * 4, 0),
    "allinone odd": (7, [ALLINONE] * 3, 0),
    "allinone dim 2": (2, [ALLINONE] * 3, 0),
    "allinone soft": (9, [(Fm.AllInOneBlock, {"subnet_constructor": mlp(24), "permute_soft": True})] * 3, 0),
    "allinone reversed": (9, [(Fm.AllInOneBlock, {"subnet_constructor": mlp(24), "reverse_permutation": True})] * 3, 0),
    "allinone sigmoid": (
        8,
        [(Fm.AllInOneBlock, {"subnet_constructor": mlp(24), "global_affine_type": "SIGMOID"})] * 2,
        0,
    ),
    "allinone exp": (8, [(Fm.AllInOneBlock, {"subnet_constructor": mlp(24), "global_affine_type": "EXP"})] * 2, 0),
    "allinone conditional": (10, [(Fm.AllInOneBlock, {"subnet_constructor": mlp(24, 12)})] * 3, 5),
    "allinone clamp 1, gelu, 3 layers": (
        11,
        [(Fm.AllInOneBlock, {"subnet_constructor": mlp(20, 30, activation=nn.GELU), "affine_clamping": 1.0})] * 3,
        0,
    ),
    "glow": (12, [(Fm.GLOWCouplingBlock, {"subnet_constructor": mlp(32)})] * 4, 0),
    "glow odd, tanh, silu": (
        13,
        [(Fm.GLOWCouplingBlock, {"subnet_constructor": mlp(24, activation=nn.SiLU), "clamp_activation": "TANH"})] * 3,
        0,
    ),
    "glow split 3": (10, [(Fm.GLOWCouplingBlock, {"subnet_constructor": mlp(24), "split_len": 3})] * 3, 0),
    "rnvp sigmoid conditional": (
        9,
        [(Fm.RNVPCouplingBlock, {"subnet_constructor": mlp(16), "clamp_activation": "SIGMOID"})] * 3,
        4,
    ),
    "one-sided, no clamp": (
        10,
        [
            (
                Fm.AffineCouplingOneSided,
                {"subnet_constructor": mlp(24), "clamp": 1.0, "clamp_activation": nn.Identity()},
            ),
            (Fm.PermuteRandom, {"seed": 3}),
            (Fm.ActNorm, {}),
        ]
        * 3,
        0,
    ),
    "one-sided conditional": (9, [(Fm.AffineCouplingOneSided, {"subnet_constructor": mlp(16)})] * 2, 3),
    "linear subnets": (6, [(Fm.RNVPCouplingBlock, {"subnet_constructor": mlp()})] * 2, 0),
    "everything": (
        10,
        [
            (Fm.PermuteRandom, {"seed": 1}),
            (Fm.ActNorm, {}),
            (Fm.GLOWCouplingBlock, {"subnet_constructor": mlp(16)}),
            (Fm.ActNorm, {}),
            (Fm.PermuteRandom, {"seed": 2}),
            (Fm.PermuteRandom, {"seed": 3}),
            ALLINONE,
            (Fm.RNVPCouplingBlock, {"subnet_constructor": mlp(16), "clamp": 1.3}),
            (Fm.ActNorm, {}),
            (Fm.ActNorm, {}),
        ],
        3,
    ),
}


def gradients_by_name(flow) -> dict[str, torch.Tensor]:
    spec = flow.spec
    return {slot.name: slot.view(flow.theta.grad) for slot in spec.slots[0]}


def freia_gradients(inn: nn.Module, flow) -> dict[str, torch.Tensor]:
    """FrEIA's gradients under the names of ours, found by converting the gradients as if they were the weights."""
    with torch.no_grad():
        for module in inn.modules():
            for name, p in module._parameters.items():
                if p is not None and p.grad is not None and p.requires_grad:
                    module._parameters[name] = nn.Parameter(p.grad.clone())
    return {name: view for name, view in convert(inn).named_views().items() if view.is_floating_point()}


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("rev", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_converted_flow_equals_freia(name: str, rev: bool, memory: str) -> None:
    dim, blocks, cond_dim = SEQUENCES[name]
    inn = sequence(dim, blocks, cond_dim)
    flow = convert(inn, memory=memory)
    x = torch.randn(19, dim)
    cond = torch.randn(19, cond_dim) if cond_dim else None
    weight, weight_logdet = torch.randn(19, dim), torch.randn(19)
    results = []
    for run in (
        lambda x, c: inn(x, c=None if c is None else [c], rev=rev),
        lambda x, c: flow.inverse(x, c) if rev else flow(x, c),
    ):
        x_ = x.clone().requires_grad_()
        c_ = cond.clone().requires_grad_() if cond is not None else None
        y, logdet = run(x_, c_)
        ((y * weight).sum() + (logdet * weight_logdet).sum()).backward()
        results.append((y, logdet, x_.grad, c_.grad if c_ is not None else torch.zeros(())))
    (y, logdet, gx, gc), (y2, logdet2, gx2, gc2) = results
    torch.testing.assert_close(y2, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logdet2, logdet, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gx2, gx, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gc2, gc, rtol=1e-4, atol=1e-4)
    ours, theirs = gradients_by_name(flow), freia_gradients(inn, flow)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_converted_flow_equals_freia_in_fp64() -> None:
    inn = sequence(15, [ALLINONE] * 4, double=True)
    flow = convert(inn)
    x = torch.randn(6, 15, dtype=torch.float64)
    y, logdet = inn(x)
    y2, logdet2 = flow(x)
    torch.testing.assert_close(y2, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logdet2, logdet, rtol=1e-12, atol=1e-12)


def test_shared_activation_module_is_understood() -> None:
    relu = nn.ReLU()

    def subnet(i: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(i, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, o))

    inn = sequence(6, [(Fm.AllInOneBlock, {"subnet_constructor": subnet})])
    x = torch.randn(3, 6)
    torch.testing.assert_close(convert(inn)(x)[0], inn(x)[0])


def tanh_gelu(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, 4), nn.GELU(approximate="tanh"), nn.Linear(4, o))


@pytest.mark.parametrize(
    ("dims", "blocks", "message"),
    [
        ((8,), [(Fm.AllInOneBlock, {"subnet_constructor": mlp(8), "gin_block": True})], "gin_block"),
        ((8,), [(Fm.AllInOneBlock, {"subnet_constructor": mlp(8), "learned_householder_permutation": 2})], "householder"),
        ((8,), [(Fm.GINCouplingBlock, {"subnet_constructor": mlp(8)})], "GINCouplingBlock"),
        ((8,), [(Fm.AllInOneBlock, {"subnet_constructor": mlp(8, activation=nn.Tanh)})], "Tanh"),
        ((8,), [(Fm.GLOWCouplingBlock, {"subnet_constructor": mlp(8), "clamp_activation": torch.sin})], "clamp_activation"),
        ((8,), [(Fm.AllInOneBlock, {"subnet_constructor": lambda i, o: nn.Linear(i, o, bias=False)})], "bias"),
        ((8,), [(Fm.AllInOneBlock, {"subnet_constructor": tanh_gelu})], "tanh"),
        ((8,), [(Fm.ActNorm, {})], "has not seen data"),
        ((4, 8, 8), [(Fm.PermuteRandom, {})], "vectors"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(dims: tuple, blocks: list, message: str) -> None:
    inn = Ff.SequenceINN(*dims)
    for cls, options in blocks:
        inn.append(cls, **options)
    with pytest.raises(ConfigError, match=message):
        convert(inn)


def test_nan_in_a_soft_permutation_is_refused() -> None:
    inn = sequence(6, [(Fm.AllInOneBlock, {"subnet_constructor": mlp(8), "permute_soft": True})])
    with torch.no_grad():
        inn[0].w_perm[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        convert(inn)
