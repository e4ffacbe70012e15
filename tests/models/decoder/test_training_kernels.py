"""Bodies written out for training as a GPU runs them: torch's products and Triton's kernels, here interpreted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lmvae_fast as lf
from lmvae_fast.kernels.backend import backend
from lmvae_fast.models.decoder import prepared_layers, training_body
from lmvae_fast.models.decoder.cache import LatentCache
from lmvae_fast.models.decoder.examination import in_float32
from lmvae_fast.models.decoder.exchange import exchanged
from lmvae_fast.models.decoder.prepared_weights import exchanges
from lmvae_fast.models.decoder.recorded_step import CAPTURES
from lmvae_fast.models.decoder.training_body import trained_through
from lmvae_fast.models.free_running import greedy_ids
from lmvae_fast.models.injection import Injection
from lmvae_fast.testing import make_model
from lmvae_fast.training import recorded_steps
from lmvae_fast.training.loop import Trainer
from tests.generation.replay import RecordedOperations
from tests.kernels.common import GRAD_FACTOR, VALUE_FACTOR, assert_within_error_rule, require

from .test_training_body import NAMES, _decoder, _figures

FAMILIES = ("gpt2", "llama", "qwen3")
#: What gives a tensor another shape or room for a result, and launches nothing.
_NO_KERNEL = (
    "view", "_unsafe_view", "reshape", "t", "transpose", "slice", "split", "split_with_sizes", "select", "squeeze", "unsqueeze",
    "detach", "alias", "expand", "as_strided", "empty", "new_empty", "empty_like", "permute", "unbind",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreter():
    require("frozen_layer", "triton")


class Launches(TorchDispatchMode):
    """Names of the operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1] if "." in str(func) else str(func)
        if name not in _NO_KERNEL:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_the_modules(family):
    decoder = _decoder(family)
    plain = decoder.body.forward
    with backend("triton"), trained_through(decoder) as body:
        ours = _figures(decoder, decoder.body, torch.float32)
        assert body.runs == "prepared layers"
    theirs = _figures(decoder, plain, torch.float32)
    wide = _decoder(family, torch.float64)
    truth = _figures(wide, wide.body.forward, torch.float64)
    for name in NAMES:
        factor = VALUE_FACTOR if name == "values" else GRAD_FACTOR
        assert_within_error_rule(name, ours[name], theirs[name], truth[name], factor=factor)


@pytest.mark.parametrize(("family", "forward", "backward"), [("gpt2", 8, 9), ("llama", 9, 11)])
def test_launches_of_a_layer(family, forward, backward):
    found = []
    for layers in (1, 2):
        decoder = _decoder(family, layers=layers)
        with backend("triton"), trained_through(decoder):
            _figures(decoder, decoder.body, torch.float32)  # prepares and examines
            with Launches() as whole:
                _figures(decoder, decoder.body, torch.float32)
            with Launches() as half, torch.no_grad():
                _hidden(decoder)
        found.append((len(half.found), len(whole.found)))
    (fewer, fewer_whole), (more, more_whole) = found
    assert more - fewer == forward
    assert more_whole - fewer_whole == forward + backward


