"""sample.py as a person runs it."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
import train
from tests.conftest import TINY, call, checkpoint_of, complaint

@pytest.fixture
def pictures():
    """red.png and blue.png."""
    for colour in ("red", "blue"):
        Image.new("RGB", (70, 50), colour).save(f"{colour}.png")

def change(run, function):
    """A copy, here, of a run whose matrices, of model and VAE, the function has changed."""
    checkpoint = checkpoint_of(run)
    for name, weight in (checkpoint["best"] | checkpoint["vae"]).items():
        if weight.dim() > 1:
            function(name, weight)
    torch.save(checkpoint, "ckpt.pt")

def contents(directory):
    return {path: path.read_bytes() for path in Path(directory).iterdir()}

@pytest.mark.parametrize("model, n_steps", [("transfusion", 5), ("chameleon", 1)])
def test_each_prompt_is_drawn_and_no_file_is_overwritten(model, n_steps):
    call(train.main, *TINY, "--steps", 1, "--eval-n", 2, "--model", model, "--run", "x")
    # All tokens are equally likely, so the greedy choice is the first one that is allowed: BOI.
    change("x", lambda name, weight: weight.mul_(name != "lm_head.weight"))
    options = ["--run", ".", "--out", "deep/out", "--steps", 5]
    said = call(sample.main, "a red circle.", "hello", *options)
    before = contents("deep/out")
    assert len(before) == 2 * 2 * 4  # a PNG and a GIF of each, at most four for each prompt
    assert all(str(path) in said for path in before)
    first, second = [line for line in said.splitlines() if "BOI" in line]
    assert first.startswith("a red circle.")
    assert second.startswith("hello")
    for path in before:
        picture = Image.open(path)
        assert picture.size == (256, 256)
        assert path.suffix == ".png" or picture.n_frames == n_steps

    call(sample.main, "a red circle.", *options, "--seed", 1)
    after = contents("deep/out")
    assert after.items() > before.items()
    assert after[Path("deep/out/009.png")] != after[Path("deep/out/001.png")]

def test_pictures_are_captioned_and_text_is_continued(trained, pictures):
    torch.manual_seed(0)
    # All that comes before matters.
    change(trained[0], lambda _, weight: weight.normal_(std=0.3))
    prompts = "<red.png>", "<blue.png>", "left. <red.png> right"
    texts = [call(sample.main, prompt, "--run", ".", "--steps", 1) for prompt in prompts]
    assert texts[0] != texts[1]
    assert texts[0].startswith("[BOI] ")
    assert texts[2].startswith("left. [BOI] ")
    assert "[EOI] right" in texts[2]

def test_only_pictures_in_angle_brackets_are_pictures(pictures, monkeypatch):
    """And prompts are cleaned like captions."""
    monkeypatch.setenv("HOME", os.getcwd())
    prompt = "\ufeffa photo\u00a0of <sks> dog\n, x < 3 and y > 2 < ~/red.png > again "
    before, picture, after = sample.parse_prompt(prompt, 32)
    assert before == "a photo of <sks> dog , x < 3 and y > 2"
    assert (picture == (255, 0, 0)).all()
    assert after == "again"

def test_words_that_the_model_does_not_know_are_named(trained):
    said = call(sample.main, "a red zebra.", "--run", trained[0], "--steps", 1)
    assert "not know: zebra\n" in said

def test_the_seed_decides_what_is_made_of_nothing(trained):
    options = ["--run", trained[0], "--steps", 1, "--temperature", 1, "--seed"]
    said = [call(sample.main, *options, seed) for seed in (3, 3, 4)]
    first, again, other = (text.partition("samples")[0] for text in said)  # without the paths
    assert first == again != other

@pytest.mark.parametrize("n_bytes", [None, 0, 60])  # missing, empty and cut off
def test_a_picture_that_cannot_be_read_is_named(n_bytes, trained, pictures):
    if n_bytes is not None:
        Path("bad.png").write_bytes(Path("red.png").read_bytes()[:n_bytes])
    assert "bad.png" in complaint(sample.main, "a <bad.png>", "--run", trained[0])
    assert not os.path.exists("samples")

@pytest.mark.parametrize("wrong", ["--steps 0", "--eta 2", "--temperature -1"])
def test_wrong_numbers_are_named(wrong, capsys):
    option, value = wrong.split()
    with pytest.raises(SystemExit, match="2"):
        sample.main(["a", option, value])
    assert option in capsys.readouterr().err.splitlines()[-1]

def test_a_run_that_cannot_be_used_is_named(pictures):
    assert "no checkpoint at runs/shapes/ckpt.pt" in complaint(sample.main, "a")
    call(train.main, *TINY, "--task", "text", "--steps", 1, "--eval-n", 4)
    assert "text alone" in complaint(sample.main, "<red.png>", "--run", "runs/text")
    assert not os.path.exists("samples")
