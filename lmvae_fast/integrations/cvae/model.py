"""Folders that the public code of CVAE with G-Skip saved, as our models."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lmvae_fast.config import LMVAEConfig
from lmvae_fast.documents import read_object
from lmvae_fast.errors import CheckpointError
from lmvae_fast.integrations.cvae.names import fused_places, is_unused, place_of
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.systems.cvae import objective_of
from lmvae_fast.pretrained import load_pretrained
from lmvae_fast.text.tokenizer import SentenceTokenizer

logger = logging.getLogger(__name__)


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str],
    padding: str = "masked",
    extra: str | os.PathLike[str] | None = None,
    max_len: int = 36,
    max_prompt_len: int | None = None,
    **overrides: Any,
) -> LMVAE:
    """A model of system ``cvae`` from a folder that the public code saved, in eval mode; Llama or GPT-2.

    Args:
        folder: holds config.json and model.safetensors with ``latent_encoder.*`` and ``latent_decoder.*``.
        base_model: hub name or folder of the decoder that it was made of, for its kind and its tokenizer. Where the folder's
            decoder differs from it (stage 0), the folder's holds.
        padding: ``masked``, or ``released``: as the public Llama encoder was trained, which reads padding.
        extra: a folder with extra.safetensors: parameters that only another variant of the model has.
        max_len, max_prompt_len: tokens kept of a response and of a prompt; the folder does not say. By default prompts may be
            256 long, or what the decoder's positions leave.
        overrides: further fields of :class:`~lmvae_fast.config.LMVAEConfig`.

    Raises:
        CheckpointError: the folder cannot be read, or does not hold exactly this model's parameters.
        ConfigError, UnsupportedDecoderError: what an override or the decoder does not allow.
    """
    folder = Path(folder)
    released, state = _read(folder, extra)
    fields, beta = _fields(released)
    fields.update(encoder_padding=padding, decoder=str(base_model), max_len=max_len, **overrides)
    LMVAEConfig.from_dict(
        {"system": "cvae", **fields}
    )  # an override that does not fit is refused before anything is loaded
    dtype = getattr(torch, fields.setdefault("dtype", "float32"))
    hf_config = load_pretrained(AutoConfig, str(base_model), "decoder")
    decoder_model = load_pretrained(AutoModelForCausalLM, str(base_model), "decoder", dtype=dtype)
    changed = _take_decoder(decoder_model, state)
    if fields["stage"] == 2 and _copies_differ(decoder_model, state):
        logger.warning(
            "%s: its copies of the decoder's embedding and projections are no longer the decoder's, so they are kept as own "
            "parameters (stage=1)", folder,
        )  # fmt: skip
        fields["stage"] = 1
    slots = int(fields["slots"])
    room = getattr(hf_config.get_text_config(decoder=True), "max_position_embeddings", None) or 10**6
    fields["max_prompt_len"] = max(1, min(256, room - slots - max_len)) if max_prompt_len is None else max_prompt_len
    decoder = Decoder(
        decoder_model,
        SentenceTokenizer.load(str(base_model), hf_config, add_prefix_space=False),
        train=fields["stage"] == 0,
        source=None if changed else str(base_model),
    )
    model = LMVAE(LMVAEConfig(system="cvae", **fields), decoder=decoder)
    model.beta = beta
    _fill(model, state, folder)
    return model.eval()


def _read(folder: Path, extra: str | os.PathLike[str] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = read_object(folder / "config.json", error=CheckpointError)
        state = load_file(folder / "model.safetensors")
        if extra is not None:
            state.update(load_file(Path(extra) / "extra.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the CVAE in {folder} ({error})",
            remedy="point to a folder with config.json and model.safetensors",
        ) from error
    if not isinstance(config, dict) or not any(name.startswith("latent_encoder.") for name in state):
        raise CheckpointError(
            f"{folder} holds no CVAE of the public code", limit="latent_encoder.*, latent_decoder.*",
            remedy="load other kinds with LMVAE.from_pretrained or lmvae_fast.integrations.langvae",
        )  # fmt: skip
    return config, state


def _whole(released: dict[str, Any], name: str, default: int) -> int:
    """A whole number of the public code's configuration; CheckpointError for anything else."""
    value = released.get(name, default)
    if not isinstance(value, int):
        raise CheckpointError(
            f"config.json: {name} is no whole number", value=repr(value), limit="as the public code wrote it",
            remedy="restore the folder's config.json",
        )  # fmt: skip
    return int(value)


