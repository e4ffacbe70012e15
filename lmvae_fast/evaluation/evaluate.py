"""All figures of a model on a set of sentences."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.evaluation import metrics as figures
from lmvae_fast.evaluation import text as text_figures
from lmvae_fast.evaluation.collapse import warn_of_collapse
from lmvae_fast.evaluation.elbo import require_finite, without_padding
from lmvae_fast.evaluation.within_prompts import within_prompts
from lmvae_fast.models.modes import evaluating

logger = logging.getLogger(__name__)

#: What ``evaluate`` can compute, in its order. ``perplexity`` costs ``num_importance_samples`` passes over the data.
METRICS = ("elbo", "active_units", "mutual_information", "perplexity", "bleu", "exact_match", "token_accuracy")

#: What :func:`~lmvae_fast.evaluation.within_prompts.within_prompts` computes, of a model of prompts only.
WITHIN_PROMPTS = "within_prompts"

_TEXT_METRICS = ("bleu", "exact_match", "token_accuracy")


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of a model on a set of sentences; those not asked for are None.

    Means are over sentences, likelihoods in nats. A sentence's tokens include its end token.

    Attributes:
        sentences, tokens: how many were evaluated.
        elbo: -(reconstruction + kl), one sample of each posterior, teacher forced.
        reconstruction: -log p(x|z) of a sentence. reconstruction_per_token: all of it divided by all tokens.
        kl: KL(q(z|x) || N(0, I)), without thresholds or beta.
        elbo_perplexity: exp of -ELBO per token: an upper bound of the perplexity.
        active_units: dimensions whose posterior mean varies by at least 0.01 over the sentences, of ``latent_dim``.
        mutual_information: I(x; z) under q; at most log(sentences).
        log_likelihood: importance-weighted log p(x) of a sentence. perplexity: exp of minus all of it per token.
        num_importance_samples: samples K behind those two.
        within_prompts: figures of the responses to each prompt, averaged over the prompts, by name.
        bleu, exact_match, token_accuracy: of sentences decoded greedily from the posterior mean, each from 0 to 1.
        dropped: the report of tokenisation (kept, truncated, dropped, empty).
        seed: of the noise.
        seconds: wall time.
        examples: the first sentences and what they decode to.
    """

    sentences: int
    tokens: int
    latent_dim: int
    seed: int
    elbo: float | None = None
    reconstruction: float | None = None
    reconstruction_per_token: float | None = None
    kl: float | None = None
    elbo_perplexity: float | None = None
    active_units: int | None = None
    mutual_information: float | None = None
    log_likelihood: float | None = None
    perplexity: float | None = None
    num_importance_samples: int | None = None
    bleu: float | None = None
    exact_match: float | None = None
    token_accuracy: float | None = None
    within_prompts: dict[str, float] | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    examples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of the figures that were computed, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    model: Any,
    data: Iterable[Any],
    *,
    batch_size: int = 64,
    num_importance_samples: int = 100,
    metrics: Sequence[str] = METRICS,
    on_long: str = "truncate",
    pooled: Tensor | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    num_examples: int = 10,
    progress: bool = False,
) -> EvaluationResult:
    """Evaluate a model, in eval mode and without gradients; its training mode is restored afterwards, also on an error.

    Likelihoods are teacher forced. The noise of a sentence depends on ``seed`` and its row alone, so the figures do not
    depend on ``batch_size`` beyond rounding, and torch's own generators are not touched.

    Args:
        model: an LMVAE.
        data: sentences: a SentenceDataset, strings, Examples, or what ``model.tokenize`` returned for them.
        batch_size: sentences per pass.
        num_importance_samples: K of the importance-weighted perplexity.
        metrics: which of :data:`METRICS`, and of a model of prompts ``"within_prompts"``; ``"elbo"`` brings reconstruction and
            kl, ``"perplexity"`` log_likelihood.
        on_long: what to do with sentences over the model's ``max_len``: ``"truncate"``, ``"drop"`` or ``"error"``.
        pooled: the frozen encoder's features of all sentences, from ``model.pool``; None runs the encoder here.
        max_new_tokens: limit of decoding; None for the model's ``max_len``.
        seed: of the noise, non-negative.
        num_examples: decoded sentences to keep in the result.
        progress: draw a progress bar.

    Raises:
        ConfigError: an unknown metric, one of prompts asked of another model, or a number out of range.
        DataError: no sentence, or too few (active_units needs two).
        NumericalError: a figure is not finite.
    """
    started = time.perf_counter()
    _check(metrics, batch_size, num_importance_samples, seed, prompted=bool(getattr(model.config, "prompted", False)))
    with evaluating(model):
        sentences: Any = data if hasattr(data, "ids") else model.tokenize(data, on_long=on_long)
        if len(sentences) < (2 if "active_units" in metrics else 1):
            raise DataError(
                "too few sentences to evaluate",
                value=len(sentences),
                limit=">= 2 for active_units, >= 1 otherwise",
                remedy="check the data",
            )
        samples = num_importance_samples if "perplexity" in metrics else 0
        wants_text = any(name in metrics for name in _TEXT_METRICS)
        passes = 1 + ("elbo" in metrics) + samples + wants_text
        with tqdm(total=passes * len(sentences), unit="sentence", disable=not progress, desc="evaluate") as bar:
            table = _Table()
            for batch, rows in _batches(model, sentences, pooled, batch_size):
                _evaluate_batch(model, batch, rows, table, metrics, samples, seed, max_new_tokens, bar)
    count_start = bool(getattr(model.config, "count_start_token", False))
    result = _summary(table, metrics, sentences, samples, seed, count_start)
    for name in ("perplexity", "elbo_perplexity"):
        if result.get(name) == math.inf and math.isfinite(
            result["elbo" if name == "elbo_perplexity" else "log_likelihood"]
        ):
            logger.warning("%s is too large for a number and is left out", name)
            del result[name]
    require_finite(result, "check the model's weights; a training run's last good checkpoint is in its folder")
    if "kl" in result or "active_units" in result:
        kl = result.get("kl", float(figures.kl_divergence(table["mu"], table["logvar"]).mean()))
        warn_of_collapse(kl, result.get("active_units"), result["latent_dim"], "evaluation")
    examples = [
        {"text": text, "decoded": decoded}
        for text, decoded in zip(sentences.texts[:num_examples], table.decoded, strict=False)
    ]
    return EvaluationResult(
        **result, dropped=dict(sentences.report), examples=examples, seconds=time.perf_counter() - started
    )


