"""What an Invertible CVAE is, and how its flow is fitted."""

from __future__ import annotations

from dataclasses import dataclass

from lmvae_fast.config.base import ConfigBase
from lmvae_fast.config.run import RunConfig
from lmvae_fast.errors import ConfigError

FLOW_KINDS = ("coupling", "allinone", "glow")
FLOW_ACTIVATIONS = ("relu", "gelu", "silu")
PERMUTATIONS = ("hard", "soft", "none")
BRIDGES = ("auto", "none", "pca", "pad")
BASES = ("posterior", "standard", "cluster")


@dataclass(frozen=True)
class FlowConfig(ConfigBase):
    """The flow from word vectors to a VAE's latents (arXiv 2312.13208; its blocks: arXiv 2305.01713, section 4).

    Attributes:
        kind: of a block: ``coupling`` (the second half conditions, the first is transformed, no clamp; then permutation, then
            ActNorm), or FrEIA's ``allinone`` or ``glow`` (see ``CouplingFlow``).
        blocks: how many.
        hidden: widths of the subnets' hidden layers.
        activation: of the subnets: ``relu``, ``gelu`` or ``silu``.
        permutation: after each coupling: ``hard`` (a random index), ``soft`` (a random rotation) or ``none``.
        clamp: of ``allinone`` and ``glow``; None for their default, 2.
        bridge: how vectors of another width than the latents reach them: ``pca`` (wider ones, onto their leading components),
            ``pad`` (narrower ones, with noise of pad_noise in place of zeros while fitting), ``none`` (refuse), ``auto``.
        pad_noise: standard deviation of what pads; zeros alone would let the density grow without bound in their directions.
        base: density that a word vector is to have under the flow: ``posterior`` (of its gloss), ``standard`` (N(0, I)) or
            ``cluster`` (N(centre of its label's latents, cluster_variance)).
        posterior_sigma: a constant standard deviation in place of the posteriors' own, or None.
        cluster_variance: of the ``cluster`` base: 1 - .6, with the .6 of arXiv 2305.01713.
        conditions: labels that condition the flow (parts of speech, say), in the order of their one-hot code; empty for none.
    """

    kind: str = "coupling"
    blocks: int = 10
    hidden: tuple[int, ...] = (512,)
    activation: str = "relu"
    permutation: str = "hard"
    clamp: float | None = None
    bridge: str = "auto"
    pad_noise: float = 0.1
    base: str = "posterior"
    posterior_sigma: float | None = None
    cluster_variance: float = 0.4
    conditions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (
            ("kind", FLOW_KINDS),
            ("activation", FLOW_ACTIVATIONS),
            ("permutation", PERMUTATIONS),
            ("bridge", BRIDGES),
            ("base", BASES),
        ):
            self._choice(name, allowed)
        self._number("blocks", 1, integer=True)
        self._number("clamp", 0.0, optional=True, open_low=True)
        self._number("pad_noise", 0.0, open_low=True)
        self._number("posterior_sigma", 0.0, optional=True, open_low=True)
        self._number("cluster_variance", 0.0, open_low=True)
        if not isinstance(self.hidden, tuple) or not all(type(width) is int and width >= 1 for width in self.hidden):
            raise ConfigError(
                "FlowConfig.hidden must be widths of hidden layers", value=repr(self.hidden), limit="integers >= 1"
            )
        labels = self.conditions
        if not isinstance(labels, tuple) or not all(isinstance(label, str) and label for label in labels):
            raise ConfigError("FlowConfig.conditions must be labels", value=repr(labels), limit="non-empty strings")
        if len(set(labels)) != len(labels):
            raise ConfigError("FlowConfig.conditions repeat a label", value=labels)
        if self.clamp is not None and self.kind == "coupling":
            raise ConfigError(
                "kind='coupling' has no clamp", value=f"clamp={self.clamp}",
                remedy="leave clamp out, or take kind='allinone' or 'glow'",
            )  # fmt: skip
        if self.posterior_sigma is not None and self.base != "posterior":
            raise ConfigError(
                "posterior_sigma belongs to base='posterior'", value=f"base={self.base!r}", remedy="leave it out"
            )


@dataclass(frozen=True)
class FlowTrainConfig(RunConfig):
    """How a flow is fitted; fields of the same names mean what they mean in TrainConfig.

    Attributes:
        output_dir: folder for checkpoints, metrics, cached posteriors and TensorBoard files.
        epochs, max_steps, batch_size: passes over the pairs, or optimiser steps; pairs per step.
        learning_rate, adam_betas, adam_eps, weight_decay: AdamW.
        schedule, warmup_steps, plateau_patience, plateau_factor: learning rate over time.
        grad_clip: the most that the gradient's norm may be, or None.
        initialize: set ActNorm's scale and offset from the data before the first step.
        eval_every, save_every, log_every: in optimiser steps; None for once an epoch (log: 50).
        early_stop: evaluations without progress before stopping, or None.
        keep_best: leave the flow as it was at its best evaluation instead of as it was at the end.
        keep_checkpoints, resume, cache_dir, seed, tensorboard, progress: as in TrainConfig.
    """

    output_dir: str = "runs/flow"
    epochs: int = 100
    batch_size: int = 256
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    log_every: int = 50
    initialize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flag("initialize")
