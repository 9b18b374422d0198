"""The on-disk format of a slice dataset, in one place; no torch.

    NAME/images/P03_S041.png   16-bit grey PNG, value = HU + 1024, clipped to 0..4095
    NAME/maps/P03_S041.png     8-bit palette PNG, value = label, palette = the paper's colours (Fig. 1)
    NAME/split.json            {"train": [...], "test": [...], "seg_test": [...]} and how it was drawn
    NAME/contact_sheet.png     an overview
    NAME/.unfinished           while it is being written, and after a run that was cut off

The images keep raw HU: windows are applied on reading. Every file is written whole or not at all.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import signal
import struct
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

import imageio.v3 as iio
import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

LABELS = ("background", "lung", "ground-glass opacity", "consolidation")
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0))  # Fig. 1: lung red, GGO blue, consolidation green
SIDES = ("train", "test", "seg_test")  # of a split
UNFINISHED = ".unfinished"  # marks a folder whose set is being written, or whose run was cut off
HU_OFFSET = 1024  # stored value = HU + 1024: air is 24, water 1024
HELD = (-HU_OFFSET, 4095 - HU_OFFSET)  # the range of HU that the format holds
NIFTI = (".nii", ".nii.gz")  # endings of volumes
LARGEST = 4096  # pixels per side of a slice: a header that claims more is refused before memory is allocated
PNG_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error)  # from Pillow
JSON_ERRORS = (OSError, ValueError, RecursionError)  # from a JSON file; the last for deeply nested lists
LEVEL, WIDTH = -600, 1500  # the lung window of pictures for people, HU
SPREAD = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of few bits over 0..255
same_form = partial(unicodedata.normalize, "NFC")  # of names, for comparing: Macs store accents apart from letters


class Mistake(Exception):
    """A mistake of the user's: its text is one line that names the file and the remedy; exit status 2."""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Help that keeps the lines of a script's docstring, and gives each option's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == []
        return action.help if absent else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """argparse with one-line complaints."""

    def __init__(self, about: str) -> None:
        super().__init__(description=about, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> None:
        """Raise instead of printing the usage."""
        raise Mistake(f"{message:.300} (-h lists the options)")


def check_ranges(args: argparse.Namespace, **ranges: tuple[int, int]) -> None:
    """Raise Mistake where a number given lies outside its range, both ends included; None is not given."""
    for name, (least, most) in ranges.items():
        if (value := getattr(args, name)) is not None and not least <= value <= most:
            raise Mistake(f"--{name} {value}: give {least} to {most}")


def exit_on_mistake(
    program: Callable[[list[str]], int | None], stopped: str = "stopped", more: tuple[type[Exception], ...] = ()
) -> None:
    """Run a program on the command line's arguments and exit with its status, None being 0.

    A Mistake, an OSError, want of memory and `more` end in one line and status 2; Ctrl-C and SIGTERM in 130.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as in the background
            signal.signal(signum, stop_once)
    try:
        sys.exit(program(sys.argv[1:]))
    except (Mistake, OSError, MemoryError, *more) as error:
        print("error:", " ".join(str(error).splitlines()) or "out of memory: give less at a time", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.unraisablehook = lambda _: None  # objects interrupted while being made complain when deleted
        sys.exit(130)


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


@contextlib.contextmanager
def open_png(path: Path) -> Iterator[PngImageFile]:
    """Open a PNG, of which only the header has been read yet. Raises Mistake, also from the block, for a bad one."""
    try:
        with PngImageFile(path) as picture:  # Image.open would take any format, and warn about some sizes
            if max(picture.size) > LARGEST:
                raise Mistake(f"{path}: {picture.width} x {picture.height} pixels: give at most {LARGEST} a side")
            yield picture
    except PNG_ERRORS as error:
        raise Mistake(f"{path}: not a readable PNG ({error}): write it again") from error


def read_png(path: Path) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Mode, the pixels as the file holds them, and the palette uint8 [256, 3], if any: transparent or missing is black.

    The mode is Pillow's, with ";16" for 16 bits, of which Pillow drops half in colour and beside alpha.
    """
    with open_png(path) as picture:
        stored = picture.tile[0].args  # how the file holds pixels, such as L;2 for grey of 2 bits
        pixels = np.asarray(picture)
        picture.apply_transparency()  # to the palette
        colours = picture.getpalette("RGBA")
    pixels = pixels // SPREAD.get(stored, 1)
    mode = f"{stored.removesuffix(';16B')};16" if stored.endswith(";16B") else picture.mode
    if colours is None:
        return mode, pixels, None
    palette = np.array([*colours, *bytes(1024 - len(colours))], np.uint8).reshape(256, 4)
    return mode, pixels, np.where(palette[:, 3:] > 0, palette[:, :3], 0)


def read_image(path: Path) -> np.ndarray:
    """Read a 16-bit grey PNG of HU + 1024 as HU, int16 [H, W]. Raises Mistake for anything else."""
    mode, stored, _ = read_png(path)
    if mode != "I;16":  # 16-bit grey, whatever Pillow's version makes of it
        raise Mistake(f"{path}: a PNG of mode {mode} is no slice: give 16-bit grey PNG of HU + {HU_OFFSET}")
    if stored.max() > 4095:
        raise Mistake(f"{path}: value {stored.max()} is above 4095: store HU + {HU_OFFSET}, clipped to 0..4095")
    return stored.astype(np.int16) - HU_OFFSET


def read_map(path: Path) -> np.ndarray:
    """Read a label map, uint8 [H, W]: grey PNG of label values, or RGB or palette in exactly the paper's COLOURS.

    Where a palette holds the paper's colours, colour decides, since paint programs order palettes as they like; a
    palette without them only decorates label values. Transparent pixels are background. Raises a Mistake that names
    the file, the value or colour and the pixel.
    """
    mode, pixels, palette = read_png(path)
    if mode not in ("P", "L", "RGB", "RGBA"):
        raise Mistake(f"{path}: a PNG of mode {mode} is no label map: give 8-bit palette, or RGB in {COLOURS}")
    if palette is not None:
        empty = np.ptp(pixels) == 0 and not palette[pixels[0, 0]].any()  # no lung in it, whatever index black has
        if empty or {*COLOURS[1:]} & {*map(tuple, palette.tolist())}:
            pixels = palette[pixels]
    if mode == "RGBA":
        pixels = np.where(pixels[..., 3:] > 0, pixels[..., :3], 0)  # an eraser leaves the colour underneath
    if pixels.ndim == 2:
        labels, unknown = pixels, pixels >= len(LABELS)
    else:
        matches = np.stack([(pixels == colour).all(-1) for colour in COLOURS])  # [4, H, W]
        labels, unknown = matches.argmax(0).astype(np.uint8), ~matches.any(0)
    if unknown.any():
        y, x = np.argwhere(unknown)[0]
        what = f"label {pixels[y, x]}" if pixels.ndim == 2 else f"colour {pixels[y, x].tolist()}"
        raise Mistake(f"{path}: {what} at row {y}, column {x}: give labels 0..{len(LABELS) - 1}, or {COLOURS}")
    return labels


def list_pngs(folder: Path, what: str) -> dict[str, Path]:
    """PNGs of a folder, also .PNG, by name without suffix, sorted; dotfiles are ignored.

    what: "images" or "maps", for the Mistake where there is none, or where two files have the same name.
    """
    if not folder.is_dir():
        raise Mistake(f"{folder}: no such folder: give the folder of the {what}")
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found: dict[str, Path] = {}
    for path in files:
        if path.suffix.lower() == ".png" and (other := found.setdefault(same_form(path.stem), path)) is not path:
            raise Mistake(f"{path}: {other.name} has the same name: rename one")
    if not found:
        jpeg = any(path.suffix.lower() in (".jpg", ".jpeg") for path in files)
        told = "JPEG, which changes grey levels and labels" if jpeg else "no PNG in it"
        raise Mistake(f"{folder}: {told}: give the {what} as PNG")
    return found


def check_finished(folder: Path) -> None:
    """Raise Mistake for a set, or its images/ or maps/, whose making was cut off: a part would pass for the whole."""
    place = folder.parent if folder.name in ("images", "maps") else folder
    if (place / UNFINISHED).exists() and not (place / "split.json").exists():
        raise Mistake(f"{place}: its making was cut off: run the command that makes it again")


def read_split(path: Path) -> dict[str, list[str]]:
    """Names of each side (train, test, seg_test) of a split.json; names may end in .png, in any case.

    Raises Mistake where it holds no lists of names, a name of no file, or one to train and to test.
    """
    try:
        split = json.loads(path.read_bytes().decode("utf-8-sig"))  # a byte order mark is allowed
    except JSON_ERRORS as error:
        raise Mistake(f"{path}: no JSON of names under train and test ({error}): see docs/data.md") from error
    sides = {side: split[side] for side in SIDES if side in split} if isinstance(split, dict) else {}
    if not sides or not all(isinstance(names, list) for names in sides.values()):
        raise Mistake(f"{path}: no lists of names under train and test: give a list for each")
    for name in itertools.chain(*sides.values()):
        if not isinstance(name, str) or re.match(r"\.|$", name) or re.search(r"[/\\]", name):
            raise Mistake(f"{path}: {name!r:.80} is no name of a slice: give names without folders")
    sides = {side: [same_form(re.sub(r"(?i)\.png$", "", name)) for name in each] for side, each in sides.items()}
    if both := {*sides.get("train", [])} & {*sides.get("test", [])}:
        raise Mistake(f"{path}: {min(both)} is under train and test: take it out of one")
    return sides


@contextlib.contextmanager
def held(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Make a folder and lock it, or the file in it that the lock's name stands for; Mistake where another run holds it.

    The lock is the system's and ends with its process, however that dies.
    """
    lock = FileLock(folder / name, blocking=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise Mistake(f"{folder}: another run is writing to it: wait for its end, or give another --out") from error
    except OSError as error:
        raise Mistake(f"{folder}: cannot be written to ({error.strerror}): give another --out") from error
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                (folder / name).unlink()  # while still held: nobody can take a lock without a name
        lock.release()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or, where a run is cut off, as before. Raises Mistake where it cannot be."""
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else the name may survive a crash of the machine, and the content not
        unfinished.replace(path)
    except OSError as error:  # from a full disk, which names no file
        raise Mistake(f"{path}: cannot be written ({error.strerror}): make room, or choose another place") from error
    finally:
        unfinished.unlink(missing_ok=True)


def png(pixels: np.ndarray) -> bytes:
    """Grey uint8 or uint16 [H, W] or RGB uint8 [H, W, 3] as PNG, quickly: level 1 takes a third of the usual time."""
    return iio.imwrite("<bytes>", pixels, extension=".png", compress_level=1)


def write_image(path: Path, hu: np.ndarray) -> None:
    """Write HU [H, W], any real type, as the 16-bit image of the format."""
    write_bytes(path, png(np.clip(np.rint(hu) + HU_OFFSET, 0, 4095).astype(np.uint16)))


def write_map(path: Path, labels: np.ndarray) -> None:
    """Write labels uint8 [H, W], values 0..3, as the palette PNG of the format."""
    picture = Image.fromarray(labels.astype(np.uint8))
    colours = bytes(channel for colour in COLOURS for channel in colour)
    picture.putpalette(colours.ljust(3 * 256, b"\0"))  # turns "L" into "P"; with fewer colours pixels would take 2 bits
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def write_split(path: Path, train: list[str], test: list[str], seg_test: list[str], drawn: dict) -> None:
    """Write split.json, with which a set is complete: names of each side, and how they were drawn (seed, by, ...)."""
    split = {"train": train, "test": test, "seg_test": seg_test, "drawn": drawn}
    write_bytes(path, (json.dumps(split, indent=1) + "\n").encode())
    (path.parent / UNFINISHED).unlink(missing_ok=True)


def held_split(out: Path) -> dict:
    """What OUT/split.json holds, as it is; nothing if it is missing or no JSON."""
    try:
        return json.loads((out / "split.json").read_text(encoding="utf-8-sig"))
    except JSON_ERRORS:
        return {}


def make_room(out: Path, overwrite: bool, same: bool = False) -> None:
    """Make the folders of a set. Raises Mistake for a folder that holds anything, unless with `overwrite`.

    An unfinished set gives way, and the `same` set may be written again. Only files named like slices are ever removed.
    """
    unfinished = (out / UNFINISHED).exists() and not (out / "split.json").exists()
    there = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not (overwrite or unfinished or same) and (first := next(there, None)):
        raise Mistake(f"{first}: of another set: give another --out, or --overwrite to replace it")
    for folder in (out / "images", out / "maps"):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name.endswith(".png.tmp") or (not same and re.fullmatch(r"P\d+_S\d+\.png", path.name)):
                path.unlink()
    (out / UNFINISHED).touch()
    (out / "split.json").unlink(missing_ok=True)  # until it is back no reader takes the set, see check_finished


def windowed(hu: np.ndarray, level: float = LEVEL, width: float = WIDTH) -> np.ndarray:
    """HU to grey levels, uint8 0..255, through a window, for pictures."""
    return (np.clip((hu - level) / width + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8)


def coloured(labels: np.ndarray) -> np.ndarray:
    """Labels [H, W] to the paper's colours, uint8 [H, W, 3]."""
    return np.array(COLOURS, np.uint8)[labels]
