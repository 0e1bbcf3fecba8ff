"""One look for every plot of this repository: readable at a README's width, and in print without colour."""

from pathlib import Path
from typing import Any

OURS, RIVAL, LIMIT = "#1b5fa8", "#b4b8bf", "#c23b22"  # what is ours, what is not, and bounds that hold for both

SETTINGS: dict[Any, Any] = {
    "figure.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e6ea",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.markersize": 5,
}


def figure(
    rows: int = 1, columns: int = 1, width: float = 5.0, height: float = 3.2, **options: Any
) -> tuple[Any, Any]:
    """A figure with `[rows, columns]` axes of `width x height` inches each (axes always a 2-D array), in this style.

    `options` go to `matplotlib.pyplot.subplots`. The backend is Agg: no display is needed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(SETTINGS)
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def save(drawing: Any, path: Path) -> None:
    """Write a PNG and close the figure."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)
    plt.close(drawing)
