"""What would be silently wrong is refused, and what can be made right is: parts, attention, positions, weights, stages."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
import transformers as hf

import lmvae_fast as lf
from lmvae_fast.errors import CheckpointError, ConfigError, NumericalError, TokenizerError, UnsupportedDecoderError
from lmvae_fast.models.decoder.decoder import Decoder
from lmvae_fast.models.encoder import Encoder, longest_input
from lmvae_fast.testing import SENTENCES, make_decoder, make_model, tiny_decoder, tiny_encoder, tiny_tokenizer
from lmvae_fast.text.tokenizer import SentenceTokenizer

Z = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folders(tmp_path):
    """(encoder folder, decoder folder) of ordinary Hugging Face models."""
    tokenizer = tiny_tokenizer()
    encoder, decoder = tmp_path / "encoder", tmp_path / "decoder"
    tiny_encoder("bert", vocab_size=len(tokenizer)).save_pretrained(encoder)
    tiny_decoder("gpt2", vocab_size=len(tokenizer)).save_pretrained(decoder)
    for folder in (encoder, decoder):
        tokenizer.save_pretrained(folder)
    return encoder, decoder


def build(folders, **options):
    encoder, decoder = folders
    config = {"latent_dim": 6, "max_len": 9, **options}
    return lf.LMVAE(lf.LMVAEConfig(encoder=str(encoder), decoder=str(decoder), **config)).eval()


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_folder_without_its_tokenizer_is_refused(folders, part):
    """transformers makes a tokenizer of special tokens from it, for which every word is the unknown one."""
    folder = folders[0] if part == "encoder" else folders[1]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    model = (hf.GPT2LMHeadModel if part == "decoder" else hf.BertModel).from_pretrained(folder)
    model.resize_token_embeddings(1000)
    model.save_pretrained(folder)
    with pytest.raises((TokenizerError, CheckpointError)):
        build(folders)


def test_unknown_tokens_are_counted_and_warned_of(caplog):
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=_word_level(["the", "cat", "sat"]), unk_token="[UNK]", eos_token="</s>", pad_token="</s>"
    )
    from lmvae_fast.text.tokenizer import tokenize

    sentences = tokenize(["the cat sat", "the dog ran"], SentenceTokenizer(tokenizer), max_len=9, vocab_size=10)
    assert sentences.report["unknown_tokens"] == 2
    assert "unknown" in caplog.text


def _word_level(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", "</s>", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_an_encoder_decoder_gives_the_states_of_its_encoder(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=len(tokenizer), d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    whole = hf.BartModel(config).eval()
    whole.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    encoder = Encoder.load(str(tmp_path / "bart"), dtype=torch.float32)
    ids, mask = encoder.tokenize(list(SENTENCES[:2]))
    states = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(encoder(ids, mask), expected)
    encoder.model.save_pretrained(tmp_path / "half")  # as a model folder of ours stores it
    tokenizer.save_pretrained(tmp_path / "half")
    torch.testing.assert_close(Encoder.load(str(tmp_path / "half"), dtype=torch.float32)(ids, mask), expected)


def test_an_encoder_that_sees_its_padding_is_refused():
    model = tiny_encoder("bert", vocab_size=len(tiny_tokenizer()))
    forward = model.forward
    model.forward = lambda input_ids, attention_mask: forward(input_ids=input_ids)  # the mask is forgotten
    with pytest.raises(ConfigError, match="padding"):
        Encoder(model, tiny_tokenizer())


def test_positions_that_an_encoder_has():
    roberta = hf.RobertaModel(
        hf.RobertaConfig(vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                         max_position_embeddings=66, pad_token_id=1)
    )  # fmt: skip
    assert longest_input(roberta) == 64  # two of them stand before the first token
    assert longest_input(tiny_encoder("bert")) == 512


# ---- the decoder -----------------------------------------------------------------------------------------------------


def test_attention_that_was_taken_away_is_noticed():
    model = make_model("llama").eval()
    model.decoder.model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedDecoderError, match="taken away"):
        model(list(SENTENCES[:2]))
    model.decoder.model.set_attn_implementation("lmvae")
    assert torch.isfinite(model(list(SENTENCES[:2])).loss)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("part", ["all", "body"])
def test_a_model_that_was_put_in_the_place_of_the_examined_one_is_noticed(family, part):
    model = make_model(family).eval()
    other = tiny_decoder(family, vocab_size=len(tiny_tokenizer())).eval()
    if part == "all":
        model.decoder.model = other
    else:
        setattr(model.decoder.model, other.base_model_prefix, other.base_model)
    for work in (lambda: model(list(SENTENCES[:2])), lambda: model.decode(Z), lambda: model.decode(Z, num_beams=2)):
        with pytest.raises(UnsupportedDecoderError, match=r"replaced by one that was not examined.*remedy"):
            work()


def test_a_copied_decoder_is_the_examined_one():
    model = make_model("llama").eval()
    assert copy.deepcopy(model).decode(Z) == model.decode(Z)


@pytest.mark.parametrize("part", ["posterior_head", "encoder", "huge"])
def test_a_posterior_that_is_none_is_an_error(part):
    model = make_model("gpt2").eval()
    with torch.no_grad():
        if part == "encoder":  # of one word, and so of one sentence
            token = model.encoder.tokenize(["water boils"])[0][0, 1]
            model.encoder.model.embeddings.word_embeddings.weight[token] = torch.nan
        else:
            model.posterior_head.weight[0] = torch.nan if part == "posterior_head" else 3e38
    with pytest.raises(NumericalError, match=r"posteriors that are NaN or infinite.*sentence [01]"):
        model.encode(["water boils", "water boils"])


WAYS = [
    {}, {"pack_weights": False}, {"do_sample": True, "seed": 0}, {"do_sample": True, "top_k": 3, "seed": 0}, {"num_beams": 2},
    {"logprobs": True},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("dtype", "row"), [(torch.float16, 6e4), (torch.float32, 3e38)])
def test_logits_that_overflow_are_no_text(way, dtype, row):
    model = make_model("llama", dtype=dtype).eval()
    with torch.no_grad():
        model.decoder.model.lm_head.weight[5:] = row  # finite, and its products are not
        model.decoder.model.model.norm.weight.abs_().add_(1)
    with pytest.raises(NumericalError, match=r"logits that are NaN or infinite.*latent \d"):
        model.decode(Z, **way)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_token_that_is_never_said_is_no_fault_but_a_vocabulary_of_such_tokens_is(way):
    model = make_model("llama").eval()
    head = model.decoder.model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)), requires_grad=False)
    with torch.no_grad():
        head.bias[7:] = -torch.inf
    ids = [found.ids for found in lf.generate(model, Z, lf.GenerationConfig(**way))]
    assert all(token < 7 for row in ids for token in row)
    with torch.no_grad():
        head.bias.fill_(-torch.inf)
    with pytest.raises(NumericalError, match="logits"):
        model.decode(Z, **way)


def test_a_decoder_is_examined_in_float32():
    """In bfloat16 an error of a hundredth would pass."""
    model = tiny_decoder("llama", vocab_size=len(tiny_tokenizer())).to(torch.bfloat16)
    inner = model.model.layers[0].mlp.forward
    calls = []

    def forward(x):
        calls.append(x.dtype)
        return inner(x)

    model.model.layers[0].mlp.forward = forward
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Decoder(model, SentenceTokenizer(tiny_tokenizer()))
    assert set(calls) == {torch.float32}
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


def test_a_decoder_through_which_no_gradient_comes_is_refused():
    model = tiny_decoder("llama", vocab_size=len(tiny_tokenizer()))
    norm, inner = model.model.norm, model.model.norm.forward
    norm.forward = lambda x: inner(x.detach())
    with pytest.raises(UnsupportedDecoderError, match="gradient"):
        Decoder(model, SentenceTokenizer(tiny_tokenizer()))


def test_positions_that_begin_behind_the_padding_token_are_found():
    """As RoBERTa's do; token i then stands where the model itself would put it."""
    model = tiny_decoder("gpt2", vocab_size=len(tiny_tokenizer()))
    forward = model.forward

    def counting_from_one(input_ids=None, position_ids=None, **options):
        if position_ids is None:
            position_ids = torch.arange(1, 1 + input_ids.shape[1])[None]
        return forward(input_ids=input_ids, position_ids=position_ids, **options)

    model.forward = counting_from_one
    decoder = Decoder(model, SentenceTokenizer(tiny_tokenizer()))
    assert decoder.position_offset == 1 and decoder.max_positions == 127


