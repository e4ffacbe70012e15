"""A decoder of one's own: a small GPT-2 made for given sentences, and plain language-model training of any decoder.

For machines and languages without a pretrained decoder; it is frozen under a latent afterwards.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerFast

from lmvae_fast.kernels.latent_attention.visibility import token_position
from lmvae_fast.kernels.lm_head_loss import lm_head_loss
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.text.tokenizer import TokenizedSentences
from lmvae_fast.training.batch_plan import plan_epoch


def train_language_model(
    model: LMVAE,
    sentences: TokenizedSentences,
    *,
    epochs: int = 1,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train the model's decoder alone, without memory, at the positions its tokens will have under the memory.

    AdamW with linear warm-up over 5 % of the steps and cosine decay, gradient norm clipped at 1. The decoder is left
    frozen or trainable as it was.

    Args:
        model: its decoder is trained in place; nothing else changes.
        sentences: from ``model.tokenize``.
        epochs, batch_size, learning_rate, seed: of the training.
        on_step: called with (step, total steps, loss in nats per token) after every step.

    Returns:
        the loss of every step.
    """
    decoder = model.decoder
    visibility, slots = str(model.config.visibility), int(model.config.slots or 0)
    frozen = torch.zeros(len(sentences), 1)  # the encoder is not asked
    plans = [plan_epoch(sentences.lengths, batch_size, seed=seed, epoch=epoch) for epoch in range(epochs)]
    batches = [batch for plan in plans for step in plan.steps for batch in step]
    before = [(parameter, parameter.requires_grad) for parameter in decoder.model.parameters()]
    optimizer = torch.optim.AdamW(decoder.model.requires_grad_().parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(1, len(batches) // 20)
    losses = []
    try:
        for step, rows in enumerate(batches):
            decay = 0.5 + 0.5 * math.cos(math.pi * step / len(batches))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / warmup, decay)
            batch = model.make_batch(sentences, rows.tolist(), frozen).to(model.device)
            hidden = decoder.hidden(
                batch.input_ids,
                None,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
                rows=batch.rows,
                token_index=token_position(batch.token_index, slots, visibility),
            )
            weights = torch.full((batch.num_tokens,), 1.0 / batch.num_tokens, device=model.device)
            loss, _ = lm_head_loss(
                hidden,
                decoder.head_weight,
                batch.labels,
                bias=decoder.head_bias,
                token_weights=weights,
                softcap=decoder.softcap,
                logit_scale=decoder.logit_scale,
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decoder.model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if on_step is not None:
                on_step(step + 1, len(batches), losses[-1])
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
    return losses


def make_tokenizer(texts: Sequence[str], vocabulary: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer made from ``texts``: a byte-level BPE of ``vocabulary`` tokens, or one token per word for None.

    Its start, end and padding token is one, with id 0.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end, unknown = "<|endoftext|>", "[UNK]"
    if vocabulary is None:
        words = sorted({word for text in texts for word in text.split()})
        ids = {word: index for index, word in enumerate([end, unknown, *words])}
        backend = Tokenizer(models.WordLevel(ids, unk_token=unknown))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[end, unknown], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end, unk_token=unknown
    )


def make_decoder(
    folder: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    positions: int = 64,
    vocabulary: int | None = None,
    seed: int = 0,
) -> None:
    """Write an untrained GPT-2 and a tokenizer made from ``texts`` as an ordinary Hugging Face folder.

    Args:
        folder: where.
        texts: sentences the tokenizer is made from.
        layers, width, heads, positions: of the GPT-2.
        vocabulary: tokens of a byte-level BPE; None for one token per word of the texts, for a closed vocabulary.
        seed: of the weights.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(texts, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=positions,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
