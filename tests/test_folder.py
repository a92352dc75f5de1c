"""Training on your own pictures: where captions come from, what is skipped, and what is refused."""

import json
import math
import os
import random
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
import train
from data import emoji, folder
from data.folder import find_captions, frequent_words, load_folder, load_picture, split_by_content
from data.tasks import Folder
from tests.conftest import TINY, call, complaint, metrics_of
from transfusion import encode

def write_pictures(folder, n=30, caption=None):
    """0.png, 1.png, ... of different colours, and 0.txt, 1.txt, ... if there is a caption."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for i in range(n):
        picture = Image.new("RGB", (40, 40), (8 * i % 256, 95 * i % 256, 200))
        picture.save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(f"{caption} {i}\n")
    return folder

def load(folder):
    """{caption: picture} of both splits."""
    return dict(sum(load_folder(folder, 32), []))

# ---- Captions ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, head, row", [
    ("metadata.jsonl", "", '{"file_name": "#.png", "text": "one,\u2028two\\n #"}\n'),
    ("metadata.csv", "file_name,text\n", '#.png,"one,\u2028two\n #"\n'),
])
def test_captions_come_from_metadata(name, head, row):
    folder = write_pictures("mine")
    (folder / "7.png").rename("moved.png")
    (folder / "7.png").symlink_to(Path("moved.png").resolve())
    rows = [row.replace("#", str(i)) for i in range(30)]
    (folder / name).write_text(head + "".join(rows), "utf-8-sig")
    pictures = load(folder)
    assert pictures.keys() == {f"one, two {i}" for i in range(30)}
    assert (pictures["one, two 7"] == (56, 153, 200)).all()

@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "test"])
def test_a_folder_can_have_its_own_split(name):
    for part, n in (("train", 25), (name, 5)):
        write_pictures(part, n, caption=part)
    write_pictures("other")
    assert [len(pairs) for pairs in load_folder(".", 32)] == [25, 5]

def test_large_pictures_are_encoded_a_few_at_a_time():
    """512 of 32 x 32 pixels, as few of 256 x 256 as have as many pixels, and larger ones alone."""
    at_a_time = []

    class FakeVAE:
        def encode(self, pictures):
            at_a_time.append(len(pictures))
            return pictures

    for size, n in ((32, 600), (256, 10), (2048, 2)):
        picture = np.zeros((size, size, 3), np.uint8)
        assert len(encode([[picture]] * n, None, FakeVAE())) == n
    assert at_a_time == [512, 88, 8, 2, 1, 1]

def test_each_picture_decides_by_itself_whether_it_is_held_out():
    """A tenth is; copies stay together; and none changes sides when others go."""
    pictures = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 3), np.uint8)
    pairs = list(enumerate(pictures)) * 3
    train_pairs, held_out = split_by_content(pairs)
    assert len(train_pairs) + len(held_out) == 3000
    copies = Counter(i for i, _ in held_out)
    assert set(copies.values()) == {3}
    assert 70 < len(copies) < 130
    random.Random(0).shuffle(pairs)
    fewer = {i for i, _ in pairs[:300]}
    assert {i for i, _ in split_by_content(pairs[:300])[1]} == fewer & copies.keys()

def test_captions_are_found_wherever_they_are():
    """In train/ alone; in linked folders; not in hidden folders, nor in the output of a run."""
    write_pictures("elsewhere/bee")
    folder = write_pictures("mine/train")
    rows = [{"file_name": f"{i}.png", "text": f"ant {i}"} for i in range(30)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load("mine")) == 30

    (folder / "metadata.jsonl").unlink()
    Path("mine/linked").symlink_to("../elsewhere")
    Path("elsewhere/circle").symlink_to("../mine")
    write_pictures("mine/.thumbnails")
    output = write_pictures("mine/runs/shapes")
    (output / "run.json").touch()
    captions = Counter(caption for _, caption in find_captions(Path("mine")))
    assert captions == {"train": 30, "bee": 30}

def test_what_is_not_used_is_said(capsys):
    folder = write_pictures("mine", caption="square")
    (folder / "0.png").write_bytes((folder / "9.png").read_bytes()[:80])
    (folder / "1.txt").write_text(" \n")
    (folder / "2.txt").write_bytes("square".encode("utf-16-le"))
    (folder / "3.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "4.txt").unlink()
    (folder / "5.txt").write_text("\n a frog\nfr.utf8=une grenouille\n")
    (folder / "6.txt").write_text("x" + "é" * 600)
    (folder / "lost.txt").write_text("a lost caption")
    (folder / "photo.heic").touch()
    used = {"a frog", "x" + "é" * 499, *(f"square {i}" for i in range(7, 30))}
    assert load(folder).keys() == used
    out = capsys.readouterr().out
    for words in ("29 pictures from .txt", "1 pictures without", "1 .txt files without",
                  "Skipped 4 of 29", "0.png", "1.png", "2.png", "3.txt",
                  "1 captions: only the first line", "1 captions: cut after 1000 bytes",
                  "for example: square"):
        assert words in out
    if ".heic" not in Image.registered_extensions():
        assert "1 pictures of a format" in out

def test_frequent_words_are_surrounded_by_spaces_and_punctuation():
    captions = ["U.S. at 3.5, un café"] * 3
    captions += ["кот"] * 3
    captions += ["rare"] * 2
    words = {"U", ".", "at", "3", ",", "un", "café", "кот"}
    assert set(frequent_words(captions)) == words

# ---- Pictures ------------------------------------------------------------------------------------

def test_pictures_of_print_are_read():
    Image.new("RGB", (40, 40), "red").convert("CMYK").save("red.jpg")
    difference = load_picture("red.jpg", 32) - np.array([255, 0, 0])
    assert np.abs(difference).max() < 5

def test_large_photos_are_not_decoded_whole(monkeypatch):
    Image.new("RGB", (1600, 1200), "red").save("photo.jpg")
    decoded = []
    monkeypatch.setattr(folder, "to_8_bits", lambda image: decoded.append(image.size) or image)
    load_picture("photo.jpg", 32)
    assert max(decoded[0]) <= 400

@pytest.mark.parametrize("mode, value, name", [
    ("I;16", 128 * 256, "grey.png"),
    ("I;16", 128 * 256, "grey.pgm"),
    ("I;16", 128 * 256, "grey.tiff"),
    ("I", 128 * 256, "grey.tiff"),
    ("I", 128, "grey.tiff"),
    ("F", 0.5, "grey.tiff"),
    ("F", 128.0, "grey.tiff"),
])
def test_pictures_of_more_than_8_bits_are_scaled(mode, value, name):
    Image.new(mode, (40, 40), value).save(name)
    assert (load_picture(name, 32) == 128).all()

def test_values_of_an_unknown_range_are_refused():
    Image.new("I", (40, 40), 10**6).save("grey.tiff")
    with pytest.raises(ValueError, match="grey.tiff .*1000000"):
        load_picture("grey.tiff", 32)

def test_damaged_exif_data_do_not_matter():
    orientation = struct.pack("<HHII", 0x0112, 3, 1, 6)
    resolution = struct.pack("<HHII", 0x011A, 12, 1, 38)  # at byte 38: not a number
    ifd = struct.pack("<2sHIH", b"II", 42, 8, 2) + orientation + resolution
    exif = b"Exif\0\0" + ifd + struct.pack("<Id", 0, math.nan)
    Image.new("RGB", (40, 40), "red").save("photo.jpg", exif=exif)
    assert load_picture("photo.jpg", 32)[..., 0].min() > 250

def test_a_picture_far_from_square_is_whole():
    wrench = Image.new("RGB", (120, 30), "yellow")
    wrench.paste("blue", (5, 10, 115, 20))
    wrench.save("wrench.png")
    picture = load_picture("wrench.png", 32)
    assert (picture[:8] == (255, 255, 0)).all()
    assert (picture[16, 3:-3] == (0, 0, 255)).all()

def test_the_middle_square_is_taken_upright_and_on_white():
    photo = Image.new("RGBA", (80, 64), "red")
    photo.paste("blue", (8, 0, 40, 64))
    photo.paste((0, 0, 0, 0), (40, 0, 72, 64))  # the right half of the middle is transparent
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    photo.save("photo.png", exif=exif)
    picture = load_picture("photo.png", 32)
    assert (picture[:16] == (0, 0, 255)).all()
    assert (picture[16:] == 255).all()

@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such names")
def test_names_that_are_not_unicode_are_skipped():
    write_pictures("bee")
    write_pictures(os.fsdecode(b"\xff"), 1)
    assert load(".").keys() == {"bee"}

# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, message", [
    ("metadata.jsonl", '{"file_name": "0.png", "text": "a"', "Line 1 of .*metadata.jsonl"),
    ("metadata.jsonl", '{"file_name": "../0.png", "text": "a"}', "metadata.jsonl .*outside"),
    ("metadata.jsonl", '{"file_name": "0.png", "text": 3}', "metadata.jsonl .*file_name"),
    ("metadata.csv", "file_name,text\n0.png,a cap, red", "metadata.csv .*quotation marks"),
    ("metadata.csv", "file_name,text\n0.png,caf\udce9", "metadata.csv .*UTF-8"),
    ("metadata.csv", 'file_name,text\n0.png,"a cap\n1.png,a hat\n', "metadata.csv .*CSV"),
    ("metadata.jsonl", "[" * 100_000, "Line 1 of .*metadata.jsonl"),
    ("metadata.jsonl", '{"file_name": "/0.png", "text": "a"}', "metadata.jsonl .*outside"),
    ("captions/0.txt", "a cap", "0.txt is not used"),
    ("0.png.txt", "a cap", "0.png.txt is not used"),
    ("0.caption", "a cap", "0.caption is not used"),
    ("metadata.parquet", "", "metadata.parquet is not used"),
])
def test_bad_metadata_is_refused(name, content, message):
    write_pictures("cat")
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=message):
        load_folder(".", 32)

@pytest.mark.parametrize("name, word", [
    ("missing", "no folder"),
    ("few", "19 readable"),
    ("split", "its own"),
    ("uncaptioned", "cat.txt"),
])
def test_folders_that_cannot_be_used_are_refused(name, word):
    write_pictures("few", 19, caption="few")
    write_pictures("uncaptioned")
    for part in ("train", "validation"):
        write_pictures(f"split/{part}", 0)
    Path("split/metadata.csv").touch()
    message = complaint(train.main, "--data", name, *TINY)
    assert name in message
    assert word in message
    assert not os.path.exists("runs")

# ---- Training ------------------------------------------------------------------------------------

def test_a_folder_is_trained_on_scored_and_sampled_from():
    folder = write_pictures("mine", 50, caption="square")
    call(train.main, "--data", "mine", *TINY, "--image-size", 64)
    scores = metrics_of("runs/mine")["scores"]
    assert {"caption_ppl", "draw_match", "held_out_loss", "would_draw"} <= set(scores)
    out = call(sample.main, "<mine/3.png> square", "--run", "runs/mine", "--steps", 2)
    assert "square" in out

    folder.rename("moved")
    assert "no folder" in complaint(train.main, "--eval-only", "--run", "runs/mine")
    call(train.main, "--eval-only", "--run", "runs/mine", "--data", "moved")
    assert metrics_of("runs/mine")["scores"] == scores

def test_documents_follow_the_shares_and_mix_the_subfolders():
    """Where there are no other captions, the names of the subfolders are the captions."""
    for name in ("ant", "bee", "red_cat"):
        write_pictures(name)
    task = Folder(train.Run(data=".", caption_first=0.6, unconditional_share=0.5), 32)
    few = str(task.documents(30, seed=0))
    assert all(caption in few for caption in ("ant", "bee", "red cat"))

    task.train *= 20
    documents = task.documents(10**6, seed=0)
    n = len(documents)
    assert n == 4 * len(task.train)
    kinds = Counter((len(document), isinstance(document[0], str)) for document in documents)
    expected = {
        (2, False): 0.4 * n,
        (2, True): 0.3 * n,
        (1, False): 0.3 * n,
    }
    assert kinds == pytest.approx(expected, abs=0.03 * n)

# ---- Emoji ---------------------------------------------------------------------------------------

def test_emoji_need_a_font():
    assert "font" in complaint(emoji.main, "new", "--font", train.__file__)
    assert not os.path.exists("new")

def test_emoji_have_unique_captions():
    try:
        call(emoji.main, "emoji")
    except SystemExit:
        pytest.skip("the emoji font is not installed")
    captions = [caption for _, caption in find_captions(Path("emoji"))]
    assert len(set(captions)) == len(captions) > 1000
    assert {"grinning face", "waving hand sign, dark skin tone"} <= set(captions)
    assert "new folder" in complaint(emoji.main, "emoji")
