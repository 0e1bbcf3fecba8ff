"""One look for every plot of this repository: readable at a README's width, and in print without colour."""

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

DIGEST = "drawn-from"  # a text chunk of the PNG
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


def save(drawing: Any, path: Path, source: str = "", drawn_from: str = "") -> None:
    """Write a PNG and close the figure.

    `source`, where the numbers come from, stands below the figure in small print; `drawn_from`, a `digest`, is stored
    in the file, for `stored_digest` to find.
    """
    import matplotlib.pyplot as plt

    if source:
        drawing.text(0.01, -0.01, "\n".join(textwrap.wrap(source, 130)), va="top", fontsize=6.5, color="#6b7077")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, metadata={DIGEST: drawn_from} if drawn_from else None)
    plt.close(drawing)


def digest(data: Any) -> str:
    """Of what a figure shows: any JSON value."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def stored_digest(path: Path) -> str | None:
    """What `save` was given as `drawn_from`."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(DIGEST)
