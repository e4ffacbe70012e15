"""posterior_sample: registration, autograd and the public function. The truth is reference.py."""

from __future__ import annotations

from typing import Any

import torch

from .. import backend, philox
from ..registration import define, define_plain, primitives, reference_gradients, refuse_vmap, tangents
from . import reference
from .checks import check_posterior_sample
from .modes import KL_MODES

# ---- primitives --------------------------------------------------------------------------------------------------------


def _fake_fwd(mu, logvar, seed, num_samples, mode, target):
    z = mu.new_empty(tuple(mu.shape) if num_samples == 1 else (num_samples, *mu.shape))
    return z, mu.new_empty(mu.shape[0], dtype=torch.promote_types(mu.dtype, torch.float32))


def _fake_bwd(dz, dkl, mu, logvar, kl, seed, num_samples, mode, target):
    return mu.new_empty(tuple(mu.shape)), mu.new_empty(tuple(mu.shape))


def _triton_fwd(*args):
    from .triton import posterior_fwd

    return posterior_fwd(*args)


def _triton_bwd(*args):
    from .triton import posterior_bwd

    return posterior_bwd(*args)


def _gradients_again(dz, dkl, mu, logvar, seed, num_samples, mode, target):
    """What `posterior_bwd` gives, in a form that can be differentiated: for a backward under create_graph."""

    def function(mu, logvar):
        return reference.posterior_sample(mu, logvar, seed, num_samples, KL_MODES[mode], target)

    return reference_gradients(function, (mu, logvar), (True, True), (dz, dkl))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    mu, logvar, seed, *ctx.options = inputs
    ctx.save_for_backward(mu, logvar, output[1], seed)


def _backward(ctx: Any, dz: torch.Tensor | None, dkl: torch.Tensor | None) -> tuple:
    mu, logvar, kl, seed = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *_gradients_again(dz, dkl, mu, logvar, seed, *ctx.options), None, None, None, None
    dmu, dlogvar = ctx.primitives.posterior_bwd(dz, dkl, mu, logvar, kl, seed, *ctx.options)
    return dmu, dlogvar, None, None, None, None


define(
    "posterior_bwd(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor kl, Tensor seed, int num_samples, int mode, "
    "float target) -> (Tensor, Tensor)",
    fake=_fake_bwd,
    triton=_triton_bwd,
)
define(
    "posterior_fwd(Tensor mu, Tensor logvar, Tensor seed, int num_samples, int mode, float target) -> (Tensor, Tensor)",
    fake=_fake_fwd,
    triton=_triton_fwd,
    setup_context=_setup_context,
    backward=_backward,
)
define_plain(
    "posterior_bwd_again(Tensor? dz, Tensor? dkl, Tensor mu, Tensor logvar, Tensor seed, int num_samples, int mode, "
    "float target) -> (Tensor, Tensor)",
    _gradients_again,
)
backend.register(
    "posterior_sample",
    cpp=backend.Support(backend.FLOATS_AND_DOUBLE, ("posterior_fwd", "posterior_bwd")),
    triton=backend.Support(backend.FLOATS, ("posterior_fwd", "posterior_bwd")),
)

# ---- the public function -----------------------------------------------------------------------------------------------


def posterior_sample(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    *,
    seed: int | torch.Tensor | None,
    num_samples: int = 1,
    kl: str = "sum",
    kl_target: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw z ~ N(mu, e^logvar) and give KL(N(mu, e^logvar) || N(0, 1)), in one pass; differentiable in mu and logvar.

    Args:
        mu, logvar: [..., D] mean and log-variance; fp32, fp16, bf16 or fp64, any strides, no elements allowed.
        seed: None draws from torch's generator of that device; an int; or an int64 device tensor [2] = (seed, offset).
            The noise is that of `kernels.philox` for rows [num_samples * prod(leading), D], whatever the backend.
        num_samples: samples per posterior.
        kl: with KL_d = (mu_d^2 + e^logvar_d - logvar_d - 1) / 2,
            "sum": sum_d KL_d;
            "dim_threshold": sum_d KL_d [KL_d > kl_target] (Optimus' released code);
            "free_bits": sum_d max(KL_d, kl_target) (Kingma et al. 2016);
            "sample_threshold": KL [KL > kl_target] with KL = sum_d KL_d (LangVAE's released code).
        kl_target: in nats, per dimension or per sample as said; not negative.

    Returns:
        z [..., D], or [num_samples, ..., D] when num_samples > 1, in mu's dtype; kl [...] in nats, fp32 (fp64 for fp64).

    Noise is regenerated in backward from its counter and never stored; second derivatives and forward-mode ones are plain
    torch's. Arithmetic is fp32 for half types, rounded once.
    Inf and NaN pass through as in the reference. Raises ValueError or TypeError naming the argument, BackendError when a
    forced backend cannot run. Source: Kingma & Welling 2014, equation 10 and appendix B.
    """
    check_posterior_sample(mu, logvar, num_samples, kl, kl_target)
    refuse_vmap("posterior_sample", mu, logvar)
    pair = philox.seed_tensor(seed, mu.device)
    lead = mu.shape[:-1]
    if mu.dim() != 2:
        mu, logvar = mu.reshape(-1, mu.shape[-1]), logvar.reshape(-1, logvar.shape[-1])
    choice = backend.choose("posterior_sample", mu, **tangents(mu, logvar))
    if choice == "reference":
        z, divergence = reference.posterior_sample(mu, logvar, pair, num_samples, kl, kl_target)
    else:
        run = primitives(choice, mu).posterior_fwd
        z, divergence = run(mu, logvar, pair, num_samples, KL_MODES.index(kl), float(kl_target))
    if len(lead) != 1:
        z, divergence = z.reshape(*z.shape[:-2], *lead, z.shape[-1]), divergence.reshape(lead)
    return z, divergence
