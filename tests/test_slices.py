"""The readers and writers of `data/slices.py` on files as paint programs, scripts and people leave them."""

import itertools
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data import slices
from data.slices import Mistake

BLACK, RED, BLUE, GREEN, WHITE = (0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)
PAPER = (BLACK, RED, BLUE, GREEN)  # labels 0 to 3, Fig. 1 of the paper
LABELS = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 1, 1]], np.uint8)


def indexed(path, indices, palette, **options):
    """Save an indexed PNG with this palette, in this order."""
    picture = Image.fromarray(np.asarray(indices, np.uint8))
    picture.putpalette(bytes(itertools.chain(*palette)))
    picture.save(path, **options)
    return path


def painted(labels, mode="RGB"):
    return Image.fromarray(np.array(PAPER, np.uint8)[labels]).convert(mode)


# Maps: when colour decides, and when the value does


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_colour_decides_whatever_the_order_of_the_palette(tmp_path, order):
    palette = [PAPER[label] for label in order]
    path = indexed(tmp_path / "map.png", np.argsort(order)[LABELS], palette)
    np.testing.assert_array_equal(slices.read_map(path), LABELS)


def test_what_was_erased_is_background_though_its_colour_is_left_below(tmp_path):
    pixels = np.array(painted(LABELS, "RGBA"))
    pixels[0, 1, 3] = 0  # red
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    expected = LABELS.copy()
    expected[0, 1] = 0
    np.testing.assert_array_equal(slices.read_map(tmp_path / "rgba.png"), expected)
    for transparency in (4, bytes([255, 255, 255, 255, 0])):
        indices = np.where(expected == LABELS, LABELS, 4)
        path = indexed(tmp_path / "map.png", indices, [*PAPER, RED], transparency=transparency)
        np.testing.assert_array_equal(slices.read_map(path), expected)


@pytest.mark.parametrize("mode", ["1", "LA", "I;16"])
def test_a_picture_of_another_kind_is_no_map(tmp_path, mode):
    picture = Image.fromarray(LABELS.astype(np.uint16)) if mode == "I;16" else Image.fromarray(LABELS).convert(mode)
    picture.save(tmp_path / "map.png")
    indexed(tmp_path / "black.png", np.full((4, 4), 2), [WHITE, (9, 9, 9), BLACK])  # a slice without lung
    assert not slices.read_map(tmp_path / "black.png").any()
    with pytest.raises(Mistake, match=r"colour \[254, 0, 0\] at row 1, column 0"):
        slices.read_map(indexed(tmp_path / "nearly.png", [[0, 1], [2, 1]], [BLACK, RED, (254, 0, 0)]))
    with pytest.raises(Mistake, match=r"map\.png: .*mode"):
        slices.read_map(tmp_path / "map.png")


def bare_png(bits, kind, rows):
    """A PNG of rows of bytes, written by hand: bits a sample, and PNG's colour type."""
    width = 4 if bits == 2 else len(rows[0]) * 8 // bits // {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)), b"IEND": b""}
    parts = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("kind", [0, 2, 4, 6])
def test_a_map_of_16_bits_is_refused_whatever_it_holds(tmp_path, kind):
    (tmp_path / "map.png").write_bytes(bare_png(16, kind, [[0, 1] * 12] * 2))
    with pytest.raises(Mistake, match=r"map\.png: .*mode .*;16"):
        slices.read_map(tmp_path / "map.png")


def test_grey_of_two_bits_holds_labels_as_they_are(tmp_path):
    (tmp_path / "map.png").write_bytes(bare_png(2, 0, [[0b00011011], [0b11100100]]))
    assert slices.read_map(tmp_path / "map.png").tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]


@pytest.mark.parametrize("spoil", [lambda png: png[:60], lambda png: b"", lambda png: b"\xff\xd8\xff\xe0" + png])
def test_what_is_no_whole_png_is_named(tmp_path, spoil):
    slices.write_map(tmp_path / "map.png", LABELS)
    (tmp_path / "map.png").write_bytes(spoil((tmp_path / "map.png").read_bytes()))
    for path in (tmp_path / "map.png", tmp_path / "absent.png"):
        with pytest.raises(Mistake, match=str(path)):
            slices.read_map(path)


def test_a_png_larger_than_any_slice_is_refused_and_8_bits_are_no_image(tmp_path):
    Image.new("I;16", (slices.LARGEST + 1, 1)).save(tmp_path / "wide.png")
    Image.fromarray(LABELS).save(tmp_path / "grey.png")
    Image.new("I;16", (4, 4), 4096).save(tmp_path / "high.png")
    for name, told in (("wide", "4097 x 1"), ("grey", "mode L"), ("high", "4096")):
        with pytest.raises(Mistake, match=rf"{name}\.png: .*{told}"):
            slices.read_image(tmp_path / f"{name}.png")


def test_what_is_written_is_read_again(tmp_path):
    slices.write_map(tmp_path / "map.png", LABELS)
    np.testing.assert_array_equal(slices.read_map(tmp_path / "map.png"), LABELS)
    assert (tmp_path / "map.png").read_bytes()[24:26] == bytes([8, 3])  # 8-bit palette
    slices.write_image(tmp_path / "image.png", np.array([[-2000.0, -1024.4], [0.6, 9999]]))
    assert slices.read_image(tmp_path / "image.png").tolist() == [[-1024, -1024], [1, 3071]]


