"""Files and options that are wrong, by chance or by intent: a right result or one line, and nothing of theirs is run.

By chance: thousands of mutations of every reader's inputs, in a child of limited memory; see readers.py. By intent:
what follows, each with the fault that it once was, or would be.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import onnxruntime
import pytest
import readers
import torch
from conftest import ROOT
from onnx import helper
from PIL import PngImagePlugin

import covidgan
import eval as evaluation
import export
import infer_onnx
from covidgan import Covidgan
from data import slices, volumes

TRIES = dict.fromkeys(readers.READERS, 300) | {
    "checkpoint_resumed": 60,
    "checkpoint_exported": 60,
    "command": 30,
    "script": 150,
}
MISTAKES = (slices.Mistake, covidgan.Mistake)


def refused(read, path, words=""):
    """The reader refuses a file in one line that names it."""
    with pytest.raises(MISTAKES) as mistake:
        read(path)
    (text,) = mistake.value.args
    assert str(path) in text and text.isprintable() and len(text) <= readers.LONGEST and words in text
    return text


def peak(work):
    """Most bytes that Python and NumPy hold while work goes on."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", readers.READERS)
def test_a_mutated_input_is_read_right_or_refused_in_one_line(name, tries, count, tmp_path):
    n = tries(TRIES[name], 10_000)
    command = [sys.executable, readers.__file__, name, str(n), "1", str(tmp_path / "child")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600 if n < 1000 else None)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    count(f"mutated inputs of {name}", n)
    assert not told["faults"] and not told["stray"], told
    assert told["MiB"] < 2048 and told["slowest"] < readers.SECONDS
    assert told["right"] and told["refused"]  # of neither there is always some


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_name_that_a_terminal_would_obey_is_told_with_escapes(mistake):
    assert str(mistake("a\nb\x1b[2J\u202eé.png: not there")) == "a\\nb\\x1b[2J\\u202eé.png: not there"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_complaint_about_a_long_word_still_begins_and_ends_as_written(mistake):
    told = str(mistake(f"--out {'x' * 100_000}: not there: give another --out"))
    assert len(told) < 1000
    assert told.startswith("--out xxx")
    assert told.endswith("xxx: not there: give another --out")


# ------------------------------------------------------------------------------------------------ pictures


def slices_map(path):
    return slices.read_map(path)


def covidgan_map(path):
    return covidgan.read_map(path, 4)


PNG_READERS = [slices_map, covidgan_map, slices.read_image, covidgan.read_image]


def header(width, height, depth=8, kind=0):
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)


