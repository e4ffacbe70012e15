"""A model of ours in a folder that another framework writes into as well (a trainer's checkpoint)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lmvae_fast.errors import OutputError
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.models.serialization import CONFIG, CONTENTS, check_written, holds_model


def save_beside(model: LMVAE, folder: Path) -> None:
    """Write a model's files into ``folder``, made if need be, beside what is there; files of a model of ours are replaced.

    Raises OutputError where a file would be replaced that is not such a model's.
    """
    if not folder.is_dir() or not set(os.listdir(folder)) - set(CONTENTS):
        model.save_pretrained(folder)
        return
    taken = [name for name in CONTENTS if (folder / name).exists()]
    if taken and not holds_model(folder):
        raise OutputError(
            f"{folder} holds files that a model would replace", value=", ".join(taken), remedy="choose another folder"
        )
    if taken:
        check_written(folder, beside=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        model.save_pretrained(Path(scratch) / "model")
        for name in sorted(taken, key=CONFIG.__ne__):  # the configuration first: what is not whole has none
            os.replace(folder / name, Path(scratch) / name)
        for path in sorted((Path(scratch) / "model").iterdir(), key=_config_last):
            os.replace(path, folder / path.name)


def _config_last(path: Path) -> tuple[bool, str]:
    return path.name == CONFIG, path.name
