"""normflows 1.7 and nflows 0.14: sequences of affine couplings as our flow, the same function in the same direction."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.freia.conversion import Builder
from lmvae_fast.integrations.versions import warn_outside
from lmvae_fast.models.flow import CouplingFlow

# Their couplings add whatever the subnet says to the log-scale: no clamp, no gain.
_PLAIN = SimpleNamespace(clamp=1.0)


def from_normflows(flows: Any, *, memory: str = "save") -> CouplingFlow:
    """normflows' ``NormalizingFlow`` (its ``flows``), or a list of its flows over vectors, as a `CouplingFlow`.

    ``flow(z)`` is what the flows do to z in their order (normflows samples so), ``flow.inverse`` the density's way. Understood:
    AffineCouplingBlock (scale_map "exp" or scale=False; split_mode "channel", "channel_inv") with an MLP, Permute, ActNorm that
    has seen data, AffineConstFlow. The result holds copies.

    Raises:
        ConfigError: anything else; the message says which and where.
    """
    warn_outside("normflows", "1.7", "1.8")
    modules = list(_several(getattr(flows, "flows", flows)))
    dim = _dim(modules, _width_of_normflows)
    return _converted(
        modules, dim, {n.removeprefix("_nf_"): f for n, f in globals().items() if n.startswith("_nf_")}, memory
    )


def from_nflows(transform: Any, *, memory: str = "save") -> CouplingFlow:
    """nflows' ``CompositeTransform``, ``Flow`` (its transform), or one transform over vectors, as a `CouplingFlow`.

    ``flow(x)`` is ``transform(x)``. Understood: AdditiveCouplingTransform, and AffineCouplingTransform whose scale is exp of
    what the net says (nflows' own, sigmoid(s + 2) + 0.001, is no coupling of ours), with any mask and an MLP; permutations;
    ActNorm that has seen data. The result holds copies.

    Raises:
        ConfigError: anything else; the message says which and where.
    """
    warn_outside("nflows", "0.14", "0.15")
    transform = getattr(transform, "_transform", transform)
    modules = list(getattr(transform, "_transforms", [transform]))
    dim = _dim(modules, _width_of_nflows)
    return _converted(
        modules, dim, {n.removeprefix("_nx_"): f for n, f in globals().items() if n.startswith("_nx_")}, memory
    )


def _several(flows: Any) -> Iterable[Any]:
    if not isinstance(flows, Iterable):
        raise ConfigError("from_normflows takes a NormalizingFlow, or a list of flows", value=type(flows).__name__)
    return flows


def _converted(modules: list[Any], dim: int, known: dict[str, Any], memory: str) -> CouplingFlow:
    builder = Builder(dim)
    for i, module in enumerate(modules):
        kind = type(module).__name__
        add = next((known[base.__name__] for base in type(module).__mro__ if base.__name__ in known), None)
        if add is None:
            raise ConfigError(f"flow {i} cannot be converted", value=kind, limit=", ".join(sorted(known)))
        builder.where = f"flow {i} ({kind})"
        add(builder, module)
    first = next((p for module in modules for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    return builder.flow(first, memory)


def _dim(modules: Iterable[Any], width_of: Any) -> int:
    for module in modules:
        width = width_of(module)
        if width is not None:
            return int(width)
    raise ConfigError("none of the flows says how many channels it has", limit="one coupling or permutation at least")


def _width_of_normflows(module: Any) -> int | None:
    if hasattr(module, "num_channels"):
        return module.num_channels
    if hasattr(module, "s"):
        return module.s.numel()
    coupling = next((part for part in getattr(module, "flows", ()) if hasattr(part, "param_map")), None)
    if coupling is None:
        return None
    linears = [m for m in coupling.param_map.modules() if isinstance(m, nn.Linear)]
    if not linears:
        return None
    return linears[0].in_features + linears[-1].out_features // (2 if coupling.scale else 1)


def _width_of_nflows(module: Any) -> int | None:
    return getattr(module, "features", None) or (len(module._permutation) if hasattr(module, "_permutation") else None)


# normflows ----------------------------------------------------------------------------------------------------------------


def _nf_AffineCouplingBlock(builder: Builder, block: Any) -> None:
    mode, coupling = block.flows[0].mode, block.flows[1]
    if mode not in ("channel", "channel_inv"):
        raise ConfigError(f"{builder.where}: split_mode", value=mode, limit="channel, channel_inv")
    if coupling.scale and coupling.scale_map != "exp":
        raise ConfigError(
            f"{builder.where}: scale_map={coupling.scale_map!r} is no scale of our couplings",
            limit="exp, or scale=False",
        )
    width = builder.dim // 2 if mode == "channel" else builder.dim - builder.dim // 2
    order = None
    if coupling.scale:  # theirs alternates shift and scale
        order = torch.cat([torch.arange(1, 2 * width, 2), torch.arange(0, 2 * width, 2)])
    subnet = _mlp(coupling.param_map, builder.where, order, width)
    active = 1 if mode == "channel" else 0
    builder._coupling(_PLAIN, builder.dim - builder.dim // 2, active, (subnet,), "none", 1.0, 0)


def _nf_Permute(builder: Builder, module: Any) -> None:
    half = builder.dim // 2
    swap = torch.cat([torch.arange(half, builder.dim), torch.arange(half)])
    builder._hard(module.perm if module.mode == "shuffle" else swap)


def _nf_AffineConstFlow(builder: Builder, module: Any) -> None:
    if module.s.numel() != builder.dim:
        raise ConfigError(f"{builder.where}: shape", value=tuple(module.s.shape), limit=builder.dim)
    builder._affine("exp", module.s, module.t)


def _nf_ActNorm(builder: Builder, module: Any) -> None:
    if not module.data_dep_init_done > 0:
        raise ConfigError(f"{builder.where} has not seen data yet", remedy="run one batch through the flow first")
    _nf_AffineConstFlow(builder, module)


# nflows -------------------------------------------------------------------------------------------------------------------


def _nx_AffineCouplingTransform(builder: Builder, module: Any) -> None:
    if module.unconditional_transform is not None:
        raise ConfigError(f"{builder.where}: an unconditional_transform")
    width = len(module.transform_features)
    multiplier = module._transform_dim_multiplier()
    order = None
    if multiplier == 2:
        probe = torch.linspace(-2, 2, width).repeat(1, 2)
        scale, shift = module._scale_and_shift(probe)
        if not torch.allclose(scale, probe[:, width:].exp()) or not torch.equal(shift, probe[:, :width]):
            raise ConfigError(
                f"{builder.where}: its scale is not exp of what the net says", value=f"{float(scale[0, 0]):.4g} of -2",
                limit=f"{float(torch.tensor(-2.0).exp()):.4g}",
                remedy="a subclass whose _scale_and_shift gives exp(params), or AdditiveCouplingTransform",
            )  # fmt: skip
        order = torch.cat([torch.arange(width, 2 * width), torch.arange(width)])
    subnet = _mlp(module.transform_net, builder.where, order, width)
    index = torch.cat([module.identity_features, module.transform_features]).cpu()
    natural = torch.equal(index, torch.arange(builder.dim))
    if not natural:
        builder._hard(index)
    builder._coupling(_PLAIN, builder.dim - width, 1, (subnet,), "none", 1.0, 0)
    if not natural:
        builder._hard(torch.argsort(index))


def _nx_Permutation(builder: Builder, module: Any) -> None:
    builder._hard(module._permutation.cpu())


def _nx_ActNorm(builder: Builder, module: Any) -> None:
    if not bool(module.initialized):
        raise ConfigError(f"{builder.where} has not seen data yet", remedy="run one batch through the transform first")
    builder._affine("exp", module.log_scale, module.shift)


# subnets ------------------------------------------------------------------------------------------------------------------


def _mlp(net: Any, where: str, order: Tensor | None, width: int) -> nn.Sequential:
    """A net of either package as a Sequential whose last layer gives ``[log-scale | shift]``.

    order: rows of its last layer that make it so, or None where it gives the shift alone."""
    if hasattr(net, "_input_layer") and hasattr(net, "_output_layer") and hasattr(net, "_hidden_layers"):
        relu = (torch.relu, nn.functional.relu)
        activations: dict[Any, type[nn.Module]] = {**dict.fromkeys(relu, nn.ReLU), nn.functional.gelu: nn.GELU}
        kind = activations.get(getattr(net, "_activation", None))
        if kind is None or getattr(net, "_activate_output", False):
            raise ConfigError(f"{where}: the net's activation", limit="relu or gelu between its layers")
        parts: list[nn.Module] = []
        for linear in (net._input_layer, *net._hidden_layers):
            parts += [linear, kind()]
        parts.append(net._output_layer)
    else:
        whole = net if isinstance(net, nn.Sequential) else getattr(net, "net", None)
        if not isinstance(whole, nn.Sequential):
            raise ConfigError(f"{where}: the net is no MLP", value=type(net).__name__, limit="MLP, nn.Sequential")
        parts = [nn.ReLU() if isinstance(m, nn.LeakyReLU) and m.negative_slope == 0 else m for m in whole]
    last = parts[-1]
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise ConfigError(f"{where}: a net must end in a Linear with a bias", value=type(last).__name__)
    weight, bias = last.weight.detach(), last.bias.detach()
    if order is None:
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    else:
        weight, bias = weight[order], bias[order]
    if len(bias) != 2 * width:
        raise ConfigError(f"{where}: the net's outputs", value=len(last.bias), limit=f"those of {width} channels")
    new = nn.Linear(last.in_features, len(bias), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        new.weight.copy_(weight)
        new.bias.copy_(bias)
    return nn.Sequential(*parts[:-1], new)
