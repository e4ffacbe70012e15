"""An `LMVAE` as transformers takes models: a configuration, a model with a loss by `labels`, saving and uploading."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import CheckpointError, ConfigError, DataError
from lmvae_fast.files import recover_folder
from lmvae_fast.integrations.ours import checked_lmvae
from lmvae_fast.integrations.saving import save_beside
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.serialization import HEADER, MODEL_TYPE, download
from lmvae_fast.text.batch import IGNORED, Batch
from lmvae_fast.text.tokenizer import TokenizedSentences

__all__ = ["MODEL_TYPE", "LMVAEOutputs", "PretrainedLMVAE", "PretrainedLMVAEConfig"]

# What transformers hands to from_pretrained by itself, without effect on our folders: they hold no code, and adapters in
# their own weights. What concerns a download from the hub. What it hands to save_pretrained, without effect again.
_OF_LOADING = ("trust_remote_code", "adapter_kwargs")
_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_OF_SAVING = ("is_main_process", "max_shard_size", "safe_serialization", "token", "variant", "save_peft_format")


class PretrainedLMVAEConfig(PreTrainedConfig):
    """The fields of :class:`~lmvae_fast.config.LMVAEConfig` in one of transformers' configurations.

    Raises ConfigError for a field of another kind.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, **fields: Any):
        ours = {name: fields.pop(name) for name in list(fields) if name in LMVAEConfig.__dataclass_fields__}
        dtype = ours.get("dtype", fields.get("dtype"))
        ours = {**ours, **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")})}
        for name in HEADER:
            if name != "model_type":  # which is transformers' own, too
                fields.pop(name, None)
        # Checked here, and kept apart: transformers gives some of these names a meaning of its own.
        self.lmvae: dict[str, Any] = LMVAEConfig.from_dict(ours).to_dict()
        super().__init__(**fields)
        self.hidden_size = self.lmvae["latent_dim"]

    def lmvae_config(self) -> LMVAEConfig:
        """The configuration of the model."""
        return LMVAEConfig.from_dict(self.lmvae)


@dataclass
class LMVAEOutputs(ModelOutput):
    """``loss`` scalar, with labels; ``mu``, ``logvar`` ``[B, latent_dim]``; with labels also ``reconstruction`` and ``kl``
    ``[B]``, nats."""

    loss: Tensor | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None
    reconstruction: Tensor | None = None
    kl: Tensor | None = None


class PretrainedLMVAE(PreTrainedModel):
    """An :class:`~lmvae_fast.models.lmvae.LMVAE` for transformers' ``Trainer``, ``pipeline`` and ``AutoModel``.

    Args:
        config: its configuration.
        lmvae: the model itself, where it is in memory; ``PretrainedLMVAE.of(model)`` is short for both.

    Attributes:
        lmvae: the model. Its ``beta`` is the weight of the KL; :class:`~lmvae_fast.integrations.hub.BetaSchedule` moves it.
    """

    config_class = PretrainedLMVAEConfig
    base_model_prefix = "lmvae"
    main_input_name = "input_ids"
    _keys_to_ignore_on_save = None

    def __init__(self, config: PretrainedLMVAEConfig, lmvae: LMVAE | None = None):
        super().__init__(config)
        self.lmvae = LMVAE(config.lmvae_config()) if lmvae is None else lmvae
        if self.lmvae.config.prompted:
            raise ConfigError("a model of prompts with responses reads no single texts", value=self.lmvae.config.system)
        if self.lmvae.config.annotations:
            raise ConfigError(
                "a model with annotations needs labels beside texts", value=self.lmvae.config.annotations,
                remedy="use lmvae_fast.LMVAE",
            )  # fmt: skip
        self.all_tied_weights_keys: dict[str, str] = {}  # of the parts, which look after their own

    @classmethod
    def of(cls, lmvae: LMVAE) -> PretrainedLMVAE:
        """A model in memory, sharing its weights. Raises ConfigError for what is no ``LMVAE``."""
        lmvae = checked_lmvae(lmvae, "PretrainedLMVAE.of")
        return cls(PretrainedLMVAEConfig(**lmvae.config.to_dict()), lmvae).train(lmvae.training)

    @property
    def device(self) -> torch.device:
        return self.lmvae.device

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        beta: float | Tensor | None = None,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> LMVAEOutputs | tuple:
        """Posterior of sentences, and with ``labels`` the loss.

        Args:
            input_ids: the decoder's ids int64 ``[B, S]``, padded; attention_mask: 0 on padding, default: none is.
            labels: the same ids with -100 on padding; the loss is that of these sentences.
            beta: weight of the KL, default ``lmvae.beta``.

        Raises:
            DataError: neither ids nor labels, a sentence without tokens, or one that is longer than max_len.
        """
        if unknown and {name for name, value in unknown.items() if value is not None} - {"num_items_in_batch"}:
            raise ConfigError(
                "unknown inputs", value=", ".join(unknown), limit="input_ids, attention_mask, labels, beta"
            )
        if labels is not None:
            rows = [[token for token in row if token != IGNORED] for row in labels.tolist()]
        elif input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            rows = [row[keep].tolist() for row, keep in zip(input_ids, mask.bool(), strict=True)]
        else:
            raise DataError("neither input_ids nor labels", remedy="give ids of the decoder's tokenizer")
        batch = self._batch(rows)
        if labels is None:
            posterior = self.lmvae.encode(batch)
            outputs = LMVAEOutputs(mu=posterior.mu, logvar=posterior.logvar)
        else:
            out = self.lmvae(batch, beta=beta)
            outputs = LMVAEOutputs(
                out.loss, out.mu.detach(), out.logvar.detach(), out.reconstruction.detach(), out.kl.detach()
            )
        return outputs if return_dict in (None, True) else outputs.to_tuple()

    def _batch(self, rows: list[list[int]]) -> Batch:
        model = self.lmvae
        longest = max(map(len, rows), default=0)
        if longest > model.config.max_len or not all(rows):
            raise DataError(
                "sentences must have 1 to max_len tokens", value=f"{min(map(len, rows), default=0)} to {longest}",
                limit=model.config.max_len, remedy="tokenise them with tokenize_columns(model)",
            )  # fmt: skip
        spelled = model.decoder.tokenizer.decode(rows)
        texts = [text.strip() for text in spelled]
        sentences = TokenizedSentences(texts, spelled, rows, None, list(range(len(rows))))
        return model.make_batch(sentences).to(model.device)

    # Files -----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: Any, *_: Any, **options: Any) -> PretrainedLMVAE:  # type: ignore[override]
        """A model that ``save_pretrained`` (of this class or of LMVAE) wrote, from a folder or the hub, in evaluation mode.

        options: fields of LMVAEConfig to change, ``dtype`` (also as a torch.dtype; "auto" keeps the saved one), ``config``
        (a PretrainedLMVAEConfig: what it says otherwise than the folder is changed), ``subfolder``, and of a download
        ``revision``, ``cache_dir``, ``token``, ``local_files_only`` and ``force_download``. Raises ConfigError for any other,
        CheckpointError where there is no such model.
        """
        given, subfolder = options.pop("config", None), options.pop("subfolder", None) or ""
        of_hub = {name: value for name in _OF_THE_HUB if (value := options.pop(name, None)) is not None}
        recover_folder(folder := Path(source))  # what a save that was killed has left
        folder = folder if folder.is_dir() else download(str(source), **of_hub)
        if subfolder and not (folder / subfolder).is_dir():
            raise CheckpointError(f"{source} has no such subfolder", value=subfolder)
        folder = folder / subfolder
        fields = _changed(given, folder)
        for name, value in options.items():
            if name in ("dtype", "torch_dtype"):
                fields |= {} if value in (None, "auto") else {"dtype": str(value).removeprefix("torch.")}
            elif name in LMVAEConfig.__dataclass_fields__:
                fields[name] = value
            elif not name.startswith("_") and name not in _OF_LOADING and value is not None:
                raise ConfigError("from_pretrained cannot honour this", value=f"{name}={value!r}")
        return cls.of(LMVAE.from_pretrained(folder, **fields))

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # type: ignore[override]
        """Write the model as ``LMVAE.save_pretrained`` does; into a folder with other files (a Trainer's) beside them.

        Raises OutputError where a file of that folder would be overwritten that is not a model's of ours; ConfigError for an
        option that cannot be honoured.
        """
        state, push = options.pop("state_dict", None), options.pop("push_to_hub", False)
        odd = {name: value for name, value in options.items() if name not in _OF_SAVING and value}
        if odd or state is not None:
            raise ConfigError("save_pretrained cannot honour this", value=", ".join(odd) or "state_dict")
        save_beside(self.lmvae, Path(save_directory))
        if push:
            self.push_to_hub(Path(save_directory).name)

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, private: bool | None = None, commit_message: str | None = None, **options: Any
    ) -> str:
        """Upload what ``save_pretrained`` writes, with its model card, to a repository, made if need be; returns its address.

        Raises ConfigError for an option that cannot be honoured.
        """
        from huggingface_hub import HfApi

        token = options.pop("token", None)
        if options:
            raise ConfigError("push_to_hub cannot honour this", value=", ".join(options))
        api = HfApi(token=token)
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        with tempfile.TemporaryDirectory() as scratch:
            self.lmvae.save_pretrained(Path(scratch) / "model")
            api.upload_folder(
                repo_id=repo_id, folder_path=Path(scratch) / "model", commit_message=commit_message or "An LMVAE"
            )
        return address

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Also a saved model's tensors, which are named as in LMVAE and hold what trains alone (a Trainer resumes so)."""
        own = {name if name.startswith("lmvae.") else f"lmvae.{name}": value for name, value in state_dict.items()}
        result = super().load_state_dict(own, strict=False, assign=assign)
        trains = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = [name for name in result.missing_keys if name in trains]
        if missing or result.unexpected_keys:
            raise ConfigError(
                "the weights belong to another model",
                value=f"missing {missing[:4]}, unknown {result.unexpected_keys[:4]}",
            )
        return type(result)([], [])


def _changed(given: Any, folder: Path) -> dict[str, Any]:
    """Fields of LMVAEConfig that a configuration has otherwise than the folder's own. Raises ConfigError for another kind."""
    if given is None:
        return {}
    if not isinstance(given, PretrainedLMVAEConfig):
        raise ConfigError("config must be a PretrainedLMVAEConfig", value=type(given).__name__)
    stored = PretrainedLMVAEConfig.from_pretrained(folder, trust_remote_code=False).lmvae
    return {name: value for name, value in given.lmvae.items() if value != stored[name]}
