"""What a run sets up for its steps: frozen weights in half precision, the allocator."""

import subprocess
import sys

import pytest
import torch

from lmvae_fast.config import TrainConfig
from lmvae_fast.errors import ConfigError
from lmvae_fast.models.decoder.attention import PackedAttention
from lmvae_fast.testing import make_model
from lmvae_fast.training import Callback
from lmvae_fast.training.step_setup import compiling, frozen_in, recomputing
from tests.processes import PATIENCE
from tests.training.helpers import run


def test_a_frozen_decoder_is_held_in_half_precision_and_given_back_to_the_bit(tmp_path):
    class Watch(Callback):
        def on_step(self, run):
            seen.update(value.dtype for value in run.model.decoder.parameters())
            trained = [value.dtype for value in run.model.parameters() if value.requires_grad]
            assert set(trained) == {torch.float32}
            assert run.model._compute_dtype == torch.bfloat16

    seen: set[torch.dtype] = set()
    model = make_model("llama", max_len=12)
    before = {name: value.clone() for name, value in model.decoder.named_parameters()}
    run(tmp_path, Watch(), model=model, max_steps=2, precision="bf16")
    assert seen == {torch.bfloat16}
    for name, value in model.decoder.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]), name


def test_beside_a_trained_part_only_matrices_are_held_in_half_precision():
    model = make_model("llama", max_len=12)
    head = model.decoder.head_weight
    head.requires_grad_(True)
    with frozen_in(model.decoder, torch.bfloat16):
        for value in model.decoder.parameters():
            half = not value.requires_grad and value.dim() > 1
            assert value.dtype == (torch.bfloat16 if half else torch.float32)
    assert all(value.dtype == torch.float32 for value in model.decoder.parameters())


@pytest.mark.slow
def test_compiled_layers_train_the_same_weights(tmp_path, monkeypatch):
    """Steps through torch.compile against eager ones; evaluation, without gradients, is not compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # a killed run leaves half-written code
    calls = []
    compiler = torch.compile

    def compile_(function):
        compiled = compiler(function)
        return lambda *arguments, **options: calls.append(torch.is_grad_enabled()) or compiled(*arguments, **options)

    monkeypatch.setattr(torch, "compile", compile_)
    found = {}
    for wanted in (False, True):
        model = make_model(max_len=12)
        run(tmp_path / str(wanted), model=model, max_steps=2, learning_rate=1e-3, eval_every=1, compile=wanted)
        found[wanted] = model.trainable_state_dict()
        assert calls == [True] * 2 * wanted
    assert "forward" not in vars(model.decoder.body)
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=1e-5, atol=1e-5)


def test_the_layers_are_one_graph(monkeypatch):
    """Nothing in a pass breaks what torch.compile sees of it."""
    decoder, graphs, compiler = make_model("llama").decoder, [], torch.compile
    torch._dynamo.reset()

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=count))
    shape = (decoder.num_layers, 2, 2, decoder.kv_heads, 3, decoder.head_dim)
    memory = torch.randn(shape, requires_grad=True)
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    with compiling(decoder, True):
        attention = PackedAttention(memory * 1.0, "prefix", offsets, 3)
        given = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "use_cache": False, "lmvae": attention}
        hidden = decoder.body(inputs_embeds=torch.randn(1, 5, decoder.hidden_size), **given).last_hidden_state
    assert len(graphs) == 1
    hidden.sum().backward()
    assert memory.grad.abs().max() > 0


def test_a_decoder_that_cannot_be_compiled_is_named(tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=broken))
    with pytest.raises(ConfigError, match="compile=False"):
        run(tmp_path, model=make_model(max_len=12), max_steps=1, compile=True)


@pytest.mark.parametrize("other", ["shard", "recompute_decoder"])
def test_compile_is_refused_beside_what_changes_the_layers(other):
    with pytest.raises(ConfigError, match=other):
        TrainConfig(compile=True, **{other: True})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("train_decoder", [False, True])
def test_recomputed_activations_are_not_kept_and_change_nothing(family, train_decoder):
    model = make_model(family, max_len=12, projector_dropout=0.0, train_decoder=train_decoder)
    batch = model.make_batch(model.tokenize(["a cat is a kind of animal", "ice"]))
    trained = [value for value in model.parameters() if value.requires_grad]
    kept, gradients = [], []
    for wanted in (False, True):
        held: list[int] = []

        def hold(tensor, held=held):
            held.append(tensor.numel())
            return tensor

        with recomputing(model.decoder, wanted):
            torch.manual_seed(0)  # of dropout inside a decoder that trains
            with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
                loss = model(batch, eps=torch.zeros(2, 6)).loss
            gradients.append(torch.autograd.grad(loss, trained, allow_unused=True))
        kept.append(sum(held))
    assert kept[1] < 0.8 * kept[0]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    assert "forward" not in vars(next(iter(model.decoder.body.children())))


def test_freed_memory_is_given_back_after_the_run():
    """In a process of its own: what the kernel counts as this process's memory, during and after."""
    if sys.platform != "linux":
        return
    program = """
import torch
from lmvae_fast.training.step_setup import keeping_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def step():
    return [torch.ones(2**24) for _ in range(4)]  # 256 MiB, freed on return
step()
before = resident()
with keeping_freed_memory(torch.device("cpu")):
    step()
    assert resident() - before > 200 * 2**20, "freed memory was not kept"
assert resident() - before < 50 * 2**20, "kept memory was not given back"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
