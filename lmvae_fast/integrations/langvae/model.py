"""LangVAE checkpoints (neuro-symbolic-ai/LangVAE 0.6) as our models and back, and as the eager reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lmvae_fast.config import DTYPES, LMVAEConfig
from lmvae_fast.errors import CheckpointError
from lmvae_fast.integrations.langvae.files import POOLINGS, LangVAEFolder, read_folder, write_folder
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.frozen_parts import changed
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.projectors import LinearProjector
from lmvae_fast.pretrained import load_pretrained, resolve_source
from lmvae_fast.reference.langvae import ReferenceLangVAE


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    decoder: str | None = None,
    annotations: tuple[str, ...] = (),
    **overrides: Any,
) -> LMVAE:
    """A model of system ``langvae`` from a folder that LangVAE 0.6 saved, in eval mode.

    Args:
        folder: the checkpoint folder; nothing in it is unpickled.
        encoder, decoder: hub names or folders in place of the recorded ``model_path`` (which, when relative, is looked
            for beside the checkpoint and then in the working directory).
        annotations: names of the labels an annotated model was trained with, in the order of its one-hot columns; the
            folder itself does not hold them.
        overrides: further fields of :class:`~lmvae_fast.config.LMVAEConfig`. ``objective="langvae-0.6"`` and
            ``free_running=True`` train as LangVAE does. ``dtype`` defaults to the one the decoder was saved in.
    Raises:
        CheckpointError: a file is missing, corrupt, of another kind, or does not fit the encoder or decoder; it names
            the file, what was found, what was expected and the remedy.
    """
    contents = read_folder(folder, encoder=encoder, decoder=decoder)
    if "dtype" not in overrides:
        saved = load_pretrained(AutoConfig, contents.decoder_path, "decoder").dtype
        name = str(saved).removeprefix("torch.")
        overrides["dtype"] = name if name in DTYPES else "float32"
    config = LMVAEConfig(
        system="langvae",
        encoder=contents.encoder_path,
        decoder=contents.decoder_path,
        latent_dim=contents.latent_dim,
        max_len=contents.max_len,
        pooling=contents.pooling,
        normalize=contents.normalize,
        conditional_decoder=contents.conditional,
        annotations=tuple(annotations),
        **overrides,
    )
    # LangVAE keeps the encoder in fp32 whatever the decoder is held in.
    encoder_dtype = torch.float64 if config.dtype == "float64" else torch.float32
    text_encoder = Encoder.load(
        contents.encoder_path, dtype=encoder_dtype, pooling=contents.pooling, normalize=contents.normalize
    )
    _check_encoder(contents, text_encoder.width, len(config.annotations))
    language_model = Decoder.load(contents.decoder_path, dtype=getattr(torch, config.dtype), add_prefix_space=True)
    _check_decoder(contents, language_model.num_layers, language_model.kv_heads, language_model.head_dim)
    model = LMVAE(config, encoder=text_encoder, decoder=language_model)
    with torch.no_grad():
        model.posterior_head.weight.copy_(contents.posterior_weight)
        projector = _linear_projector(model)
        projector.weight.copy_(contents.projector_weight)
        projector.bias.copy_(contents.projector_bias)
    return model.eval()


def save_checkpoint(model: LMVAE, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a folder that LangVAE 0.6.13 itself loads (``LangVAE.load_from_folder``), atomically.

    The encoder and decoder are referred to by hub name or absolute folder. LangVAE runs on transformers 4.48 only:
    parts that transformers 5 saved, which that version cannot read, are copied into the checkpoint in its terms.

    Args:
        model: a LangVAE: linear projector of ``max_len + 1`` slots, rolling visibility, frozen encoder and decoder.
        overwrite: replace an existing folder.
    Raises:
        CheckpointError: the model is something LangVAE cannot express; names the field.
        OutputError: the folder exists (without ``overwrite``) or cannot be written.
    """
    return write_folder(as_folder(model), folder, overwrite=overwrite)


def as_folder(model: LMVAE) -> LangVAEFolder:
    """What a checkpoint of a model holds. Raises CheckpointError for a model that LangVAE cannot express."""
    config = model.config
    for field, value, limit in (
        ("visibility", config.visibility, ("rolling",)),
        ("projector", config.projector, ("linear",)),
        ("slots", config.slots, (config.max_len + 1,)),
        ("embedding_shift", config.embedding_shift, (False,)),
        ("pooling", config.pooling, POOLINGS),
        ("train_encoder", config.train_encoder, (False,)),
        ("train_decoder", config.train_decoder, (False,)),
        ("encoder_layer", config.encoder_layer, (None,)),
        ("posterior_init", config.posterior_init, ("random",)),  # its head has no bias
        ("start_token", config.start_token, (None,)),
    ):
        if value not in limit:
            raise CheckpointError(
                f"LangVAE cannot express a model with this {field}",
                value=value,
                limit=", ".join(map(str, limit)),
                remedy="save it with model.save_pretrained",
            )
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        if changed(name, part, {}):
            raise CheckpointError(
                f"LangVAE names its parts, and the {name} has other weights than the one it is named after", value=part.source,
                remedy=f"save it as a folder of its own and load the model with {name}=<that folder>; or use "
                "model.save_pretrained",
            )  # fmt: skip
    # AutoModel would give T5's encoder a decoder that wants inputs of its own. (is_encoder_decoder does not tell:
    # T5EncoderModel clears it.)
    network = model.encoder.model
    whole = type(network) is MODEL_MAPPING.get(type(network.config), None)
    projector = _linear_projector(model)
    return LangVAEFolder(
        latent_dim=config.latent_dim,
        max_len=config.max_len,
        encoder_path=locate(model.encoder.source, "encoder"),
        decoder_path=locate(model.decoder.source, "decoder"),
        pooling=str(config.pooling),
        normalize=bool(config.normalize),
        encoder_class="AutoModel" if whole else "AutoModelForTextEncoding",
        conditional=config.conditional_decoder,
        posterior_weight=model.posterior_head.weight.detach(),
        projector_weight=projector.weight.detach(),
        projector_bias=projector.bias.detach(),
    )


