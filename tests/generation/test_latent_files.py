"""Files of latents in every format, and what is no file of latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmvae_fast.errors import DataError, LatentError
from lmvae_fast.generation.latent_files import check_latents, read_latents, write_latents

Z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["z.safetensors", "z.npy", "z.jsonl"])
def test_what_is_written_is_read(tmp_path, name):
    write_latents(tmp_path / name, Z)
    assert check_latents(tmp_path / name, latent_dim=3) == 5
    torch.testing.assert_close(torch.cat(list(read_latents(tmp_path / name, latent_dim=3, block=2, skip=1))), Z[1:])


@pytest.mark.parametrize("value", [Z, {"z": Z, "other": Z + 1}, {"anything": Z}], ids=["tensor", "by name", "only one"])
def test_tensors_that_torch_saved(tmp_path, value):
    torch.save(value, tmp_path / "z.pt")
    torch.testing.assert_close(torch.cat(list(read_latents(tmp_path / "z.pt", latent_dim=3, block=2))), Z)


@pytest.mark.parametrize("header", ["", "a,b,c\n"])
def test_tables_of_numbers(tmp_path, header):
    (tmp_path / "z.csv").write_text(header + "".join(",".join(map(repr, row)) + "\n" for row in Z.tolist()))
    torch.testing.assert_close(torch.cat(list(read_latents(tmp_path / "z.csv", latent_dim=3))), Z)


class Evil:
    def __reduce__(self):
        return (print, ("this code ran",))


@pytest.mark.parametrize(
    "value",
    [{"a": Z, "b": Z}, "text", Z.to_sparse(), Z.to(torch.complex64), Evil()],
    ids=["two", "text", "sparse", "complex", "code"],
)
def test_files_without_plain_latents(tmp_path, value, capsys):
    torch.save(value, tmp_path / "z.pt")
    with pytest.raises(DataError):
        check_latents(tmp_path / "z.pt", latent_dim=3)
    assert "this code ran" not in capsys.readouterr().out


def test_damaged_files(tmp_path):
    (tmp_path / "z.csv").write_text("1,2,3\n1,2\n")
    (tmp_path / "z.pt").write_bytes(b"PK nothing")
    for name in ("z.csv", "z.pt"):
        with pytest.raises(DataError):
            check_latents(tmp_path / name, latent_dim=3)
    np.save(tmp_path / "z.npy", np.zeros((2, 4), np.float32))
    with pytest.raises(LatentError, match="width"):
        check_latents(tmp_path / "z.npy", latent_dim=3)


@pytest.mark.parametrize("header", ["0,1,2", '"0","1","2"'])
def test_the_column_numbers_that_pandas_writes_are_no_latent(tmp_path, header):
    (tmp_path / "z.csv").write_text(f"{header}\n" + "1.5,2.5,3.5\n" * 3)
    with pytest.raises(DataError, match="header=False"):
        check_latents(tmp_path / "z.csv", latent_dim=3)
    (tmp_path / "z.csv").write_text("0.0,1.0,2.0\n" + "1.5,2.5,3.5\n" * 3)
    assert check_latents(tmp_path / "z.csv", latent_dim=3) == 4
