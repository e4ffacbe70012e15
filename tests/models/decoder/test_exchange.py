"""Exchanged forwards: each thread calls its own, in whatever order they begin and end, and nothing stays behind."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lmvae_fast.config import GenerationConfig
from lmvae_fast.generation.engine import generate
from lmvae_fast.models.decoder.exchange import called, exchanged
from lmvae_fast.testing import make_model


class Named(nn.Module):
    def forward(self, x: int) -> str:
        return f"own {x}"


def test_within_a_thread_the_innermost_is_called_and_then_what_was_before():
    module = Named()
    with exchanged([(module, lambda x: f"first {x}")]):
        with exchanged([(module, lambda x: f"second {x}")]):
            assert module(1) == "second 1"
        assert module(1) == "first 1" == called(module)(1)
        assert list(inspect.signature(module.forward).parameters) == ["x"]
    assert module(1) == "own 1" and set(module.__dict__) == set(Named().__dict__)
    module.forward = lambda x: f"given {x}"
    with exchanged([(module, lambda x: f"first {x}")]):
        assert module(1) == "first 1"
    assert module(1) == "given 1"


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_exchanges_of_two_threads_may_end_in_any_order(first_to_end):
    module, both = Named(), threading.Barrier(3, timeout=20)
    ended = [threading.Event(), threading.Event()]

    def work(number):
        with exchanged([(module, lambda x: f"thread {number}")]):
            both.wait()
            if number != first_to_end:
                assert ended[first_to_end].wait(20)
            found = module(1)
        ended[number].set()
        return found, module(1)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(work, number) for number in range(2)]
        both.wait()
        assert module(1) == "own 1" == called(module)(1)  # a thread that has exchanged nothing
        assert [f.result() for f in found] == [("thread 0", "own 1"), ("thread 1", "own 1")]
    assert set(module.__dict__) == set(Named().__dict__)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_threads_decode_with_the_weights_they_asked_for(family):
    model = make_model(family).eval()
    z = 2 * torch.randn(16, 6)
    ways = [{}, {"weights": "int8"}, {"pack_weights": False}]

    def decoded(way):
        return [out.ids for out in generate(model, z, GenerationConfig(batch_size=4, **way))]

    alone = [decoded(way) for way in ways]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            assert list(pool.map(decoded, ways)) == alone
    assert not [module for module in model.decoder.model.modules() if "forward" in module.__dict__]
