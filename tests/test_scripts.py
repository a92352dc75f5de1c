"""train.py and sample.py as a person runs them, tiny, in a temporary folder; and what of them can be checked alone."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import shapes
from data import compare
from train import Muon, Run, Trained, learning_rate, load_run, make_optimizers, parse_options
from transfusion import BOI, EOS, PRESETS, VAE, Config, Tokenizer, Transfusion

ROOT = Path(__file__).parents[1]
TINY = ["--preset", "tiny", "--documents", "400", "--vae-steps", "10", "--steps", "12", "--eval-every", "4",
        "--batch-size", "8", "--eval-n", "20", "--sample-steps", "2", "--device", "cpu"]

def start(script, *options, **how):
    return subprocess.Popen([sys.executable, str(ROOT / script), *options], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, **how)

def run(script, *options, ok=True, **how):
    process = start(script, *options, **how)
    out, err = process.communicate(timeout=120)
    assert (process.returncode == 0) == ok, err
    return out if ok else err

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    out = run("train.py", "--run", str(folder), *TINY)
    return folder, out

def test_training_writes_the_table_the_log_and_the_pictures(trained):
    folder, out = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    for score, (value, beside) in metrics["scores"].items():
        assert f"{score:16} {value:8.4f}   {beside}" in out
        assert any(word in beside for word in ("floor", "ceiling", "chance"))
    assert {"text_ppl", "caption_ppl", "text_acc", "caption_acc", "draw_acc cfg 2"} <= set(metrics["scores"])
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    assert Image.open(folder / "progress.png").height % 3 == 0  # a row of drawings for every evaluation
    assert Image.open(folder / "figure.png").width > 600
    assert not list(folder.glob("writing-*"))

def test_a_resumed_run_equals_one_that_was_never_stopped_bit_for_bit(trained, tmp_path):
    folder = tmp_path / "stopped"
    process = start("train.py", "--run", str(folder), *TINY)
    while not (folder / "log.csv").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)  # Ctrl-C, some time after the first evaluation began to write
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "To go on: python train.py --resume" in err
    stopped_at = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
    assert 4 <= stopped_at < 12
    run("train.py", "--run", str(folder), "--resume")
    assert (folder / "log.csv").read_text() == (trained[0] / "log.csv").read_text()
    one, other = (torch.load(f / "ckpt.pt", weights_only=True) for f in (folder, trained[0]))
    for part in ("vae", "model", "ema"):
        assert all(one[part][name].equal(other[part][name]) for name in one[part]), part
    assert json.dumps(one["optimizers"], default=lambda x: x.tolist()) == json.dumps(
        other["optimizers"], default=lambda x: x.tolist())
    scores = [json.loads((f / "metrics.json").read_text())["scores"] for f in (folder, trained[0])]
    assert scores[0] == scores[1]

def test_eval_only_gives_the_same_scores_and_leaves_the_checkpoint(trained):
    folder, out = trained
    before = (folder / "ckpt.pt").read_bytes()
    again = run("train.py", "--eval-only", "--run", str(folder))
    assert [x for x in again.splitlines() if "_acc" in x or "_ppl" in x] == [
        x for x in out.splitlines() if ("_acc" in x or "_ppl" in x) and "cfg" not in x[:4] and not x.startswith("step")]
    assert (folder / "ckpt.pt").read_bytes() == before

@pytest.fixture(scope="module")
def chameleon(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "chameleon"
    return folder, run("train.py", "--run", str(folder), "--model", "chameleon", *TINY)

def test_chameleon_has_every_score_of_transfusion_and_its_use_of_codes(trained, chameleon):
    scores = [json.loads((folder / "metrics.json").read_text())["scores"] for folder, _ in (trained, chameleon)]
    assert set(scores[1]) == set(scores[0]) | {"code_ppl"} and "codes used" in scores[1]["code_ppl"][1]
    again = run("train.py", "--eval-only", "--run", str(chameleon[0]))
    assert [x for x in again.splitlines() if "_ppl" in x] == [x for x in chameleon[1].splitlines() if "_ppl" in x]

def test_a_finished_run_learns_to_edit(trained, tmp_path):
    start_from, _ = trained
    before = (start_from / "ckpt.pt").read_bytes()
    tiny = [*TINY[2:], "--documents", "60", "--run", str(tmp_path / "edit"), "--task", "edit"]
    out = run("train.py", "--init", str(start_from), *tiny)
    assert "edit_acc cfg 2" in out and "floor 0" in out and "VAE  " not in out
    assert (start_from / "ckpt.pt").read_bytes() == before
    old, new = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (start_from, tmp_path / "edit"))
    assert all(old["vae"][name].equal(new["vae"][name]) for name in old["vae"]) and old["words"] == new["words"]
    assert not old["ema"]["lm_head.weight"].equal(new["ema"]["lm_head.weight"])
    assert (old["ema"]["lm_head.weight"] - new["ema"]["lm_head.weight"]).abs().max() < 0.2  # it began where that ended
    row = list(csv.DictReader((tmp_path / "edit" / "log.csv").open()))[-1]
    assert "val_edit_acc" in row
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    out = run("sample.py", f"<{tmp_path / 'red.png'}> make the red circle green.", "--run", str(tmp_path / "edit"),
              "--steps", "2", "--max-length", "60", "--out", str(tmp_path / "out"))
    assert out.startswith("[BOS] [BOI] (16 patches) [EOI] make the red circle green.")

def test_a_run_of_text_alone_has_the_scores_of_text(tmp_path):
    out = run("train.py", "--run", str(tmp_path / "text"), "--task", "text", *TINY)
    assert "text_ppl" in out and "caption_ppl" in out and "text_acc" in out and "draw_acc" not in out
    assert not (tmp_path / "text" / "progress.png").exists()
    assert Image.open(tmp_path / "text" / "figure.png").width > 300  # the mask alone

def test_runs_are_put_side_by_side(trained, chameleon, tmp_path, capsys):
    compare.main([str(trained[0]), str(chameleon[0]), "--out", str(tmp_path / "both.png")])
    header, _, first, second = capsys.readouterr().out.splitlines()
    scores = json.loads((chameleon[0] / "metrics.json").read_text())["scores"]
    columns = [cell.strip() for cell in header.split("|")]
    cells = [cell.strip() for cell in second.split("|")]
    assert float(cells[columns.index("frechet")]) == pytest.approx(scores["frechet cfg 2"][0], abs=1e-3)
    assert re.search("--eval-only|--model chameleon", cells[columns.index("command")]) and "chameleon" not in first
    progress = Image.open(trained[0] / "progress.png")
    both = Image.open(tmp_path / "both.png")
    assert both.width > progress.width * 0.95 and both.height > progress.height
    assert "no-such-run" in complaint(compare.main, tmp_path / "no-such-run")

def test_sample_takes_the_newest_run(trained, chameleon, tmp_path):
    for name, (folder, _) in (("old", trained), ("new", chameleon)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes())
    process = start("sample.py", "a red", "--steps", "2", "--max-length", "30", cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "new" in err and "old" not in err

def test_a_second_run_keeps_the_first(trained, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "ckpt.pt").write_text("precious")
    short = [*TINY, "--steps", "2", "--eval-n", "4"]
    run("train.py", "--run", str(folder), *short)
    assert (tmp_path / "mine.1" / "ckpt.pt").read_text() == "precious"
    assert load_run(folder, "cpu")[0]["step"] == 2

def complaint(main, *options):
    """The sentence with which a script gives up."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, options)))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code  # printed to stderr, with exit status 1
    return stop.value.code

