"""What the tour trains on, draws and measures with: slices, pictures in rows, curves, features, the page itself."""

import functools
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image
from scipy import ndimage

import covidgan
import eval as evaluation
import features
import infer_onnx
from data import phantom, slices

CARD = Path(__file__).resolve().parents[1] / "models/README.md"


class Page:
    """A script in cells (`# %%`) as a page FOLDER/NAME.md: its words, and a cell's picture with what was measured."""

    def __init__(self, script: Path, folder: Path) -> None:
        self.script, self.folder, self.pictures = script, folder, folder / script.stem
        self.captions: dict[str, str] = {}  # by the picture's name
        self.pictures.mkdir(parents=True, exist_ok=True)

    def show(self, name: str, figure: Figure, caption: str) -> Image.Image:
        """Save a cell's picture; a notebook shows what a cell's last line returns."""
        figure.savefig(self.pictures / f"{name}.png", dpi=80)
        self.captions[name] = caption
        print(f"\n{name}: {caption}", flush=True)
        return Image.open(self.pictures / f"{name}.png")

    def write(self) -> None:
        """Write the page. A cell with a picture is one with a line that begins with page.show("NAME"."""
        parts, line = [], 1
        for cell in re.split(r"(?m)^(?=# %%)", self.script.read_text()):
            if cell.startswith("# %% [markdown]"):
                parts.append(re.sub(r"(?m)^# ?", "", cell.partition("\n")[2].strip()))
            elif shown := re.search(r'(?m)^page\.show\("(\w+)"', cell):
                picture = f"![{shown[1]}]({self.pictures.name}/{shown[1]}.png)"
                parts.append(f"{picture}\n\n*{self.captions[shown[1]]}* [Its code]({self.script.name}#L{line})")
            line += cell.count("\n")
        (self.folder / f"{self.script.stem}.md").write_text("\n\n".join(parts) + "\n")


def tiles(
    titles: list[str], pictures: list[ArrayLike], columns: int, plots: int = 0, shape: float = 1
) -> tuple[Figure, list[Axes]]:
    """Rows of pictures, grey in [-1, 1] or RGB, `shape` high for 1 wide; below, a row of plots, which are returned."""
    heights = [11 / columns * shape * (len(pictures) // columns) + 0.3, 2.6][: 1 + bool(plots)]  # inches
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    above, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    titles = titles + [""] * (len(pictures) - len(titles))
    for axes, title, picture in zip(
        above.subplots(len(pictures) // columns, columns).flat, titles, pictures, strict=True
    ):
        axes.imshow(picture, cmap="gray", vmin=-1, vmax=1, aspect="auto")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    return figure, [*below[0].subplots(1, plots, squeeze=False)[0]] if plots else []


def bars(axes: Axes, values: dict[str, float], label: str) -> None:
    """Horizontal bars in a plot, the first one above."""
    axes.barh([*values], [*values.values()])
    axes.invert_yaxis()
    axes.set_xlabel(label)


def curves_of(stats: Path) -> dict[str, np.ndarray]:
    """The figures of every step of a training, as running means [steps], from its stats.jsonl."""
    steps = [json.loads(line) for line in stats.read_text().splitlines()]
    found = {name: np.array([step[name] for step in steps]) for name in ("d", "gan", "dfm", "alpha", "beta")}
    return {name: ndimage.uniform_filter1d(values, 25, mode="nearest") for name, values in found.items()}


@functools.cache
def classifier() -> features.FeatureNet:
    """The feature network that needs no download."""
    return features.load_features(features.find_weights("efficientnet-lite0", None), "efficientnet-lite0")


def looks(lungs: torch.Tensor) -> np.ndarray:
    """What an ImageNet classifier sees in lungs [N, 1, H, W] in [-1, 1]: features [N, 1280], for KID."""
    with torch.no_grad():
        return classifier()(((lungs[:, 0] + 1) * 127.5).round().byte())[-1].numpy()


def draw_chests(folder: Path, patients: int) -> list[str]:
    """Write 16 slices of each of some phantom patients, 96 x 96 about the lungs, with their maps; returns the names."""
    (folder / "maps").mkdir(parents=True)
    (folder / "images").mkdir()
    names = []
    for number in range(1, patients + 1):
        patient = phantom.draw_patient(0, number)
        for k in range(1, 17):
            hu, labels = (x[24:120, 24:120] for x in phantom.draw_slice(patient, 0.95 - 0.05 * k, 144))
            names.append(slices.slice_name(number, k))
            slices.write_image(folder / "images" / f"{names[-1]}.png", hu)
            slices.write_map(folder / "maps" / f"{names[-1]}.png", labels)
    return names


def blurred(lungs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Lungs [N, 1, H, W] out of focus: each pixel the mean of the lung about it, by a Gaussian of one pixel."""
    inside = (labels > 0).float()
    total, weight = (ndimage.gaussian_filter(x, (0, 0, 1, 1)) for x in (lungs * inside, inside))
    return covidgan.lung_target(torch.from_numpy(total / weight.clip(1e-6)), labels)


def firing(net: covidgan.WeightingNet, seen: torch.Tensor) -> float:
    """Share, %, of the hidden neurons of alpha's or beta's network that fire for features [N, c, H, W]."""
    with torch.no_grad():
        return 100 * (net.fc[:2](net.convs(seen).mean((2, 3))) > 0).float().mean().item()


def grey(hu: np.ndarray) -> np.ndarray:
    """HU through the window, as a picture in [-1, 1]."""
    return slices.windowed(hu) / 127.5 - 1


def card() -> dict[str, str]:
    """The figures of the shipped generator's card, by row: what stands in the table's other columns."""
    return dict(re.findall(r"(?m)^\| ([^|]+) \| (.+) \|$", CARD.read_text()))


def make(generator: infer_onnx.Generator, labels: np.ndarray, seed: int = 0, density: float = np.nan) -> np.ndarray:
    """HU [H, W] of a map; where the generator takes them, of a seed and of a density, HU, by default its own."""
    told = {"seed": np.array([seed]), "density": np.array([density]), "detail": np.array([np.nan])}
    return generator(labels[None], told)[0].astype(float)


def neighbours(volume: list[np.ndarray], maps: list[np.ndarray]) -> float:
    """Mean correlation of detail finer than 3 pixels, where it is healthy, of slices that follow each other, HU."""
    pairs = zip(pairwise(volume), pairwise(maps), strict=True)
    found = [evaluation.likeness(*np.float64(hu), (a == 1) & (b == 1)) for hu, (a, b) in pairs]
    return float(np.mean([pair["detail"] for pair in found]))
