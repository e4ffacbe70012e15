"""What weights="int8" costs a pretrained decoder: the change of its NLL, and of its greedy tokens.

    python -m benchmarks.generation.int8 [--decoder smollm2-135m] [--sentences 400]

Sentences of the bundled corpus, each behind the start token. The same packed pass runs over the same tokens with the
decoder's own weights and with weights in int8, in fp32 and in bf16, through the kernels that decoding uses: NLL in nats a
token, the share of tokens whose most probable successor stays the same, and the share of greedy continuations that stay the
same, whole and token by token until the first that differs. Writes benchmarks/results/generation/int8-<decoder>.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.common import records
from lmvae_fast.data.corpus import generate_corpus
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.prepared_weights import packed_weights
from lmvae_fast.models.injection import Injection
from lmvae_fast.profiling.measure import machine
from lmvae_fast.text.batch import pack

LIMIT = 0.02  # nats a token that int8 may cost
AT_ONCE = 32  # sentences of a pass
CONTINUED = 24  # tokens of a greedy continuation


@torch.no_grad()
def logits_of(decoder: Decoder, sentences: list[list[int]], weights: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of every token, and the most probable token at its place, of sentences that begin with the start token."""
    losses, best = [], []
    for first in range(0, len(sentences), AT_ONCE):
        part = sentences[first : first + AT_ONCE]
        reads, labels = [ids[:-1] for ids in part], torch.tensor([token for ids in part for token in ids[1:]])
        packed = {name: torch.as_tensor(value) for name, value in pack(reads, reads).items()}
        with packed_weights(decoder, len(part), weights=weights):
            hidden = decoder.hidden(
                packed["input_ids"], None, cu_seqlens=packed["cu_seqlens"], max_seqlen=max(map(len, reads)),
                rows=packed["rows"], token_index=packed["token_index"],
            )  # fmt: skip
            logits = decoder.logits(hidden).float()
        losses.append(cross_entropy(logits, labels, reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(best)


@torch.no_grad()
def continuations(decoder: Decoder, beginnings: list[int], weights: str | None) -> torch.Tensor:
    """Greedy tokens ``[sentences, CONTINUED]`` behind the start token and one token each."""
    injection, count = Injection("prefix", None), len(beginnings)
    cache: LatentCache = decoder.new_cache(injection, batch=count, max_tokens=CONTINUED + 2)
    token = torch.full((count,), decoder.tokenizer.bos_token_id)
    found = []
    with packed_weights(decoder, count, weights=weights):
        decoder.step(token, cache, injection)
        token = torch.tensor(beginnings)
        for _ in range(CONTINUED):
            token = decoder.step(token, cache, injection).float().argmax(-1)
            found.append(token)
    return torch.stack(found, 1)


def compare(decoder: Decoder, sentences: list[list[int]]) -> dict[str, Any]:
    """Figures of int8 against the decoder's own weights, in the dtype it is held in."""
    (own, own_best), (narrow, narrow_best) = (logits_of(decoder, sentences, weights) for weights in (None, "int8"))
    beginnings = sorted({ids[1] for ids in sentences})[:64]
    plain, rounded = (continuations(decoder, beginnings, weights) for weights in (None, "int8"))
    same = (plain == rounded).cumprod(1)
    change = narrow - own
    return {
        "tokens": own.numel(), "nll": own.mean().item(), "nll_int8": narrow.mean().item(), "change": change.mean().item(),
        "change_standard_error": (change.std() / change.numel() ** 0.5).item(),
        "same_most_probable": (own_best == narrow_best).float().mean().item(),
        "continuations": len(beginnings), "same_continuations": same[:, -1].float().mean().item(),
        "same_tokens_until_the_first_other": same.float().mean().item(),
    }  # fmt: skip


def main() -> int:
    """Command line; 1 where int8 costs more than LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--decoder", default="smollm2-135m", help="a packaged model, a folder, a .gguf file or a hub name"
    )
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/generation/int8-<decoder>.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = generate_corpus(num_sentences=options.sentences).texts
    rows: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        decoder = Decoder.load(options.decoder, dtype=dtype)
        start = decoder.tokenizer.bos_token_id
        sentences = [[start, *ids] for ids in decoder.tokenizer.encode(texts)]
        name = str(dtype).removeprefix("torch.")
        rows[name] = compare(decoder, sentences)
        print(name, {key: round(value, 5) for key, value in rows[name].items()}, flush=True)
    record = {
        "command": "python -m benchmarks.generation.int8 " + " ".join(sys.argv[1:]), "decoder": options.decoder,
        "machine": machine("cpu"), "limit": LIMIT, "rows": rows,
    }  # fmt: skip
    name = Path(options.decoder).stem if "/" in options.decoder else options.decoder
    records.write(record, options.output or records.RESULTS / "generation" / f"int8-{name}.json")
    return int(any(row["change"] > LIMIT for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
