"""Built-in data: a procedural phantom of axial chest CT with its label maps. No download, no real patient.

    python data/phantom.py                                      # data/phantom: 16 patients, 24 slices each, 256 x 256
    python data/phantom.py --out data/tiny --size 64 --patients 4 --slices 6

A patient is drawn once from the seed: build, textures, vessel trees, lesions. A slice is a cut through that patient.
Shapes are signed distances in mm, negative inside: the lungs are the chest cavity minus everything else that lies in
it, so that heart, aorta, spine and diaphragm shape them. Positions are in mm: x to the image's right (the patient's
left), y down (to the back), z from the top; the level is z as a share of the lungs' height, 0 at the apex, 1 at the
base. `slices.py` gives the format of the result.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only data/ itself is on it
from data import slices
from data.slices import LARGEST, SIDES, check_ranges, slice_name

HEIGHT = 250  # of the lungs, mm
RAISED = 6  # mm by which y = 0 of the outlines lies above the picture's middle
AIR, FAT, MUSCLE, BLOOD, LIVER, BONE = -1000, -100, 50, 40, 55, 300  # HU
LUNG, GROUND_GLASS, CONSOLIDATION = 1, 2, 3  # labels

# fmt: off
# Outlines of an average build, mm. A row is (level, x, y, half width, half depth); between rows they change linearly.
BODY = ((0, 0, 24, 154, 82), (0.2, 0, 14, 156, 99), (0.5, 0, 8, 156, 109), (1, 0, 8, 154, 109))
CHEST_HALF = (  # the left half of the chest cavity; the right one is its mirror image
    (0, 33, 16, 33, 34), (0.1, 44, 10, 46, 52), (0.2, 48, 5, 59, 69), (0.35, 52, 3, 69, 82), (0.55, 54, 1, 77, 91),
)
DOMES = (  # of the diaphragm
    ((0.75, -64, -12, 10, 12), (0.79, -64, -12, 30, 34), (0.89, -64, -12, 54, 62), (1, -65, -12, 66, 78)),  # liver
    ((0.81, 66, -6, 10, 12), (0.85, 66, -6, 28, 34), (0.93, 66, -8, 50, 60), (1, 66, -10, 64, 76)),  # spleen
)
VERTEBRA = ((0, 0, 44, 15, 12), (0.3, 0, 53, 16, 14), (0.6, 0, 55, 18, 15), (1, 0, 52, 20, 16))
BEHIND_SPINE = ((0, 0, 70, 22, 30), (0.3, 0, 82, 21, 40), (1, 0, 88, 23, 46))  # muscle between the two lungs
MIDDLE_FAT = (
    ((0, 0, -6, 14, 20), (0.3, 0, -10, 20, 26), (0.36, 0, -10, 20, 26)),  # about the great vessels
    ((0.1, 0, -34, 5, 22), (0.3, 0, -50, 3, 42), (0.5, 4, -62, 4, 34), (0.7, 14, -66, 20, 30), (1, 0, -62, 44, 36)),
    ((0.5, 4, 30, 12, 24), (0.75, 0, 24, 20, 30), (0.9, 0, 10, 30, 46), (1, 0, 0, 44, 60)),  # about the gullet
)
AIRWAYS = (
    ((0, 0, 6, 8, 9), (0.36, 2, 20, 9, 8), (0.385, 2, 21, 14, 7)),  # trachea, down to its fork
    ((0.385, -11, 22, 9, 7), (0.44, -26, 25, 11, 6), (0.50, -37, 27, 6, 6)),  # right main bronchus
    ((0.385, 14, 23, 9, 7), (0.45, 27, 28, 12, 6), (0.52, 41, 31, 6, 6)),  # left main bronchus
)
VESSELS = (
    ((0, -18, 0, 8, 8), (0.22, -15, -12, 7, 7)),  # right brachiocephalic vessels
    ((0, 18, 2, 7, 7), (0.22, 14, -4, 6, 6)),  # left carotid and subclavian arteries
    ((0.1, 16, -16, 10, 6), (0.2, 0, -22, 22, 6)),  # left brachiocephalic vein
    ((0.12, -20, -8, 8, 9), (0.5, -28, -6, 9, 10), (0.55, -28, -6, 9, 10)),  # superior vena cava
    ((0.19, 8, 2, 8, 12), (0.22, 13, 4, 13, 27), (0.27, 12, 6, 13, 26), (0.29, 10, 8, 8, 10)),  # arch of the aorta
    ((0.24, -6, -16, 14, 14), (0.5, -9, -20, 16, 16), (0.6, -4, -18, 15, 15)),  # ascending aorta
    ((0.24, 22, 38, 12, 13), (0.5, 25, 46, 12, 12), (1, 14, 40, 11, 11)),  # descending aorta
    ((0.37, 18, -16, 12, 12), (0.46, 19, -15, 15, 18), (0.56, 16, -26, 15, 15)),  # pulmonary trunk
    ((0.41, -14, 4, 20, 8), (0.5, -22, 8, 19, 8)),  # right pulmonary artery
    ((0.36, 34, 10, 12, 10), (0.46, 38, 12, 12, 12)),  # left pulmonary artery
    ((0.42, -38, 14, 9, 12), (0.62, -34, 24, 8, 9)),  # right hilum
    ((0.42, 42, 20, 9, 11), (0.62, 39, 28, 8, 9)),  # left hilum
    ((0, 4, 27, 6, 5), (1, 6, 28, 7, 6)),  # oesophagus
    ((0.72, -22, 12, 11, 10), (1, -20, 20, 13, 11)),  # inferior vena cava
)
HEART = (
    ((0.49, 2, 10, 26, 12), (0.58, 4, 14, 34, 18), (0.7, 4, 10, 30, 18)),  # left atrium
    ((0.5, -26, -12, 16, 20), (0.66, -28, -18, 25, 34), (0.86, -22, -26, 24, 28)),  # right atrium
    ((0.48, 8, -30, 26, 22), (0.6, 14, -40, 40, 36), (0.75, 14, -48, 48, 36), (0.95, 12, -52, 46, 26)),  # right v.
    ((0.54, 40, -8, 22, 24), (0.7, 52, -22, 40, 38), (0.84, 50, -34, 42, 34), (0.95, 40, -44, 34, 24)),  # left v.
)
ROOTS = ((-36, 14, 0.47), (-26, 16, 0.58), (38, 16, 0.45), (30, 18, 0.58))  # x, y, level: artery, vein of each lung
# fmt: on


class Waves(NamedTuple):
    """A smooth random field through the whole chest, mean 0, standard deviation 1: a sum of plane waves."""

    frequencies: np.ndarray  # [M, 3] turns per mm
    phases: np.ndarray  # [M] radians

    def cut(self, axis: np.ndarray, z: float) -> np.ndarray:
        """The field float32 [H, W] on the plane z, both axes [H] in mm."""
        fx, fy, fz = 2 * np.pi * self.frequencies.T
        across = np.outer(fx, axis).astype(np.float32)  # [M, W]
        down = (np.outer(axis, fy) + z * fz + self.phases).astype(np.float32)  # [H, M]
        across = np.concatenate([np.cos(across), -np.sin(across)])  # cos(a + b), expanded
        down = np.concatenate([np.cos(down), np.sin(down)], axis=1)
        # Not down @ across: BLAS threads would compete with the other workers for the cores.
        return np.einsum("hm,mw->hw", down, across) * np.float32(np.sqrt(2 / len(fx)))


class Body(NamedTuple):
    """What differs between two healthy chests."""

    stretch: tuple[float, float]  # of the average build along x and y
    heart: float  # enlargement
    fat: float  # under the skin, mm
    field: float  # side of the picture, mm
    bends: tuple[Waves, Waves]  # along x and y: no organ is an ellipse


class Lesion(NamedTuple):
    """One opacity: an ellipsoid with its border frayed by the patient's patches."""

    centre: tuple[float, float, float]  # x, y, z, mm
    radii: tuple[float, float, float]  # along x, y, z, mm
    density: float  # of its ground glass, HU
    core: float  # depth from which it is consolidated, 0 at the border, 1 at the centre; 2 means nowhere