def test_a_failing_command_prints_one_sentence_and_no_traceback(tmp_path):
    for script in ("train.py", "sample.py"):
        options = ["--eval-only"] if script == "train.py" else []
        err = run(script, *options, "--run", str(tmp_path / "none"), ok=False)
        assert err.count("\n") == 1 and str(tmp_path / "none" / "ckpt.pt") in err

def test_train_says_in_one_sentence_what_is_wrong(trained, tmp_path, capsys):
    new = ["--run", tmp_path / "x"]
    assert "no checkpoint at" in complaint(train.main, "--resume", *new)
    assert "dim (100)" in complaint(train.main, "--dim", 100, *new)
    assert "own model" in complaint(train.main, "--resume", "--dim", 64, "--run", trained[0])
    assert "dim (99)" in complaint(train.main, "--dim", 99, *new)
    assert "caption_first" in complaint(train.main, "--caption-first", 0, *new)
    assert str(tmp_path / "x") in complaint(train.main, "--init", tmp_path / "x", "--task", "edit", *new)
    assert "own model" in complaint(train.main, "--init", trained[0], "--patch-size", 4, *new)
    assert "batch_size must be at least 1" in complaint(train.main, "--batch-size", 0, *new)
    assert "not a device" in complaint(train.main, "--device", "tpu9", *new)
    for option, value in (("--steps", "many"), ("--optimizer", "sgd"), ("--target", "noise")):
        with pytest.raises(SystemExit, match="2"):
            train.main([option, value])
        assert option in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # and nothing was begun

@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    if content is None:
        torch.save({"somebody": "else's"}, tmp_path / "ckpt.pt")
    else:
        (tmp_path / "ckpt.pt").write_bytes(content)
    for main, option in ((train.main, "--eval-only"), (sample.main, "a")):
        said = complaint(main, option, "--run", tmp_path)
        assert str(tmp_path / "ckpt.pt") in said and "not a checkpoint" in said

def test_sample_draws_says_and_runs_free(trained, tmp_path):
    """An untrained model writes anything; the picture it is shown and what it writes and draws must get through."""
    folder, _ = trained
    Image.new("RGB", (70, 50), "red").save(tmp_path / "red.png")
    common = ["--run", str(folder), "--steps", "2", "--out", str(tmp_path / "out"), "--max-length", "60"]
    out = run("sample.py", f"a red circle. <{tmp_path / 'red.png'}> so", *common)
    assert out.startswith("[BOS] a red circle. [BOI] (16 patches) [EOI] so")
    several = run("sample.py", "a red circle", "hello", f"<{tmp_path / 'red.png'}>", *common).splitlines()
    assert [line[:11] for line in several[:3]] == ["[BOS] a red", "[BOS] hello", "[BOS] [BOI]"]
    free = [run("sample.py", *common, "--seed", "3").split("\n")[0] for _ in range(2)]
    assert free[0].startswith("[BOS]") and free[0] == free[1]

