"""The published systems, one file each: the preset, what it builds, and its source."""

from lmvae_fast.models.systems.presets import ENCODER_POOLING, PRESETS, RECIPES, resolve

__all__ = ["ENCODER_POOLING", "PRESETS", "RECIPES", "resolve"]
