"""train.py and sample.py as a person runs them, tiny, in a temporary directory; and parts of them alone."""

import ast
import csv
import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields, replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from data import compare, experiments, plots, shapes
from data.files import load_picture
from data.tasks import TASKS, Report
from train import (
    PRESETS, Muon, Run, Trained, check_config, check_options, draw_figure, learning_rate, load_checkpoint,
    make_optimizers, parse_options,
)
from transfusion import BOI, EOS, VAE, Batch, Config, Tokenizer, Transfusion

torch.set_num_threads(1)  # the quickest for models as tiny as these; and `start` does the same
ROOT = Path(__file__).parents[1]
SMALL = ["--documents", "400", "--vae-steps", "10", "--steps", "12", "--eval-every", "4", "--batch-size", "8",
         "--eval-n", "20", "--sample-steps", "2", "--device", "cpu"]
# A learning rate with which it learns to draw something, but badly.
TINY = ["--preset", "tiny", "--warmup", "1", "--lr", "1e-2", *SMALL]

def start(script, *options):
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)

def run(script, *options, ok=True):
    """A script in its own process. Returns what it prints, to stderr if it should fail."""
    process = start(script, *options)
    out, err = process.communicate(timeout=300)
    assert (process.returncode == 0) == ok, err
    return out if ok else err

@contextmanager
def in_this_process():
    """What a script prints, and Ctrl-C as it was before: quicker than a process of its own."""
    handler, out = signal.getsignal(signal.SIGINT), io.StringIO()
    try:
        with redirect_stdout(out):
            yield out
    finally:
        signal.signal(signal.SIGINT, handler)

def call(main, *options):
    """main() in this process. Returns what it prints."""
    with in_this_process() as out:
        main(list(map(str, options)))
    return out.getvalue()

def complaint(main, *options):
    """The sentence with which a script gives up."""
    with in_this_process(), pytest.raises(SystemExit) as stop:
        main(list(map(str, options)))
    # Python prints a string to stderr, and the exit status is 1.
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code

def table(out):
    """The lines of the final table."""
    return re.findall(r"^\w+(?: g=\S+)? +-?[\d.naif]+   .*$", out, re.MULTILINE)