def test_long_rope_is_kept_below_its_original_length():
    config = hf.Phi3Config(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                         "original_max_position_embeddings": 16},
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = Decoder(hf.Phi3ForCausalLM(config).eval(), SentenceTokenizer(tiny_tokenizer()))
    assert decoder.max_positions == 16
    decoder.check_positions(4, 12, "prefix")
    with pytest.raises(ConfigError, match="position"):
        decoder.check_positions(4, 13, "prefix")


def test_a_window_that_acts_through_the_mask_alone_limits_the_length():
    _, decoder = make_decoder("mistral", window=8)
    assert decoder.hidden_window is None  # it is handed to attention, which honours it
    _, decoder = make_decoder("llama")
    decoder.hidden_window = 8
    decoder.check_positions(2, 6, "prefix")
    with pytest.raises(UnsupportedDecoderError, match="window"):
        decoder.check_positions(2, 7, "prefix")


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}, {"num_beams": 2}])
def test_a_head_that_is_not_finite_decodes_nothing(options):
    model = make_model("llama").eval()
    with torch.no_grad():
        model.decoder.head_weight[5] = float("nan")
    with pytest.raises(NumericalError, match="token 5"):
        model.decode(Z, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}, {"num_beams": 2}])
def test_a_latent_that_overflows_is_named(options):
    model = make_model("gpt2").eval()
    z = Z.clone()
    z[1] = 1e38
    with pytest.raises(NumericalError, match="latent 1"):
        model.decode(z, **options)
    assert len(model.decode(Z, **options)) == 3


