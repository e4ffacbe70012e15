"""Entry point of ``python -m lmvae_fast.cli``, for launchers such as torchrun."""

from lmvae_fast.cli.app import main

if __name__ == "__main__":
    main()
