"""FrEIA's invertible networks, run by our flow: `convert(sequence_inn)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.versions import warn_outside
from lmvae_fast.kernels.coupling_flow import Coupling, FlowSpec, Stage, Subnet, hard_permutation, soft_permutation
from lmvae_fast.models.flow import CouplingFlow

_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}


def convert(sequence_inn: Any, *, memory: str = "save") -> CouplingFlow:
    """A FrEIA 0.2 `SequenceINN` as a `CouplingFlow` with the same numbers, exactly the same function.

    Understood: AllInOneBlock (hard and soft permutation, reverse_permutation, every global_affine_type), GLOWCouplingBlock,
    RNVPCouplingBlock, AffineCouplingOneSided (ATAN, TANH and SIGMOID clamps, or the identity; any split_len), ActNorm (once it
    has seen data), PermuteRandom;
    conditions (one condition tensor for the whole sequence); subnets that are `nn.Sequential`s of Linear layers with one of
    ReLU, GELU and SiLU between them. The result holds copies; dtype and device are the sequence's.

    Raises:
        ConfigError: a module, an option or a subnet is none of these; the message says which and where.
    """
    kind = type(sequence_inn)
    if not all(hasattr(sequence_inn, name) for name in ("shapes", "conditions", "module_list")):
        raise ConfigError("convert takes a SequenceINN", value=f"{kind.__module__}.{kind.__qualname__}")
    if kind.__module__.partition(".")[0] == "FrEIA":
        warn_outside("FrEIA", "0.2", "0.3")
    dims = tuple(sequence_inn.shapes[0])
    if len(dims) != 1:
        raise ConfigError("only sequences over vectors can be converted", value=f"input dims {dims}", limit="(dim,)")
    conditions = {c for c in sequence_inn.conditions if c is not None}
    if len(conditions) > 1:
        raise ConfigError("only one condition can be converted", value=f"condition indices {sorted(conditions)}")
    builder = Builder(dims[0])
    for i, module in enumerate(sequence_inn.module_list):
        add = getattr(builder, f"add_{type(module).__name__}", None)
        if add is None:
            known = sorted(name.removeprefix("add_") for name in dir(builder) if name.startswith("add_"))
            raise ConfigError(f"module {i} cannot be converted", value=type(module).__name__, limit=", ".join(known))
        builder.where = f"module {i} ({type(module).__name__})"
        add(module)
    first = next(sequence_inn.parameters(), torch.empty(0))
    return builder.flow(first, memory).train(sequence_inn.training)


class Builder:
    """Collects stages and their numbers. One `add_<FrEIA class>` per module that we know.

    Attributes:
        values: every number by its name in a flow, without a graph. sources: the tensors (parameters) they come from.
    """

    def __init__(self, dim: int):
        self.dim, self.cond_dim, self.where = dim, 0, ""
        self.stages: list[Stage] = []
        self.values: dict[str, Tensor] = {}
        self.sources: dict[str, Tensor] = {}

    def flow(self, like: Tensor, memory: str) -> CouplingFlow:
        """The flow of what was collected, with copies of its numbers, in the dtype and on the device of ``like``."""
        flow = CouplingFlow.from_spec(FlowSpec(self.dim, self.cond_dim, tuple(self.stages)), memory)
        flow = flow.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
        with torch.no_grad():
            for name, view in flow.named_views().items():
                view.copy_(self.values[name])
        return flow

    def add_AllInOneBlock(self, block: Any) -> None:
        self._refuse(block.GIN, "gin_block")
        self._refuse(bool(block.householder), "learned_householder_permutation")
        if block.reverse_pre_permute:
            self._permutation(block.w_perm_inv, block.w_perm)
        split = block.splits[0]
        self._coupling(block, split, 1, (block.subnet,), "tanh", 0.1, block.condition_channels)
        self._affine(_global_affine_type(block, self.where), block.global_scale, block.global_offset)
        self._permutation(block.w_perm, block.w_perm_inv)

    def add_GLOWCouplingBlock(self, block: Any) -> None:
        squash = _clamp_activation(block, self.where)
        for active, subnet in ((0, block.subnet2), (1, block.subnet1)):
            self._coupling(block, block.split_len1, active, (subnet,), squash, 1.0, block.condition_length)

    def add_RNVPCouplingBlock(self, block: Any) -> None:
        squash = _clamp_activation(block, self.where)
        for active, subnets in ((0, (block.subnet_s2, block.subnet_t2)), (1, (block.subnet_s1, block.subnet_t1))):
            self._coupling(block, block.split_len1, active, subnets, squash, 1.0, block.condition_length)

    def add_AffineCouplingOneSided(self, block: Any) -> None:
        squash = _clamp_activation(block, self.where)
        self._coupling(block, block.split_len1, 1, (block.subnet,), squash, 1.0, block.condition_length)

    def add_ActNorm(self, block: Any) -> None:
        if block.init_on_next_batch:
            raise ConfigError(f"{self.where} has not seen data yet", remedy="run one batch through the sequence first")
        self._affine("exp", block.scale, block.bias)

    def add_PermuteRandom(self, block: Any) -> None:
        self._hard(block.perm)

    def _coupling(
        self, block: Any, split: int, active: int, subnets: tuple, squash: str, gain: float, cond_dim: int
    ) -> None:
        if not 0 < split < self.dim:
            raise ConfigError(f"{self.where}: one half is empty", value=f"split {split} of {self.dim}")
        parsed = [parse_subnet(subnet, self.where) for subnet in subnets]
        if cond_dim:
            self.cond_dim = cond_dim
        shapes = tuple(shape for shape, _ in parsed)
        coupling = Coupling(split, active, shapes, float(block.clamp), squash, gain, conditional=cond_dim > 0)
        self.stages.append(Stage(coupling))
        for n, (_, linears) in enumerate(parsed):
            for k, linear in enumerate(linears):
                self._put(f"subnets.{n}.{k}.weight", linear.weight.t(), linear.weight)
                self._put(f"subnets.{n}.{k}.bias", linear.bias, linear.bias)

    def _affine(self, kind: str, scale: Tensor, offset: Tensor) -> None:
        last = self.stages[-1] if self.stages else None
        if last is not None and last.affine is None and last.permutation is None:
            self.stages[-1] = Stage(last.coupling, kind)
        else:
            self.stages.append(Stage(None, kind))
        self._put("scale", scale.reshape(-1), scale)
        self._put("offset", offset.reshape(-1), offset)

    def _permutation(self, weight: Tensor, weight_inverse: Tensor) -> None:
        """AllInOne's matrices: y = weight @ u, u = weight_inverse @ y."""
        weight, weight_inverse = (w.detach().reshape(self.dim, self.dim) for w in (weight, weight_inverse))
        index = weight.argmax(dim=1)
        if torch.equal(weight, nn.functional.one_hot(index, self.dim).to(weight.dtype)) and torch.equal(
            weight_inverse, weight.t()
        ):
            return self._hard(index)
        soft_permutation(weight, self.dim)  # refuses NaN and singular matrices
        error = (
            (weight.double() @ weight_inverse.double() - torch.eye(self.dim, device=weight.device)).abs().max().item()
        )
        if not error < 1e-4:
            raise ConfigError(
                f"{self.where}: w_perm_inv does not undo w_perm", value=f"error {error:.1e}", limit="1e-4"
            )
        self._open("soft")
        self._put("matrix", weight.t())
        self._put("inverse", weight_inverse.t())
        self._put("logdet", weight.new_zeros(1))  # FrEIA takes a soft permutation as a rotation
        return None

    def _hard(self, index: Tensor) -> None:
        index, inverse = hard_permutation(index.detach(), self.dim)
        self._open("hard")
        self._put("index", index)
        self._put("inverse", inverse)

    def _open(self, permutation: str) -> None:
        """The last stage takes the permutation if it has none yet; else a new one does."""
        if self.stages and self.stages[-1].permutation is None:
            self.stages[-1] = Stage(self.stages[-1].coupling, self.stages[-1].affine, permutation)
        else:
            self.stages.append(Stage(None, None, permutation))

    def _put(self, name: str, value: Tensor, source: Tensor | None = None) -> None:
        name = f"stages.{len(self.stages) - 1}.{name}"
        self.values[name] = value.detach()
        if source is not None:
            self.sources[name] = source

    def _refuse(self, used: bool, option: str) -> None:
        if used:
            raise ConfigError(f"{self.where} uses {option}, which our flow does not have", limit=f"{option} off")


