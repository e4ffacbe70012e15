"""The whole model: losses against their formulas, options, bad input, memory."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import lmvae_fast as lf
from lmvae_fast.data import Example
from lmvae_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LatentError,
    TokenizerError,
    UnsupportedDecoderError,
)
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder, pool
from lmvae_fast.testing import SENTENCES, make_decoder, make_model, tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.testing.mapped_types import tiny_model
from lmvae_fast.text.tokenizer import SentenceTokenizer

TEXTS = ["a cat is a kind of animal", "dogs eat meat", "water boils", "the sun is a star"]


def test_loss_is_its_formula():
    model = make_model("gpt2", dtype=torch.float64, max_len=30).eval()
    sentences = model.tokenize(TEXTS)
    batch = model.make_batch(sentences)
    eps = torch.randn(4, 6, dtype=torch.float64)
    out = model(batch, beta=0.3, eps=eps)
    z = out.mu + eps * torch.exp(0.5 * out.logvar)
    torch.testing.assert_close(out.z, z)
    kl = 0.5 * (out.mu**2 + out.logvar.exp() - out.logvar - 1).sum(1)
    kl = torch.where(kl > 2.0, kl, 0.0)
    torch.testing.assert_close(out.kl, kl)
    nll = model.score(batch, z)
    torch.testing.assert_close(out.reconstruction, nll)
    torch.testing.assert_close(out.loss, (nll + 0.3 * kl).mean())
    assert out.tokens.tolist() == [len(ids) + 1 for ids in sentences.ids]
    # A sentence alone has the same figures as in the batch: nothing leaks between packed neighbours.
    for row in range(4):
        alone = model(model.make_batch(sentences, [row]), beta=0.3, eps=eps[row : row + 1])
        torch.testing.assert_close(alone.reconstruction[0], out.reconstruction[row])


def test_length_normalised_loss_and_beta_attribute():
    model = make_model("gpt2", dtype=torch.float64, length_normalize=True, kl_mode="sum").eval()
    model.beta = 0.25
    eps = torch.zeros(4, 6, dtype=torch.float64)
    out = model(TEXTS, eps=eps)
    batch = model.make_batch(model.tokenize(TEXTS))
    expected = (model.score(batch, out.mu) / batch.tokens + 0.25 * out.kl).mean()
    torch.testing.assert_close(out.loss, expected)
    assert out.beta == 0.25


@pytest.mark.parametrize("options", [
    {}, {"visibility": "prefix", "slots": 4}, {"visibility": "interleaved"}, {"projector": "mlp"},
    {"embedding_shift": True}, {"projector": "none", "visibility": "prefix", "embedding_shift": True},
    {"system": "optimus"}, {"system": "optimus", "train_encoder": False, "train_decoder": False},
    {"free_running": True}, {"free_running": True, "objective": "langvae-0.6"}, {"kl_mode": "free_bits", "kl_target": 0.1},
])  # fmt: skip
def test_every_trained_parameter_gets_a_gradient(options):
    model = make_model("llama", **options).train()
    out = model(TEXTS, beta=1.0)
    out.loss.backward()
    missing = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not missing
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.grad is not None)
    assert all(value.grad is None for value in model.parameters() if not value.requires_grad)
    assert len(model.decode(out.z.detach())) == 4


@pytest.mark.parametrize("family", ["bert", "t5", "qwen2"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_encoders_ignore_padding(family, pooling):
    encoder = Encoder(tiny_encoder(family, vocab_size=320), tiny_tokenizer(), pooling=pooling, normalize=True)
    together = encoder(*encoder.tokenize(TEXTS))
    alone = torch.cat([encoder(*encoder.tokenize([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))


def test_pooling_by_hand():
    hidden, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    torch.testing.assert_close(pool(hidden, mask, "mean")[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(pool(hidden, mask, "last"), torch.stack([hidden[0, 1], hidden[1, 2]]))
    torch.testing.assert_close(pool(hidden, mask, "cls"), hidden[:, 0])


def test_pooled_features_give_the_same_loss():
    model = make_model("gpt2").eval()
    sentences = model.tokenize(TEXTS)
    pooled = model.pool(sentences, batch_size=3)
    eps = torch.randn(2, 6)
    a = model(model.make_batch(sentences, [2, 0], pooled), beta=1.0, eps=eps)
    b = model(model.make_batch(sentences, [2, 0]), beta=1.0, eps=eps)
    torch.testing.assert_close(a.loss, b.loss)


def test_annotations_reach_encoder_and_decoder():
    labels = ("ARG0", "V", "ARG1")
    model = make_model("gpt2", annotations=labels, conditional_decoder=True, max_len=12).eval()
    examples = [Example("dogs eat meat", ("ARG0", "V", "ARG1")), Example("dogs eat meat", ("ARG1", "V", "ARG0"))]
    batch = model.make_batch(model.tokenize(examples))
    weights = torch.linspace(0.1, 1, 12) / 12
    torch.testing.assert_close(batch.annotations[0], weights[:3])
    torch.testing.assert_close(batch.annotations[1], weights[[2, 1, 0]])
    out = model(batch, beta=0.0, eps=torch.zeros(2, 6))
    assert not torch.equal(out.mu[0], out.mu[1])
    same_z = model.score(batch, torch.zeros(2, 6))
    assert same_z[0] != same_z[1]
    assert len(model.decode(out.z, annotations=batch.annotations)) == 2
    with pytest.raises(LatentError, match="labels"):
        model.decode(out.z)
    with pytest.raises(DataError, match="unknown label"):
        model.tokenize([Example("dogs eat", ("ARG0", "VERB"))])
    with pytest.raises(DataError, match="no labels"):
        model.tokenize(["dogs eat"])


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation made, in elements."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().size() < 2**40:
                self.largest = max(self.largest, tensor.untyped_storage().size() // max(tensor.element_size(), 1))
        return out


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_no_tensor_of_tokens_times_vocabulary_in_a_training_step(kernels):
    vocabulary = 40_000
    torch.manual_seed(0)
    config = lf.LMVAEConfig(latent_dim=4, max_len=16)
    _, decoder = make_decoder("gpt2", vocab_size=vocabulary, layers=1)
    encoder = Encoder(tiny_encoder("bert", vocab_size=320), tiny_tokenizer())
    model = lf.LMVAE(config, encoder=encoder, decoder=decoder).train()
    batch = model.make_batch(model.tokenize(["the cats and the dogs eat meat"] * 16))
    assert batch.num_tokens > 100
    with lf.backend(kernels), _LargestTensor() as seen:
        model(batch, beta=1.0).loss.backward()
    # The head's own weight has vocabulary * 32 elements; one chunk of 32 tokens as many; all tokens would be more.
    assert seen.largest <= 32 * vocabulary < batch.num_tokens * vocabulary


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=320)), "Mamba"),
        (lambda: tiny_model("diffllama"), "more than once"),
        (lambda: tiny_model("doge"), "mask of its own"),
        (lambda: tiny_model("gemma3n_text"), "keys and values of others"),
        (lambda: tiny_model("deepseek_v32"), "index of its own"),
        (lambda: tiny_model("lfm3"), "conv"),
        (lambda: tiny_model("xlnet"), "permutation mask"),
        (lambda: hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)), "T5"),
        (lambda: _llama_that_ignores_positions(), "position ids"),
        (lambda: _llama_with_a_layer_of_kind("chunked_attention"), "chunked_attention"),
        (lambda: _llama_with_a_layer_of_kind("sliding_attention"), "sliding_attention"),
    ],
)  # fmt: skip
def test_decoders_that_we_would_compute_wrong_are_refused(model, message):
    with pytest.raises(UnsupportedDecoderError, match=message):
        Decoder(model().eval(), SentenceTokenizer(tiny_tokenizer()))


def _llama_that_ignores_positions():
    model = tiny_decoder("llama", vocab_size=320)
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotary(x, torch.arange(x.shape[1])[None])
    return model


def _llama_with_a_layer_of_kind(kind):
    model = tiny_decoder("llama", vocab_size=320)
    model.config.layer_types = ["full_attention", "full_attention", kind]
    return model


def test_a_decoder_outside_lmvae_says_whose_it_is():
    model, _ = make_decoder("gpt2")
    with pytest.raises(UnsupportedDecoderError, match="set_attn_implementation"):
        model(torch.tensor([[1, 2]]))


def test_tokenizers_without_an_end_are_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="eos_token"):
        SentenceTokenizer(tokenizer)
    assert SentenceTokenizer(tokenizer, eos_token_id=[2, 5]).eos_token_id == 2
    tokenizer.pad_token = None
    with pytest.raises(TokenizerError, match="pad_token"):
        Encoder(tiny_encoder("bert", vocab_size=320), tokenizer)
    with pytest.raises(ConfigError, match="no pooler"):
        Encoder(tiny_encoder("t5", vocab_size=320), tiny_tokenizer(), pooling="pooler")


def test_sentences_too_long_empty_or_unknown():
    model = make_model("gpt2", max_len=5)
    long = "the cat and the dog and the bird"
    report = {"kept": 2, "truncated": 1, "dropped": 0, "empty": 0, "without_end": 1}  # "dogs" has five tokens
    assert model.tokenize([long, "dogs"]).report == report
    dropped = model.tokenize([long, "", "dogs"], on_long="drop")
    assert dropped.report == report | {"kept": 1, "truncated": 0, "dropped": 1, "empty": 1}
    assert dropped.source_rows == [2]
    with pytest.raises(DataError, match="on_long"):
        model.tokenize([long], on_long="error")
    with pytest.raises(DataError, match="no sentence is left"):
        model.tokenize([long], on_long="drop")
    with pytest.raises(DataError, match="sentence 1 is empty"):
        model.encode(["dogs", " "])
    with pytest.raises(DataError, match="no sentences"):
        model.tokenize([])
    with pytest.raises(DataError, match="list"):
        model.tokenize("dogs")
    with pytest.raises(DataError, match="row 1 is no sentence"):
        model.tokenize(["dogs", 3])
    small = make_model("gpt2")
    small.decoder.vocab_size = 10
    with pytest.raises(DataError, match="does not know"):
        small.tokenize(["dogs"])


def test_contradictory_parts_are_refused():
    _, decoder = make_decoder("gpt2", train=True)
    encoder = Encoder(tiny_encoder("bert", vocab_size=320), tiny_tokenizer())
    with pytest.raises(ConfigError, match="disagree"):
        lf.LMVAE(lf.LMVAEConfig(latent_dim=4, max_len=9), encoder=encoder, decoder=decoder)
    _, frozen = make_decoder("gpt2")
    with pytest.raises(ConfigError, match="pooling='cls'"):
        lf.LMVAE(lf.LMVAEConfig(latent_dim=4, max_len=9, pooling="cls"), encoder=encoder, decoder=frozen)
    _, decoder = make_decoder("gpt2", max_positions=8)
    with pytest.raises(ConfigError, match="8 positions"):
        lf.LMVAE(lf.LMVAEConfig(latent_dim=4, max_len=9), encoder=encoder, decoder=decoder)
    _, decoder = make_decoder("mistral", window=4)
    with pytest.raises(UnsupportedDecoderError, match="window"):
        lf.LMVAE(lf.LMVAEConfig(latent_dim=4, max_len=9), encoder=encoder, decoder=decoder)


def test_a_pooler_is_needed_only_where_it_is_used(tmp_path):
    folder = tmp_path / "m"
    make_model("gpt2").save_pretrained(folder)
    file = folder / "encoder" / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "pooler" not in key}, file, {"format": "pt"})
    lf.LMVAE.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="pooler"):
        lf.LMVAE.from_pretrained(folder, pooling="pooler")
    with pytest.raises(ConfigError, match="poling"):
        lf.LMVAE.from_pretrained(folder, poling="pooler")


def test_latents_that_do_not_fit():
    model = make_model("gpt2", annotations=("A", "V"), conditional_decoder=True)
    labels = torch.zeros(2, 2)
    for z in (torch.zeros(2, 7), torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6).numpy(), [[0.0] * 6]):
        with pytest.raises(LatentError, match=r"\[batch, 6\]"):
            model.decode(z, annotations=labels)
    with pytest.raises(LatentError, match="row 1"):
        model.decode(torch.tensor([[0.0] * 6, [float("nan")] * 6]), annotations=labels)
    with pytest.raises(LatentError, match="labels"):
        model.decode(torch.zeros(2, 6))
    with pytest.raises(LatentError, match=r"\[2, 2\]"):
        model.decode(torch.zeros(2, 6), annotations=torch.zeros(2, 5))


def test_encoding_sentences_is_in_evaluation_mode():
    model = make_model("gpt2", system="optimus").train()
    assert torch.equal(model.encode(TEXTS).mu, model.encode(TEXTS).mu)
    assert all(module.training for module in model.modules())


def test_a_float64_model_is_float64_throughout():
    model = make_model("gpt2", dtype=torch.float64).eval()
    sentences = model.tokenize(TEXTS[:3])  # three: a third is not exact in float32
    pooled = model.pool(sentences)
    assert pooled.dtype == torch.float64
    eps = torch.randn(3, 6, dtype=torch.float64)
    for batch in (model.make_batch(sentences), model.make_batch(sentences, pooled=pooled)):
        out = model(batch, beta=1.0, eps=eps)
        assert abs(out.loss - (out.reconstruction + out.kl).mean()) < 1e-13 * out.loss


def test_seeds_govern_everything():
    model = make_model("gpt2").train()
    batch = model.make_batch(model.tokenize(TEXTS))
    torch.manual_seed(5)
    a = model(batch, beta=1.0).loss
    torch.manual_seed(5)
    assert torch.equal(a, model(batch, beta=1.0).loss)
    assert not torch.equal(a, model(batch, beta=1.0).loss)
    assert torch.equal(model(batch, beta=1.0, seed=3).loss, model(batch, beta=1.0, seed=3).loss)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_bf16_decoder_is_near_fp32(family):
    full = make_model(family).eval()
    half = make_model(family, dtype=torch.bfloat16).eval()
    assert half.projector.weight.dtype == torch.float32
    eps = torch.randn(4, 6)
    a, b = full(TEXTS, beta=1.0, eps=eps), half(TEXTS, beta=1.0, eps=eps)
    torch.testing.assert_close(a.loss, b.loss, rtol=0.02, atol=0.0)
    half(TEXTS, beta=1.0, eps=eps).loss.backward()
    assert half.projector.weight.grad.dtype == torch.float32
    assert len(half.decode(b.z.detach())) == 4


@pytest.mark.parametrize("visibility", ["prefix", "rolling", "interleaved"])
@pytest.mark.parametrize("free_running", [False, True])
def test_slots_that_no_token_sees_are_not_made_and_change_nothing(visibility, free_running):
    model = make_model(visibility=visibility, free_running=free_running, max_len=9, projector_dropout=0.0)
    sentences = ["the cat sat", "a dog"]
    batch = model.make_batch(model.tokenize(sentences))
    eps = torch.randn(2, 6)
    made = []
    project = model.projector.forward
    model.projector.forward = lambda *args, **options: made.append(project(*args, **options)) or made[-1]
    losses, gradients = [], []
    for tokens in (None, 9):
        out = model(batch, eps=eps, tokens=tokens)
        gradients.append(torch.autograd.grad(out.loss, [model.projector.weight, model.posterior_head.weight]))
        losses.append(out.loss)
    if visibility != "prefix":
        assert [memory.shape[4] for memory in made] == [batch.max_seqlen, 9]
    torch.testing.assert_close(losses[0], losses[1])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_forward_mode_through_a_score_is_refused_by_name():
    model = make_model("llama")
    sentences = model.tokenize(SENTENCES[:3])
    batch = model.make_batch(sentences)
    z = torch.randn(len(sentences), model.config.latent_dim)
    with pytest.raises(ConfigError, match="no forward-mode derivative"):
        torch.func.jvp(lambda z: model.score(batch, z), (z,), (torch.ones_like(z),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ConfigError, match="no forward-mode derivative"):
        model.score(batch, torch.autograd.forward_ad.make_dual(z, torch.ones_like(z)))
