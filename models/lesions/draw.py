"""Draw the lesions that ship in this folder, by the phantom's code: no patient's, so they may be passed on.

    python models/lesions/draw.py               # writes L01.png ... L18.png beside this file, in a minute

A file is the label map of one phantom from base to apex, 32 square slices one below the other: a volume, or 32 maps.
`infer_onnx.py --lesions` takes them where no folder is named. The same bytes on the same machine.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from data import phantom, slices  # noqa: E402

SEED, FILES, LEVELS, SIZE = 32, 18, 32, 128
MARGIN = 20  # pixels that a slice is drawn larger on each side: the chest wall is of no use here
INWARD = 1, 0, -0.5  # in turn: lesions near the pleura, as the phantom's own, anywhere, and deep in the lung
SEVERITY = 0.9, 1.4, 2.4  # in turn, three files each: their size


def draw_volume(number: int) -> np.ndarray:
    """Labels uint8 [LEVELS, SIZE, SIZE] of a phantom whose lesions are of all sizes, from the feet upwards."""
    patient, rng = phantom.draw_patient(SEED, number), np.random.default_rng([SEED, number])
    points, depths = phantom.points_in_lungs(patient.body, rng)
    lesions = []
    for lesion in phantom.draw_lesions(rng, points, depths * INWARD[number % 3]):
        size = SEVERITY[number // 3 % 3] * np.exp(rng.uniform(np.log(0.3), 0)) * rng.uniform(0.7, 1.4, 3)
        lesions.append(lesion._replace(radii=tuple((size * lesion.radii).tolist())))
    patient, levels = patient._replace(lesions=lesions), np.linspace(0.96, 0.06, LEVELS).tolist()
    labels = np.stack([phantom.draw_slice(patient, level, SIZE + 2 * MARGIN)[1] for level in levels])
    inner = labels[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert np.count_nonzero(inner) == np.count_nonzero(labels), f"phantom {number}: its lungs reach beyond the picture"
    return inner


if __name__ == "__main__":
    for number in range(1, FILES + 1):
        slices.write_map(HERE / f"L{number:02d}.png", draw_volume(number).reshape(-1, SIZE))
