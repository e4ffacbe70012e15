"""What LangVAE's classes take and give: configurations and outputs with the names and fields of pythae 0.1.2."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lmvae_fast.errors import ConfigError


@dataclass
class VAEConfig:
    """A VAE's configuration, with the fields of pythae's ``VAEConfig``.

    Attributes:
        input_dim: shape of an input; must stay None, since sentences have none.
        latent_dim: width nz of the latent.
        uses_default_encoder, uses_default_decoder: set to False by LangVAE, which is always given both.
        reconstruction_loss: must stay "mse"; LangVAE has a loss of its own.
        name: of the class, in files.
    """

    input_dim: tuple[int, ...] | None = None
    latent_dim: int = 10
    uses_default_encoder: bool = True
    uses_default_decoder: bool = True
    reconstruction_loss: str = "mse"
    name: str = field(init=False, default="VAEConfig")

    def to_dict(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


def checked_latent_dim(config: Any) -> int:
    """The latent width of a ``VAEConfig``, ours or pythae's. Raises ConfigError for a field that cannot be honoured."""
    latent_dim = getattr(config, "latent_dim", None)
    if not isinstance(latent_dim, int) or isinstance(latent_dim, bool) or latent_dim < 1:
        raise ConfigError(
            "model_config must have a latent_dim",
            value=repr(config)[:200],
            limit="VAEConfig(latent_dim=...), an integer >= 1",
            remedy="use pythae's VAEConfig, or lmvae_fast.integrations.langvae.VAEConfig",
        )
    for name, only in (("input_dim", None), ("reconstruction_loss", "mse")):
        value = getattr(config, name, only)
        if value != only:
            raise ConfigError(
                f"model_config.{name} means nothing for sentences",
                value=repr(value),
                limit=repr(only),
                remedy=f"leave {name} out",
            )
    return latent_dim


class _Fields(OrderedDict):
    """An ordered dictionary whose items are attributes too, and which an integer indexes as a tuple.

    A value may be given as a :class:`Later`, and is then computed when it is first asked for.
    """

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return tuple(self.values())[key]
        value = super().__getitem__(key)
        if isinstance(value, Later):
            value = value.make()
            super().__setitem__(key, value)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self)}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self[name] = value

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (the dictionary's own knows nothing of Later)

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]

    def to_tuple(self) -> tuple[Any, ...]:
        """All values, in their order."""
        return tuple(self.values())


@dataclass(frozen=True)
class Later:
    """A field that is costly and seldom looked at: ``make`` computes it."""

    make: Callable[[], Any]


class ModelOutput(_Fields):
    """What a model returns: ``output.loss`` is ``output["loss"]``."""


class DatasetOutput(_Fields):
    """What a dataset or a collated batch holds: ``batch.data`` is ``batch["data"]``."""


class TrainingCallback:
    """What watches a run of LanguageTrainingPipeline: override what is needed; pythae's own callbacks serve as well.

    Every event gets the training configuration, and by name ``model`` and what the event knows (``epoch``, ``logs`` ...).
    """

    def on_train_begin(self, training_config: Any, **kwargs: Any) -> None:
        """Before the first step."""

    def on_train_end(self, training_config: Any, **kwargs: Any) -> None:
        """After the last."""

    def on_epoch_begin(self, training_config: Any, **kwargs: Any) -> None:
        """Before an epoch: ``epoch``, from 1."""

    def on_epoch_end(self, training_config: Any, **kwargs: Any) -> None:
        """After an epoch and its evaluation."""

    def on_train_step_begin(self, training_config: Any, **kwargs: Any) -> None:
        """Before the steps of an epoch: ``epoch``, ``train_loader`` (its length is the number of steps)."""

    def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
        """After a step."""

    def on_eval_step_begin(self, training_config: Any, **kwargs: Any) -> None:
        """Before an evaluation: ``epoch``, ``eval_loader`` (its length is 1)."""

    def on_eval_step_end(self, training_config: Any, **kwargs: Any) -> None:
        """After an evaluation."""

    def on_save(self, training_config: Any, **kwargs: Any) -> None:
        """After a checkpoint."""

    def on_log(self, training_config: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """After an epoch: ``logs`` has ``train_epoch_loss`` and, with evaluation data, ``eval_epoch_loss``."""


class TensorBoardCallback(TrainingCallback):
    """The losses of every epoch as ``Loss/train_joint`` and ``Loss/eval_joint`` for TensorBoard, in ``runs/``.

    label: of the run. Raises MissingPackageError without tensorboard.
    """

    def __init__(self, label: str = ""):
        from lmvae_fast.optional import require

        tensorboard = require("torch.utils.tensorboard", purpose="TensorBoardCallback", extra="train")
        self._writer = tensorboard.SummaryWriter(comment=f"::{label}")
        self._epochs = 0

    def on_log(self, training_config: Any, logs: dict[str, float], **kwargs: Any) -> None:
        for name, tag in (("train_epoch_loss", "Loss/train_joint"), ("eval_epoch_loss", "Loss/eval_joint")):
            if logs.get(name) is not None:
                self._writer.add_scalar(tag, logs[name], self._epochs)
        self._writer.flush()
        self._epochs += 1

    def on_train_end(self, training_config: Any, **kwargs: Any) -> None:
        self._writer.close()
