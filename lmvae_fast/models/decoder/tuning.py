"""Which part of a decoder trains: all of it (Optimus), embeddings and head (LlaMaVAE), or low-rank adapters (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lmvae_fast.errors import ConfigError


@dataclass(frozen=True)
class Tuning:
    """What of a decoder trains.

    Attributes:
        part: ``all``; ``embeddings``, the token embedding and the head (arXiv 2312.13208); or ``lora``, adapters of rank
            ``rank`` on every linear layer but the head (arXiv 2106.09685), which start as no change.
        rank, alpha: of the adapters; their product is scaled by alpha / rank.
    """

    part: str = "all"
    rank: int = 8
    alpha: float = 16.0

    def apply(self, model: PreTrainedModel) -> None:
        """Mark what trains, after putting adapters in where they are asked for.

        Raises ConfigError without ``peft``, and for quantised weights, which neither train nor take adapters exactly.
        """
        _refuse_quantised(model, self.part)
        model.requires_grad_(self.part == "all")
        if self.part == "embeddings":
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                module.requires_grad_(True)
        elif self.part == "lora":
            try:
                from peft import LoraConfig, inject_adapter_in_model
            except ImportError as error:
                raise ConfigError(
                    "adapters need the package peft",
                    value="decoder_part='lora'",
                    remedy="pip install 'lmvae_fast[lora]', or choose another decoder_part",
                ) from error
            # GPT-2 keeps its linear weights transposed, which peft asks to be told.
            transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
            options: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "fan_in_fan_out": transposed}
            config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
            inject_adapter_in_model(config, model)  # freezes all but the adapters


def _refuse_quantised(model: PreTrainedModel, part: str) -> None:
    names = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if getattr(model, "is_quantized", False) or names:
        method = getattr(model, "quantization_method", None)
        raise ConfigError(
            "a quantised decoder cannot train, adapters included",
            value=f"decoder_part={part!r} with {method or names[0]}",
            limit="floating-point weights",
            remedy="load it without quantisation (a GGUF file's weights are made float32), or set train_decoder=False",
        )


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state as it was before adapters were put in: they are dropped, names are the original ones."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
