"""A decoder without a latent that answers prompts: fine-tuned by the loop, and sampled from by the engine, that every model
goes through.

The two steps before a CVAE with G-Skip (behaviour of zhangjf-nlp/LLM-based-CVAE): a decoder is fine-tuned on prompts with
responses, and answers every prompt many times; the CVAE is trained on these answers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmvae_fast.config.plain_decoder import PlainDecoderConfig
from lmvae_fast.documents import read_object
from lmvae_fast.errors import CheckpointError, ConfigError
from lmvae_fast.files import check_ours, fsync_file, mark, output_errors, replace_folder, temporary_beside
from lmvae_fast.models import inputs
from lmvae_fast.models.checks import check_latents
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.decoder.tuning import Tuning, merged
from lmvae_fast.models.free_running import FreeRunning
from lmvae_fast.models.injection import Injection
from lmvae_fast.models.lmvae import LMVAEOutput
from lmvae_fast.models.modes import building
from lmvae_fast.models.objective import combine, segment_sum, token_weights
from lmvae_fast.models.serialization import copy_into
from lmvae_fast.models.sharded_tensors import whole
from lmvae_fast.models.token_losses import token_losses
from lmvae_fast.text.batch import Batch
from lmvae_fast.text.tokenizer import TokenizedSentences

KIND = "decoder"  # what its folder is marked as
SETTINGS = "prompts.json"  # beside Hugging Face's own files: what it was fine-tuned with
LIMITS = ("max_len", "max_prompt_len", "add_prefix_space")


class PlainDecoder(nn.Module):
    """A causal language model with the surface of an LMVAE whose latent has no dimension.

    Args:
        config: what to load, and how long prompts and responses may be.
        decoder: when it is already in memory.

    Raises what :meth:`Decoder.load` raises, and ConfigError where prompt and response pass the decoder's positions.
    """

    projector = embedding_shift = residual = encoder = None

    def __init__(self, config: PlainDecoderConfig, *, decoder: Decoder | None = None):
        super().__init__()
        with building():
            if Path(config.decoder).exists():
                config = config.replace(decoder=str(Path(config.decoder).resolve()))
            self.config = config
            tuning = Tuning(config.decoder_part, config.lora_rank, config.lora_alpha)
            self.decoder = decoder or Decoder.load(
                config.decoder, dtype=getattr(torch, config.dtype), train=config.train_decoder, tuning=tuning,
                add_prefix_space=config.add_prefix_space,
            )  # fmt: skip
        if self.decoder.trains != config.train_decoder:
            raise ConfigError(
                "the decoder given and the configuration disagree about training it",
                value=f"decoder.trains={self.decoder.trains}, train_decoder={config.train_decoder}",
                remedy="make them equal",
            )
        self.beta: float | Tensor = 1.0
        self.free_running = FreeRunning()
        self.decoder.check_positions(0, config.max_len + (config.max_prompt_len or 1), "prefix")

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.device

    @property
    def latent_dtype(self) -> torch.dtype:
        """Dtype of latents, of which there are none."""
        return torch.float64 if self.config.dtype == "float64" else torch.float32

    def tokenize(
        self, examples: Iterable[Any], on_long: str = "truncate", on_empty: str = "drop"
    ) -> TokenizedSentences:
        """Tokenise prompts with responses; see :func:`~lmvae_fast.text.prompts.tokenize_prompts`."""
        return inputs.tokenize(examples, self.config, self.decoder, on_long=on_long, on_empty=on_empty)

    def make_batch(
        self,
        sentences: TokenizedSentences,
        rows: Sequence[int] | np.ndarray | None = None,
        pooled: Tensor | None = None,
    ) -> Batch:
        """Pack some prompts with responses; ``pooled`` is always None."""
        return inputs.make_batch(sentences, rows, pooled, self.config, None, self.decoder)

    def forward(
        self,
        batch: Batch | Sequence[Any],
        *,
        beta: float | Tensor | None = None,
        eps: Any = None,
        seed: int | Tensor | None = None,
        tokens: int | None = None,
    ) -> LMVAEOutput:
        """Mean over responses of the negative log-likelihood of response and end token; the other arguments have no effect."""
        if not isinstance(batch, Batch):
            batch = self.make_batch(self.tokenize(batch)).to(self.device)
        options: dict[str, Any] = {"length_normalize": self.config.length_normalize}
        weights = token_weights(batch.tokens.to(self.latent_dtype), batch.rows, **options)
        loss, nll = token_losses(self.decoder, batch, batch.input_ids, None, weights)
        nothing = nll.new_zeros(batch.batch_size, 0)
        with torch.no_grad():
            of_responses = segment_sum(nll.detach(), batch.cu_seqlens)
            terms = combine(of_responses, batch.tokens, nothing.sum(1), 0.0, **options)
        return LMVAEOutput(
            loss, terms.reconstruction, terms.kl, 0.0, nll.detach(), batch.tokens, nothing, nothing, nothing
        )

    def score(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """NLL of each response, teacher forced: ``[B]``, nats."""
        return segment_sum(token_losses(self.decoder, batch, batch.input_ids, None, None)[1], batch.cu_seqlens)

    def inject(self, z: Tensor, **options: Any) -> Injection:
        """A memory without slots, whatever the latents ``[batch, 0]``."""
        self.check_latents(z, finite=False)
        decoder = self.decoder
        shape = (decoder.num_layers, 2, z.shape[0], decoder.kv_heads, 0, decoder.head_dim)
        return Injection("prefix", z.new_zeros(shape, dtype=decoder.dtype))

    def check_latents(self, z: Tensor, *, finite: bool = True) -> None:
        """Raises LatentError unless z is floating and ``[batch, 0]``."""
        check_latents(z, 0, finite=finite)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The parameters that train, by name (tied ones once)."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy such a dictionary in. Raises CheckpointError for missing, unknown or misshapen entries."""
        copy_into({name: value for name, value in self.named_parameters() if value.requires_grad}, state)

    # Saving ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write an ordinary Hugging Face folder of decoder and tokenizer, which an LMVAEConfig may name as its decoder.

        Low-rank adapters are added to the weights they stand beside, and stored by themselves too, in peft's format in
        ``adapter/``. Written beside its place first and renamed when complete; of a decoder in pieces (``TrainConfig.shard``)
        all processes save together. Raises OutputError where the folder cannot be written, or holds something else.
        """
        folder, model = Path(folder), self.decoder.model
        state = {name: whole(value).cpu() for name, value in model.state_dict().items()}
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        check_ours(folder, KIND, replaced=True)
        temporary = temporary_beside(folder.absolute())
        with output_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                model.save_pretrained(temporary, state_dict=merged(model, state))
                self.decoder.tokenizer.tokenizer.save_pretrained(temporary)
                if self.config.decoder_part == "lora":
                    self.decoder.tuning.write_adapter(model, state, temporary / "adapter", base=self.config.decoder)
                limits = {name: getattr(self.config, name) for name in LIMITS}
                (temporary / SETTINGS).write_text(json.dumps(limits, indent=2) + "\n")
                mark(temporary, KIND, complete=True)
                for file in temporary.rglob("*"):
                    if file.is_file():
                        fsync_file(file)
                replace_folder(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **overrides: Any) -> PlainDecoder:
        """The decoder of a Hugging Face folder or hub name, frozen, in evaluation mode; of one that :meth:`save_pretrained`
        wrote, with the lengths it was fine-tuned with.

        overrides: fields of PlainDecoderConfig. Raises CheckpointError where there is none, and what the class raises.
        """
        fields = {"decoder": str(source), "train_decoder": False, **limits_of(source), **overrides}
        return cls(PlainDecoderConfig.from_dict(fields)).eval()


def limits_of(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of the configuration that a folder which :meth:`PlainDecoder.save_pretrained` wrote was made with; none of any
    other. Raises CheckpointError where they are unreadable."""
    file = Path(source) / SETTINGS
    if not file.is_file():
        return {}
    return {name: value for name, value in read_object(file, error=CheckpointError).items() if name in LIMITS}
