"""How well an Invertible CVAE defines words: its glosses against the dictionary's, its flow's NLL, and the way back.

Figures: sense-BLEU and lemma-BLEU in both directions, cosine of the VAE's own sentence vectors, MoverScore where a model for it
is given, NLL of the pairs under the flow, and the reverse dictionary (from a gloss's posterior mean through the inverse flow
to its word's vector). Source of the task and its scorer: CODWOE, Mickus et al. 2022 (arXiv 2205.13858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lmvae_fast.data.definitions import DefinitionDataset
from lmvae_fast.data.word_vectors import VectorSource, checked_source
from lmvae_fast.errors import DataError
from lmvae_fast.models.modes import evaluating
from lmvae_fast.models.systems.invertible_cvae import InvertibleCVAE
from lmvae_fast.probes import checks
from lmvae_fast.probes.definition_modelling import DIRECTIONS, lemma_bleu, reverse_dictionary, sense_bleu
from lmvae_fast.probes.results import Score
from lmvae_fast.probes.text.embedding_match import mover_score
from lmvae_fast.training.flow_data import flow_figures

#: What can be measured; ``mover_score`` needs a model of its own.
METRICS = ("bleu", "encoder_cosine", "nll", "reverse_dictionary", "mover_score")


@dataclass(frozen=True)
class DefinitionReport:
    """Figures of a model on definitions.

    Attributes:
        figures: by name. pairs, words: what they are over. skipped: pairs left out for want of a vector.
        generated: the gloss made for each pair. definitions: the pairs.
    """

    figures: dict[str, Score]
    pairs: int
    words: int
    skipped: int
    generated: list[str]
    definitions: DefinitionDataset = field(repr=False)

    def examples(self, count: int = 10) -> list[dict[str, Any]]:
        """The first so many words, with their glosses and the one that was generated."""
        found: dict[str, dict[str, Any]] = {}
        for definition, text in zip(self.definitions, self.generated, strict=True):
            if definition.word not in found and len(found) == count:
                break
            entry = found.setdefault(definition.word, {"word": definition.word, "generated": text, "glosses": []})
            entry["glosses"].append(definition.gloss)
        return list(found.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "pairs": self.pairs, "words": self.words, "skipped": self.skipped,
            **{name: float(score) for name, score in self.figures.items()}, "examples": self.examples(),
        }  # fmt: skip


def evaluate_definitions(
    model: InvertibleCVAE,
    definitions: DefinitionDataset,
    vectors: VectorSource | None = None,
    *,
    metrics: Sequence[str] = METRICS[:-1],
    missing: str = "error",
    mover_model: Any = None,
    seed: int = 0,
    **options: Any,
) -> DefinitionReport:
    """Let a model define the words of definitions, and measure.

    Args:
        model: a fitted InvertibleCVAE.
        definitions: what to measure on: held out, as a rule. vectors: of their words; default: the model's.
        metrics: some of METRICS. mover_model: a Hugging Face encoder (or its folder) for MoverScore.
        missing: a word without a vector: ``"error"``, or ``"skip"``, which counts it.
        seed: of what pads narrower vectors. options: fields of GenerationConfig; greedy by default.

    Raises:
        DataError: unknown metrics, no vectors, a word without one. MissingPackageError: nltk is not installed.
    """
    for name in metrics:
        checks.one_of("metrics", name, METRICS)
    vectors = checked_source(model.vectors if vectors is None else vectors)
    if "mover_score" in metrics and mover_model is None:
        raise DataError(
            "MoverScore needs an encoder of its own", remedy="give mover_model=, a Hugging Face name or folder"
        )
    part, found = definitions.with_vectors(vectors, missing=missing)
    labels = [str(pos) for pos in part.pos] if model.config.conditions and part.pos is not None else None
    z = model.latents(found, labels)
    distinct, row = torch.unique(z, dim=0, return_inverse=True)  # a word's glosses share its latent
    texts = model.vae.decode(distinct, **options)
    generated = [texts[i] for i in row.tolist()]
    figures: dict[str, Score] = {}
    if "bleu" in metrics:
        keys = [(word, part.pos[i] if part.pos is not None else None) for i, word in enumerate(part.words)]
        for direction in DIRECTIONS:
            figures[f"sense_bleu_{direction}"] = sense_bleu(generated, part.glosses, direction)
            figures[f"lemma_bleu_{direction}"] = lemma_bleu(generated, part.glosses, keys, direction)
    if "encoder_cosine" in metrics:
        ours, theirs = _sentence_vectors(model, generated), _sentence_vectors(model, part.glosses)
        cosines = torch.nn.functional.cosine_similarity(ours, theirs).double().numpy()
        figures["encoder_cosine"] = Score(
            float(cosines.mean()), choices={"encoder": "the VAE's"}, details={"items": cosines}
        )
    if "mover_score" in metrics:
        figures["mover_score"] = mover_score(generated, part.glosses, mover_model)
    if "nll" in metrics or "reverse_dictionary" in metrics:
        posterior = model.posteriors(part.glosses)
        pairs = model.pairs(part, found, posterior)
        if "nll" in metrics:
            for name, value in flow_figures(model, pairs, seed=seed).items():
                figures[name] = Score(value, seed=seed, choices={"base": model.config.base})
        if "reverse_dictionary" in metrics:
            figures |= _reverse(model, found, posterior.mu, labels)
    return DefinitionReport(figures, len(part), len(set(part.words)), len(definitions) - len(part), generated, part)


def _sentence_vectors(model: InvertibleCVAE, texts: list[str]) -> torch.Tensor:
    with evaluating(model.vae):
        return model.vae.encoder.pool_texts(texts, [len(text) for text in texts])


@torch.no_grad()
def _reverse(
    model: InvertibleCVAE, vectors: np.ndarray, mu: torch.Tensor, labels: list[str] | None
) -> dict[str, Score]:
    """From posterior means to word vectors, compared where the bridge leaves them (of the flow's width)."""
    bridge = model.set_width(vectors.shape[1])
    targets = bridge(torch.as_tensor(vectors).to(model.device, model.dtype))
    guesses, _ = model.flow.inverse(mu.to(model.device, model.dtype), model.codes(labels, len(mu)))
    if bridge.kind == "pad":  # what pads is no part of a word's vector
        targets, guesses = targets[:, : bridge.dim_in], guesses[:, : bridge.dim_in]
    scores = reverse_dictionary(guesses.cpu().numpy(), targets.cpu().numpy())
    return {f"reverse_{name}": score for name, score in scores.items()}