# Folders


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_pngs_are_listed_in_any_case_and_dot_files_are_no_data(tmp_path):
    touch(tmp_path, "b.PNG", "a.png", "._a.png", ".DS_Store", "notes.txt", "c.Png", "u\u0308.png")
    listed = slices.list_pngs(tmp_path, "maps")
    assert list(listed) == ["a", "b", "c", "\u00fc"]  # whichever form its accent has
    assert listed["b"] == tmp_path / "b.PNG"


@pytest.mark.parametrize(
    ("files", "told"),
    [(["a.png", "a.PNG"], "a.png: a.PNG"), (["a.JPEG"], "JPEG"), (["._a.png"], "no PNG"), (None, "no such folder")],
)
def test_a_folder_that_holds_no_set_of_pngs_is_told(tmp_path, files, told):
    if files:
        touch(tmp_path / "maps", *files)
    with pytest.raises(Mistake, match=rf"maps.*{told}"):
        slices.list_pngs(tmp_path / "maps", "maps")


# split.json


def split_file(tmp_path, content, encoding="utf-8"):
    path = tmp_path / "split.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
    return path


def test_a_split_is_read_with_or_without_endings_and_byte_order_mark(tmp_path):
    split = {"train": ["P01_S001.png", "P01_S002.PNG"], "test": ["P02_S001"], "seg_test": [], "drawn": {"seed": 1}}
    expected = {"train": ["P01_S001", "P01_S002"], "test": ["P02_S001"], "seg_test": []}
    for encoding in ("utf-8", "utf-8-sig"):
        assert slices.read_split(split_file(tmp_path, split, encoding)) == expected


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '["P01_S001"]', '"train"', "3", "{}", {"train": "abc"}, {"train": {"a": 1}}, {"train": None}],
)
def test_what_is_no_split_is_named_in_one_line(tmp_path, content):
    path = split_file(tmp_path, content)
    with pytest.raises(Mistake, match=f"^{path}: no ") as error:
        slices.read_split(path)
    assert "\n" not in error.value.args[0]


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "maps/a", "..", ".", ".a", "", ".png", 3, None, ["a"]])
def test_a_name_that_is_no_slices_name_is_told(tmp_path, name):
    with pytest.raises(Mistake, match="is no name of a slice"):
        slices.read_split(split_file(tmp_path, {"train": ["P01_S001", name]}))


# Writing


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(b"old")
    (tmp_path / ".map.png.tmp").symlink_to("/dev/full")
    with pytest.raises(Mistake, match=rf"^{path}: cannot be written \(No space left on device\)"):
        slices.write_map(path, LABELS)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("map.png", b"old")]


def make_set(out, unfinished):
    slices.make_room(out, overwrite=False)
    slices.write_map(out / "maps" / "P01_S001.png", LABELS)
    if not unfinished:
        slices.write_split(out / "split.json", ["P01_S001"], [], [], {})


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_whole_set_gives_way_only_to_itself_or_on_request(tmp_path):
    make_set(tmp_path, unfinished=False)
    (tmp_path / "maps" / ".P01_S002.png.tmp").touch()  # of a run that was killed
    with pytest.raises(Mistake, match="--overwrite"):
        slices.make_room(tmp_path, overwrite=False)
    slices.make_room(tmp_path, overwrite=False, same=True)
    assert names(tmp_path) == [".unfinished", "maps/P01_S001.png"]
    slices.make_room(tmp_path, overwrite=True)
    assert names(tmp_path) == [".unfinished"]


def test_an_unfinished_set_gives_way_and_is_no_set_before(tmp_path):
    make_set(tmp_path, unfinished=True)
    for place in (tmp_path, tmp_path / "maps"):
        with pytest.raises(Mistake, match=str(tmp_path)):
            slices.check_finished(place)
    slices.make_room(tmp_path, overwrite=False)
    assert names(tmp_path) == [".unfinished"]
    make_set(tmp_path, unfinished=False)
    slices.check_finished(tmp_path)


@pytest.mark.parametrize("own", ["notes.txt", "maps/mine.png", "images/sub/P01_S001.png", "P01_S001.png"])
def test_a_users_own_file_is_never_removed(tmp_path, own):
    (tmp_path / own).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / own).write_text("mine")
    with pytest.raises(Mistake, match="--overwrite"):
        slices.make_room(tmp_path, overwrite=False)
    slices.make_room(tmp_path, overwrite=True)
    assert (tmp_path / own).read_text() == "mine"


def test_a_folder_has_one_writer_and_the_lock_goes_with_it(tmp_path):
    with slices.held(tmp_path / "out"):
        with pytest.raises(Mistake, match="out"), slices.held(tmp_path / "out"):
            pass
        with slices.held(tmp_path / "out", ".other.lock"):
            pass
    assert names(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(Mistake, match="file"), slices.held(tmp_path / "file"):
        pass
