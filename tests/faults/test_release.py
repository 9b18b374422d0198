"""What is made to be shared tells nothing of the machine, the user or the patient's files that it was made from."""

import dataclasses
import getpass
import gzip
import json
import os
import re
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pytest
import readers
import torch
from conftest import ROOT
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_infer import build_generator, draw_map, draw_slice

import covidgan
import export
import infer_onnx
from data import slices, volumes

SECRET = "MUELLER^HANS"
SHIPPED = ROOT / "models" / "covid-ct-256.onnx"


def machine():
    """Words by which this machine and its user are known; none so short that chance would write it."""
    words = {socket.gethostname(), getpass.getuser(), str(Path.home()), str(ROOT), os.getcwd()}
    return {word for word in words if len(word) > 4} | {"site-packages", "/tmp/", "export.py", "Traceback"}


def tells_nothing(content, *more):
    """Whatever the case, none of the machine's words is in it."""
    for word in (*machine(), *more):
        assert word.lower().encode() not in content.lower(), word


def texts(value):
    """All strings in a tree, keys too."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return set().union(*map(texts, value), *map(texts, value.values()))
    return set().union(*map(texts, value)) if isinstance(value, list | tuple | set) else set()


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """The file of a generator whose run had telling folders."""
    folder = tmp_path_factory.mktemp(f"of {SECRET}")
    small = dict(ngf=4, ndf=4, n_blocks=1, n_local_blocks=1, data=f"/home/{SECRET}/data", out=str(folder))
    c = covidgan.Config(**covidgan.PRESETS["tiny"] | small)
    method = covidgan.build(covidgan.Covidgan, c)
    state = {"config": dataclasses.asdict(c), "networks": method.state_dict()}
    torch.save(state, folder / "ckpt.pt")
    export.export_checkpoint(folder / "ckpt.pt", folder / "generator.onnx", False, "any", False, export.TERMS)
    return folder / "generator.onnx"


@pytest.mark.parametrize("which", ["exported", "shipped"])
def test_a_models_file_tells_nothing_of_where_it_was_made(generator, which):
    tells_nothing((generator if which == "exported" else SHIPPED).read_bytes(), SECRET, "mueller")


@pytest.mark.parametrize("which", ["exported", "shipped"])
def test_a_models_metadata_are_the_contracts_and_no_part_of_it_has_notes_of_its_own(generator, which):
    model = onnx.load(generator if which == "exported" else SHIPPED)
    head = re.search(r"metadata, strings: (kind, contract, method[^;]*);", export.__doc__)[1]
    assert {entry.key for entry in model.metadata_props} == {*re.split(r",\s+", head)}
    graph = model.graph
    parts = [*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]
    assert not any(part.doc_string for part in (model, graph, *parts))
    assert not any(part.metadata_props for part in parts)
    assert which == "shipped" or not graph.metadata_props  # the shipped one's name its weights
    assert not model.functions and not model.training_info


# ------------------------------------------------------------------------------------------------ runs


def test_a_checkpoint_names_no_folder_and_has_no_other_word_of_the_machine(whole_run):
    path = whole_run[0] / "ckpt.pt"
    assert not any(os.sep in text for text in texts(torch.load(path, weights_only=True)))
    tells_nothing(path.read_bytes())


def test_of_the_other_files_of_a_run_data_txt_alone_names_a_folder(whole_run, toy):
    assert (whole_run[0] / "data.txt").read_text() == f"{toy.folder}\n"
    files = [path for path in whole_run[0].iterdir() if path.name != "data.txt"]
    assert {".pt", ".jsonl", ".json", ".png"} <= {path.suffix for path in files}
    for path in files:
        tells_nothing(path.read_bytes())


# ------------------------------------------------------------------------------------------------ pictures


def noted(path, pixels):
    """Write a PNG that carries a patient's name and a profile."""
    notes = PngInfo()
    for kind in ("Comment", "Author", "XML:com.adobe.xmp"):
        notes.add_itxt(kind, SECRET)
    notes.add_text("Title", SECRET)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, pnginfo=notes, exif=b"Exif\0\0" + SECRET.encode(), icc_profile=SECRET.encode())


