"""train.py as a person runs it, but tiny; and its parts."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from data.tasks import TASKS, Shapes
from tests.conftest import (
    ROOT,
    SMALL,
    SMALL_MODEL,
    SMALL_RUN,
    TINY,
    call,
    checkpoint_of,
    complaint,
    metrics_of,
    start,
)
from train import PRESETS, Muon, Run, build, learning_rate, make_optimizers, parse_options
from transfusion import Config, Transfusion

QUICK = [*TINY, "--eval-n", 4, "--steps"]  # and a number of steps

@pytest.fixture(autouse=True)
def _restore_ctrl_c():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)

@pytest.fixture
def copy(trained):
    """A copy of the finished run, which a test may change."""
    return shutil.copytree(trained[0], Path("copy"))

def break_loss(monkeypatch, step, broken):
    """In this step, the loss is broken(model, loss)."""
    loss, steps = Transfusion.loss, count(1)

    def new_loss(model, documents, *args):
        value, parts = loss(model, documents, *args)
        if next(steps) == step:
            value = broken(model, value)
        return value, parts

    monkeypatch.setattr(Transfusion, "loss", new_loss)

def files_in(directory="."):
    """All paths in a directory, and the content of the files."""
    return {path: path.is_file() and path.read_bytes() for path in Path(directory).rglob("*")}

def flat(weights):
    """All weights of a model as one vector."""
    return torch.cat([weight.flatten() for weight in weights.values()])

def assert_same_training(directory, other):
    """The same model, averaged model, VAE, state of the optimisers and scores, bit for bit."""
    one, two = checkpoint_of(directory), checkpoint_of(other)
    for name in ("step", "model", "ema", "vae", "optimizers"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    assert one["drawings"][-1].equal(two["drawings"][-1])
    assert len(one["drawings"]) == len(one["history"])
    assert metrics_of(directory)["scores"] == metrics_of(other)["scores"]

# ---- A whole run ---------------------------------------------------------------------------------

TASK_OPTIONS = [f"--task={name}" for name in TASKS if name != "folder"]

@pytest.mark.parametrize("option", [*TASK_OPTIONS, "--model=chameleon"])
def test_a_whole_run(option):
    directory = Path("x")
    out = call(train.main, "--run", directory, option, *TINY)
    metrics = metrics_of(directory)
    for score, (value, beside) in metrics["scores"].items():
        assert re.search(rf"^{score} +{value:.4f} +{re.escape(beside)}$", out, re.MULTILINE)
    rows = list(csv.DictReader((directory / "log.csv").open()))
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    assert {"loss_text", "loss_image", *metrics["scores"]} <= set(rows[0])
    for learned in ("loss_text", "text_ppl"):
        assert float(rows[0][learned]) > float(rows[1][learned]) > float(rows[2][learned])

    names = {"ckpt.pt", "run.json", "log.csv", "metrics.json", "figure.png", "progress.png"}
    if option == "--task=text":
        names.remove("progress.png")
    assert {path.name for path in directory.iterdir()} == names
    settings = json.loads((directory / "run.json").read_text())
    defaults = TASKS[settings["run"]["task"]].defaults | SMALL_RUN
    assert defaults.items() <= (settings["cfg"] | settings["run"]).items()

def test_init_starts_from_another_run(trained):
    before = files_in(trained[0])
    options = ["--task=edit", "--init", trained[0], "--lr", 1e-3]
    assert "Training the VAE" not in call(train.main, *SMALL, *options, "--steps", 1)
    assert files_in(trained[0]) == before
    old, new = checkpoint_of(trained[0]), checkpoint_of("runs/edit")
    assert new["cfg"]["noise_cap"] == TASKS["edit"].defaults["noise_cap"]
    torch.testing.assert_close(new["vae"], old["vae"], rtol=0, atol=0)
    start = flat(old["ema"])
    for name in ("model", "ema"):
        assert 0 < start.dist(flat(new[name])) < 0.03 * start.norm()  # fresh: 0.4 or more

def test_a_run_of_text_alone_goes_on_with_pictures():
    call(train.main, *QUICK, 1, "--task", "text")
    assert "Training the VAE" in call(train.main, *QUICK, 1, "--init", "runs/text")
    before, after = checkpoint_of("runs/text")["vae"], checkpoint_of("runs/shapes")["vae"]
    assert not any(before[name].equal(after[name]) for name in before)

def test_resume_extends_a_run(trained, copy):
    call(train.main, "--resume", "--run", copy, "--steps", 14)
    before, after = checkpoint_of(trained[0]), checkpoint_of(copy)
    assert after["step"] == after["run"]["steps"] == metrics_of(copy)["step"] == 14
    assert [row["step"] for row in after["history"]] == [4, 8, 12, 14]
    height = Image.open(trained[0] / "progress.png").height
    assert Image.open(copy / "progress.png").height == height * 4 / 3
    assert after["minutes"] > before["minutes"]
    assert not flat(after["model"]).equal(flat(before["model"]))
    assert not flat(after["model"]).equal(flat(after["ema"]))

def test_eval_only_reproduces_the_table_and_takes_other_options(trained, copy):
    (copy / "metrics.json").unlink()
    call(train.main, "--eval-only", "--run", copy)
    assert metrics_of(copy)["scores"] == metrics_of(trained[0])["scores"]
    assert "6 held-out" in call(train.main, "--eval-only", "--run", copy, "--eval-n", 6)
    assert (copy / "ckpt.pt").read_bytes() == (trained[0] / "ckpt.pt").read_bytes()

# ---- Stopping and going on -----------------------------------------------------------------------

@pytest.mark.parametrize("step", [2, 12])  # before the first evaluation, and in the last step
def test_after_ctrl_c_the_run_goes_on_as_if_nothing_had_happened(step, trained, monkeypatch):
    def press_ctrl_c(model, loss):
        os.kill(os.getpid(), signal.SIGINT)
        return loss

    break_loss(monkeypatch, step, press_ctrl_c)
    said = complaint(train.main, "--run", "my run", *TINY)
    assert f"step {step}" in said
    assert "--resume --run 'my run'" in said
    assert checkpoint_of("my run")["step"] == step
    monkeypatch.undo()
    assert "held-out examples" in call(train.main, "--eval-only", "--run", "my run")
    call(train.main, "--resume", "--run", "my run")
    assert_same_training("my run", trained[0])
    steps = [row["step"] for row in checkpoint_of(trained[0])["history"]]
    assert [row["step"] for row in checkpoint_of("my run")["history"]] == sorted({step, *steps})

def test_the_best_weights_are_kept_where_a_task_has_a_held_out_loss(monkeypatch):
    """The second of three evaluations is the best here. The fourth is the final table."""
    losses, weights, evaluate = iter([3.0, 1.0, 2.0, 4.0]), [], Shapes.evaluate

    def with_held_out_loss(self, trained, *args):
        weights.append(flat(trained.model.state_dict()))
        report = evaluate(self, trained, *args)
        report.scores["held_out_loss"] = next(losses), ""
        return report

    monkeypatch.setattr(Shapes, "evaluate", with_held_out_loss)
    assert "weights of step 8" in call(train.main, *TINY)
    assert weights[3].equal(weights[1])
    assert not weights[3].equal(weights[2])
    assert weights[1].equal(flat(checkpoint_of("runs/shapes")["best"]))

def test_files_that_are_open_in_another_program_do_not_stop_a_run(monkeypatch):
    replace, tries = os.replace, count(1)

    def fails_at_first(*paths):
        if next(tries) == 1:
            raise PermissionError("in use")
        replace(*paths)

    def cannot_save(self, path):
        raise PermissionError("in use")

    monkeypatch.setattr(os, "replace", fails_at_first)
    monkeypatch.setattr(Image.Image, "save", cannot_save)
    out = call(train.main, *TINY)
    assert "progress.png could not be written: in use" in out
    assert "figure.png could not be written: in use" in out
    assert checkpoint_of("runs/shapes")["step"] == 12

def test_consoles_that_know_few_characters_do_not_stop_a_run():
    """Nor does a variable of torchrun that something else has set."""
    process = start("train.py", "--run", "\U0001f600", *TINY, "--steps", 1,
                    PYTHONIOENCODING="cp1252", RANK="1")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert "The results are in" in out

def test_an_interrupted_write_leaves_the_checkpoint_before_it(trained, monkeypatch):
    save, writes = torch.save, count(1)

    def save_half(checkpoint, path):
        save(checkpoint, path)
        if next(writes) == 2:
            os.truncate(path, 1000)
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        call(train.main, *TINY)
    monkeypatch.undo()
    assert checkpoint_of("runs/shapes")["step"] == 4
    call(train.main, "--resume")
    assert_same_training("runs/shapes", trained[0])

def test_nan_stops_the_run_and_the_checkpoint_is_kept(monkeypatch):
    def nan_gradient(model, loss):
        """The loss is the same, but the gradient of the square root of 0 is infinite."""
        return loss + (model.lm_head.weight.sum() * 0).sqrt()

    break_loss(monkeypatch, 8, nan_gradient)  # an evaluation would follow
    said = complaint(train.main, *TINY)
    assert "step 8" in said and "nan" in said
    checkpoint = checkpoint_of("runs/shapes")
    assert checkpoint["step"] == 4
    assert flat(checkpoint["model"]).isfinite().all()

def test_errors_of_the_code_keep_their_traceback(monkeypatch):
    def raise_error(model, loss):
        raise RuntimeError("a bug")

    break_loss(monkeypatch, 1, raise_error)
    with pytest.raises(RuntimeError, match="a bug"):
        call(train.main, *TINY)

# ---- Parts of a batch ----------------------------------------------------------------------------

def test_accumulate_averages_the_gradients_of_the_parts(monkeypatch):
    sizes, gradients = [], []
    factors = iter([1e-6, 3e-6] * 2)  # so small that no gradient is clipped

    def loss(model, documents, *_):
        sizes.append(len(documents))
        value = next(factors) * sum(p.sum() for p in model.parameters())
        return value, {"text": value}

    def look(optimizer, *_):
        for group in optimizer.param_groups:
            gradients.extend(p.grad.flatten() for p in group["params"])

    monkeypatch.setattr(Transfusion, "loss", loss)
    hook = register_optimizer_step_pre_hook(look)
    call(train.main, *QUICK, 2, "--vae-steps", 0, "--accumulate", 2)
    hook.remove()
    assert sizes == [4] * 4
    gradients = torch.cat(gradients)
    torch.testing.assert_close(gradients * 1e6, torch.full_like(gradients, 2.0))

def in_one_of_two_processes():
    """What each of the processes of the test below does."""
    loss, batches = Transfusion.loss, []

    def remember(model, documents, *args):
        batches.append((model, documents))
        return loss(model, documents, *args)

    Transfusion.loss = remember
    train.main(TINY)
    model, documents = batches[-1]
    processes = [None, None]
    dist.all_gather_object(processes, (flat(model.state_dict()).tolist(), str(documents)))
    (weights, documents), (other_weights, other_documents) = processes
    assert weights == other_weights
    assert documents != other_documents

    for p in model.parameters():
        p.grad = torch.full_like(p, dist.get_rank())
    train.average_gradients(model, 2)
    assert all((p.grad == 0.5).all() for p in model.parameters())

def test_two_processes_train_one_model(trained, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [sys.executable, *torchrun, __file__]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for line in ("Training the VAE", "held-out examples"):
        assert result.stdout.count(line) == 1
    assert os.listdir("runs") == ["shapes"]
    one, two = (checkpoint_of(run)["history"] for run in (trained[0], "runs/shapes"))
    assert two[-1]["loss_text"] == pytest.approx(one[-1]["loss_text"], rel=0.1)

def test_processes_on_the_cpu_need_no_gpu_where_there_is_one(monkeypatch):
    backends = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", backends.append)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(train.atexit, "register", print)
    assert train.start_processes("cpu") == (torch.device("cpu"), 0, 2)
    assert backends == ["gloo"]

# ---- The output directory ------------------------------------------------------------------------

def test_a_second_run_renames_the_first(copy):
    before = (copy / "ckpt.pt").read_bytes()
    copy.with_name("copy.1").mkdir()  # this name is taken
    assert "copy.2" in call(train.main, "--run", copy, *QUICK, 1)
    assert (copy.with_name("copy.2") / "ckpt.pt").read_bytes() == before

def test_what_is_not_the_output_of_a_run_is_left_alone():
    Path("a file").write_text("precious")
    Path("a dangling link").symlink_to("nowhere")
    for name in ("thesis.tex", "ckpt.pt"):
        directory = Path(f"only {name}")
        directory.mkdir()
        (directory / name).write_text("precious")
    before = files_in()
    for name in os.listdir():
        said = complaint(train.main, "--run", name, *TINY)
        problem = "Cannot write" if "link" in name else "not the output"
        assert name in said and problem in said
    assert files_in() == before

# ---- One sentence about what is wrong ------------------------------------------------------------

@pytest.mark.parametrize("options, word", [
    ("--resume --task edit", "no checkpoint at runs/edit/ckpt.pt"),
    ("--eval-only --model chameleon", "no checkpoint at runs/chameleon/ckpt.pt"),
    ("--init nowhere", "no checkpoint at nowhere/ckpt.pt"),
    ("--device tpu9", "tpu9"),
    ("--image-size 64", "64"),
    ("--dim 101", "dim"),
    ("--dim 0", "dim"),
    ("--n-heads 0", "n_heads"),
    ("--n-heads 5", "n_heads"),
    ("--n-layers 0", "n_layers"),
    ("--patch-size 3", "patch_size"),
    ("--patch-size 0", "at least 1"),
    ("--latent-channels 0", "at least 1"),
    ("--latent-size 0", "latent_size"),
    ("--image-size 48", "latent_size"),
    ("--image-size 8", "latent_size"),
    ("--evaluations 0", "at least 1"),
    ("--steps -1", "steps"),
    ("--t-power 0", "t_power"),
    ("--noise-cap 1.5", "noise_cap"),
    ("--caption-first nan", "caption_first"),
    ("--batch-size 8 --accumulate 3", "divided"),
    ("--task folder", "--data"),
    ("--data somewhere --task text", "--data"),
])
def test_wrong_options_give_one_sentence(options, word):
    assert word in complaint(train.main, *TINY, *options.split())
    assert not os.listdir()

@pytest.mark.parametrize("content", [b"", b"a text", None])
def test_a_broken_checkpoint_is_named(content):
    path = Path("ckpt.pt")
    if content is None:
        torch.save({"somebody": "else's"}, path)
    else:
        path.write_bytes(content)
    before = files_in()
    for option in ("--resume", "--eval-only", "--init=."):
        assert "ckpt.pt cannot be used" in complaint(train.main, option, "--run", ".")
    assert files_in() == before

@pytest.mark.parametrize("options, word", [
    ("--init copy --dim 64", "lm_head.weight"),
    ("--resume --run copy --dim 64", "lm_head.weight"),
    ("--resume --run copy --optimizer adamw", "optimizer"),
])
def test_a_checkpoint_that_does_not_fit_names_what_differs(options, word, copy):
    before = files_in()
    with pytest.raises(SystemExit, match=word):  # the message has a line for each weight
        call(train.main, *SMALL, *options.split())
    assert files_in() == before

@pytest.mark.parametrize("script, option", [("train.py", "--resume"), ("sample.py", "a red")])
def test_a_failing_command_prints_one_line(script, option):
    process = start(script, option, "--run", "nowhere")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and not out
    assert err.count("\n") == 1 and "nowhere/ckpt.pt" in err

# ---- Options, optimisers, sizes ------------------------------------------------------------------

def test_every_field_is_an_option_with_its_comment_as_help(capsys, monkeypatch):
    @dataclass
    class Hacked:
        share: float = -0.5  # 100 % of it
        uncommented: int = 3
        on: bool = True

    monkeypatch.setattr(train, "Run", Hacked)
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit, match="0"):
        parse_options(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "100 % of it [-0.5]" in text and "--uncommented" in text
    given = {"share": -2.0, "on": False, "noise_cap": 1.0}
    assert parse_options(["--share", "-2", "--no-on", "--noise-cap", "1"]) == given
    with pytest.raises(SystemExit, match="2"):
        parse_options(["--target=noise"])

def test_muon_takes_the_steps_of_the_librarys():
    torch.manual_seed(0)
    before = [torch.randn(size) for size in [(24, 24), (24, 24), (24, 64), (64, 24)]]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in before] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    muon = Muon([{"params": group} for group in (ours[:2], ours[2:3], ours[3:])], settings)
    library = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", ns_steps=3, **settings)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        library.step()
    for w, p, q in zip(before, ours, theirs):
        assert (p - q).norm() < 0.03 * (w - q).norm()  # the library computes in bf16

@pytest.mark.parametrize("patch_encoder", ["linear", "unet"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_optimizers_take_every_parameter_and_vectors_do_not_decay(patch_encoder, name):
    model = Transfusion(Config(**SMALL_MODEL, patch_encoder=patch_encoder), n_text=300)
    optimizers = make_optimizers(model, Run(optimizer=name))
    assert any(isinstance(optimizer, Muon) for optimizer in optimizers) == (name == "muon")
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    taken = [p for group in groups for p in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, model.parameters()))
    for group in groups:
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() > 1)

def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 1000, peak=0.3) for step in range(1000)]
    peak = rates.index(max(rates))
    assert rates[0] < 0.03
    assert 10 < peak < 50
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
    assert rates[peak] == pytest.approx(0.3) and rates[-1] < 0.001

@pytest.mark.parametrize("name", ["0.16B", "0.37B", "0.76B", "1.4B", "7B"])
def test_the_presets_have_the_sizes_of_the_paper(name):
    with torch.device("meta"):
        model = Transfusion(build(Config, PRESETS[name]), n_text=32_000)
    n_params = sum(p.numel() for p in model.parameters())
    assert n_params == pytest.approx(1e9 * float(name[:-1]), rel=0.06)

def test_presets_and_tasks_set_only_options_that_exist():
    options = {field.name for kind in (Config, Run) for field in fields(kind)}
    for defaults in [*PRESETS.values(), *[task.defaults for task in TASKS.values()]]:
        assert options >= set(defaults)

if __name__ == "__main__":
    in_one_of_two_processes()
