"""The pages that ``lmvae-fast profile`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmvae_fast.reports.page import Report, style


def write_train(record: dict[str, Any], path: Path) -> Path:
    """Write the report of a profiled training step (``profiling.train.profile_train``)."""
    style()
    sides = record["sides"]
    fast = sides["fast"]
    report = Report(
        "Where a training step goes",
        f"{record['sentences']} sentences, {record['tokens']} tokens, {record['precision']}, {_machine(record)}.",
    )
    cards = [
        (f"{fast['seconds'] * 1e3:,.1f} ms", "a step of the fast path"),
        (f"{fast['tokens_per_s']:,.0f}", "tokens per second"),
        (f"{fast['share_of_matrix_rate']:.0%}", "of the machine's measured matrix rate"),
        (_mib(fast["held_bytes"] + fast["peak_extra_bytes"]), "held at most"),
    ]
    if "speedup" in record:
        cards.insert(0, (f"{record['speedup']:.2f}x", "the eager reference's step"))
    if fast["joules"] is not None:
        cards.append((f"{fast['joules']:,.2f} J", "a step, by the GPU's counter"))
    report.cards(cards)
    report.heading("Time by part", "Forward and backward together; parts are shares of a traced step.")
    report.figure(_bars(sides), "time by part, one bar per side")
    for side in sides.values():
        report.heading(side["name"])
        _parts_table(report, side)
    report.heading(
        "How near to the machine's limits", "The least time its matrix rate or bandwidth allows, over time taken."
    )
    report.figure(_limits(sides), "share of the limit by part")
    report.heading("Whole steps")
    report.table(
        ("side", "ms", "tokens/s", "GFLOP", "weights and state", "peak beside them", "joules", "trace"),
        [
            (
                side["name"], side["seconds"] * 1e3, side["tokens_per_s"], side["flops"] / 1e9, _mib(side["held_bytes"]),
                _mib(side["peak_extra_bytes"]), _joules(side), Path(side["trace"]).name,
            )
            for side in sides.values()
        ],
    )  # fmt: skip
    _limits_table(report, record)
    if record["encoder_pass_seconds"] is not None:
        milliseconds = record["encoder_pass_seconds"] * 1e3
        report.table(("beside the step", "ms"), [("one pass over the frozen encoder, kept afterwards", milliseconds)])
    return report.write(path)


def write_generate(record: dict[str, Any], path: Path) -> Path:
    """Write the report of profiled decoding (``profiling.generate.profile_generate``)."""
    style()
    rows = record["batches"]
    best = max((row["sides"]["fast"] for row in rows), key=lambda side: side["sentences_per_s"])
    alone = rows[0]["sides"]["fast"]
    report = Report(
        "Where decoding goes",
        f"{record['tokens']} tokens a sentence, none ends early; weights in {record['matrix_dtype']}, {_machine(record)}.",
    )
    cards = [
        (f"{best['sentences_per_s']:,.1f}", "sentences per second at the best batch size"),
        (f"{best['tokens_per_s']:,.0f}", "tokens per second there"),
        (f"{alone['first_token_seconds'] * 1e3:,.1f} ms", f"to the first token, batch {rows[0]['batch']}"),
        (f"{alone['share_of_limit']:.0%}", f"of the machine's limit, batch {rows[0]['batch']}"),
    ]
    if "speedup" in rows[0]:
        cards.insert(0, (f"{max(row['speedup'] for row in rows):.2f}x", "the eager loop, at most"))
    report.cards(cards)
    report.heading("Over batch sizes", "Whole sentences, latents to text.")
    report.figure(_speeds(rows), "sentences per second and share of the limit by batch size")
    report.table(
        ("batch", "side", "sentences/s", "tokens/s", "ms a step", "ms to the first token", "GFLOP a step", "MB a step",
         "bound by", "of its limit", "peak beside the weights", "joules", "trace"),
        [
            (
                row["batch"], side["name"], side["sentences_per_s"], side["tokens_per_s"], side["seconds_per_step"] * 1e3,
                side["first_token_seconds"] * 1e3, side["flops_per_step"] / 1e9, side["bytes_per_step"] / 1e6,
                side["bound_by"], f"{side['share_of_limit']:.1%}", _mib(side["peak_extra_bytes"]), _joules(side),
                Path(side["trace"]).name,
            )
            for row in rows for side in row["sides"].values()
        ],
    )  # fmt: skip
    for row in rows:
        report.heading(f"Batch {row['batch']}", "Time by part; parts are shares of one traced decoding.")
        report.figure(_bars(row["sides"]), f"time by part at batch {row['batch']}, one bar per side")
        for side in row["sides"].values():
            _parts_table(report, side, side["name"])
    report.heading("The machine")
    _limits_table(report, record)
    weights = record["weight_bytes"] / 1e6
    report.table(("beside it", "value"), [("weights that every step multiplies by, MB", weights)])
    return report.write(path)


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return f"on {machine['cpu']} ({machine['device']}, {machine['threads']} threads), torch {machine['torch']}"


def _parts_table(report: Report, side: dict[str, Any], title: str = "part") -> None:
    report.table(
        (title, "ms", "share", "GFLOP", "MB moved", "of matrix rate", "of bandwidth", "bound by", "of its limit"),
        [
            (
                row["part"], row["seconds"] * 1e3, f"{row['share']:.1%}", row["flops"] / 1e9, row["bytes"] / 1e6,
                f"{row['share_of_matrix_rate']:.1%}", f"{row['share_of_bandwidth']:.1%}", row["bound_by"],
                f"{row['share_of_limit']:.1%}",
            )
            for row in side["parts"]
        ],
    )  # fmt: skip


def _limits_table(report: Report, record: dict[str, Any]) -> None:
    limits = record["limits"]
    report.table(
        ("limit of this machine, measured in the same run", "value"),
        [
            ("copy, GB/s", limits["copy_bytes_per_s"] / 1e9),
            ("matrix product, float32, GFLOP/s", limits["matmul_float32_flops_per_s"] / 1e9),
            ("matrix product, bfloat16, GFLOP/s", limits["matmul_bfloat16_flops_per_s"] / 1e9),
        ],
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _joules(side: dict[str, Any]) -> str | float:
    return side["no_energy_because"] if side["joules"] is None else round(side["joules"], 3)


def _bars(sides: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.9 + 0.7 * len(sides)))
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for at, side in enumerate(sides.values()):
        left = 0.0
        for index, row in enumerate(side["parts"]):
            width = row["seconds"] * 1e3
            axis.barh(at, width, left=left, color=colours[index], label=row["part"] if at == 0 else None)
            left += width
    axis.set(yticks=range(len(sides)), yticklabels=list(sides), xlabel="milliseconds")
    axis.invert_yaxis()
    axis.legend(ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    return figure


def _limits(sides: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    names = [row["part"] for row in sides["fast"]["parts"]]
    for at, (name, side) in enumerate(sides.items()):
        places = [index + (at - (len(sides) - 1) / 2) * 0.35 for index in range(len(names))]
        axis.bar(places, [100 * min(row["share_of_limit"], 1.0) for row in side["parts"]], 0.33, label=name)
    axis.set(xticks=range(len(names)), xticklabels=names, ylabel="% of the limit", ylim=(0, 100))
    axis.legend(frameon=False)
    return figure


def _speeds(rows: list[dict[str, Any]]) -> Any:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
    batches = [row["batch"] for row in rows]
    for name in rows[0]["sides"]:
        sides = [row["sides"][name] for row in rows]
        left.plot(batches, [side["sentences_per_s"] for side in sides], marker="o", label=name)
        right.plot(batches, [100 * side["share_of_limit"] for side in sides], marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="batch", ylabel="sentences/s")
    right.set(xscale="log", xlabel="batch", ylabel="% of the limit", ylim=(0, None))
    for axis in (left, right):
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
    left.legend(frameon=False)
    figure.tight_layout()
    return figure
