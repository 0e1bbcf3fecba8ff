"""Learning curves and the before/after bars, from the trainer's own logs."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.quickstart.evaluate import ROWS

CURVES = ("loss", "distill/kl", "rewards/margins", "rewards/accuracies")


def plot(out: Path, stages: dict[str, Path], results: dict[str, dict[str, float]]) -> None:
    """Writes `heldout.png` and one `NAME.png` a stage into `out`."""
    figure, axes = plt.subplots(1, len(ROWS), figsize=(3 * len(ROWS), 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, ROWS.items(), strict=True):
        bars = axis.bar(
            list(results), [r[key] for r in results.values()], color=["#94a3b8", "#fca5a5", "#fcd34d", "#34d399"]
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
        axis.set_title(title, fontsize=9, wrap=True)
        axis.tick_params(axis="x", labelrotation=25, labelsize=8)
    figure.savefig(out / "heldout.png", dpi=150)
    plt.close(figure)
    for name, directory in stages.items():
        history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
        curves = [c for c in CURVES if any(c in row for row in history)]
        figure, axes = plt.subplots(
            1, len(curves), figsize=(3.2 * len(curves), 2.8), layout="constrained", squeeze=False
        )
        for axis, curve in zip(axes[0], curves, strict=True):
            axis.plot(*zip(*((row["step"], row[curve]) for row in history if curve in row), strict=True))
            axis.set_title(curve, fontsize=9)
            axis.set_xlabel("step", fontsize=8)
        figure.savefig(out / f"{name}.png", dpi=150)
        plt.close(figure)
