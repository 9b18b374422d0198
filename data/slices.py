"""The on-disk format of a slice dataset, in one place; no torch.

    NAME/images/P03_S041.png   16-bit grey PNG, value = HU + 1024, clipped to 0..4095
    NAME/maps/P03_S041.png     8-bit palette PNG, value = label, palette = the paper's colours (Fig. 1)
    NAME/split.json            {"train": [...], "test": [...], "seg_test": [...]} and how it was drawn
    NAME/contact_sheet.png     an overview
    NAME/.unfinished           while it is being written, and after a run that was cut off

The images keep raw HU: windows are applied on reading. Every file is written under a temporary
name and then renamed, so that an interrupted run leaves nothing half-written.
"""

import argparse
import contextlib
import errno
import io
import itertools
import json
import os
import re
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from types import FrameType

import imageio.v3 as iio
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LABELS = ("background", "lung", "ground-glass opacity", "consolidation")
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0))  # Fig. 1: lung red, GGO blue, consolidation green
SIDES = ("train", "test", "seg_test")  # of a split
AIR_HU = -800  # some voxel of any CT volume of a chest lies below
LUNG_HU = (-1000, -300)  # a mean over a slice's healthy lung outside these is not HU; it varies more than a patient's
AERATED = -500  # HU: what is lower is lung or air, what is higher is tissue
TURNED = 40  # HU by which a lung that is turned against its CT lies denser: see turned
NEARLY = 120  # of 442 from black to white: a colour as near as this to one of COLOURS means it
UNFINISHED = ".unfinished"  # marks a folder whose set is being written, or whose run was cut off
HU_OFFSET = 1024  # stored value = HU + 1024: air is 24, water 1024
HELD = (-HU_OFFSET, 4095 - HU_OFFSET)  # the range of HU that the format holds
NIFTI = (".nii", ".nii.gz")  # endings of volumes
LARGEST = 4096  # pixels per side of a slice: a header that claims more is refused before memory is allocated
LARGEST_FILE = 2**28  # bytes of a slice, map or split
PNG_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error)  # from Pillow
JSON_ERRORS = (OSError, ValueError, RecursionError)  # from a JSON file; the last for deeply nested lists
LEVEL, WIDTH = -600, 1500  # the lung window of pictures for people, HU
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # errors of a filesystem without locks


class Mistake(Exception):
    """A mistake of the user's: its text is one line that names the file and the remedy; exit status 2."""

    def __str__(self) -> str:
        """On one line of readable length, whatever a name holds."""
        text = printable(super().__str__())
        return text if len(text) <= 900 else f"{text[:500]} ... {text[-300:]}"


