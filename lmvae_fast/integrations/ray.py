"""Decoding and encoding over the machines of a Ray cluster: datasets of Ray Data in and out.

Each process of the pool holds the model and reads batches of rows as they come, so rows may leave in another order than
they came in. Every row therefore brings a number of its own (``index``): what identifies it afterwards, and what its draws
go by, so that neither the process, the batch nor a second try after a lost machine changes its text.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmvae_fast.config import GenerationConfig
from lmvae_fast.data.dataset import Example
from lmvae_fast.errors import ConfigError, DataError, LatentError, LMVAEError
from lmvae_fast.generation.engine import generate
from lmvae_fast.generation.text_files import BLOCKS_PER_BATCH
from lmvae_fast.kernels import philox
from lmvae_fast.kernels.backend import backend as use_backend
from lmvae_fast.models.lmvae import LMVAE
from lmvae_fast.optional import require

if TYPE_CHECKING:
    from ray.data import Dataset

Rows = dict[str, Any]  # a batch of Ray Data: numpy arrays by column
LOOPBACK = "127.0.0.1"
_CLUSTERS = (
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's name for: nodes are known by addresses that other machines reach
)


def decode(
    dataset: Dataset,
    model_dir: str,
    config: GenerationConfig | None = None,
    *,
    z: str = "z",
    index: str = "index",
    prompt: str | None = None,
    prompts: str | None = None,
    annotations: str | None = None,
    text: str = "text",
    batch_size: int | None = None,
    workers: int | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    backend: str = "auto",
) -> Dataset:
    """Latents to sentences.

    Args:
        dataset: rows with a latent (column ``z``, latent_dim numbers) and their number (column ``index``, an integer of
            0 or more). Other columns stay.
        model_dir: folder that ``save_pretrained`` wrote, at the same place on every machine, or a Hugging Face hub name.
        config: how; greedy by default. A draw needs a ``seed``.
        prompt: text that every sentence begins with.
        prompts: column of texts that the sentences begin with; needs ``config.max_new_tokens``.
        annotations: column of pooled labels, for a conditional decoder.
        text: column that the sentences are written to.
        batch_size: rows given to a process at a time; default: eight times ``config.batch_size``.
        workers: the most processes; default: as many as the cluster has room for, more when machines join.
        num_cpus, num_gpus: of each process, which computes with as many threads; default for num_gpus: 1 if the cluster has
            GPUs.
        backend: kernels to use, as in ``lf.backend``.

    Returns:
        the rows with ``text``, ``tokens`` (int), ``finished`` (bool), and ``logprobs`` where asked for; with several samples
        per latent, a row for each, numbered by ``sample``. Nothing is computed before the dataset is read.

    Raises:
        MissingPackageError: Ray is not installed.
        ConfigError: a draw without a seed; prompts without max_new_tokens.
        DataError: a column is missing, or would be overwritten.

    While the dataset is read, Ray raises its RayTaskError, whose text holds ours: LatentError (another width, NaN or
    Inf, with the row's number), ConfigError (what model and prompts do not allow), CheckpointError (no model at model_dir).
    """
    config = config or GenerationConfig()
    if config.do_sample and config.seed is None:
        raise ConfigError("processes that draw must share a seed", value="seed=None", remedy="set seed")
    if prompt is not None and prompts is not None:
        raise ConfigError("one source of prompts", value=f"prompt and prompts={prompts!r}", remedy="give one")
    if prompts is not None and config.max_new_tokens is None:
        raise ConfigError(
            "prompts of several lengths leave sentences of several lengths, by what happens to be in a batch",
            value="max_new_tokens=None",
            remedy="set max_new_tokens",
        )
    needed = [column for column in (z, index, prompts, annotations) if column is not None]
    made = [text, "tokens", "finished"] + ["sample"] * (config.num_samples > 1) + ["logprobs"] * config.logprobs
    options = {
        "config": config,
        "z": z,
        "index": index,
        "prompt": prompt,
        "prompts": prompts,
        "annotations": annotations,
        "text": text,
    }
    return _map(
        dataset,
        _Decode,
        options,
        needed,
        made,
        model_dir,
        batch_size or BLOCKS_PER_BATCH * config.batch_size,
        workers,
        num_cpus,
        num_gpus,
        backend,
    )


def encode(
    dataset: Dataset,
    model_dir: str,
    *,
    text: str = "text",
    index: str = "index",
    labels: str | None = None,
    seed: int | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    backend: str = "auto",
) -> Dataset:
    """Sentences to posteriors.

    Args:
        dataset: rows with a sentence (column ``text``) and their number (column ``index``). Other columns stay.
        labels: column of each word's label (a list, or one string with spaces), for a model with annotations.
        seed: also draw a latent from each posterior; row r's noise is that of row r of one posterior of all sentences.
        model_dir, batch_size, workers, num_cpus, num_gpus, backend: as in :func:`decode`.

    Returns:
        the rows with ``mu`` and ``logvar`` (float32, latent_dim numbers), ``z`` where a seed is given, and for a conditional
        decoder ``annotations``, its pooled labels. A batch is padded together, so figures may differ in the last bits
        with the batches.

    Raises:
        MissingPackageError: Ray is not installed.
        DataError: a column is missing, or would be overwritten.

    While the dataset is read, Ray raises its RayTaskError, whose text holds ours: DataError (an empty sentence, an
    unknown label), CheckpointError (no model at model_dir).
    """
    needed = [column for column in (text, index, labels) if column is not None]
    options = {"text": text, "index": index, "labels": labels, "seed": seed}
    made = ["mu", "logvar"] + ["z"] * (seed is not None)
    return _map(dataset, _Encode, options, needed, made, model_dir, batch_size, workers, num_cpus, num_gpus, backend)


def start_local(**options: Any) -> None:
    """Start Ray on this machine alone, out of reach of every other: it listens on the loopback interface.

    Whatever else runs here is left alone: neither RAY_ADDRESS nor another Ray on the machine is joined. A Ray that starts
    by itself, when a dataset is first made, listens on the machine's own address instead.

    Args:
        options: of ``ray.init`` (num_cpus, object_store_memory, ...), without ``address``.

    Raises:
        ConfigError: Ray is not installed, has been started or joined already, would keep its sockets below a path too long
            for them, or listens elsewhere all the same.
    """
    ray = require("ray", purpose="starting Ray on this machine", extra="ray")
    if ray.is_initialized():
        raise ConfigError(
            "Ray runs already", value=ray.get_runtime_context().gcs_address,
            remedy="call start_local before the first dataset is made, or ray.shutdown() first",
        )  # fmt: skip
    _check_socket_path(options.get("_temp_dir"))
    listen_on_loopback()
    ray.init(address="local", **options)
    places = {node["NodeManagerAddress"] for node in ray.nodes()}
    if places != {LOOPBACK}:
        ray.shutdown()
        raise ConfigError(
            "this Ray cannot be told to listen on the loopback interface", value=f"it listens on {sorted(places)}",
            remedy=f"set {_CLUSTERS}=0 before Python starts, or update Ray",
        )  # fmt: skip


def _check_socket_path(given: str | None) -> None:
    """Refuse a folder below which a socket's path would be longer than the system takes; Ray would fail half started."""
    mac = sys.platform == "darwin"
    default = os.environ.get("RAY_TMPDIR") or (not mac and os.environ.get("TMPDIR")) or "/tmp"
    folder = os.path.abspath(given or os.path.join(default, "ray"))  # a short link to a long path is short to sockets
    below = len(f"/session_2000-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    limit = (103 if mac else 107) - below
    size = len(os.fsencode(folder))
    if size > limit:
        raise ConfigError(
            "Ray's sockets lie below a folder whose path is too long for them", value=f"{folder} ({size} bytes)",
            limit=f"{limit} bytes", remedy="set RAY_TMPDIR to a folder with a short path",
        )  # fmt: skip


def listen_on_loopback() -> None:
    """Let every Ray that this process starts from now on listen on 127.0.0.1 only, and look for it there.

    Several nodes on one machine can still be joined, those of other machines no more. A node that is given its address
    (``node_ip_address``) has to be given ``LOOPBACK``.
    """
    os.environ[_CLUSTERS] = "0"  # for what Ray starts, and for Ray itself where it is not yet imported
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:
        vars(constants)["ENABLE_RAY_CLUSTER"] = False


def _map(
    dataset: Dataset,
    work: type[_Worker],
    options: dict[str, Any],
    needed: list[str],
    made: list[str],
    model_dir: str,
    batch_size: int,
    workers: int | None,
    num_cpus: float,
    num_gpus: float | None,
    backend: str,
) -> Dataset:
    data = require("ray.data", purpose="decoding and encoding over many machines", extra="ray")
    schema = dataset.schema(fetch_if_missing=False)  # what is not known yet is found out by the processes
    if schema is not None:
        _check_columns(schema.names, needed, made)
    if num_gpus is None:
        num_gpus = 1 if sys.modules["ray"].cluster_resources().get("GPU") else 0
    place = Path(model_dir)
    return dataset.map_batches(
        work,
        fn_constructor_kwargs={
            "model_dir": str(place.resolve())
            if place.is_dir()
            else model_dir,  # processes have another working directory
            "options": options,
            "needed": needed,
            "made": made,
            "threads": max(1, int(num_cpus)),
            "backend": backend,
        },
        batch_size=batch_size,
        batch_format="numpy",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        # never of a fixed size: a pool that cannot shrink after a machine is lost may hold every CPU that is left, and what
        # reads its input, or makes anew what was lost, would wait for ever
        compute=data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
    )


def _check_columns(columns: Sequence[str], needed: list[str], made: list[str]) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        raise DataError(
            "the dataset lacks a column",
            value=f"no {missing[0]!r} among {', '.join(columns)}",
            remedy="name the column that holds it; every row needs a number of its own",
        )
    taken = [column for column in made if column in columns]
    if taken:
        raise DataError(
            "a column of the dataset would be overwritten", value=taken[0], remedy="rename or drop it before"
        )


class _Worker(ABC):
    """A process of the pool.

    What keeps a model from being loaded is raised at the first batch: an actor that fails while it is made is made again,
    and its error loses its type.
    """

    def __init__(
        self, model_dir: str, options: dict[str, Any], needed: list[str], made: list[str], threads: int, backend: str
    ):
        torch.set_num_threads(threads)
        self.options, self.needed, self.made, self.backend = options, needed, made, backend
        try:
            self.model: LMVAE | LMVAEError = LMVAE.from_pretrained(model_dir)
            self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        except LMVAEError as error:
            self.model = error

    def __call__(self, rows: Rows) -> Rows:
        if isinstance(self.model, LMVAEError):
            raise self.model
        _check_columns(list(rows), self.needed, self.made)
        index = np.asarray(rows[self.options["index"]])
        if len(index) == 0:
            return rows
        if index.dtype.kind not in "iu" or index.min() < 0:
            raise DataError(
                "rows are numbered by integers of 0 or more",
                value=f"{index.dtype} from {index.min()}",
                remedy="give every row a number of its own",
            )
        with use_backend(self.backend):
            return self.work(self.model, rows, index.astype(np.int64))

    @abstractmethod
    def work(self, model: LMVAE, rows: Rows, index: np.ndarray) -> Rows:
        """The rows with the columns that are made."""


class _Decode(_Worker):
    def work(self, model: LMVAE, rows: Rows, index: np.ndarray) -> Rows:
        options, config = self.options, self.options["config"]
        z = _matrix(rows[options["z"]], index, model.config.latent_dim, "latents")
        labels = options["annotations"]
        if labels is not None:
            labels = _matrix(rows[labels], index, len(model.config.annotations), "annotations")
        prompts = options["prompt"] if options["prompts"] is None else list(rows[options["prompts"]])
        if isinstance(prompts, list) and not all(isinstance(line, str) for line in prompts):
            raise DataError(
                "a prompt is no text", value=f"column {options['prompts']}", remedy="an empty text is no prompt"
            )
        out = list(generate(model, z, config, annotations=labels, prompts=prompts, numbers=index.tolist()))
        made: Rows = {name: np.repeat(column, config.num_samples, axis=0) for name, column in rows.items()}
        made[options["text"]] = np.array([sentence.text for sentence in out], dtype=object)
        made["tokens"] = np.array([len(sentence.ids) for sentence in out])
        made["finished"] = np.array([sentence.finished for sentence in out])
        if config.num_samples > 1:
            made["sample"] = np.array([sentence.sample for sentence in out])
        if config.logprobs:
            made["logprobs"] = _ragged([sentence.logprobs or [] for sentence in out])
        return made


class _Encode(_Worker):
    def work(self, model: LMVAE, rows: Rows, index: np.ndarray) -> Rows:
        options = self.options
        examples: list[Any] = []
        for row, (number, text) in enumerate(zip(index, rows[options["text"]], strict=True)):
            if not isinstance(text, str) or not text.strip():
                raise DataError(
                    "a row holds no sentence", value=f"row {number}: {text!r}"[:80], remedy="drop or mend that row"
                )
            words = None if options["labels"] is None else rows[options["labels"]][row]
            examples.append(
                text if words is None else Example(text, tuple(words.split() if isinstance(words, str) else words))
            )
        posterior = model.encode(examples)
        made = {**rows, "mu": posterior.mu.cpu().numpy(), "logvar": posterior.logvar.cpu().numpy()}
        if options["seed"] is not None:
            mu, logvar = posterior.mu.cpu(), posterior.logvar.cpu()
            noise = philox.normal(
                philox.seed_tensor(options["seed"], "cpu"), tuple(mu.shape), mu.dtype, which=torch.from_numpy(index)
            )
            made["z"] = (mu + torch.exp(0.5 * logvar) * noise).numpy()
        if model.config.conditional_decoder:
            _check_columns(list(rows), [], ["annotations"])
            pooled = model.tokenize(examples, on_empty="error").annotations
            assert pooled is not None
            made["annotations"] = pooled.numpy()
        return made


def _matrix(column: Any, index: np.ndarray, width: int, what: str) -> Tensor:
    """float32 ``[rows, width]`` of a column; LatentError with the number of a row that does not fit."""
    lines = [np.asarray(line) for line in column]
    for number, line in zip(index, lines, strict=True):
        if line.shape != (width,) or line.dtype.kind not in "fiu":
            raise LatentError(
                f"{what} of row {number} do not fit the model",
                value=f"{line.dtype} {list(line.shape)}",
                limit=f"{width} numbers",
                remedy="drop or mend that row, or take the model they belong to",
            )
        if not np.isfinite(line).all():
            raise LatentError(f"{what} contain NaN or Inf", value=f"row {number}", remedy="drop or mend that row")
    return torch.from_numpy(np.stack(lines).astype(np.float32))


def _ragged(lines: list[list[float]]) -> np.ndarray:
    """Lists of several lengths as one column."""
    out = np.empty(len(lines), dtype=object)
    for row, line in enumerate(lines):  # at once, lines of one length would become a matrix
        out[row] = np.array(line, dtype=np.float32)
    return out
