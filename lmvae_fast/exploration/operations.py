"""Latent operations: interpolation, traversal, arithmetic, neighbourhoods and averages, each decoded as one batch.

Where a decoder is conditional, its pooled labels go along: they are interpolated and averaged like latents, kept in a
traversal and a neighbourhood, and a sum has those of its first term. ``annotations`` (``[labels]``) replaces them. Of a
model of prompts, items are prompts with responses, or latents; what is decoded answers their prompt, or the ``prompts`` given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.exploration.points import Item, aggregate_quantiles, asked, check_room, locate, slerp
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.posterior import Posterior


@dataclass(frozen=True)
class Interpolation:
    """Texts between two sentences: ``texts[i]`` is decoded from ``latents[i]``, at ``weights[i]`` of the way from a to b.

    ``latents`` is ``[steps, latent_dim]``.
    """

    weights: list[float]
    latents: Tensor
    texts: list[str]


@dataclass(frozen=True)
class Traversal:
    """Texts along dimensions: ``texts[i][j]`` is decoded from the start with dimension ``dims[i]`` set to ``values[i][j]``.

    ``latents`` is ``[len(dims), steps, latent_dim]``; ``probabilities`` those of the quantiles that the values are, or None
    where they are evenly spaced; ``start`` is the text of the latent that is moved.
    """

    dims: list[int]
    values: list[list[float]]
    latents: Tensor
    texts: list[list[str]]
    start: str
    probabilities: list[float] | None = None


@dataclass(frozen=True)
class Arithmetic:
    """Text of a sum: ``text`` is decoded from ``latent`` ``[latent_dim]``, the sum of ``terms``: (factor, sentence).

    ``latents`` ``[terms, latent_dim]`` are the sentences' own.
    """

    terms: list[tuple[float, str]]
    latents: Tensor
    latent: Tensor
    text: str


@dataclass(frozen=True)
class Neighbourhood:
    """Texts around a sentence: ``texts[i]`` is decoded from ``latents[i]``, drawn around ``center``.

    ``latents`` is ``[samples, latent_dim]``, ``center`` ``[latent_dim]``; ``text`` is that of the center; ``distances[i]`` is
    Euclidean. Nearest first.
    """

    center: Tensor
    text: str
    latents: Tensor
    distances: list[float]
    texts: list[str]


@dataclass(frozen=True)
class Average:
    """Text of a mean: ``text`` is decoded from ``latent`` ``[latent_dim]``, the mean of ``latents`` ``[N, latent_dim]``.

    ``texts[i]`` is decoded from ``latents[i]``; ``distances[i]`` is its distance to the mean.
    """

    latents: Tensor
    texts: list[str]
    distances: list[float]
    latent: Tensor
    text: str


def interpolate(
    model: LMVAE,
    a: Item,
    b: Item,
    steps: int = 11,
    *,
    spherical: bool = False,
    annotations: Tensor | None = None,
    **options: Any,
) -> Interpolation:
    """Decode ``steps`` points on the way from a to b, both ends included.

    Args:
        model: any LMVAE.
        a, b: sentences (their posterior means are used) or latents ``[latent_dim]``.
        steps: points, at least 2.
        spherical: along the great circle (lengths interpolated linearly) instead of the line; for latents drawn from
            the prior, whose line passes through the origin's empty neighbourhood.
        annotations: pooled labels of a conditional decoder.
        options: fields of GenerationConfig.

    Raises LatentError for fewer steps, and with DataError for ends that do not fit the model.

    Source: Optimus (arXiv 2004.04092), section 5.3: z = z_a + (z_b - z_a) s / S.
    """
    if steps < 2:
        raise LatentError("an interpolation has two ends", value=f"steps={steps}", limit="at least 2")
    check_room(model, steps)
    ends = locate(model, [a, b], annotations)
    weights = torch.linspace(0.0, 1.0, steps, dtype=ends.z.dtype, device=ends.z.device)
    start, end = ends.z.unbind(0)
    latents = slerp(start, end, weights) if spherical else torch.lerp(start, end, weights[:, None])
    labels = None if ends.labels is None else torch.lerp(ends.labels[0], ends.labels[1], weights[:, None])
    return Interpolation(
        weights.tolist(), latents, model.decode(latents, annotations=labels, **asked(model, [a, b], options))
    )


def traverse(
    model: LMVAE,
    text: Item,
    dims: Sequence[int] | None = None,
    steps: int = 7,
    *,
    span: float = 3.0,
    aggregate: Posterior | Tensor | None = None,
    tail: float = 0.05,
    annotations: Tensor | None = None,
    **options: Any,
) -> Traversal:
    """Decode one sentence while single dimensions of its latent move.

    Args:
        model: any LMVAE.
        text: sentence (its posterior mean) or latent ``[latent_dim]``.
        dims: dimensions, each moved alone; default: all.
        steps: values per dimension.
        span: how far to go, in standard deviations of the prior: evenly spaced over ``[-span, span]``.
        aggregate: go over quantiles of this aggregate posterior instead, each dimension over its own: the posterior of
            sentences (``model.encode(texts)``), or latents ``[N, latent_dim]``.
        tail: the probability left out at either end then; ``steps`` probabilities are evenly spaced between.
        annotations: pooled labels of a conditional decoder.
        options: fields of GenerationConfig.

    Raises LatentError for dimensions that do not exist, no steps, an aggregate of another width, and a tail outside
    (0, 0.5); DataError for a sentence that does not fit the model.
    """
    width = model.config.latent_dim
    dims = list(range(width)) if dims is None else list(dims)
    if not dims or steps < 1:
        raise LatentError("nothing to traverse", value=f"dims={dims}, steps={steps}", limit="a dimension and a step")
    wrong = [dim for dim in dims if not 0 <= dim < width]
    if wrong:
        raise LatentError("no such latent dimension", value=wrong, limit=f"0 to {width - 1}", remedy="change dims")
    check_room(model, len(dims) * steps)
    probabilities = None
    if aggregate is None:
        values = torch.linspace(-span, span, steps, dtype=torch.float64).expand(len(dims), steps)
    else:
        model.check_latents(aggregate.mu if isinstance(aggregate, Posterior) else aggregate)
        if not 0.0 < tail < 0.5:
            raise LatentError("a tail is left out at either end", value=f"tail={tail}", limit="within (0, 0.5)")
        probabilities = torch.linspace(tail, 1.0 - tail, steps, dtype=torch.float64).tolist() if steps > 1 else [0.5]
        values = aggregate_quantiles(aggregate, probabilities, dims)
    start = locate(model, [text], annotations)
    latents = start.z[0].expand(len(dims), steps, -1).clone()
    for row, dim in enumerate(dims):
        latents[row, :, dim] = values[row].to(latents)
    everything = torch.cat([start.z, latents.flatten(0, 1)])
    labels = None if start.labels is None else start.labels.expand(len(everything), -1)
    first, *texts = model.decode(everything, annotations=labels, **asked(model, [text], options))
    rows = [texts[row * steps : (row + 1) * steps] for row in range(len(dims))]
    return Traversal(dims, values.tolist(), latents, rows, first, probabilities)


def arithmetic(
    model: LMVAE,
    expression: str,
    *,
    sentences: Mapping[str, Item] | None = None,
    annotations: Tensor | None = None,
    **options: Any,
) -> Arithmetic:
    """Decode a sum of sentences' posterior means, such as ``"a cat is an animal - cats meow + dogs bark"``.

    Args:
        model: any LMVAE.
        expression: sentences joined by `` + `` and `` - `` (with spaces around, so hyphenated words are safe); a term may
            have a factor in front (``0.5 * a cat``) and quotes around it where it holds an operator itself.
        sentences: names used in the expression and what they stand for: sentences or latents.
        annotations: pooled labels of a conditional decoder; default: those of the first term.
        options: fields of GenerationConfig.

    Raises DataError for what is no sum of sentences; LatentError and DataError for terms that do not fit the model.
    """
    terms = parse_terms(expression)
    items = [(sentences or {}).get(text, text) for _, text in terms]
    points = locate(model, items, annotations)
    factors = torch.tensor([factor for factor, _ in terms], dtype=points.z.dtype, device=points.z.device)
    latent = factors @ points.z
    labels = None if points.labels is None else points.labels[:1]
    names = [text if isinstance(item, Tensor) else _text(item) for (_, text), item in zip(terms, items, strict=True)]
    named = [(factor, name) for (factor, _), name in zip(terms, names, strict=True)]
    decoded = model.decode(latent, annotations=labels, **asked(model, items, options))
    return Arithmetic(named, points.z, latent, decoded[0])


def neighbourhood(
    model: LMVAE,
    text: Item,
    samples: int = 16,
    *,
    scale: float | None = None,
    noise_seed: int | None = None,
    annotations: Tensor | None = None,
    **options: Any,
) -> Neighbourhood:
    """Decode latents drawn around a sentence.

    Args:
        model: any LMVAE.
        text: sentence, or latent ``[latent_dim]`` (with a ``scale``).
        samples: how many, at least 1.
        scale: standard deviation of the draws in every dimension, in those of the prior; None draws from the sentence's
            posterior.
        noise_seed: of the draws; None takes it from torch's generator. (``seed`` among the options is that of tokens.)
        annotations: pooled labels of a conditional decoder.
        options: fields of GenerationConfig.

    Raises LatentError for no samples, a scale that is not positive, or a latent without one; DataError for a sentence
    that does not fit the model.
    """
    if samples < 1:
        raise LatentError("a neighbourhood has neighbours", value=f"samples={samples}", limit="at least 1")
    if scale is not None and not (scale > 0.0 and math.isfinite(scale)):
        raise LatentError("a scale is a standard deviation", value=f"scale={scale}", limit="> 0")
    check_room(model, samples)
    point = locate(model, [text], annotations)
    if scale is not None:
        spread = Posterior(point.z, torch.full_like(point.z, 2.0 * math.log(scale)))
    elif point.posterior is not None:
        spread = point.posterior
    else:
        raise LatentError("a latent has no posterior to draw from", value="scale=None", remedy="give a scale")
    drawn = Posterior(spread.mu.expand(samples, -1), spread.logvar.expand(samples, -1)).sample(seed=noise_seed)
    distances = (drawn - point.z).norm(dim=1)
    order = distances.argsort()
    latents = drawn[order]
    everything = torch.cat([point.z, latents])
    labels = None if point.labels is None else point.labels.expand(len(everything), -1)
    center, *texts = model.decode(everything, annotations=labels, **asked(model, [text], options))
    return Neighbourhood(point.z[0], center, latents, distances[order].tolist(), texts)


def average(
    model: LMVAE,
    items: Sequence[Item],
    weights: Sequence[float] | None = None,
    *,
    annotations: Tensor | None = None,
    **options: Any,
) -> Average:
    """Decode the mean of sentences' latents, and each of them.

    Args:
        model: any LMVAE.
        items: sentences (their posterior means) or latents ``[latent_dim]``, at least one.
        weights: of the mean, as many as items, none negative, of a sum above 0; default: equal.
        annotations: pooled labels of a conditional decoder.
        options: fields of GenerationConfig.

    Raises LatentError for no items or weights that do not fit; LatentError and DataError for items that do not.
    """
    shares = [1.0] * len(items) if weights is None else [float(weight) for weight in weights]
    if (
        isinstance(items, (str, Tensor))
        or len(shares) != len(items)
        or not all(w >= 0.0 for w in shares)
        or not sum(shares)
    ):
        raise LatentError(
            "an average is over items, each with a weight", value=f"{len(items)} items, weights {weights}",
            limit="as many weights, none negative, of a sum above 0", remedy="give a list of sentences",
        )  # fmt: skip
    points = locate(model, items, annotations)
    mean = torch.tensor(shares, dtype=points.z.dtype, device=points.z.device) / sum(shares)
    latent = mean @ points.z
    labels = None if points.labels is None else torch.cat([(mean @ points.labels)[None], points.labels])
    text, *texts = model.decode(torch.cat([latent[None], points.z]), annotations=labels, **asked(model, items, options))
    return Average(points.z, texts, (points.z - latent).norm(dim=1).tolist(), latent, text)


def _text(item: Any) -> str:
    return item if isinstance(item, str) else getattr(item, "response", None) or item.text


_HEAD = re.compile(r"""\s*(?P<sign>[+-](?=[\s"'\d]))?\s*(?:(?P<factor>\d+(?:\.\d+)?)\s*\*\s*)?""")
_OPERATOR = re.compile(r"\s[+-]\s")
_END = re.compile(r"\s*(?=\s[+-]\s|$)")


def parse_terms(expression: str) -> list[tuple[float, str]]:
    """Terms of a sum: ``"a - 2 * b"`` -> ``[(1.0, "a"), (-2.0, "b")]``; raises DataError for what is no sum of sentences.

    In time linear in the expression's length, whatever is in it.
    """
    terms, place, length = [], 0, len(expression.rstrip())
    while place < length:
        head = _HEAD.match(expression, place)
        assert head is not None  # all of it is optional
        text, end = _quoted(expression, head.end()) or _bare(expression, head.end())
        text = text.strip()
        if not text or "\n" in text or text in "+-" or text.startswith(("+ ", "- ")):
            break
        sign = -1.0 if head["sign"] == "-" else 1.0
        terms.append((sign * float(head["factor"] or 1.0), text))
        place = end
    if not terms or place < length:
        raise DataError(
            "this is no sum of sentences", value=repr(expression), limit="sentence [+|- sentence]...",
            remedy="put spaces around + and -, and quotes around a sentence that holds them",
        )  # fmt: skip
    return terms


def _quoted(text: str, start: int) -> tuple[str, int] | None:
    """What stands in quotes from a place on, and where it ends, where an operator or nothing follows the closing quote."""
    close = text.find(text[start], start + 1) if text[start : start + 1] in ('"', "'") else -1
    after = _END.match(text, close + 1) if close >= 0 else None
    return None if after is None else (text[start + 1 : close], after.end())


def _bare(text: str, start: int) -> tuple[str, int]:
    """What stands from a place on up to the next operator, and where that begins."""
    found = _OPERATOR.search(text, start + 1)
    end = len(text) if found is None else found.start()
    return text[start:end], end