def load_reference(
    folder: str | os.PathLike[str],
    *,
    encoder: str | None = None,
    decoder: str | None = None,
    attention: str | None = None,
) -> ReferenceLangVAE:
    """The eager, sequential LangVAE of :mod:`lmvae_fast.reference.langvae` with a checkpoint's weights, in eval mode.

    Args:
        folder: written by LangVAE 0.6 or by :func:`save_checkpoint`.
        encoder, decoder: hub names or folders in place of the recorded ones.
        attention: the decoder's Hugging Face attention implementation (default: its own choice).
    Raises:
        CheckpointError: as :func:`load_checkpoint`.
    """
    contents = read_folder(folder, encoder=encoder, decoder=decoder)
    encoder_class = getattr(transformers, contents.encoder_class)
    encoder_model = load_pretrained(
        encoder_class, contents.encoder_path, "encoder", may_lack=("pooler.",), dtype=torch.float32
    )
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    decoder_model = load_pretrained(AutoModelForCausalLM, contents.decoder_path, "decoder", dtype="auto", **options)
    labels = contents.posterior_weight.shape[1] - encoder_model.config.hidden_size
    _check_encoder(contents, encoder_model.config.hidden_size, labels)
    model = ReferenceLangVAE(
        encoder_model,
        load_pretrained(AutoTokenizer, contents.encoder_path, "encoder tokenizer"),
        decoder_model,
        load_pretrained(AutoTokenizer, contents.decoder_path, "decoder tokenizer", add_prefix_space=True),
        latent_dim=contents.latent_dim,
        max_len=contents.max_len,
        pooling=contents.pooling,
        normalize=contents.normalize,
        annotation_size=labels,
        conditional=contents.conditional,
    )
    _check_decoder(contents, len(model.context_hidden), model.kv_heads, model.head_dim)
    model.load_langvae_state(contents.encoder_state, contents.decoder_state)
    return model.eval()


def _linear_projector(model: LMVAE) -> LinearProjector:
    projector = model.projector
    if not isinstance(projector, LinearProjector):
        raise CheckpointError("LangVAE has a linear projector", value=type(projector).__name__)
    return projector


def _check_encoder(contents: LangVAEFolder, width: int, labels: int) -> None:
    found = contents.posterior_weight.shape[1]
    if found < width:
        raise CheckpointError(
            "encoder.pt was made for a narrower encoder than the one loaded",
            value=f"{width} features",
            limit=f"at most {found}",
            remedy="pass encoder=<the encoder it was trained with>",
        )
    if found != width + labels:
        raise CheckpointError(
            "encoder.pt reads more than this encoder's features: it was trained with annotations or another encoder",
            value=f"{found} inputs",
            limit=f"{width} features + {labels} labels",
            remedy=f"pass annotations=<its {found - width} label names>, or encoder=<the encoder it was trained with>",
        )
    into_projector = contents.projector_weight.shape[2]
    if contents.conditional and into_projector != contents.latent_dim + labels:
        raise CheckpointError(
            "decoder.pt and encoder.pt disagree about the number of labels",
            value=into_projector - contents.latent_dim,
            limit=labels,
            remedy="copy all files from one folder",
        )


def _check_decoder(contents: LangVAEFolder, layers: int, kv_heads: int, head_dim: int) -> None:
    want = (layers, 2 * kv_heads * head_dim * (contents.max_len + 1))
    found = tuple(contents.projector_bias.shape)
    if found != want:
        raise CheckpointError(
            "decoder.pt was made for another decoder than the one loaded",
            value=f"{found[0]} layers of {found[1]} rows",
            limit=f"{want[0]} layers of {want[1]} rows (kv_heads {kv_heads}, head_dim {head_dim})",
            remedy="pass decoder=<the decoder it was trained with>",
        )


def locate(source: str | None, part: str) -> str:
    """A hub name as it is, a folder as an absolute path."""
    if source is None:
        raise CheckpointError(
            f"the {part} came from no folder or hub name that a checkpoint could refer to",
            remedy=f"save the {part} with save_pretrained, load it from there, and save again",
        )
    source = resolve_source(source)
    return str(Path(source).resolve()) if Path(source).is_dir() else source
