"""Texts against references by contextual embeddings: BERTScore and MoverScore, with a model from a local folder."""

from __future__ import annotations

import string
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmvae_fast.errors import ConfigError, DataError, NumericalError
from lmvae_fast.probes import checks
from lmvae_fast.probes.geometry.transport import transport_cost
from lmvae_fast.probes.optional import require
from lmvae_fast.probes.results import Array, Score
from lmvae_fast.probes.text.overlap import equally_many

_SCORES = ("inverse", "one_minus")


def bert_score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    model: str | Path,
    *,
    layer: int,
    idf: bool = False,
    batch_size: int = 64,
) -> Score:
    """BERTScore F1: words matched greedily by the cosine of their contextual embeddings; no rescaling. At most 1.

    Args:
        hypotheses, references: equally many texts.
        model: folder (or hub name) of a masked language model. Figures of different models or layers do not compare; the
            published ones use roberta-large, layer 17.
        layer: whose hidden states are compared, from 1.
        idf: weigh words by their inverse document frequency in the references.
        batch_size: texts per pass.

    Returns:
        The mean F1; ``details`` has ``precision``, ``recall``, ``f1`` of each pair. With ``idf``, a pair with a text of
        which no word has weight (each stands in every reference) scores NaN and is named. A pair with an empty text scores 0.

    Raises:
        DataError: no pair has words with weight, as with one reference. NumericalError: the model gives NaN.

    Source: Zhang et al. 2020 (arXiv 1904.09675), by the package bert-score.
    """
    equally_many(hypotheses, references)
    checks.whole("layer", layer, 1)
    library = require("bert_score", "BERTScore", "metrics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, f1 = library.score(
            list(hypotheses), list(references), model_type=str(model), num_layers=layer, idf=idf, batch_size=batch_size,
            rescale_with_baseline=False,
            nthreads=0,  # it would fork, and the copy of a process with threads may wait for ever for a lock
        )  # fmt: skip
    weightless = (precision.isnan() | recall.isnan()).numpy()  # 0 / 0, for which the library's F1 is 0
    if weightless.any() and not idf:
        raise NumericalError(
            "the model gives NaN for a pair of texts", value=f"pair {int(weightless.argmax())}, model {model}",
            remedy="use a model whose weights are finite",
        )  # fmt: skip
    if weightless.all():
        raise DataError(
            "no pair of texts has words with weight", value=f"{len(weightless)} pairs",
            remedy="use idf=False: a word that stands in every reference has no inverse document frequency",
        )  # fmt: skip
    details = {name: part.double().numpy() for name, part in (("precision", precision), ("recall", recall), ("f1", f1))}
    details["f1"][weightless] = float("nan")
    empty = {int(place): "no word has weight" for place in np.flatnonzero(weightless)}
    return Score(
        float(np.nanmean(details["f1"])),
        left_out={"pairs": empty} if empty else {},
        choices={"model": Path(model).name, "layer": layer, "idf": idf, "library": f"bert-score {library.__version__}"},
        details=details,
    )


def mover_score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    model: Any,
    tokenizer: Any = None,
    *,
    stop_words: Collection[str] = (),
    score: str = "inverse",
    batch_size: int = 64,
) -> Score:
    """MoverScore (version 2, single tokens, every idf 1): the word mover's distance of contextual embeddings, as a score.

    Tokens are those of the model with its first and last special token; pieces after a word's first, punctuation and stop
    words have no weight. Vectors are the last layer's, at length one; costs are Euclidean.

    Args:
        hypotheses, references: equally many texts.
        model: a Hugging Face encoder, or its folder (or hub name).
        tokenizer: of the model; None loads it from the folder.
        stop_words: tokens without weight.
        score: ``"inverse"`` gives 1 / (1 + distance), as the current public code; ``"one_minus"`` 1 - distance.
        batch_size: texts per pass.

    Returns:
        The mean over pairs; ``details["pairs"]``. A text in which no token has weight scores NaN and is named.

    Source: Zhao et al. 2019 (arXiv 1909.02622).
    """
    equally_many(hypotheses, references)
    checks.one_of("score", score, _SCORES)
    name = Path(model).name if isinstance(model, (str, Path)) else getattr(model.config, "name_or_path", "") or "given"
    model, tokenizer = _loaded(model, tokenizer)
    both = [*hypotheses, *references]
    clouds: list[Array] = []
    for start in range(0, len(both), batch_size):
        clouds += _weighted_vectors(model, tokenizer, both[start : start + batch_size], set(stop_words))
    ours, theirs = clouds[: len(hypotheses)], clouds[len(hypotheses) :]
    pairs, empty = [], {}
    for place, (first, second) in enumerate(zip(ours, theirs, strict=True)):
        if not len(first) or not len(second):
            empty[place] = "no token has weight"
            pairs.append(float("nan"))
            continue
        distance = transport_cost(second, first)
        pairs.append(1.0 / (1.0 + distance) if score == "inverse" else 1.0 - distance)
    if len(empty) == len(pairs):
        raise DataError("no pair of texts has tokens with weight", value=len(pairs), remedy="use fewer stop words")
    return Score(
        float(np.nanmean(pairs)),
        left_out={"pairs": empty} if empty else {},
        choices={"model": name, "layer": "last", "idf": "1", "score": score, "stop_words": len(set(stop_words))},
        details={"pairs": pairs},
    )


def _weighted_vectors(model: Any, tokenizer: Any, batch: Sequence[str], stop_words: set[str]) -> list[Array]:
    """Unit vectors ``[tokens, D]`` of the tokens that have weight, of each text."""
    import torch

    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
    coded = tokenizer(list(batch), padding=True, truncation=True, max_length=limit, return_tensors="pt")
    coded = {key: value.to(model.device) for key, value in coded.items()}
    with torch.inference_mode():
        hidden = model(**coded).last_hidden_state.double().cpu()
    hidden = hidden / (hidden.norm(dim=-1, keepdim=True) + 1e-30)
    weightless = stop_words | set(string.punctuation)
    found = []
    for row, (ids, mask) in enumerate(zip(coded["input_ids"].cpu(), coded["attention_mask"].cpu(), strict=True)):
        tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
        kept = [
            place for place, token in enumerate(tokens) if mask[place] and "##" not in token and token not in weightless
        ]
        found.append(hidden[row, kept].numpy())
    return found


def _loaded(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    if not isinstance(model, (str, Path)):
        if tokenizer is None:
            raise ConfigError("a model needs its tokenizer", value="tokenizer=None", remedy="give both, or a folder")
        return model.eval(), tokenizer
    from transformers import AutoModel, AutoTokenizer

    try:
        loaded = AutoModel.from_pretrained(str(model), trust_remote_code=False).eval()
        return loaded, tokenizer or AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no encoder can be loaded from {model}: {error}", remedy="give a folder or a hub name"
        ) from error
