"""The command line: ``lmvae-fast``."""

from lmvae_fast.cli.app import main

__all__ = ["main"]
