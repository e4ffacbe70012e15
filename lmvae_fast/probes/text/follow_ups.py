"""FED: a dialogue judged by how likely a language model finds pleased and displeased answers to it.

Source: Mehri & Eskenazi 2020 (arXiv 2006.12719). The follow-up sentences are that metric's definition, and its repository
gives no licence for them: they are not part of this package, and are read from what the user has.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmvae_fast.documents import parse_json, read_text
from lmvae_fast.errors import ConfigError, DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Score
from lmvae_fast.probes.text.overlap import texts

#: Aspect -> (positive follow-ups, negative follow-ups).
FollowUps = Mapping[str, tuple[Sequence[str], Sequence[str]]]

_FORM = '{"aspect": {"positive": ["..."], "negative": ["..."]}, ...}'


def read_follow_ups(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Follow-ups of a file: ``.json`` with ``{aspect: {"positive": [...], "negative": [...]}}``, or the metric's own
    ``fed.py`` (https://github.com/Shikib/fed), whose tables are read and of which nothing is run.

    Raises DataError for a file that holds no such table.
    """
    text = read_text(path)
    if Path(path).suffix == ".py":
        found = {aspect: sides for table in _tables(text, path) for aspect, sides in table.items()}
    else:
        found = parse_json(text, str(path), limit_text=_FORM)
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path} holds no follow-ups", limit=_FORM, remedy="give fed.py of github.com/Shikib/fed")
    return {aspect: _sides(aspect, sides, path) for aspect, sides in found.items()}


def _tables(text: str, path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The tables of follow-ups that stand in a Python file, in their order."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{path} is no Python file: {error}", remedy="download it again") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError, RecursionError):
                continue
            if value and all(isinstance(sides, dict) and "negative" in sides for sides in value.values()):
                yield value


def _sides(aspect: Any, sides: Any, path: str | os.PathLike[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    known = sides if isinstance(sides, dict) else {}
    found = [known.get("positive", []), known.get("negative")]
    if not isinstance(aspect, str) or not all(
        isinstance(side, list) and all(isinstance(sentence, str) for sentence in side) for side in found
    ):
        raise DataError(
            f"{path}: an aspect has no follow-ups", value=repr(aspect)[:60], limit=_FORM, remedy="mend that entry"
        )
    return tuple(found[0]), tuple(found[1])


def fed(
    conversations: str | Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    follow_ups: FollowUps | str | os.PathLike[str] | None = None,
    batch_size: int = 32,
) -> Score:
    """FED of dialogues: for each aspect, mean loss of the negative follow-ups minus mean loss of the positive ones.

    Higher is better: the model finds praise likelier than blame. A loss is the mean negative log-likelihood of a token of
    the whole dialogue with the follow-up, so long dialogues dilute it. Aspects without positive follow-ups are no
    difference but the bare loss of the negative ones (about 8 where differences are below 1); they are named in
    ``left_out`` and do not enter ``value``.

    Args:
        conversations: dialogues, turns separated by `` <|endoftext|> ``; one, or a list.
        model: a causal language model (published figures: DialoGPT-large). tokenizer: of the model.
        follow_ups: aspect -> (positive, negative), or a file that :func:`read_follow_ups` reads; there are none here.
        batch_size: sequences per pass.

    Returns:
        ``value``: the mean difference over dialogues and aspects; ``details["aspects"]``: each aspect's mean over the
        dialogues (bare losses too); ``details["conversations"]``: those of each dialogue; ``details["losses"]``: the loss
        of each dialogue without a follow-up.

    Raises ConfigError without follow-ups, DataError for dialogues that are too long and aspects without a negative follow-up.
    """
    if follow_ups is None:
        raise ConfigError(
            "FED's follow-up sentences are no part of this package, since no licence is given for them",
            value="follow_ups=None", limit="a mapping, or a file",
            remedy="download fed.py of https://github.com/Shikib/fed and give its path as follow_ups, or a JSON file "
            + _FORM,
        )  # fmt: skip
    if isinstance(follow_ups, (str, os.PathLike)):
        follow_ups = read_follow_ups(follow_ups)
    given = [conversations] if isinstance(conversations, str) else texts(conversations, name="conversations")
    checks.whole("batch_size", batch_size, 1)
    if not follow_ups or any(not negative for _, negative in follow_ups.values()):
        raise DataError("every aspect needs a negative follow-up", value=", ".join(follow_ups) or "no aspect")
    sentences = list(dict.fromkeys(text for pair in follow_ups.values() for side in pair for text in side))
    per_conversation, own = [], []
    for conversation in given:
        sequences = [conversation, *(f"{conversation} <|endoftext|> {text}" for text in sentences)]
        losses = _losses(model, tokenizer, sequences, batch_size)
        own.append(losses[0])
        loss = dict(zip(sentences, losses[1:], strict=True))
        per_conversation.append(
            {
                aspect: _mean(loss, negative) - _mean(loss, positive)
                for aspect, (positive, negative) in follow_ups.items()
            }
        )
    aspects = {aspect: float(np.mean([row[aspect] for row in per_conversation])) for aspect in follow_ups}
    bare = [aspect for aspect, (positive, _) in follow_ups.items() if not positive]
    differences = [value for aspect, value in aspects.items() if aspect not in bare]
    return Score(
        float(np.mean(differences)) if differences else float("nan"),
        left_out={"aspects": dict.fromkeys(bare, "no positive follow-ups: a bare loss")} if bare else {},
        choices={
            "model": getattr(model.config, "name_or_path", ""),
            "aspects": len(follow_ups),
            "conversations": len(given),
        },
        details={"aspects": aspects, "conversations": per_conversation, "losses": own},
    )


def _mean(loss: Mapping[str, float], sentences: Sequence[str]) -> float:
    return float(np.mean([loss[text] for text in sentences])) if sentences else 0.0


def _losses(model: Any, tokenizer: Any, sequences: Sequence[str], batch_size: int) -> list[float]:
    """Mean negative log-likelihood of a token after the first, of each sequence; nats."""
    import torch

    device = next(model.parameters()).device
    begun = [text if text.startswith("<|endoftext|> ") else f"<|endoftext|> {text}" for text in sequences]
    coded = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in begun]
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, coded))
    if limit is not None and longest > limit:
        raise DataError(
            "a dialogue is too long for the model", value=f"{longest} tokens", limit=limit, remedy="cut turns off"
        )
    found: list[float] = []
    for start in range(0, len(coded), batch_size):
        part = coded[start : start + batch_size]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in part], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        mean = (nll * mask[:, 1:]).sum(dim=1) / (lengths - 1)
        found += mean.double().cpu().tolist()
    return found
