"""The report of the demonstration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lmvae_fast.reports.page import Report, plane, style


def write(run: Any) -> Path:
    """Write ``report.html`` for a finished demo (see ``demo._Demo``)."""
    style()
    figures, evaluation = run.figures, run.evaluation
    small = run.decoder_name is None
    what = "A LangVAE" if small else "Our preset lmvae"
    decoder = "a small GPT-2, frozen" if small else f"{run.decoder_name}, frozen but for low-rank adapters"
    report = Report(
        "A language-model VAE, trained here",
        f"{what} on {figures['sentences']:,} generated sentences: {decoder}, steered by a latent of "
        f"{run.config.latent_dim} numbers that is projected into its KV cache.",
    )
    parity = figures.get("parity")
    faster = (
        [(f"{parity['teacher_forced_speedup']:.1f}x", "training step against the eager reference")] if parity else []
    )
    report.cards([
        (f"{figures['bleu']:.3f}", "held-out BLEU-4"),
        (f"{figures['exact_match']:.0%}", "held-out sentences reproduced word for word"),
        (f"{figures['kl']:.1f} nats", "KL to the prior"),
        (f"{figures['active_units']} of {run.config.latent_dim}", "active latent dimensions"),
        *faster,
        (f"{figures['seconds']:.0f} s", "for all of this"),
    ])  # fmt: skip
    report.heading("Training", "Reconstruction and KL of the training batches, and what held-out sentences say.")
    report.figure(_curves(run), "Loss and KL over training steps")
    report.heading("Held-out sentences", "None of these was trained on; decoded greedily from the posterior mean.")
    report.table(
        ["sentence", "decoded", ""],
        [(item["text"], item["decoded"], "same" if item["text"] == item["decoded"] else "") for item in
         evaluation.examples[:12]],
    )  # fmt: skip
    report.heading(
        "The latent space", "Posterior means of held-out sentences, their two main directions, coloured by factor."
    )
    report.figure(_map(run), "Two-dimensional map of the posterior means")
    report.heading("Interpolation", "On the line between two posterior means.")
    report.table(["way", "decoded"], [(f"{w:.2f}", t) for w, t in zip(run.interpolation.weights, run.interpolation.texts,
                                                                     strict=True)])  # fmt: skip
    report.heading("Traversal", f"“{run.held_out.texts[2]}” while one dimension of its latent moves.")
    report.table(
        ["dimension", *(f"{value:+.1f}" for value in run.traversal.values[0])],
        [(f"z[{dim}]", *texts) for dim, texts in zip(run.traversal.dims, run.traversal.texts, strict=True)],
    )
    report.heading("Arithmetic")
    report.table(
        ["term", "sentence"], [*((f"{factor:+g}", text) for factor, text in run.sum.terms), ("=", run.sum.text)]
    )
    report.heading("The prior", "Decoded from latents drawn from N(0, I): no sentence is behind them.")
    report.table(["", "decoded"], [(i + 1, text) for i, text in enumerate(run.prior)])
    if parity:
        _parity(report, parity)
    report.heading("Where the time went")
    report.table(["part", "seconds"], [(name, round(seconds, 1)) for name, seconds in run.timings.items()])
    return report.write(run.output / "report.html")


def _parity(report: Report, parity: dict[str, Any]) -> None:
    report.heading(
        "The same mathematics, faster",
        "A plain eager LangVAE decodes token by token inside its training step. With the same weights, noise and sentences, "
        "our single parallel pass gives the same loss and gradients. Both sides were timed in turn, medians, "
        f"{parity['threads']} threads, {parity['sentences']} sentences.",
    )
    report.table(
        ["figure", "eager reference", "lmvae_fast", "difference"],
        [
            ("loss", parity["reference_loss"], parity["loss"], f"{parity['loss_difference']:.1e} relative"),
            ("gradients", "", "", f"{parity['gradient_difference']:.1e} of the largest"),
            ("greedy tokens", "", "", "identical" if parity["same_greedy_tokens"] else "different"),
        ],
    )
    rows = [
        ("training step, same greedy inputs", "reference_step_seconds", "free_running_step_seconds", "free_running_speedup"),
        ("training step, teacher forcing", "reference_step_seconds_again", "teacher_forced_step_seconds",
         "teacher_forced_speedup"),
        ("decoding", "reference_decode_seconds", "decode_seconds", "decode_speedup"),
    ]  # fmt: skip
    report.table(
        ["work", "eager reference, ms", "lmvae_fast, ms", "times faster"],
        [(name, round(1e3 * parity[a], 1), round(1e3 * parity[b], 1), f"{parity[c]:.1f}x") for name, a, b, c in rows],
    )


def _curves(run: Any) -> Any:
    import matplotlib.pyplot as plt

    history = run.result.history
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    train = [record for record in history if record["kind"] == "train"]
    if run.lm_losses:
        left.plot(run.lm_losses, linewidth=1)
        left.set(title="Decoder alone", xlabel="step", ylabel="nats per token")
    else:
        left.plot([record["step"] for record in train], [record["loss"] for record in train], linewidth=1)
        left.set(title="Loss", xlabel="step", ylabel="nats per sentence")
    evaluations = [record for record in history if record["kind"] == "eval"]
    for records, label, marker in ((train, "training", ""), (evaluations, "held out", "o")):
        steps = [record["step"] for record in records]
        middle.plot(steps, [record["reconstruction"] for record in records], marker=marker, markersize=4, label=label)
        right.plot(steps, [record["kl"] for record in records], marker=marker, markersize=4, label=label)
    middle.set(title="Reconstruction", xlabel="step", ylabel="nats per sentence")
    right.set(title="KL", xlabel="step", ylabel="nats per sentence")
    middle.legend(frameon=False)
    figure.tight_layout()
    return figure


def _map(run: Any) -> Any:
    import matplotlib.pyplot as plt
    import numpy as np

    points = plane(run.latents.cpu().numpy())
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for axis, factor in zip(axes, ("predicate", "topic"), strict=True):
        values = [example[factor] for example in run.held_out.factors[: len(points)]]
        common = [value for value, _ in Counter(values).most_common(6)]
        for value in [*common, None]:
            chosen = np.array([item == value if value is not None else item not in common for item in values])
            if chosen.any():
                axis.scatter(*points[chosen].T, s=9, alpha=0.7, linewidths=0, label=value or "other",
                             color="#c9ced8" if value is None else None)  # fmt: skip
        axis.set(title=f"by {factor}", xticks=[], yticks=[])
        axis.legend(frameon=False, fontsize=8, markerscale=1.6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure
