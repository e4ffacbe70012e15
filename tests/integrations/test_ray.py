"""Decoding and encoding over a Ray cluster: what one process gives, also when a machine is lost on the way."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lmvae_fast.config import GenerationConfig
from lmvae_fast.errors import CheckpointError, ConfigError, DataError, LatentError, MissingPackageError
from lmvae_fast.generation.engine import generate
from lmvae_fast.integrations.ray import LOOPBACK, _check_socket_path, _Decode, _Encode, decode, encode, start_local
from lmvae_fast.testing import make_model
from tests.conftest import REPOSITORY
from tests.processes import PATIENCE

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'lmvae_fast[ray]')")
psutil = pytest.importorskip("psutil", reason="psutil is not installed")
pytest.importorskip("ray.data", reason="Ray Data is not installed (pip install 'lmvae_fast[ray]')")

N = 200
DRAW = GenerationConfig(do_sample=True, seed=7, num_samples=2, batch_size=4)


@pytest.fixture(scope="module")
def model():
    return make_model("gpt2", latent_dim=4, max_len=6).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ray") / "model"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def place():
    """An empty folder in which Ray finds nothing of an earlier run; its path is short, as sockets lie below it."""
    given = os.environ.get("RAY_TMPDIR", "/tmp")
    folder = tempfile.mkdtemp(prefix="r", dir=given if len(given) < 30 and os.path.isdir(given) else "/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(place):
    """A head that computes nothing, and two nodes of two CPUs, all on the loopback interface."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray's default folder: where Cluster writes its address whatever temp_dir it is given, and never creates it
        patch.setenv("RAY_TMPDIR", place)
        # another Ray, and how it lets its users in, does not matter
        patch.setenv("RAY_ADDRESS", "192.0.2.255:1")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # by default it works behind everything else on the machine
        patch.setenv("RAY_gcs_server_port_wait_time_s", str(PATIENCE))
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setattr(importlib.import_module("ray._private.ray_constants"), "ENABLE_RAY_CLUSTER", False)
        patch.setattr(
            importlib.import_module("ray._private.services"), "get_node", _patient(ray._private.services.get_node)
        )
        started, nodes = _started()
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield started, nodes
        ray.shutdown()
        started.shutdown()


def _patient(get_node):
    """Ray gives a node 30 seconds to be there, however busy its machine is. It answers none with an error."""

    def wait(*arguments):
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return get_node(*arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    return wait


def _agents():
    """Ports for a node's agents. Without them it waits for their choice, and dies after 15 seconds (ray issue 65983)."""
    names = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server((LOOPBACK, 0))) for _ in names]
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}


def _started():
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 10**8, "include_dashboard": False, "node_ip_address": LOOPBACK, "wait": False}
    # a lost node is noticed within seconds instead of half a minute, a slow process is given its time
    config = {
        "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4,
        "worker_register_timeout_seconds": PATIENCE,
    }  # fmt: skip
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": config, **_agents(), **common}
    )
    try:
        cluster.wait_for_nodes(PATIENCE)
        # this process joins while there is the head alone: with a node that is lost, it would be lost too
        ray.init(address=cluster.address, log_to_driver=False)
        nodes = [cluster.add_node(num_cpus=2, **_agents(), **common) for _ in range(2)]
        cluster.wait_for_nodes(PATIENCE)
    except Exception:
        ray.shutdown()
        cluster.shutdown()
        raise
    return cluster, nodes


