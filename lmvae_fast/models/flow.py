"""The invertible network (INN): a flow between two vector spaces, as an `nn.Module` over the `coupling_flow` op.

Used by the Invertible CVAE of LlaMaVAE (arXiv 2312.13208), and by itself as a density model of latents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.kernels.coupling_flow import (
    Coupling,
    FlowParams,
    FlowSpec,
    Stage,
    Subnet,
    coupling_flow,
    hard_permutation,
    soft_permutation,
)
from lmvae_fast.memory import check_memory

_BLOCK_BYTES = 4096  # of a block's description, beside its numbers


def build_spec(
    dim: int,
    blocks: int,
    hidden: int | Sequence[int],
    kind: str,
    clamp: float | None,
    permutation: str | None,
    cond_dim: int,
    activation: str,
) -> FlowSpec:
    """`blocks` equal blocks of a kind (see `CouplingFlow`)."""
    subnet = Subnet((hidden,) if isinstance(hidden, int) else tuple(hidden), activation)
    split = dim - dim // 2

    if kind == "coupling" and clamp is not None:
        raise ConfigError(
            "kind='coupling' has no clamp",
            value=f"clamp={clamp}",
            remedy="leave clamp out, or take kind='allinone' or 'glow'",
        )
    clamp = 2.0 if clamp is None and kind != "coupling" else clamp

    def coupling(active: int, squash: str, gain: float) -> Coupling:
        factor = 1.0 if clamp is None else float(clamp)
        return Coupling(split, active, (subnet,), factor, squash, gain, conditional=cond_dim > 0)

    block: tuple[Stage, ...]
    if kind == "allinone":
        block = (Stage(coupling(1, "tanh", 0.1), "softplus", permutation),)
    elif kind == "glow":
        block = (Stage(coupling(0, "atan", 1.0)), Stage(coupling(1, "atan", 1.0), "exp", permutation))
    elif kind == "coupling" and permutation == "soft":
        block = (Stage(coupling(0, "none", 1.0), None, permutation), Stage(None, "exp"))
    elif kind == "coupling":
        # An ActNorm behind an index is the ActNorm before it with its channels renumbered: one stage less.
        block = (Stage(coupling(0, "none", 1.0), "exp", permutation),)
    else:
        raise ConfigError("unknown kind of coupling block", value=kind, limit=", ".join(KINDS))
    numbers = FlowSpec(dim, cond_dim, block).sizes[0]
    check_memory(f"a flow of {blocks:,} blocks", "lower blocks or hidden", blocks * (4 * numbers + _BLOCK_BYTES))
    return FlowSpec(dim, cond_dim, block * blocks)


KINDS = ("allinone", "glow", "coupling")


class CouplingFlow(nn.Module):
    """An invertible map between vectors of `dim` channels, with its log-determinant.

    Args:
        dim: channels, 2 to 1024; odd ones too (the first half is the larger).
        blocks: number of coupling blocks.
        hidden: width of the subnets' hidden layer, or one width per hidden layer.
        kind: "allinone" (one half rescaled by tanh-clamped factors, global softplus scale) or "glow" (both halves in turn,
            atan-clamped, then ActNorm), the algebra of FrEIA 0.2's blocks of these names; or "coupling", the block of arXiv
            2305.01713: an affine coupling without a clamp in which the second half conditions and the first is transformed,
            then the permutation, then ActNorm (for an index: ActNorm first, its channels numbered before the permutation).
        clamp: the most that a coupling can add to the log-scale of a channel; default 2, none for "coupling".
        permutation: after each block: "hard" (random index), "soft" (random rotation), None, or one tensor per block,
            either an index [dim] (y[j] = u[index[j]]) or an invertible matrix [dim, dim] (y = matrix @ u).
        cond_dim: width of the condition c that is concatenated to the subnets' input; 0 for none.
        activation: of the subnets: "relu", "gelu" or "silu".
        memory: "save" or "recompute", see `coupling_flow`.

    The numbers live in one flat parameter `theta` (and the buffers `constants`, `indices`); `named_views()` gives every
    weight by name, input-major ([in, out]). Random numbers come from torch's default generator. A flow built on the meta
    device has no numbers: after `to_empty`, load a state_dict or call `reset_parameters`.

    Raises:
        ConfigError: kind, blocks or the number of permutations do not fit. ValueError, TypeError: a permutation is no
        permutation, a matrix is singular or not finite, clamp is not above 0, dim is out of range.

    A flow of kind "coupling" scales by exp of whatever its subnets say: start it from `initialize`, and lower the learning
    rate if its loss is not finite.
    """

    theta: Tensor
    constants: Tensor
    indices: Tensor

    def __init__(
        self,
        dim: int,
        blocks: int = 10,
        hidden: int | Sequence[int] = 512,
        kind: str = "allinone",
        clamp: float | None = None,
        permutation: str | Sequence[Tensor] | None = "hard",
        cond_dim: int = 0,
        *,
        activation: str = "relu",
        memory: str = "save",
    ):
        super().__init__()
        if blocks < 1:
            raise ConfigError("a flow needs at least one block", value=blocks, limit="blocks >= 1")
        given: list[Tensor] | None = None
        if permutation is not None and not isinstance(permutation, str):
            given = list(permutation)
            if len(given) != blocks:
                raise ConfigError("one permutation per block", value=f"{len(given)} for {blocks} blocks")
            soft = {p.dim() == 2 for p in given}
            if len(soft) > 1:
                raise ConfigError("permutations are all indices or all matrices", remedy="write indices as matrices")
            permutation = "soft" if soft.pop() else "hard"
        assert permutation is None or isinstance(permutation, str)
        self._adopt(build_spec(dim, blocks, hidden, kind, clamp, permutation, cond_dim, activation), memory)
        self._reset(given)

    @classmethod
    def from_spec(cls, spec: FlowSpec, memory: str = "save") -> CouplingFlow:
        """A flow of any sequence of stages, freshly initialised, with random permutations."""
        flow = cls.__new__(cls)
        nn.Module.__init__(flow)
        flow._adopt(spec, memory)
        flow._reset(None)
        return flow

    def _adopt(self, spec: FlowSpec, memory: str) -> None:
        self.spec, self.memory = spec, memory
        self._stored_dtype: torch.dtype | None = None
        theta, constants, indices = spec.sizes
        with torch.inference_mode(False):  # whatever surrounds: what is made within it has no gradient for good
            self.theta = nn.Parameter(torch.empty(theta))
            self.register_buffer("constants", torch.empty(constants))
            self.register_buffer("indices", torch.empty(indices, dtype=torch.int32))
        self.register_load_state_dict_pre_hook(_note_rounding)
        self.register_load_state_dict_post_hook(_check_loaded)

    def reset_parameters(self) -> None:
        """Draw everything anew: the subnets as nn.Linear does, scales 1 and offsets 0, random permutations."""
        self._reset(None)

    @torch.no_grad()
    def _reset(self, permutations: list[Tensor] | None) -> None:
        """nn.Linear's initialisation for the subnets, scale 1 and offset 0, random or given permutations."""
        if self.theta.is_meta:
            return
        views = self.named_views()
        for name, view in views.items():
            if name.endswith(".weight"):
                bound = 1 / math.sqrt(view.shape[0])
                view.uniform_(-bound, bound)
                views[name.removesuffix("weight") + "bias"].uniform_(-bound, bound)
        given = iter(permutations) if permutations is not None else None
        for i, stage in enumerate(self.spec.stages):
            if stage.affine is not None:
                views[f"stages.{i}.scale"].copy_(_raw_scale(torch.ones(self.spec.dim), stage.affine))
                views[f"stages.{i}.offset"].zero_()
            if stage.permutation == "hard":
                index = torch.randperm(self.spec.dim) if given is None else next(given)
                names: tuple[str, ...] = ("index", "inverse")
                values: tuple[Tensor, ...] = hard_permutation(index, self.spec.dim)
            elif stage.permutation == "soft":
                matrix = _random_rotation(self.spec.dim) if given is None else next(given)
                names = ("matrix", "inverse", "logdet")
                values = soft_permutation(matrix, self.spec.dim)
            else:
                continue
            for name, value in zip(names, values, strict=True):
                views[f"stages.{i}.{name}"].copy_(value)

    @property
    def params(self) -> FlowParams:
        return FlowParams(self.spec, self.theta, self.constants, self.indices)

    def named_views(self) -> dict[str, Tensor]:
        """Every weight and permutation by name, as views that share memory with the flat tensors."""
        return self.params.named()

    @torch.no_grad()
    def renew_inverses(self) -> None:
        """The inverse of every soft permutation anew from the permutation, in fp64."""
        views = self.named_views()
        for i, stage in enumerate(self.spec.stages):
            if stage.permutation == "soft":
                views[f"stages.{i}.inverse"].copy_(torch.linalg.inv(views[f"stages.{i}.matrix"].double()))

    def check_permutations(self, rounded: torch.dtype | None = None) -> None:
        """Raise ValueError unless every stored permutation and its stored inverse undo each other.

        rounded: dtype that the matrices have been stored in, where that is not the flow's.
        """
        views = self.named_views()
        for i, stage in enumerate(self.spec.stages):
            if stage.permutation == "hard":
                _, inverse = hard_permutation(views[f"stages.{i}.index"], self.spec.dim)
                if not torch.equal(inverse, views[f"stages.{i}.inverse"]):
                    raise ValueError(f"stage {i}: the stored inverse permutation does not undo the permutation")
            elif stage.permutation == "soft":
                matrix, inverse = views[f"stages.{i}.matrix"], views[f"stages.{i}.inverse"]
                soft_permutation(matrix.t(), self.spec.dim)
                # Each is rounded by up to eps / 2 of its entries, which moves their product by eps |matrix| |inverse|; in fp32
                # an inverse that was also computed in fp32 must pass.
                coarsest = max(torch.finfo(dtype).eps for dtype in (matrix.dtype, rounded or matrix.dtype))
                allowed = max(2 * coarsest, 1e-3)
                a, b = matrix.double(), inverse.double()
                error = (a @ b - torch.eye(self.spec.dim, dtype=torch.float64, device=a.device)).abs()
                if not (error <= allowed * (a.abs() @ b.abs())).all():
                    raise ValueError(f"stage {i}: the stored inverse matrix is not the inverse of the stored matrix")

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, dim], cond [B, cond_dim] -> z [B, dim], logdet [B] of dz/dx."""
        return coupling_flow(x, self.params, cond=cond, memory=self.memory)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z [B, dim], cond [B, cond_dim] -> x [B, dim], logdet [B] of dx/dz."""
        return coupling_flow(z, self.params, cond=cond, inverse=True, memory=self.memory)

    def log_prob(
        self, x: Tensor, cond: Tensor | None = None, *, mu: Tensor | None = None, logvar: Tensor | None = None
    ) -> Tensor:
        """log p(x) [B] in nats, with base density N(mu, exp(logvar)) (default N(0, I)); both broadcast to [B, dim].

        With a posterior's mu and logvar this is minus the training loss of the Invertible CVAE (arXiv 2312.13208).
        """
        z, logdet = self(x, cond)
        delta = z.to(logdet.dtype) if mu is None else z.to(logdet.dtype) - mu
        square, log_sigma = delta.square(), z.new_zeros((), dtype=logdet.dtype)
        if logvar is not None:
            square, log_sigma = square * torch.exp(-logvar), 0.5 * logvar
        constant = 0.5 * math.log(2 * math.pi)
        return logdet - (0.5 * square + log_sigma + constant).sum(dim=1)

    def sample(self, n: int, cond: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """n draws of x [n, dim] with base density N(0, I); cond [n, cond_dim]."""
        z = torch.randn(n, self.spec.dim, dtype=self.theta.dtype, device=self.theta.device, generator=generator)
        return self.inverse(z, cond)[0]

    @torch.no_grad()
    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Data-dependent initialisation (ActNorm, arXiv 1807.03039 section 3.1); returns z of x under the result.

        Sets scale and offset of every stage that has them so that, over the batch x [B, dim], each channel leaves that
        stage with mean 0 and standard deviation 1 (unbiased, as FrEIA's ActNorm takes it).

        Raises DataError, and changes nothing, when there are fewer than 2 rows, a channel does not vary (its scale would
        be infinite), or the scale it needs is beyond what the stage's kind of scale (below 10 for "sigmoid") or the
        flow's dtype can hold.
        """
        if x.shape[0] < 2:
            raise DataError("standard deviations need two rows", value=f"{x.shape[0]} rows", limit=">= 2")
        before = self.theta.detach().clone()
        try:
            return self._initialize(x, cond)
        except DataError:
            self.theta.copy_(before)
            raise

    def _initialize(self, x: Tensor, cond: Tensor | None) -> Tensor:
        views = self.named_views()
        for i, stage in enumerate(self.spec.stages):
            if stage.affine is not None:
                u, _ = coupling_flow(x, self._one(i, Stage(stage.coupling)), cond=cond) if stage.coupling else (x, None)
                deviation, mean = torch.std_mean(u.double(), dim=0)
                if not (deviation > 0).all():
                    channel = int((~(deviation > 0)).nonzero()[0])
                    raise DataError(
                        f"stage {i}: channel {channel} does not vary over the batch", value=f"{len(x)} rows"
                    )
                values = {"scale": _raw_scale(1 / deviation, stage.affine), "offset": -mean / deviation}
                for name, value in values.items():
                    view = views[f"stages.{i}.{name}"].copy_(value)
                    if not view.isfinite().all():
                        channel = int((~view.isfinite()).nonzero()[0])
                        raise DataError(
                            f"stage {i}: channel {channel} has a deviation that no {stage.affine} {name} of this flow undoes",
                            value=f"deviation {deviation[channel]:.3g}, which needs a scale of {1 / deviation[channel]:.3g}",
                            limit=f"scales below 10, in {view.dtype}" if stage.affine == "sigmoid" else f"{view.dtype}",
                            remedy='rescale the data, or build the flow with "softplus" or "exp" scales in fp32',
                        )
            x, _ = coupling_flow(x, self._one(i, stage), cond=cond)
        return x

    def _one(self, i: int, stage: Stage) -> FlowParams:
        """Stage i alone (or its first parts, as `stage` says), on the same memory."""
        spec = FlowSpec(self.spec.dim, self.spec.cond_dim, (stage,))
        flats = []
        for flat, slots, size in zip(
            (self.theta, self.constants, self.indices), self.spec.slots, spec.sizes, strict=True
        ):
            start = next((slot.offset for slot in slots if slot.name.startswith(f"stages.{i}.")), 0)
            flats.append(flat[start : start + size])
        return FlowParams(spec, *flats)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"dim={spec.dim}, stages={len(spec.stages)}, cond_dim={spec.cond_dim}, memory={self.memory!r}"


def _note_rounding(flow: CouplingFlow, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Before load_state_dict: the dtype that the stored matrices were rounded to, where the flow's is another."""
    stored = state.get(prefix + "constants")
    flow._stored_dtype = stored.dtype if isinstance(stored, Tensor) else None


def _check_loaded(flow: CouplingFlow, _: object) -> None:
    """After load_state_dict; functions of the module, so that a flow can be pickled."""
    stored, flow._stored_dtype = flow._stored_dtype, None
    if flow.theta.is_meta:
        return
    flow.check_permutations(stored)
    held = flow.constants.dtype
    if stored is not None and stored.is_floating_point and torch.finfo(stored).eps > torch.finfo(held).eps:
        flow.renew_inverses()  # of matrices that were rounded more coarsely than they are held now


def _raw_scale(scale: Tensor, kind: str) -> Tensor:
    """The raw parameter that gives this scale (the inverse of the functions named in `Stage`)."""
    scale = scale.double()
    if kind == "exp":
        return scale.log()
    if kind == "sigmoid":
        return 2 + torch.logit(scale / 10)
    y = 5 * scale  # softplus(raw, beta=1/2) = 2 log(1 + exp(raw / 2)) = 10 scale
    return 2 * (y + torch.log(-torch.expm1(-y)))


def _random_rotation(dim: int) -> Tensor:
    """A matrix of SO(dim), uniformly (arXiv math-ph/0609050: QR of a Gaussian matrix, signs fixed by R's diagonal)."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r))
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q