class Patient(NamedTuple):
    """All that a patient's slices share. A tube is a row: start x, y, z, end x, y, z, start radius, end radius, mm."""

    seed: tuple[int, int]  # for the scanner's noise
    body: Body
    patches: Waves
    grain: Waves
    vessels: np.ndarray  # tubes [N, 8]
    lesions: list[Lesion]
    noise: float  # standard deviation, HU


class Anatomy(NamedTuple):
    """One slice of a body: coordinates in the average build and distances to organs in mm, each [H, W]."""

    x: np.ndarray
    y: np.ndarray
    skin: np.ndarray
    cavity: np.ndarray
    blood: np.ndarray  # heart and great vessels
    airways: np.ndarray  # trachea and main bronchi
    domes: np.ndarray
    lungs: np.ndarray


# ---- shapes
def at_level(rows: tuple, level: float) -> list[float]:
    """Outline of an organ at a level: x, y, half width, half depth."""
    levels, *columns = zip(*rows, strict=True)
    return [float(np.interp(level, levels, column)) for column in columns]


def present(organs: tuple, level: float) -> list[list[float]]:
    """Outlines at a level of those organs that reach it."""
    return [at_level(rows, level) for rows in organs if rows[0][0] <= level <= rows[-1][0]]


def ellipse(x: np.ndarray, y: np.ndarray, outline: list[float], power: float = 2) -> np.ndarray:
    """Distance [H, W] to an ellipse, to first order; a power above 2 makes it boxier."""
    cx, cy, rx, ry = outline
    u, v = np.abs(x - cx) / rx, np.abs(y - cy) / ry
    slope_u, slope_v = u ** (power - 1), v ** (power - 1)
    total = u * slope_u + v * slope_v
    radius = total ** (1 / power)  # 1 on the border
    steepness = np.sqrt((slope_u / rx) ** 2 + (slope_v / ry) ** 2)
    return (radius - 1) * total / (radius * steepness + 1e-9)


