"""What can be told from a CT and its label map together, in one place: HU, the labels' density, how a map lies."""

import itertools
from pathlib import Path

import numpy as np

from data.slices import HU_OFFSET, Mistake

LUNG_HU = (-1000, -400)  # must contain the mean HU of healthy lung; covidgan.py, which stands alone, has the same
AERATED = -500  # HU: what is lower is lung or air, what is higher is tissue
TURNED = 40  # HU by which a lung that is turned against its CT lies denser: see turned


def check_pair(path: Path, hu: np.ndarray, labels: np.ndarray) -> None:
    """Raise Mistake for a real slice or volume that cannot be its map's: grey levels, no HU of lung, or turned.

    hu int16 and labels uint8, both [H, W] or [Z, H, W]: healthy lung is 1; less than a hundredth of it tells nothing.
    """
    if hu.max() <= 255 - HU_OFFSET:
        raise Mistake(f"{path}: no value above 255, so grey levels, not HU + {HU_OFFSET}: convert it first")
    lung = labels == 1
    if 100 * np.count_nonzero(lung) < hu.size:
        return
    mean = hu[lung].mean(dtype=float)
    if not LUNG_HU[0] <= mean <= LUNG_HU[1]:
        told = f"mean {mean:+.0f} in healthy lung, which has HU of {LUNG_HU[0]} to {LUNG_HU[1]}"
        raise Mistake(f"{path}: {told}: store HU + {HU_OFFSET}, mend the map, or overrule by --unchecked")
    if told := turned(hu, lung):
        raise Mistake(f"{path}: its map's lung {told}: turn one of them, or overrule by --unchecked")


def reversals(dimensions: int) -> dict[tuple[int, ...], str]:
    """Axes along which a mask, [Z, H, W] or [H, W], may be reversed against its CT -> what they are."""
    names = ("slices", "rows", "columns")[-dimensions:]
    return {
        axes: " and ".join(names[axis] for axis in axes)
        for count in range(1, dimensions + 1)
        for axes in itertools.combinations(range(dimensions), count)
    }


def turned(hu: np.ndarray, lung: np.ndarray) -> str | None:
    """How a healthy lung, bool [H, W] or [Z, H, W], is turned against its CT's HU, in words; None where it lies right.

    It then lies on more tissue than when it is turned back. All that is aerated counts alike, as much as the air around
    the body: no turn can take more from a lung that lies right than its own vessels, 30 HU in the volumes of 13
    patients, while turning back one that lies wrong took 47 HU or more. A small lung tells nothing.
    """
    if lung.ndim == 3:  # of a volume, fewer pixels tell as much
        step = max(1, lung.shape[2] // 128)
        hu, lung = hu[:, ::step, ::step], lung[:, ::step, ::step]
    if np.count_nonzero(lung) < (0.05 if lung.ndim == 2 else 0.01) * lung.size:
        return None
    hu = hu.clip(AERATED, 0)
    if lung.ndim == 3:  # reversed within its own bounds: above it there may be more, or fewer, slices than below
        with_lung = np.flatnonzero(lung.any((1, 2)))
        hu, lung = (part[with_lung[0] : with_lung[-1] + 1] for part in (hu, lung))
    found = {
        f"{what} reversed": hu[np.flip(lung, axes)].mean(dtype=float) for axes, what in reversals(lung.ndim).items()
    }
    if lung.shape[-1] == lung.shape[-2]:
        found["rows and columns exchanged"] = hu.swapaxes(-1, -2)[lung].mean(dtype=float)
    mean, best = hu[lung].mean(dtype=float), min(found, key=found.get)
    if not found[best] < mean - TURNED:
        return None
    return f"lies on more tissue than with {best}: it is turned against its CT"
