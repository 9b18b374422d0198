"""Lesions of one map fitted into the lungs of another, and the slice that shows them: real all around, new where they are.

A map is labels uint8, [H, W] or, of a volume, [Z, H, W]: 0 background, 1 healthy lung, 2 and above lesions, denser ones
last. No torch, and nothing but numpy.
"""

import numpy as np

from data.slices import HELD


def place(host: np.ndarray, donor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The host's map with the donor's lesions in its healthy lung, uint8 of the host's shape; both of the same rank.

    The box of the donor's lungs is stretched to that of the host's, mirrored or not by `rng`: what lies at the pleura
    stays near it. The host's own lesions stay. Where nothing falls on healthy lung, the host comes back as it was.
    """
    labels = host.copy()
    if rng.random() < 0.5:  # left for right
        donor = donor[..., ::-1]
    if not (host.any() and donor.any()):
        return labels
    lungs, donor = labels[box_of(host > 0)], donor[box_of(donor > 0)]  # the first a view
    healthy = lungs == 1
    for label in range(2, int(donor.max()) + 1):  # a denser label lies within the less dense: no gap opens between them
        lungs[healthy & (stretched(donor >= label, lungs.shape) > 0.5)] = label
    return labels


def box_of(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box, a slice for each axis, that holds all of a mask of any rank, which is not empty."""
    others = [tuple(other for other in range(mask.ndim) if other != axis) for axis in range(mask.ndim)]
    along = [np.flatnonzero(mask.any(axes)) for axes in others]
    return tuple(slice(found[0], found[-1] + 1) for found in along)


def stretched(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of any rank brought to a shape, linearly: shares 0..1, float32. Their half is a smooth outline."""
    shares = mask.astype(np.float32)
    for axis, (before, after) in enumerate(zip(mask.shape, shape, strict=True)):
        at = ((np.arange(after) + 0.5) * before / after - 0.5).clip(0, before - 1).astype(np.float32)
        low = at.astype(int)
        part = (at - low).reshape([-1 if other == axis else 1 for other in range(mask.ndim)])
        high = np.minimum(low + 1, before - 1)
        shares = shares.take(low, axis) * (1 - part) + shares.take(high, axis) * part
    return shares


def paste(real: np.ndarray, synthetic: np.ndarray, host: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The real HU with new lesions from the synthetic, all of one shape: [H, W] or [Z, H, W]; of the real one's type.

    Every pixel keeps its real value, bit for bit, but those whose label is new, where `labels` differ from `host`. These
    are synthetic, in the patient's own density: shifted by what the healthy lungs' medians differ.
    They mix with the real ones by half where healthy lung begins: at the pleura, and at another lesion, a mixed edge
    would leave a dark seam of the lung that was there before.
    """
    new, healthy = labels != host, (host == 1) & (labels == 1)
    shift = np.median(real[healthy]) - np.median(synthetic[healthy]) if healthy.any() else 0
    weight = np.clip(1 - 1.5 * share_around(labels == 1), 0, 1)[
        new
    ]  # a straight edge has healthy lung in 3 of 9 pixels
    mixed = weight * (synthetic[new] + shift) + (1 - weight) * real[new]
    pasted = real.copy()
    pasted[new] = np.rint(mixed.clip(*HELD))
    return pasted


def share_around(mask: np.ndarray) -> np.ndarray:
    """Share 0..1 of the 3 x 3 pixels around each that are in a mask [H, W] or [Z, H, W], float32; in plane only."""
    framed = np.pad(mask.astype(np.float32), [(0, 0)] * (mask.ndim - 2) + [(1, 1), (1, 1)])
    height, width = mask.shape[-2:]
    return sum(framed[..., y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9
