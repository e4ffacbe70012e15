"""A frozen decoder's body over prepared weights while a run trains what stands around it (training_layers.py).

The body is prepared at its first pass, compared with the modules it stands for in values and gradients, and prepared again
when a weight has changed. What it does not serve goes through the modules, with the reason in `reason` and in the log.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmvae_fast.kernels.backend import FLOATS, choose, current
from lmvae_fast.memory import give_back
from lmvae_fast.models.decoder.attention import PackedAttention
from lmvae_fast.models.decoder.examination import in_float32
from lmvae_fast.models.decoder.exchange import called, exchanged
from lmvae_fast.models.decoder.large_pages import LargePages
from lmvae_fast.models.decoder.linear_weights import Unlike, plain_linears, require
from lmvae_fast.models.decoder.low_rank import adapter_state, require_adapters
from lmvae_fast.models.decoder.rounding import float32_limit, nudged
from lmvae_fast.models.decoder.training_call import TrainingCall
from lmvae_fast.models.decoder.training_layers import written_out
from lmvae_fast.models.decoder.walk import ADAPTER, parameters_of
from lmvae_fast.models.sharded_tensors import in_pieces

if TYPE_CHECKING:
    from lmvae_fast.models.decoder.decoder import Decoder

logger = logging.getLogger(__name__)

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": FLOATS}
_OPTIONS = {"inputs_embeds", "position_ids", "use_cache", "lmvae"}
Forward = Callable[..., Any]
_ADAPTER = f".{ADAPTER}"  # in names of parameters


class TrainingBody:
    """Stands in for ``decoder.body.forward``.

    Attributes:
        reason: why the modules run in place of prepared layers; None where these run, or before the first pass.

    Args:
        decoder: whose body. plain: the forward it stands in for.
    """

    def __init__(self, decoder: Decoder, plain: Forward) -> None:
        self._decoder, self._plain = decoder, plain
        self._dtype = next(decoder.body.parameters()).dtype
        self._dropouts = [module for module in decoder.body.modules() if isinstance(module, nn.Dropout)]
        self._state: tuple | None = None
        self._forward: Forward | None = None
        self.reason: str | None = None

    @property
    def runs(self) -> str:
        """What the last passes went through, for records: "prepared layers", or "modules" and why."""
        if self._forward is not None:
            return "prepared layers"
        return "modules" if self.reason is None else f"modules: {self.reason}"

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As the body's own forward."""
        if torch.compiler.is_compiling() or arguments or not self._serves(options):
            return self._plain(*arguments, **options)
        forward = self._prepared()
        return self._plain(**options) if forward is None else forward(**options)

    def _serves(self, options: dict[str, Any]) -> bool:
        """Whether this call is one that the layers are written for; other kinds are the modules' without a word."""
        if options.keys() != _OPTIONS or type(options["lmvae"]) is not PackedAttention:
            return False
        embedded = options["inputs_embeds"]
        device = embedded.device.type
        if embedded.dtype != self._dtype or device not in DTYPES:  # as while others look at it in fp32
            return False
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != embedded.dtype
        return current() != "reference" and embedded.dtype in DTYPES[device] and not cast

    def prepared(self) -> bool:
        """Whether passes go through prepared layers, which are made now where there are none yet."""
        return current() != "reference" and self._prepared() is not None

    def stale(self) -> bool:
        """Whether the layers of the last pass are not those of the next one, so that no recording of a pass may be replayed:
        it reads copies of weights that are let go then."""
        return self._state is not None and self._now() != self._state

    def _now(self, weights: list[nn.Parameter] | None = None) -> tuple:
        """All that decides how the layers are prepared. Training mode does where something is dropped in it, and no more: an
        evaluation between two steps leaves them as they are."""
        body = self._decoder.body
        weights = parameters_of(body, adapters=False) if weights is None else weights
        # Of a weight that trains nothing is prepared, whatever it holds.
        of_weights = ((w.data_ptr(), None if w.requires_grad else w._version) for w in weights if not in_pieces(w))
        return (body.training and any(module.p > 0 for module in self._dropouts), adapter_state(body), *of_weights)

    def _prepared(self) -> Forward | None:
        weights = parameters_of(self._decoder.body, adapters=False)
        state = self._now(weights)
        if state != self._state:
            self._forward = None  # before the next copies are made
            self._forward, self.reason = self._prepare(weights)
            if self.reason is not None:
                logger.info("%s: its modules run in training: %s", type(self._decoder.body).__name__, self.reason)
            self._state = state
        return self._forward

    def _prepare(self, weights: list[nn.Parameter]) -> tuple[Forward | None, str | None]:
        decoder, pages = self._decoder, LargePages()
        body: Any = decoder.body
        try:
            _require_frozen(decoder, weights)
            forward = written_out(decoder, pages, TrainingCall)
            if forward is None:
                return None, f"the layers of {type(body).__name__} are not written out"
        except Unlike as unlike:
            return None, str(unlike)
        except torch.OutOfMemoryError:
            return None, "there is no room on the device for prepared layers"
        try:
            found = differences(decoder, forward, self._plain)
        except torch.OutOfMemoryError:
            return None, "there is no room on the device to examine prepared layers"
        for what, (off, limit) in found.items():
            if not off <= limit:
                reason = f"the {what} of prepared layers are off by {off:.1e}, more than {limit:.1e}"
                logger.warning("%s: %s", type(body).__name__, reason)
                return None, reason
        give_back(module.weight.detach() for module in plain_linears(body))  # read again where the modules are
        return forward, None