def end(pixels):
    return [(b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]


@pytest.mark.parametrize("read", PNG_READERS)
@pytest.mark.parametrize("heads", [[header(60_000, 60_000)], [header(9000, 9000)], [header(2, 2), header(9000, 9000)]])
def test_a_png_that_claims_giant_sides_is_refused_before_it_is_decoded(tmp_path, monkeypatch, read, heads):
    """The second is below Pillow's own limit; a second header overrules the first."""
    (tmp_path / "a.png").write_bytes(readers.png_of([*heads, *end(bytes(6))]))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    refused(read, tmp_path / "a.png", "4096")


@pytest.mark.parametrize("read", PNG_READERS)
def test_a_chunk_that_claims_gigabytes_is_given_none(tmp_path, read):
    """Reading that many bytes from a file would find room for them first."""
    content = readers.png_of([header(4, 4, 16 if "image" in read.__name__ else 8), *end(bytes(36))])
    at = content.index(b"IDAT")
    (tmp_path / "a.png").write_bytes(content[: at - 4] + b"\x7f\xff\xff\xff" + content[at:-12])

    def attempt():
        with contextlib.suppress(*MISTAKES):
            read(tmp_path / "a.png")

    assert peak(attempt) < 2**22


@pytest.mark.parametrize("read", PNG_READERS)
def test_a_colour_profile_cut_short_behind_the_pixels_is_one_line(tmp_path, read):
    """Pillow raises an IndexError of its own."""
    pixels, close = end(bytes(36))
    depth = 16 if "image" in read.__name__ else 8
    (tmp_path / "a.png").write_bytes(readers.png_of([header(4, 4, depth), pixels, (b"iCCP", b"a\0"), close]))
    refused(read, tmp_path / "a.png", "not a readable PNG")


@pytest.mark.parametrize("read", [slices_map, covidgan_map])
@pytest.mark.parametrize("clear", [bytes(9), bytes(300)])
def test_opacities_of_more_colours_than_there_are_change_no_label(tmp_path, read, clear):
    palette = (b"PLTE", bytes([9, 9, 9, 80, 0, 0]))
    parts = [header(2, 1, 8, 3), palette, (b"tRNS", clear), *end(bytes([0, 0, 1]))]
    (tmp_path / "a.png").write_bytes(readers.png_of(parts))
    assert read(tmp_path / "a.png").tolist() == [[0, 1]]


@pytest.mark.parametrize("read", [slices_map, covidgan_map])
def test_an_index_beyond_the_palette_is_black(tmp_path, read):
    palette = (b"PLTE", bytes([0, 0, 0, 255, 0, 0]))
    (tmp_path / "a.png").write_bytes(readers.png_of([header(3, 1, 8, 3), palette, *end(bytes([0, 0, 1, 7]))]))
    assert read(tmp_path / "a.png").tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("read", [*PNG_READERS, slices.read_split, covidgan.read_sides])
def test_a_file_that_never_ends_or_fills_the_memory_is_refused_before_it_is_read(tmp_path, read):
    path = tmp_path / "a.png"
    os.mkfifo(path)
    refused(read, path, "no regular file")
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(10**10)  # takes no room on the disk
    refused(read, path, "10,000,000,000 bytes")


@pytest.mark.parametrize("read", PNG_READERS)
@pytest.mark.parametrize("form", ["TIFF", "BMP", "GIF", "EPS"])
def test_another_format_by_the_name_of_a_png_reaches_no_other_decoder(tmp_path, read, form):
    picture = readers.Image.fromarray(np.zeros((4, 4), np.uint8))
    picture.save(tmp_path / "a.png", format=form)
    refused(read, tmp_path / "a.png", "not a readable PNG")


# ------------------------------------------------------------------------------------------------ volumes


def test_a_small_file_that_unpacks_to_a_giant_one_is_refused_after_a_few_megabytes(tmp_path):
    whole = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes()
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(whole + bytes(2**28), 1))
    told = "holds more than the"
    assert peak(lambda: refused(volumes.read_volume, tmp_path / "ct.nii.gz", told)) < 2**24


@pytest.mark.parametrize("packed", [True, False])
def test_a_header_that_claims_a_giant_volume_is_refused_before_there_is_memory_for_it(tmp_path, packed):
    head = nib.Nifti2Header()
    head.set_data_shape((60_000, 60_000, 1))
    head.set_data_dtype(np.int16)
    content = head.binaryblock + bytes(100)
    path = tmp_path / "ct.nii"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert peak(lambda: refused(volumes.read_volume, path, "takes 7,200,000,000 bytes")) < 2**22


@pytest.mark.parametrize("change", ["slope", "side"])
def test_a_volume_that_grows_when_it_is_scaled_or_is_wider_than_any_scan_is_refused(tmp_path, change):
    """2**29 bytes in the file are 2**32 once a slope makes float64 of them."""
    head = nib.Nifti2Header()
    head.set_data_shape((1024, 1024, 512) if change == "slope" else (32_767, 2, 2))
    head.set_data_dtype(np.uint8)
    head.set_slope_inter(0.5, 0) if change == "slope" else None
    (tmp_path / "ct.nii").write_bytes(head.binaryblock + bytes(100))
    told = "takes 4,294,967,296 bytes" if change == "slope" else "4096 a side"
    assert peak(lambda: refused(volumes.read_volume, tmp_path / "ct.nii", told)) < 2**22


