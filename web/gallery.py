"""Pictures of gallery.html, into gallery/ beside it: one lung without lesion, with ground glass, with consolidation.

    python web/gallery.py                  # two of the shipped examples, as committed
    python web/gallery.py maps/P03*.png    # maps of your own, with lesions in them

The lung is the shipped generator's. Around an example's stands the phantom that its map is of; around others, air.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

WEB = Path(__file__).resolve().parent
sys.path.insert(0, str(WEB.parent))  # run as a script, only web/ itself is on it
import infer_onnx  # noqa: E402
from data import phantom, slices  # noqa: E402

STATES = {"healthy": 1, "glass": 2, "dense": 3}  # the label that all lesions of the map get
WINDOWS = {"lung": (-600, 1500), "soft": (40, 400)}  # level and width, HU
SHOWN = ("P01_S008", "P15_S009")  # of the examples
SOFT = 1.5  # pixels, deviation of the Gaussian that softens a lesion's edge


def body_of(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """HU [H, W] of the phantom that an example is a slice of; of any other map, air."""
    if path.resolve().parent != infer_onnx.EXAMPLES:
        return np.full(shape, -1000.0)
    number, position = (int(part[1:]) for part in path.stem.split("_"))
    level = float(np.linspace(0.96, 0.06, 24)[position - 1])  # of its 24 slices, from the feet upwards
    return phantom.draw_slice(phantom.draw_patient(0, number), level, *shape[:1])[0]


def states_of(generator: infer_onnx.Generator, labels: np.ndarray, body: np.ndarray) -> list[np.ndarray]:
    """HU [H, W] of each of STATES.

    Only the lesion is taken from the ill slices, so that the rest is the same, however far a stroke repaints the lungs.
    """
    lesion = labels > 1
    maps = [np.where(lesion, label, labels > 0).astype(np.uint8) for label in STATES.values()]
    healthy, *ill = (generator(one[None])[0].astype(float) for one in maps)
    share = ndimage.gaussian_filter(lesion.astype(float), SOFT)
    return [np.where(labels > 0, healthy + share * (hu - healthy), body) for hu in (healthy, *ill)]


def main(argv: list[str]) -> None:
    """Write the pictures, and the list of their names. Raises Mistake for a map that cannot be read, or is healthy."""
    paths = [Path(name) for name in argv] or [infer_onnx.EXAMPLES / f"{name}.png" for name in SHOWN]
    generator = infer_onnx.Generator(*infer_onnx.open_session(infer_onnx.SHIPPED_MODEL, "cpu"))
    (WEB / "gallery").mkdir(exist_ok=True)
    for path in paths:
        labels = slices.read_map(path)
        if labels.max() < 2:
            raise slices.Mistake(f"{path}: no lesion in it: paint one")
        for state, hu in zip(STATES, states_of(generator, labels, body_of(path, labels.shape)), strict=True):
            for window, (level, width) in WINDOWS.items():
                picture = slices.png(slices.windowed(hu, level, width))
                slices.write_bytes(WEB / "gallery" / f"{path.stem}_{state}_{window}.png", picture)
            print(f"{path.stem}, {state}: {hu[labels > 1].mean():.0f} HU where its lesions are")
    (WEB / "gallery/cases.js").write_text(f"const cases = {json.dumps([path.stem for path in paths])};\n")


if __name__ == "__main__":
    slices.exit_on_mistake(main)