def _require_frozen(decoder: Decoder, weights: list[nn.Parameter]) -> None:
    """Raises Unlike for a body whose weights are not as they are prepared."""
    body = decoder.body
    require(not any(weight.requires_grad for weight in weights), "a part of its weights trains")
    require_adapters(body)
    require(not any(in_pieces(weight) for weight in weights), "its weights are held in pieces")
    dtypes = {weight.dtype for weight in weights if weight.dim() > 1}
    known = set(DTYPES.get(weights[0].device.type, ()))
    require(len(dtypes) == 1 and dtypes <= known, f"its weights are {', '.join(sorted(map(str, dtypes)))}")
    vectors = {weight.dtype for weight in weights} - dtypes  # of a decoder that trains in part (step_setup.castable)
    require(vectors <= {torch.float32}, f"some of its weights are {', '.join(sorted(map(str, vectors)))}")
    require(decoder.way.plain and not decoder.position_columns, "its attention is called in another way")
    require(not body.training or not _drops(body), "it drops values while it trains")
    require(choose("frozen_layer", weights[0]) != "reference", "no kernel for what stands between products")
    for name, module in body.named_modules():
        if module is body:
            continue
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        require(not hooked and "forward" not in module.__dict__, f"{name} has hooks or a forward of its own")


def _drops(body: nn.Module) -> bool:
    """Whether a body in training mode leaves out values at random (on attention weights nobody may: attention.py)."""
    return any(module.p > 0 for module in body.modules() if isinstance(module, nn.Dropout))


def differences(decoder: Decoder, forward: Forward, plain: Forward) -> dict[str, tuple[float, float]]:
    """How far values and gradients of two short sentences under a memory are from the modules' in fp32, over their norm; and
    the most that they may be: in fp32 as `float32_limit` says. In bf16 the modules are off, too: ours may be by twice as much,
    gradients by three times.
    """
    body, dtype, device = decoder.body, next(decoder.body.parameters()).dtype, decoder.device
    mixed = any(weight.dtype != dtype for name, weight in body.named_parameters() if _ADAPTER not in name)
    offsets, positions = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([[0, 1, 2, 0, 1]])
    shape = (decoder.num_layers, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    count = torch.Size(shape).numel()
    memory = torch.linspace(0, 0.37 * count, count).sin().view(shape)
    embedded = torch.linspace(-1, 1, 5 * decoder.hidden_size).view(decoder.hidden_size, 5).t().unsqueeze(0)
    weights = torch.linspace(0, 5 * decoder.hidden_size, 5 * decoder.hidden_size).cos().view(1, 5, -1)
    offsets, positions, memory, embedded, weights = (
        tensor.to(device) for tensor in (offsets, positions, memory, embedded, weights)
    )
    adapters = {name: w for name, w in body.named_parameters() if _ADAPTER in name and w.requires_grad}

    @torch.enable_grad()
    def figures(forward: Forward, dtype: torch.dtype, embedded: Tensor = embedded) -> dict[str, Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (embedded.clone(), memory.clone())]
        attention = PackedAttention(leaves[1], "prefix", offsets, 3)
        given = {"position_ids": positions, "use_cache": False, "lmvae": attention}
        hidden = forward(inputs_embeds=leaves[0], **given).last_hidden_state
        of_states, of_memory, *of_adapters = torch.autograd.grad(
            hidden, [*leaves, *adapters.values()], weights.to(dtype)
        )
        found = {"values": hidden, "gradients by its inputs": of_states, "gradients by the memory": of_memory}
        for half in ("lora_A", "lora_B") if adapters else ():
            own = [grad.flatten().float() for name, grad in zip(adapters, of_adapters, strict=True) if half in name]
            found[f"gradients by {half}"] = torch.cat(own)
        return {name: tensor.detach().float() for name, tensor in found.items()}

    with torch.autocast(device.type, enabled=False), _doing_something(list(adapters.values())):
        ours = figures(forward, dtype)
        with torch.autocast(device.type, dtype, enabled=mixed):  # the modules' own way out of two dtypes
            theirs = figures(plain, dtype)
        if dtype == torch.float32:
            truth, theirs = theirs, figures(plain, dtype, nudged(embedded))
        else:
            with in_float32(body):
                truth = figures(plain, torch.float32)
    found = {}
    for name, want in truth.items():
        ours_off, theirs_off = (((side[name] - want).norm() / want.norm()).item() for side in (ours, theirs))
        factor = 2 if name == "values" else 3
        limit = factor * theirs_off + torch.finfo(dtype).eps / 2
        found[name] = ours_off, float32_limit(theirs_off) if dtype == torch.float32 else limit
    return found


@contextlib.contextmanager
def _doing_something(adapters: list[nn.Parameter]) -> Iterator[None]:
    """While this lasts, adapters hold a pattern: they begin as no change, of which there is nothing to compare."""
    kept = [weight.data for weight in adapters]
    for weight in adapters:
        count = weight.numel()
        pattern = torch.linspace(0, 0.61 * count, count).sin().view(weight.shape) * 0.3 * weight.shape[1] ** -0.5
        weight.data = pattern.to(weight.dtype)
    try:
        yield
    finally:
        for weight, data in zip(adapters, kept, strict=True):
            weight.data = data


@contextlib.contextmanager
def trained_through(decoder: Decoder, wanted: bool = True) -> Iterator[TrainingBody | None]:
    """While this lasts, passes of a frozen decoder over packed sentences go through prepared layers where these exist; their
    copies of the weights are given back at its end. Gives None, and does nothing, unless ``wanted``, and for a model's decoder
    of another kind."""
    body: Any = getattr(decoder, "body", None)
    if not wanted or not hasattr(decoder, "way"):
        yield None
        return
    stand_in = TrainingBody(decoder, called(body))
    with exchanged([(body, stand_in)]):
        yield stand_in
