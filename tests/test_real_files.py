"""Files as people really have them, through covidgan.py: the right slices, or one line that helps."""

import codecs
import contextlib
import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import covidgan
import export
from covidgan import Covidgan, Mistake
from data import slices

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "make_cases.py"


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Real CT as people bring it, a folder a case."""
    if not CASES.exists():
        pytest.skip("no cases of real files here")
    out = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, CASES, out], check=True)
    return out / "slices"


def loaded(folder, tiny):
    c = tiny(size=64)
    split = covidgan.read_split(folder, 0)
    return {side: covidgan.load_slices(folder, split[side], c) for side in ("train", "test")}


@pytest.mark.parametrize("case", ["indexed_colours", "upper_case", "split_with_endings"])
def test_a_case_trains_on_the_same_slices_as_its_base(cases, tiny, case):
    names, c = sorted(names_in(cases)), tiny(size=64)
    base, other = (covidgan.load_slices(cases / name, names, c) for name in ("base", case))
    assert torch.equal(base.labels, other.labels) and torch.equal(base.hu, other.hu)
    assert base.labels.max() == 3
    split = covidgan.read_split(cases / case, 0)
    assert {*split["train"], *split["test"]} <= names_in(cases)


def names_in(cases):
    return {path.stem for path in (cases / "base" / "maps").iterdir()}


def test_jpeg_maps_are_told_by_name_of_their_folder(cases, tiny):
    with pytest.raises(Mistake, match=r"jpeg_maps/maps: JPEG, which changes grey levels and labels"):
        loaded(cases / "jpeg_maps", tiny)


def test_slices_without_lung_train_and_are_left_out_of_the_figures(cases, tiny):
    folder = cases / "no_lung_in_some"
    names = sorted(names_in(cases))
    slices.write_split(folder / "split.json", names[6:], names[:6], [], {})  # five of the six to test are empty
    trainer = covidgan.Trainer(Covidgan, tiny(data=str(folder), batch=2))
    figures = covidgan.evaluate(trainer)[1]["mean HU per label"]["complete"]
    (name,) = (name for name in names[:6] if slices.read_map(folder / "maps" / f"{name}.png").any())
    slices.write_split(folder / "split.json", names[6:], [name], [], {})
    alone = covidgan.evaluate(covidgan.Trainer(Covidgan, tiny(data=str(folder), batch=2)))[1]["mean HU per label"][
        "complete"
    ]
    assert figures == alone and figures["psnr"] < 40  # an empty slice would count as 100 dB


def test_the_table_says_how_many_slices_hold_no_lung(own_toy, small_run, here, tmp_path):
    for name in own_toy.test[:2]:
        slices.write_map(own_toy.folder / "maps" / f"{name}.png", np.zeros((64, 64), np.uint8))
    out = tmp_path / "out"
    done = here("--stage", "g1", "--data", own_toy.folder, "--out", out, *small_run)
    assert done.status == 0 and "4 test slices" in done.stdout and "2 without lung left out" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert (results["n"], results["without_lung"]) == (4, 2)


def test_a_side_without_any_lung_is_refused_before_any_work(own_toy, small_run, here, tmp_path):
    for name in own_toy.test:
        slices.write_map(own_toy.folder / "maps" / f"{name}.png", np.zeros((64, 64), np.uint8))
    done = here("--data", own_toy.folder, "--out", tmp_path / "out", *small_run)
    assert done.status == 2 and "no lung in any of 6 maps" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mean", "fine"), [(-1001, False), (-999, True), (-401, True), (-399, False)])
def test_the_mean_of_a_patients_lung_lies_between_minus_1000_and_minus_400_hu(own_toy, tiny, mean, fine):
    for name in own_toy.train[:6]:
        hu = np.where(own_toy.labels[name] == 1, mean, own_toy.hu[name])
        slices.write_image(own_toy.folder / "images" / f"{name}.png", hu)
    with contextlib.nullcontext() if fine else pytest.raises(Mistake, match=f"mean {mean} HU"):
        covidgan.load_slices(own_toy.folder, own_toy.train, tiny())


@pytest.mark.parametrize(("shift", "word"), [(1050, "mean 200 HU"), (-1024, "mean -1024 HU")])
def test_a_patient_whose_lung_has_no_lungs_hu_is_named_with_the_figure(own_toy, small_run, here, tmp_path, shift, word):
    """As a lost or a senseless intercept makes them; the other patients are right."""
    for name in own_toy.train[:6]:
        hu = np.full((64, 64), -1024.0) if shift < 0 else own_toy.hu[name] + shift
        slices.write_image(own_toy.folder / "images" / f"{name}.png", hu)
    command = ["--stage", "g1", "--data", own_toy.folder, "--out", tmp_path / "out", *small_run]
    done = here(*command)
    assert done.status == 2 and done.stderr.count("\n") == 1
    assert f"{own_toy.train[0]}.png" in done.stderr and word.split()[0] in done.stderr and "--unchecked" in done.stderr
    assert abs(float(done.stderr.split("mean ")[1].split()[0]) - float(word.split()[1])) < 10
    assert here(*command, "--unchecked").status == 0


# ---- palettes, against the reader of the torch-free scripts and against what was painted


def indexed(path, labels, order, extra=()):
    """Paint labels in the paper's colours as an indexed PNG whose palette has an order of its own."""
    palette = np.zeros((len(order) + len(extra), 3), np.uint8)
    palette[list(order)] = covidgan.COLOURS
    palette[len(order) :] = extra or np.zeros((0, 3))
    picture = Image.fromarray(np.array(order, np.uint8)[labels])
    picture.putpalette(palette.tobytes())
    picture.save(path)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
