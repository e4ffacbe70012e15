"""Word vectors of a saved flow: what can be had again by its name is named, any other table is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmvae_fast.data.word_vector_files import PACKAGED, read_word_vectors
from lmvae_fast.data.word_vectors import EncoderVectors, TokenEmbeddingVectors, VectorSource, WordVectors
from lmvae_fast.errors import CheckpointError, DataError, MissingPackageError, shown
from lmvae_fast.models.lmvae import LMVAE

VECTORS = "word_vectors.safetensors"


def store_vectors(vectors: VectorSource | None, vae: LMVAE, folder: Path) -> dict[str, Any] | None:
    """What config.json says of word vectors: fingerprint, and ``source``, where they are to be had again.

    A source is a package's name, ``encoder`` or ``decoder`` (the VAE's own), or the file that is written here; None for
    vectors that are neither (another model's), which must be given when the flow is loaded.
    """
    if vectors is None:
        return None
    fingerprint, source = vectors.fingerprint(), None
    if isinstance(vectors, WordVectors):
        if _is_whole_package(vectors):
            source = vectors.source
        else:
            vectors.save(folder / VECTORS)
            source = f"./{VECTORS}"
    else:
        own = _own(vectors.source, vae)
        if own is not None and own.fingerprint() == fingerprint:
            source = vectors.source
    return {"source": source, "fingerprint": fingerprint}


def load_vectors(known: Any, vae: LMVAE, folder: Path, given: VectorSource | None) -> VectorSource | None:
    """The word vectors that :func:`store_vectors` described, or those given in their place.

    Raises CheckpointError where they are none, or others than those described.
    """
    if known is None:
        return given
    described = known if isinstance(known, dict) else {}
    source, fingerprint = described.get("source"), described.get("fingerprint")
    if "source" not in described or not isinstance(source, str | None) or not isinstance(fingerprint, str):
        raise CheckpointError(
            "what config.json says of the flow's word vectors is unreadable", value=shown(known),
            limit="an object with source and fingerprint", remedy="restore config.json from a copy",
        )  # fmt: skip
    vectors = given
    if vectors is None and source is not None:
        vectors = _own(source, vae) or _read(source, folder)
    if vectors is not None and vectors.fingerprint() != fingerprint:
        raise CheckpointError(
            f"the word vectors of {vectors.source} are others than those the flow was fitted on",
            value=vectors.fingerprint()[:16], limit=fingerprint[:16],
            remedy="restore them, or give the very ones as vectors=; define takes vectors of other words",
        )  # fmt: skip
    return vectors


def _is_whole_package(vectors: WordVectors) -> bool:
    """Whether the source's name stands for this table: a part of a package, or one read otherwise, has its name too."""
    if vectors.source not in PACKAGED:
        return False
    try:
        whole = read_word_vectors(vectors.source)
    except (DataError, MissingPackageError):
        return False
    return len(whole) == len(vectors) and whole.fingerprint() == vectors.fingerprint()


def _own(source: str, vae: LMVAE) -> VectorSource | None:
    if source == EncoderVectors.source:
        return EncoderVectors(vae.encoder)
    return TokenEmbeddingVectors(vae.decoder) if source == TokenEmbeddingVectors.source else None


def _read(source: str, folder: Path) -> WordVectors:
    if source not in (*PACKAGED, f"./{VECTORS}"):
        raise CheckpointError(
            "the flow's word vectors are nowhere that we store them", value=source,
            limit=", ".join((*PACKAGED, EncoderVectors.source, TokenEmbeddingVectors.source, f"./{VECTORS}")),
            remedy="restore config.json from a copy, or give vectors=",
        )  # fmt: skip
    try:
        return read_word_vectors(folder / VECTORS if source.startswith("./") else source)
    except DataError as error:
        raise CheckpointError(
            f"the flow's word vectors are missing or unreadable: {error}",
            remedy="restore them from a copy, or give vectors=",
        ) from error
