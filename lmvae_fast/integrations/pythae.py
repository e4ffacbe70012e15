"""pythae 0.1.2: one of our models as a `BaseAE`, for its samplers, pipelines and callbacks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmvae_fast.errors import CheckpointError, ConfigError, DataError
from lmvae_fast.integrations.ours import checked_lmvae
from lmvae_fast.integrations.saving import save_beside
from lmvae_fast.integrations.versions import warn_outside
from lmvae_fast.models.free_running import greedy_ids
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.serialization import holds_model
from lmvae_fast.optional import require
from lmvae_fast.text.tokenizer import TokenizedSentences

# A module that the stand-in of integrations.langvae.install() does not have.
require("pythae.models.base.base_model", purpose="pythae's view of a model", extra="pythae")
from pythae.data.datasets import BaseDataset, DatasetOutput  # noqa: E402 (after it is asked for)
from pythae.models import VAE, VAEConfig  # noqa: E402
from pythae.models.base.base_utils import ModelOutput  # noqa: E402
from pythae.models.nn import BaseDecoder, BaseEncoder  # noqa: E402

warn_outside("pythae", "0.1.2", "0.1.3")


def as_pythae(model: LMVAE) -> PythaeLMVAE:
    """A model of sentences as pythae's ``VAE`` (a ``BaseAE``), sharing its weights.

    An input is a row of the decoder's token ids ``[B, max_len]``, padded with the end token, as ``sentences(model, texts)``
    makes them; a reconstruction is such a row. So are what samplers return: ``texts(model, ids)`` spells them.

    Raises ConfigError for a model of prompts or with annotations, or what is no ``LMVAE``.
    """
    return PythaeLMVAE(model)


def sentences(model: LMVAE, texts: Sequence[str]) -> BaseDataset:
    """A dataset of pythae: ``data`` int64 ids ``[N, max_len]`` padded with the end token, ``labels`` ones.

    Raises DataError for an empty sentence.
    """
    end, most = model.decoder.tokenizer.eos_token_id, model.config.max_len
    rows = model.tokenize(texts, on_empty="error").ids
    return _Ids(torch.tensor([row + [end] * (most - len(row)) for row in rows]))


def texts(model: LMVAE, ids: Tensor) -> list[str]:
    """The sentences that rows of ids ``[N, steps]`` spell, up to their first end token, without outer spaces."""
    return [text.strip() for text in model.decoder.tokenizer.decode(_until_end(row, model) for row in ids.tolist())]


class _Ids(BaseDataset):
    """pythae's own dataset makes everything floats."""

    def __init__(self, ids: Tensor):
        self.data, self.labels = ids, torch.ones(len(ids))

    def __getitem__(self, index: Any) -> DatasetOutput:
        return DatasetOutput(data=self.data[index], labels=self.labels[index])


class _Encoder(BaseEncoder):
    """Ids ``[B, max_len]`` to ``embedding`` (mu) and ``log_covariance``."""

    def __init__(self, model: LMVAE):
        BaseEncoder.__init__(self)
        self.latent_dim = model.config.latent_dim
        self._model = [model]  # in a list: no child of this part

    def forward(self, x: Tensor) -> ModelOutput:
        model = self._model[0]
        posterior = model.encode(model.make_batch(rows_of(model, x)).to(model.device))
        return ModelOutput(embedding=posterior.mu, log_covariance=posterior.logvar)


class _Decoder(BaseDecoder):
    """Latents to ``reconstruction``: greedy ids int64 ``[B, max_len]``, the end token from the end on."""

    def __init__(self, model: LMVAE):
        BaseDecoder.__init__(self)
        self._model = [model]  # in a list: no child of this part

    @torch.no_grad()
    def forward(self, z: Tensor) -> ModelOutput:
        model = self._model[0]
        end, most = model.decoder.tokenizer.eos_token_id, model.config.max_len
        chunks = z.to(model.device).split(256)
        ids = torch.cat([greedy_ids(model.decoder, model.inject(part, tokens=most), most) for part in chunks])
        return ModelOutput(reconstruction=ids.masked_fill((ids == end).cumsum(1) > 0, end))


class _Output(ModelOutput):
    """pythae's output; ``recon_x`` is decoded when it is looked at."""

    def __getattr__(self, name: str) -> Any:
        if name != "recon_x" or "_decode" not in vars(self):
            raise AttributeError(name)
        self["recon_x"] = vars(self)["_decode"]()
        return self["recon_x"]

    def __getitem__(self, key: Any) -> Any:
        return self.recon_x if key == "recon_x" and key not in self else super().__getitem__(key)