@pytest.mark.parametrize("extra", [(), [(9, 9, 9), (255, 255, 255)]])
def test_colour_decides_where_a_palette_holds_the_papers_colours(tmp_path, toy, order, extra):
    labels = toy.labels[toy.train[3]]
    indexed(tmp_path / "map.png", labels, order, extra)
    assert (covidgan.read_map(tmp_path / "map.png", 4) == labels).all()
    assert (slices.read_map(tmp_path / "map.png") == labels).all()


def test_a_palette_of_other_colours_only_dresses_labels_up(tmp_path, toy):
    labels = toy.labels[toy.train[3]]
    picture = Image.fromarray(labels)
    picture.putpalette(bytes([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]))
    picture.save(tmp_path / "map.png")
    assert (covidgan.read_map(tmp_path / "map.png", 4) == labels).all()


def test_a_used_colour_of_a_palette_that_is_none_of_the_papers_is_named(tmp_path, toy):
    labels = toy.labels[toy.train[3]].copy()
    picture = Image.fromarray(labels)
    picture.putpalette(bytes([0, 0, 0, 0, 0, 255, 255, 0, 0, 7, 8, 9]))
    picture.save(tmp_path / "map.png")
    with pytest.raises(Mistake, match=r"map.png: colour \[7, 8, 9\] at row"):
        covidgan.read_map(tmp_path / "map.png", 4)


def test_a_byte_order_mark_dot_files_and_endings_are_no_mistake(own_toy, tiny):
    split = own_toy.folder / "split.json"
    sides = {"train": [f"{name}.png" for name in own_toy.train], "test": own_toy.test}
    split.write_bytes(codecs.BOM_UTF8 + json.dumps(sides).encode())
    for part in ("images", "maps"):
        (own_toy.folder / part / f"._{own_toy.train[0]}.png").write_bytes(b"\x00\x05\x16\x07")
        (own_toy.folder / part / ".DS_Store").write_bytes(b"\x00")
    assert covidgan.read_split(own_toy.folder, 0) == {"train": own_toy.train, "test": own_toy.test}
    split.unlink()
    drawn = covidgan.read_split(own_toy.folder, 0)
    assert sorted(drawn["train"] + drawn["test"]) == sorted(own_toy.train + own_toy.test)


def test_a_png_that_claims_to_be_huge_is_one_line(tmp_path):
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0)
    (tmp_path / "i.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(Mistake, match=r"i\.png: 60000 x 60000 pixels"):
        covidgan.read_image(tmp_path / "i.png")


# ---- going on


def test_resume_without_a_checkpoint_is_refused_and_makes_nothing(here, tmp_path):
    for out in (tmp_path / "mistyped", tmp_path / "failed"):
        if out.name == "failed":
            out.mkdir()
            (out / "stats.jsonl").write_text("")
        done = here("--resume", "--out", out)
        assert done.status == 2 and done.stderr.count("\n") == 1
        assert f"{out}/ckpt.pt: not there" in done.stderr and "--resume" in done.stderr
    assert not (tmp_path / "mistyped").exists()


def test_what_a_failed_start_left_is_no_other_run(toy, small_run, here, tmp_path):
    (tmp_path / "stats.jsonl").write_text('{"stage": "g1", "step": 1}\n')
    done = here("--stage", "g1", "--data", toy.folder, "--out", tmp_path, *small_run)
    assert done.status == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 11))


