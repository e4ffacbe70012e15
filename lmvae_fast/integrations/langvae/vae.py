"""`LangVAE`, the model of LangVAE 0.6.13 by its own names, on the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import CheckpointError, ConfigError, LatentError
from lmvae_fast.integrations.langvae.containers import Later, ModelOutput, VAEConfig, checked_latent_dim
from lmvae_fast.integrations.langvae.files import FILES, LangVAEFolder, read_folder, write_folder
from lmvae_fast.integrations.langvae.model import as_folder, locate
from lmvae_fast.integrations.langvae.parts import (
    DROPOUT,
    VISIBILITY,
    SentenceDecoder,
    SentenceEncoder,
    pooled_labels,
)
from lmvae_fast.integrations.langvae.tokenization import FIELDS, token_ids
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.reference.langvae import langvae_loss
from lmvae_fast.text.batch import Batch, pack
from lmvae_fast.text.collate import with_start

CARD = """---
language: en
library_name: lmvae_fast
tags: [langvae, variational-autoencoder, text-generation]
---
# A LangVAE

Encoder `{encoder}`, decoder `{decoder}`, latent dimension {latent_dim}, at most {max_len} tokens.

```python
from lmvae_fast.integrations.langvae import LangVAE

model = LangVAE.load_from_hf_hub("<this repository>")
```
"""


class LangVAE(nn.Module):
    """A sentence VAE between a frozen encoder and a frozen decoder, with LangVAE's arguments, shapes and figures.

    A forward pass is one parallel pass: the loss is LangVAE 0.6.13's own (``objective="langvae-0.6"``), over the decoder's own
    greedy output (``free_running=True``), and the probabilities ``recon_x`` are computed when they are looked at.

    Args:
        model_config: a ``VAEConfig``, ours or pythae's; ``latent_dim`` must be the parts' ``latent_size``.
        encoder, decoder: the parts.
        objective, free_running: of this package: ``"elbo"`` and False train with the mean NLL of each sentence and teacher
            forcing, which is several times faster and another objective.

    Attributes:
        cur_beta: weight of the KL. target_kl: sentences whose KL is not above it, in nats, do not count theirs.
        lmvae: the :class:`~lmvae_fast.models.lmvae.LMVAE` that it is, sharing all weights.

    Raises:
        ConfigError: a part is missing, another library's or of another size, or a configured value cannot be honoured.
    """

    model_name = "VAE"  # pythae's, which LangVAE leaves as it is: a run's folder is named by it

    def __init__(
        self,
        model_config: Any,
        encoder: SentenceEncoder | None,
        decoder: SentenceDecoder | None,
        *,
        objective: str = "langvae-0.6",
        free_running: bool = True,
    ):
        super().__init__()
        self.latent_dim = checked_latent_dim(model_config)
        for name, part, kind in (("encoder", encoder, SentenceEncoder), ("decoder", decoder, SentenceDecoder)):
            if not isinstance(part, kind):
                raise ConfigError(
                    f"{name} must be a {kind.__name__} of lmvae_fast.integrations.langvae",
                    value=f"{type(part).__module__}.{type(part).__qualname__}",
                    remedy=f"build it with lmvae_fast.integrations.langvae.{kind.__name__}; objects of the real LangVAE "
                    "and of this package do not mix",
                )
            if part.latent_size != self.latent_dim:
                raise ConfigError(
                    f"{name} and model_config disagree", value=f"latent_size={part.latent_size}",
                    limit=f"latent_dim={self.latent_dim}", remedy="give all three one size",
                )  # fmt: skip
        assert encoder is not None and decoder is not None
        model_config.uses_default_encoder = model_config.uses_default_decoder = False
        self.model_config, self.encoder, self.decoder = model_config, encoder, decoder
        self.input_dim, self.device = None, decoder.device
        self.cur_beta: float = 0.0
        self._released: dict[str, Any] = {"objective": objective, "free_running": free_running}
        self._target_kl = 1.0
        self._engine: list[LMVAE] = []  # no child: its parameters are those of the parts

    # The model of ours -----------------------------------------------------------------------------------------------

    @property
    def target_kl(self) -> float:
        """Threshold of a sentence's KL, in nats."""
        return self._target_kl

    @target_kl.setter
    def target_kl(self, value: float) -> None:
        self._target_kl = float(value)
        if self._engine:
            self._engine[0].config = self._engine[0].config.replace(kl_target=self._target_kl)

    @property
    def lmvae(self) -> LMVAE:
        """The same model as an ``LMVAE``; a model that has seen no batch yet is settled as one without labels."""
        return self._engine[0] if self._engine else self._build(())

    def _build(self, names: Sequence[str]) -> LMVAE:
        """names: of the labels' columns."""
        encoder, decoder = self.encoder, self.decoder
        encoder.start(len(names))
        projector = decoder.start(len(names) * decoder.conditional)
        config = LMVAEConfig(
            system="langvae", encoder=encoder.model_path, decoder=decoder.model_path, latent_dim=self.latent_dim,
            max_len=decoder.max_len, visibility=VISIBILITY, pooling=encoder.automodel_preset["pooling_method"],
            normalize=encoder.automodel_preset["normalize"], projector_dropout=DROPOUT, kl_target=self._target_kl,
            annotations=tuple(names), conditional_decoder=decoder.conditional and bool(names),
            dtype=decoder.dtype_name, **self._released,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):  # the maps that it draws are put away at once
            model = LMVAE(config, encoder=encoder.part, decoder=decoder.part)
        model.posterior_head, model.projector = encoder.linear, projector
        self._engine.append(model.train(self.training))
        return model

    def engine_for(self, columns: Mapping[str, int]) -> LMVAE:
        """The model for batches with these kinds of annotation and their numbers of labels. Raises ConfigError where it is
        settled for others."""
        kinds = tuple(f"{kind}:{i}" for kind, count in columns.items() for i in range(count))
        if not self._engine:
            return self._build(kinds)
        settled = self._engine[0].config.annotations
        if len(settled) != len(kinds):
            raise ConfigError(
                "the model was made for another number of labels", value=dict(columns) or "no annotations",
                limit=f"{len(settled)} labels", remedy="give the annotations that it was trained with",
            )  # fmt: skip
        return self._engine[0]

    @classmethod
    def from_lmvae(cls, model: LMVAE) -> LangVAE:
        """A model of ours under LangVAE's names, sharing its weights and its objective.

        Raises CheckpointError for a model that LangVAE cannot express (another system's).
        """
        contents, config = as_folder(model), model.config
        nz = config.latent_dim
        decoder = SentenceDecoder(
            contents.decoder_path, nz, config.max_len, config.conditional_decoder, model.device, part=model.decoder
        )
        preset = {"cls": contents.encoder_class, "pooling_method": contents.pooling, "normalize": contents.normalize}
        encoder = SentenceEncoder(
            contents.encoder_path, nz, decoder.tokenizer, True, preset, model.device, part=model.encoder
        )
        encoder.linear, decoder.projector = model.posterior_head, model.projector  # type: ignore[assignment]
        options = {"objective": str(config.objective), "free_running": bool(config.free_running)}
        wrapped = cls(VAEConfig(latent_dim=nz), encoder, decoder, **options)  # type: ignore[arg-type]
        wrapped._target_kl = float(config.kl_target or 0.0)
        wrapped._engine.append(model)
        return wrapped.train(model.training)

    def train(self, mode: bool = True) -> LangVAE:
        super().train(mode)
        for model in self._engine:
            model.train(mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> LangVAE:
        """Move it to a device; a dtype is refused, since what trains stays float32."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            raise ConfigError("what trains stays float32", value=dtype, remedy="give a device alone")
        if device is not None:
            self.encoder.to(device)
            self.decoder.to(device)
            self.device = self.decoder.device
        return self

    # What scripts call -----------------------------------------------------------------------------------------------

    def forward(self, inputs: Mapping[str, Any], **kwargs: Any) -> ModelOutput:
        """``loss``, ``recon_loss``, ``reg_loss`` (scalars; only the first has a graph), ``recon_x`` ``[B, S, V]`` and ``z``.

        inputs: a batch with ``data`` (see SentenceEncoder.forward) and perhaps annotations. kwargs: of pythae's trainers
        (epoch, dataset_size, uses_ddp), of no meaning here as in LangVAE.
        """
        labels = {name: inputs[name] for name in inputs if name not in FIELDS}
        model = self.engine_for({name: value.shape[-1] for name, value in labels.items()})
        rows, places = token_ids(inputs["data"], self.decoder.tokenizer.pad_token_id)
        if places > self.decoder.max_len:
            raise ConfigError(
                "sentences are longer than the decoder was made for", value=f"{places} tokens",
                limit=self.decoder.max_len, remedy="give the dataset the decoder's max_len",
            )  # fmt: skip
        pooled = pooled_labels(labels, places, self.device)
        batch = self._batch(model, rows, places, pooled)
        posterior = model.encode(batch)
        z, eps = self._sample_gauss(posterior.mu, torch.exp(0.5 * posterior.logvar))
        seed = int(torch.randint(2**62, ())) if self.training else 0
        out = model(batch, beta=self.cur_beta, eps=eps, seed=seed, tokens=places)
        z = torch.cat([z, *pooled], -1) if self.decoder.conditional and pooled else z

        def probabilities() -> Tensor:
            return self.decoder.probabilities(
                model.inject(out.z, batch.annotations, seed=seed, tokens=places), len(z), places
            )

        return ModelOutput(
            recon_loss=out.reconstruction.mean(), reg_loss=self.cur_beta * out.kl.mean(), loss=out.loss,
            recon_x=Later(probabilities), z=z,
        )  # fmt: skip

    def _batch(self, model: LMVAE, rows: list[list[int]], places: int, labels: list[Tensor]) -> Batch:
        """Rows as LangVAE reads them: all ``places`` long, their padding predicted too but not counted."""
        tokenizer = self.decoder.part.tokenizer
        pad = tokenizer.eos_token_id
        if model.config.objective == "langvae-0.6":
            targets = [row + [pad] * (places - len(row)) for row in rows]
            counts = [sum(token != pad for token in row) for row in rows]
        else:
            targets = [[*row, pad][: self.decoder.max_len] for row in rows]
            counts = [len(row) for row in targets]
        return Batch(
            **pack(with_start(targets, tokenizer), targets),  # type: ignore[arg-type]
            tokens=torch.tensor(counts), indices=torch.arange(len(rows)), pooled=self.encoder.recode(rows).cpu(),
            annotations=torch.cat(labels, -1).cpu() if labels else None,
        ).to(self.device)  # fmt: skip

    def _sample_gauss(self, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(std)
        return mu + eps * std, eps

    def loss_function(
        self, recon_x: Tensor, x: Any, mu: Tensor, log_var: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, reconstruction and KL of given probabilities ``[B, S, V]``, as LangVAE 0.6.13 adds them up (scalars).

        x: the batch's ``data``. z: not used, as in LangVAE.
        """
        pad = self.decoder.tokenizer.pad_token_id
        rows, places = token_ids(x, pad)
        targets = torch.tensor([row + [pad] * (places - len(row)) for row in rows], device=recon_x.device)
        return langvae_loss(
            recon_x, targets, mu.to(recon_x.device), log_var.to(recon_x.device), pad_token_id=pad, beta=self.cur_beta,
            target_kl=self.target_kl, objective="langvae-0.6",
        )  # fmt: skip

    def encode_z(self, x: Any, c: Mapping[str, Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """A draw from the posterior ``[B, nz]`` and the pooled labels of each kind."""
        encoded = self.encoder(x, c)
        z, _ = self._sample_gauss(encoded.embedding, torch.exp(0.5 * encoded.log_covariance))
        return z, encoded.cvars_embedding

    @torch.no_grad()
    def decode_sentences(self, z: Tensor, cvars_emb: Sequence[Tensor] | None = None) -> list[str]:
        """Greedy sentences of latents ``[B, nz]``: all ``max_len`` tokens, special ones left out, spaces as they are."""
        if not isinstance(z, Tensor) or not torch.isfinite(z).all():
            raise LatentError("z must be a tensor of finite numbers", value=type(z).__name__)
        if cvars_emb and self.decoder.conditional:
            z = torch.cat([z, *cvars_emb], dim=-1)
        ids = self.decoder.greedy(z)
        return self.decoder.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def embed(self, inputs: Any) -> Tensor:
        """A draw of z for a batch's ``data``."""
        return self({"data": inputs}).z

    def reconstruct(self, inputs: Any) -> Tensor:
        """Probabilities ``[B, S, V]`` of a batch's ``data`` decoded from a draw of z."""
        return self({"data": inputs}).recon_x

    def predict(self, inputs: Any) -> ModelOutput:
        """``recon_x`` and ``embedding``: decoded from the posterior mean, and the mean."""
        mu = self.encoder(inputs).embedding
        return ModelOutput(recon_x=self.decoder(mu)["reconstruction"], embedding=mu)

    def update(self) -> None:
        """Called by pythae's trainers after an epoch; nothing is to be done."""

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, dir_path: Any) -> None:
        """Write a folder that LangVAE 0.6.13 and :meth:`load_from_folder` read; replaces one that was written here.

        Raises OutputError: the folder holds anything else, or cannot be written. CheckpointError: a model that has seen no
        batch, or has a part that came from no name or folder.
        """
        projector = self.decoder.projector
        if not self.encoder.started or projector is None:
            raise CheckpointError(
                "the model has no weights yet: their number depends on the data's annotations",
                remedy="run a batch through it first, or ask for model.lmvae",
            )
        contents = LangVAEFolder(
            latent_dim=self.latent_dim, max_len=self.decoder.max_len,
            encoder_path=locate(self.encoder.model_path, "encoder"),
            decoder_path=locate(self.decoder.model_path, "decoder"),
            pooling=self.encoder.automodel_preset["pooling_method"],
            normalize=self.encoder.automodel_preset["normalize"],
            encoder_class=self.encoder.automodel_preset["cls"],
            conditional=self.decoder.conditional, caching=self.encoder.caching,
            posterior_weight=self.encoder.linear.weight.detach(),
            projector_weight=projector.weight.detach(), projector_bias=projector.bias.detach(),
        )  # fmt: skip
        write_folder(contents, dir_path, overwrite=True)

    @classmethod
    def load_from_folder(cls, dir_path: Any) -> LangVAE:
        """A model that LangVAE or :meth:`save` wrote, in evaluation mode. Raises CheckpointError."""
        return cls._of_folder(read_folder(dir_path), "cpu")

    @classmethod
    def _of_folder(cls, contents: LangVAEFolder, device: str) -> LangVAE:
        decoder = SentenceDecoder(
            contents.decoder_path, contents.latent_dim, contents.max_len, contents.conditional, device
        )
        preset = {
            "cls": contents.encoder_class, "pooling_method": contents.pooling, "normalize": contents.normalize
        }  # fmt: skip
        encoder = SentenceEncoder(
            contents.encoder_path, contents.latent_dim, decoder.tokenizer, contents.caching, preset, device
        )
        labels = contents.posterior_weight.shape[1] - encoder.part.width
        if labels < 0:
            raise CheckpointError(
                "encoder.pt was made for another encoder than the one loaded", value=f"{encoder.part.width} features",
                limit=f"at most {contents.posterior_weight.shape[1]}",
            )  # fmt: skip
        encoder.start(labels)
        encoder.load_state_dict(contents.encoder_state)
        decoder.load_state_dict(contents.decoder_state)
        return cls(VAEConfig(latent_dim=contents.latent_dim), encoder, decoder)._with_labels(labels).eval()

    def _with_labels(self, count: int) -> LangVAE:
        self.engine_for({"label": count} if count else {})
        return self

    @classmethod
    def load_from_hf_hub(cls, hf_hub_path: str) -> LangVAE:
        """A model from the Hugging Face hub. Raises CheckpointError where it cannot be had."""
        from huggingface_hub import snapshot_download

        patterns = [*FILES, "encoder_model/*", "decoder_model/*"]
        try:
            folder = snapshot_download(hf_hub_path, allow_patterns=patterns)
        except Exception as error:  # the hub's errors have no common base
            raise CheckpointError(
                f"cannot download {hf_hub_path} from the hub: {error}", remedy="check the name and the connection"
            ) from error
        return cls.load_from_folder(folder)

    def push_to_hf_hub(self, hf_hub_path: str) -> None:
        """Upload what :meth:`save` writes, with a model card, to a repository of the hub, which is made if need be."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save(folder)
            card = CARD.format(
                encoder=self.encoder.model_path, decoder=self.decoder.model_path, latent_dim=self.latent_dim,
                max_len=self.decoder.max_len,
            )  # fmt: skip
            (folder / "README.md").write_text(card, encoding="utf-8")
            api.create_repo(hf_hub_path, exist_ok=True)
            api.upload_folder(repo_id=hf_hub_path, folder_path=folder, commit_message="A LangVAE of lmvae_fast")