def metrics_of(directory):
    return json.loads((directory / "metrics.json").read_text())

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nothing interrupted: its output directory, and what was printed."""
    directory = tmp_path_factory.mktemp("runs") / "shapes"
    return directory, run("train.py", "--run", directory, *TINY)

@pytest.fixture(scope="module")
def chameleon(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "chameleon"
    return directory, call(train.main, "--run", directory, "--model", "chameleon", *TINY)

@pytest.fixture(scope="module")
def trained_on(trained, tmp_path_factory):
    """A function: the output directory of a run on a task, and what was printed. It trains each task once."""
    runs = {"shapes": trained}

    def get(task):
        if task not in runs:
            directory = tmp_path_factory.mktemp("runs") / task
            model = ["--init", trained[0], *SMALL] if task == "edit" else TINY
            options = [*model, "--task", task, "--documents", 200, "--run", directory]
            runs[task] = directory, call(train.main, *options)
        return runs[task]

    return get

# ---- A whole run -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_trained_from_end_to_end(task, trained_on):
    directory, out = trained_on(task)
    metrics = metrics_of(directory)
    for score, (value, beside) in metrics["scores"].items():
        assert f"{score:14} {value:8.4f}   {beside}" in out
        assert any(word in beside for word in ("floor", "ceiling", "chance", "best possible", "true pictures"))
    assert len(table(out)) == len(metrics["scores"])
    rows = list(csv.DictReader((directory / "log.csv").open()))
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    assert {"loss_text", "loss_image", *metrics["scores"]} <= set(rows[0])
    assert not any(np.isnan(float(value)) for row in rows for value in row.values())
    assert not list(directory.glob("writing-*"))
    assert metrics["run"]["task"] == task and metrics["minutes"] > 0 and metrics["flops"] > 0
    for name, value in TASKS[task].defaults.items():
        if "--" + name.replace("_", "-") not in SMALL:
            assert (metrics["cfg"] | metrics["run"])[name] == value

def test_training_writes_the_table_the_log_and_the_pictures(trained):
    directory, _ = trained
    text_scores = {"text_ppl", "caption_ppl", "text_acc"}
    scores = text_scores | {"caption_acc", "draw_acc", "frechet", "vae_psnr", "vae_acc"}
    assert set(metrics_of(directory)["scores"]) == scores
    with Image.open(directory / "progress.png") as progress:
        row = progress.height // 3  # a row of drawings for every evaluation
        assert progress.height == 3 * row and progress.width // row == 12
        drawings = np.asarray(progress).reshape(3, row, -1)
        assert any(len(np.unique(drawing)) > 2 for drawing in drawings)  # not only black, with white lines
    assert Image.open(directory / "figure.png").width > 600

def test_chameleon_has_every_score_of_transfusion_and_its_use_of_codes(trained, chameleon):
    scores = [metrics_of(directory)["scores"] for directory, _ in (trained, chameleon)]
    assert set(scores[1]) == set(scores[0]) | {"code_ppl"} and "codes in use" in scores[1]["code_ppl"][1]
    assert table(call(train.main, "--eval-only", "--run", chameleon[0])) == table(chameleon[1])

def test_a_finished_run_learns_to_edit(trained, trained_on, tmp_path):
    first, second = trained[0], trained_on("edit")[0]
    out = trained_on("edit")[1]
    assert "edit_acc" in out and "floor 0" in out and "Training the VAE" not in out
    old, new = (torch.load(directory / "ckpt.pt", weights_only=True) for directory in (first, second))
    assert old["run"]["task"] == "shapes" and old["step"] == 12  # still its own checkpoint
    assert as_plain(old["vae"]) == as_plain(new["vae"]) and old["words"] == new["words"]
    assert not old["ema"]["lm_head.weight"].equal(new["ema"]["lm_head.weight"])
    difference = (old["ema"]["lm_head.weight"] - new["ema"]["lm_head.weight"]).abs().max()
    assert difference < 0.2  # it began where that ended
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    out = call(sample.main, f"<{tmp_path / 'red.png'}> make the red circle green.", "--run", second,
               "--steps", 2, "--max-tokens", 20, "--out", tmp_path / "out")
    assert out.startswith("[BOI] (picture) [EOI] make the red circle green.")

def test_starting_from_a_run_leaves_it_as_it_is(trained, tmp_path):
    before = {path.name: path.read_bytes() for path in trained[0].iterdir()}
    call(train.main, "--init", trained[0], *SMALL, "--steps", 1, "--eval-n", 4, "--run", tmp_path / "x")
    assert {path.name: path.read_bytes() for path in trained[0].iterdir()} == before

def test_the_vae_is_trained_when_a_run_of_text_alone_goes_on_with_pictures(trained_on, tmp_path):
    text = trained_on("text")[0]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    out = tmp_path / "out"
    assert "text alone" in complaint(sample.main, f"<{tmp_path / 'red.png'}>", "--run", text, "--out", out)
    said = call(train.main, "--init", text, *SMALL, "--task", "shapes", "--steps", 2, "--run", tmp_path / "x")
    assert "Training the VAE" in said
    vae = torch.load(tmp_path / "x" / "ckpt.pt", weights_only=True)["vae"]
    assert vae["mean"].abs().min() > 0 and (vae["std"] != 1).all()
    call(sample.main, f"<{tmp_path / 'red.png'}>", "--run", tmp_path / "x", "--steps", 1, "--out", out)

def test_a_run_is_extended_with_new_settings_and_without_old_scores(trained, tmp_path, monkeypatch):
    directory = tmp_path / "x"
    shutil.copytree(trained[0], directory)
    assert "already at step 12" in complaint(train.main, "--resume", "--steps", 11, "--run", directory)
    assert (directory / "metrics.json").is_file()

    class Killed(Exception):
        pass

    def killed(self, batch):
        raise Killed
    monkeypatch.setattr(Transfusion, "loss", killed)
    with pytest.raises(Killed):
        call(train.main, "--resume", "--steps", 14, "--run", directory)
    assert not (directory / "metrics.json").exists()
    settings = json.loads((directory / "run.json").read_text())
    assert settings["run"]["steps"] == 14
    monkeypatch.undo()
    call(train.main, "--resume", "--steps", 14, "--run", directory)
    metrics = metrics_of(directory)
    assert metrics["step"] == metrics["run"]["steps"] == 14 and metrics["command"] == settings["command"]

def test_the_averaged_weights_keep_no_graph_of_the_steps(tmp_path, monkeypatch):
    validate, seen = train.validate, []

    def spy(trained, *rest):
        seen.extend(trained.model.parameters())
        return validate(trained, *rest)
    monkeypatch.setattr(train, "validate", spy)
    call(train.main, "--run", tmp_path / "x", *TINY, "--steps", 2, "--eval-n", 4)
    assert seen and all(p.grad_fn is None and not p.requires_grad for p in seen)

@pytest.mark.parametrize("options, sees_later", [({}, True), ({"bidirectional": False}, False),
                                                 ({"model": "chameleon"}, False)])
def test_the_figure_shows_the_mask_of_the_model(options, sees_later, monkeypatch):
    masks = []
    monkeypatch.setattr(plots, "mask_picture", lambda mask, *_: masks.append(mask))
    draw_figure(Report(0, {}), replace(PRESETS["tiny"], **options), Tokenizer(shapes.WORDS))
    assert masks[0].triu(1).any() == sees_later

def test_a_run_of_text_alone_has_the_scores_of_text(trained_on):
    directory, out = trained_on("text")
    assert set(metrics_of(directory)["scores"]) == {"text_ppl", "caption_ppl", "text_acc"}
    assert "Training the VAE" not in out
    assert not (directory / "progress.png").exists()
    assert Image.open(directory / "figure.png").width > 300  # the mask alone

def test_train_decides_nothing_by_the_name_of_a_task():
    """It takes everything from TASKS, so that a new task needs no change here."""
    for node in ast.walk(ast.parse((ROOT / "train.py").read_text())):
        if isinstance(node, (ast.Compare, ast.Match)):
            constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            assert not constants & set(TASKS), f"line {node.lineno}"

def test_runs_are_compared(trained, chameleon, trained_on, tmp_path, capsys):
    directories = trained[0], chameleon[0], trained_on("text")[0]
    compare.main([*map(str, directories), "--out", str(tmp_path / "both.png")])
    header, _, *rows = capsys.readouterr().out.splitlines()
    columns = [cell.strip() for cell in header.split("|")]
    assert len(rows) == 3
    for directory, row in zip(directories, rows):
        scores, cells = metrics_of(directory)["scores"], [cell.strip() for cell in row.split("|")]
        for score in compare.SCORES:
            cell = cells[columns.index(score)]
            assert float(cell) == pytest.approx(scores[score][0], abs=1e-3) if score in scores else cell == ""
        assert cells[columns.index("command")] == f"`{metrics_of(directory)['command']}`"
    assert "--model chameleon" in rows[1] and "chameleon" not in rows[0]
    with Image.open(directories[0] / "progress.png") as progress, Image.open(tmp_path / "both.png") as both:
        assert both.width > progress.width * 0.95 and both.height > progress.height
    assert "no-such-run" in complaint(compare.main, tmp_path / "no-such-run")

def test_experiments_train_what_is_missing_and_print_the_mean_over_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = {"low": ("low", "as here"), "high": ("high", "")}
    table = experiments.Table("Rates", rows, ("text_ppl",), ("draw_acc", "frechet"), (("low", "high"),))
    monkeypatch.setattr(experiments, "TABLES", {"rates": table})
    monkeypatch.setattr(experiments, "RUNS", {"low": " ".join(TINY), "high": " ".join([*TINY, "--lr", "0.02"])})
    call(experiments.main, "--seeds", "0", "1")
    capsys.readouterr()
    results = json.loads(Path("runs/experiments/results.json").read_text())
    assert set(results) == {"low-0", "low-1", "high-0", "high-1"}
    of_seeds = [metrics_of(Path(f"runs/experiments/low-{seed}")) for seed in (0, 1)]
    perplexities = [metrics["scores"]["text_ppl"][0] for metrics in of_seeds]
    assert [metrics["run"]["seed"] for metrics in of_seeds] == [0, 1] and perplexities[0] != perplexities[1]
    for score in table.curves:
        with Image.open(f"runs/experiments/rates-{score}.png") as curves:
            assert len(curves.getcolors(10**6)) > 8
    with Image.open("runs/experiments/rates.png") as drawings:
        assert drawings.height > 3 * 128 and 128 < drawings.width < 12 * 132  # progress.png has 12 columns

    # Nothing is trained twice; a run that was interrupted goes on; one with other options is trained anew.
    times = {path: path.stat().st_mtime_ns for path in Path("runs/experiments").glob("*/ckpt.pt")}
    printed = call(experiments.main, "--seeds", "0", "1")
    low, high = [line for line in printed.splitlines() if line.startswith(("| low |", "| high |"))]
    assert f"{np.mean(perplexities):.3f} ({min(perplexities):.3f} to {max(perplexities):.3f})" in low
    assert "as here" in low and "--lr 0.02" in high
    assert times == {path: path.stat().st_mtime_ns for path in times}
    Path("runs/experiments/results.json").unlink()
    Path("runs/experiments/low-1/metrics.json").unlink()
    call(experiments.main, "--seeds", "0", "1")
    again = json.loads(Path("runs/experiments/results.json").read_text())
    assert again["low-1"]["scores"] == results["low-1"]["scores"]
    # Scores by other options than the run's own, from --eval-only, are not taken for its result.
    Path("runs/experiments/results.json").unlink()
    call(train.main, "--eval-only", "--run", "runs/experiments/low-1", "--eval-split", "val", "--eval-n", "4")
    assert metrics_of(Path("runs/experiments/low-1"))["scores"] != results["low-1"]["scores"]
    call(experiments.main, "--seeds", "1", "1", "0")
    again = json.loads(Path("runs/experiments/results.json").read_text())
    assert set(again) == set(results) and again["low-1"]["scores"] == results["low-1"]["scores"]
    assert "no results at" in complaint(experiments.main, "--show", "--results", "typo.json")
    shown = call(experiments.main, "--show", "--seeds", "0", "1", "2")
    assert f"{low}\n{high}" in shown and "| low / high |" in shown and not Path("runs/experiments/low-2").exists()
    monkeypatch.setitem(experiments.RUNS, "low", " ".join([*TINY, "--lr", "0.005"]))
    assert "Move it away" in complaint(experiments.main, "--seeds", "0")
    monkeypatch.setitem(experiments.RUNS, "low", " ".join([*TINY, "--noise-cap", "7"]))
    assert "low-2.log" in complaint(experiments.main, "--seeds", "2", "--jobs", "1")

def test_parity_is_the_share_of_flops_at_which_the_last_score_of_the_baseline_is_reached(monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", {"ours": "", "baseline": ""})

    def result(flops, draw_acc, frechet):
        return {"options": "", "curves": {"flops": flops, "draw_acc": draw_acc, "frechet": frechet}}

    results = {
        "ours-0": result([2, 4, 6], [0.1, 0.5, 0.9], [3, 2, 1.5]),
        "ours-1": result([2, 4, 6], [0.3, 0.7, 0.9], [3, 2, 1.5]),
        "baseline-0": result([4, 8], [0.1, 0.4], [2, 1]),
    }
    # The mean goes from 0.2 at 2 FLOPs to 0.6 at 4, so it is 0.4 at 3. The distance never falls to 1.
    assert experiments.parity(results, "ours", "baseline", "draw_acc") == pytest.approx(3 / 8)
    assert experiments.parity(results, "ours", "baseline", "frechet") is None
    assert experiments.parity(results, "baseline", "ours", "frechet") == pytest.approx(6 / 6)
    results["baseline-0"] = result([4, 8], [0.1, 0.05], [2, 1])
    assert experiments.parity(results, "ours", "baseline", "draw_acc") == pytest.approx(2 / 8)  # its first evaluation

# ---- Several processes -----------------------------------------------------------------------------------------------

def run_two_processes(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "--", str(ROOT / "train.py"), *map(str, options)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout

def assert_nearly_the_same_run(a, b):
    """The losses, the weights and the averaged weights are equal within rounding."""
    a, b = (torch.load(directory / "ckpt.pt", weights_only=True) for directory in (a, b))
    assert a["step"] == b["step"]
    for row, other in zip(a["history"], b["history"], strict=True):
        for name in ("loss_text", "loss_image"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), name
    for weights in ("model", "ema"):
        for name, value in a[weights].items():
            torch.testing.assert_close(value, b[weights][name], rtol=0.02, atol=2e-3, msg=f"{weights} {name}")

@pytest.mark.parametrize("model", ["transfusion", "chameleon"])
def test_parts_of_a_batch_train_like_the_whole(model, tmp_path):
    options = [*TINY, "--optimizer", "adamw", "--lr", "1e-3", "--model", model, "--eval-n", 4]
    call(train.main, *options, "--run", tmp_path / "whole")
    call(train.main, *options, "--run", tmp_path / "parts", "--accumulate", 3)  # 3, 3 and 2 documents
    assert_nearly_the_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "cannot be divided" in complaint(train.main, *options, "--run", tmp_path / "x", "--accumulate", 9)

def test_two_processes_train_like_one_and_each_continues_the_other(tmp_path):
    """8 steps in one process and in two, then 4 more in the other."""
    first = [*TINY, "--lr", "1e-3", "--steps", 8, "--eval-n", 4, "--run"]
    more = ["--resume", "--steps", 12, "--run"]
    one, two, mixed = tmp_path / "one", tmp_path / "two", tmp_path / "mixed"
    call(train.main, *first, one)
    shutil.copytree(one, mixed)
    out = run_two_processes(*first, two)
    assert out.count("held-out examples") == 1 and not list(tmp_path.glob("two.*"))
    assert_nearly_the_same_run(one, two)
    call(train.main, *more, one)
    call(train.main, *more, two)
    run_two_processes(*more, mixed)
    assert_nearly_the_same_run(one, two)
    assert_nearly_the_same_run(one, mixed)

# ---- Stopping and resuming ---------------------------------------------------------------------------------

def as_plain(x):
    """Tensors as bytes, so that == compares every bit."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), x.contiguous().numpy().tobytes()
    if isinstance(x, dict):
        return {key: as_plain(value) for key, value in x.items()}
    return [as_plain(value) for value in x] if isinstance(x, (list, tuple)) else x

