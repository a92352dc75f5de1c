"""Training on your own pictures: where captions come from, what is skipped, and what is refused."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import sample
import train
from data import emoji
from data.folder import find_captions, frequent_words, load_folder, load_picture, split_by_content
from data.tasks import Folder
from tests.conftest import TINY, call, complaint, metrics_of

def write_pictures(folder, n=30, caption=None):
    """0.png, 1.png, ... of different colours, and 0.txt, 1.txt, ... if there is a caption."""
    folder.mkdir(parents=True)
    for i in range(n):
        picture = Image.new("RGB", (40, 40), (8 * i, 91 * i % 256, 200))
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
def test_captions_come_from_metadata(name, head, row, tmp_path):
    folder = write_pictures(tmp_path / "mine", caption="another")
    rows = [row.replace("#", str(i)) for i in range(30)]
    (folder / name).write_text(head + "".join(rows), "utf-8-sig")
    pictures = load(folder)
    assert pictures.keys() == {f"one, two {i}" for i in range(30)}
    assert (pictures["one, two 7"] == (56, 125, 200)).all()

def test_a_folder_can_have_its_own_split(tmp_path):
    for part, n in (("train", 25), ("validation", 5)):
        write_pictures(tmp_path / part, n, caption=part)
    assert [len(pairs) for pairs in load_folder(tmp_path, 32)] == [25, 5]

def test_copies_of_a_picture_are_in_one_split_whatever_their_order():
    pictures = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    pairs = list(enumerate(pictures)) * 3
    train_pairs, held_out = split_by_content(pairs)
    copies = Counter(i for i, _ in held_out)
    assert list(copies.values()) == [3] * 5
    assert len(train_pairs) == 285
    random.Random(0).shuffle(pairs)
    assert Counter(i for i, _ in split_by_content(pairs)[1]) == copies

def test_frequent_words_are_surrounded_by_spaces_and_punctuation():
    captions = ["U.S. at 3.5, un café"] * 3
    captions += ["кот"] * 3
    captions += ["rare"] * 2
    words = {"U", ".", "at", "3", ",", "un", "café", "кот"}
    assert set(frequent_words(captions)) == words

# ---- Pictures ------------------------------------------------------------------------------------

def test_pictures_of_print_and_of_16_bits_are_read(tmp_path):
    red = Image.new("RGB", (40, 40), "red").convert("CMYK")
    red.save(tmp_path / "red.jpg")
    difference = load_picture(tmp_path / "red.jpg", 32) - np.array([255, 0, 0])
    assert np.abs(difference).max() < 5
    grey = Image.new("I;16", (40, 40), 128 * 256)
    grey.save(tmp_path / "grey.png")
    assert (load_picture(tmp_path / "grey.png", 32) == 128).all()

def test_the_middle_square_is_taken_upright_and_on_white(tmp_path):
    photo = Image.new("RGBA", (120, 64), "red")
    photo.paste("blue", (28, 0, 60, 64))
    photo.paste((0, 0, 0, 0), (60, 0, 92, 64))  # the right half of the middle is transparent
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    photo.save(tmp_path / "photo.png", exif=exif)
    picture = load_picture(tmp_path / "photo.png", 32)
    assert (picture[:16] == (0, 0, 255)).all()
    assert (picture[16:] == 255).all()

def test_bad_pictures_and_captions_are_skipped_and_listed(tmp_path, capsys):
    folder = write_pictures(tmp_path / "mine", caption="square")
    whole = (folder / "9.png").read_bytes()
    (folder / "0.png").write_bytes(whole[:80])
    (folder / "1.txt").write_text(" \n")
    (folder / "2.txt").write_text("word " * 10_000)
    (folder / "3.txt").write_bytes(b"\xff\xfe\xff")
    (folder / "4.txt").unlink()
    assert load(folder).keys() == {f"square {i}" for i in range(5, 30)}
    out = capsys.readouterr().out
    for words in ("0.png", "1.png", "3.txt", "1 of 30", "Skipped 4 of 29"):
        assert words in out

# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, message", [
    ("metadata.jsonl", '{"file_name": "0.png", "text": "a"', "Line 1 of .*metadata.jsonl"),
    ("metadata.jsonl", '{"file_name": "../0.png", "text": "a"}', "metadata.jsonl .*outside"),
    ("metadata.jsonl", '{"file_name": "0.png", "text": 3}', "metadata.jsonl .*file_name"),
    ("metadata.csv", "file_name,text\n0.png,a cap, red", "metadata.csv .*quotation marks"),
    ("metadata.csv", "file_name,text\n0.png,caf\udce9", "metadata.csv .*UTF-8"),
])
def test_bad_metadata_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path, 32)

def test_folders_that_cannot_be_used_are_refused(tmp_path):
    write_pictures(tmp_path / "few", 19, caption="few")
    for part in ("train", "validation", "metadata.csv"):
        (tmp_path / "split" / part).mkdir(parents=True)
    run = tmp_path / "run"
    for name, word in [
        ("missing", "no folder"),
        ("few", "19 readable"),
        ("split", "its own"),
    ]:
        message = complaint(train.main, "--data", tmp_path / name, "--run", run, *TINY)
        assert name in message
        assert word in message
    assert not run.exists()

# ---- Training ------------------------------------------------------------------------------------

def test_a_folder_is_trained_on_scored_and_sampled_from(tmp_path):
    folder = write_pictures(tmp_path / "mine", caption="square")
    run = tmp_path / "run"
    call(train.main, "--data", folder, "--run", run, *TINY, "--image-size", 64)
    scores = metrics_of(run)["scores"]
    assert {"caption_ppl", "draw_match"} <= set(scores)
    assert "0.5" in scores["caption_match"][1]  # two pictures are held out
    out = call(sample.main, f"<{folder / '3.png'}> square", "--run", run, "--steps", 2)
    assert "square" in out

def test_documents_follow_the_shares_and_mix_the_subfolders(tmp_path):
    """Where there are no other captions, the names of the subfolders are the captions."""
    for name in ("ant", "bee", "red_cat"):
        write_pictures(tmp_path / name)
    run = train.Run(data=str(tmp_path), caption_first=0.6, unconditional_share=0.5)
    task = Folder(run, 32)
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

def test_emoji_need_a_font(tmp_path):
    assert "font" in complaint(emoji.main, tmp_path / "new", "--font", train.__file__)
    assert not (tmp_path / "new").exists()

def test_emoji_have_unique_captions(tmp_path):
    try:
        call(emoji.main, tmp_path / "emoji")
    except SystemExit:
        pytest.skip("the emoji font is not installed")
    captions = [caption for _, caption in find_captions(tmp_path / "emoji")]
    assert len(set(captions)) == len(captions) > 1000
    assert {"grinning face", "waving hand sign, dark skin tone"} <= set(captions)
    assert "new folder" in complaint(emoji.main, tmp_path / "emoji")
