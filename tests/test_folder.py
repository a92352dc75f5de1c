"""Training on a folder of one's own pictures: where captions are found, what is skipped, and what is refused."""

import hashlib
import json
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import emoji
from data.documents import examples
from data.files import load_picture
from data.folder import FEWEST, find_captions, frequent_words, load_folder, split_by_content
from data.scores import score_matching
from data.tasks import Folder
from tests.test_scripts import TINY, call, complaint, metrics_of
from transfusion import Tokenizer

def colour_square(i, size=40):
    return Image.new("RGB", (size, size), ((37 * i) % 256, (91 * i) % 256, (53 * i) % 256))

def write_pictures(folder, n=30):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        colour_square(i).save(folder / f"{i:02d}.png")
    return folder

@pytest.fixture
def captioned(tmp_path):
    folder = write_pictures(tmp_path / "mine")
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"square number {i}\n")
    return folder

def captions_of(pairs):
    return sorted(caption for caption, _ in pairs)

# ---- Finding captions ------------------------------------------------------------------------------------------------

def test_captions_come_from_metadata_or_text_files_or_folders(tmp_path):
    rows = [{"file_name": f"{i:02d}.png", "text": f"square, {i}"} for i in range(30)]
    expected = sorted(row["text"] for row in rows)
    jsonl = write_pictures(tmp_path / "jsonl")
    (jsonl / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    as_csv = write_pictures(tmp_path / "csv")
    lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}"' for row in rows)]
    (as_csv / "metadata.csv").write_text("\n".join(lines) + "\n")
    text = write_pictures(tmp_path / "text")
    for row in rows:
        (text / row["file_name"]).with_suffix(".txt").write_text(row["text"] + "\n")
    for folder in (jsonl, as_csv, text):
        train_pairs, held_out = load_folder(folder, 32)
        assert captions_of(train_pairs + held_out) == expected, folder
        of_caption = dict(train_pairs + held_out)
        assert np.abs(of_caption["square, 7"].astype(int) - [259 % 256, 637 % 256, 371 % 256]).max() == 0
        assert of_caption["square, 7"].shape == (32, 32, 3)
    named = tmp_path / "named"
    for name in ("red_things", "blue"):
        write_pictures(named / name, 15)
    assert set(captions_of(sum(load_folder(named, 32), []))) == {"red things", "blue"}

def test_a_folder_can_bring_its_own_split(tmp_path):
    for part, n in (("train", 25), ("validation", 5)):
        folder = write_pictures(tmp_path / part, n)
        lines = [json.dumps({"file_name": f"{i:02d}.png", "text": f"{part} {i}"}) for i in range(n)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    train_pairs, held_out = load_folder(tmp_path, 32)
    assert {caption.split()[0] for caption, _ in train_pairs} == {"train"} and len(train_pairs) == 25
    assert {caption.split()[0] for caption, _ in held_out} == {"validation"} and len(held_out) == 5

def test_csv_may_quote_commas_and_line_breaks_and_json_may_have_any_character(tmp_path):
    folder = write_pictures(tmp_path / "csv")
    rows = [f'{i:02d}.png,"first, {i}\nsecond line"' for i in range(30)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    assert captions_of(sum(load_folder(folder, 32), [])) == sorted(f"first, {i} second line" for i in range(30))
    folder = write_pictures(tmp_path / "jsonl")
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": f"a\u2028b\u0085c {i}"}, ensure_ascii=False)
            for i in range(30)]
    (folder / "metadata.jsonl").write_text("\n".join(rows), "utf-8")
    assert captions_of(sum(load_folder(folder, 32), [])) == sorted(f"a b c {i}" for i in range(30))

def test_pictures_without_a_text_are_counted(captioned, capsys):
    for i in range(4):
        (captioned / f"{i:02d}.txt").unlink()
    assert len(sum(load_folder(captioned, 32), [])) == 26
    assert "4 of 30 pictures" in capsys.readouterr().out

def test_copies_of_a_picture_are_on_the_same_side():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(100)]
    pairs = [(f"{i} {copy}", picture.copy()) for copy in range(3) for i, picture in enumerate(pictures)]
    train_pairs, held_out = split_by_content(pairs)
    numbers = [{caption.split()[0] for caption, _ in side} for side in (train_pairs, held_out)]
    assert not numbers[0] & numbers[1] and len(train_pairs) + len(held_out) == 300
    assert 0.03 <= len(held_out) / 300 <= 0.07
    first = min(held_out, key=lambda pair: hashlib.sha256(pair[1].tobytes()).hexdigest())
    train_pairs, with_copies = split_by_content(pairs[:100] + [first] * 60)
    assert len({caption for caption, _ in with_copies}) == 5  # 5 % of the pictures, however many copies there are
    again = split_by_content(random.Random(1).sample(pairs, 300))
    assert captions_of(again[1]) == captions_of(held_out)  # the order of the files does not matter