def listening(process):
    """The addresses that a process and all it started listen on."""
    found = set()
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def test_nobody_else_can_reach_the_cluster(cluster, place):
    assert listening(psutil.Process()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert [each["NodeManagerAddress"] for each in ray.nodes()] == [LOOPBACK] * 3
    assert all(os.path.realpath(node.get_session_dir_path()).startswith(os.path.realpath(place)) for node in cluster[1])


LOCAL = """
import json, psutil, ray
from lmvae_fast.errors import ConfigError
from lmvae_fast.integrations.ray import start_local
from tests.integrations.test_ray import listening
start_local(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
try:
    start_local()
except ConfigError as error:
    refused = str(error)
rows = ray.data.range(3).map_batches(lambda rows: {"id": rows["id"] + 1}).take_all()
print(json.dumps([sorted(listening(psutil.Process())), sorted(row["id"] for row in rows), len(ray.nodes()), refused]))
"""


def test_a_local_ray_is_one_of_its_own_on_loopback(cluster, place):
    """Beside another one, with an address in the environment that leads nowhere, in a home that holds nothing."""
    home = Path(place) / "h"  # below it are some 66 bytes more, and a socket's path holds 107
    home.mkdir()
    # as a user has it: Ray is imported before it is told where to listen
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "RAY_ADDRESS": "192.0.2.255:1",
        "PYTHONPATH": str(REPOSITORY),
    }
    for _ in range(20):
        done = subprocess.run(
            [sys.executable, "-c", LOCAL], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        if "timed out during startup" not in done.stderr:  # Ray's own limits, too short for a loaded machine
            break
    assert done.returncode == 0, done.stderr[-3000:]
    addresses, rows, nodes, refused = json.loads(done.stdout.splitlines()[-1])
    assert addresses and set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert (rows, nodes) == ([1, 2, 3], 1) and "runs already" in refused


@pytest.mark.parametrize("how", ["RAY_TMPDIR", "_temp_dir"])
def test_a_path_too_long_for_sockets_is_refused_before_ray_starts(how, tmp_path, monkeypatch):
    long = str(tmp_path / ("x" * 60))
    if how == "RAY_TMPDIR":
        monkeypatch.setenv("RAY_TMPDIR", long)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=r"too long for them.*RAY_TMPDIR"):
        start_local(**({"_temp_dir": long} if how == "_temp_dir" else {}))


def test_a_short_link_to_a_long_path_is_short(place, tmp_path):
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    link = Path(place) / "l"
    link.symlink_to(folder)
    _check_socket_path(str(link))
    with pytest.raises(ConfigError, match="too long for them"):
        _check_socket_path(str(folder))


def test_encode_and_decode_in_one_pipeline(model, folder, cluster):
    texts = [f"{word} {place}" for word in ("cats", "the sun", "a stone") for place in ("sleeps", "warms water", "")]
    rows = [{"text": text, "index": 3 * row, "own": f"row {row}"} for row, text in enumerate(texts)]
    encoded = encode(ray.data.from_items(rows, override_num_blocks=3), folder, seed=5, workers=1)
    out = decode(encoded, folder, text="decoded", workers=1).take_all()
    posterior = model.encode(texts)
    z = posterior.mu.new_empty(3 * len(texts), 4)  # rows of a longer posterior: noise goes by number
    z[::3], logvar = posterior.mu, torch.zeros_like(z)
    logvar[::3] = posterior.logvar
    z = type(posterior)(z, logvar).sample(seed=5)[::3]
    assert sorted(row["index"] for row in out) == [3 * row for row in range(len(texts))]
    for row in out:
        place = row["index"] // 3
        assert (row["text"], row["own"]) == (texts[place], f"row {place}")
        for name, expected in (("mu", posterior.mu), ("logvar", posterior.logvar), ("z", z)):
            np.testing.assert_allclose(row[name], expected[place].numpy(), rtol=1e-5, atol=1e-6)
        assert row["decoded"] == model.decode(torch.from_numpy(np.array(row["z"])))[0]