def assert_same_run(directory, other):
    """Two runs are equal bit for bit, but for where they are and how long they took."""
    one, two = (torch.load(d / "ckpt.pt", weights_only=True) for d in (directory, other))
    assert set(one) == set(two) and one["optimizers"]
    for part in set(one) - {"minutes", "command", "run"}:
        assert as_plain(one[part]) == as_plain(two[part]), part
    assert one["run"] | {"run": ""} == two["run"] | {"run": ""}
    for name in ("log.csv", "progress.png", "figure.png"):
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics_of(directory)["scores"] == metrics_of(other)["scores"]

def test_a_run_resumed_after_ctrl_c_equals_one_that_was_never_stopped_bit_for_bit(trained, tmp_path):
    directory = tmp_path / "stopped"
    process = start("train.py", "--run", directory, *TINY)
    while not (directory / "log.csv").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)  # some time after the first evaluation began to write
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.count("\n") == 1 and f"To continue: python train.py --resume --run {directory}" in err
    stopped = torch.load(directory / "ckpt.pt", weights_only=True)
    assert 4 <= stopped["step"] < 12 and f"Saved at step {stopped['step']}" in err
    call(train.main, "--run", directory, "--resume")
    assert_same_run(directory, trained[0])
    resumed = torch.load(directory / "ckpt.pt", weights_only=True)
    assert resumed["minutes"] > stopped["minutes"] > 0
    assert metrics_of(directory)["minutes"] == resumed["minutes"]
    command = " ".join(map(str, ["python train.py", "--run", directory, *TINY]))
    assert stopped["command"] == resumed["command"] == metrics_of(directory)["command"] == command

