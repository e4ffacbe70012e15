"""Files of prompts: line ends, and encodings that are none."""

from __future__ import annotations

import pytest

from lmvae_fast.errors import DataError
from lmvae_fast.generation.latent_sources import read_prompts


@pytest.mark.parametrize(
    "content", [b"a cat\r\n\r\nthe sun\r\n", b"a cat\r\rthe sun\r", b"\xef\xbb\xbfa cat\n\nthe sun"]
)
def test_prompts_of_every_line_end(tmp_path, content):
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "", "the sun"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_prompts_in_utf_16_are_refused(tmp_path, encoding, name):
    (tmp_path / name).write_bytes('"a cat"\n'.encode(encoding))
    with pytest.raises(DataError, match="utf-16"):
        read_prompts(tmp_path / name)
