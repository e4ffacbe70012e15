"""FED: a dialogue judged by how likely a language model finds pleased and displeased answers to it.

Source: Mehri & Eskenazi 2020 (arXiv 2006.12719); the follow-up sentences are that metric's definition and are given here
as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmvae_fast.errors import DataError
from lmvae_fast.probes import checks
from lmvae_fast.probes.results import Score
from lmvae_fast.probes.text.overlap import texts

_SENSE = ("That makes sense!", "You have a good point.")

#: Aspect -> (positive follow-ups, negative follow-ups). The first eight judge a turn, the others a whole dialogue.
FOLLOW_UPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "interesting": (
        ("Wow that is really interesting.", "That's really interesting!", "Cool! That sounds super interesting."),
        ("That's not very interesting.", "That's really boring.", "That was a really boring response."),
    ),
    "engaging": (
        ("Wow! That's really cool!", "Tell me more!", "I'm really interested in learning more about this."),
        (
            "Let's change the topic.",
            "I don't really care. That's pretty boring.",
            "I want to talk about something else.",
        ),
    ),
    "specific": (
        ("That's good to know. Cool!", "I see, that's interesting.", "That's a good point."),
        ("That's a very generic response.", "Not really relevant here.", "That's not really relevant here."),
    ),
    "relevant": (
        (),
        ("That's not even related to what I said.", "Don't change the topic!", "Why are you changing the topic?"),
    ),
    "correct": (
        (),
        ("You're not understanding me!", "I am so confused right now!", "I don't understand what you're saying."),
    ),
    "semantically appropriate": (_SENSE, ("That makes no sense!",)),
    "understandable": (
        _SENSE,
        ("I don't understand at all!", "I'm so confused!", "That makes no sense!", "What does that even mean?"),
    ),
    "fluent": (_SENSE, ("Is that real English?", "I'm so confused right now!", "That makes no sense!")),
    "coherent": (
        (),
        ("You're making no sense at all.", "You're changing the topic so much!", "You are so confusing."),
    ),
    "error recovery": (
        (),
        ("I am so confused right now.", "You're really confusing.", "I don't understand what you're saying."),
    ),
    "consistent": ((), ("That's not what you said earlier!", "Stop contradicting yourself!")),
    "diverse": (
        (),
        ("Stop saying the same thing repeatedly.", "Why are you repeating yourself?", "Stop repeating yourself!"),
    ),
    "depth": ((), ("Stop changing the topic so much.", "Don't change the topic!")),
    "likeable": (
        ("I like you!", "You're super polite and fun to talk to", "Great talking to you."),
        ("You're not very nice.", "You're not very fun to talk to.", "I don't like you."),
    ),
    "understand": (
        (),
        ("You're not understanding me!", "What are you trying to say?", "I don't understand what you're saying."),
    ),
    "flexible": (
        ("You're very easy to talk to!", "Wow you can talk about a lot of things!"),
        ("I don't want to talk about that!", "Do you know how to talk about something else?"),
    ),
    "informative": (
        ("Thanks for all the information!", "Wow that's a lot of information.", "You know a lot of facts!"),
        ("You're really boring.", "You don't really know much."),
    ),
    "inquisitive": (
        ("You ask a lot of questions!", "That's a lot of questions!"),
        ("You don't ask many questions.", "You don't seem interested."),
    ),
}


def fed(
    conversations: str | Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    follow_ups: Mapping[str, tuple[Sequence[str], Sequence[str]]] = FOLLOW_UPS,
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
        follow_ups: aspect -> (positive, negative).
        batch_size: sequences per pass.

    Returns:
        ``value``: the mean difference over dialogues and aspects; ``details["aspects"]``: each aspect's mean over the
        dialogues (bare losses too); ``details["conversations"]``: those of each dialogue; ``details["losses"]``: the loss
        of each dialogue without a follow-up.
    """
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
