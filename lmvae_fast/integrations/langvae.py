"""LangVAE checkpoints (neuro-symbolic-ai/LangVAE 0.6) in and out, and the eager reference on the same files."""

from __future__ import annotations

import os

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmvae_fast.errors import CheckpointError
from lmvae_fast.integrations.langvae_files import LangVAEFolder, read_folder
from lmvae_fast.reference.langvae import ReferenceLangVAE


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
        CheckpointError: as :func:`read_folder`, or the weights do not fit the encoder or decoder loaded.
    """
    contents = read_folder(folder, encoder=encoder, decoder=decoder)
    encoder_class = getattr(transformers, contents.encoder_class)
    # LangVAE's transformers loads encoders in fp32 and is told "auto" for decoders.
    encoder_model = _load(encoder_class, contents.encoder_path, "encoder", dtype=torch.float32)
    options = {} if attention is None else {"attn_implementation": attention}
    decoder_model = _load(AutoModelForCausalLM, contents.decoder_path, "decoder", dtype="auto", **options)
    annotations = contents.posterior_weight.shape[1] - encoder_model.config.hidden_size
    _check_fit(contents, encoder_model.config.hidden_size, decoder_model.config.get_text_config())
    model = ReferenceLangVAE(
        encoder_model,
        _load(AutoTokenizer, contents.encoder_path, "encoder"),
        decoder_model,
        _load(AutoTokenizer, contents.decoder_path, "decoder", add_prefix_space=True),
        latent_dim=contents.latent_dim,
        max_len=contents.max_len,
        pooling=contents.pooling,
        normalize=contents.normalize,
        annotation_size=annotations,
        conditional=contents.conditional,
    )
    model.load_langvae_state(contents.encoder_state, contents.decoder_state)
    return model.eval()


def _load(auto_class, path: str, part: str, **options):
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot load the {part} that the checkpoint names: {str(error).splitlines()[0]}",
            value=path,
            remedy=f"pass {part}=<folder or hub name>",
        ) from error


def _check_fit(contents: LangVAEFolder, encoder_width: int, decoder_config) -> None:
    """The checkpoint's matrices against the encoder and decoder actually loaded."""
    if contents.posterior_weight.shape[1] < encoder_width:
        raise CheckpointError(
            "encoder.pt was made for a narrower encoder than the one loaded",
            value=f"{encoder_width} features",
            limit=f"at most {contents.posterior_weight.shape[1]}",
            remedy="pass encoder=<the encoder it was trained with>",
        )
    heads = decoder_config.num_attention_heads
    kv_heads = getattr(decoder_config, "num_key_value_heads", None) or heads
    head_dim = getattr(decoder_config, "head_dim", None) or decoder_config.hidden_size // heads
    want = (decoder_config.num_hidden_layers, 2 * kv_heads * head_dim * (contents.max_len + 1))
    if tuple(contents.projector_bias.shape) != want:
        raise CheckpointError(
            "decoder.pt was made for another decoder than the one loaded",
            value=f"{contents.projector_bias.shape[0]} layers of {contents.projector_bias.shape[1]} rows",
            limit=f"{want[0]} layers of {want[1]} rows (kv_heads {kv_heads}, head_dim {head_dim})",
            remedy="pass decoder=<the decoder it was trained with>",
        )
