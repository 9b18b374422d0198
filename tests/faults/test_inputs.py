"""Files that are cut off: each ends in a status that is not 0 and in its name, with nothing half-written."""

import os
import shutil

import pytest
from conftest import draw_chest
from whole import MODEL, check_whole, files_of, leftovers, put_volume, put_volumes

from data.slices import write_image

pytestmark = pytest.mark.long
TRAIN = "covidgan.py --stage all --preset tiny --device cpu --epoch-len 8 --data set --out out"
INFER = "infer_onnx.py set/maps --model model.onnx --provider cpu --out out"
EVAL = "eval.py set fake --provider cpu --out out --json out/results.json"
VOLUME = "infer_onnx.py labels.nii.gz --model model.onnx --provider cpu --out out"

# the file that is cut off, and the command that reads it, in a folder that holds all of them; all write to out
TABLE = [
    ("set/maps/P02_S003.png", TRAIN),
    ("set/images/P02_S003.png", TRAIN),
    ("set/split.json", TRAIN),
    ("run/ckpt.pt", "covidgan.py --resume --out run"),
    ("run/ckpt.pt", "export.py run -o g.onnx"),
    ("set/maps/P02_S003.png", INFER),
    ("set/images/P02_S003.png", f"{INFER} --complement set/images"),
    ("set/split.json", "infer_onnx.py set --side test --model model.onnx --provider cpu --out out"),
    ("model.onnx", INFER),
    ("labels.nii.gz", VOLUME),
    ("src/rp_im/2.nii.gz", f"{VOLUME} --complement src/rp_im/2.nii.gz"),
    ("fake/images/P05_S003.png", EVAL),
    ("set/images/P05_S003.png", EVAL),
    ("set/maps/P05_S003.png", EVAL),
    ("features.onnx", f"{EVAL} --features features.onnx"),
    ("unet.onnx", f"{EVAL} --unet unet.onnx"),
    ("set/split.json", f"{EVAL} --train set"),
    ("src/rp_im/2.nii.gz", "data/prepare.py src --size 64 --out out"),
    ("src/rp_msk/2.nii.gz", "data/prepare.py src --size 64 --out out"),
]
SLOW = ("covidgan.py", "export.py")


@pytest.fixture(scope="module")
def kit(toy, whole_run, tmp_path_factory):
    """A folder of all that the scripts read, whole."""
    folder = tmp_path_factory.mktemp("kit")
    shutil.copytree(toy.folder, folder / "set")
    shutil.copytree(whole_run[0], folder / "run")
    shutil.copy(MODEL, folder / "model.onnx")
    for name in ("features.onnx", "unet.onnx"):  # all that is asked of them is to be refused when cut off
        shutil.copy(MODEL, folder / name)
    (folder / "fake" / "images").mkdir(parents=True)
    for name in toy.test:
        write_image(folder / "fake" / "images" / f"{name}.png", toy.hu[name] + 20)
    put_volumes(folder / "src")
    put_volume(folder / "labels.nii.gz", draw_chest()[1])
    return folder


def in_kit(words, kit):
    """A command's words, with paths into a folder: the scripts themselves run from the repository's root."""
    named = {path.name for path in kit.iterdir()} | {"out", "g.onnx"}
    script, *rest = words.split()
    return [script, *(kit / word if word.split("/")[0] in named else word for word in rest)]


@pytest.mark.parametrize(("file", "command"), TABLE, ids=range(len(TABLE)))
def test_a_file_that_is_cut_off_is_named_and_nothing_half_written_is_left(file, command, kit, cli, tmp_path):
    mine = tmp_path / "kit"
    shutil.copytree(kit, mine, copy_function=os.link)
    content = (mine / file).read_bytes()
    (mine / file).unlink()  # a link: the kit's own stays whole
    (mine / file).write_bytes(content[: len(content) * 2 // 3])
    done = cli(*in_kit(command, mine), script=None, timeout=600)
    assert done.status != 0
    assert file.split("/")[-1] in done.stderr, done.stderr
    assert leftovers(mine) == []
    assert not {"g.onnx", "out/results.json", "out/ckpt.pt"} & {*files_of(mine)}
    check_whole(mine / "out")


@pytest.mark.parametrize("command", sorted({command for _, command in TABLE if command.split()[0] not in SLOW}))
def test_each_command_works_where_its_files_are_whole(command, kit, cli, tmp_path):
    """Else the refusals above would say nothing. Of training and export the other tests of this folder say it."""
    mine = tmp_path / "kit"
    shutil.copytree(kit, mine, copy_function=os.link)
    done = cli(*in_kit(command, mine), script=None, timeout=600)
    assert (done.status == 0) != ("--features" in command or "--unet" in command), done.stderr  # no such network here
