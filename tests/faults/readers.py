"""Every reader of files and options that others may have made, with what to mutate for it; run as a child process.

    python tests/faults/readers.py slices_map 10000 0     # reader, tries, seed: one line of JSON, see `tally`

A child, so that its memory has a limit, so that a crash of a library is seen, and so that nobody else's is counted.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

SECONDS, BYTES = 5, 2**31  # of a core, and of memory, that one input may take
LONGEST = 1000  # letters of a complaint
COMMAND = "command.json"  # which no complaint names, since no user has it
ODD_NUMBERS = (0, -1, 1, 2**31 - 1, 2**31, 2**63, -(2**63), 10**12, 10**30, 1e308, math.nan, math.inf, -math.inf, 0.5)
ODD_VALUES = (*ODD_NUMBERS, True, None, "", "../../x", "/etc/passwd", "C:\\x", "a\0b", "a\nb", "x" * 10**5, [], {})
ODD_VALUES += ([[]], {"a": 1}, [1, 2], "nan", "\ud800", "\x1b[2J")
UNTYPED = {"\ud800": "\udc80", "a\0b": "a b"}  # no shell passes these; a byte of no UTF-8 it does
TYPED = tuple(UNTYPED.get(value, value) if isinstance(value, str) else value for value in ODD_VALUES)


class Reader(NamedTuple):
    """Something that reads what others have made."""

    file: str  # its name
    seeds: Callable[[], list[bytes]]  # right inputs
    mutate: Callable[[np.random.Generator, list[bytes]], bytes]  # one of them, spoilt
    read: Callable[[Path], object]


# ---- mutations


def spoil(rng: np.random.Generator, content: bytes, most: int = 8, within: int | None = None) -> bytes:
    """Change a few places: bits, bytes, words of 2 and 4 bytes; now and then cut out, double, insert, cut short."""
    spoilt = bytearray(content)
    for _ in range(rng.integers(1, most + 1)):
        at = int(rng.integers(0, max(1, min(len(spoilt), within or len(spoilt)))))
        kind = rng.choice(
            ["bit", "byte", "word", "long", "cut", "double", "insert", "short"], p=[0.25] * 3 + [0.05] * 5
        )
        span = int(rng.integers(1, 40))
        if kind == "bit" and spoilt:
            spoilt[at] ^= 1 << int(rng.integers(8))
        elif kind == "byte" and spoilt:
            spoilt[at] = int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))
        elif kind in ("word", "long"):
            form = rng.choice([">", "<"]) + ("h" if kind == "word" else "i")
            odd = rng.choice([0, 1, -1, 2**15 - 1, -(2**15), rng.integers(-(2**15), 2**15)])
            new = struct.pack(form, int(odd))
            spoilt[at : at + len(new)] = new
        elif kind == "cut":
            del spoilt[at : at + span]
        elif kind == "double":
            spoilt[at:at] = spoilt[at : at + span]
        elif kind == "insert":
            spoilt[at:at] = rng.bytes(span)
        elif kind == "short" and rng.random() < 0.3:
            del spoilt[at:]
    return bytes(spoilt)


def one(rng: np.random.Generator, things: list | tuple) -> object:
    """One of them."""
    return things[int(rng.integers(len(things)))]


def spoil_tree(rng: np.random.Generator, tree: object) -> object:
    """Put an odd value in the place of one of the values or keys of a JSON-like tree, which is copied."""
    if rng.random() < 0.2 or not isinstance(tree, dict | list) or not tree:
        return one(rng, ODD_VALUES)
    if isinstance(tree, list):
        k = int(rng.integers(len(tree)))
        return [*tree[:k], spoil_tree(rng, tree[k]), *tree[k + 1 :]]
    key = one(rng, [*tree])
    if rng.random() < 0.1:
        return {k: v for k, v in tree.items() if k != key}
    if rng.random() < 0.1:
        return tree | {one(rng, ("", "x", "../x", "a\nb")): one(rng, ODD_VALUES)}
    return tree | {key: spoil_tree(rng, tree[key])}


# ---- PNG


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk of a PNG."""
    found, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_of(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of chunks, with right checksums."""
    framed = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def spoil_png(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """Spoil a PNG's bytes; or a chunk, the pixels or the order of the chunks, with right checksums."""
    content = one(rng, seeds)
    if rng.random() < 0.25:
        return spoil(rng, content)
    parts = chunks(content)
    k = int(rng.integers(len(parts)))
    kind, body = parts[k]
    how = rng.random()
    if how < 0.15:
        parts[k : k + 1] = [parts[k]] * int(rng.integers(0, 3))
    elif how < 0.3:
        kinds = (b"tRNS", b"PLTE", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"gAMA", b"pHYs", b"acTL", b"fcTL")
        parts.insert(k, (one(rng, kinds), rng.bytes(int(rng.integers(0, 40)))))
    elif kind == b"IDAT" and how < 0.8:
        parts[k] = kind, zlib.compress(spoil(rng, zlib.decompress(body)))
    else:
        parts[k] = kind, spoil(rng, body, most=3)
    return png_of(parts)


def saved(picture: Image.Image, **options: object) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def map_seeds() -> list[bytes]:
    """One map in every form that is read."""
    from data.slices import COLOURS

    labels = np.array([[0, 1, 2, 3, 0], [3, 2, 1, 0, 1], [0, 0, 1, 1, 2]], np.uint8)
    indexed = Image.fromarray(labels)
    indexed.putpalette(bytes(itertools.chain(*COLOURS)))
    painted = Image.fromarray(np.array(COLOURS, np.uint8)[labels])
    forms = [saved(Image.fromarray(labels)), saved(indexed), saved(painted), saved(painted.convert("RGBA"))]
    return [*forms, saved(indexed, transparency=0), saved(indexed, bits=4, transparency=bytes([0, 255]))]


def image_seeds() -> list[bytes]:
    """Slices."""
    stored = np.arange(20, dtype=np.uint16).reshape(4, 5)
    return [saved(Image.fromarray(stored * 200)), saved(Image.fromarray(stored))]


def right_map(labels: np.ndarray) -> None:
    """What a label map is."""
    assert labels.dtype == np.uint8 and labels.ndim == 2 and labels.size and labels.max() <= 3


def right_image(hu: np.ndarray) -> None:
    """What a slice is."""
    assert hu.dtype == np.int16 and hu.ndim == 2 and hu.size and hu.min() >= -1024 and hu.max() <= 3071


def slices_map(path: Path) -> None:
    """A map by data/slices.py."""
    from data import slices

    right_map(slices.read_map(path))


def slices_image(path: Path) -> None:
    """A slice by data/slices.py."""
    from data import slices

    right_image(slices.read_image(path))


def covidgan_map(path: Path) -> None:
    """A map by covidgan.py."""
    import covidgan

    right_map(covidgan.read_map(path, 4))


def covidgan_image(path: Path) -> None:
    """A slice by covidgan.py."""
    import covidgan

    right_image(covidgan.read_image(path))


# ---- NIfTI


def nifti_seeds() -> list[bytes]:
    """Volumes in several types, endiannesses, orders and of both versions, with and without an extension."""
    import nibabel as nib

    affine = np.array([[-0.6, 0.1, 0.2, 90], [-0.1, -0.7, 0.5, 80], [0.1, -0.2, 4.9, -300], [0, 0, 0, 1]])
    numbers = np.arange(60).reshape(5, 4, 3) % 4
    images = [nib.Nifti1Image(numbers.astype(kind), affine) for kind in ("u1", "<i2", ">i2", "<f4", "<f8")]
    images.append(nib.Nifti2Image(numbers.astype("<i2"), affine))
    images[1].header.set_slope_inter(1, 0)
    images[2].set_qform(np.diag([-1.0, -1, 2, 1]), 1)
    images[2].set_sform(None, 0)
    images[3].header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    return [image.to_bytes() for image in images]


def spoil_nifti(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """Spoil a volume's header more often than its voxels."""
    return spoil(rng, one(rng, seeds), within=352 if rng.random() < 0.8 else None)


def spoil_packed_nifti(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """Spoil a volume under its compression, or the compressed file."""
    import gzip

    if rng.random() < 0.5:
        return gzip.compress(spoil_nifti(rng, seeds), 1)
    return spoil(rng, gzip.compress(one(rng, seeds), 1))


def nifti(path: Path) -> None:
    """A volume by data/volumes.py: as a CT, as labels, and as the mask of a CT; each may refuse it by itself."""
    from data import volumes
    from data.slices import Mistake

    refused = []
    ct = volumes.Volume(np.zeros((3, 4, 5), np.int16), right_header())
    for read in (
        lambda: volumes.read_volume(path, str).voxels,
        lambda: volumes.read_label_volume(path, (0, 1, 2, 3), str)[1],
        lambda: volumes.read_labels(path, (0, 1, 2, 3), ct, str),
    ):
        try:
            voxels = read()
            assert voxels.ndim == 3 and voxels.size and voxels.dtype.isnative
        except Mistake as mistake:
            refused.append(mistake)
    if refused:
        raise refused[0]


def right_header() -> object:
    """The header of the CT that masks are laid on."""
    import nibabel as nib

    return nib.Nifti1Image.from_bytes(nifti_seeds()[0]).header


# ---- split.json


def split_seeds() -> list[bytes]:
    """Splits with all and with the least in them."""
    whole = {"train": ["P01_S001", "P01_S002.png"], "test": ["P02_S001"], "seg_test": [], "drawn": {"seed": 1}}
    return [json.dumps(split).encode() for split in (whole, {"train": ["a"], "test": ["b"]})]


def spoil_split(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """Spoil a split as a tree, or as bytes."""
    content = one(rng, seeds)
    if rng.random() < 0.4:
        return spoil(rng, content)
    split = spoil_tree(rng, json.loads(content))
    return json.dumps(spoil_tree(rng, split) if rng.random() < 0.5 else split).encode()


def right_split(sides: dict) -> None:
    """Lists of names that lead nowhere else."""
    for name in itertools.chain(*sides.values()):
        assert isinstance(name, str) and name and not re.search(r"[/\\\0-\x1f]|^\.", name), name


def slices_split(path: Path) -> None:
    """A split by data/slices.py."""
    from data import slices

    right_split(slices.read_split(path))


def covidgan_split(path: Path) -> None:
    """A split by covidgan.py, which wants the folder."""
    import covidgan

    for part in ("images", "maps"):
        (path.parent / part).mkdir(exist_ok=True)
    right_split(covidgan.read_split(path.parent, 0))


# ---- checkpoints


def checkpoint_seeds() -> list[bytes]:
    """The checkpoint of a small method that has made no step."""
    import torch

    import covidgan

    c = covidgan.Config(**covidgan.PRESETS["tiny"] | dict(ngf=4, ndf=4, n_blocks=1, n_local_blocks=1, device="cpu"))
    method = covidgan.build(covidgan.Covidgan, c)
    average = method.generator().state_dict()
    state = {"method": "covidgan", "config": dataclasses.asdict(c), "stage": "g1", "step": 3, "steps": 20}
    players = {name: player for name, player in method.players("g1").items() if player.parameters}
    adams = {name: torch.optim.Adam(player.parameters, fused=True).state_dict() for name, player in players.items()}
    buffer = io.BytesIO()
    torch.save(state | {"networks": method.state_dict(), "average": average, "optimizers": adams}, buffer)
    return [buffer.getvalue()]


def spoil_checkpoint(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """Spoil a checkpoint as a tree, its config first, or as bytes, the index of the archive first."""
    import torch

    state = torch.load(io.BytesIO(one(rng, seeds)), weights_only=True)
    buffer = io.BytesIO()
    how = rng.random()
    if how < 0.4:
        state = state | {"config": spoil_tree(rng, state["config"])}
    elif how < 0.6:
        state = spoil_tree(rng, state)
    elif how < 0.7:
        name = one(rng, [*state["networks"]])
        odd = (torch.zeros(3), torch.zeros(1).expand(2**40), torch.full((2, 2), math.nan), torch.ones(1).to_sparse())
        state = state | {"networks": state["networks"] | {name: one(rng, odd)}}
    torch.save(state, buffer, _use_new_zipfile_serialization=how < 0.7 or rng.random() < 0.7)
    content = buffer.getvalue()
    if how < 0.7:
        return content
    pickled = max(0, content.find(b"data.pkl"))  # first in the archive
    middle = int(rng.integers(pickled, len(content)))
    return (
        content[:pickled] + spoil(rng, content[pickled:], within=2000)
        if how < 0.9
        else (content[:middle] + spoil(rng, content[middle:], within=400))
    )


def resumed(path: Path) -> None:
    """A checkpoint by --resume: its config, and its tensors in a trainer, but no data."""
    import torch

    import covidgan

    c = covidgan.parse_config(["--resume", "--out", str(path.parent), "--data", str(path.parent)])
    none = covidgan.Slices([], torch.zeros(0), torch.zeros(0))
    with patch.multiple(covidgan, read_split=lambda *_: {"train": [], "test": []}, load_slices=lambda *_, **__: none):
        covidgan.Trainer(covidgan.Covidgan, c).load(path)


def exported(path: Path) -> None:
    """A checkpoint by export.py, up to the tracing."""
    import covidgan
    import export

    weights = covidgan.read_weights(path)
    kind = export.method_of(weights, path)
    export.load_method(covidgan.read_checkpoint(path, kind), kind)


# ---- ONNX


def model_seeds() -> list[bytes]:
    """A graph of the generator's contract, as small as may be."""
    from onnx import TensorProto, helper, numpy_helper

    sides = ["N", "H", "W"]
    inputs = [helper.make_tensor_value_info("map", TensorProto.UINT8, sides)]
    outputs = [helper.make_tensor_value_info("ct", TensorProto.INT16, sides)]
    outputs.append(helper.make_tensor_value_info("alpha", TensorProto.FLOAT, ["N"]))
    weights = numpy_helper.from_array(np.ones((3, 3), np.float32)[None, None], "weights")
    nodes = [
        helper.make_node("Cast", ["map"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float", "one"], ["four"]),
        helper.make_node("Conv", ["four", "weights"], ["blurred"], pads=[1, 1, 1, 1]),
        helper.make_node("Squeeze", ["blurred", "one"], ["three"]),
        helper.make_node("Cast", ["three"], ["ct"], to=TensorProto.INT16),
        helper.make_node("ReduceMean", ["four", "axes"], ["alpha"], keepdims=0),
    ]
    constants = [
        weights,
        numpy_helper.from_array(np.array([1]), "one"),
        numpy_helper.from_array(np.arange(1, 4), "axes"),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weights, *constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    metadata = {"kind": "generator", "contract": "1", "labels": '["background", "lung", "a", "b"]', "level": "-600.0"}
    metadata |= {"colours": "[[0, 0, 0], [255, 0, 0], [0, 0, 255], [0, 255, 0]]", "width": "1500.0", "size": "64"}
    metadata |= {"multiple": "16", "precision": "float32", "checkpoint_sha256": "0" * 64, "licence": "none"}
    helper.set_model_props(model, metadata)
    return [model.SerializeToString()]


def spoil_model(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """Spoil a model's metadata, a part of its graph, or its bytes."""
    import onnx

    content, how = one(rng, seeds), rng.random()
    if how < 0.3:
        return spoil(rng, content)
    model = onnx.load_from_string(content)
    if how < 0.75:
        entry = one(rng, model.metadata_props)
        odd = (
            lambda: json.dumps(one(rng, ODD_VALUES)),
            lambda: "[" * 10**5,
            lambda: one(rng, ("\x1b[2J", "a\nb", "9" * 5000)),
        )
        value = (
            json.loads(entry.value) if entry.value[0] in "[-16" and entry.key != "checkpoint_sha256" else entry.value
        )
        entry.value = one(rng, (*odd, lambda: json.dumps(spoil_tree(rng, value))))()
        return model.SerializeToString()
    part = one(rng, [*model.graph.node, *model.graph.initializer, *model.graph.input, *model.opset_import])
    for _ in range(20):
        try:
            part.ParseFromString(spoil(rng, part.SerializeToString(), most=2))
            break
        except Exception:  # protobuf's own: not even a message
            continue
    return model.SerializeToString()


def model(path: Path) -> None:
    """A model by infer_onnx.py, and a slice of it."""
    import infer_onnx

    session, info = infer_onnx.open_session(path, "cpu", 1, quiet=True)
    assert math.isfinite(info["level"]) and info["width"] > 0 and 1 <= len(info["labels"]) <= 4
    try:
        hu = infer_onnx.Generator(session, info)(np.zeros((1, 20, 20), np.uint8))
    except infer_onnx.Mistake as mistake:  # which names no file: its caller names the map
        raise infer_onnx.Mistake(f"{path}: {mistake}") from mistake
    assert hu.shape == (1, 20, 20) and hu.dtype == np.int16


# ---- command lines


def methods() -> dict[str, type]:
    """Every method that the loop trains, by name."""
    from covidgan import Covidgan
    from paper.methods import METHODS
    from paper.segment import Segmentation

    return {method.name: method for method in (Covidgan, *METHODS.values(), Segmentation)}


def command_seeds() -> list[bytes]:
    """A command line as JSON, behind what it is for."""
    return [b'["covidgan", "--preset", "tiny", "--ngf", "12"]', b'["SPADE", "--ngf", "4"]']


def odd_value(rng: np.random.Generator, words: tuple = TYPED) -> str:
    """A value for an option: an odd one, or a number."""
    numbers = str(int(rng.integers(-2, 300))), f"{rng.normal(0, 10):.3g}"
    return one(rng, (str(one(rng, words)), *numbers, "1e400", "1_0", "0x10", "-0", "１"))


def spoil_command(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """A training's command line of a few options, odd values among right ones."""
    from covidgan import get_type_hints

    method = one(rng, [*methods().values()])
    options = [*get_type_hints(method.options).items()]
    words = [method.name, "--preset", one(rng, [*method.presets])]
    for _ in range(rng.integers(1, 4)):
        name, kind = one(rng, options)
        words += [f"--{name.replace('_', '-')}"] + ([] if kind is bool else [odd_value(rng)])
    return json.dumps(words).encode()


def command(path: Path) -> None:
    """A training's command line; what it lets pass augments a slice to a slice, and builds its networks."""
    import torch

    import covidgan

    name, *words = json.loads(path.read_bytes())
    method = methods()[name]
    c = covidgan.parse_config([word for word in words if word not in ("--resume", "--overwrite")], method)
    assert all(math.isfinite(value) for value in dataclasses.astuple(c) if isinstance(value, float))
    labels = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    image, drawn = covidgan.augment(torch.full((1, 1, 32, 32), -800), labels, c, torch.Generator().manual_seed(0))
    assert image.isfinite().all() and drawn.max() <= 1 and covidgan.outline(method, c)


def put_set(folder: Path) -> None:
    """All that the scripts take: volumes, a dataset, slices, a model."""
    import nibabel as nib

    from data import slices

    lung, lesion = np.zeros((24, 24, 3)), np.zeros((24, 24, 3))
    lung[6:18, 6:18] = 1
    hu = 40 - 900 * lung
    lesion[8:12, 8:12] = 1
    for patient in ("P01", "P02", "P03"):
        for part, voxels in (("rp_im", hu), ("rp_lung_msk", lung), ("rp_msk", lesion)):
            (folder / part).mkdir(exist_ok=True)
            volume = nib.Nifti1Image(voxels.astype(np.int16), np.diag([-1.0, -1, 5, 1]))
            nib.save(volume, folder / part / f"{patient}.nii")
        for part in ("set", "fake"):
            for kind in ("images", "maps"):
                (folder / part / kind).mkdir(parents=True, exist_ok=True)
            slices.write_image(folder / part / "images" / f"{patient}_S001.png", hu[..., 0].astype(np.int16))
            slices.write_map(folder / part / "maps" / f"{patient}_S001.png", (lung + lesion)[..., 0].astype(np.uint8))
    (folder / "model.onnx").write_bytes(model_seeds()[0])


SCRIPTS = {  # of each what works on put_set, and what runs it: its parse alone where it would work for minutes
    "infer_onnx": ("main", "set/maps --model model.onnx --provider cpu --out out --dry-run"),
    "eval": ("main", "set fake --provider cpu --out out"),
    "data.prepare": ("main", ". --binary --unchecked --size 16 --split 1,1,1 --out out"),
    "data.phantom": ("parse_arguments", "--patients 3 --workers 1"),
    "bench": ("parse", "--quick"),
    "paper.tables": ("parse", "2 --data set --reference set"),
    "paper.fidelity": ("parse", "--data set --reference set"),
    "paper.weighting": ("parse", "out --data set"),
}
PATHS = {"../../x", "/etc/passwd", "C:\\x"}  # a user who names such an --out means it


@functools.cache
def options_of(script: str) -> list[str]:
    """A script's options, by its help."""
    module, told = importlib.import_module(script), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        module.main(["-h"])
    return sorted(set(re.findall(r"--[a-z][a-z-]+", told.getvalue().partition("options:")[2])) - {"--help"})


def script_seeds() -> list[bytes]:
    """Right command lines of all scripts."""
    return [json.dumps([script, *words.split()]).encode() for script, (_, words) in SCRIPTS.items()]


def spoil_script(rng: np.random.Generator, seeds: list[bytes]) -> bytes:
    """A script's command line with up to three odd options, as right words alone now and then."""
    script, *words = json.loads(one(rng, seeds))
    for _ in range(rng.integers(1, 4)):
        odd = odd_value(rng, tuple(value for value in TYPED if str(value) not in PATHS))
        words += [one(rng, options_of(script)), *[odd] * (rng.random() < 0.9)]
    return json.dumps([script, *words]).encode()


def script(path: Path) -> None:
    """A script's command line, run in a folder of its own; what the system refuses is a mistake, as at its start."""
    import covidgan
    from data.slices import Mistake

    name, *words = json.loads(path.read_bytes())
    run = getattr(importlib.import_module(name), SCRIPTS[name][0])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        put_set(Path(folder))
        try:
            run(words)
        except OSError as error:
            raise Mistake(covidgan.first_line(error)) from error


READERS = {
    "slices_map": Reader("map.png", map_seeds, spoil_png, slices_map),
    "slices_image": Reader("image.png", image_seeds, spoil_png, slices_image),
    "covidgan_map": Reader("map.png", map_seeds, spoil_png, covidgan_map),
    "covidgan_image": Reader("image.png", image_seeds, spoil_png, covidgan_image),
    "nii": Reader("ct.nii", nifti_seeds, spoil_nifti, nifti),
    "nii_gz": Reader("ct.nii.gz", nifti_seeds, spoil_packed_nifti, nifti),
    "slices_split": Reader("split.json", split_seeds, spoil_split, slices_split),
    "covidgan_split": Reader("split.json", split_seeds, spoil_split, covidgan_split),
    "checkpoint_resumed": Reader("ckpt.pt", checkpoint_seeds, spoil_checkpoint, resumed),
    "checkpoint_exported": Reader("ckpt.pt", checkpoint_seeds, spoil_checkpoint, exported),
    "onnx": Reader("generator.onnx", model_seeds, spoil_model, model),
    "command": Reader(COMMAND, command_seeds, spoil_command, command),
    "script": Reader(COMMAND, script_seeds, spoil_script, script),
}


# ---- the child


def fault_of(reader: Reader, path: Path) -> str:
    """What is wrong with how an input is read: "" where it is a right result, "refused" where it is one clear line."""
    try:
        reader.read(path)
    except Exception as error:
        if type(error).__name__ != "Mistake":
            return "".join(traceback.format_exception(error)[-4:])
        text = str(error if reader.file == COMMAND else error.args[0])  # what a user typed is told with escapes
        fine = text.isprintable() and 0 < len(text) <= LONGEST
        return "refused" if fine and (reader.file == COMMAND or str(path) in text) else f"complaint: {text[:300]!r}"
    return ""


def too_slow(*_: object) -> None:
    """Interrupt an input that takes too long."""
    raise TimeoutError(f"more than {SECONDS} s")


def limit_memory() -> None:
    """From here on a reader may take BYTES and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, resource.RLIM_INFINITY))


def tally(name: str, tries: int, seed: int, folder: Path) -> dict:
    """Try a reader on mutated inputs: how many came out right and were refused, and each fault with its input."""
    reader, rng = READERS[name], np.random.default_rng(seed)
    path, kept = folder / "in" / reader.file, folder / "faults"
    for each in (path.parent, kept, folder / "cwd"):
        each.mkdir(parents=True)
    os.chdir(folder / "cwd")
    seeds, counts, faults, slowest = reader.seeds(), Counter(), {}, 0.0
    signal.signal(signal.SIGPROF, too_slow)
    for content in seeds:  # which are right; the first loads the libraries
        path.write_bytes(content)
        reader.read(path)
    sys.stderr = io.StringIO()  # warnings and notes are no faults
    limit_memory()
    for k in range(tries):
        path.write_bytes(reader.mutate(rng, seeds))
        started = time.process_time()  # of this process: what else the machine does is not its fault
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        fault = fault_of(reader, path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - started)
        counts[{"": "right", "refused": "refused"}.get(fault, "fault")] += 1
        if fault not in ("", "refused") and (key := fault.strip().splitlines()[-1][:80]) not in faults:
            faults[key] = fault
            (kept / f"{name}_{seed}_{k}").write_bytes(path.read_bytes())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    stray = [str(each) for each in (folder / "cwd").rglob("*")]
    stray += [str(each) for each in path.parent.rglob("*") if each != path and each.name not in ("images", "maps")]
    return {**counts, "slowest": round(slowest, 2), "MiB": peak, "stray": stray, "faults": [*faults.values()]}


if __name__ == "__main__":
    reader_name, count, first = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    place = Path(sys.argv[4]) if len(sys.argv) > 4 else Path(tempfile.mkdtemp(prefix="faults_"))
    print(json.dumps(tally(reader_name, count, first, place)))
