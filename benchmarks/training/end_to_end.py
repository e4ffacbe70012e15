"""A GPT-2-small-shaped model, ours against the eager reference: one training step and greedy decoding.

    python -m benchmarks.training.end_to_end [--device cuda] [--precision fp32 bf16] [--seconds 5] [--output FILE.json]

Random weights (speed does not depend on them), the same on both sides; sentences of 4 to 22 tokens, batch 32, 33 slots,
z of 128. Before anything is timed, both sides must give the same loss. The reference reads one token at a time, as LangVAE
does; it too is given the sentence's own tokens (teacher forcing), so both sides do the same work. Training in bf16 is
autocast over float32 weights, decoding in bf16 has bf16 weights; rows say whether ours ran what it runs by itself, the
projector's fused AdamW and (on CUDA) recorded decode steps.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks.common.records import RESULTS, write
from lmvae_fast.config import LMVAEConfig, TrainConfig
from lmvae_fast.generation.cuda_graphs import capture_for
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.profiling.measure import interleave, machine, peak_memory, speedup
from lmvae_fast.reference.langvae import ReferenceLangVAE
from lmvae_fast.testing import SENTENCES, tiny_encoder, tiny_tokenizer
from lmvae_fast.text.tokenizer import SentenceTokenizer
from lmvae_fast.training.optimizer import Optimizer

MAX_LEN, LATENT = 32, 128
SHAPE = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257}


def sentences(count: int) -> list[str]:
    """Sentences whose tokens (one per word, as the tokenizer was trained on these words) number 4 to 22."""
    words, draw = " ".join(SENTENCES).split(), random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(4, 21))) for _ in range(count)]


def build(device: str, shape: dict[str, int]) -> tuple[LMVAE, ReferenceLangVAE]:
    """Build both sides with the same weights, on the device."""
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    # a configuration each: it also says whose attention runs
    first, second = (hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=128, **shape, **special)).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    size = len(tiny_tokenizer())
    config = LMVAEConfig(latent_dim=LATENT, max_len=MAX_LEN, projector_dropout=0.0)
    ours = LMVAE(
        config,
        encoder=Encoder(tiny_encoder(vocab_size=size), tiny_tokenizer(), pooling="mean"),
        decoder=Decoder(first, SentenceTokenizer(tiny_tokenizer())),
    )
    reference = ReferenceLangVAE(
        tiny_encoder(vocab_size=size), tiny_tokenizer(), second, tiny_tokenizer(),
        latent_dim=LATENT, max_len=MAX_LEN, dropout=0.0,
    )  # fmt: skip
    with torch.no_grad():
        reference.linear.weight.copy_(ours.posterior_head.weight)
        for layer, linear in enumerate(reference.context_hidden):
            rows = linear.weight.shape[0]
            linear.weight.copy_(ours.projector.weight[layer][:rows])
            linear.bias.copy_(ours.projector.bias[layer][:rows])
    return ours.to(device).train(), reference.to(device).train()


def training_steps(ours: LMVAE, reference: ReferenceLangVAE, batch: int, device: str, dtype: torch.dtype | None):
    """A step of each side: forward, backward, AdamW. Also the two losses for one noise, to be compared, and whether the
    projector's weight was updated by the fused AdamW."""
    texts = sentences(batch)
    tokens = ours.tokenize(texts)
    packed = ours.make_batch(tokens, pooled=ours.pool(tokens)).to(device)
    ids = [*tokens.ids]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [2] * (longest - len(row)) for row in ids], device=device)

    def autocast():
        return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)

    trains = {name: value for name, value in ours.named_parameters() if value.requires_grad}
    settings = TrainConfig(learning_rate=1e-5, grad_clip=None, precision="fp32" if dtype is None else "bf16")
    update = Optimizer(ours, trains, settings)
    reference_optimizer = torch.optim.AdamW(
        [value for value in reference.parameters() if value.requires_grad], lr=settings.learning_rate,
        betas=settings.adam_betas, eps=settings.adam_eps, weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip

    def ours_step():
        with update.attached():
            with autocast():
                loss = ours(packed, beta=1.0).loss
            loss.backward()
            update.step(loss)  # without clipping no norm is looked at

    def reference_step():
        with autocast():
            loss = reference.loss(padded, beta=1.0, objective="elbo", teacher_forcing=True).loss
        loss.backward()
        reference_optimizer.step()
        reference_optimizer.zero_grad()

    eps = torch.randn(batch, LATENT, device=device)
    with torch.no_grad(), autocast():
        out = ours(packed, beta=1.0, eps=eps)
        # the reference has no end token of its own: what is compared is the loss of the words
        words = packed.labels != 2
        own = torch.zeros(batch, device=device).index_add_(0, packed.rows, (out.nll * words).float()).mean()
        theirs = reference.loss(padded, beta=1.0, objective="elbo", teacher_forcing=True, eps=eps).reconstruction
    return ours_step, reference_step, (own.item(), theirs.item()), int(packed.num_tokens), update.fused is not None


def decoders(ours: LMVAE, reference: ReferenceLangVAE, dtype: torch.dtype | None) -> tuple[LMVAE, ReferenceLangVAE]:
    """Both sides to decode with, in half precision by their weights: what autocast makes anew at every step cannot be
    recorded in a CUDA graph."""
    if dtype is None:
        return ours.eval(), reference.eval()
    ours, reference = copy.deepcopy(ours).eval(), copy.deepcopy(reference).eval()
    ours.decoder.to(dtype)
    return ours, reference.to(dtype)


def compare(sides: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, Any]:
    """Medians and peak memory of both sides, timed in turn; at least 3 rounds."""
    times = interleave(sides, seconds, device, rounds=3)
    memory = {name: peak_memory(function, device) for name, function in sides.items()} if device == "cuda" else {}
    return {
        "milliseconds": {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        "rounds": len(times["ours"]), "speedup": round(speedup(times, "ours", "reference"), 2),
        "peak_extra_bytes": memory,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=5.0, help="per row, both sides together")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="two narrow layers: to try the program, not to measure")
    parser.add_argument("--output", type=Path, default=RESULTS / "end_to_end.json")
    options = parser.parse_args(arguments)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 400} if options.tiny else SHAPE
    command = " ".join(sys.argv[1:] if arguments is None else arguments)
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.training.end_to_end {command}",
        "machine": machine(options.device), "shape": shape, "rows": [],
    }  # fmt: skip
    ours, reference = build(options.device, shape)
    for precision in options.precision:
        dtype = torch.bfloat16 if precision == "bf16" else None
        ours_step, reference_step, losses, tokens, fused = training_steps(
            ours.train(), reference.train(), options.batch, options.device, dtype
        )
        if abs(losses[0] - losses[1]) > (1e-3 if dtype is None else 2e-2) * abs(losses[1]):
            print(f"{precision}: the two sides disagree, nothing is timed: {losses}", file=sys.stderr)
            return 1
        row = {"what": "training step", "precision": precision, "batch": options.batch, "tokens": tokens}
        row |= {"losses": losses, "fused_projector_update": fused}
        record["rows"].append(
            row | compare({"ours": ours_step, "reference": reference_step}, options.seconds, options.device)
        )
        write(record, options.output)
        z = torch.randn(options.batch, LATENT, device=options.device)
        our_decoder, reference_decoder = decoders(ours, reference, dtype)

        def decode(function: Callable[[torch.Tensor], Any], z: torch.Tensor) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    function(z)

            return run

        sides = {
            "ours": decode(our_decoder.decode, z), "reference": decode(reference_decoder.decode, z.to(dtype or z.dtype))
        }  # fmt: skip
        row = {"what": f"greedy decoding of {MAX_LEN} tokens at most", "precision": precision, "batch": options.batch}
        row |= {"cuda_graphs": capture_for(our_decoder.decoder, z.device, None) is not None}
        record["rows"].append(row | compare(sides, options.seconds, options.device))
        write(record, options.output)
    for row in record["rows"]:
        took = row["milliseconds"]
        print(
            f"{row['what']}, {row['precision']}: {took['ours']} ms, reference {took['reference']} ms, {row['speedup']}x"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
