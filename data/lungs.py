"""Lungs found in a chest CT, for sets that come without lung masks (`data/prepare.py --lungs auto`)."""

import numpy as np
from scipy import ndimage


def find_lungs(hu: np.ndarray, diseased: np.ndarray, millimetres: np.ndarray) -> np.ndarray:
    """Find the lungs, bool [Z, H, W], in HU [Z, H, W]; diseased voxels, bool [Z, H, W], belong to them.

    The steps are the usual ones: air inside the body, except gas, in large pieces; then vessels are included.
    """
    air = np.stack([enclosed_air(plane, millimetres) for plane in hu])
    if not air.any():
        return diseased
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    pieces, count = ndimage.label(air, in_plane)
    means = ndimage.mean(hu, pieces, np.arange(count + 1))
    means[0] = 0
    gas = (np.median(hu[air]) - 1000) / 2  # windpipe, stomach and bowel are halfway to air, or further
    pieces, _ = ndimage.label(air & (means >= gas)[pieces])
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    lungs = (sizes > 0.05 * sizes.max())[pieces] | diseased
    return np.stack([close(plane, millimetres) if plane.any() else plane for plane in lungs])


def enclosed_air(hu: np.ndarray, millimetres: np.ndarray) -> np.ndarray:
    """Air inside the body, bool [H, W], of one slice of HU [H, W].

    The slice ends where only a constant or padding, such as -1000, -1024 and -3024 side by side, follows: its corners
    are outside the body, and lungs that a tight crop cuts off are not.
    """
    enclosed = np.zeros(hu.shape, bool)
    rows, columns = (np.flatnonzero(np.ptp(hu.clip(-1000), axis)) for axis in (1, 0))
    if not rows.size:
        return enclosed
    field = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    air = ndimage.gaussian_filter(hu[field].astype(np.float32), 0.7 / millimetres) < -380
    body = widen(shrink(~air, 2.5, millimetres), 2.5, millimetres) & ~air  # without the table's shell and without tubes
    spaces, _ = ndimage.label(~body)
    outside = spaces[[0, 0, -1, -1], [0, -1, 0, -1]]
    enclosed[field] = air & ~np.isin(spaces, outside)
    return enclosed


def close(lungs: np.ndarray, millimetres: np.ndarray) -> np.ndarray:
    """Include vessels and bronchi in a lung mask [H, W]: gaps of up to 10 mm and holes of up to 3 square centimetres.

    Larger holes stay: the liver's dome is one.
    """
    closed = lungs | shrink(widen(lungs, 5, millimetres), 5, millimetres)
    holes, _ = ndimage.label(~closed)
    areas = np.bincount(holes.ravel()) * millimetres.prod()
    areas[np.concatenate([holes[[0, -1]].ravel(), holes[:, [0, -1]].ravel()])] = np.inf  # open to the border
    areas[0] = 0
    return (areas < 300)[holes]


def widen(mask: np.ndarray, radius: float, millimetres: np.ndarray) -> np.ndarray:
    """Dilate a mask [H, W] by a radius in mm."""
    return ndimage.distance_transform_edt(~mask, sampling=millimetres) <= radius if mask.any() else mask


def shrink(mask: np.ndarray, radius: float, millimetres: np.ndarray) -> np.ndarray:
    """Erode a mask [H, W] by a radius in mm, but not from the border of the slice."""
    return ~widen(~mask, radius, millimetres)