def test_sample_switches_to_diffusion_and_writes_the_pictures(trained, tmp_path):
    """A model to which all tokens are equally likely says BOI sooner or later; then it draws, and goes on with text."""
    saved = torch.load(trained[0] / "ckpt.pt", weights_only=True)
    saved["ema"]["lm_head.weight"][:] = 0
    saved["vae"]["std"] *= 100  # so that no two frames of the GIF look alike, which Pillow would make one
    torch.save(saved, tmp_path / "ckpt.pt")
    out = run("sample.py", "a red circle.", "--run", str(tmp_path), "--steps", "5", "--out", str(tmp_path / "out"),
              "--temperature", "1", "--max-length", "1500")
    assert "[BOI]" in out and "(16 patches) [EOI]" in out
    png, gif = out.split()[-2:]  # the model draws one or more; where they are is said last
    assert Image.open(png).size == (256, 256) and png.endswith(".png")
    assert Image.open(gif).n_frames == 5  # one for every denoising step
    shown = sample.load_picture(png, 32)  # and the picture can be given back to the model as it was
    assert (np.asarray(Image.open(png))[::8, ::8] == shown).all()

def test_sample_says_in_one_sentence_what_is_wrong(trained, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "text.png", "empty.png", "half.png", "folder.png"):
        assert name in complaint(sample.main, f"a <{tmp_path / name}>", "--run", trained[0])
    assert "no checkpoint" in complaint(sample.main, "a", "--run", tmp_path)
    assert "--max-length" in complaint(sample.main, "x" * 300, "--run", trained[0])
    wrong = {"--steps": "0", "--temperature": "-1", "--sampler": "euler", "--out": str(tmp_path / "text.png")}
    for option, value in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            sample.main(["a", option, value])
        assert option in capsys.readouterr().err

# ---- Parts -----------------------------------------------------------------------------------------------------------

def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in (*fields(Config), *fields(Run)):
        assert "--" + f.name.replace("_", "-") in text
        assert " ".join(f.metadata["help"].split()) in text
    given = parse_options(["--noise-cap", "1", "--no-qk-norm", "--dim", "64"])
    assert given["noise_cap"] == 1.0 and given["qk_norm"] is False and given["dim"] == 64

def test_muon_makes_the_update_of_the_librarys():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
                     for i, shape in enumerate([(24, 24), (24, 24), (24, 64), (64, 24)])] for _ in range(2))
    groups = [{"params": ours[:2]}, {"params": ours[2:3]}, {"params": ours[3:]}]
    optimizers = (Muon(groups, lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    before = [p.detach().clone() for p in ours]
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start_, p, q in zip(before, ours, theirs):
        moved, expected = (p - start_).detach(), (q - start_).detach()
        assert (moved - expected).norm() < 0.03 * expected.norm()  # the library computes in bf16

def test_the_optimizers_take_every_parameter_once_and_decay_no_norms():
    model = Transfusion(PRESETS["tiny"], 300)
    for name in ("muon", "adamw"):
        optimizers = make_optimizers(model, Run(optimizer=name))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        taken = [p for group in groups for p in group["params"]]
        assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))
        assert all(p.dim() >= 2 for group in groups if group["weight_decay"] for p in group["params"])

def test_the_learning_rate_warms_up_and_ends_at_five_percent():
    run_ = Run(lr=1.0, warmup=10, steps=100)
    rates = [learning_rate(run_, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.05, abs=0.01)
    assert learning_rate(replace(run_, steps=5), 2) == pytest.approx(0.3)

def test_likelihood_ranks_by_the_whole_text():
    """Against a sum by hand over the places that count."""
    tokenizer = Tokenizer(shapes.WORDS)
    torch.manual_seed(0)
    model = Transfusion(PRESETS["tiny"], len(tokenizer)).requires_grad_(False)
    torch.nn.init.normal_(model.lm_head.weight)
    texts = ["a red circle.", "a blue square left of a red ring."]
    for mark in (BOI, EOS):
        log_p, count = Trained(model, VAE(PRESETS["tiny"]), tokenizer, Run()).log_likelihood(texts, drawn=mark == BOI)
        for i, text in enumerate(texts):
            tokens = [1, *tokenizer.encode(text), mark]
            logits, _ = model(torch.tensor([tokens]), torch.full((1, len(tokens)), -1))
            by_hand = sum(logits[0, j].log_softmax(-1)[tokens[j + 1]] for j in range(len(tokens) - 1))
            assert log_p[i] == pytest.approx(by_hand.item(), abs=1e-3) and count[i] == len(tokens) - 1

def test_transfusion_needs_only_torch_and_touches_nothing_outside():
    source = (ROOT / "transfusion.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names) | {"torch"}
    assert not any(word in source for word in ("print(", "open(", "argparse", "sys.", "pathlib"))
