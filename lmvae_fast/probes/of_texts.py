"""Probes that decode: reconstruction, draws from the prior, ways between sentences, single dimensions moved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmvae_fast.data import read_word_vectors
from lmvae_fast.data.word_vectors import TokenEmbeddingVectors, VectorSource
from lmvae_fast.errors import DataError, LMVAEError
from lmvae_fast.evaluation.text import token_accuracy
from lmvae_fast.exploration.points import aggregate_quantiles
from lmvae_fast.memory import check_memory
from lmvae_fast.models.posterior import Posterior
from lmvae_fast.probes.encodings import decode
from lmvae_fast.probes.generation_quality import generation_quality
from lmvae_fast.probes.geometry import KnownWords, interpolation_smoothness, line
from lmvae_fast.probes.meanings import meaning
from lmvae_fast.probes.results import Array, Score
from lmvae_fast.probes.sections import Context, Section, Table

_RECONSTRUCTED, _PATHS = 11, 12
_TAIL = 0.05  # of the aggregate posterior, left out at either end of a traversal


def reconstruction(context: Context) -> Section:
    """Sentences encoded and decoded again: how much comes back."""
    rows = context.chosen_rows(context.settings.decoded, _RECONSTRUCTED)
    texts = [context.encodings.texts[row] for row in rows]
    with context.bar("reconstruction", len(rows)) as advance:
        decoded = decode(
            context.model, context.z[rows], _annotations(context, rows), advance, context.settings.batch_size
        )
    found = generation_quality(decoded, texts, paired=True)
    same = np.array([ours.split() == theirs.split() for ours, theirs in zip(decoded, texts, strict=True)], dtype=float)
    scores = {name: found[name] for name in ("bleu", "chrf", "ter")}
    sentences = np.array(scores["bleu"].details["sentences"])
    scores |= {
        "exact_match": Score(float(same.mean()), choices={"sentences": len(rows)}),
        "token_accuracy": Score(token_accuracy(decoded, texts), choices={"sentences": len(rows)}),
        "sentence_bleu": Score(float(sentences.mean()), choices={**scores["bleu"].choices, "mean": "over sentences"}),
    }
    replicates = {
        "exact_match": context.replicates_of_mean(same),
        "sentence_bleu": context.replicates_of_mean(sentences),
    }
    shown = [(text, out, "same" if equal else "") for text, out, equal in zip(texts, decoded, same, strict=True)][:8]
    return Section(scores, {"Sentences": Table(("sentence", "decoded", ""), shown)}, replicates=replicates)


def generation(context: Context) -> Section:
    """Draws from the prior, decoded: how diverse they are, and how far from the sentences as a distribution."""
    settings = context.settings
    rows = context.chosen_rows(settings.decoded, _RECONSTRUCTED)
    source = torch.Generator().manual_seed(settings.seed)
    width = context.encodings.mu.shape[1]
    check_memory(f"{settings.decoded:,} draws from the prior", "lower decoded", settings.decoded * (4 * width + 2048))
    z = torch.randn(settings.decoded, width, generator=source)
    annotations = _annotations(context, np.resize(rows, settings.decoded))
    with context.bar("generation", settings.decoded) as advance:
        drawn = decode(context.model, z, annotations, advance, settings.batch_size)
    texts = [context.encodings.texts[row] for row in rows]
    written = [text for text in drawn if text]
    empty = settings.decoded - len(written)
    with torch.no_grad():
        vectors = context.model.encoder.pool_texts(written, list(map(len, written)), batch_size=settings.batch_size)
    seeds = (settings.seed, settings.seed + 1, settings.seed + 2)
    found = generation_quality(
        written,
        texts,
        embeddings=vectors.double().numpy(),
        reference_embeddings=context.encodings.ceiling()[rows],
        seeds=seeds,
    )
    of_data = generation_quality(texts)
    lines = [
        (meaning("generation", name).title, found[name].value, of_data[name].value if name in of_data else "")
        for name in found
    ]
    tables = {
        "Draws and data": Table(("figure", "draws from the prior", "sentences of the data"), lines),
        "Draws": Table(("decoded draw from the prior",), [(text,) for text in drawn[:8]]),
    }
    notes = [f"{empty} of {settings.decoded} draws are empty and left out."] if empty else []
    return Section(found, tables, notes=notes)


def interpolation(context: Context) -> Section:
    """The line between the latents of two sentences, decoded: how direct it reads."""
    settings = context.settings
    source = np.random.default_rng([settings.seed, _PATHS])
    ends = np.stack([source.choice(len(context.z), size=2, replace=False) for _ in range(settings.paths)])
    points = line(context.z[ends[:, 0]], context.z[ends[:, 1]], settings.points)
    annotations = context.encodings.annotations
    between = None
    if context.model.config.conditional_decoder and annotations is not None:
        labels = line(annotations[ends[:, 0]], annotations[ends[:, 1]], settings.points)
        between = torch.from_numpy(labels.reshape(-1, labels.shape[-1])).float()
    with context.bar("interpolation", settings.paths * settings.points) as advance:
        flat = decode(context.model, points.reshape(-1, points.shape[-1]), between, advance, settings.batch_size)
    paths = [
        [flat[point * settings.paths + path] for point in range(settings.points)] for path in range(settings.paths)
    ]
    known = KnownWords(word_vectors(context.model, settings.vectors), unit=True)
    known.learn(word for path in paths for text in path for word in text.lower().split())
    smooth: list[float] = []
    left_out: dict[str, str] = {}
    steps: dict[str, Any] = {}
    for number, path in enumerate(paths):
        try:
            found = interpolation_smoothness(path, known)
            smooth.append(found.value)
            steps = dict(found.choices)
        except LMVAEError as error:
            smooth.append(float("nan"))
            left_out[f"path {number}"] = error.problem
    values = np.array(smooth)
    if np.isnan(values).all():
        raise DataError(
            "no path has words at both ends", value=f"{len(paths)} paths", remedy="take other word vectors (vectors=)"
        )
    finite = values[np.isfinite(values)]
    spread = float(finite.std(ddof=1)) if len(finite) > 1 else None
    score = Score(
        float(finite.mean()),
        choices={**steps, "paths": settings.paths, "spread": "over paths"},
        seed=settings.seed,
        spread=spread,
        details={"paths": values, "vectors": known.source.fingerprint()},
    )
    tables = {}
    for number in range(min(3, len(paths))):
        rows = [(f"{point / (settings.points - 1):.1f}", text) for point, text in enumerate(paths[number])]
        title = f"Path {number + 1}" + ("" if np.isnan(values[number]) else f", smoothness {values[number]:.2f}")
        tables[title] = Table(("way", "decoded"), rows)
    return Section(
        {"smoothness": score},
        tables,
        {"smoothness": finite},
        {"smoothness": context.replicates_of_mean(values)},
        left_out,
    )


def traversal(context: Context) -> Section:
    """One sentence decoded while single dimensions go over the quantiles of the aggregate posterior."""
    settings = context.settings
    encodings = context.encodings
    std = encodings.mu.double().std(dim=0)
    dims = sorted(std.argsort(descending=True)[: settings.traversed].tolist())
    probabilities = np.linspace(_TAIL, 1.0 - _TAIL, settings.steps).tolist() if settings.steps > 1 else [0.5]
    values = aggregate_quantiles(Posterior(encodings.mu, encodings.logvar), probabilities, dims)
    row = int(context.chosen_rows(1, _PATHS)[0])
    latents = np.tile(context.z[row], (len(dims), settings.steps, 1))
    for place, dim in enumerate(dims):
        latents[place, :, dim] = values[place].numpy()
    annotations = _annotations(context, np.full(len(dims) * settings.steps, row))
    with context.bar("traversal", len(dims) * settings.steps) as advance:
        flat = decode(context.model, latents.reshape(-1, latents.shape[-1]), annotations, advance, settings.batch_size)
    texts = [flat[place * settings.steps : (place + 1) * settings.steps] for place in range(len(dims))]
    changed = [len(set(row_texts)) for row_texts in texts]
    lines = [(f"z[{dim}]", *row_texts) for dim, row_texts in zip(dims, texts, strict=True)]
    note = f"“{encodings.texts[row]}”; dimensions whose means vary most, over quantiles of the aggregate posterior."
    table = Table(("dimension", *(f"{p:.0%}" for p in probabilities)), lines, note)
    score = Score(
        float(np.mean(changed) / settings.steps), choices={"dimensions": dims, "steps": settings.steps, "row": row}
    )
    return Section({"texts_that_differ": score}, {"Traversal": table})


def word_vectors(model: Any, choice: str) -> VectorSource:
    """Word vectors by name: ``encoder`` and ``decoder``, a model's own tables of token embeddings; else a table's name."""
    if choice == "decoder":
        return TokenEmbeddingVectors(model.decoder)
    if choice != "encoder":
        return read_word_vectors(choice)
    tokenizer = model.encoder.tokenizer

    def pieces(words: list[str]) -> list[list[int]]:
        return [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]

    source = TokenEmbeddingVectors(SimpleNamespace(model=model.encoder.model, tokenizer=SimpleNamespace(encode=pieces)))
    source.source = "the encoder's token embeddings"
    return source


def _annotations(context: Context, rows: Array) -> Tensor | None:
    annotations = context.encodings.annotations
    return None if annotations is None else annotations[torch.from_numpy(np.asarray(rows))]
