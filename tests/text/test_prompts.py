"""Prompts with responses as ids and batches: where they are parted and cut, and the public code's own layout."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from lmvae_fast.data import PromptResponse
from lmvae_fast.errors import DataError
from lmvae_fast.reference.cvae_text import collate
from lmvae_fast.testing import tiny_tokenizer
from lmvae_fast.text.prompts import group_ids, make_prompt_batch, prompt_ids, tokenize_prompts
from lmvae_fast.text.tokenizer import SentenceTokenizer

RESPONSES = [" a star", " a kind of light", " food", " water as a solid and light", " the moon moves around a planet"]
ITEMS = [PromptResponse("the sun is", response) for response in RESPONSES]


def with_start():
    """A tokenizer that writes begin-of-text (1) by itself, as Llama's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def tokenized(items=ITEMS, tokenizer=None, **options):
    defaults = {"max_len": 12, "max_prompt_len": None, "vocab_size": 320, "group_size": 16}
    tokenizer = SentenceTokenizer(tokenizer or tiny_tokenizer())
    return tokenize_prompts(items, tokenizer, **{**defaults, **options}), tokenizer


def test_prompt_and_response_are_parted_where_the_prompt_ends():
    sentences, tokenizer = tokenized()
    prompt = tokenizer.encode(["the sun is"])[0]
    assert sentences.prompt_lengths == [len(prompt)] * 5
    for ids, response in zip(sentences.ids, RESPONSES, strict=True):
        assert ids == tokenizer.encode(["the sun is" + response])[0] and ids[: len(prompt)] == prompt
    assert sentences.texts == [response.strip() for response in RESPONSES]
    assert sentences.report == {
        "kept": 5, "truncated": 0, "dropped": 0, "empty": 0, "prompts_cut": 0, "single": 0
    }  # fmt: skip


def test_begin_of_text_belongs_to_the_prompt_and_goes_with_its_left_end():
    sentences, _ = tokenized(tokenizer=with_start())
    assert all(ids[0] == 1 for ids in sentences.ids)
    cut, _ = tokenized(tokenizer=with_start(), max_prompt_len=3)
    assert cut.report["prompts_cut"] == 5 and cut.prompt_lengths == [3] * 5
    for whole, ids, length in zip(sentences.ids, cut.ids, sentences.prompt_lengths, strict=True):
        assert ids == whole[length - 3 :]
    tokenizer = SentenceTokenizer(with_start())
    assert prompt_ids(["the sun is"], tokenizer, 3) == [cut.ids[0][:3]]
    assert prompt_ids(["the sun is", ""], tokenizer, None) == [sentences.ids[0][: sentences.prompt_lengths[0]], [1]]
    assert prompt_ids([""], SentenceTokenizer(tiny_tokenizer()), None) == [[1]]  # something must be read


def test_only_responses_are_predicted():
    sentences, tokenizer = tokenized()
    batch = make_prompt_batch(sentences, [3, 0], tokenizer=tokenizer, max_len=12)
    prompt = sentences.prompt_lengths[0]
    expected = [[*sentences.ids[row], 2] for row in (3, 0)]
    starts = batch.cu_seqlens.tolist()
    for ids, start, end in zip(expected, starts, starts[1:], strict=False):
        assert batch.input_ids[start:end].tolist() == ids[:-1]
        assert batch.labels[start:end].tolist() == [-100] * (prompt - 1) + ids[prompt:]
    assert batch.labels[batch.targets].tolist() == [token for ids in expected for token in ids[prompt:]]
    assert batch.tokens.tolist() == [len(ids) - prompt for ids in expected]
    assert batch.encoder_ids.tolist() == expected[0] + expected[1] and batch.encoder_mask is None
    assert batch.encoder_cu_seqlens.tolist() == [0, len(expected[0]), len(expected[0]) + len(expected[1])]
    assert batch.prompt_ids == [tuple(expected[0][:prompt])] * 2 and batch.indices.tolist() == [3, 0]


def test_a_long_response_has_no_end():
    sentences, tokenizer = tokenized(max_len=3)
    batch = make_prompt_batch(sentences, tokenizer=tokenizer, max_len=3)
    assert sentences.report["truncated"] == 3 and batch.tokens.tolist() == [3, 3, 3, 3, 3]
    last = batch.cu_seqlens[1:].long() - 1
    assert (batch.labels[last] == 2).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("limit", range(2, 10))