@pytest.fixture
def noted_set(tmp_path):
    """A map and its slice, both with notes."""
    noted(tmp_path / "maps" / "P01_S001.png", draw_map())
    noted(tmp_path / "images" / "P01_S001.png", (draw_slice() + 1024).astype(np.uint16))
    assert SECRET.encode() in (tmp_path / "images" / "P01_S001.png").read_bytes()
    return tmp_path


@pytest.mark.parametrize("form", ["png16", "png8", "nifti", "npy"])
def test_slices_maps_and_panels_carry_nothing_of_their_sources_but_pixels(noted_set, form):
    model = build_generator(noted_set / "generator.onnx")
    out = noted_set / "out"
    places = ["--complement", str(noted_set / "images"), "--model", str(model), "--out", str(out), "--provider", "cpu"]
    assert infer_onnx.main([str(noted_set / "maps"), *places, "--format", form, "--panel", "--variants", "2"]) == 0
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) == 1 + 3 * 2  # run.json
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert {kind for kind, _ in readers.chunks(content)} <= {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
        if path.suffix == ".gz":
            assert content[3:8] == bytes(5)  # neither a file's name nor the time
            content = gzip.decompress(content)
        tells_nothing(content, SECRET)


def test_a_set_that_is_written_again_carries_pixels_alone(noted_set):
    hu, labels = (
        slices.read_image(noted_set / "images" / "P01_S001.png"),
        slices.read_map(noted_set / "maps" / "P01_S001.png"),
    )
    slices.write_image(noted_set / "image.png", hu)
    slices.write_map(noted_set / "map.png", labels)
    slices.write_contact_sheet(noted_set / "sheet.png", [(hu, labels)])
    for name in ("image.png", "map.png", "sheet.png"):
        kinds = [kind for kind, _ in readers.chunks((noted_set / name).read_bytes())]
        assert {*kinds} <= {b"IHDR", b"PLTE", b"IDAT", b"IEND"}, name


# ------------------------------------------------------------------------------------------------ volumes


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_no_free_text_and_no_extension_of_a_volume_is_written_on(tmp_path, kind, ending):
    image = kind(np.zeros((3, 4, 5), np.int16), np.diag([1.0, 2, 3, 1]))
    free = [name for name in image.header.keys() if image.header[name].dtype.kind == "S" and name != "magic"]  # noqa: SIM118
    assert {"descrip", "aux_file", "intent_name"} <= {*free}
    for name in free:
        image.header[name] = SECRET.encode()[: image.header[name].dtype.itemsize]
    for code in (4, 6):  # AFNI's, and a comment
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, SECRET.encode()))
    nib.save(image, tmp_path / "ct.nii")
    assert (tmp_path / "ct.nii").read_bytes().count(SECRET[:8].encode()) >= 4
    read = volumes.read_volume(tmp_path / "ct.nii", note=str)
    volumes.write_volume(tmp_path / f"new{ending}", read, read.voxels)
    content = (tmp_path / f"new{ending}").read_bytes()
    if ending == ".nii.gz":
        assert content[3:8] == bytes(5)
        content = gzip.decompress(content)
    tells_nothing(content, SECRET, SECRET[:8])
    assert len(content) == 352 + 2 * 60  # header and voxels, nothing between or behind


# ------------------------------------------------------------------------------------------------ the repository


def test_the_record_of_a_folder_of_slices_holds_no_path(noted_set):
    model = build_generator(noted_set / "generator.onnx")
    out = noted_set / "out"
    infer_onnx.main([str(noted_set / "maps"), "--model", str(model), "--out", str(out), "--provider", "cpu"])
    assert {*json.loads((out / "run.json").read_text())} == {
        "checkpoint_sha256", "precision", "format", "completed", "seed", "sources"
    }  # fmt: skip
