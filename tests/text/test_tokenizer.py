"""From sentences to ids without a silent loss: what is cut, spelled, unknown or no sentence at all."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lmvae_fast.errors import DataError, TokenizerError
from lmvae_fast.models.encoder import Encoder
from lmvae_fast.testing import make_model, tiny_encoder, tiny_tokenizer
from lmvae_fast.text.checks import check_size
from lmvae_fast.text.tokenizer import SentenceTokenizer, text_and_labels, tokenize

TOKENIZER = SentenceTokenizer(tiny_tokenizer())


def tokens(texts, max_len=40, **options):
    return tokenize(texts, TOKENIZER, max_len=max_len, vocab_size=len(TOKENIZER.tokenizer), **options)


@pytest.mark.parametrize("text", ["a cat</s>a dog", "<s>", "the [PAD] of a cat"])
def test_special_tokens_that_are_spelled_are_text(text):
    sentences = tokens([text])
    assert sentences.texts == [text] and sentences.report["special"] == 1
    assert not {0, 1, 2} & set(sentences.ids[0])


def test_text_is_not_cut_within_a_character():
    text = "今天天气很好"
    whole = TOKENIZER.encode([text])[0]
    for limit in range(4, len(whole)):
        (cut,) = tokens([text], max_len=limit).texts
        assert text.startswith(cut) and "\N{REPLACEMENT CHARACTER}" not in cut


def test_a_sentence_without_room_for_its_end_is_counted():
    ids = TOKENIZER.encode(["a cat is a kind of animal"])[0]
    assert tokens(["a cat is a kind of animal"], max_len=len(ids)).report["without_end"] == 1
    assert "without_end" not in tokens(["a cat is a kind of animal"], max_len=len(ids) + 1).report


def test_half_a_character_is_named_by_its_row():
    with pytest.raises(DataError, match="row 1"):
        tokens(["a cat", "a cat \ud83d is"])


@pytest.mark.parametrize(
    "data", [{"text": ["a cat"]}, {"a": "a cat", "b": "a dog"}], ids=["columns", "sentences by key"]
)
def test_a_mapping_is_no_list_of_sentences(data):
    with pytest.raises(DataError, match="mapping"):
        text_and_labels(data)
    with pytest.raises(DataError, match="mapping"):
        make_model().tokenize(data)


def test_a_data_frame_is_no_list_of_sentences():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="table"):
        make_model().tokenize(pandas.DataFrame({"text": ["a cat"]}))


def test_a_tokenizer_of_special_tokens_only_is_refused():
    check_size(TOKENIZER.tokenizer, 40_000, "decoder")  # an embedding may have more rows than it needs
    with pytest.raises(TokenizerError, match="1200 rows"):
        check_size(hf.GPT2TokenizerFast(), 1200, "decoder")


def test_sentinels_are_no_words(tmp_path):
    """Of a folder without tokenizer files transformers makes a T5's of a hundred sentinels."""
    tiny_encoder("t5", vocab_size=1200).save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="1200 rows"):
        Encoder.load(str(tmp_path), dtype=torch.float32)


def encoder_of_few_words(words):
    pieces = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **names)
    return Encoder(tiny_encoder("bert", vocab_size=len(pieces)), tokenizer)


def test_special_tokens_are_text_to_the_encoder_too():
    encoder = encoder_of_few_words(["a", "cat", "mask", "[", "]", "MASK", "SEP"])
    ids, mask = encoder.tokenize(["a [MASK] cat [SEP] a", "a cat"])
    pieces = encoder.tokenizer.convert_ids_to_tokens(ids[0])
    assert pieces == ["[CLS]", "a", "[", "MASK", "]", "cat", "[", "SEP", "]", "a", "[SEP]"]
    assert ids[1].tolist() == [*encoder.tokenizer("a cat")["input_ids"], *[0] * 7] and mask.sum(1).tolist() == [11, 4]
    alone = encoder.tokenize(["a cat"])  # as its tokenizer pads
    assert alone[0].tolist() == [encoder.tokenizer("a cat")["input_ids"]] and alone[1].sum() == 4
    sentences = tokens(["a [MASK] cat", "a cat"], encoder=encoder)
    assert sentences.report["special"] == 1 and sentences.texts[0] == "a [MASK] cat"


def test_what_the_encoder_does_not_know_is_counted(caplog):
    texts = ["the cat sleeps", "a dog"]
    sentences = tokens(texts, encoder=encoder_of_few_words(["the", "a"]))
    assert (
        sentences.report["encoder_unknown_tokens"] == 3
        and "60% of all tokens are unknown to the encoder" in caplog.text
    )
    caplog.clear()
    known = tokens(texts, encoder=encoder_of_few_words(["the", "a", "cat", "dog", "sleeps"]))
    assert "encoder_unknown_tokens" not in known.report and not caplog.text


def test_a_model_counts_what_its_encoder_reads(caplog):
    model = make_model()
    model.encoder = encoder_of_few_words(["the", "a"])
    report = model.tokenize(["the cat sleeps", "a [SEP] dog"]).report
    assert report["special"] == 1 and report["encoder_unknown_tokens"] and "unknown to the encoder" in caplog.text


def test_a_prefix_space_is_dropped_where_it_spoils_the_text(monkeypatch):
    """Some tokenizers (Qwen's) then put a space before every piece."""
    from lmvae_fast.text import tokenizer as module

    def load(auto_class, name, part, **options):
        loaded = tiny_tokenizer()
        if options.get("add_prefix_space"):
            spaced = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
            punctuation = pre_tokenizers.Punctuation("isolated")
            loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([punctuation, spaced])
        return loaded

    monkeypatch.setattr(module, "load_pretrained", load)
    found = SentenceTokenizer.load("any", hf.GPT2Config(), add_prefix_space=True)
    assert found.decode(found.encode(["It's 3.5 km"]))[0].strip() == "It's 3.5 km"