def kill_at_a_random_moment(process):
    moment = random.uniform(0, 0.3)
    time.sleep(moment)
    process.kill()
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed, after {moment:.4f} seconds"

def test_a_run_resumed_after_kill_9_equals_one_that_was_never_stopped_bit_for_bit(trained, tmp_path):
    directory = tmp_path / "killed"
    process = start("train.py", "--run", directory, *TINY)
    while not (directory / "ckpt.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    kill_at_a_random_moment(process)
    for name in ("ckpt.pt", "log.csv", "progress.png", "run.json"):  # as if it had been killed while writing
        (directory / f"writing-{name}").write_bytes(b"half a file")
    process = start("train.py", "--resume", "--run", directory)
    for line in process.stdout:
        if line.startswith("Training the model"):
            break
    kill_at_a_random_moment(process)
    call(train.main, "--resume", "--run", directory)
    assert_same_run(directory, trained[0])

@pytest.mark.parametrize("step", [2, 12])
def test_ctrl_c_before_the_first_evaluation_and_in_the_last_step(trained, tmp_path, monkeypatch, step):
    loss, calls = Transfusion.loss, count(1)

    def interrupted_loss(self, documents, *part):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, documents, *part)

    monkeypatch.setattr(Transfusion, "loss", interrupted_loss)
    directory = tmp_path / "x"
    assert f"Saved at step {step}" in complaint(train.main, "--run", directory, *TINY)
    monkeypatch.undo()
    checkpoint = torch.load(directory / "ckpt.pt", weights_only=True)
    assert checkpoint["flops"] == pytest.approx(metrics_of(trained[0])["flops"] * step / 12)
    torch.save(checkpoint | {"minutes": 1000.0}, directory / "ckpt.pt")
    call(train.main, "--resume", "--run", directory)
    assert_same_run(directory, trained[0])
    assert 1000 <= metrics_of(directory)["minutes"] < 1010  # those before and those after
    assert metrics_of(directory)["minutes"] > 1000 or step == 12

