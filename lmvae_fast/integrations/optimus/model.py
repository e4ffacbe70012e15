"""Checkpoints that Optimus's public code saved, as models of system ``optimus``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.errors import CheckpointError
from lmvae_fast.integrations.optimus.files import OptimusFiles, read_files
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.pretrained import load_pretrained
from lmvae_fast.text.tokenizer import SentenceTokenizer

logger = logging.getLogger(__name__)

#: What the public code adds to GPT-2's tokenizer, in the order of their ids.
SPECIAL_TOKENS: dict[str, Any] = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"}

#: Its block size, where a checkpoint does not record one: sentences of so many tokens, specials included, were dropped.
_BLOCK = 100

# Facts of a configuration that shapes do not show: a wrong one gives another network without a word.
_UNSEEN = {
    "encoder": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
    "decoder": ("n_head", "layer_norm_epsilon"),
}


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    encoder: str = "bert-base-cased",
    decoder: str = "gpt2",
    max_len: int | None = None,
    **overrides: Any,
) -> LMVAE:
    """A model of system ``optimus`` from a checkpoint of the public code, in eval mode; nothing in it runs as code.

    Args:
        folder: holds ``checkpoint-full-N`` or the folders of both halves; or ``training.bin`` itself.
        encoder, decoder: hub names or folders of the BERT and the GPT-2 that it began from: for their tokenizers and kinds.
        max_len: tokens predicted, end token included; default: what fitted the recorded block size, else 98.
        overrides: further fields of :class:`~lmvae_fast.config.LMVAEConfig`. Which injections are on, the KL threshold and
            the length weighting come from the recorded options where there are any; figures count as Optimus counts
            (``count_start_token``).

    Raises:
        CheckpointError: a file is missing, damaged or of another kind, or does not hold exactly the weights of these parts.
        ConfigError, UnsupportedDecoderError, TokenizerError: what an override or a part does not allow.
    """
    files = read_files(folder)
    posterior, memory, embedding = _latent_maps(files)
    fields = _fields(files, latent_dim=posterior.shape[0] // 2, max_len=max_len)
    fields |= {"encoder": str(encoder), "decoder": str(decoder), **overrides}
    config = LMVAEConfig(system="optimus", **fields)
    text_encoder = Encoder(
        _network(AutoModel, str(encoder), "encoder", files.encoder, files.configs, "embeddings.word_embeddings.weight"),
        load_pretrained(AutoTokenizer, str(encoder), "encoder tokenizer"),
        pooling="pooler",
        train=config.train_encoder is not False,
    )
    network = _network(
        AutoModelForCausalLM, str(decoder), "decoder", files.decoder, files.configs, "transformer.wte.weight"
    )
    tokenizer = SentenceTokenizer.load(str(decoder), network.config)
    _add_special_tokens(tokenizer, network.get_input_embeddings())
    language_model = Decoder(network, SentenceTokenizer(tokenizer.tokenizer), train=config.train_decoder is not False)
    model = LMVAE(config, encoder=text_encoder, decoder=language_model)
    with torch.no_grad():
        _copy(model.posterior_head.weight, posterior, "encoder.linear.weight")
        if model.projector is not None:
            _copy(model.projector.weight, memory, "decoder.transformer.linear.weight")
        if model.embedding_shift is not None:
            _copy(model.embedding_shift.weight, embedding, "decoder.transformer.linear_emb.weight")
    return model.eval()


def _latent_maps(files: OptimusFiles) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The posterior's map, the memory's and the embedding's, taken out of the halves. Raises CheckpointError."""
    posterior = files.encoder.pop("linear.weight", None)
    memory = files.decoder.pop("transformer.linear.weight", None)
    embedding = files.decoder.pop("transformer.linear_emb.weight", None)
    if posterior is None or posterior.dim() != 2 or posterior.shape[0] % 2 or (memory is None and embedding is None):
        raise CheckpointError(
            "these are not the halves of an Optimus",
            value=f"encoder.linear.weight {None if posterior is None else list(posterior.shape)}",
            limit="encoder.linear.weight [2 nz, width], decoder.transformer.linear.weight or .linear_emb.weight",
            remedy="plain BERT and GPT-2 folders are given as encoder= and decoder= of a new model",
        )
    return posterior, memory, embedding


