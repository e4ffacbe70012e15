"""Free running: the decoder reads its own greedy output, one token at a time or by fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.greedy_loop import greedy_ids
from lmvae_fast.models.injection import Injection
from lmvae_fast.text.batch import Batch

__all__ = ["FreeRunning", "greedy_ids"]

_CHUNK = 64  # tokens whose logits exist at one time
_REST = 16  # batches read token by token after an iteration that did not pay


@dataclass
class FreeRunning:
    """Decoder inputs of a batch when the decoder reads its own greedy output instead of the sentences.

    Fixed-point (Jacobi) iteration begins with the sentences themselves: one parallel pass over a guess gives the greedy
    token after every prefix of it, which is the next guess. A sentence that comes out as it went in is its own greedy
    output. Every pass makes at least one more token of each sentence right, so the result is that of the loop over
    tokens; a model that reconstructs well needs a pass or two where the loop needs one per token. Only sentences that are
    not yet fixed are passed again. When a pass fixes less than half of them, the loop does the rest, and the next batches
    are left to the loop alone: so a model that is not there yet pays for one pass in some batches.

    Attributes:
        passes, looped: passes that the last batch took, and sentences that were left to the loop.
        rest: batches that are still left to the loop alone.
    """

    passes: int = 0
    looped: int = 0
    rest: int = 0

    @torch.no_grad()
    def inputs(self, decoder: Decoder, batch: Batch, injection: Injection) -> Tensor:
        """Inputs ``[T]`` packed as the batch is. Each pass looks at what it has fixed, the loop at nothing."""
        self.passes = 0
        inputs, left = batch.input_ids.clone(), torch.arange(batch.batch_size, device=batch.input_ids.device)
        if self.rest > 0:
            self.rest -= 1
        else:
            left = self._iterate(decoder, batch, injection, inputs, left)
        self.looped = left.shape[0]
        start = inputs.new_full((self.looped, 1), decoder.tokenizer.bos_token_id)
        if self.looped == batch.batch_size:  # nothing is read on the host
            wanted = batch.cu_seqlens.diff().long() - 1
            ids = greedy_ids(decoder, injection, max(batch.max_seqlen - 1, 0), wanted)
            return torch.cat([start, ids], dim=1)[batch.rows, batch.token_index]
        if self.looped:
            places, lengths = _places(batch, left), batch.cu_seqlens.diff()[left].long()
            ids = greedy_ids(decoder, injection.select(left), int(lengths.max()) - 1, lengths - 1)
            rows = torch.repeat_interleave(torch.arange(self.looped, device=left.device), lengths)
            inputs[places] = torch.cat([start, ids], dim=1)[rows, batch.token_index[places]]
        return inputs

    def _iterate(self, decoder: Decoder, batch: Batch, injection: Injection, inputs: Tensor, left: Tensor) -> Tensor:
        """Make `inputs` right for as many sentences as pays; returns the others."""
        while left.shape[0]:
            self.passes += 1
            places, lengths = _places(batch, left), batch.cu_seqlens.diff()[left]
            offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            rows = torch.repeat_interleave(torch.arange(left.shape[0], device=left.device), lengths.long())
            guess, index = inputs[places], batch.token_index[places]
            whole = left.shape[0] == batch.batch_size
            hidden = decoder.hidden(
                guess,
                injection if whole else injection.select(left),
                cu_seqlens=offsets,
                max_seqlen=batch.max_seqlen,
                rows=rows,
                token_index=index,
            )
            next_tokens = decoder.greedy_tokens(hidden, at_once=_CHUNK)
            # What a token is answered with stands at the next place, if the sentence has one.
            follows = index[1:] > 0
            improved = guess.clone()
            improved[1:][follows] = next_tokens[:-1][follows]
            inputs[places] = improved
            changed = torch.zeros(left.shape[0], dtype=torch.bool, device=left.device)
            changed[rows[improved != guess]] = True
            before, left = left.shape[0], left[changed]
            if 2 * left.shape[0] > before:
                self.rest = _REST
                break
        return left


def _places(batch: Batch, sentences: Tensor) -> Tensor:
    """Indices of all tokens of these sentences, in their order."""
    wanted = torch.zeros(batch.batch_size, dtype=torch.bool, device=sentences.device)
    wanted[sentences] = True
    return wanted[batch.rows].nonzero().squeeze(1)
