"""allocation.png: what each matrix got and what it costs, and what a different average would cost."""

from __future__ import annotations

from pathlib import Path

from halfturn.converter.allocate import Allocation, Matrix, pareto
from halfturn.converter.architectures import LINEARS

KINDS = tuple(name.rpartition(".")[2] for name in LINEARS)


def plot_allocation(path: str | Path, matrices: list[Matrix], chosen: list[Allocation]) -> None:
    """Draws predicted cost against bits for each matrix of the first allocation, and the Pareto curve with them all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    kinds = [kind for kind in KINDS if any(m.name.endswith(kind) for m in matrices)]
    kinds += sorted({m.name.rpartition(".")[2] for m in matrices} - set(kinds))
    for index, kind in enumerate(kinds):
        members = [m for m in matrices if m.name.endswith(kind)]
        color = f"C{index}"
        for m in members:
            widths = sorted(m.costs)
            left.plot(widths, [m.costs[w] for w in widths], color=color, alpha=0.15, linewidth=0.8)
        bits = [chosen[0].widths[m.name] for m in members]
        shift = (index - (len(kinds) - 1) / 2) * 0.08
        costs = [m.costs.get(b, 0.0) for m, b in zip(members, bits)]
        left.scatter([b + shift for b in bits], costs, s=14, color=color, label=kind)
    left.set(xlabel="bits", ylabel="predicted KL, nats a token", title="Every matrix and its width")
    left.legend(fontsize=8)
    curve = pareto(matrices, chosen[0].fixed, points=60)
    right.plot([bits for bits, _ in curve], [cost for _, cost in curve], color="0.4", label="best at each average")
    for allocation, marker in zip(chosen, "os^vD"):
        label = f"{allocation.method}, {allocation.bpw:.2f} bits"
        right.plot([allocation.bpw], [allocation.cost], marker, label=label)
    right.set(xlabel="bits per weight, scales included", title="Total cost against average bits")
    right.legend(fontsize=8)
    for axes in (left, right):
        if any((line.get_ydata(orig=False) > 0).any() for line in axes.get_lines()):  # else nothing has a logarithm
            axes.set_yscale("log")
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)