@pytest.mark.parametrize("complete_writes", [1, 2, 3])
def test_a_run_killed_between_two_writes_can_be_resumed(trained, tmp_path, monkeypatch, complete_writes):
    """As it is about to move log.csv, progress.png or the second checkpoint to its place."""
    class Killed(BaseException):
        pass

    move, n = os.replace, count()

    def killed(temporary, path):
        if Path(path).name != "run.json" and next(n) == complete_writes:
            raise Killed
        move(temporary, path)

    directory = tmp_path / "killed"
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        call(train.main, "--run", directory, *TINY)
    monkeypatch.undo()
    assert list(directory.glob("writing-*"))
    call(train.main, "--resume", "--run", directory)
    assert_same_run(directory, trained[0])

def test_ctrl_c_while_the_vae_trains_says_that_nothing_is_saved(tmp_path):
    process = start("train.py", "--run", tmp_path / "x", *TINY, "--vae-steps", 1_000_000)
    for line in process.stdout:
        if line.startswith("Training the VAE"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "nothing is saved" in err
    assert not (tmp_path / "x" / "ckpt.pt").exists()

def test_ctrl_c_while_scoring_names_the_command_that_scores(trained, monkeypatch):
    monkeypatch.setattr(TASKS["shapes"], "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert f"--eval-only --run {trained[0]}" in complaint(train.main, "--eval-only", "--run", trained[0])

def test_eval_only_gives_the_same_scores_and_leaves_the_checkpoint(trained):
    directory, out = trained
    checkpoint, metrics = (directory / "ckpt.pt").read_bytes(), metrics_of(directory)
    assert table(call(train.main, "--eval-only", "--run", directory)) == table(out)
    again = metrics_of(directory)
    for name in ("command", "minutes", "flops", "cfg", "run", "scores"):
        assert again[name] == metrics[name], name
    swept = table(call(train.main, "--eval-only", "--guidance-sweep", "--run", directory))
    assert set(table(out)) < set(swept)
    names = {line.split("  ")[0].strip() for line in swept}
    assert names > {f"{score} g={scale:g}" for score in ("draw_acc", "frechet") for scale in (1, 1.5, 3, 4)}
    assert (directory / "ckpt.pt").read_bytes() == checkpoint
    call(train.main, "--eval-only", "--run", directory)  # so that metrics.json is again that of the run

def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_is_kept(trained, tmp_path, monkeypatch):
    directory, loss = tmp_path / "x", Transfusion.loss
    directory.mkdir()  # an empty directory is as good as none

    def break_at(call_number, factor):
        calls = count(1)

        def broken_loss(self, documents, *part):
            whole, *parts = loss(self, documents, *part)
            return whole * (factor if next(calls) == call_number else 1), *parts

        monkeypatch.setattr(Transfusion, "loss", broken_loss)

    break_at(6, float("nan"))
    said = complaint(train.main, "--run", directory, *TINY)
    assert "step 6" in said and "loss is nan" in said and "last checkpoint" in said
    checkpoint, model, _ = load_checkpoint(directory, "cpu")
    assert checkpoint["step"] == 4 and all(p.isfinite().all() for p in model.parameters())
    before = (directory / "ckpt.pt").read_bytes()
    break_at(3, float("inf"))  # the third step after the checkpoint
    said = complaint(train.main, "--resume", "--run", directory)
    assert "step 7" in said and "loss is inf" in said
    assert (directory / "ckpt.pt").read_bytes() == before
    monkeypatch.undo()
    call(train.main, "--resume", "--run", directory)
    assert_same_run(directory, trained[0])

def test_a_gradient_that_is_not_finite_never_gets_into_a_checkpoint(tmp_path, monkeypatch):
    loss, calls = Transfusion.loss, count(1)

    def broken_loss(self, documents, *part):
        whole, *parts = loss(self, documents, *part)
        if next(calls) == 8:  # an evaluation follows this step
            whole = whole + (self.lm_head.weight.sum() * 0).sqrt()  # this is 0, and its gradient nan
        return whole, *parts

    monkeypatch.setattr(Transfusion, "loss", broken_loss)
    assert "step 8" in complaint(train.main, "--run", tmp_path / "x", *TINY)
    checkpoint, model, _ = load_checkpoint(tmp_path / "x", "cpu")
    assert checkpoint["step"] == 4 and all(p.isfinite().all() for p in model.parameters())

def test_a_vae_that_diverges_stops_the_run(tmp_path, monkeypatch):
    loss, calls = VAE.loss, count(1)
    monkeypatch.setattr(VAE, "loss", lambda *args: loss(*args) * (float("nan") if next(calls) == 3 else 1))
    said = complaint(train.main, "--run", tmp_path / "x", *TINY)
    assert "step 3" in said and "nan" in said
    assert not (tmp_path / "x" / "ckpt.pt").exists()

# ---- The output directory ----------------------------------------------------------------------------------

def test_a_second_run_keeps_the_first(trained, tmp_path):
    directory = tmp_path / "mine"
    shutil.copytree(trained[0], directory)
    before = (directory / "ckpt.pt").read_bytes()
    out = call(train.main, "--run", directory, *TINY, "--steps", 2, "--eval-n", 4)
    assert f"The earlier run in {directory} is now {directory}.1." in out
    assert (tmp_path / "mine.1" / "ckpt.pt").read_bytes() == before
    assert load_checkpoint(directory, "cpu")[0]["step"] == 2
    call(lambda _: train.make_directory(directory, {}))
    assert load_checkpoint(tmp_path / "mine.2", "cpu")[0]["step"] == 2
    assert not (directory / "ckpt.pt").exists()

@pytest.mark.parametrize("what", ["somebody's files", "a lone checkpoint", "a file", "a dangling symlink"])
def test_what_is_not_the_output_of_a_run_is_left_alone(tmp_path, what):
    directory = tmp_path / "mine"
    if what == "a file":
        directory.write_text("precious")
    elif what == "a dangling symlink":
        directory.symlink_to(tmp_path / "nowhere")
    else:
        directory.mkdir()
        (directory / ("ckpt.pt" if "checkpoint" in what else "thesis.tex")).write_text("precious")

    def state():
        files = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
        return files, sorted(tmp_path.rglob("*")), directory.is_symlink() and os.readlink(directory)

    before = state()
    said = complaint(train.main, "--run", directory, *TINY)
    assert str(directory) in said and "not the output of an earlier run" in said
    assert state() == before

# ---- One sentence about what is wrong ----------------------------------------------------------------------

def test_a_failing_command_prints_one_sentence_and_no_traceback(tmp_path):
    for script, options in (("train.py", ["--eval-only"]), ("sample.py", [])):
        err = run(script, *options, "--run", tmp_path / "none", ok=False)
        assert err.count("\n") == 1 and str(tmp_path / "none" / "ckpt.pt") in err

@pytest.fixture
def in_an_empty_directory(tmp_path, monkeypatch):
    """Checks that nothing is trained, and that nothing is written: not even to the default directory."""
    def train_vae(*_):
        raise AssertionError("training began")

    directory = tmp_path / "empty"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr(train, "train_vae", train_vae)
    yield
    assert not list(directory.iterdir())

NUMBERS = {f.name: (kind, f.type) for kind in (Config, Run) for f in fields(kind) if f.type in (int, float)}
WRONG = [
    *((name, "-1") for name in NUMBERS),
    *((name, "0") for name, (_, number) in NUMBERS.items() if number is int and name != "seed"),
    *((name, x) for name, (_, number) in NUMBERS.items() if number is float for x in ("nan", "inf", "-inf")),
    *((name, "1.5") for name in ("caption_first", "unconditional_share", "noise_cap", "ema", "eta")),
    ("caption_first", "0"), ("unconditional_share", "1"), ("ema", "1"), ("t_power", "0"), ("eval_n", "1"),
    ("patch_size", "3"), ("dim", "101"), ("n_heads", "1000"), ("code_levels", "1"), ("latent_size", "5"),
    ("image_size", "33"), ("lr", "0"), ("clip", "0"),
]

def test_every_number_is_checked():
    for name, value in WRONG:
        kind, number = NUMBERS[name]
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            check_options({name: number(value)})
            check_config(kind(**{name: number(value)}))

def test_train_checks_every_number_before_it_does_anything(in_an_empty_directory):
    for name, value in dict(WRONG).items():  # one value for each
        said = complaint(train.main, f"--{name.replace('_', '-')}={value}", "--device", "cpu")
        assert re.search(rf"\b{name}\b", said), (name, value, said)

def test_train_checks_the_options_of_a_run_that_is_continued(trained, in_an_empty_directory):
    run_, before = ["--run", trained[0]], (trained[0] / "ckpt.pt").stat().st_mtime_ns
    for name, value in (("sample_steps", 0), ("guidance_scale", "nan"), ("eval_n", 1), ("eta", 2)):
        option = "--" + name.replace("_", "-")
        for how in (["--resume", *run_], ["--eval-only", *run_], ["--init", trained[0]]):
            assert f"{name} must be" in complaint(train.main, *how, option, value)
    for name, value in (("batch_size", 0), ("lr", "nan"), ("caption_first", 2)):
        option = "--" + name.replace("_", "-")
        assert f"{name} must be" in complaint(train.main, "--init", trained[0], option, value)
    assert "noise_cap must be" in complaint(train.main, "--init", trained[0], "--noise-cap", 2)
    assert (trained[0] / "ckpt.pt").stat().st_mtime_ns == before

def test_train_says_in_one_sentence_what_is_wrong(trained, in_an_empty_directory, capsys):
    assert "no checkpoint at" in complaint(train.main, "--resume", "--run", "x")
    assert "no checkpoint at runs/edit/ckpt.pt" in complaint(train.main, "--resume", "--task", "edit")
    assert "dim (101)" in complaint(train.main, "--dim", 101)
    run_ = ["--run", trained[0]]
    for options in (["--resume", "--dim", 64], ["--eval-only", "--preset=tiny"], ["--resume", "--init", "x"]):
        assert "only these can be given" in complaint(train.main, *options, *run_)
    for options in (["--patch-size", 4], ["--preset", "tiny"]):
        assert "takes the model from" in complaint(train.main, "--init", trained[0], *options)
    assert "--init and --run are both" in complaint(train.main, "--init", trained[0], *run_)
    assert "x/ckpt.pt" in complaint(train.main, "--init", "x", "--task", "edit")
    assert "batch_size must be at least 1" in complaint(train.main, "--batch-size", 0)
    assert "is not available" in complaint(train.main, "--device", "tpu9")
    for options in (["--image-size", 64], ["--preset", "0.16B"], ["--preset", "7B", "--task", "edit"]):
        said = complaint(train.main, *options)
        assert "32 pixels" in said and "image_size is" in said
    wrong = {
        "--steps": "many", "--lr": "fast", "--optimizer": "sgd", "--target": "noise", "--preset": "8B",
        "--task": "chess", "--model": "gpt", "--patch-encoder": "mlp", "--no-such-option": "1",
    }
    for option, value in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            train.main([option, value])
        assert option in capsys.readouterr().err

@pytest.mark.parametrize("option, value", [("--optimizer", "adamw"), ("--task", "edit"), ("--seed", 1)])
def test_a_resumed_run_cannot_change_what_it_trains_on(trained, tmp_path, option, value):
    shutil.copytree(trained[0], tmp_path / "x")
    for mode in ("--resume", "--eval-only"):
        said = complaint(train.main, mode, option, value, "--run", tmp_path / "x")
        assert "only these can be given" in said and "--guidance-scale" in said

@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    if content is None:
        torch.save({"somebody": "else's"}, tmp_path / "ckpt.pt")
    else:
        (tmp_path / "ckpt.pt").write_bytes(content)
    for main, option in ((train.main, "--eval-only"), (train.main, "--resume"), (sample.main, "a")):
        said = complaint(main, option, "--run", tmp_path)
        assert str(tmp_path / "ckpt.pt") in said and "not a checkpoint" in said
    assert "not a checkpoint" in complaint(train.main, "--init", tmp_path, "--run", tmp_path / "x")
    assert not (tmp_path / "x").exists()

# ---- sample.py ---------------------------------------------------------------------------------------------

def test_sample_takes_runs_shapes_unless_told_otherwise(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newer = tmp_path / "runs" / "newer"
    newer.mkdir(parents=True)
    (newer / "ckpt.pt").write_text("not a checkpoint")
    quick = ["--steps", 2, "--max-tokens", 5, "--max-images", 0]
    assert "no checkpoint at runs/shapes/ckpt.pt" in complaint(sample.main, "a red", *quick)
    (tmp_path / "runs" / "shapes").mkdir()
    shutil.copy(trained[0] / "ckpt.pt", "runs/shapes")
    os.utime(newer / "ckpt.pt")
    assert call(sample.main, "a red", *quick).startswith("a red")
    assert "newer/ckpt.pt is not a checkpoint" in complaint(sample.main, "a red", "--run", newer)

def test_sample_captions_continues_and_starts_from_nothing(trained, tmp_path):
    """An untrained model writes anything; the prompt, and what it writes and draws, must get through."""
    Image.new("RGB", (70, 50), "red").save(tmp_path / "red.png")
    common = ["--run", trained[0], "--steps", 2, "--out", tmp_path / "out", "--max-tokens", 20]
    out = run("sample.py", f"a red circle. <{tmp_path / 'red.png'}> so", *common)
    assert out.startswith("a red circle. [BOI] (picture) [EOI] so")
    long = "x" * 300
    prompts = ["a red circle", "hello", f"<{tmp_path / 'red.png'}>", long]
    several = call(sample.main, *prompts, *common).splitlines()
    assert all(map(str.startswith, several, ["a red", "hello", "[BOI] (picture) [EOI]", long]))
    free = [call(sample.main, *common, "--seed", seed).split("\n")[0] for seed in (3, 3, 4)]
    assert free[0] and free[0] == free[1] != free[2]

def test_sample_switches_to_diffusion_and_writes_the_pictures(trained, tmp_path):
    """A model to which all tokens are equally likely predicts BOI sooner or later. It draws, and goes on."""
    checkpoint = torch.load(trained[0] / "ckpt.pt", weights_only=True)
    checkpoint["ema"]["lm_head.weight"][:] = 0
    checkpoint["vae"]["std"] *= 100  # so that no two frames of the GIF are equal; Pillow would make them one
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    out = call(sample.main, "a red circle.", "a blue ring.", "--run", tmp_path, "--out", tmp_path / "out",
               "--steps", 5, "--temperature", 1, "--max-tokens", 600, "--max-images", 1, "--seed", 1)
    lines = out.splitlines()
    drawn = sum(line.count("[BOI] . [EOI]") for line in lines)  # a dot for five steps
    assert drawn >= 1
    paths = [line.split() for line in lines[-drawn:]]  # where the pictures are is said last
    assert [(Path(png).name, Path(gif).name) for png, gif in paths] == [
        (f"{i:03d}.png", f"{i:03d}.gif") for i in range(1, drawn + 1)]
    png, gif = paths[0]
    assert Image.open(png).size == (256, 256)
    assert Image.open(gif).n_frames == 5  # one for every denoising step
    shown = load_picture(png, 32)  # and the picture can be given back to the model as it was
    assert (np.asarray(Image.open(png))[::8, ::8] == shown).all()
    before = Path(png).read_bytes()
    png, _ = sample.save_drawing(np.stack([shown, shown]), tmp_path / "out")
    assert png.name == f"{drawn + 1:03d}.png"  # none is overwritten
    assert Path(paths[0][0]).read_bytes() == before

def test_sample_says_in_one_sentence_what_is_wrong(trained, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "directory.png").mkdir()
    for name in ("missing.png", "text.png", "empty.png", "half.png", "directory.png"):
        assert name in complaint(sample.main, f"a <{tmp_path / name}>", "--run", trained[0])
    assert "no checkpoint" in complaint(sample.main, "a", "--run", tmp_path)
    assert "is not available" in complaint(sample.main, "a", "--device", "tpu9")
    wrong = {
        "--steps": ["0", "-1", "nan", "2.5"], "--temperature": ["-1", "nan", "inf"],
        "--eta": ["2", "-0.1", "nan"],
        "--guidance-scale": ["nan", "inf", "-1", "strong"], "--max-tokens": ["0"], "--max-images": ["-1"],
        "--seed": ["-1", "x"], "--out": [str(tmp_path / "text.png")], "--sampler": ["ddpm"],
    }
    before = sorted(tmp_path.rglob("*"))
    for option, values in wrong.items():
        for value in values:
            with pytest.raises(SystemExit, match="2"):
                sample.main(["a", option, value, "--run", str(trained[0])])
            assert option in capsys.readouterr().err.splitlines()[-1], (option, value)
    assert sorted(tmp_path.rglob("*")) == before

# ---- Parts -------------------------------------------------------------------------------------------------

def test_every_field_is_an_option_with_its_comment_as_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    text = capsys.readouterr().out
    for options in (Config, Run):
        lines = inspect.getsource(options).splitlines()
        for f in fields(options):
            (comment,) = (line.split("  # ")[1] for line in lines if line.startswith(f"    {f.name}: "))
            option = "--" + f.name.replace("_", "-")
            (shown,) = (chunk for chunk in re.split("\n  (?=-)", text) if re.match(rf"{option}[ ,\n]", chunk))
            assert comment in shown and (f.default == "" or f"[{f.default}]" in shown), option
    given = parse_options(["--noise-cap", "1", "--no-qk-norm", "--dim", "64"])
    assert given["noise_cap"] == 1.0 and given["qk_norm"] is False and given["dim"] == 64

def test_muon_makes_the_update_of_the_librarys():
    torch.manual_seed(0)
    sizes = [(24, 24), (24, 24), (24, 64), (64, 24)]
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(i)))
         for i, size in enumerate(sizes)] for _ in range(2)
    )
    groups = [{"params": ours[:2]}, {"params": ours[2:3]}, {"params": ours[3:]}]
    library = {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}
    optimizers = (
        Muon(groups, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, **library),
    )
    before = [p.detach().clone() for p in ours]
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for old, p, q in zip(before, ours, theirs):
        moved, expected = (p - old).detach(), (q - old).detach()
        assert (moved - expected).norm() < 0.03 * expected.norm()  # the library computes in bf16

