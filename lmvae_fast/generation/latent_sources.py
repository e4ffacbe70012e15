"""Where the latents of a long run come from: a file, the prior, sentences; and what goes with each of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmvae_fast.data.lines import decoded_lines, open_file
from lmvae_fast.documents import check_regular, parse_json
from lmvae_fast.errors import ConfigError, DataError, LatentError
from lmvae_fast.files import sha256_file
from lmvae_fast.generation.latent_files import check_latents, read_latents
from lmvae_fast.kernels import philox
from lmvae_fast.memory import check_memory
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.text.tokenizer import label_features

# Latents of the prior and the tokens drawn from them go by one seed and must not share words of its stream.
_PRIOR_STREAM = 0x0F1A_7E57


@dataclass(frozen=True)
class LatentSource:
    """Latents that are read a block at a time.

    ``total``: how many; ``identity``: what they are (a content hash, say), which a file decoded from them is kept with;
    ``read(block, skip)``: the latents behind the first ``skip``, in blocks ``[block, latent_dim]``; ``annotations``: pooled
    labels ``[total, labels]`` where they are known; ``prompts``: those that were encoded with them, one each, or None.
    """

    total: int
    identity: str
    read: Callable[[int, int], Iterable[Tensor]]
    annotations: Tensor | None = None
    prompts: list[str] | None = None


def latents_of_file(path: str | os.PathLike[str], latent_dim: int) -> LatentSource:
    """The rows of a latent file, all of them checked; raises what :func:`check_latents` raises."""

    def read(block: int, skip: int) -> Iterable[Tensor]:
        return read_latents(path, latent_dim=latent_dim, block=block, skip=skip)

    return LatentSource(check_latents(path, latent_dim=latent_dim), file_hash(path), read)


def latents_of_prior(count: int, latent_dim: int, seed: int) -> LatentSource:
    """``count`` standard normal latents; the r-th depends on the seed and r only, whatever the blocks.

    Raises ConfigError for fewer than one.
    """
    if not 1 <= count <= 2**53:
        raise ConfigError("the prior is asked for at least one latent", value=count, limit="1 to 2^53")
    key = philox.seed_tensor(seed ^ _PRIOR_STREAM, "cpu")

    def read(block: int, skip: int) -> Iterable[Tensor]:
        for start in range(skip, count, block):
            size = min(block, count - start)
            check_memory(f"a block of {size:,} latents", "lower batch_size", size * (8 + 16 * latent_dim))
            rows = torch.arange(start, start + size)
            yield philox.normal(key, (len(rows), latent_dim), which=rows)

    return LatentSource(count, f"prior seed={seed}", read)


def latents_of_zero(count: int, latent_dim: int) -> LatentSource:
    """``count`` latents at the prior's mean; of a decoder without a latent, what stands for one.

    Raises ConfigError for fewer than one.
    """
    if count < 1:
        raise ConfigError("at least one latent is asked for", value=count, limit=">= 1")

    def read(block: int, skip: int) -> Iterable[Tensor]:
        for start in range(skip, count, block):
            size = min(block, count - start)
            check_memory(f"a block of {size:,} latents", "lower batch_size", 4 * size * latent_dim)
            yield torch.zeros(size, latent_dim)

    return LatentSource(count, "zero", read)


def latents_of_texts(model: LMVAE, path: str | os.PathLike[str], *, layout: str | None = None) -> LatentSource:
    """Posterior means of a file's sentences, encoded as they are read; with their labels if the model was given labels. Of a
    model of prompts: of prompts with responses (``layout``: see ``read_prompts`` of the data), together with the prompts."""
    from lmvae_fast.data import read as read_sentences
    from lmvae_fast.data import read_prompts as read_pairs

    if model.config.prompted:
        pairs = read_pairs(path, layout=layout)

        def read_posteriors(block: int, skip: int) -> Iterable[Tensor]:
            for start in range(skip, len(pairs), block):
                yield model.encode(pairs[start : start + block]).mu.cpu()

        return LatentSource(
            len(pairs), file_hash(path), read_posteriors, prompts=[pairs.prompts[row] for row in pairs.prompt_rows]
        )
    examples = read_sentences(path)
    annotations = model.tokenize(examples, on_empty="error").annotations

    def read(block: int, skip: int) -> Iterable[Tensor]:
        for start in range(skip, len(examples), block):
            yield model.encode(examples[start : start + block]).mu.cpu()

    known = annotations if model.config.conditional_decoder else None
    return LatentSource(len(examples), file_hash(path), read, known)


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """One prompt per latent: the lines of a ``.txt`` (an empty one is no prompt), or of a ``.jsonl`` of strings or
    ``{"prompt": "..."}``.

    Raises DataError for a file that is missing, empty or of another kind, with the line.
    """
    prompts = []
    for number, line in _lines(path, (".txt", ".jsonl")):
        if Path(path).suffix == ".jsonl":
            value = parse_json(line, f"{path} line {number} is no prompt", limit_text='{"prompt": "..."}')
            value = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(value, str):
                raise DataError(f"{path} line {number} is no prompt", value=repr(value)[:60], limit='{"prompt": "..."}')
            line = value
        prompts.append(line)
    return prompts


def read_annotations(path: str | os.PathLike[str], labels: Sequence[str], max_len: int) -> Tensor:
    """What conditions each latent's sentence, float32 ``[N, labels]``.

    From the lines of a ``.txt``, one label per word of the sentence, pooled as in training; or rows of pooled labels in a
    file that :func:`read_latents` reads (tensor or field ``annotations``).

    Raises:
        DataError: missing, empty or unreadable file, an unknown label.
        LatentError: rows of another width, NaN or Inf; a model without labels.
    """
    if not labels:
        raise LatentError("this model is conditioned on no labels", value=path, remedy="leave annotations out")
    if Path(path).suffix != ".txt":
        check_latents(path, latent_dim=len(labels), name="annotations")
        return torch.cat(list(read_latents(path, latent_dim=len(labels), name="annotations")))
    return torch.stack(
        [label_features(line.split(), labels, max_len, number - 1) for number, line in _lines(path, (".txt",))]
    )


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal; DataError when it cannot be read."""
    try:
        return sha256_file(check_regular(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", remedy="check the path") from error


def _lines(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> list[tuple[int, str]]:
    """Lines of a text file with their numbers from 1, without line ends."""
    if Path(path).suffix not in suffixes:
        raise DataError(f"{path} is of an unknown format", value=Path(path).suffix, limit=", ".join(suffixes))
    path = check_regular(path)
    with open_file(path) as file:
        lines = list(decoded_lines(file, path))
    if not any(text.strip() for _, text in lines):
        raise DataError(f"{path} is empty", value=f"{len(lines)} lines", remedy="check what wrote it")
    return lines