class PythaeLMVAE(VAE):
    """See :func:`as_pythae`. ``lmvae`` is the model; its ``beta`` weighs the KL in training."""

    def __init__(self, lmvae: LMVAE):
        lmvae = checked_lmvae(lmvae, "as_pythae")
        if lmvae.config.prompted or lmvae.config.annotations:
            raise ConfigError(
                "pythae's models read one tensor, a sentence", value=f"system={lmvae.config.system!r}, "
                f"annotations={lmvae.config.annotations}", limit="a model of sentences without annotations",
            )  # fmt: skip
        config = VAEConfig(input_dim=(lmvae.config.max_len,), latent_dim=lmvae.config.latent_dim)
        super().__init__(config, _Encoder(lmvae), _Decoder(lmvae))
        config.uses_default_encoder = config.uses_default_decoder = False
        self.lmvae = lmvae
        self.model_name = "PythaeLMVAE"
        self.device = lmvae.device
        self.train(lmvae.training)

    def __deepcopy__(self, memo: dict) -> PythaeLMVAE:
        """A copy of what trains (pythae keeps one of its best model); frozen parts are shared."""
        for part in (self.lmvae.encoder, self.lmvae.decoder):
            if not part.trains:
                memo[id(part)] = part
        return PythaeLMVAE(copy.deepcopy(self.lmvae, memo))

    def forward(self, inputs: Mapping[str, Any], **kwargs: Any) -> ModelOutput:
        """``loss``, ``recon_loss``, ``reg_loss`` (scalars; the first has a graph), ``z``, and ``recon_x``, greedy ids."""
        model = self.lmvae
        out = model(model.make_batch(rows_of(model, inputs["data"])).to(model.device))
        output = _Output(recon_loss=out.reconstruction.mean(), reg_loss=out.kl.mean(), loss=out.loss, z=out.z.detach())
        z = out.z.detach()
        object.__setattr__(output, "_decode", functools.partial(_reconstruction, self.decoder, z))
        return output

    def save(self, dir_path: str) -> None:
        """Write our model's files beside what is there: pythae's own format pickles parts, which is never done here."""
        save_beside(self.lmvae, Path(dir_path))

    @classmethod
    def load_from_folder(cls, dir_path: str) -> PythaeLMVAE:
        """What :meth:`save` wrote. Raises CheckpointError for a folder of pythae's own, which would have to be unpickled."""
        if not holds_model(Path(dir_path)):
            raise CheckpointError(
                f"{dir_path} is no model folder of lmvae_fast", limit="one that save wrote (pickles are never loaded)"
            )
        return cls(LMVAE.from_pretrained(dir_path))


def register() -> None:
    """Let pythae's ``AutoModel.load_from_folder`` read our folders too; its own it reads as before."""
    from pythae.models import AutoModel

    before = AutoModel.load_from_folder
    if getattr(before, "__self__", None) is PythaeLMVAE or getattr(AutoModel, "_lmvae_fast", False):
        return

    def load_from_folder(cls: Any, dir_path: str) -> Any:
        return PythaeLMVAE.load_from_folder(dir_path) if holds_model(Path(dir_path)) else before(dir_path)

    AutoModel.load_from_folder = classmethod(load_from_folder)
    AutoModel._lmvae_fast = True


def _reconstruction(decoder: nn.Module, z: Tensor) -> Tensor:
    return decoder(z).reconstruction


def _until_end(row: list[int], model: LMVAE) -> list[int]:
    end = model.decoder.tokenizer.eos_token_id
    return row[: row.index(end)] if end in row else row


def rows_of(model: LMVAE, data: Any) -> TokenizedSentences:
    """Sentences of ids ``[B, S]`` (whole numbers, also as floats: pythae makes everything floats), up to their end token.

    Raises DataError for anything else, or a sentence without tokens.
    """
    if not isinstance(data, Tensor) or data.dim() != 2 or bool((data != data.round()).any()):
        raise DataError(
            "an input must be rows of the decoder's token ids", value=getattr(data, "shape", type(data).__name__),
            limit="[batch, max_len]", remedy="make them with lmvae_fast.integrations.pythae.sentences(model, texts)",
        )  # fmt: skip
    ids = [_until_end(row, model) for row in data.long().tolist()]
    most, vocabulary = model.config.max_len, model.decoder.vocab_size
    for number, row in enumerate(ids):
        if not row or len(row) > most or min(row) < 0 or max(row) >= vocabulary:
            raise DataError(
                f"row {number} is no sentence of this model", value=row[:8],
                limit=f"1 to {most} ids below {vocabulary}, then the end token",
            )  # fmt: skip
    spelled = model.decoder.tokenizer.decode(ids)
    return TokenizedSentences([text.strip() for text in spelled], spelled, ids, None, list(range(len(ids))))