def _fields(files: OptimusFiles, *, latent_dim: int, max_len: int | None) -> dict[str, Any]:
    """Fields of our configuration that the recorded options say."""
    said = files.settings
    recorded = said.get("latent_size")
    if recorded is not None and recorded != latent_dim:
        raise CheckpointError(
            "the recorded options are of another model than the weights",
            value=f"latent_size {recorded}",
            limit=latent_dim,
        )
    block = said.get("block_size")
    if max_len is None:
        max_len = (block if isinstance(block, int) and block > 2 else _BLOCK) - 2
        if not (isinstance(block, int) and block > 2):
            logger.warning("the checkpoint records no block size: max_len=%d, as for its published runs", max_len)
    fields: dict[str, Any] = {
        "latent_dim": latent_dim, "max_len": max_len, "latent_init": "normal", "count_start_token": True,
    }  # fmt: skip
    if not said.get("latent_as_gpt_memory", True):
        fields["projector"] = "none"
    if not said.get("latent_as_gpt_emb", True):
        fields["embedding_shift"] = False
    if "length_weighted_loss" in said:
        fields["length_normalize"] = bool(said["length_weighted_loss"])
    if isinstance(said.get("dim_target_kl"), float):
        fields["kl_target"] = said["dim_target_kl"]
    return fields


def _network(
    kind: Any, name: str, part: str, state: dict[str, Tensor], configs: Mapping[str, dict[str, Any]], table: str
) -> PreTrainedModel:
    """The network of a half: of the named model's kind, with the checkpoint's weights. Raises CheckpointError."""
    config = load_pretrained(AutoConfig, name, part)
    for field in _UNSEEN[part]:
        recorded, ours = configs.get(part, {}).get(field), getattr(config, field, None)
        if recorded is not None and recorded != ours:
            raise CheckpointError(
                f"the checkpoint's {part} is of another kind than {name}", value=f"{field}={recorded}", limit=f"{field}={ours}",
                remedy=f"name the model that it began from as {part}=",
            )  # fmt: skip
    if table in state:
        config.vocab_size = state[table].shape[0]
    network = kind.from_config(config).float()
    parameters = dict(network.named_parameters())  # tied ones once
    aliases = set(network.state_dict()) - set(parameters)
    given = {name: value for name, value in state.items() if not _UNUSED.fullmatch(name)}
    missing, foreign = sorted(parameters.keys() - given), sorted(given.keys() - parameters.keys() - aliases)
    misshapen = sorted(n for n, p in parameters.items() if n in given and given[n].shape != p.shape)
    if missing or foreign or misshapen:
        raise CheckpointError(
            f"the checkpoint's {part} is not a {name}",
            value=f"{len(missing)} missing {missing[:3]}, {len(foreign)} foreign {foreign[:3]}, "
            f"{len(misshapen)} of another shape {[(n, list(given[n].shape)) for n in misshapen[:3]]}",
            remedy=f"name the model that it began from as {part}=",
        )
    head = given.get("lm_head.weight")
    if head is not None and "lm_head.weight" not in parameters and not torch.equal(head, given[table]):
        raise CheckpointError(
            "the checkpoint's head is not its token embedding, which Optimus ties", value="decoder.lm_head.weight",
            limit=f"decoder.{table}", remedy="take a checkpoint of the public code",
        )  # fmt: skip
    with torch.no_grad():
        for parameter_name, parameter in parameters.items():
            parameter.copy_(given[parameter_name])
    return network.eval()


# Masks and position numbers that files of some versions carry.
_UNUSED = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|embeddings\.position_ids")


def _add_special_tokens(tokenizer: SentenceTokenizer, table: Any) -> None:
    """Give the tokenizer the tokens that the checkpoint has rows for. Raises CheckpointError where the sizes do not fit."""
    own, rows = tokenizer.tokenizer, table.weight.shape[0]
    added = [token for token in SPECIAL_TOKENS.values() if token not in own.get_vocab()]
    if len(own) + len(added) == rows:
        own.add_special_tokens(SPECIAL_TOKENS)
    if len(own) != rows:
        raise CheckpointError(
            "the decoder's tokenizer does not fit the checkpoint's token embedding", value=f"{len(own)} tokens",
            limit=f"{rows} rows, {len(SPECIAL_TOKENS)} of them {', '.join(SPECIAL_TOKENS.values())}",
            remedy="name the model that it began from as decoder=",
        )  # fmt: skip


def _copy(parameter: Any, value: Tensor | None, name: str) -> None:
    if value is None or value.shape != parameter.shape:
        raise CheckpointError(
            f"{name} does not fit", value="missing" if value is None else list(value.shape), limit=list(parameter.shape),
            remedy="name the models that it began from as encoder= and decoder=",
        )  # fmt: skip
    parameter.copy_(value)
