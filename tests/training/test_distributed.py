"""Training in 2 and 3 processes (gloo, CPU): the same run as one process on the whole batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmvae_fast.errors import CheckpointError
from lmvae_fast.testing import make_model
from lmvae_fast.text.batch import Share
from lmvae_fast.training.checkpoints import folder as checkpoint
from lmvae_fast.training.checkpoints.shards import joined
from lmvae_fast.training.distributed import Ranks, _buckets
from lmvae_fast.training.validation import validate
from tests.processes import PATIENCE
from tests.training.helpers import plain_sentences

ROOT = Path(__file__).resolve().parents[2]


class Pool:
    """Worker processes that serve one case after the other: they import torch once, not once a case.

    A worker has one rank for its life, as real processes have: torch remembers which piece of a tensor a mesh gives it.
    """

    def __init__(self) -> None:
        self.workers: dict[int, subprocess.Popen] = {}

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.training.distributed_worker"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __call__(self, folder: Path, world: int, case: dict) -> list[dict]:
        """Run a case in ``world`` processes; what each rank reports (None for one that died)."""
        folder.mkdir(parents=True)
        (folder / "case.json").write_text(json.dumps({"output": str(folder / "run"), **case}))
        for rank in range(world):
            if rank not in self.workers or self.workers[rank].poll() is not None:
                self.workers[rank] = self._start()
            self.workers[rank].stdin.write(f"{rank} {world} {folder}\n")
            self.workers[rank].stdin.flush()
        for rank in range(world):
            if not self.workers[rank].stdout.readline():  # it died
                self.workers[rank].wait()
        files = [folder / f"result-{rank}.json" for rank in range(world)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.kill()
            worker.wait()


@pytest.fixture(scope="module")
def launch():
    pool = Pool()
    yield pool
    pool.close()


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"weights-{rank}.safetensors")


def assert_same_run(one: Path, many: Path, world: int) -> None:
    """Weights within 1e-6, and the ranks' weights equal to the bit."""
    first = weights(many)
    for rank in range(1, world):
        other = weights(many, rank)
        assert all(torch.equal(first[name], other[name]) for name in first)
    alone = weights(one)
    assert alone.keys() == first.keys()
    for name in alone:
        torch.testing.assert_close(first[name], alone[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_figures(one: dict, many: dict) -> None:
    assert many["tokens"] == one["tokens"]
    assert len(many["history"]) == len(one["history"]) > 0
    for a, b in zip(one["history"], many["history"], strict=True):
        for name in ("step", "loss", "reconstruction", "kl", "grad_norm", "beta", "active_units"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-6), (name, a["step"])


PART = {"train_decoder": True}
OPTIMUS = {"system": "optimus", "encoder": "bert"}
CVAE = {"system": "cvae", "family": "llama", "group_size": 3, "queries": 2}
CASES = {
    # 26 sentences in steps of 6: one step of an epoch has 2, fewer than there are ranks
    "fused": {"train": {"max_steps": 6}},
    # AdamW's first steps divide a gradient by itself: where it is all but zero, rounding decides. So the rest is float64.
    "float32": {"dtype": "float32", "train": {"max_steps": 6}},
    "plain": {"train": {"max_steps": 6, "fused_projector_update": False, "grad_clip": 0.05}},
    "accumulated": {"train": {"max_steps": 4, "batch_size": 4, "accumulation": 2}},
    "sharded": {"train": {"max_steps": 4}, "shard": True},
    "optimus": {"model": OPTIMUS, "train": {"max_steps": 4}},
    "optimus sharded": {"model": OPTIMUS, "train": {"max_steps": 4, "grad_clip": 0.05}, "shard": True},
    "embeddings sharded": {"model": {**PART, "decoder_part": "embeddings"}, "train": {"max_steps": 3}, "shard": True},
    "lora sharded": {"model": {**PART, "decoder_part": "lora"}, "train": {"max_steps": 3}, "shard": True},
    # 9 prompts in steps of two groups: one step of an epoch has a single group, which one of the ranks has
    "cvae": {"model": CVAE, "train": {"max_steps": 6, "batch_size": 6}},
    "cvae heads": {
        "model": {**CVAE, "output_residual": "skip", "embedding_shift": True, "bag_of_words": True, "stage": 1},
        "train": {"max_steps": 4, "batch_size": 6},
    },
    "recomputed": {"model": OPTIMUS, "train": {"max_steps": 2, "recompute_decoder": True}, "shard": True},
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process_on_the_whole_batch(launch, tmp_path, name, world):
    case = CASES[name]
    (alone,) = launch(tmp_path / "one", 1, case)
    shard = {"train": {**case["train"], "shard": case.get("shard", False)}}
    together = launch(tmp_path / "many", world, {**case, **shard})
    assert "error" not in alone, alone
    assert all("error" not in found for found in together), together
    assert_same_figures(alone, together[0])
    assert_same_run(tmp_path / "one", tmp_path / "many", world)
    assert [found["history"] for found in together[1:]] == [[]] * (world - 1)  # rank 0 alone keeps records


def test_resume_on_another_number_of_ranks(launch, tmp_path):
    """One process begins, three go on, two end: the run of one process throughout."""
    steps = {"max_steps": 9, "save_every": 3}
    launch(tmp_path / "whole", 1, {"train": steps})
    output = str(tmp_path / "run")
    parts = [(1, [3]), (3, [6]), (2, [])]
    for world, stop in parts:
        resume = {"resume": True} if world != 1 else {}
        found = launch(tmp_path / str(world), world, {"output": output, "stop_at": stop, "train": {**steps, **resume}})
        assert all("error" not in each for each in found), found
        assert {each["step"] for each in found} == {stop[0] if stop else 9}
        assert {each["stop_reason"] for each in found} == {"test" if stop else "completed"}
    assert_same_run(tmp_path / "whole", tmp_path / "2", 2)
    whole = json.loads((tmp_path / "whole" / "result-0.json").read_text())
    assert_same_figures(whole, found[0])


def test_state_in_pieces_is_resumed_on_another_number_of_ranks(launch, tmp_path):
    """An Optimus in pieces: two ranks begin and one of them dies, three go on, one ends alone, holding all of it."""
    steps, output = {"max_steps": 9, "save_every": 3, "keep_checkpoints": 9}, str(tmp_path / "run")
    case = {"model": OPTIMUS, "output": output}
    launch(tmp_path / "whole", 1, {"model": OPTIMUS, "train": steps})
    sharded = {**steps, "shard": True}
    begun = launch(tmp_path / "two", 2, {**case, "struck_rank": 1, "at": 5, "by": "die", "train": sharded})
    assert begun[1] is None
    assert begun[0]["error"] == "DistributedError"
    three = launch(tmp_path / "three", 3, {**case, "stop_at": [6], "train": {**sharded, "resume": True}})
    assert {each.get("step") for each in three} == {6}, three
    (one,) = launch(tmp_path / "one", 1, {**case, "train": {**steps, "resume": True}})
    assert one.get("step") == 9, one
    assert_same_run(tmp_path / "whole", tmp_path / "one", 1)
    folder = tmp_path / "run" / "checkpoints"
    layers = [name for name in weights(tmp_path / "whole") if ".h.0." in name]
    for step, ranks in ((3, 2), (6, 3), (9, 0)):
        saved = checkpoint.load(checkpoint.of_step(folder, step))
        assert len(list((saved.path / "pieces").glob("*"))) == ranks  # a file of each rank
        assert bool(saved.tensors["model"].keys() & set(layers)) == (ranks == 0)
    # and from a whole checkpoint into pieces
    again = {"output": str(tmp_path / "again"), "model": OPTIMUS}
    from_whole = {**sharded, "resume": str(folder / "step-00000009"), "max_steps": 10}
    (alone,) = launch(tmp_path / "alone", 1, {"model": OPTIMUS, "train": {**steps, "max_steps": 10}})
    many = launch(tmp_path / "many", 2, {**again, "train": from_whole})
    assert alone["step"] == many[0].get("step") == 10, many


def test_damaged_pieces_are_refused(launch, tmp_path):
    case = {"model": OPTIMUS, "output": str(tmp_path / "run")}
    steps = {"max_steps": 4, "save_every": 2, "shard": True, "keep_checkpoints": 3}
    launch(tmp_path / "ranks", 2, {**case, "train": steps})
    newest, before = checkpoint.complete(tmp_path / "run" / "checkpoints")
    piece = sorted((newest / "pieces").iterdir())[-1]
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.load(newest)
    again = launch(tmp_path / "again", 2, {**case, "train": {**steps, "resume": True}})
    assert {each.get("step") for each in again} == {4}, again
    shutil.rmtree(before / "pieces")
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint.load(before)


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [("other_data", "DataError", "train data"), ("other_config", "ConfigError", "learning_rate")],
)
def test_ranks_that_differ_are_refused_at_start(launch, tmp_path, what, error, says):
    found = launch(tmp_path / "ranks", 2, {what: 1, "train": {"max_steps": 2}})
    assert [each["error"] for each in found] == [error, error]
    assert all(says in each["message"] for each in found)
    assert not checkpoint.complete(tmp_path / "ranks" / "run" / "checkpoints")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_stops_the_others_and_the_last_checkpoint_stays_whole(launch, tmp_path, rank):
    death = {"struck_rank": rank, "at": 4, "by": "die", "train": {"max_steps": 8, "save_every": 2}}
    found = launch(tmp_path / "ranks", 2, death)
    assert found[rank] is None
    survivor = found[1 - rank]
    assert survivor["error"] == "DistributedError", survivor
    assert "another rank" in survivor["message"]
    assert "--resume" in survivor["message"]
    saved = checkpoint.load_latest(tmp_path / "ranks" / "run" / "checkpoints")
    assert saved is not None
    assert saved.state["progress"]["step"] == 2
    (resumed,) = launch(
        tmp_path / "again", 1,
        {"output": str(tmp_path / "ranks" / "run"), "train": {"max_steps": 8, "save_every": 2, "resume": True}},
    )  # fmt: skip
    assert resumed["step"] == 8


def test_a_signal_to_one_rank_stops_all_after_the_same_step(launch, tmp_path):
    found = launch(tmp_path / "ranks", 3, {"struck_rank": 2, "at": 3, "by": "signal", "train": {"max_steps": 9}})
    assert [each["stop_reason"] for each in found] == ["SIGTERM"] * 3
    assert [each["step"] for each in found] == [3] * 3
    saved = checkpoint.load_latest(tmp_path / "ranks" / "run" / "checkpoints")
    assert saved is not None
    assert saved.state["progress"]["step"] == 3


def test_nan_on_one_rank_stops_all(launch, tmp_path):
    found = launch(tmp_path / "ranks", 2, {"struck_rank": 1, "at": 3, "by": "nan", "train": {"max_steps": 9}})
    assert [each["error"] for each in found] == ["NumericalError"] * 2
    assert all("step 3" in each["message"] for each in found)


@pytest.mark.parametrize(
    ("world", "model", "says"),
    [
        (1, {}, "torchrun"),
        (2, {"free_running": True}, "free_running"),
    ],
)
def test_what_cannot_be_sharded_is_refused(launch, tmp_path, world, model, says):
    found = launch(tmp_path / "ranks", world, {"model": model, "train": {"max_steps": 1, "shard": True}})
    assert {each["error"] for each in found} == {"ConfigError"}
    assert says in found[0]["message"]


@pytest.mark.parametrize("model", [{}, OPTIMUS, {**PART, "decoder_part": "lora"}], ids=["frozen", "whole", "lora"])
def test_a_process_keeps_its_part_of_a_sharded_decoder_only(launch, tmp_path, model):
    """In bf16, where what is frozen and what trains have different dtypes."""
    train = {"max_steps": 1, "shard": True, "precision": "bf16"}
    for each in launch(tmp_path / "ranks", 2, {"dtype": "float32", "model": model, "train": train}):
        assert "error" not in each, each
        held, adapters = each["local_layer_elements"], each["adapter_elements"]
        assert held == pytest.approx((each["layer_elements"] - adapters) / 2, rel=0.05)
        assert (adapters > 0) == ("decoder_part" in model)


@pytest.mark.parametrize("system", ["langvae", "optimus"])
def test_torchrun_trains_through_the_command_line(tmp_path, system):
    """The documented command, two processes; its model is loaded again, whole, with the weights of the last checkpoint."""
    from lmvae_fast.cli.common import load_model

    make_model(latent_dim=4, max_len=10).save_pretrained(tmp_path / "parts")
    (tmp_path / "data.txt").write_text("\n".join(plain_sentences(40)) + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lmvae_fast.cli",
        "train", "--data", str(tmp_path / "data.txt"), "--encoder", str(tmp_path / "parts" / "encoder"),
        "--decoder", str(tmp_path / "parts" / "decoder"), "--latent-dim", "4", "--max-len", "10", "--max-steps", "3",
        "--batch-size", "8", "--output", str(tmp_path / "run"), "--shard", "--json", "--system", system,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout)  # one document, from rank 0 alone
    assert printed["processes"] == 2
    assert printed["step"] == 3
    model = load_model(tmp_path / "run")
    assert model.decode(torch.zeros(1, 4))
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    trained = joined({"model": saved.tensors["model"]}, saved.pieces, dict(model.named_parameters()))["model"]
    assert trained.keys() == model.trainable_state_dict().keys()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in trained.items())


def test_objective_of_sums_of_a_batch_is_refused(launch, tmp_path):
    found = launch(tmp_path / "ranks", 2, {"model": {"objective": "langvae-0.6"}, "train": {"max_steps": 1}})
    assert {each["error"] for each in found} == {"ConfigError"}
    assert "langvae-0.6" in found[0]["message"]


def test_ranks_share_an_evaluation():
    """Each of two ranks adds up its own sentences only, and both together are the whole."""
    found: dict[tuple[int, int], list[torch.Tensor]] = {}

    class Part(Ranks):
        def __init__(self, rank: int, world: int) -> None:
            self.rank, self.world = rank, world

        def same(self, value):
            return torch.zeros_like(value)

        def sum(self, tensor):
            found.setdefault((self.rank, self.world), []).append(tensor)
            return tensor

    model = make_model()
    sentences = model.tokenize(plain_sentences(11))
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        validate(model, sentences, model.pool(sentences), batch_size=5, beta=0.5, ranks=Part(rank, world))
    for first, second, whole in zip(found[0, 2], found[1, 2], found[0, 1], strict=True):
        torch.testing.assert_close(first + second, whole, rtol=1e-6, atol=1e-6)
    assert 0 < found[1, 2][0][-1] < found[0, 1][0][-1]  # tokens


def test_shares_cover_a_batch_once():
    for total in range(1, 9):
        for world in (1, 2, 3):
            shares = [Share(rank, world, total) for rank in range(world)]
            rows = [row for share in shares if share.count for row in share.rows]
            assert sorted(rows) == list(range(total))
            assert all(len(share.rows) >= 1 for share in shares)


def test_alone_every_collective_is_the_identity():
    ranks = Ranks()
    assert ranks.alone
    assert ranks.first
    assert ranks.share(5) is None
    assert ranks.total({"a": 2.0}, common=("a",)) == {"a": 2.0}
    assert ranks.any_stop("SIGINT") == "SIGINT"
    assert ranks.same([1]) == [1]
    ranks.agree({"train_data": "x"})


def test_buckets_keep_order_and_dtype(monkeypatch):
    monkeypatch.setattr("lmvae_fast.training.distributed.BUCKET_BYTES", 40)
    tensors = [torch.zeros(n, dtype=d) for n, d in ((5, torch.float32), (5, torch.float32), (9, torch.float32),
                                                    (30, torch.float32), (1, torch.float64))]  # fmt: skip
    found = list(_buckets(tensors))
    assert [[t.numel() for t in bucket] for bucket in found] == [[5, 5], [9], [30], [1]]
