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
        """Mark what trains, after putting adapters in where they are asked for. Raises ConfigError without ``peft``."""
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


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state as it was before adapters were put in: they are dropped, names are the original ones."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