def test_a_gpus_checkpoint_goes_on_on_a_cpu(whole_run, here, tmp_path):
    checkpoint = torch.load(whole_run[0] / "ckpt.pt", weights_only=True)
    checkpoint["config"] |= {"device": "cuda", "epochs": 3}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    (tmp_path / "data.txt").write_bytes((whole_run[0] / "data.txt").read_bytes())
    done = here("--resume", "--out", tmp_path)
    assert done.status == 0, done.stderr
    assert "; cpu, " in done.stdout
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 15


def test_a_run_whose_folder_was_moved_goes_on_where_it_is_now(whole_run, here, tmp_path):
    checkpoint = torch.load(whole_run[0] / "ckpt.pt", weights_only=True)
    checkpoint["config"]["epochs"] = 3
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    (tmp_path / "data.txt").write_bytes((whole_run[0] / "data.txt").read_bytes())
    before = (whole_run[0] / "ckpt.pt").read_bytes()
    assert here("--resume", "--out", tmp_path).status == 0
    assert (whole_run[0] / "ckpt.pt").read_bytes() == before
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize("content", [b"", b"abcd", b"PK\x03\x04", b"\x80\x02junk", b"\x1f\x8b\x08\x00rest"])
def test_a_file_that_is_no_checkpoint_is_one_line(here, tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    done = here("--resume", "--out", tmp_path)
    assert done.status == 2 and done.stderr.count("\n") == 1 and f"{tmp_path}/ckpt.pt: not a checkpoint" in done.stderr


# ---- machines at their limits


def limited(cli, command, kind, amount):
    """Run a script under a limit of the system's."""
    return cli(*command, preexec_fn=lambda: resource.setrlimit(kind, (amount, amount)))


def test_a_full_disk_stops_training_in_one_line_and_leaves_no_temporary(toy, small_run, cli, tmp_path):
    command = ["--stage", "g1", "--data", toy.folder, "--out", tmp_path / "out", *small_run]
    done = limited(cli, command, resource.RLIMIT_FSIZE, 100_000)  # the checkpoint is larger, all else is not
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert done.status == 2 and "Traceback" not in done.stderr
    assert last.startswith(f"error: {tmp_path}/out/ckpt.pt: cannot be written") and "make room" in last
    assert not [path for path in (tmp_path / "out").iterdir() if "tmp" in path.name]
    assert cli(*command).status == 0  # with room again


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
def test_out_of_memory_is_one_line(toy, cli, tmp_path):
    command = ["--stage", "joint", "--preset", "tiny", "--data", toy.folder, "--out", tmp_path / "out", "--size", 1024]
    command += ["--batch", 16, "--epoch-len", 16, "--dtype", "float32"]
    done = limited(cli, command, resource.RLIMIT_AS, 5 * 2**30)
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert done.status == 2 and "Traceback" not in done.stderr
    assert last.startswith("error: out of memory") and "--batch" in last


def test_an_output_that_is_not_utf8_is_no_reason_to_stop(cli):
    done = cli("-h", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.status == 0 and "--stage all" in done.stdout


# ---- export


@pytest.fixture(scope="module")
def checkpoint(whole_run):
    return whole_run[0] / "ckpt.pt"


def test_an_export_that_cannot_be_written_is_refused_before_its_work(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", lambda *_: pytest.fail("worked first"))
    with pytest.raises(Mistake, match=r"folder\.onnx: is a folder"):
        (tmp_path / "folder.onnx").mkdir()
        export.main([str(checkpoint), "-o", str(tmp_path / "folder.onnx")])

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(Mistake, match=r"g\.onnx: cannot be written \(Read-only file system\)"):
        export.main([str(checkpoint), "-o", str(tmp_path / "g.onnx")])
