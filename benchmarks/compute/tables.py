"""Tables of docs/compute.md and README.md from the records of benchmarks/compute."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.common.records import load, where


def _pair_row(row: dict, ours: str) -> str:
    first, second = row[ours], row["optimus"]
    return (
        f"| {row['encoder']} x {row['decoder']} | {first['trainable'] / 1e6:,.1f} M | {first['fine_tuned_share']:.2%} | "
        f"{first['optimizer_bytes'] / 2**30:.2f} / {second['optimizer_bytes'] / 2**30:.2f} | "
        f"{first['activation_bytes'] / 2**30:.2f} / {second['activation_bytes'] / 2**30:.2f} | "
        f"{first['peak_bytes'] / 2**30:.1f} / {second['peak_bytes'] / 2**30:.1f} |"
    )


def compute() -> str:
    """Every published pair: what trains, FLOPs and bytes, frozen against fine-tuned."""
    record = load("compute/pairs.json")
    if record is None:
        return "Not counted."
    batch = record["shape"]["batch"]
    lines = [
        "| pair | trained | of the pair | GFLOP a sentence, LangVAE / Optimus | ratio | AdamW state, GiB | activations, GiB | "
        "peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    own = ("llamavae", record["llamavae_pair"])
    for ours, rows in (("langvae", record["langvae_pairs"]), own):
        for row in rows:
            flops = [row[name]["flops"] / batch / 1e9 for name in (ours, "optimus")]
            name, trained, share, *rest = _pair_row(row, ours).strip("| ").split(" | ")
            name += " (LlaMaVAE's recipe)" if ours == "llamavae" else ""
            figures = [name, trained, share, f"{flops[0]:,.1f} / {flops[1]:,.1f}", f"{flops[0] / flops[1]:.2f}", *rest]
            lines.append(f"| {' | '.join(figures)} |")
    cvae = record["cvae"]
    return "\n".join([
        *lines, "",
        f"Batch {batch}, {record['shape']['tokens']} tokens a sentence, z of {record['shape']['latent_dim']}. LlaMaVAE's "
        "latent, slots and MLP are not published; these are this package's. CVAE with G-Skip on "
        f"{cvae['decoder']} trains {cvae['trainable'] / 1e6:,.1f} M parameters ({cvae['share_of_decoder']:.2%} of the decoder) "
        f"at {cvae['flops'] / batch / 1e9:,.1f} GFLOP a sentence. Command: `{record['command']}`.",
    ])  # fmt: skip


def compute_published() -> str:
    """LangVAE's and CVAE's published parameter figures, from the shapes."""
    record = load("compute/pairs.json")
    if record is None:
        return "Not counted."
    figures, cvae = record["published_reduction"], record["cvae"]
    bert = {r["decoder"]: r["langvae"] for r in record["langvae_pairs"] if r["encoder"] == "bert-base-cased"}
    flops = {
        r["decoder"]: r["langvae"]["flops"] / r["optimus"]["flops"]
        for r in record["langvae_pairs"] if r["encoder"] == "bert-base-cased"
    }  # fmt: skip
    lines = ["| BERT-base with | trained | of the pair's parameters | of Optimus's FLOPs |", "|---|---|---|---|"]
    for decoder, row in bert.items():
        lines.append(
            f"| {decoder} | {row['trainable'] / 1e6:.2f} M | {row['fine_tuned_share']:.2%} | {flops[decoder]:.1%} |"
        )
    large = [share for decoder, share in flops.items() if decoder != "gpt2"]
    return "\n".join([
        *lines, "",
        f"Parameters fall by {figures['mean_reduction_of_large']:.1%} on average for the three large decoders and by "
        f"{figures['reduction_of_gpt2']:.0%} for GPT-2; FLOPs of a step by {1 - sum(large) / len(large):.0%} and "
        f"{1 - flops['gpt2']:.0%}. CVAE with G-Skip: encoder {cvae['encoder_parameters']:,}, adapters "
        f"{cvae['adapter_parameters']:,}, G-Skip {cvae['g_skip_parameters']:,} parameters, as published.",
    ])  # fmt: skip


def compute_steps() -> str:
    """Measured steps, frozen against fine-tuned."""
    record = load("compute/steps.json")
    if record is None:
        return "Not measured."
    lines = [
        "| pair | batch | LangVAE step | Optimus step | ratio | held + peak extra, MiB: LangVAE | Optimus |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        memory = [
            f"{row[n]['held_bytes'] / 2**20:,.0f} + {row[n]['extra_bytes'] / 2**20:,.0f}"
            for n in ("langvae", "optimus")
        ]
        lines.append(
            f"| {row['encoder']} x {row['decoder']} | {row['batch']} | {row['langvae']['seconds'] * 1e3:,.0f} ms | "
            f"{row['optimus']['seconds'] * 1e3:,.0f} ms | {row['optimus_over_langvae']:.2f} | {memory[0]} | {memory[1]} |"
        )
    return "\n".join([
        *lines, "", f"Machine: {where(record['machine'])}. Command: `{record['command']}`.",
    ])  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "compute": compute, "compute-published": compute_published, "compute-steps": compute_steps,
}  # fmt: skip
