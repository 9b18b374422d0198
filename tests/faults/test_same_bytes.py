"""The same seed on the same machine gives the same bytes; of training and phantom test_kill.py says it."""

import pytest
from conftest import ROOT
from whole import MODEL, check_same, files_of, put_maps, put_volumes

pytestmark = pytest.mark.long
INFER = ["--model", MODEL, "--threads", 1, "--provider", "cpu"]


@pytest.fixture
def twice(cli, tmp_path):
    """Run commands(out, turn) twice into a folder of one name, compare, and return the folder."""

    def run(commands):
        for turn in (0, 1):
            out = tmp_path / f"turn{turn}" / "out"
            out.mkdir(parents=True)
            for command in commands(out, turn):
                done = cli(*command, script=None, env={"PYTHONHASHSEED": str(2 * turn + 1)}, timeout=600)
                assert done.status == 0, done.stderr
        assert files_of(out)
        check_same(tmp_path / "turn0" / "out", out)
        return out

    return run


def test_a_prepared_set(twice, tmp_path):
    sources = put_volumes(tmp_path / "src")
    twice(lambda out, _: [["data/prepare.py", sources, "--size", 64, "--out", out]])


def test_an_exported_generator_that_names_no_folder(twice, whole_run):
    out = twice(lambda out, _: [["export.py", whole_run[0] / "ckpt.pt", "-o", out / "g.onnx"]])
    assert str(out.parents[1]).encode() not in (out / "g.onnx").read_bytes()
    assert str(ROOT).encode() not in (out / "g.onnx").read_bytes()


def test_held_out_slices_and_what_is_measured_of_them(twice, toy):
    infer = [toy.folder, "--side", "test", "--complement", toy.folder / "images", "--panel", *INFER]
    judge = ["--train", toy.folder, "--provider", "cpu"]
    out = twice(
        lambda out, _: [
            ["infer_onnx.py", *infer, "--out", out],
            ["eval.py", toy.folder, out, *judge, "--out", out / "eval", "--json", out / "results.json"],
        ]
    )
    assert len([*out.glob("images/*.png")]) == len(toy.test) and len([*out.glob("eval/*.png")]) == 2


@pytest.mark.parametrize("form", ["png16", "png8"])
def test_variants_of_a_seed(form, twice, tmp_path):
    maps = put_maps(tmp_path / "maps")
    options = ["--variants", 3, "--seed", 5, "--format", form, *INFER]
    twice(lambda out, _: [["infer_onnx.py", maps, *options, "--out", out]])


def test_shards_beside_each_other_make_what_one_run_makes(cli, tmp_path):
    command = ["infer_onnx.py", put_maps(tmp_path / "maps"), "--variants", 3, *INFER]
    shards = [cli.start(*command, "--shard", f"{n}/2", "--out", tmp_path / "out", script=None) for n in (1, 2)]
    for process in shards:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert cli(*command, "--out", tmp_path / "whole", script=None).status == 0
    check_same(tmp_path / "out", tmp_path / "whole")