def parse_subnet(subnet: nn.Module, where: str) -> tuple[Subnet, list[nn.Linear]]:
    """The shape of an MLP and its linear layers in order."""
    parts = list(_flatten(subnet))
    odd = [type(m).__name__ for m in parts if not isinstance(m, (nn.Linear, *_ACTIVATIONS))]
    if odd:
        raise ConfigError(f"{where}: subnet part", value=odd[0], limit="Sequential, Linear, ReLU, GELU, SiLU")
    linears, activations = [m for m in parts[::2] if isinstance(m, nn.Linear)], parts[1::2]
    if len(linears) != len(parts[::2]) or len(linears) != len(activations) + 1:
        raise ConfigError(f"{where}: a subnet must alternate Linear and activation, first and last Linear")
    names = {_ACTIVATIONS.get(type(m), type(m).__name__) for m in activations}
    if len(names) > 1:
        raise ConfigError(f"{where}: one activation per subnet", value=sorted(names))
    name = names.pop() if names else "relu"
    if name not in _ACTIVATIONS.values() or any(getattr(m, "approximate", "none") != "none" for m in activations):
        raise ConfigError(f"{where}: activation", value=[repr(m) for m in activations], limit="ReLU, GELU (erf), SiLU")
    if any(linear.bias is None for linear in linears):
        raise ConfigError(f"{where}: a Linear without bias", remedy="give it a zero bias")
    return Subnet(tuple(linear.out_features for linear in linears[:-1]), name), linears


def _flatten(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _flatten(child)
    elif not isinstance(module, nn.Identity):
        yield module


def _global_affine_type(block: Any, where: str) -> str:
    """AllInOne keeps the scale's function as a lambda; it is recognised by its values."""
    probe = torch.tensor([-3.0, 0.0, 1.5])
    got = block.global_scale_activation(probe)
    for name, function in {
        "softplus": lambda a: 0.1 * nn.functional.softplus(a, beta=0.5),
        "sigmoid": lambda a: 10 * torch.sigmoid(a - 2),
        "exp": torch.exp,
    }.items():
        if torch.allclose(got, function(probe), rtol=1e-6, atol=0):
            return name
    raise ConfigError(f"{where}: the global scale's activation is not one of FrEIA's", value=got.tolist())


def _clamp_activation(block: Any, where: str) -> str:
    """ATAN, TANH, SIGMOID, the identity or a user's function, recognised by its values as well."""
    probe = torch.tensor([-3.0, 0.2, 1.5])
    got = block.f_clamp(probe)
    for name, function in {
        "atan": lambda u: 0.636 * torch.atan(u),
        "tanh": torch.tanh,
        "sigmoid": lambda u: 2 * (torch.sigmoid(u) - 0.5),
        "none": lambda u: u,
    }.items():
        if torch.allclose(got, function(probe), rtol=1e-6, atol=1e-7):
            return name
    raise ConfigError(f"{where}: a clamp_activation of one's own", limit="ATAN, TANH, SIGMOID, the identity")