def printable(text: str) -> str:
    """A text with escapes for what a terminal would act on: line breaks, control characters."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help that keeps the lines of a script's docstring, and gives each option's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == []
        return action.help if absent else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """argparse with one-line complaints."""

    def __init__(self, about: str) -> None:
        super().__init__(description=about, formatter_class=Help)

    def error(self, message: str) -> None:
        """Raise instead of printing the usage."""
        raise Mistake(f"{message:.300} (-h lists the options)")


def check_ranges(args: argparse.Namespace, **ranges: tuple[int, int]) -> None:
    """Raise Mistake where a number given lies outside its range, both ends included; None is not given."""
    for name, (least, most) in ranges.items():
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            raise Mistake(f"--{name} {value}: give {least} to {most}")


def exit_on_mistake(program: Callable[[list[str]], int | None], stopped: str = "stopped") -> None:
    """Run a program on the command line's arguments and exit with the status that it returns, None being 0.

    A mistake of the user's, a full disk and the like print one line and exit with 2; Ctrl-C and SIGTERM print the line
    `stopped` and exit with 130.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as in the background
            signal.signal(signum, stop_once)
    open_streams()
    try:
        status = program(sys.argv[1:])
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be told
        sys.exit(status)
    except (Mistake, OSError) as mistake:
        of_output = isinstance(mistake, OSError) and not mistake.filename and drop_output()
        print(f"error: {'standard output: ' if of_output else ''}{mistake}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"error: out of memory ({error}): give less at a time", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.unraisablehook = lambda _: None  # objects interrupted while being made complain when deleted
        sys.exit(130)
    finally:
        drop_output()


def open_streams() -> None:
    """Make what a program prints harmless: where nobody listens, and of characters that the terminal lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  to the end
        getattr(sys, name).reconfigure(errors="backslashreplace")


def drop_output() -> bool:
    """Whether standard output can't be written to; what is left for it is then dropped, or Python would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def stop_once(signum: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C and SIGTERM: clear away what is half-written, and let no second signal stop that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def slice_name(patient: int, position: int) -> str:
    """Name of one slice without its suffix; what comes before the last "_" is the patient."""
    return f"P{patient:02d}_S{position:03d}"


def patient_of(name: str) -> str:
    """The patient of a slice: what comes before the last "_"."""
    return name.rpartition("_")[0]


def read_small(path: Path) -> bytes:
    """The bytes of a file. Raises Mistake for one above LARGEST_FILE, and for no regular file, which may never end."""
    if path.exists() and not path.is_file():
        raise Mistake(f"{path}: no regular file: put the file itself there")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise Mistake(f"{path}: {size:,} bytes: no slice, map or split has above {LARGEST_FILE:,}")
    return path.read_bytes()


@contextlib.contextmanager
def open_png(path: Path) -> Iterator[PngImageFile]:
    """Open a PNG, of which only the header has been read yet.

    Raises Mistake, also from within the block, for a file that is cut short, broken or not a PNG, and for one without
    pixels or with more than LARGEST a side.
    """
    try:
        content = io.BytesIO(read_small(path))  # where a chunk that claims gigabytes does not get them
        with PngImageFile(content) as picture:  # Image.open would take any format, and warn about some sizes
            if not 1 <= min(picture.size) <= max(picture.size) <= LARGEST:
                raise Mistake(f"{path}: {picture.width} x {picture.height} pixels: give 1 to {LARGEST} a side")
            yield picture
    except PNG_ERRORS as error:
        raise Mistake(f"{path}: not a readable PNG ({error}): write it again") from error


def read_png(path: Path) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Pillow's name of the mode, the pixels, and the palette, uint8 [256, 3], where the PNG has one.

    Transparent and missing entries of the palette are black. Raises Mistake as `open_png` does.
    """
    with open_png(path) as picture:
        clear = picture.info.get("transparency", b"")  # one index, or opacities of the first entries
        pixels, palette = np.asarray(picture), picture.getpalette("RGB")
    if palette is None:
        return picture.mode, pixels, None
    colours = np.array([*palette, *bytes(768 - len(palette))], np.uint8).reshape(256, 3)
    clear = [clear] if isinstance(clear, int) else [i for i, opacity in enumerate(clear) if opacity == 0]
    colours[[i for i in clear if i < 256]] = 0
    return picture.mode, pixels, colours


def read_image(path: Path) -> np.ndarray:
    """Read a 16-bit grey PNG of HU + 1024 as HU, int16 [H, W]. Raises Mistake for anything else."""
    mode, stored, _ = read_png(path)
    if stored.dtype != np.uint16 or stored.ndim != 2:
        raise Mistake(f"{path}: a PNG of mode {mode} is no slice: give 16-bit grey PNG of HU + {HU_OFFSET}")
    if stored.max() > 4095:
        raise Mistake(f"{path}: value {stored.max()} is above 4095: store HU + {HU_OFFSET}, clipped to 0..4095")
    return stored.astype(np.int16) - HU_OFFSET


def from_colours(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Labels uint8 of pixels [..., 3] in the paper's COLOURS. Raises Mistake at the first pixel of another colour."""
    labels = np.full(pixels.shape[:-1], 255, np.uint8)
    for label, colour in enumerate(COLOURS):
        labels[(pixels == colour).all(-1)] = label
    if (labels == 255).any():
        y, x = np.argwhere(labels == 255)[0]
        raise Mistake(f"{path}: colour {pixels[y, x].tolist()} at row {y}, column {x} is none of {COLOURS}")
    return labels


def read_map(path: Path) -> np.ndarray:
    """Read a label map, uint8 [H, W]: grey PNG of label values, or RGB or palette in exactly the paper's COLOURS.

    Where a palette holds the paper's colours, colour decides, since paint programs order palettes as they like; a
    palette without them only decorates label values, unless it nearly holds them. Transparent pixels are background.
    Raises a Mistake that names the file, the value or colour and the pixel.
    """
    mode, pixels, palette = read_png(path)
    if mode == "RGBA":
        pixels = np.where(pixels[..., 3:] > 0, pixels, 0)  # an eraser leaves the colour underneath
    if mode in ("RGB", "RGBA"):
        return from_colours(pixels[..., :3], path)
    if mode not in ("P", "L"):
        raise Mistake(f"{path}: a PNG of mode {mode} is no label map: give 8-bit palette, or RGB in {COLOURS}")
    if palette is not None and (decides(palette, pixels) or contradicts(palette, pixels)):
        return from_colours(palette[pixels], path)
    if pixels.max() >= len(LABELS):
        y, x = np.argwhere(pixels >= len(LABELS))[0]
        raise Mistake(f"{path}: label {pixels[y, x]} at row {y}, column {x}: labels are 0..{len(LABELS) - 1}")
    return pixels


def decides(palette: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether a palette [256, 3] decides the labels: it holds the paper's colours, or all is plain black."""
    empty = np.ptp(pixels) == 0 and not palette[pixels[0, 0]].any()  # a slice without lung, whatever index black has
    return empty or bool({*COLOURS[1:]} & {*map(tuple, palette.tolist())})


def contradicts(palette: np.ndarray, pixels: np.ndarray) -> bool:
    """Whether the colours used are nearly the paper's, each its own, and mean other labels than their indices."""
    used = np.unique(pixels)
    distances = np.linalg.norm(palette[used][:, None] - np.array(COLOURS, float), axis=2)  # [colours, 4]
    meant = distances.argmin(1)
    apart = len({*meant.tolist()}) == len(used)
    return apart and bool((distances.min(1) <= NEARLY).all() and (meant != used)[meant > 0].any())


def list_pngs(folder: Path, what: str) -> dict[str, Path]:
    """PNGs of a folder, also .PNG, by name without suffix, sorted; dotfiles are ignored.

    what: "images" or "maps", for the complaints. Raises Mistake where there is none, mentioning JPEG, and where two
    files have the same name.
    """
    if not folder.is_dir():
        raise Mistake(f"{folder}: no such folder: give the folder of the {what}")
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found: dict[str, Path] = {}
    for path in files:
        if path.suffix.lower() == ".png" and found.setdefault(path.stem, path) is not path:
            raise Mistake(f"{path}: {found[path.stem].name} has the same name: rename one")
    if not found and any(path.suffix.lower() in (".jpg", ".jpeg") for path in files):
        raise Mistake(f"{folder}: JPEG, which changes grey levels and labels: give the {what} as PNG")
    if not found:
        raise Mistake(f"{folder}: no PNG in it: give the folder of the {what}")
    return found


def check_finished(folder: Path) -> None:
    """Raise Mistake for a dataset whose making was cut off: a part of it would pass for the whole.

    folder: the dataset, or its images/ or maps/.
    """
    place = folder.parent if folder.name in ("images", "maps") else folder
    if (place / UNFINISHED).exists() and not (place / "split.json").exists():
        raise Mistake(f"{place}: its making was cut off: run the command that makes it again")


def no_lungs_mean(mean: float, where: str = "healthy lung") -> str | None:
    """What is wrong with the mean HU of healthy lung, in words; None where nothing is wrong."""
    if LUNG_HU[0] <= mean <= LUNG_HU[1]:
        return None
    return f"mean {mean:+.0f} in {where}, which has HU of {LUNG_HU[0]} to {LUNG_HU[1]}"


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


def check_hu(path: Path, hu: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Raise Mistake for a real slice, int16 [H, W], that cannot be a map's: grey levels, or no lung where it has lung.

    labels uint8 [H, W]: healthy lung is 1; less than a hundredth of a slice tells nothing.
    """
    if hu.max() <= 255 - HU_OFFSET:
        raise Mistake(f"{path}: no value above 255, so grey levels, not HU + {HU_OFFSET}: convert it first")
    lung = np.zeros_like(hu, bool) if labels is None else labels == 1
    if 100 * np.count_nonzero(lung) < hu.size:
        return
    if told := no_lungs_mean(hu[lung].mean(dtype=float)):
        raise Mistake(f"{path}: {told}: store HU + {HU_OFFSET}, mend the map, or overrule by --unchecked")
    if told := turned(hu, lung):
        raise Mistake(f"{path}: its map's lung {told}: turn one of them, or overrule by --unchecked")


def read_split(path: Path) -> dict[str, list[str]]:
    """Names of each side (train, test, seg_test) of a split.json; names may end in .png, in any case.

    Raises Mistake where it is not JSON with lists of names, for a name that would lead out of the folder, and for one
    that a list has twice.
    """
    try:
        split = json.loads(read_small(path).decode("utf-8-sig"))  # a byte order mark is allowed
    except JSON_ERRORS as error:
        raise Mistake(f"{path}: no JSON with lists of names under train and test ({error})") from error
    sides = {side: split[side] for side in SIDES if side in split} if isinstance(split, dict) else {}
    if not sides or not all(isinstance(names, list) for names in sides.values()):
        raise Mistake(f"{path}: no lists of names under train and test: give a list for each")
    for name in itertools.chain(*sides.values()):
        if not isinstance(name, str) or not is_name(stem(name)):
            raise Mistake(f"{path}: {name!r:.80} is no name of a slice: give names without folders")
    split = {side: [stem(name) for name in names] for side, names in sides.items()}
    for side, names in split.items():
        for name, times in Counter(names).most_common(1):
            if times > 1:
                raise Mistake(f"{path}: {name} is listed {times} times under {side}: take it out of the list")
    return split


def is_name(name: str) -> bool:
    """Whether a name can be a file's on any system: not too long, without folder, drive or control character."""
    return PureWindowsPath(name).name == name != "" and name[0] != "." and min(name) >= " " and len(name) < 256


def stem(name: str) -> str:
    """A name without .png, in any case."""
    return name[: -len(".png")] if name.lower().endswith(".png") else name


@contextlib.contextmanager
def held(folder: Path, name: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Make a folder and lock it, or the file in it that the lock's name stands for, so that it has one writer.

    The lock is the system's and ends with its process, however that dies and on whatever machine. Raises Mistake where
    another process holds it, or waits for that one's end. On a filesystem without locks, prints a warning and goes on.
    """
    path = folder / name
    with contextlib.ExitStack() as until_the_end:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            until_the_end.enter_context(locked(path, wait))
        except BlockingIOError as error:
            raise Mistake(f"{folder}: another run is writing to it: wait for its end, or give another --out") from error
        except UnicodeEncodeError as error:
            raise Mistake(f"{folder}: no name that files can have: give another") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                told = "written to" if folder.is_dir() else "made a folder"
                raise Mistake(f"{folder}: cannot be {told} ({error.strerror}); give another --out") from error
            print(f"warning: {folder}: no locks on this filesystem: let no two runs write there", file=sys.stderr)
        yield


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the system's lock on a file, which exists meanwhile; raises BlockingIOError, or says so and waits."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock here")
    while True:
        with open(path, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                print(f"waiting for another run: {path} is held", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # 0: its holder removed it, and the next made a new one
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):  # from a folder that was removed meanwhile
                        path.unlink()
                return


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or absent. Raises Mistake, naming it, where it cannot be written.

    What a killed run has left unfinished is overwritten by the next, since a file has one writer: see `held`.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:  # from a full disk, which names no file
        raise Mistake(f"{path}: cannot be written ({error.strerror}); make room, or choose another place") from error
    finally:
        unfinished.unlink(missing_ok=True)


def png(pixels: np.ndarray) -> bytes:
    """Grey uint8 or uint16 [H, W] or RGB uint8 [H, W, 3] as PNG, quickly: level 1 takes a third of the usual time."""
    return iio.imwrite("<bytes>", pixels, extension=".png", compress_level=1)


def write_image(path: Path, hu: np.ndarray) -> None:
    """Write HU [H, W], any real type, as the 16-bit image of the format."""
    stored = np.clip(np.rint(hu) + HU_OFFSET, 0, 4095).astype(np.uint16)
    write_bytes(path, png(stored))


def write_map(path: Path, labels: np.ndarray) -> None:
    """Write labels uint8 [H, W], values 0..3, as the palette PNG of the format."""
    picture = Image.fromarray(labels.astype(np.uint8))
    colours = bytes(channel for colour in COLOURS for channel in colour)
    picture.putpalette(colours.ljust(3 * 256, b"\0"))  # turns "L" into "P"; with fewer colours pixels would take 2 bits
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def write_split(path: Path, train: list[str], test: list[str], seg_test: list[str], drawn: dict) -> None:
    """Write split.json: the slice names of each side, and how they were drawn (seed, by what, source).

    It is the last file of a set: with it the set is complete.
    """
    split = {"train": train, "test": test, "seg_test": seg_test, "drawn": drawn}
    write_bytes(path, (json.dumps(split, indent=1) + "\n").encode())
    (path.parent / UNFINISHED).unlink(missing_ok=True)


def held_split(out: Path) -> dict:
    """What OUT/split.json holds; nothing if it is missing or not a JSON object."""
    try:
        held = json.loads((out / "split.json").read_text(encoding="utf-8-sig"))
    except JSON_ERRORS:
        return {}
    return held if isinstance(held, dict) else {}


def listed(held: dict) -> set[str]:
    """Names of the slices that a split.json lists on any side; those of a damaged one as far as they are lists."""
    return {str(name) for side in SIDES if isinstance(held.get(side), list) for name in held[side]}


def make_room(out: Path, overwrite: bool, same: bool = False) -> None:
    """Make the empty folders of a dataset. Raises Mistake for a folder that holds anything else.

    Split, contact sheet and files named like slices give way with `overwrite`, and if an unfinished run left them, as
    UNFINISHED shows; of the `same` set those that its split lists. No other file is ever removed.
    """
    folders = out / "images", out / "maps"
    slices = {path for folder in folders for path in folder.glob("*.png") if re.fullmatch(r"P\d+_S\d+", path.stem)}
    unfinished = (out / UNFINISHED).exists() and not (out / "split.json").exists()
    known = listed(held_split(out))
    ours = {path for path in slices if unfinished or path.stem in known}
    ours |= {out / "contact_sheet.png", out / "split.json"}
    for path in sorted(out.rglob("*")):
        replaceable = path.name.startswith(".") or (path in ours and (same or unfinished))
        if path.is_file() and not replaceable and not overwrite:
            raise Mistake(f"{path}: of another set; give another --out, or --overwrite to replace it")
    if unfinished and slices:
        print(f"{out}: a run before did not finish; its {len(slices)} files are replaced", file=sys.stderr)
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        (out / UNFINISHED).touch()
    except OSError as error:
        raise Mistake(f"{out}: cannot be made a folder ({error.strerror}); give another --out") from error
    left_by_a_kill = [*out.rglob(".*.png.*tmp"), *out.glob(".split.json.*tmp")]
    (out / "split.json").unlink(missing_ok=True)  # first: until it is back no reader takes the set, see check_finished
    for path in {*slices, *left_by_a_kill}:
        path.unlink()


def windowed(hu: np.ndarray, level: float = LEVEL, width: float = WIDTH) -> np.ndarray:
    """HU to grey levels, uint8 0..255, through a window, for pictures."""
    return (np.clip((hu - level) / width + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8)


def coloured(labels: np.ndarray) -> np.ndarray:
    """Labels [H, W] to the paper's colours, uint8 [H, W, 3]."""
    return np.array(COLOURS, np.uint8)[labels]


def write_contact_sheet(path: Path, pairs: list[tuple[np.ndarray, np.ndarray]], columns: int = 6) -> None:
    """Write a picture of (HU [H, W], labels [H, W]) pairs: each slice in the lung window, its map below it."""
    tiles = []
    for hu, labels in pairs:
        step = max(1, hu.shape[0] // 256)  # thumbnails: a sheet is for a glance
        grey = windowed(hu[::step, ::step])
        tiles.append(np.concatenate([np.repeat(grey[..., None], 3, 2), coloured(labels[::step, ::step])], 0))
    blank = np.zeros_like(tiles[0])
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], 1) for i in range(0, len(tiles), columns)]
    write_bytes(path, png(np.concatenate(rows, 0)))
