"""FrEIA's blocks by their own names and constructor arguments, for vectors.

Each holds its numbers under FrEIA's names, so that a state dict of the original loads, and has a plain form in torch; where its
subnets are MLPs, `fused.py` runs it, or a whole sequence, in one call of coupling_flow. Source: FrEIA 0.2 (vislearn/FrEIA).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.freia.conversion import parse_subnet
from lmvae_fast.integrations.freia.fused import Fused
from lmvae_fast.optional import require

logger = logging.getLogger(__name__)

Dims = Sequence[Sequence[int]]
_warned: set[str] = set()


class Block(nn.Module):
    """A block over vectors ``[batch, channels]``: called with a tuple of one tensor, it returns a tuple of one and the logdet.

    Attributes:
        why_plain: why it runs in plain torch and not on coupling_flow; None where it does not.
    """

    def __init__(self, dims_in: Dims, dims_c: Dims | None = None):
        super().__init__()
        dims_c = dims_c or []
        name = type(self).__name__
        if len(dims_in) != 1 or len(dims_in[0]) != 1:
            raise ConfigError(
                f"{name} works on vectors", value=f"input dims {list(map(tuple, dims_in))}", limit="[(channels,)]",
                remedy="use FrEIA itself for images",
            )  # fmt: skip
        if any(len(dims) != 1 for dims in dims_c):
            raise ConfigError(f"{name}: a condition must be a vector", value=list(map(tuple, dims_c)))
        self.dims_in, self.dims_c = [tuple(dims_in[0])], [tuple(dims) for dims in dims_c]
        self.channels = int(dims_in[0][0])
        self.condition_length = sum(dims[0] for dims in self.dims_c)
        self.conditional = self.condition_length > 0
        self.why_plain: str | None = None
        self._fused: Fused | None = None

    def output_dims(self, input_dims: Dims) -> Dims:
        """The same as the input's."""
        if len(input_dims) != 1:
            raise ConfigError("a block has one input", value=len(input_dims), limit=1)
        return input_dims

    def forward(
        self, x: Iterable[Tensor], c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """``((y [B, channels],), logdet [B])`` of the direction that was run; ``c`` are the conditions."""
        (value,) = x
        cond = joined(self, c)
        self.prepare(value, rev)
        if self.why_plain is not None or not any(p.is_floating_point() for p in self.parameters()):
            y, logdet = self.plain(value, cond, rev)
        else:
            if self._fused is None:
                self._fused = Fused([self])
            y, logdet = self._fused(value, cond, rev)
        return (y,), logdet

    def prepare(self, x: Tensor, rev: bool) -> None:
        """Before a call with x ``[B, channels]``."""

    def plain(self, x: Tensor, cond: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        """The block in plain torch: y ``[B, channels]`` and logdet ``[B]``."""
        raise NotImplementedError

    def _examine(self, *subnets: nn.Module) -> None:
        """Whether coupling_flow can run these subnets; if not, why, said once for each reason."""
        try:
            for subnet in subnets:
                parse_subnet(subnet, type(self).__name__)
        except ConfigError as error:
            self._plain_because(str(error))

    def _plain_because(self, reason: str) -> None:
        self.why_plain = reason
        if reason not in _warned:
            _warned.add(reason)
            logger.warning("%s runs in plain torch, not on coupling_flow: %s", type(self).__name__, reason)


def joined(block: Block, c: Sequence[Tensor] | None) -> Tensor | None:
    """The conditions side by side ``[B, condition_length]``, or None. Raises ConfigError where they are not the block's."""
    given = list(c or [])
    widths, wanted = [tensor.shape[1] for tensor in given], [dims[0] for dims in block.dims_c]
    if widths != wanted:
        raise ConfigError(f"{type(block).__name__}: other conditions than it was made for", value=widths, limit=wanted)
    return torch.cat(given, 1) if given else None


class AllInOneBlock(Block):
    """Affine coupling, a global affine map and a permutation, with FrEIA's arguments.

    GIN coupling and learned Householder reflections run in plain torch.
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        affine_clamping: float = 2.0,
        gin_block: bool = False,
        global_affine_init: float = 1.0,
        global_affine_type: str = "SOFTPLUS",
        permute_soft: bool = False,
        learned_householder_permutation: int = 0,
        reverse_permutation: bool = False,
    ):
        super().__init__(dims_in, dims_c)
        n = self.channels
        self.splits = [n - n // 2, n // 2]
        self.condition_channels, self.in_channels = self.condition_length, n
        self.clamp, self.GIN = affine_clamping, gin_block
        self.reverse_pre_permute, self.householder = reverse_permutation, learned_householder_permutation
        if global_affine_type not in _GLOBAL:
            raise ConfigError("global_affine_type", value=repr(global_affine_type), limit=", ".join(_GLOBAL))
        self.global_affine_type = global_affine_type
        start = _GLOBAL[global_affine_type][1](global_affine_init)
        self.global_scale = nn.Parameter(torch.full((1, n), float(start)))
        self.global_offset = nn.Parameter(torch.zeros(1, n))
        matrix = torch.tensor(_permutation_matrix(n, permute_soft), dtype=torch.float32)
        if self.householder:
            self.vk_householder = nn.Parameter(0.2 * torch.randn(self.householder, n))
            self.w_0 = nn.Parameter(matrix, requires_grad=False)
        else:
            self.w_perm = nn.Parameter(matrix, requires_grad=False)
            self.w_perm_inv = nn.Parameter(matrix.t().clone(), requires_grad=False)
        self.subnet = _built(subnet_constructor, self.splits[0] + self.condition_length, 2 * self.splits[1])
        self._examine(self.subnet)
        for used, option in ((gin_block, "gin_block"), (bool(self.householder), "learned_householder_permutation")):
            if used:
                self._plain_because(f"coupling_flow has no {option}")

    def global_scale_activation(self, raw: Tensor) -> Tensor:
        """The global scale of its raw parameter."""
        return _GLOBAL[self.global_affine_type][0](raw)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        if not self.householder:
            return self.w_perm, self.w_perm_inv
        matrix, one = self.w_0, torch.eye(self.channels, dtype=self.w_0.dtype, device=self.w_0.device)
        for v in self.vk_householder:
            matrix = matrix @ (one - 2 * torch.outer(v, v) / v.dot(v))
        return matrix, matrix.t()

    def plain(self, x: Tensor, cond: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        forth, back = self._matrices()
        # GIN keeps volumes: no global scale (but its offset), and the log-scales of a row add up to nothing.
        scale = torch.ones_like(self.global_scale) if self.GIN else self.global_scale_activation(self.global_scale)
        if rev:
            x = (nn.functional.linear(x, back) - self.global_offset) / scale
        elif self.reverse_pre_permute:
            x = nn.functional.linear(x, back)
        x1, x2 = x.split(self.splits, 1)
        a = 0.1 * self.subnet(x1 if cond is None else torch.cat([x1, cond], 1))
        s, t = self.clamp * torch.tanh(a[:, : self.splits[1]]), a[:, self.splits[1] :]
        if self.GIN:
            s = s - s.mean(1, keepdim=True)
        x2 = (x2 - t) * torch.exp(-s) if rev else x2 * torch.exp(s) + t
        logdet = s.sum(1) + torch.log(scale).sum()
        y = torch.cat([x1, x2], 1)
        if rev:
            return nn.functional.linear(y, forth) if self.reverse_pre_permute else y, -logdet
        return nn.functional.linear(y * scale + self.global_offset, forth), logdet


class _Coupling(Block):
    """What GLOW and RNVP blocks share."""

    def __init__(
        self, dims_in: Dims, dims_c: Dims | None, clamp: float, clamp_activation: str | Callable, split_len: float | int
    ):
        super().__init__(dims_in, dims_c)
        whole = isinstance(split_len, int)
        if not 0 <= split_len <= (self.channels if whole else 1):
            raise ConfigError(
                "split_len is out of range", value=split_len, limit=f"0 to {self.channels}, or a share from 0.0 to 1.0"
            )
        self.split_len1 = int(split_len) if whole else round(self.channels * split_len)
        self.split_len2 = self.channels - self.split_len1
        self.clamp = clamp
        if isinstance(clamp_activation, str) and clamp_activation not in _CLAMPS:
            raise ConfigError(
                "clamp_activation", value=repr(clamp_activation), limit=f"{', '.join(_CLAMPS)}, or a function"
            )
        self.f_clamp = _CLAMPS[clamp_activation] if isinstance(clamp_activation, str) else clamp_activation
        if not isinstance(clamp_activation, (str, nn.Identity)):
            self._plain_because("a clamp_activation of one's own")
        if not 0 < self.split_len1 < self.channels:
            self._plain_because("one half is empty")

    def _coefficients(self, half: int, passive: Tensor) -> tuple[Tensor, Tensor]:
        """Raw s and t of half 1 or 2, of the other half (and the condition)."""
        raise NotImplementedError

    def plain(self, x: Tensor, cond: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        halves = dict(zip((1, 2), x.split([self.split_len1, self.split_len2], 1), strict=True))
        logdet = x.new_zeros(x.shape[0])
        for half in (2, 1) if rev else (1, 2):
            passive = halves[3 - half]
            s, t = self._coefficients(half, passive if cond is None else torch.cat([passive, cond], 1))
            s = self.clamp * self.f_clamp(s)
            halves[half] = (halves[half] - t) * torch.exp(-s) if rev else torch.exp(s) * halves[half] + t
            logdet = logdet + s.sum(1)
        return torch.cat([halves[1], halves[2]], 1), -logdet if rev else logdet


class GLOWCouplingBlock(_Coupling):
    """Two affine couplings, one subnet for each, with FrEIA's arguments."""

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable = "ATAN",
        split_len: float | int = 0.5,
    ):
        super().__init__(dims_in, dims_c, clamp, clamp_activation, split_len)
        one, two, c = self.split_len1, self.split_len2, self.condition_length
        self.subnet1 = _built(subnet_constructor, one + c, 2 * two)
        self.subnet2 = _built(subnet_constructor, two + c, 2 * one)
        self._examine(self.subnet1, self.subnet2)

    def _coefficients(self, half: int, passive: Tensor) -> tuple[Tensor, Tensor]:
        subnet, width = (self.subnet2, self.split_len1) if half == 1 else (self.subnet1, self.split_len2)
        out = subnet(passive)
        return out[:, :width], out[:, width:]


class RNVPCouplingBlock(_Coupling):
    """Two affine couplings, two subnets for each, with FrEIA's arguments."""

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable = "ATAN",
        split_len: float | int = 0.5,
    ):
        super().__init__(dims_in, dims_c, clamp, clamp_activation, split_len)
        one, two, c = self.split_len1, self.split_len2, self.condition_length
        self.subnet_s1 = _built(subnet_constructor, one + c, two)
        self.subnet_t1 = _built(subnet_constructor, one + c, two)
        self.subnet_s2 = _built(subnet_constructor, two + c, one)
        self.subnet_t2 = _built(subnet_constructor, two + c, one)
        self._examine(self.subnet_s1, self.subnet_t1, self.subnet_s2, self.subnet_t2)

    def _coefficients(self, half: int, passive: Tensor) -> tuple[Tensor, Tensor]:
        if half == 1:
            return self.subnet_s2(passive), self.subnet_t2(passive)
        return self.subnet_s1(passive), self.subnet_t1(passive)


