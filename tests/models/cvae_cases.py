"""What the tests of system cvae share: a few prompts, eager twins, and their folders as the public code would save them."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from lmvae_fast.data import PromptResponse
from lmvae_fast.integrations.cvae import load_checkpoint
from lmvae_fast.reference.cvae import ReferenceCVAE
from lmvae_fast.reference.cvae_parts import CVAESettings
from lmvae_fast.testing import perturbed, tiny_decoder, tiny_tokenizer

ITEMS = [
    PromptResponse("the sun is", " a star"), PromptResponse("the sun is", " a kind of light to live"),
    PromptResponse("the sun is", " food"), PromptResponse("the sun is", " an object"),
]  # fmt: skip
OTHERS = [PromptResponse("plants need", " water"), PromptResponse("plants need", " light to grow and food")]


def twin(family="llama", **settings):
    """An eager CVAE with parameters that are no longer as they begin."""
    tokenizer = tiny_tokenizer()
    decoder = tiny_decoder(family, vocab_size=len(tokenizer))
    defaults = {"latent_dim": 8, "queries": 2, "slots": 3, "stage": 1}
    model = perturbed(lambda: ReferenceCVAE(decoder, tokenizer, CVAESettings(**{**defaults, **settings})), seed=3)
    model.max_response = 9
    return model


def released(model, folder):
    """The folders of base model and CVAE that the public code would have saved of an eager twin."""
    settings, config = model.settings, model.config
    base, saved = folder / "base", folder / "cvae"
    family = config.model_type
    tiny_decoder(family, vocab_size=config.vocab_size).save_pretrained(base)
    model.tokenizer.save_pretrained(base)
    own = {
        "num_q": settings.queries, "dim_z": settings.latent_dim, "num_p": settings.slots, "vae_type": settings.vae_type,
        "num_latent_encoder_layers": settings.encoder_layers, "add_skip_connection": settings.skip,
    }  # fmt: skip
    if family == "gpt2":
        own |= {
            "frozen_pretrained": settings.stage, "add_contra_loss": int(settings.contrast),
            "add_ghost_skip_connection": settings.gskip,
        }  # fmt: skip
    else:
        own |= {"frozen_stage": settings.stage, "add_gskip_connection": settings.gskip}
    saved.mkdir(parents=True)
    (saved / "config.json").write_text(json.dumps({**config.to_dict(), **own}, default=str))
    save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, saved / "model.safetensors")
    return saved, base


def both(tmp_path, family="llama", padding="masked", **settings):
    """An eager twin and the fast model with its parameters, loaded from its folder."""
    eager = twin(family, padding=padding, **settings)
    saved, base = released(eager, tmp_path)
    return eager, load_checkpoint(saved, base_model=base, padding=padding, max_len=9, max_prompt_len=64)


def noise_for(batch, latent_dim=8):
    size, length = batch.input_ids.shape
    counts = {"z": 1, "emb": 1, "skip": 32, "kl": 16, "bow": length}
    return {name: torch.randn(size, latent_dim, count) for name, count in counts.items()}


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()
