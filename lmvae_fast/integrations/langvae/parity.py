"""The parallel pass beside the plain eager reference, on the user's own model: the same figures, in which time?"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lmvae_fast.integrations.langvae import load_reference, save_checkpoint
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.projectors import LinearProjector
from lmvae_fast.profiling.measure import call_seconds, take_turns


def compare(model: LMVAE, texts: Sequence[str], scratch: Path, *, seed: int = 0, runs: int = 5) -> dict[str, Any]:
    """Loss, gradients, greedy tokens and time of a training step and of decoding, ours against the eager reference.

    The reference decodes token by token through Hugging Face's own cache, as LangVAE 0.6.13 does, and gets the same
    weights through a checkpoint in LangVAE's format. Both sides are timed in turn within one run.

    Args:
        model: a ``langvae`` model.
        texts: one batch of sentences.
        scratch: folder for the checkpoint in between.
        seed: of the noise.
        runs: timed repetitions of each side; medians are reported.
    """
    was_training, config = model.training, model.config
    model.eval()
    released = config.replace(objective="langvae-0.6", free_running=True, kl_mode="sample_threshold", kl_target=2.0)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        save_checkpoint(model, Path(folder) / "langvae", overwrite=True)
        reference = load_reference(Path(folder) / "langvae")
    beta = 0.5
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(len(texts), config.latent_dim, generator=generator)
    sentences = model.tokenize(texts)
    pooled = model.pool(sentences)
    # Both sides use encoder features computed once: LangVAE caches them too.
    features = reference.pooled(reference.target_ids(texts))
    reference.pooled = lambda target_ids: features  # type: ignore[method-assign]
    try:
        model.config = released
        batch = model.make_batch(sentences, pooled=pooled)
        ours, our_gradients = _gradients(model, lambda: model(batch, beta=beta, eps=eps).loss)
        theirs, their_gradients = _gradients(
            reference, lambda: reference.loss(texts, beta=beta, target_kl=2.0, eps=eps, objective="langvae-0.6").loss
        )
        exact_seconds, reference_seconds = _in_turn(
            lambda: _step(model, lambda: model(batch, beta=beta, eps=eps).loss),
            lambda: _step(reference, lambda: reference.loss(texts, beta=beta, target_kl=2.0, eps=eps).loss),
            runs,
        )
        model.config = config
        forced = model.make_batch(sentences, pooled=pooled)
        forced_seconds, again = _in_turn(
            lambda: _step(model, lambda: model(forced, beta=beta, eps=eps).loss),
            lambda: _step(reference, lambda: reference.loss(texts, beta=beta, target_kl=2.0, eps=eps).loss),
            runs,
        )
        z = model.encode(texts).mu
        with torch.no_grad():
            same = _same_ids(model, reference, z)
            decode_seconds, reference_decode = _in_turn(
                lambda: model.decode(z), lambda: reference.decode(z), runs
            )  # fmt: skip
    finally:
        model.config = config
        model.train(was_training)
    largest = max(their_gradients[name].abs().max().item() for name in their_gradients)
    difference = max((our_gradients[name] - their_gradients[name]).abs().max().item() for name in their_gradients)
    return {
        "sentences": len(texts),
        "threads": torch.get_num_threads(),
        "loss": ours,
        "reference_loss": theirs,
        "loss_difference": abs(ours - theirs) / abs(theirs),
        "gradient_difference": difference / largest,
        "same_greedy_tokens": same,
        "free_running_step_seconds": exact_seconds,
        "reference_step_seconds": reference_seconds,
        "teacher_forced_step_seconds": forced_seconds,
        "reference_step_seconds_again": again,
        "decode_seconds": decode_seconds,
        "reference_decode_seconds": reference_decode,
        "free_running_speedup": reference_seconds / exact_seconds,
        "teacher_forced_speedup": again / forced_seconds,
        "decode_speedup": reference_decode / decode_seconds,
    }


def _gradients(model: Any, loss: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients under common names: ``head``, ``weight.<layer>``, ``bias.<layer>``."""
    model.zero_grad()
    value = loss()
    value.backward()
    out: dict[str, Any] = {}
    if isinstance(model, LMVAE):
        assert isinstance(model.projector, LinearProjector)
        out["head"] = model.posterior_head.weight.grad
        for layer in range(model.decoder.num_layers):
            for name in ("weight", "bias"):
                out[f"{name}.{layer}"] = getattr(model.projector, name).grad[layer]
    else:
        out["head"] = model.linear.weight.grad
        for layer, linear in enumerate(model.context_hidden):
            out[f"weight.{layer}"], out[f"bias.{layer}"] = linear.weight.grad, linear.bias.grad
    gradients = {name: gradient.clone() for name, gradient in out.items()}
    model.zero_grad()
    return value.item(), gradients


def _step(model: Any, loss: Callable[[], torch.Tensor]) -> None:
    loss().backward()
    model.zero_grad()


def _same_ids(model: LMVAE, reference: Any, z: torch.Tensor) -> bool:
    from lmvae_fast.models.free_running import greedy_ids

    ours = greedy_ids(model.decoder, model.inject(z), model.config.max_len)
    return bool(torch.equal(ours, reference.decode_ids(z)))


def _in_turn(ours: Callable[[], Any], theirs: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Median seconds of both, run in turn after one call that is not counted."""
    sides = {name: functools.partial(call_seconds, run) for name, run in (("ours", ours), ("theirs", theirs))}
    times = take_turns(sides, runs, discarded=1)
    return statistics.median(times["ours"]), statistics.median(times["theirs"])
