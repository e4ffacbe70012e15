"""Which part of a decoder trains: all of it (Optimus), embeddings and head (LlaMaVAE), or low-rank adapters (LoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmvae_fast.errors import CheckpointError, ConfigError
from lmvae_fast.memory import check_memory


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
            widths = sum(sum(module.weight.shape) for module in _linear(model))
            check_memory(f"adapters of rank {self.rank:,}", "lower lora_rank", 4 * self.rank * widths)
            inject_adapter_in_model(LoraConfig(**self._adapter_options(model)), model)  # freezes all but the adapters

    def _adapter_options(self, model: PreTrainedModel) -> dict[str, Any]:
        """What peft is told of the adapters."""
        # GPT-2 keeps its linear weights transposed, which peft asks to be told.
        transposed = any(type(module).__name__ == "Conv1D" for module in _linear(model))
        kind = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return {"r": self.rank, "lora_alpha": self.alpha, "fan_in_fan_out": transposed, **kind}

    def write_adapter(
        self, model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, *, base: str | None
    ) -> None:
        """Store a model's adapters by themselves, as peft loads them onto ``base``; ``state`` is all of the model's."""
        from peft import LoraConfig

        adapters = {name: value.contiguous() for name, value in state.items() if ".lora_" in name}
        # peft stores them without the name of the one set of adapters that is in use
        named = {f"base_model.model.{name.replace('.default.', '.')}": value for name, value in adapters.items()}
        options = self._adapter_options(model)
        options["target_modules"] = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters})
        folder.mkdir(parents=True)
        LoraConfig(**options, base_model_name_or_path=base, inference_mode=True).save_pretrained(str(folder))
        save_file(named, folder / "adapter_model.safetensors")


def _linear(model: PreTrainedModel) -> list[Any]:
    """The layers that adapters are put beside, and the head."""
    return [part for part in model.modules() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"]


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


@torch.no_grad()
def into_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    placed: Mapping[str, str],
    scale: float,
) -> dict[str, Tensor]:
    """The weights, by name, that adapters in ``state`` stand beside, with these added to them.

    module: holds the weights as they were without the adapters, ``parameters`` by name; ``placed``: their names where other
    adapters stand beside them now, by those without. scale: of the adapters' product.
    """
    found = {}
    for name, down in state.items():
        place, _, rest = name.partition(".lora_A.")
        if not rest:
            continue
        held = placed.get(f"{place}.weight", f"{place}.weight")
        up = state.get(f"{place}.lora_B.{rest}")
        if up is None or held not in parameters or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                "the adapters belong to another model",
                value=name,
                remedy="restore configuration and weights from one copy",
            )
        change = scale * (up.double() @ down.double())
        owner = module.get_submodule(held.removesuffix(".weight"))
        change = change.T if type(owner).__name__ == "Conv1D" else change
        weight = parameters[held]
        if change.shape != weight.shape:
            raise CheckpointError(
                f"the adapter beside {held} has another shape", value=list(change.shape), limit=list(weight.shape),
                remedy="restore configuration and weights from one copy",
            )  # fmt: skip
        found[held] = (weight.double() + change.to(weight.device)).to(weight.dtype)
    return found


def merged(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's whole state under the names it had before adapters were put in, each added to the weight it stands beside."""
    plain = without_adapters(dict(state))
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = plain[f"{name}.weight"]
            for adapter in module.lora_A:
                weight = weight + module.get_delta_weight(adapter).detach().to(weight)
            plain[f"{name}.weight"] = weight
    return plain
