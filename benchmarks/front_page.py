"""The picture of the README: gigabytes and quality of one big table, drawn from the results of `benchmarks/quality.py`.

python benchmarks/front_page.py      writes docs/images/front.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "quality.json", ROOT / "docs" / "images" / "front.png"

ROWS, DIM = 100_000_000, 256  # the table that is drawn; its quality is that of the same width on the text of docs/quality.md

#: names in the results -> what the picture calls them
SHOWN = {
    "fp32, Adam": "fp32 with Adam",
    "int8 of the finished fp32 table": "its int8 rows, made after training",
    "signs of the finished fp32 table": "its signs, taken after training",
    "Counter(8), 4 planes": "Counter(8), 4 planes",
    "Counter(8), 2 planes": "Counter(8), 2 planes",
    "Counter(8)": "Counter(8), 1 plane",
    "Counter(4), 4 planes": "Counter(4), 4 planes",
    "Counter(4)": "Counter(4), 1 plane",
}


class Line(NamedTuple):
    """Gigabytes of the table in training (with all that its optimizer keeps) and served, and perplexity over that of fp32."""

    name: str
    training: float
    served: float
    ratio: float


def lines(results: Path = RESULTS) -> list[Line]:
    """What is drawn, in its order."""
    found = {row["name"]: row for row in json.loads(results.read_text())["rows"] if row["task"] == "lm"}
    rows_measured = 24_000
    made = []
    for name, label in SHOWN.items():
        row = found[name]
        after = name.endswith(" of the finished fp32 table")  # in training it is the fp32 table above
        bits = 96.0 if after else row["training_bits"]
        made.append(Line(label, bits * DIM / 8 * ROWS / 1e9, row["served_bytes"] / rows_measured * ROWS / 1e9, row["ratio"]))
    return made


def draw(target: Path = PICTURE) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    made = lines()[::-1]
    figure, (sizes, quality) = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True, layout="constrained", width_ratios=(3, 2))
    places = range(len(made))
    for offset, field, color in ((0.19, "training", "#1f77b4"), (-0.19, "served", "#9ecae1")):
        values = [getattr(line, field) for line in made]
        bars = sizes.barh([place + offset for place in places], values, 0.36, color=color, label=f"in {field}" if offset > 0 else field)
        sizes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
    sizes.set(xlabel="GB", title=f"{ROWS // 10**6} million rows of {DIM}", yticks=list(places), yticklabels=[line.name for line in made])
    sizes.margins(x=0.1)
    sizes.legend(loc="center right")
    quality.axvline(1, color="black", linewidth=0.8)
    quality.hlines(list(places), 1, [line.ratio for line in made], color="#737373", linewidth=1.5)
    quality.plot([line.ratio for line in made], list(places), "o", color="#1f77b4")
    for place, line in enumerate(made):
        quality.annotate(f"{line.ratio:.3f}", (line.ratio, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    quality.set(xlabel="perplexity / that with tuned fp32", xlim=(0.9, 1.33))
    quality.set_title("a small language model (left is better)", fontsize=10)
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    draw()
    for line in lines():
        print(f"{line.name:34}{line.training:8.1f} GB in training {line.served:8.1f} GB served {line.ratio:8.3f} of fp32's perplexity")