class PermuteRandom(Block):
    """A fixed random permutation of the channels; ``seed`` of numpy's generator, as in FrEIA, or None for its state."""

    def __init__(self, dims_in: Dims, dims_c: Dims | None = None, seed: int | None = None):
        super().__init__(dims_in, dims_c)
        self.in_channels = self.channels
        if seed is not None:
            np.random.seed(seed)  # FrEIA's way, so that a script gets its permutations
        index = torch.as_tensor(np.random.permutation(self.channels), dtype=torch.int64)
        self.perm = nn.Parameter(index, requires_grad=False)
        self.perm_inv = nn.Parameter(torch.argsort(index), requires_grad=False)

    def plain(self, x: Tensor, cond: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        return x[:, self.perm_inv if rev else self.perm], x.new_zeros(x.shape[0])


class ActNorm(Block):
    """A scale and an offset per channel, set by the first batch (or ``init_data``) so that its channels have mean 0 and
    standard deviation 1; a loaded state dict keeps its own."""

    def __init__(self, dims_in: Dims, dims_c: Dims | None = None, init_data: Tensor | None = None):
        super().__init__(dims_in, dims_c)
        self.scale = nn.Parameter(torch.zeros(1, self.channels))
        self.bias = nn.Parameter(torch.zeros(1, self.channels))
        self.init_on_next_batch = init_data is None
        self.register_load_state_dict_pre_hook(_keep_loaded)
        if init_data is not None:
            self._initialize_with_data(init_data)

    @torch.no_grad()
    def _initialize_with_data(self, data: Tensor) -> None:
        if data.dim() != 2 or data.shape[1] != self.channels or data.shape[0] < 2:
            raise ConfigError(
                "ActNorm needs two rows of its channels to begin with",
                value=tuple(data.shape),
                limit=f"[2+, {self.channels}]",
            )
        deviation = data.std(0)
        if not (deviation > 0).all():
            channel = int((~(deviation > 0)).nonzero()[0])
            raise ConfigError(
                f"channel {channel} does not vary over ActNorm's first batch", value=f"{len(data)} rows",
                remedy="begin with a larger batch, or pass init_data",
            )  # fmt: skip
        self.scale.copy_(-deviation.log())
        self.bias.copy_(-(data * self.scale.exp()).mean(0))
        self.init_on_next_batch = False

    def prepare(self, x: Tensor, rev: bool) -> None:
        if self.init_on_next_batch:
            self._initialize_with_data(x)

    def plain(self, x: Tensor, cond: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        logdet = self.scale.sum().expand(x.shape[0])
        if rev:
            return (x - self.bias) / self.scale.exp(), -logdet
        return x * self.scale.exp() + self.bias, logdet


def _keep_loaded(module: ActNorm, *_: Any) -> None:
    module.init_on_next_batch = False


def _built(constructor: Callable[[int, int], nn.Module] | None, inputs: int, outputs: int) -> nn.Module:
    if constructor is None:
        raise ConfigError("subnet_constructor is missing", limit="a function of (channels_in, channels_out)")
    subnet = constructor(inputs, outputs)
    if not isinstance(subnet, nn.Module):
        raise ConfigError("subnet_constructor must return a module", value=type(subnet).__name__)
    return subnet


def _permutation_matrix(dim: int, soft: bool) -> np.ndarray:
    """A random rotation, or a permutation matrix, drawn from numpy's generator as FrEIA draws them."""
    if soft:
        stats = require("scipy.stats", purpose="permute_soft=True", extra="probes")
        return stats.special_ortho_group.rvs(dim)
    return np.eye(dim)[np.random.permutation(dim)]


def _softplus(raw: Tensor) -> Tensor:
    return 0.1 * nn.functional.softplus(raw, beta=0.5)


def _sigmoid(raw: Tensor) -> Tensor:
    return 10 * torch.sigmoid(raw - 2.0)


def _raw_softplus(scale: float) -> float:
    return 2.0 * math.log(math.expm1(5.0 * scale))


def _raw_sigmoid(scale: float) -> float:
    return 2.0 - math.log(10.0 / scale - 1.0)


# Name -> the scale of a raw parameter, and the raw parameter of a scale.
_GLOBAL: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[float], float]]] = {
    "SIGMOID": (_sigmoid, _raw_sigmoid),
    "SOFTPLUS": (_softplus, _raw_softplus),
    "EXP": (torch.exp, math.log),
}


def _atan(u: Tensor) -> Tensor:
    return 0.636 * torch.atan(u)


def _centred_sigmoid(u: Tensor) -> Tensor:
    return 2.0 * (torch.sigmoid(u) - 0.5)


_CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {"ATAN": _atan, "TANH": torch.tanh, "SIGMOID": _centred_sigmoid}