def test_captions_in_any_language_survive_and_frequent_words_are_one_token():
    captions = ["un café noir, très chaud."] * 3 + ["кот спит"] * 3 + ["une 猫 rare", "x ."]
    assert set(frequent_words(["U.S. at 3.5, e.g. here"] * 3)) == {"U", ".", "at", "3", ",", "e", "here"}
    words = frequent_words(captions)
    assert {"café", "noir", ",", ".", "кот", "спит"} <= set(words) and "rare" not in words
    tokenizer = Tokenizer(words)
    for caption in captions:
        assert tokenizer.decode(tokenizer.encode(caption)) == caption
    assert len(tokenizer.encode("кот спит")) == 2 and len(tokenizer.encode("un café noir, très chaud.")) == 7

# ---- Pictures of all kinds -------------------------------------------------------------------------------------------

def test_all_kinds_of_pictures_are_read(tmp_path):
    red = Image.new("RGB", (40, 40), (200, 20, 20))
    red.save(tmp_path / "rgb.bmp")
    red.quantize().save(tmp_path / "palette.gif")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 40), "blue")])
    for path in tmp_path.iterdir():
        assert np.abs(load_picture(path, 32).astype(int) - [200, 20, 20]).max() < 12, path
    Image.new("RGBA", (40, 40), (200, 20, 20, 0)).save(tmp_path / "clear.png")
    assert (load_picture(tmp_path / "clear.png", 32) == 255).all()
    Image.fromarray(np.full((40, 40), 128 * 256, np.uint16)).save(tmp_path / "grey16.png")
    assert (load_picture(tmp_path / "grey16.png", 32) == 128).all()

def test_photos_are_turned_as_their_exif_data_says_and_cropped(tmp_path):
    photo = Image.new("RGB", (80, 40), "white")
    photo.paste("black", (0, 0, 80, 20))  # the upper half is black
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: what was up is now right
    photo.save(tmp_path / "photo.png", exif=exif)
    picture = load_picture(tmp_path / "photo.png", 32)
    assert picture[:, 20:].max() == 0 and picture[:, :12].min() == 255

# ---- Bad input -------------------------------------------------------------------------------------------------------