def merged(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Union of two shapes, with the crease between them filled over a width in mm."""
    share = np.clip(0.5 + (b - a) / (2 * width), 0, 1)
    return b + share * (a - b) - width * share * (1 - share)


def cover(distance: np.ndarray, softness: float | np.ndarray) -> np.ndarray:
    """Share 0..1 of each pixel that is inside; the border is softness mm wide."""
    return np.clip(0.5 - distance / softness, 0, 1)


def paint(hu: np.ndarray, share: np.ndarray, value: np.ndarray | float) -> None:
    """Blend a value into hu [H, W], in place."""
    hu += share * (value - hu)


def axis_of(field: float, size: int) -> np.ndarray:
    """Positions float32 [size] of the pixels' centres, mm."""
    return (((np.arange(size) + 0.5) / size - 0.5) * field).astype(np.float32)


def tubes(axis: np.ndarray, z: float, rows: np.ndarray) -> np.ndarray:
    """Distance [H, W] to the tubes [N, 8] near the plane z; 9 mm stands for far away."""
    distance = np.full((len(axis), len(axis)), 9, np.float32)
    start, spacing, slab = float(axis[0]), float(axis[1] - axis[0]), 1.5
    reach = rows[:, 6] + slab
    near = (np.minimum(rows[:, 2], rows[:, 5]) - reach < z) & (z < np.maximum(rows[:, 2], rows[:, 5]) + reach)

    def span(a: float, b: float, radius: float) -> slice:  # the pixels that a tube from a to b may touch
        first, last = ((edge - start) / spacing for edge in (min(a, b) - radius, max(a, b) + radius))
        return slice(max(int(first) - 1, 0), max(int(last) + 3, 0))

    for x0, y0, z0, x1, y1, z1, r0, r1 in rows[near].tolist():
        columns, lines = span(x0, x1, r0), span(y0, y1, r0)
        px, py, pz = axis[None, columns] - x0, axis[lines, None] - y0, 0.6 * (z - z0)
        dx, dy, dz = x1 - x0, y1 - y0, 0.6 * (z1 - z0)  # a slice is thick: tubes are squeezed along z
        t = np.clip((px * dx + py * dy + pz * dz) / (dx * dx + dy * dy + dz * dz + 1e-6), 0, 1)
        gap = np.sqrt((px - t * dx) ** 2 + (py - t * dy) ** 2 + (pz - t * dz) ** 2) - (r0 + t * (r1 - r0))
        distance[lines, columns] = np.minimum(distance[lines, columns], gap)
    return distance


def cut_anatomy(body: Body, level: float, axis: np.ndarray) -> Anatomy:
    """Shape the lungs at a level: the chest cavity without mediastinum, spine and the domes of the diaphragm."""
    x = (axis[None, :] + 2 * body.bends[0].cut(axis, level * HEIGHT)) / body.stretch[0]
    y = (axis[:, None] + 2 * body.bends[1].cut(axis, level * HEIGHT)) / body.stretch[1] + RAISED

    def union(organs: tuple, crease: float = 0.1, enlarged: float = 1) -> np.ndarray:
        distance = np.full_like(x, 99)
        for cx, cy, rx, ry in present(organs, level):
            distance = merged(distance, ellipse(x, y, [cx, cy, rx * enlarged, ry * enlarged]), crease)
        return distance

    heart, vessels, airways, domes = union(HEART, 12, body.heart), union(VESSELS), union(AIRWAYS), union(DOMES)
    middle = union((BEHIND_SPINE, VERTEBRA, *MIDDLE_FAT), 8)
    for organ in (heart, vessels, airways):
        middle = merged(middle, organ - 2.5, 8)  # 2.5 mm of fat around each
    cx, cy, rx, ry = at_level(BODY, level)
    skin = ellipse(x, y, [cx, cy, rx + body.fat, ry + body.fat], power=2.5)
    cavity = ellipse(np.abs(x), y, at_level(CHEST_HALF, level), power=2.2)
    lungs = -merged(-cavity, merged(middle, domes, 4), 3)
    return Anatomy(x, y, skin, cavity, np.minimum(heart, vessels), airways, domes, lungs)


# ---- a patient
def draw_waves(rng: np.random.Generator, length: float, count: int) -> Waves:
    """Draw a smooth random field whose spots are about `length` mm wide."""
    directions = rng.normal(size=(count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return Waves(directions * rng.uniform(0.3, 1, (count, 1)) / (2 * length), rng.uniform(0, 2 * np.pi, count))


def points_in_lungs(body: Body, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points [N, 3] spread evenly over both lungs, mm, and their depths [N] below the chest wall, mm."""
    axis, points, depths = axis_of(body.field, 64), [], []
    for level in np.linspace(0.02, 0.98, 32):
        anatomy = cut_anatomy(body, level, axis)
        rows, columns = np.nonzero(anatomy.lungs < -2)
        points.append(np.stack([axis[columns], axis[rows], np.full(len(rows), level * HEIGHT)], axis=1))
        depths.append(-anatomy.cavity[rows, columns])
    jitter = rng.uniform(-0.5, 0.5, (sum(map(len, depths)), 3)) * [body.field / 64, body.field / 64, HEIGHT / 32]
    return np.concatenate(points) + jitter, np.concatenate(depths)


def grow_tree(root: np.ndarray, tips: np.ndarray) -> np.ndarray:
    """Grow tubes [N, 8] from a root [3] to tips [N, 3], mm.

    From the root outwards, each tip joins a node that is near and has a short path to the root. Radii follow
    Murray's law: a power of a vessel's radius is the sum of its branches'.
    """
    nodes = np.concatenate([root[None], tips[np.argsort(np.linalg.norm(tips - root, axis=1))]])
    way, parent = np.zeros(len(nodes)), np.zeros(len(nodes), int)
    for i in range(1, len(nodes)):
        step = np.linalg.norm(nodes[:i] - nodes[i], axis=1)
        parent[i] = np.argmin(step + 0.5 * way[:i])
        way[i] = way[parent[i]] + step[parent[i]]
    power, thinnest = 2.7, 0.48
    flow = np.full(len(nodes), thinnest**power)
    course = nodes.copy()
    for i in range(len(nodes) - 1, 0, -1):  # a child comes after its parent
        flow[parent[i]] += flow[i]
        course[parent[i]] += flow[i] / flow[parent[i]] * (nodes[i] - nodes[parent[i]]) / 2
    radius = flow[1:, None] ** (1 / power)
    return np.concatenate([course[parent[1:]], course[1:], 1.15 * radius, 0.9 * radius], axis=1)


def draw_lesions(rng: np.random.Generator, points: np.ndarray, depths: np.ndarray) -> list[Lesion]:
    """Draw lesions around some of the points [N, 3] in the lungs, preferably at the back and near the pleura."""
    weights = np.exp(-depths / 12 + points[:, 1] / 45 + points[:, 2] / 200)
    count, spread = rng.integers(6, 18), rng.uniform(0.7, 1.6)  # few or many, small or large
    consolidated = rng.choice([0, 0.3, 0.7], p=[0.2, 0.5, 0.3])  # share of consolidated lesions
    return [
        Lesion(
            centre=tuple(centre.tolist()),
            radii=tuple((spread * rng.uniform(12, 28) * rng.uniform(0.75, 1.3, 3)).tolist()),
            density=rng.uniform(-640, -430),
            core=rng.uniform(0.15, 0.6) if rng.random() < consolidated else 2,
        )
        for centre in points[rng.choice(len(points), count, replace=False, p=weights / weights.sum())]
    ]


def draw_patient(seed: int, number: int) -> Patient:
    """Draw a patient; the same two numbers give the same patient."""
    rng = np.random.default_rng([seed, number])
    fat, stretch = rng.uniform(5, 22), (rng.uniform(0.88, 1.06), rng.uniform(0.88, 1.1))
    field = 2 * (172 + fat) * stretch[0] * rng.uniform(1, 1.1)
    body = Body(stretch, rng.uniform(0.9, 1.12), fat, field, (draw_waves(rng, 45, 20), draw_waves(rng, 45, 20)))
    points, depths = points_in_lungs(body, rng)
    deep = points[depths > 5]  # no vessel is visible close to the pleura
    trees = []
    for x, y, level in ROOTS:
        side = deep[deep[:, 0] * x > 0]
        root = np.array([x * stretch[0], (y - RAISED) * stretch[1], level * HEIGHT])
        trees.append(grow_tree(root, side[rng.choice(len(side), 1000)]))
    return Patient(
        seed=(seed, number),
        body=body,
        patches=draw_waves(rng, 11, 60),
        grain=draw_waves(rng, 2.2, 150),
        vessels=np.concatenate(trees),
        lesions=draw_lesions(rng, points, depths),
        noise=rng.uniform(15, 30),
    )


# ---- a slice
def draw_body(body: Body, anatomy: Anatomy, level: float, pixel: float) -> np.ndarray:
    """HU float32 [H, W] of everything but the inside of the lungs."""
    x, y, skin, cavity, blood, airways, domes, _ = anatomy
    hu = np.full_like(skin, AIR)
    paint(hu, cover(skin, pixel), MUSCLE)
    paint(hu, cover(skin + 2, pixel), FAT)
    paint(hu, cover(np.maximum(skin + body.fat + 2, cavity - 12), 2 * pixel), MUSCLE)
    paint(hu, cover(cavity, pixel), FAT)
    paint(hu, cover(blood, pixel), BLOOD)
    paint(hu, cover(domes, pixel), LIVER)
    behind_spine = ellipse(x, y, at_level(BEHIND_SPINE, level))
    paint(hu, cover(np.maximum(behind_spine, skin + body.fat), pixel), MUSCLE)
    draw_bones(hu, anatomy, level, pixel)
    paint(hu, cover(airways - 1.2, pixel), MUSCLE)
    paint(hu, cover(airways, pixel), AIR)
    return hu


def draw_bones(hu: np.ndarray, anatomy: Anatomy, level: float, pixel: float) -> None:
    """Paint ribs and a vertebra into hu [H, W]."""
    x, y, cavity = anatomy.x, anatomy.y, anatomy.cavity
    turn = np.arctan2(np.abs(x), 10 - y)  # 0 at the sternum, pi at the spine
    spacing, fall = 25, 34  # mm between two ribs; mm that a rib falls per radian on its way to the front
    beside = (level * HEIGHT + fall * turn + 4 * np.sign(x)) % spacing - spacing / 2
    rib = (np.sqrt((beside / 6.5) ** 2 + ((cavity - 7) / 4.5) ** 2) - 1) * 4.5
    spine = ellipse(x, y, at_level(VERTEBRA, level), power=2.3)
    paint(hu, cover(np.minimum(np.where(turn > 0.6, rib, 9), spine), pixel), BONE)


def cut_lesions(patient: Patient, axis: np.ndarray, z: float, patches: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shares 0..1 of ground glass and of consolidation, and the density of the ground glass in HU, each [H, W]."""
    glass, dense, density = np.zeros_like(patches), np.zeros_like(patches), np.full_like(patches, -600)
    for (cx, cy, cz), (rx, ry, rz), lesion_density, core in patient.lesions:
        height = (z - cz) / rz
        if abs(height) > 1.8:
            continue
        radius = np.sqrt(((axis[None, :] - cx) / rx) ** 2 + ((axis[:, None] - cy) / ry) ** 2 + height**2)
        depth = 1 - radius + 0.25 * patches  # 0 on the border, 1 in the centre
        share = cover(-depth, 0.45)
        density = np.where(share > glass, lesion_density, density)
        glass = np.maximum(glass, share)
        dense = np.maximum(dense, cover(core - depth, 0.3))
    return glass, dense, density


def draw_slice(patient: Patient, level: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a patient at a level 0..1: HU float32 [size, size], labels uint8 [size, size] with values 0..3."""
    body, z = patient.body, level * HEIGHT
    axis = axis_of(body.field, size)
    pixel = float(axis[1] - axis[0])
    anatomy = cut_anatomy(body, level, axis)
    patches, grain = patient.patches.cut(axis, z), patient.grain.cut(axis, z)
    hu = draw_body(body, anatomy, level, pixel)

    glass, dense, density = cut_lesions(patient, axis, z, patches)
    inside = -870 + 80 * np.clip((anatomy.y + 80) / 160, 0, 1) + 22 * grain + 8 * patches  # the back is denser
    paint(inside, glass, density + 55 * grain + 20 * patches)
    paint(inside, 0.9 * cover(tubes(axis, z, patient.vessels), 1.3 * pixel), BLOOD)
    paint(inside, np.clip(dense + dense * (1 - dense) * grain, 0, 1), 45 * grain)  # frayed where it thins out
    flank = cover(np.abs(anatomy.domes) - 3, 6)  # the slice cuts the diaphragm obliquely: a soft border
    lungs = cover(anatomy.lungs, pixel * (1 + 3 * flank))
    paint(hu, lungs, inside)

    labels = np.zeros((size, size), np.uint8)
    labels[lungs > 0.5] = LUNG
    labels[(lungs > 0.5) & (glass > 0.5)] = GROUND_GLASS
    labels[(lungs > 0.5) & (dense > 0.5)] = CONSOLIDATION
    rng = np.random.default_rng([*patient.seed, round(level * 1e6)])
    return scan(hu, pixel, patient.noise, rng), labels


def scan(hu: np.ndarray, pixel: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Blur hu [H, W] as a scanner does and add its noise: power that rises from low frequency, peaks, falls."""
    fy, fx = np.fft.fftfreq(hu.shape[0], pixel), np.fft.rfftfreq(hu.shape[1], pixel)
    frequency = np.sqrt(fy[:, None] ** 2 + fx**2)  # [H, W/2+1] cycles per mm
    blur = np.exp(-((frequency / 0.38) ** 2))
    ramp = frequency * np.exp(-((frequency / 0.22) ** 2))
    grains = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(hu.shape)) * ramp, s=hu.shape)
    anatomy = np.fft.irfft2(np.fft.rfft2(hu) * blur, s=hu.shape)
    return (anatomy + noise / grains.std() * grains).astype(np.float32)


# ---- the data set
def main(argv: list[str] | None = None) -> None:
    """Draw a set and say how large its sides are; raises Mistake, before anything is written, for bad arguments."""
    parser = slices.OneLineParser(__doc__)
    option = parser.add_argument
    option("--out", type=Path, default=Path("data/phantom"), help="folder of the set")
    option("--size", type=int, default=256, help="side of a slice in pixels, at least 64")
    option("--patients", type=int, default=16, help="number of patients, at least 3: one for each side")
    option("--slices", type=int, default=24, help="slices per patient, from base to apex")
    option("--seed", type=int, default=0, help="the same seed gives the same bytes")
    option("--overwrite", action="store_true", help="replace the slices of any other set in the folder")
    args = parser.parse_args(argv)
    check_ranges(args, size=(64, LARGEST), patients=(3, 9999), slices=(1, 9999), seed=(0, 2**63))
    order = (np.random.default_rng(args.seed).permutation(args.patients) + 1).tolist()
    tenth = max(1, round(args.patients / 10))  # of the patients for test, and for seg_test
    sides = zip(SIDES, (order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]), strict=True)
    split = {side: [slice_name(n, k + 1) for n in sorted(part) for k in range(args.slices)] for side, part in sides}
    split["drawn"] = {"source": "phantom", "by": "patient"}
    split["drawn"] |= {key: vars(args)[key] for key in ("seed", "size", "patients", "slices")}
    if slices.held_split(args.out) == split and not args.overwrite:
        print(f"{args.out} holds this set already: nothing to do")
        return
    with slices.held(args.out):
        slices.make_room(args.out, args.overwrite)
        for number in tqdm(range(1, args.patients + 1), unit="patient", disable=None):
            patient = draw_patient(args.seed, number)
            for position, level in enumerate(np.linspace(0.96, 0.06, args.slices).tolist(), 1):  # from the feet upwards
                name, (hu, labels) = slice_name(number, position), draw_slice(patient, level, args.size)
                slices.write_image(args.out / "images" / f"{name}.png", hu)
                slices.write_map(args.out / "maps" / f"{name}.png", labels)
        slices.write_split(args.out / "split.json", **split)  # last: it marks the set as complete
    print(f"{args.out}: {', '.join(f'{len(split[side])} slices in {side}' for side in SIDES)}")


if __name__ == "__main__":
    slices.exit_on_mistake(main)