def _fields(released: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Fields of our configuration that the public code's says, and the weight of the KL."""
    objective, training = objective_of(str(released.get("vae_type", "DG-VAE")))
    fields: dict[str, Any] = {
        "latent_dim": _whole(released, "dim_z", 32),
        "queries": _whole(released, "num_q", 4),
        "slots": _whole(released, "num_p", 4),
        "encoder_layers": _whole(released, "num_latent_encoder_layers", 2),
        **objective,
    }
    skip = _whole(released, "add_skip_connection", 0)
    if released.get("model_type") == "gpt2":
        gskip = _whole(released, "add_ghost_skip_connection", 0)
        fields["stage"] = 1 if released.get("frozen_pretrained", 1) else 0
        fields["contrast"] = bool(released.get("add_contra_loss", 1))
    else:
        gskip = _whole(released, "add_gskip_connection", 1)
        fields["stage"] = _whole(released, "frozen_stage", 2)
    # With both on, G-Skip acts; either's 1 gives the network its norm.
    kind = "gskip" if gskip else "skip" if skip else "none"
    fields["output_residual"] = kind if kind == "none" or 1 in (skip, gskip) else f"{kind}-linear"
    return fields, float(training["beta"])


@torch.no_grad()
def _take_decoder(decoder: PreTrainedModel, state: dict[str, Tensor]) -> bool:
    """Copy the folder's decoder into the base model; whether that changed anything."""
    own = {name.removeprefix("latent_decoder."): value for name, value in state.items() if _of_decoder(name)}
    parameters = dict(decoder.state_dict())
    changed = False
    head: Any = decoder.get_output_embeddings()
    table: Any = decoder.get_input_embeddings()
    given = own.get("lm_head.weight")
    if given is not None and head.weight is table.weight:
        embedded = own.get(_name_of(decoder, table.weight))
        if embedded is not None and not torch.equal(embedded, given):  # trained apart, which a tied head cannot be
            head.weight = nn.Parameter(given.to(table.weight))
            decoder.config.tie_word_embeddings = False
            changed = True
    for name, value in own.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise CheckpointError(
                f"the folder's decoder is not of the base model's kind: {name}", value=list(value.shape),
                limit=list(parameters[name].shape) if name in parameters else "no such parameter",
                remedy="name the base model that it was made of",
            )  # fmt: skip
        if not torch.equal(parameters[name], value.to(parameters[name])):
            parameters[name].copy_(value)
            changed = True
    return changed


_DECODER = ("latent_decoder.model.", "latent_decoder.transformer.", "latent_decoder.lm_head.")


def _of_decoder(name: str) -> bool:
    return name.startswith(_DECODER) and not is_unused(name)


def _name_of(decoder: PreTrainedModel, weight: Tensor) -> str:
    return next(name for name, parameter in decoder.named_parameters() if parameter is weight)


def _copies_differ(decoder: PreTrainedModel, state: dict[str, Tensor]) -> bool:
    """Whether the folder's copies of what stage 2 freezes are other than the decoder's."""
    table: Any = decoder.get_input_embeddings()
    copied = state.get("latent_encoder.embed_tokens.weight")
    if copied is not None and not torch.equal(copied.to(table.weight), table.weight):
        return True
    own = decoder.state_dict()
    for name, value in state.items():
        if name.startswith("latent_decoder.latent_adapters.") and ".self_attn." in name and not is_unused(name):
            of_decoder = own.get(name.replace("latent_decoder.latent_adapters.", "model.layers."))
            if of_decoder is None or not torch.equal(value.to(of_decoder), of_decoder):
                return True
    return False


@torch.no_grad()
def _fill(model: LMVAE, state: dict[str, Tensor], folder: Path) -> None:
    """Copy the folder's tensors in; CheckpointError unless they are exactly what the model has beside its decoder."""
    parameters = dict(model.named_parameters())
    wanted = {name for name in parameters if not name.startswith("decoder.")}
    filled: set[str] = set()
    foreign: list[str] = []
    frozen = model.config.stage == 2
    for name, value in state.items():
        if _of_decoder(name) or is_unused(name):
            continue
        if frozen and (
            "latent_encoder.embed_tokens." in name or (".latent_adapters." in name and ".self_attn." in name)
        ):
            continue  # the decoder's own
        if name.startswith("latent_decoder.skip_connection.") and model.residual is None:
            continue  # of another variant
        place = place_of(name)
        parts = fused_places(name) or ([] if place is None else [(place, lambda tensor: tensor)])
        if not parts:
            foreign.append(name)
        for where, of_file in parts:
            target = None if where.name not in parameters else where.of(parameters[where.name])
            given = of_file(value)
            if target is None or target.numel() != given.numel():
                foreign.append(name)
                continue
            target.copy_(given.reshape(target.shape))
            filled.add(where.name)
    missing = sorted(wanted - filled)
    if missing or foreign:
        raise CheckpointError(
            f"{folder} does not hold this model's parameters",
            value=f"{len(missing)} missing {missing[:3]}, {len(foreign)} foreign {foreign[:3]}",
            remedy="take the base model and the settings that the checkpoint was trained with",
        )
