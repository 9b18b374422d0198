"""What is made to be shared tells nothing of the machine, the user or the folders that it was made from."""

import getpass
import os
import socket
from pathlib import Path

import pytest
import torch
from conftest import ROOT, draw_map
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from whole import MODEL, files_of

pytestmark = pytest.mark.long
SECRET = "MUELLER^HANS"


def tells_nothing(content):
    """None of the words by which this machine and its user are known is in it; none is so short that chance has it."""
    words = {socket.gethostname(), getpass.getuser(), str(Path.home()), str(ROOT), os.getcwd(), "site-packages", SECRET}
    for word in words:
        assert len(word) < 5 or word.lower().encode() not in content.lower(), word


def test_the_shipped_models_file_names_no_folder():
    tells_nothing(MODEL.read_bytes())
    assert b"/tmp/" not in MODEL.read_bytes()


def test_of_a_runs_files_only_what_tells_where_its_data_are_names_a_folder(whole_run, toy):
    for name, path in files_of(whole_run[0]).items():
        if name not in ("data.txt", "split.json"):
            tells_nothing(path.read_bytes())
            assert str(toy.folder).encode() not in path.read_bytes(), name
    config = torch.load(whole_run[0] / "ckpt.pt", weights_only=True)["config"]
    assert not any(os.sep in value for value in config.values() if isinstance(value, str))


def test_slices_and_maps_carry_nothing_of_their_sources_but_pixels(cli, tmp_path):
    notes, maps = PngInfo(), tmp_path / "maps"
    notes.add_text("Title", SECRET)
    maps.mkdir()
    Image.fromarray(draw_map()).save(maps / "P01_S001.png", pnginfo=notes, exif=b"Exif\0\0" + SECRET.encode())
    done = cli("infer_onnx.py", maps, "--model", MODEL, "--panel", "--out", tmp_path / "out", script=None)
    assert done.status == 0, done.stderr
    written = [*(tmp_path / "out").rglob("*.png")]
    assert len(written) == 3
    for path in written:
        tells_nothing(path.read_bytes())
        with Image.open(path) as picture:
            picture.load()
            assert {*picture.info} <= {"transparency"}, path
