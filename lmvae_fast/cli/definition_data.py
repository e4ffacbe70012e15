"""What the commands on definitions read: the definitions in their parts, and the word vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmvae_fast.cli.common import column_name
from lmvae_fast.documents import read_object
from lmvae_fast.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from lmvae_fast.data import DefinitionDataset
    from lmvae_fast.data.word_vectors import VectorSource
    from lmvae_fast.models.lmvae import LMVAE

#: What `fit-flow` writes into its folder beside `flow/`, so that `eval --definitions` finds the same parts.
FIT = "fit.json"

_FIELDS = {"data": dict, "shares": str, "seed": int, "definitions": str}


def read_fit(folder: Path) -> dict[str, Any] | None:
    """What a folder of ``fit-flow`` says of its definitions, None of another folder; CheckpointError where that is damaged."""
    if not (folder / FIT).is_file():
        return None
    known = read_object(folder / FIT, error=CheckpointError)
    wanted = (
        {**_FIELDS, "valid": str} if isinstance(known.get("data"), dict) and known["data"].get("eval_path") else _FIELDS
    )
    wrong = [name for name, kind in wanted.items() if not isinstance(known.get(name), kind)]
    if wrong:
        raise CheckpointError(
            f"{folder / FIT} is damaged",
            value=", ".join(wrong),
            limit=", ".join(wanted),
            remedy="restore it from a copy",
        )
    return known


def read_data(options: dict[str, Any]) -> DefinitionDataset:
    """Definitions by the ``data`` section."""
    from lmvae_fast.data import read_definitions

    known = {
        "path", "eval_path", "vectors", "field", "limit", "word_column", "gloss_column", "pos_column", "format", "header",
        "quoting", "on_empty",
    }  # fmt: skip
    unknown = set(options) - known
    if unknown:
        raise ConfigError("unknown field(s) in section data", value=sorted(unknown), limit=", ".join(sorted(known)))
    if not options.get("path"):
        raise ConfigError("no definitions", remedy="give --data FILE")
    others = ("path", "eval_path", "vectors", "field")
    reading = {name: value for name, value in options.items() if value is not None and name not in others}
    for name in ("word_column", "gloss_column", "pos_column"):
        if name in reading:
            reading[name] = column_name(reading[name])
    return read_definitions(options["path"], **reading)


def read_parts(options: dict[str, Any], shares: str, seed: int, whole: bool) -> dict[str, DefinitionDataset]:
    """The parts by name: ``all``, ``train``, and ``valid`` and ``test`` where there are such.

    Definitions that come in parts (``eval_path``) stay as they are, and so do those that are all fitted to.
    """
    definitions = read_data(options)
    if options.get("eval_path"):
        valid = read_data({**options, "path": options["eval_path"]})
        return {"all": definitions, "train": definitions, "valid": valid}
    if whole:
        return {"all": definitions, "train": definitions}
    if not definitions.words_known:
        raise DataError(
            "the words of these definitions are hidden, so a split could not keep a word's glosses together",
            value=options["path"], remedy="name the file's own validation part with --valid, or fit to all with --all",
        )  # fmt: skip
    return split(definitions, shares, seed)


def known_part(definitions: DefinitionDataset, known: dict[str, Any], part: str) -> DefinitionDataset:
    """A part of the definitions that a flow was fitted to, as ``fit-flow`` parted them; DataError for other definitions."""
    in_parts = bool(known["data"].get("eval_path"))
    wanted = known["valid"] if in_parts and part == "valid" else known["definitions"]
    if definitions.fingerprint() != wanted:
        raise DataError(
            "these are not the definitions that the flow was fitted to, so their parts would be others",
            value=definitions.fingerprint()[:16], limit=wanted[:16],
            remedy="give the same file, or --part all for definitions of another",
        )  # fmt: skip
    if in_parts:
        return definitions
    if not definitions.words_known:
        raise ConfigError(
            "the definitions that this flow was fitted to were not parted: their words are hidden", value=f"--part {part}",
            remedy="use --part all, for those of another file too",
        )  # fmt: skip
    return split(definitions, known["shares"], known["seed"])[part]


def split(definitions: DefinitionDataset, shares: str, seed: int) -> dict[str, DefinitionDataset]:
    """The parts train, valid and test, and all of them."""
    try:
        numbers = [float(share) for share in shares.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 3:
        raise ConfigError("--shares wants three numbers", value=shares, limit="such as 0.8,0.1,0.1", remedy="change it")
    train, valid, test = definitions.split(numbers, seed=seed)
    return {"train": train, "valid": valid, "test": test, "all": definitions}


def read_vectors(options: dict[str, Any], vae: LMVAE) -> VectorSource:
    """The word vectors by the ``data`` section; of both files where definitions come in parts with their vectors."""
    found: Any = vector_source(options.get("vectors") or "glove", vae, options.get("field"))
    if options.get("eval_path") and vectors_are_the_definitions(options):
        found = found.joined(vector_source(options["eval_path"], vae, options.get("field")))
    return found


def vectors_are_the_definitions(options: dict[str, Any]) -> bool:
    """Whether the file of definitions is that of the word vectors, too."""
    path, vectors = (str(options.get(name) or "") for name in ("path", "vectors"))
    return Path(path).is_file() and Path(path).resolve() == Path(vectors).resolve()


def vector_source(name: str, vae: LMVAE, field: str | None) -> VectorSource:
    """Word vectors by name: the model's own, a package's, or a file's."""
    from lmvae_fast.data import EncoderVectors, TokenEmbeddingVectors, read_word_vectors

    if name == "encoder":
        return EncoderVectors(vae.encoder)
    if name == "decoder":
        return TokenEmbeddingVectors(vae.decoder)
    return read_word_vectors(name, field=field)
