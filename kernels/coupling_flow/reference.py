"""coupling_flow in plain torch: the truth that every faster path is tested against.

Algebra: Kingma and Dhariwal 2018 (GLOW, arXiv 1807.03039), Dinh et al. 2017 (RealNVP, arXiv 1605.08803); the constants 0.1
and 0.636 are those of FrEIA 0.2, the oracle of the tests. Differentiable through autograd in both directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .spec import Coupling, FlowParams

_ACTIVATE = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_SQUASH = {
    "tanh": torch.tanh,
    "atan": lambda u: 0.636 * torch.atan(u),
    "sigmoid": lambda u: 2 * torch.sigmoid(u) - 1,
    "none": lambda u: u,
}
_SCALE = {
    "softplus": lambda raw: 0.1 * F.softplus(raw, beta=0.5),
    "sigmoid": lambda raw: 10 * torch.sigmoid(raw - 2),
    "exp": torch.exp,
}


def coupling_flow(
    x: torch.Tensor, params: FlowParams, *, cond: torch.Tensor | None = None, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, dim], cond [B, cond_dim] or None -> y [B, dim], logdet [B] (fp32; fp64 for fp64 inputs)."""
    spec, values = params.spec, params.named()
    logdet = torch.zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    stages = list(enumerate(spec.stages))
    for i, stage in reversed(stages) if inverse else stages:
        at = f"stages.{i}."
        if inverse and stage.permutation:
            x, logdet = _permute(x, logdet, stage.permutation, values, at, inverse)
        if inverse and stage.affine:
            scale = _SCALE[stage.affine](values[at + "scale"])
            x, logdet = (x - values[at + "offset"]) / scale, logdet - scale.log().sum()
        if stage.coupling:
            x, logdet = _couple(x, logdet, stage.coupling, params, cond, values, at, inverse)
        if not inverse and stage.affine:
            scale = _SCALE[stage.affine](values[at + "scale"])
            x, logdet = x * scale + values[at + "offset"], logdet + scale.log().sum()
        if not inverse and stage.permutation:
            x, logdet = _permute(x, logdet, stage.permutation, values, at, inverse)
    return x, logdet


def _couple(x, logdet, coupling: Coupling, params: FlowParams, cond, values, at: str, inverse: bool):
    (p0, passive_width), (a0, width) = params.spec.passive(coupling), params.spec.active(coupling)
    passive, active = x[:, p0 : p0 + passive_width], x[:, a0 : a0 + width]
    inputs = torch.cat([passive, cond], dim=1) if coupling.conditional else passive
    outputs = []
    for n, layers in params.spec.layers(coupling):
        h = inputs
        for k in range(len(layers)):
            h = h @ values[f"{at}subnets.{n}.{k}.weight"] + values[f"{at}subnets.{n}.{k}.bias"]
            if k + 1 < len(layers):
                h = _ACTIVATE[coupling.subnets[n].activation](h)
        outputs.append(h)
    raw, shift = (coupling.gain * torch.cat(outputs, dim=1)).split(width, dim=1)
    log_scale = coupling.clamp * _SQUASH[coupling.squash](raw)
    if inverse:
        active, change = (active - shift) * torch.exp(-log_scale), -log_scale
    else:
        active, change = active * torch.exp(log_scale) + shift, log_scale
    halves = [active, passive] if coupling.active == 0 else [passive, active]
    return torch.cat(halves, dim=1), logdet + change.sum(dim=1)


def _permute(x, logdet, kind: str, values, at: str, inverse: bool):
    if kind == "hard":
        return x.index_select(1, values[at + ("inverse" if inverse else "index")]), logdet
    sign = -1 if inverse else 1
    return x @ values[at + ("inverse" if inverse else "matrix")], logdet + sign * values[at + "logdet"]