def test_a_gzip_of_many_streams_is_read_and_one_of_endless_empty_ones_refused(tmp_path):
    """bgzip writes streams of 64 KiB, and an empty one at the end."""
    whole = nib.Nifti1Image(np.arange(512, dtype=np.int16).reshape(8, 8, 8), np.diag([-1, -1, 1, 1])).to_bytes()
    streams = [gzip.compress(whole[k : k + 7]) for k in range(0, len(whole), 7)]
    (tmp_path / "ct.nii.gz").write_bytes(b"".join([*streams, gzip.compress(b""), b"rest"]))
    assert (
        volumes.read_volume(tmp_path / "ct.nii.gz").voxels.ravel() == np.arange(512).reshape(8, 8, 8).T.ravel()
    ).all()
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(b"") * 10**6)
    refused(volumes.read_volume, tmp_path / "ct.nii.gz", "streams without a byte")


@pytest.mark.parametrize(("magic", "offset"), [(b"ni1\0", -1600), (b"ni1\0", 0), (b"n+1\0", 0)])
def test_voxels_that_begin_in_the_header_are_one_line(tmp_path, magic, offset):
    content = bytearray(nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4)).to_bytes())
    content[108:112], content[344:348] = struct.pack("<f", offset), magic
    (tmp_path / "ct.nii").write_bytes(content)
    refused(volumes.read_volume, tmp_path / "ct.nii", "header" if not offset else "")


@pytest.mark.parametrize("offset", [math.nan, math.inf, -1e30, 1e30])
def test_voxels_that_begin_nowhere_are_one_line(tmp_path, offset):
    content = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes())
    content[108:112] = struct.pack("<f", offset)
    (tmp_path / "ct.nii").write_bytes(content)
    refused(volumes.read_volume, tmp_path / "ct.nii")


def test_axes_of_negative_length_are_one_line(tmp_path):
    content = bytearray(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes())
    content[42:46] = struct.pack("<hh", -4, -4)  # whose product is fine
    (tmp_path / "ct.nii").write_bytes(content)
    refused(volumes.read_volume, tmp_path / "ct.nii")


# ------------------------------------------------------------------------------------------------ split.json

SPLIT_READERS = [slices.read_split, lambda path: covidgan.read_split(path.parent, 0)]
OUTWARDS = ["../a", "/etc/passwd", "a/b", "..", ".a", "a\0b", "C:\\Windows\\a", "C:a", "..\\a", "a\nb", "a" * 300, ""]


@pytest.fixture
def split_file(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "maps").mkdir()
    return tmp_path / "split.json"


@pytest.mark.parametrize("read", SPLIT_READERS)
@pytest.mark.parametrize("name", OUTWARDS)
def test_a_name_that_leads_out_of_the_folder_is_refused(split_file, read, name):
    split_file.write_text(json.dumps({"train": ["P01_S001", name], "test": ["P02_S001"]}))
    refused(read, split_file, "no name")


@pytest.mark.parametrize("read", SPLIT_READERS)
@pytest.mark.parametrize("content", ["[" * 10**5, '{"train":' * 10**5, '{"train": ' + "9" * 10**4 + "}"])
def test_lists_in_lists_and_endless_numbers_are_one_line(split_file, read, content):
    split_file.write_text(content)
    refused(read, split_file)


def test_a_split_with_an_empty_side_is_named(split_file):
    split_file.write_text(json.dumps({"train": ["P01_S001"], "test": []}))
    refused(SPLIT_READERS[1], split_file, "both need one")


# ------------------------------------------------------------------------------------------------ checkpoints


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    marker, path = tmp_path / "was here", tmp_path / "ckpt.pt"
    for save in (torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))):
        save({"config": Payload(marker)}, path)
        for read in (covidgan.read_weights, lambda path: export.main([str(path), "-o", str(tmp_path / "g.onnx")])):
            refused(read, path, "not a checkpoint that can be read")
        assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # else the test would see nothing


