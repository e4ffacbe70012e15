"""Walking the latent space: interpolation, traversal and arithmetic, each decoded as one batch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.models.lmvae import LMVAE


@dataclass(frozen=True)
class Interpolation:
    """``texts[i]`` is decoded from ``latents[i]`` ``[steps, latent_dim]``, at ``weights[i]`` of the way from a to b."""

    weights: list[float]
    latents: Tensor
    texts: list[str]


@dataclass(frozen=True)
class Traversal:
    """``texts[i][j]`` is decoded from the start with dimension ``dims[i]`` set to ``values[j]``.

    ``latents`` is ``[len(dims), len(values), latent_dim]``.
    """

    dims: list[int]
    values: list[float]
    latents: Tensor
    texts: list[list[str]]


@dataclass(frozen=True)
class Arithmetic:
    """``text`` is decoded from ``latent`` ``[latent_dim]``, the sum of ``terms``: (factor, sentence)."""

    terms: list[tuple[float, str]]
    latent: Tensor
    text: str


def interpolate(
    model: LMVAE, a: str | Tensor, b: str | Tensor, steps: int = 11, *, spherical: bool = False, **options: Any
) -> Interpolation:
    """Decode ``steps`` points on the way from a to b, both ends included.

    Args:
        model: any LMVAE.
        a, b: sentences (their posterior means are used) or latents ``[latent_dim]``.
        steps: points, at least 2.
        spherical: along the great circle (lengths interpolated linearly) instead of the line; for latents drawn from
            the prior, whose line passes through the origin's empty neighbourhood.
        options: fields of GenerationConfig.

    Source: Optimus (arXiv 2004.04092), section 5.3: z = z_a + (z_b - z_a) s / S.
    """
    if steps < 2:
        raise LatentError("an interpolation has two ends", value=f"steps={steps}", limit="at least 2")
    start, end = latent_of(model, a), latent_of(model, b)
    weights = torch.linspace(0.0, 1.0, steps, dtype=start.dtype, device=start.device)
    if spherical:
        latents = _slerp(start, end, weights)
    else:
        latents = start + weights[:, None] * (end - start)
    return Interpolation(weights.tolist(), latents, model.decode(latents, **options))


def traverse(
    model: LMVAE,
    text: str | Tensor,
    dims: Sequence[int] | None = None,
    steps: int = 7,
    *,
    span: float = 3.0,
    **options: Any,
) -> Traversal:
    """Decode one sentence while single dimensions of its latent move over ``[-span, span]``.

    Args:
        model: any LMVAE.
        text: sentence (its posterior mean) or latent ``[latent_dim]``.
        dims: dimensions, each moved alone; default: all.
        steps: values per dimension, evenly spaced.
        span: how far to go, in standard deviations of the prior.
        options: fields of GenerationConfig.
    """
    width = model.config.latent_dim
    dims = list(range(width)) if dims is None else list(dims)
    if not dims or steps < 1:
        raise LatentError("nothing to traverse", value=f"dims={dims}, steps={steps}", limit="a dimension and a step")
    wrong = [dim for dim in dims if not 0 <= dim < width]
    if wrong:
        raise LatentError("no such latent dimension", value=wrong, limit=f"0 to {width - 1}", remedy="change dims")
    start = latent_of(model, text)
    values = torch.linspace(-span, span, steps, dtype=start.dtype, device=start.device)
    latents = start.expand(len(dims), steps, -1).clone()
    for row, dim in enumerate(dims):
        latents[row, :, dim] = values
    texts = model.decode(latents.flatten(0, 1), **options)
    rows = [texts[row * steps : (row + 1) * steps] for row in range(len(dims))]
    return Traversal(dims, values.tolist(), latents, rows)


def arithmetic(model: LMVAE, expression: str, *, sentences: dict[str, str] | None = None, **options: Any) -> Arithmetic:
    """Decode a sum of sentences' posterior means, such as ``"a cat is an animal - cats meow + dogs bark"``.

    Args:
        model: any LMVAE.
        expression: sentences joined by `` + `` and `` - `` (with spaces around, so hyphenated words are safe); a term may
            have a factor in front (``0.5 * a cat``) and quotes around it where it holds an operator itself.
        sentences: names used in the expression and what they stand for.
        options: fields of GenerationConfig.
    """
    terms = parse_terms(expression)
    named = [(factor, (sentences or {}).get(text, text)) for factor, text in terms]
    mu = model.encode([text for _, text in named]).mu
    factors = torch.tensor([factor for factor, _ in named], dtype=mu.dtype, device=mu.device)
    latent = factors @ mu
    return Arithmetic(named, latent, model.decode(latent, **options)[0])


_TERM = re.compile(r"""\s*(?P<sign>[+-](?=\s|["'\d]))?\s*(?:(?P<factor>\d+(?:\.\d+)?)\s*\*\s*)?
    (?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>.+?))\s*(?=\s[+-]\s|$)""", re.X)  # fmt: skip


def parse_terms(expression: str) -> list[tuple[float, str]]:
    """``"a - 2 * b"`` -> ``[(1.0, "a"), (-2.0, "b")]``; raises DataError for what is no sum of sentences."""
    terms, place = [], 0
    while place < len(expression.rstrip()):
        match = _TERM.match(expression, place)
        if match is None:
            break
        text = next(match[name] for name in ("double", "single", "bare") if match[name] is not None).strip()
        if not text or text in "+-" or text.startswith(("+ ", "- ")):
            break
        sign = -1.0 if match["sign"] == "-" else 1.0
        terms.append((sign * float(match["factor"] or 1.0), text))
        place = match.end()
    if not terms or place < len(expression.rstrip()):
        raise DataError(
            "this is no sum of sentences", value=repr(expression), limit="sentence [+|- sentence]...",
            remedy="put spaces around + and -, and quotes around a sentence that holds them",
        )  # fmt: skip
    return terms


def latent_of(model: LMVAE, item: str | Tensor) -> Tensor:
    """The posterior mean ``[latent_dim]`` of a sentence, or the latent itself, checked."""
    if isinstance(item, str):
        return model.encode([item]).mu[0]
    if isinstance(item, Tensor) and item.dim() == 1:
        item = item.unsqueeze(0)
    model.check_latents(item)
    if item.shape[0] != 1:
        raise LatentError("one latent is wanted", value=list(item.shape), limit=f"[{item.shape[1]}]", remedy="pick a row")
    return item[0].to(model.device)


def _slerp(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    lengths = start.norm() + weights * (end.norm() - start.norm())
    a, b = start / start.norm().clamp_min(1e-12), end / end.norm().clamp_min(1e-12)
    angle = torch.acos((a @ b).clamp(-1.0, 1.0))
    if angle < 1e-4 or torch.pi - angle < 1e-4:  # parallel, or opposite, where no great circle is distinguished
        return start + weights[:, None] * (end - start)
    directions = torch.sin((1.0 - weights) * angle)[:, None] * a + torch.sin(weights * angle)[:, None] * b
    return lengths[:, None] * directions / torch.sin(angle)