def png_of_size(width, height):
    """A PNG that only claims to be this large."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

def test_bad_pictures_and_captions_are_skipped_and_listed(captioned, capsys):
    whole = (captioned / "00.png").read_bytes()
    (captioned / "00.png").write_bytes(whole[: len(whole) // 2])
    (captioned / "01.png").write_text("not a picture")
    (captioned / "02.png").write_bytes(b"")
    (captioned / "03.png").write_bytes(png_of_size(60_000, 60_000))
    (captioned / "04.txt").write_text(" \n")
    (captioned / "05.txt").write_text("word " * 10_000)
    (captioned / "06.txt").write_bytes(b"\xff\xfe\xff")
    pairs = sum(load_folder(captioned, 32), [])
    assert captions_of(pairs) == sorted(f"square number {i}" for i in range(7, 30))
    out = capsys.readouterr().out
    assert "Skipped 7 of 30" in out
    for name in ("00.png", "01.png", "02.png", "03.png", "04.png", "05.png", "06.txt"):
        assert name in out

def test_a_caption_with_half_a_surrogate_pair_is_skipped(tmp_path, capsys):
    folder = write_pictures(tmp_path / "mine")
    texts = ["broken \ud83d" if i == 3 else f"a {i}" for i in range(30)]
    rows = [json.dumps({"file_name": f"{i:02d}.png", "text": text}) for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert len(sum(load_folder(folder, 32), [])) == 29
    assert "03.png: its caption is not valid Unicode" in capsys.readouterr().out

def test_metadata_beside_a_split_or_with_unquoted_commas_is_refused(tmp_path):
    for part in ("train", "validation"):
        write_pictures(tmp_path / "split" / part)
    (tmp_path / "split" / "metadata.csv").write_text("file_name,text\ntrain/00.png,a\n")
    assert "each of them needs its own metadata.csv" in complaint(
        train.main, "--data", tmp_path / "split", "--run", tmp_path / "run")
    folder = write_pictures(tmp_path / "commas")
    (folder / "metadata.csv").write_text("file_name,text\n00.png,a cap, red\n")
    assert "quotation marks" in complaint(train.main, "--data", folder, "--run", tmp_path / "run")

@pytest.mark.parametrize("line, word", [
    ('{"file_name": "00.png", "text": "a"', "Line 2"),
    ('{"file_name": "../secret.png", "text": "a"}', "outside"),
    ('{"file_name": "/etc/hostname", "text": "a"}', "outside"),
    ('{"file": "00.png"}', "file_name"),
    ('["00.png"]', "file_name"),
    ('{"file_name": "0\\u00000.png", "text": "a"}', "outside"),
    ('{"file_name": "00.png", "text": 3}', "file_name"),
])
def test_bad_metadata_is_refused_with_one_sentence(tmp_path, line, word):
    folder = write_pictures(tmp_path / "mine")
    (folder / "metadata.jsonl").write_text('{"file_name": "01.png", "text": "b"}\n' + line)
    sentence = complaint(train.main, "--data", folder, "--run", tmp_path / "run")
    assert word in sentence and "metadata.jsonl" in sentence
    assert not (tmp_path / "run").exists()

def test_folders_that_cannot_be_used_are_refused(tmp_path, captioned):
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "no captions")
    write_pictures(tmp_path / "one" / "picture", 1)
    (tmp_path / "latin1").mkdir()
    (tmp_path / "latin1" / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\n")
    for name in ("missing", "empty", "no captions", "one", "latin1"):
        assert name in complaint(train.main, "--data", tmp_path / name, "--run", tmp_path / "run")
        assert not (tmp_path / "run").exists()
    assert f"{FEWEST}" in complaint(train.main, "--data", tmp_path / "one", "--run", tmp_path / "run")
    same = write_pictures(tmp_path / "same" / "thing", 30)
    for path in same.iterdir():
        colour_square(0).save(path)
    assert "different" in complaint(train.main, "--data", tmp_path / "same", "--run", tmp_path / "run")
    assert "--task" in complaint(train.main, "--data", captioned, "--task", "text", "--run", tmp_path / "run")

def test_a_full_disk_stops_with_one_sentence_and_keeps_the_checkpoint(tmp_path):
    options = [*TINY, "--run", tmp_path / "run"]
    call(train.main, *options, "--steps", 4, "--eval-n", 4)
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    limit = len(before) // 2  # no file can grow beyond this, as on a disk that is nearly full
    code = (f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
            f"sys.argv = ['train.py', '--resume', '--steps', '8', '--run', {str(tmp_path / 'run')!r}]; "
            f"runpy.run_path({train.__file__!r}, run_name='__main__')")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "ckpt.pt cannot be written" in result.stderr.splitlines()[-1]
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("writing-*"))

# ---- Training and scoring --------------------------------------------------------------------------------------------

def test_training_on_a_folder_writes_scores_and_pictures_and_samples(captioned, tmp_path):
    run = tmp_path / "run"
    out = call(train.main, "--data", captioned, "--run", run, *TINY, "--image-size", 64)
    metrics = metrics_of(run)
    assert {"caption_ppl", "caption_match", "draw_match", "diffusion_loss", "frechet"} <= set(metrics["scores"])
    assert "2 held-out examples" in out and metrics["scores"]["caption_match"][1] == "chance 0.5000"
    assert metrics["cfg"]["image_size"] == 64
    with Image.open(run / "progress.png") as progress:
        assert progress.height > 3 * 128
    prompt = f"<{captioned / '03.png'}> then"
    out = call(sample.main, prompt, "--run", run, "--steps", 2, "--max-tokens", 5, "--out", tmp_path / "out")
    assert out.startswith("[BOI] (picture) [EOI] then")
    again = call(train.main, "--eval-only", "--run", run, "--eval-n", 20)
    assert f"{metrics['scores']['caption_ppl'][0]:.4f}" in again

def test_a_run_is_not_resumed_on_a_folder_that_has_changed(captioned, tmp_path):
    run = tmp_path / "run"
    call(train.main, "--data", captioned, "--run", run, *TINY)
    before = (run / "ckpt.pt").read_bytes()
    for path in captioned.glob("*.txt"):
        path.write_text(path.read_text().replace("square number", "square no."))
    assert "other pictures or captions" in complaint(train.main, "--resume", "--run", run, "--steps", 20)
    assert (run / "ckpt.pt").read_bytes() == before

def test_a_run_is_not_resumed_on_pictures_that_have_changed(captioned, tmp_path):
    call(train.main, "--data", captioned, "--run", tmp_path / "run", *TINY)
    for path in captioned.glob("*.png"):
        with Image.open(path) as image:
            darker = image.point(lambda value: value // 2)
        darker.save(path)
    assert "other pictures or captions" in complaint(train.main, "--resume", "--run", tmp_path / "run", "--steps", 20)

def test_the_order_of_the_files_does_not_decide_what_is_trained_on(tmp_path, capsys):
    for n, name in enumerate(("ant", "bee", "cat")):
        for i in range(100):
            folder = tmp_path / "mine" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (60 + 80 * n, i, 2 * i)).save(folder / f"{i:02d}.png")
    task = Folder(tmp_path / "mine", 32, caption_first=1.0, unconditional_share=0.0)
    counts = Counter(caption for caption, _ in task.documents(90, seed=0))
    assert min(counts.values()) > 10 and len(counts) == 3
    assert f"Only 90 of {len(task.train)} pictures are used" in capsys.readouterr().out
    pictures = np.stack([picture for _, picture in task.train])
    red = pictures[..., 0].mean((1, 2))  # 60, 140 or 220, by folder
    assert abs(red[: len(red) // 3].mean() - red.mean()) < 25  # the VAE's statistics are of the first pictures

def test_validation_scores_only_as_many_pictures_as_asked(captioned):
    task = Folder(captioned, 32, caption_first=0.5, unconditional_share=0.1)
    task.held_out = task.train[:12]

    class Model(Matcher):
        def log_likelihood(self, texts, draws):
            assert len(texts) == 5
            return np.zeros(5) - 1, np.ones(5)

        def reconstruct(self, pictures):
            return pictures

        def draw(self, prompts, guidance_scale):
            return np.stack([picture for _, picture in task.held_out[:5]])

        def score(self, pictures, captions):
            return np.zeros(len(captions))
    report = task.evaluate(Model(1, None), "val", 5, 0, [2.0])
    assert report.n == 5 and len(report.pictures) == 5
    assert report.scores["caption_match"][0] == report.scores["draw_match"][0] == 0  # a tie is not a win

def test_each_document_has_one_picture_and_shares_are_as_asked(captioned):
    task = Folder(captioned, 32, caption_first=0.6, unconditional_share=0.5)
    task.train = task.train * 40
    documents = task.documents(10**6, seed=0)
    assert len(documents) == 4 * len(task.train)
    kinds = ["".join("t" if isinstance(part, str) else "p" for part in document) for document in documents]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)}
    assert shares["pt"] == pytest.approx(0.4, abs=0.03)
    assert shares["tp"] == pytest.approx(0.3, abs=0.03) and shares["p"] == pytest.approx(0.3, abs=0.03)

class Matcher:
    """Knows the right picture of a share of the captions, and guesses the others."""

    def __init__(self, known, pictures):
        self.known, self.pictures, self.rng = known, pictures, np.random.default_rng(0)

    def score(self, pictures, captions):
        own = [(picture == self.pictures[int(caption)]).all() for picture, caption in zip(pictures, captions)]
        known = [int(caption) < self.known * len(self.pictures) for caption in captions]
        return np.where(np.logical_and(own, known), 1.0, self.rng.random(len(captions)) * 0.9)

    def log_likelihood_after(self, pictures, captions):
        return self.score(pictures, captions) - 5, np.full(len(captions), 5)

    def diffusion_loss(self, captions, pictures):
        return -self.score(pictures, captions)

@pytest.mark.parametrize("known, least, most", [(1, 1, 1), (0, 0.06, 0.2), (0.5, 0.5, 0.65)])
def test_matching_counts_how_often_the_own_pair_wins(known, least, most):
    pictures = np.stack([picture for _, _, picture in examples("val", 200, 0)])
    scores = score_matching(Matcher(known, pictures), [str(i) for i in range(200)], pictures, seed=0)
    assert scores["caption_match"][1] == "chance 0.1250"
    assert least <= scores["caption_match"][0] <= most
    if known != 0.5:  # captions with larger numbers are the choices here too, so half known is another number
        assert least <= scores["draw_match"][0] <= most

def test_the_likelihoods_and_losses_of_a_trained_model_belong_to_their_pairs(captioned, tmp_path):
    call(train.main, "--data", captioned, "--run", tmp_path / "run", *TINY, "--steps", 1, "--eval-n", 2)
    checkpoint, model, vae = train.load_checkpoint(tmp_path / "run", "cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    trained = train.Trained(model, vae, checkpoint["run"])
    captions = [f"square number {i}" for i in range(6)]
    pictures = np.stack([load_picture(captioned / f"{i:02d}.png", 32) for i in range(6)])
    log_p, n_tokens = trained.log_likelihood_after(pictures, captions)
    losses = trained.diffusion_loss(captions, pictures)
    alone = [trained.log_likelihood_after(pictures[i : i + 1], captions[i : i + 1])[0][0] for i in range(6)]
    assert np.allclose(log_p, alone, rtol=1e-4) and len(set(log_p.tolist())) == 6
    alone = [trained.diffusion_loss(captions[i : i + 1], pictures[i : i + 1])[0] for i in range(6)]
    assert np.allclose(losses, alone, rtol=1e-4)
    assert np.abs(trained.diffusion_loss(captions[::-1], pictures) - losses).min() > 1e-6  # the caption matters

def test_emoji_have_unique_pictures_and_captions_where_the_font_is_installed(tmp_path):
    for font in ("no-such-font.ttf", Path(train.__file__)):
        assert "was not found, or is not a font" in complaint(emoji.main, tmp_path / "x", "--font", font)
    assert not (tmp_path / "x").exists()
    try:
        call(emoji.main, tmp_path / "emoji")
    except SystemExit:
        pytest.skip("the emoji font is not installed")
    found = find_captions(tmp_path / "emoji")
    assert len(found) > 1000 and len({caption for _, caption in found}) == len(found)
    assert {"grinning face", "waving hand sign, dark skin tone", "woman astronaut"} <= {caption for _, caption in found}
    assert "must be a new folder" in complaint(emoji.main, tmp_path / "emoji")
