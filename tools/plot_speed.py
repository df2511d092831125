"""Draws docs/images/speed-light.svg and speed-dark.svg from the figures in docs/images/speed.json.

python tools/plot_speed.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
COLOURS = {"light": ("#1f2328", "#9aa4b2", "#2f5fd0"), "dark": ("#dfe3ea", "#6b7685", "#7aa2ff")}
"""Colours of text, of other engines, of this engine."""


def main() -> None:
    """Write both pictures."""
    figures = json.loads((FOLDER / "speed.json").read_text(encoding="utf-8"))
    mpl.rcParams |= {"svg.hashsalt": "mptserve", "font.family": "sans-serif", "font.size": 9}  # reproducible file
    for name, colours in COLOURS.items():
        draw(figures, FOLDER / f"speed-{name}.svg", *colours)


def draw(figures: dict[str, Any], path: Path, text: str, theirs: str, ours: str) -> None:
    """Write one picture: a wide panel of horizontal bars above two panels that share their bar names."""
    figure = plt.figure(figsize=(8, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3.4, 8])
    top = figure.add_subplot(grid[0, :])
    left = figure.add_subplot(grid[1, 0])
    right = figure.add_subplot(grid[1, 1], sharey=left)
    for ax, panel in zip((top, left, right), figures["panels"], strict=True):
        bars = panel["bars"]
        values = [bar["value"] for bar in bars]
        drawn = ax.barh(range(len(bars)), values, color=[ours if bar["ours"] else theirs for bar in bars], height=0.72)
        ax.bar_label(drawn, [f"{value:g}" for value in values], color=text, padding=3)
        ax.set_yticks(range(len(bars)), [bar["name"] for bar in bars], color=text)
        ax.set_ylim(len(bars) - 0.4, -0.6)
        ax.set_title(panel["title"], fontsize=10, color=text)
        ax.set_xlim(0, max(values) * 1.14)
        ax.tick_params(colors=text, length=0)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
        ax.spines["left"].set_color(text)
        ax.set_xticks([])
    right.tick_params(labelleft=False)
    figure.supxlabel(figures["xlabel"], color=text, fontsize=9)
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    main()
