"""Lesions of other maps, fitted into healthy lung, and pasted into the real slice that lies under it; numpy alone.

A map is labels uint8, [H, W] or, of a volume, [Z, H, W]: 0 background, 1 healthy lung, 2 and above lesions, denser ones
last. The host is the map that gets lesions, the donor the one that they are taken from.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.slices import HELD, NIFTI, Mistake, read_map


def place(host: np.ndarray, donor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The host's map with the donor's lesions in its healthy lung, uint8 of the host's shape; both of the same rank.

    The box of the donor's lungs is stretched to that of the host's, mirrored or not by `rng`: what lies at the pleura
    stays near it. The host's own lesions stay. Where nothing falls on healthy lung, the host comes back as it was.
    """
    labels = host.copy()
    if rng.random() < 0.5:  # left for right
        donor = donor[..., ::-1]
    lungs, donor = labels[box_of(host > 0)], donor[box_of(donor > 0)]  # the first a view
    healthy = lungs == 1
    for label in range(2, int(donor.max()) + 1):  # a denser label lies within the less dense: no gap opens between them
        lungs[healthy & (stretched(donor >= label, lungs.shape) > 0.5)] = label
    slices = [of.reshape(-1, *of.shape[-2:]) for of in (labels, host)]
    for map_, before in ((after, before) for after, before in zip(*slices, strict=True) if (after != before).any()):
        strip = (map_ == 1) & (share_around(map_ == 0) > 0)  # at the pleura, one pixel wide: a dark seam
        for label in np.unique(map_[map_ != before]):
            map_[strip & (share_around((map_ == label) & (before == 1)) > 0)] = label
    return labels


def box_of(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box, a slice for each axis, that holds all of a mask of any rank, which is not empty."""
    along = [mask.any(tuple({*range(mask.ndim)} - {axis})).nonzero()[0] for axis in range(mask.ndim)]
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
    """The real HU with new lesions from the synthetic, all of one shape, [H, W] or [Z, H, W]; of the real one's type.

    Where `labels` are the host's, each pixel keeps its real value, bit for bit. New ones are synthetic, shifted by what
    the medians of healthy lung differ: so healthy lungs agree. Where healthy lung begins, within two pixels, they are
    mixed with the real ones. Not at the pleura, nor at another lesion: there a mixed edge would be a dark seam.
    """
    new, healthy, pasted = labels != host, (host == 1) & (labels == 1), real.copy()
    shift = np.median(real[healthy]) - np.median(synthetic[healthy]) if healthy.any() else 0
    planes = [part.reshape(-1, *part.shape[-2:]) for part in (pasted, synthetic, labels, new)]
    for hu, painted, map_, here in zip(*planes, strict=True):  # [H, W] each, the first a view: a volume is large
        share = np.clip(1 - 1.5 * share_around(map_ == 1)[here], 0, 1)  # 1/2 at a straight edge, 1 behind it
        mixed = share * (painted[here] + shift) + (1 - share) * hu[here]
        hu[here] = np.rint(mixed.clip(*HELD))
    return pasted


def share_around(mask: np.ndarray) -> np.ndarray:
    """Share 0..1 of the 3 x 3 pixels around each that are in a mask [H, W], float64; beyond the border nothing is."""
    framed, (height, width) = np.pad(mask.astype(float), 1), mask.shape
    return sum(framed[y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9


def place_one_of(host: np.ndarray, donors: Sequence[Path], n_labels: int, rng: np.random.Generator) -> np.ndarray:
    """The host's map with lesions of one of the donors' files; the host itself where none of them fits.

    Files are tried in an order drawn by `rng`, until lesions of a hundredth of the lung or more fall on healthy lung.
    A slice gets a slice's, a volume a volume's. Raises Mistake as `read_donor` does, and for a slice as a volume's.
    """
    for i in rng.permutation(len(donors)):
        donor = read_donor(donors[i], n_labels)
        ill = np.flatnonzero((donor > 1).any((1, 2)))
        if host.ndim > 2 and len(donor) == 1 < len(host):
            raise Mistake(f"{donors[i]}: one slice: a volume's lesions come from volumes, or of --lesions alone")
        if ill.size:
            labels = place(host, donor if host.ndim > 2 else donor[rng.choice(ill)], rng)
            if np.count_nonzero(labels != host) > np.count_nonzero(host) / 100:
                return labels
    return host


def digest_of(donors: Sequence[Path]) -> str:
    """SHA-256 of the donors' files, by which a run knows that it goes on with the same lesions."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in donors)).hexdigest()


@lru_cache(20)
def read_donor(path: Path, n_labels: int) -> np.ndarray:
    """Labels uint8 [Z, H, W] of a label volume, or of a map: [1, H, W].

    A PNG of five or more square slices, one below the other from the feet upwards, is a volume: see models/lesions.
    Raises Mistake for a file that cannot be read, and for a label that is not below n_labels.
    """
    if path.name.lower().endswith(NIFTI):
        from data.volumes import read_label_volume  # needs nibabel

        return read_label_volume(path, tuple(range(n_labels)))[1]
    labels = read_map(path)
    if labels.max() >= n_labels:
        raise Mistake(f"{path}: label {labels.max()}: the model's labels are 0..{n_labels - 1}")
    height, width = labels.shape
    return labels.reshape(-1, width, width) if height % width == 0 and height > 4 * width else labels[None]