def test_nothing_here_unpickles_but_by_weights_only():
    sources = [path for folder in (ROOT, ROOT / "data", ROOT / "paper") for path in folder.glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert (
        len(re.findall(r"torch\.load\(", text)) == len(re.findall(r"torch\.load\([^)]*weights_only=True\)", text)) > 0
    )
    assert not re.search(r"\bimport pickle\b|allow_pickle=True|np\.load\(|joblib|shelve|yaml", text)


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "ckpt.pt"
    torch.save({"config": {}, "networks": {"a": torch.zeros(2**24)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 2**20
    refused(covidgan.read_weights, path, "BadZipFile")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_calls_for_memory_of_its_own_is_refused(tmp_path, legacy):
    """torch.load's weights_only lets a pickle call bytearray(size)."""

    class Bomb:
        def __reduce__(self):
            return bytearray, (10**11,)

    class Old:
        """A tensor as PyTorch wrote it before 0.4; the download of VGG19 is so old."""

        def __reduce__(self):
            return torch._utils._rebuild_tensor, (torch.ones(2)._typed_storage(), 0, (2,), (1,))

    right = {"config": {"a": 1}, "networks": torch.nn.Linear(2, 2).state_dict()}
    right |= {"more": torch.nn.Parameter(torch.ones(2)), "old": Old(), "half": torch.ones(2).bfloat16()}
    for held, told in ((right | {"bomb": Bomb()}, "(ValueError)"), (right, "")):
        torch.save(held, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
        if told:
            refused(covidgan.read_weights, tmp_path / "ckpt.pt", told)
    held = covidgan.read_weights(tmp_path / "ckpt.pt")
    assert all(torch.equal(held[name].float(), torch.ones(2)) for name in ("more", "old", "half"))


def test_a_pickle_that_a_zip_only_ends_is_looked_through_as_pytorch_reads_it(tmp_path):
    """zipfile finds an archive by its end, torch.load by its beginning."""
    harmless = io.BytesIO()
    torch.save({}, harmless)
    torch.save({"a": {1, 2}}, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)  # calls set
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes() + harmless.getvalue())
    refused(covidgan.read_weights, tmp_path / "ckpt.pt", "(ValueError)")


def test_an_archive_with_two_parts_of_one_name_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "ckpt.pt")
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "a") as archive:
        archive.writestr("ckpt/DATA.PKL", archive.read("ckpt/data.pkl"))
    refused(covidgan.read_weights, tmp_path / "ckpt.pt", "(BadZipFile)")


@pytest.fixture
def checkpoint():
    return torch.load(io.BytesIO(readers.checkpoint_seeds()[0]), weights_only=True)


def read_checkpoint(path):
    return covidgan.read_checkpoint(path, Covidgan)


@pytest.mark.parametrize(
    "odd",
    [
        {"ngf": 1024},
        {"ngf": 10**9},
        {"n_blocks": 10**6},
        {"ngf": "a"},
        {"data": "a\nb"},
        {"lr": math.nan},
        {"size": []},
    ],
    ids=str,
)
def test_a_checkpoint_whose_config_asks_for_other_networks_is_refused_before_they_are_built(
    tmp_path, checkpoint, monkeypatch, odd
):
    monkeypatch.setattr(covidgan, "build", lambda *_: pytest.fail("built"))
    torch.save(checkpoint | {"config": checkpoint["config"] | odd}, tmp_path / "ckpt.pt")
    refused(read_checkpoint, tmp_path / "ckpt.pt")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    read_checkpoint(tmp_path / "ckpt.pt")  # the right one is read


@pytest.mark.parametrize("part", ["networks", "average"])
@pytest.mark.parametrize("make", [lambda _: torch.zeros(1).expand(2**40), torch.Tensor.to_sparse, torch.Tensor.long])
def test_tensors_that_only_claim_their_size_or_are_of_another_kind_are_refused(tmp_path, checkpoint, part, make):
    name = next(iter(checkpoint[part]))
    checkpoint[part][name] = make(checkpoint[part][name])
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    told = "not a checkpoint" if make is torch.Tensor.to_sparse else "another architecture"
    refused(read_checkpoint, tmp_path / "ckpt.pt", told)


def test_an_outline_has_the_shapes_of_the_networks_and_draws_nothing(tiny):
    state = torch.get_rng_state()
    outline, built = covidgan.outline(Covidgan, tiny()), covidgan.build(Covidgan, tiny())
    assert torch.equal(state, torch.get_rng_state())
    assert {name: x.shape for name, x in outline.state_dict().items()} == {
        name: x.shape for name, x in built.state_dict().items()
    }
    assert all(x.is_meta for x in outline.state_dict().values())


@pytest.mark.parametrize("config", [{"width": 10**6}, {"n_labels": 10**12}, {"level": math.nan}, {"width": "8"}, None])
def test_a_unets_checkpoint_that_asks_for_more_than_it_holds_is_one_line(tmp_path, config):
    right = {"n_labels": 4, "width": 4, "level": -600.0, "window": 1500.0}
    held = {"kind": "unet", "config": config and right | config, "unet": {}}
    with pytest.raises(covidgan.Mistake, match="is not whole"):
        export.export_unet(held, "0" * 64, tmp_path / "unet.onnx")


def test_a_checkpoint_does_not_make_data_elsewhere(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("made"))
    for data in ("data/phantom/../../elsewhere", "data/phantom/x", "data/phantoms/../x", f"{tmp_path}/data/phantom"):
        covidgan.make_phantom(tiny(data=data))


# ------------------------------------------------------------------------------------------------ ONNX


@pytest.fixture
def model():
    return onnx.load_from_string(readers.model_seeds()[0])


def open_model(path):
    return infer_onnx.open_session(path, "cpu", 1)


def saved(model, tmp_path):
    (tmp_path / "generator.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "generator.onnx"


def point_to(tensor, location):
    """Let a tensor's numbers lie in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


@pytest.mark.parametrize("place", ["initializer", "constant"])
@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "here.bin", "C:\\here.bin"])
def test_tensors_in_other_files_are_refused_before_they_are_read(tmp_path, model, monkeypatch, place, location):
    (tmp_path / "here.bin").write_bytes(bytes(36))
    tensor = model.graph.initializer[0]
    if place == "constant":
        node = model.graph.node.add(op_type="Constant", output=["weights"])
        node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
        del model.graph.initializer[0]
        tensor = node.attribute[0].t
    point_to(tensor, location)
    monkeypatch.setattr(infer_onnx, "start", lambda *_: pytest.fail("read"))
    refused(open_model, saved(model, tmp_path), "no ONNX file that has its tensors within")


def test_operators_that_no_runtime_has_are_refused_in_one_line(tmp_path, model):
    node = model.graph.node[0]
    node.domain, node.op_type = "of.someone", "Run"
    model.opset_import.append(helper.make_opsetid("of.someone", 1))
    refused(open_model, saved(model, tmp_path), "not a usable ONNX file")


def test_a_file_of_the_runtimes_own_format_is_refused(tmp_path):
    (tmp_path / "generator.onnx").write_bytes(b"\x20\0\0\0ORTM" + bytes(100))
    refused(open_model, tmp_path / "generator.onnx", "no ONNX file")


ODD_METADATA = {
    "multiple": ["0", "-16", "1e9", "16.5", "true", '"16"', "[" * 900],
    "size": ['"a"', "null", "4097"],
    "labels": ["5", "[]", '["a", 1, "b", "c"]'],
    "colours": ["[[0, 0, 0]]", "[" * 900],
    "width": ["NaN", "Infinity", "0", "-1", "9" * 400],
    "level": ["NaN", "1e400", "9" * 400],
    "kind": ["a\nb", "\x1b[2J"],
    "licence": ["a" * 2000],
    "contract": ["2"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, odd in ODD_METADATA.items() for value in odd])
def test_metadata_that_is_not_what_it_must_be_is_refused(tmp_path, model, key, value):
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    refused(open_model, saved(model, tmp_path), key if key != "kind" else "")


def test_names_that_are_no_text_are_one_line(tmp_path, model):
    content = saved(model, tmp_path).read_bytes().replace(b"float32", b"fl\xff\xfe\xfd\xfc2")
    (tmp_path / "generator.onnx").write_bytes(content)
    refused(open_model, tmp_path / "generator.onnx")


@pytest.mark.parametrize("shape", [(1, 60_000, 60_000), (1, 0, 64), (10**6, 64, 64)])
def test_a_model_of_giant_fixed_shape_is_refused(tmp_path, model, shape):
    for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = side
    refused(open_model, saved(model, tmp_path))


@pytest.mark.parametrize("kind", ["sequence", "words"])
def test_outputs_that_are_no_numbers_are_one_line(tmp_path, kind):
    """Of a feature network, of which ONNX Runtime asks no more than names."""
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 1, "H", "W"])
    if kind == "sequence":
        node = helper.make_node("SequenceConstruct", ["image"], ["24"])
        output = helper.make_tensor_sequence_value_info("24", onnx.TensorProto.FLOAT, None)
    else:
        node = helper.make_node("Cast", ["image"], ["24"], to=onnx.TensorProto.STRING)
        output = helper.make_tensor_value_info("24", onnx.TensorProto.STRING, None)
    graph = helper.make_graph([node], "odd", [image], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "odd.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "odd.onnx", providers=["CPUExecutionProvider"])
    pixels = np.zeros((1, 1, 4, 4), np.float32)
    refused(lambda path: evaluation.run(path, session, ["24"], image=pixels), tmp_path / "odd.onnx", "not all arrays")


def test_a_unet_of_no_multiple_is_refused(tmp_path, model):
    for entry in model.metadata_props:
        entry.value = {"kind": "unet", "multiple": "0"}.get(entry.key, entry.value)
    refused(lambda path: evaluation.Segmentation(path, "cpu"), saved(model, tmp_path), "multiple is '0'")


# ------------------------------------------------------------------------------------------------ options

FLOATS = [field.name for field in dataclasses.fields(covidgan.Config) if field.type is float]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("name", FLOATS)
def test_an_option_that_is_no_finite_number_is_named(tiny, name, value):
    with pytest.raises(covidgan.Mistake, match=f"--{name.replace('_', '-')} "):
        covidgan.check_config(tiny(**{name: value}), Covidgan)


@pytest.mark.parametrize("option", ["ngf", "n-blocks", "n-local-blocks", "size", "epoch-len", "seed", "n-labels"])
def test_a_number_that_no_machine_has_memory_for_is_one_line(option):
    with pytest.raises(covidgan.Mistake, match=f"--{option}"):
        covidgan.parse_config(["--preset", "tiny", f"--{option}", str(2**80)])


SPOILT_CHECKPOINT = {
    "optimizers": [3, {"state": [], "param_groups": []}, "adam", None],  # each player's
    "average": [None, 7, [1]],
    "steps": [math.inf, 1e308, "20"],
    "step": [3.5, None],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, odd in SPOILT_CHECKPOINT.items() for value in odd])
def test_a_checkpoint_whose_parts_are_of_another_kind_is_refused_by_resume(tmp_path, key, value):
    seeds = readers.READERS["checkpoint_resumed"].seeds()
    checkpoints = [torch.load(io.BytesIO(content), weights_only=True) for content in seeds]
    checkpoint = next(one for one in checkpoints if one["average"] and one["optimizers"])
    spoilt = dict.fromkeys(checkpoint["optimizers"], value) if key == "optimizers" else value
    torch.save(checkpoint | {key: spoilt}, tmp_path / "ckpt.pt")
    refused(readers.resumed, tmp_path / "ckpt.pt", "do not fit")