def test_a_node_is_lost_and_nothing_else(model, folder, cluster, tmp_path):
    z = 2 * torch.randn(N, 4)
    expected = {(out.index, out.sample): (out.text, len(out.ids)) for out in generate(model, z, DRAW)}
    order = np.random.default_rng(0).permutation(N)

    def latents(rows):
        (tmp_path / ray.get_runtime_context().get_node_id()).touch()
        deadline = time.monotonic() + PATIENCE
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:  # until both nodes are at work
            time.sleep(0.02)
        time.sleep(0.05)
        index = order[rows["id"]]
        return {"index": index, "z": z.numpy()[index], "own": 2 * index}

    source = ray.data.range(N, override_num_blocks=N // 5).map_batches(latents, batch_size=None)
    done, at_the_loss = [], 0
    for rows in decode(source, folder, DRAW, batch_size=5, workers=2).iter_batches(batch_size=None, prefetch_batches=0):
        columns = ("index", "sample", "text", "tokens", "own")
        done += zip(*(rows[name].tolist() for name in columns), strict=True)
        if not at_the_loss:
            assert len(list(tmp_path.iterdir())) == 2
            assert cluster[1][1].node_id != ray.get_runtime_context().get_node_id()
            at_the_loss = len(done)
            cluster[0].remove_node(cluster[1][1], allow_graceful=False)
    assert 0 < at_the_loss < len(done) == len(expected) == 2 * N
    assert {(index, sample): (text, tokens) for index, sample, text, tokens, _ in done} == expected
    assert all(own == 2 * index for index, _, _, _, own in done)


def decoder(folder, **options):
    """A process of the pool, made here."""
    plain = {
        "config": GenerationConfig(),
        "z": "z",
        "prompt": None,
        "prompts": None,
        "annotations": None,
        "text": "text",
    }
    options = {**plain, "index": "index", **options}
    return _Decode(folder, options, [options["z"], "index"], ["text"], 1, "reference")


def encoder(folder, labels=None):
    options = {"text": "text", "index": "index", "labels": labels, "seed": None}
    return _Encode(folder, options, ["text", "index"], [], 1, "reference")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"z": np.zeros((3, 5)), "index": np.arange(3)}, LatentError, "row 0.*4 numbers"),
        ({"z": [np.zeros(4), np.zeros(3), np.zeros(4)], "index": np.arange(7, 10)}, LatentError, "row 8"),
        ({"z": np.array([[0.0] * 4, [0.0, 0.0, 0.0, np.nan]]), "index": np.array([5, 6])}, LatentError, "NaN.*row 6"),
        ({"z": [["a"] * 4], "index": np.arange(1)}, LatentError, "4 numbers"),
        ({"z": np.zeros((2, 4))}, DataError, "lacks a column.*'index'"),
        ({"z": np.zeros((2, 4)), "index": np.array([0.0, 1.0])}, DataError, "integers"),
        ({"z": np.zeros((2, 4)), "index": np.array([-1, 1])}, DataError, "integers"),
    ],
)
def test_rows_that_do_not_fit(folder, rows, error, message):
    with pytest.raises(error, match=message):
        decoder(folder)(rows)


def test_a_row_without_a_sentence(folder):
    process = encoder(folder)
    for text in ("  ", None, 3):
        with pytest.raises(DataError, match="row 8"):
            process({"text": np.array(["a cat", text], dtype=object), "index": np.array([7, 8])})


def test_a_folder_without_a_model_is_told_at_the_first_rows(tmp_path):
    process = decoder(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        process({"z": np.zeros((1, 4)), "index": np.arange(1)})


def test_prompts_logprobs_and_labels(model, folder, tmp_path):
    z = torch.randn(3, 4)
    config = GenerationConfig(max_new_tokens=3, logprobs=True)
    rows = {"z": z.numpy(), "index": np.arange(3), "begin": np.array(["the", "", "a"], dtype=object)}
    out = decoder(folder, config=config, prompts="begin")(rows)
    expected = list(generate(model, z, config, prompts=["the", "", "a"]))
    assert out["text"].tolist() == [sentence.text for sentence in expected]
    for got, sentence in zip(out["logprobs"], expected, strict=True):
        np.testing.assert_allclose(got, sentence.logprobs, rtol=1e-5, atol=1e-5)
    labelled = make_model(
        "gpt2", latent_dim=4, max_len=6, annotations=("NOUN", "VERB"), conditional_decoder=True
    ).eval()
    labelled.save_pretrained(tmp_path / "labelled")
    rows = {"text": np.array(["the sun", "cats sleep"], dtype=object), "index": np.arange(2)}
    rows["roles"] = np.array(["NOUN NOUN", ["NOUN", "VERB"]], dtype=object)
    encoded = encoder(str(tmp_path / "labelled"), labels="roles")(rows)
    del encoded["text"]
    out = decoder(str(tmp_path / "labelled"), z="mu", annotations="annotations")(encoded)
    mu, labels = torch.from_numpy(encoded["mu"]), torch.from_numpy(encoded["annotations"])
    assert out["text"].tolist() == labelled.decode(mu, annotations=labels)


def test_what_is_known_before_is_refused_before(cluster, folder, monkeypatch):
    known = ray.data.from_items([{"z": [0.0] * 4, "index": 0, "text": "a"}])
    with pytest.raises(DataError, match=r"lacks a column.*'latent'"):
        decode(known, folder, z="latent")
    with pytest.raises(DataError, match=r"overwritten.*text"):
        decode(known, folder)
    with pytest.raises(ConfigError, match="seed"):
        decode(known, folder, GenerationConfig(do_sample=True))
    with pytest.raises(ConfigError, match="max_new_tokens"):
        decode(known, folder, prompts="text")
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingPackageError, match=r"lmvae_fast\[ray\]"):
        decode(known, folder)