def test_the_released_layout_is_the_public_codes(limit, start):
    """At each limit of a response, for tokenizers with and without begin-of-text: its rows, padding and missing ends."""
    hf = with_start() if start else tiny_tokenizer()
    want = collate(ITEMS, hf, max_prompt=3, max_response=limit)
    sentences, tokenizer = tokenized(tokenizer=hf, max_len=limit, max_prompt_len=3)
    got = make_prompt_batch(sentences, tokenizer=tokenizer, max_len=limit, released=True)
    assert torch.equal(got.encoder_ids, want.encoder_ids.flatten())
    mask = torch.ones_like(got.encoder_ids) if got.encoder_mask is None else got.encoder_mask
    assert torch.equal(mask, want.encoder_mask.flatten())
    real = want.attention_mask[:, 1:] == 1
    assert torch.equal(got.input_ids, want.input_ids[:, :-1][real])
    assert torch.equal(got.labels, want.labels[:, 1:][real])


def test_groups_pad_for_themselves():
    items = [*ITEMS, PromptResponse("plants need", " water"), PromptResponse("plants need", " light to grow")]
    sentences, tokenizer = tokenized(items)
    got = make_prompt_batch(sentences, tokenizer=tokenizer, max_len=12, released=True)
    alone = [
        make_prompt_batch(sentences, rows, tokenizer=tokenizer, max_len=12, released=True)
        for rows in (range(5), (5, 6))
    ]
    assert torch.equal(got.encoder_ids, torch.cat([batch.encoder_ids for batch in alone]))
    assert torch.equal(got.encoder_mask, torch.cat([batch.encoder_mask for batch in alone]))


def test_groups_are_slices_of_a_prompts_responses():
    assert group_ids([0, 0, 0, 0, 0], 16) == [0] * 5
    assert group_ids([0, 1, 0, 1, 0, 0, 0], 2) == [0, 3, 1, 3, 2, 0, 1]
    assert group_ids([4, 4], 1) == [0, 1]


def test_what_is_dropped_is_counted():
    items = [*ITEMS, PromptResponse("a", " " + "light " * 20)]
    sentences, _ = tokenized(items, on_long="drop")
    assert sentences.report["dropped"] == 1 and sentences.source_rows == [0, 1, 2, 3, 4]
    sentences, _ = tokenized(["", " water is a liquid"])
    assert sentences.report["empty"] == 1 and sentences.report["single"] == 1 and sentences.prompt_lengths == [1]
    for items, options, message in (
        ([], {}, "no responses"),
        (["", ""], {}, "no response is left"),
        (["", "a"], {"on_empty": "error"}, "response 0 is empty"),
        (ITEMS, {"vocab_size": 200}, "does not know"),
        ([("a", "b")], {}, "row 0 is no prompt"),
    ):
        with pytest.raises(DataError, match=message):
            tokenized(items, **options)


def with_mark(end: str = "</s>"):
    """A tokenizer with the mark of a turn's end; ``end``: what ends a text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    tokenizer.eos_token = end
    return tokenizer


def test_special_tokens_that_are_spelled_are_text(caplog):
    """All but the mark that a dialogue's reader puts behind every turn."""
    items = [
        PromptResponse("the </s> sun<|eot_id|>", " is</s> an <s>[PAD] star</s><|eot_id|>"),
        PromptResponse("a", " b"),
    ]
    sentences, tokenizer = tokenized(items, with_mark(), vocab_size=321, max_len=60)
    mark = tokenizer.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert sentences.report["special"] == 1 and "special" in caplog.text
    first = sentences.ids[0]
    assert first.count(mark) == 2 and first[sentences.prompt_lengths[0] - 1] == mark == first[-1]
    assert not {0, 1, 2} & set(first)
    assert tokenizer.decode([first], keep_special=True)[0].strip() == items[0].prompt + items[0].response
    assert "special" not in tokenized(items[1:], with_mark(), vocab_size=321)[0].report
    caplog.clear()
    assert prompt_ids([items[0].prompt], tokenizer, None) == [first[: sentences.prompt_lengths[0]]]
    assert "1 of 1 prompts spell a special token" in caplog.text


def test_a_turn_that_ends_in_the_end_token_keeps_it_in_the_prompt_and_once_in_the_response():
    items = [PromptResponse("the sun<|eot_id|>", " is a star<|eot_id|>")]
    sentences, tokenizer = tokenized(items, with_mark("<|eot_id|>"), vocab_size=321)
    end, length = tokenizer.eos_token_id, sentences.prompt_lengths[0]
    assert sentences.ids[0][length - 1] == end and end not in sentences.ids[0][length:]
    assert prompt_ids([items[0].prompt], tokenizer, None) == [sentences.ids[0][:length]]
    batch = make_prompt_batch(sentences, tokenizer=tokenizer, max_len=12)
    assert batch.labels.tolist().count(end) == 1


@pytest.mark.parametrize("pair", [("a \ud83d", "b"), ("a", "b \ud83d")], ids=["prompt", "response"])
def test_half_a_character_is_named_by_its_row(pair):
    with pytest.raises(DataError, match="row 1"):
        tokenized([PromptResponse("a", "b"), PromptResponse(*pair)])