# ---- building and saving ---------------------------------------------------------------------------------------------


def test_what_surrounds_the_building_does_not_matter(folders):
    torch.manual_seed(0)
    expected = build(folders).decode(Z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        assert build(folders).decode(Z) is not None
    with torch.inference_mode():
        torch.manual_seed(0)
        model = build(folders)
    loss = model.train()(list(SENTENCES[:2])).loss
    loss.backward()
    assert float(model.posterior_head.weight.grad.abs().sum()) > 0
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = build(folders)
        assert model.posterior_head.weight.dtype == torch.float32
        assert model.decode(Z) == expected
    finally:
        torch.set_default_dtype(before)


def test_a_relative_path_survives_a_change_of_folder(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build([os.path.relpath(folder, tmp_path) for folder in folders])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("model", include_frozen=False)
    assert lf.LMVAE.from_pretrained("model").decode(Z) == model.decode(Z)


def test_another_frozen_part_in_the_same_place_is_noticed(folders, tmp_path, caplog):
    model = build(folders)
    model.save_pretrained(tmp_path / "model", include_frozen=False)
    assert lf.LMVAE.from_pretrained(tmp_path / "model").decode(Z) == model.decode(Z)
    shutil.copytree(folders[1], tmp_path / "moved")
    assert lf.LMVAE.from_pretrained(tmp_path / "model", decoder=str(tmp_path / "moved")).decode(Z) == model.decode(Z)
    other = tiny_decoder("gpt2", vocab_size=len(tiny_tokenizer()), seed=5)
    other.save_pretrained(folders[1])
    with pytest.raises(CheckpointError, match="other weights"):
        lf.LMVAE.from_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "moved")
    lf.LMVAE.from_pretrained(tmp_path / "model", decoder=str(tmp_path / "moved"))  # on purpose: a warning
    assert "other weights" in caplog.text


@pytest.mark.parametrize(
    "stage",
    [{"train_encoder": True}, {"train_decoder": True}, {"train_decoder": True, "decoder_part": "lora"}],
    ids=str,
)
def test_another_stage_begins_from_a_saved_model(folders, tmp_path, stage):
    if stage.get("decoder_part") == "lora":
        pytest.importorskip("peft")
    model = build(folders)
    model.save_pretrained(tmp_path / "model")
    later = lf.LMVAE.from_pretrained(tmp_path / "model", **stage)
    assert later.decode(Z) == model.decode(Z)
    trains = {name for name, value in later.named_parameters() if value.requires_grad}
    assert any(name.startswith(("encoder.", "decoder.")) for name in trains)
    later.save_pretrained(tmp_path / "later")
    assert lf.LMVAE.from_pretrained(tmp_path / "later").decode(Z) == model.decode(Z)


def test_weights_that_are_missing_are_no_stage(folders, tmp_path):
    model = build(folders)
    model.save_pretrained(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model" / "model.safetensors")
    del state["projector.bias"]
    save_file(state, tmp_path / "model" / "model.safetensors")
    config = (tmp_path / "model" / "config.json").read_text()
    import json

    values = json.loads(config)
    del values["weights_sha256"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"projector\.bias"):
        lf.LMVAE.from_pretrained(tmp_path / "model", train_decoder=True)


def test_a_folder_with_code_of_its_own_is_refused_without_a_question(folders, monkeypatch):
    import json

    config = json.loads((folders[1] / "config.json").read_text())
    config |= {
        "model_type": "something-new",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folders[1] / "config.json").write_text(json.dumps(config))
    (folders[1] / "evil.py").write_text("raise SystemExit('this code ran')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(CheckpointError):
        build(folders)


def test_scores_are_differentiable_in_the_latents():
    model = make_model("gpt2", dtype=torch.float64).eval()
    z = Z.double().requires_grad_()
    lf.score(model, z, list(SENTENCES[:3])).sum().backward()
    step = 1e-2  # scores are float32
    nudged = Z.double().clone()
    nudged[1, 2] += step
    with torch.no_grad():
        difference = lf.score(model, nudged, list(SENTENCES[:3])) - lf.score(model, Z.double(), list(SENTENCES[:3]))
    assert not difference.requires_grad
    assert z.grad[1, 2].item() == pytest.approx(difference.sum().item() / step, rel=0.1, abs=1e-2)
