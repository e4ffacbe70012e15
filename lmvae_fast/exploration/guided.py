"""Responses guided by labels: the direction of latent space along which a label becomes more probable.

Source: CVAE with G-Skip (IEEE TAI 7(2), 2026; behaviour of zhangjf-nlp/LLM-based-CVAE): within a prompt the correlation of a
label's probability with each latent dimension, averaged over prompts, less its mean over labels, at length one. Latents are
then moved 16 of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmvae_fast.data.prompts import PromptDataset, PromptResponse
from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.optional import require

#: How far latents are moved along a direction in the published figures.
STRENGTH = 16.0


@dataclass(frozen=True)
class LabelClassifier:
    """What says how probable labels are: any callable from responses to ``[N, len(labels)]`` probabilities."""

    labels: tuple[str, ...]
    probabilities: Callable[[Sequence[PromptResponse]], Any]


def fit_label_classifier(model: LMVAE, data: PromptDataset) -> LabelClassifier:
    """Logistic regression of a dataset's labels on the means of its posteriors (scikit-learn, standardised features).

    Raises DataError for fewer than two labels; responses without one are left out.
    """
    rows = [row for row, label in enumerate(data.labels or ()) if label is not None]
    labels = data.label_set()
    if len(labels) < 2:
        raise DataError("a classifier needs labels", value=f"{len(labels)} different ones", limit="at least 2")
    linear = require("sklearn.linear_model", purpose="a classifier of labels", extra="metrics")
    scaling = require("sklearn.preprocessing", purpose="a classifier of labels", extra="metrics")
    pipeline = require("sklearn.pipeline", purpose="a classifier of labels", extra="metrics")
    known = data.select(rows)
    fitted = pipeline.make_pipeline(scaling.StandardScaler(), linear.LogisticRegression(max_iter=1000))
    fitted.fit(_means(model, known), [data.labels[row] for row in rows])  # type: ignore[index]

    def probabilities(responses: Sequence[PromptResponse]) -> Any:
        return fitted.predict_proba(_means(model, responses))

    return LabelClassifier(tuple(map(str, fitted.classes_)), probabilities)


def label_directions(model: LMVAE, data: PromptDataset, classifier: LabelClassifier) -> dict[str, Tensor]:
    """The direction ``[latent_dim]`` of each label, of length one.

    Args:
        model: of prompts.
        data: several responses to each of some prompts (the published figures: 32 of each of 10).
        classifier: of the labels; :func:`fit_label_classifier`, or any other.

    Raises DataError where no prompt has two responses whose latents and probabilities vary, probabilities do not fit, or a
    label has no direction (all labels correlate alike).
    """
    found = []
    for _, responses in data.by_prompt():
        if len(responses) < 2:
            continue
        said = np.asarray(classifier.probabilities(responses), dtype=np.float64)
        if said.shape != (len(responses), len(classifier.labels)) or not np.isfinite(said).all():
            raise DataError(
                "probabilities do not fit the responses and labels", value=list(said.shape),
                limit=[len(responses), len(classifier.labels)],
            )  # fmt: skip
        found.append(_correlations(said, _means(model, responses)))
    if not found or not any(part.any() for part in found):
        raise DataError(
            "no prompt has responses that differ in label and latent", value=f"{len(data.prompts)} prompts",
            limit="two responses of a prompt at least", remedy="give more responses of each prompt",
        )  # fmt: skip
    mean = np.mean(found, axis=0)
    moved = mean - mean.mean(axis=0)
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    if not (lengths > 0).all():
        label = classifier.labels[int(np.argmin(lengths))]
        raise DataError(f"label {label!r} has no direction of its own", value="all labels correlate alike")
    return dict(zip(classifier.labels, torch.from_numpy(moved / lengths).to(model.latent_dtype), strict=True))


def guided(
    model: LMVAE,
    responses: Sequence[PromptResponse],
    direction: Tensor,
    *,
    strength: float = STRENGTH,
    **options: Any,
) -> list[str]:
    """Answers to the prompts of given responses, from their posterior means moved along a direction ``[latent_dim]``.

    options: fields of GenerationConfig. Raises LatentError for a direction that does not fit, and what ``model.decode`` raises.
    """
    if tuple(direction.shape) != (model.config.latent_dim,):
        raise LatentError(
            "a direction has a number for each of the latent's", value=list(direction.shape),
            limit=[model.config.latent_dim], remedy="take a row of label_directions",
        )  # fmt: skip
    z = model.encode(responses).mu
    z = z + strength * direction.to(z)
    return model.decode(z, prompts=[response.prompt for response in responses], **options)


def _means(model: LMVAE, responses: Sequence[PromptResponse]) -> Any:
    return model.encode(responses).mu.double().cpu().numpy()


def _correlations(said: Any, latents: Any) -> Any:
    """Pearson's ``[labels, latent_dim]``; 0 where one of the two does not vary."""
    a, b = said - said.mean(axis=0), latents - latents.mean(axis=0)
    sizes = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)[None]
    return np.divide(a.T @ b, sizes, out=np.zeros_like(sizes), where=sizes > 1e-12)