def test_the_optimizers_take_every_parameter_once_and_decay_no_norms():
    for cfg in (PRESETS["tiny"], replace(PRESETS["tiny"], patch_encoder="unet")):
        model = Transfusion(cfg, Tokenizer(shapes.WORDS))
        for name in ("muon", "adamw"):
            optimizers = make_optimizers(model, Run(optimizer=name))
            assert len(optimizers) == 1 + (name == "muon")
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            taken = [p for group in groups for p in group["params"]]
            assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))
            for group in groups:
                for p in group["params"]:
                    assert group["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0)
                    assert group.get("lr_scale", 1) == (0.5 if p.dim() > 2 else 1)  # the U-Net's convolutions

def test_the_learning_rate_warms_up_and_ends_at_five_percent():
    run_ = Run(lr=1.0, warmup=10, steps=100)
    rates = [learning_rate(run_, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.05, abs=0.01)
    assert learning_rate(replace(run_, steps=5), 2) == pytest.approx(0.3)

def test_likelihood_ranks_by_the_whole_text():
    """Against a sum by hand over the positions that count."""
    tokenizer = Tokenizer(shapes.WORDS)
    torch.manual_seed(0)
    model = Transfusion(PRESETS["tiny"], tokenizer).requires_grad_(False)
    torch.nn.init.normal_(model.lm_head.weight)
    texts = ["a red circle.", "a blue square left of a red ring."]
    no_images = torch.zeros(0, *model.cfg.latent_shape), torch.zeros(0)  # and their times
    for special_token in (BOI, EOS):
        log_p, count_ = Trained(model, None, Run()).log_likelihood(texts, draws=special_token == BOI)
        for i, text in enumerate(texts):
            tokens = [1, *tokenizer.encode(text), special_token]
            ids = torch.tensor([tokens])
            logits, _ = model(Batch(ids, None, torch.full_like(ids, -1), *no_images, None))
            by_hand = sum(logits[0, j].log_softmax(-1)[tokens[j + 1]] for j in range(len(tokens) - 1))
            assert log_p[i] == pytest.approx(by_hand.item(), abs=1e-3) and count_[i] == len(tokens) - 1

def test_the_scores_of_a_drawing_see_a_black_picture_where_none_was_drawn(trained):
    """And a drawing goes to its own prompt, not to the one before it."""
    _, model, vae = load_checkpoint(trained[0], "cpu")
    answerer = Trained(model, vae, Run(sample_steps=2))
    drawing = torch.randn(model.cfg.latent_shape, generator=torch.Generator().manual_seed(0))
    answerer.complete = lambda prompts, **_: [[*prompts[0], "no"], [*prompts[1], drawing], [*prompts[2]]]
    black = np.zeros((32, 32, 3), np.uint8)
    drawn = answerer.draw([["a"], [black, "make it green."], [black, "b"]], 2.0)
    assert (drawn[[0, 2]] == 0).all() and (drawn[1] == vae.decode(drawing[None])[0].numpy()).all()