class _Table:
    """What the batches contribute, sentence by sentence, on the CPU."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Tensor]] = {}
        self.decoded: list[str] = []

    def add(self, **columns: Tensor) -> None:
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.detach().cpu())

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.columns[name])


def _evaluate_batch(
    model: Any,
    batch: Any,
    rows: range,
    table: _Table,
    metrics: Sequence[str],
    samples: int,
    seed: int,
    max_new_tokens: int | None,
    bar: Any,
) -> None:
    posterior = model.encode(batch)
    mu, logvar = posterior.mu, posterior.logvar
    first, noise = (draws.to(mu) for draws in _noise(rows, samples, mu.shape[1], seed))
    z = mu + first * torch.exp(0.5 * logvar)
    table.add(mu=mu, logvar=logvar, z=z, tokens=batch.tokens)
    bar.update(len(rows))
    if "elbo" in metrics:
        table.add(reconstruction=model.score(batch, z).double())
        bar.update(len(rows))
    if samples:

        def score(latents: Tensor) -> Tensor:
            bar.update(len(rows))
            return model.score(batch, latents)

        table.add(log_likelihood=figures.importance_weighted_log_likelihood(score, mu, logvar, noise))
    if any(name in metrics for name in _TEXT_METRICS):
        options: dict[str, Any] = {"batch_size": len(rows), "max_new_tokens": max_new_tokens}
        if model.config.conditional_decoder:
            options["annotations"] = batch.annotations
        if batch.prompt_ids is not None:
            options["prompts"] = batch.prompt_ids
        table.decoded += [text.strip() for text in model.decode(mu, **options)]
        bar.update(len(rows))


def _summary(
    table: _Table, metrics: Sequence[str], sentences: Any, samples: int, seed: int, count_start: bool
) -> dict[str, Any]:
    mu, logvar, tokens = table["mu"], table["logvar"], table["tokens"]
    counted = tokens + int(count_start)  # what perplexity divides by
    result: dict[str, Any] = {
        "sentences": len(sentences),
        "tokens": int(tokens.sum()),
        "latent_dim": mu.shape[1],
        "seed": seed,
    }
    if "elbo" in metrics:
        reconstruction, kl = table["reconstruction"], figures.kl_divergence(mu, logvar)
        result["elbo"] = float(-(reconstruction + kl).mean())
        result["reconstruction"] = float(reconstruction.mean())
        result["reconstruction_per_token"] = float(reconstruction.sum() / tokens.sum())
        result["kl"] = float(kl.mean())
        result["elbo_perplexity"] = figures.perplexity(-(reconstruction + kl), counted)
    if "active_units" in metrics:
        result["active_units"] = figures.active_units(mu)
    if "mutual_information" in metrics:
        result["mutual_information"] = figures.mutual_information(table["z"], mu, logvar)
    if samples:
        result["log_likelihood"] = float(table["log_likelihood"].mean())
        result["perplexity"] = figures.perplexity(table["log_likelihood"], counted)
        result["num_importance_samples"] = samples
    if WITHIN_PROMPTS in metrics:
        result[WITHIN_PROMPTS] = within_prompts(mu, logvar, sentences.prompts, seed=seed)
    references = [text.strip() for text in sentences.texts]
    for name in _TEXT_METRICS:
        if name in metrics:
            result[name] = getattr(text_figures, name)(table.decoded, references)
    return result


def _batches(model: Any, sentences: Any, pooled: Tensor | None, batch_size: int) -> Iterator[tuple[Any, range]]:
    device = next(model.parameters()).device
    for start in range(0, len(sentences), batch_size):
        rows = range(start, min(start + batch_size, len(sentences)))
        batch = model.make_batch(sentences, rows, pooled).to(device)
        if getattr(model.config, "objective", None) == "langvae-0.6":
            # That objective predicts the batch's padding too; it is no part of a sentence's likelihood.
            batch = without_padding(batch)
        yield batch, rows


def _noise(rows: range, samples: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """N(0, I) float32: ``[rows, width]`` for ELBO and mutual information, ``[samples, rows, width]`` for importance.

    A row's noise depends on the row, not on its batch, and the first part not on the number of samples.
    """
    source = torch.Generator()
    first, noise = torch.empty(len(rows), width), torch.empty(samples, len(rows), width)
    for place, row in enumerate(rows):
        # A digest, because torch's CPU generator keeps only the low 32 bits of its seed.
        digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=4).digest()
        source.manual_seed(int.from_bytes(digest, "little"))
        first[place] = torch.randn(width, generator=source)
        noise[:, place] = torch.randn(samples, width, generator=source)
    return first, noise


def _check(metrics: Sequence[str], batch_size: int, num_importance_samples: int, seed: int, *, prompted: bool) -> None:
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    known = (*METRICS, WITHIN_PROMPTS) if prompted else METRICS
    unknown = [name for name in names if name not in known]
    if unknown or not names or isinstance(metrics, str):
        raise ConfigError(
            "unknown metrics" if unknown else "metrics must be a sequence with at least one name",
            value=", ".join(map(repr, unknown or names)) or "()",
            limit=", ".join(known),
        )
    for name, value, low in (
        ("batch_size", batch_size, 1),
        ("num_importance_samples", num_importance_samples, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name} is out of range", value=repr(value), limit=f"an integer >= {low}")