def _hidden(decoder):
    from lmvae_fast.models.decoder.attention import PackedAttention

    shape = (decoder.num_layers, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    attention = PackedAttention(torch.randn(shape), "prefix", torch.tensor([0, 4, 9], dtype=torch.int32), 5)
    given = {"position_ids": torch.arange(9)[None], "use_cache": False, "lmvae": attention}
    return decoder.body(inputs_embeds=torch.randn(1, 9, decoder.hidden_size), **given)


@torch.no_grad()
def _step(decoder):
    cache = LatentCache(
        layers=decoder.num_layers, kv_heads=decoder.kv_heads, head_dim=decoder.head_dim, batch=3, slots=2, max_tokens=5,
        visibility="prefix", dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    cache.memory.copy_(torch.randn(cache.memory.shape, generator=torch.Generator().manual_seed(0)))
    with Launches() as counted:
        logits = decoder.step(torch.tensor([1, 5, 3]), cache, Injection("prefix", cache.memory))
    return logits, len(counted.found)


@pytest.mark.parametrize(("family", "launches"), [("gpt2", 5), ("llama", 6), ("qwen3", 12)])
def test_a_decode_step_runs_the_same_layers(family, launches):
    counts = []
    for layers in (1, 2):
        decoder = _decoder(family, layers=layers)
        expected, _ = _step(decoder)
        with backend("triton"):
            ((body, _),) = layers_of = exchanges(decoder, 3)
            assert body is decoder.body
            with exchanged(layers_of):
                found, count = _step(decoder)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        counts.append(count)
    assert counts[1] - counts[0] == launches


def test_texts_through_them_are_the_same():
    model = make_model("llama", layers=1)
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    expected = model.decode(z, max_new_tokens=4)
    assert any(expected)
    with backend("triton"):
        assert model.decode(z, max_new_tokens=4) == expected


def test_recordings_over_layers_that_are_no_more_are_not_kept(monkeypatch):
    """What a recording reads is a copy of some weights: one of others is made when they have changed."""
    monkeypatch.setitem(CAPTURES, "cpu", RecordedOperations)
    model = make_model("llama", layers=1)
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    with backend("triton"):
        before = model.decode(z, max_new_tokens=4)
        with torch.no_grad():
            for layer in model.decoder.body.layers:
                layer.self_attn.v_proj.weight.mul_(-3.0)
        after = model.decode(z, max_new_tokens=4)
    assert after == model.decode(z, max_new_tokens=4) != before


def test_free_running_reads_its_output_through_them_recorded_or_not(monkeypatch):
    """The first loop of a shape is run and later ones are replayed: over the same layers, and over new ones of new weights."""
    model = make_model("llama", layers=1).eval()
    decoder = model.decoder
    injections = [model.inject(2 * torch.randn(3, 6)).detach() for _ in range(3)]
    expected = [greedy_ids(decoder, injection, 3) for injection in injections]
    made, called = [], []

    class Recording(RecordedOperations):
        def __init__(self, step, device):
            super().__init__(step, device)
            made.append(self)

    monkeypatch.setitem(CAPTURES, "cpu", Recording)
    with backend("triton"):
        exchanges(decoder, 3)  # compares them with the modules
        decoder.body.layers[0].mlp.down_proj.register_forward_hook(lambda *given: called.append(1))
        assert [greedy_ids(decoder, injection, 3).tolist() for injection in injections] == [
            x.tolist() for x in expected
        ]
        assert not called
        assert [recording.replays > 1 for recording in made] == [True]
        with torch.no_grad():
            for layer in decoder.body.layers:
                layer.self_attn.v_proj.weight.mul_(-3.0)
        after = [greedy_ids(decoder, injection, 3).tolist() for injection in injections]
        assert [recording.replays > 1 for recording in made] == [True, True]
    monkeypatch.delitem(CAPTURES, "cpu")
    assert after == [greedy_ids(decoder, injection, 3).tolist() for injection in injections]
    assert after != [x.tolist() for x in expected]


# ---- what recordings of steps read must live, and be of the weights as they are ------------------------------


def _lora(family="llama"):
    return make_model(family, system="lmvae", lora_rank=2, layers=1)


def test_an_evaluation_between_two_steps_leaves_the_layers_as_they_are():
    """A recorded step reads the copies of weights that its layers hold: they may not be let go while it may be replayed."""
    model = _lora()
    with backend("triton"), trained_through(model.train().decoder) as body:
        model(["a cat sat"]).loss.backward()
        first = body._forward
        assert first is not None and not body.stale()
        model.eval()
        with torch.no_grad():
            model(["dogs eat"])
        model.train()
        assert not body.stale() and body._forward is first


def test_a_change_of_weights_makes_recorded_steps_stale_before_any_is_replayed():
    model = make_model("llama", layers=1)
    with backend("triton"), trained_through(model.train().decoder) as body:
        assert not body.stale()  # nothing was prepared yet
        model(["a cat sat"]).loss.backward()
        with torch.no_grad():
            model.decoder.body.layers[0].self_attn.v_proj.weight.mul_(2.0)
        assert body.stale()
        model(["a cat sat"]).loss.backward()
        assert not body.stale()


def test_a_recorded_run_notices_changed_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(CAPTURES, "cpu", RecordedOperations)
    monkeypatch.setattr(recorded_steps, "_LEAST_TOKENS", 4)  # the interpreter takes a second for a launch over 64
    model = make_model("llama", layers=1, projector_dropout=0.0)
    config = lf.TrainConfig(output_dir=str(tmp_path), batch_size=1, progress=False, tensorboard=False, max_steps=9)
    with backend("triton"):
        trainer = Trainer(model, ["a cat"], None, config, ())
        trainer.check_every_step = False  # as on a GPU
        (rows,) = trainer._batches(0)
        with trainer.prepared():
            for _ in range(3):
                trainer.optimizer_step((rows,))
            assert trainer.recorded.recordings == 1
            with torch.no_grad():
                model.decoder.body.layers[0].mlp.up_proj.weight.mul_(2.0)
            trainer.optimizer_step((rows,))
            assert trainer.recorded.recordings == 0
            trainer.optimizer_step((rows,))
            assert trainer.recorded.recordings == 1


def test_without_room_the_modules_run(monkeypatch):
    def none_left(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoder = _decoder("llama")
    with backend("triton"):
        for module, name in ((training_body, "differences"), (training_body, "written_out")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, none_left)
                with trained_through(decoder) as body:
                    _figures(decoder, decoder.body, torch.float32)
                    assert "no room" in body.reason
        monkeypatch.setattr(prepared_layers, "_difference", none_left)
        assert exchanges(decoder, 3) == []


def test_memory_that_ends_while_weights_are_widened_leaves_them_as_they_were(monkeypatch):
    decoder = _decoder("llama", torch.bfloat16)
    honest, left = torch.Tensor.float, [2]

    def float_(tensor):
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(tensor)

    monkeypatch.setattr(torch.Tensor, "float", float_)
    with pytest.raises(torch.OutOfMemoryError), in_float32(decoder.body):
        pass
    assert {weight.dtype for weight in decoder.body.parameters()} == {torch.bfloat16}


def test_a_decoder_that_moves_lets_go_of_what_was_prepared_from_it(monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", RecordedOperations)
    model = make_model("llama", layers=1).eval()
    injection = model.inject(torch.randn(3, 6)).detach()
    with backend("triton"):
        forward = weakref.ref(exchanges(model.decoder, 3)[0][1])
        for _ in range(2):  # a loop of a shape that comes again is kept
            greedy_ids(model.decoder, injection, 3)
        assert forward() is not None
        model.to(torch.float32)  # stands for a move to another device
        gc.collect()
        assert forward() is None
