"""Shared by the tests: how to run a script, where, and one trained run for the whole session."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import train

torch.set_num_threads(1)  # the fastest for models as small as these
ROOT = Path(__file__).parents[1]
SMALL_MODEL = {"dim": 32, "n_layers": 2, "n_heads": 2, "vae_dim": 8}
SMALL_RUN = {
    "documents": 400, "vae_steps": 10, "steps": 12, "evaluations": 3, "batch_size": 8,
    "eval_n": 20, "sample_steps": 2, "device": "cpu", "lr": 0.01,
}

def as_options(settings):
    """{"eval_n": 20} -> ["--eval-n", "20"]"""
    return [word for k, v in settings.items() for word in ("--" + k.replace("_", "-"), str(v))]

SMALL = as_options(SMALL_RUN)
TINY = as_options(SMALL_MODEL | SMALL_RUN)  # a whole run of train.py takes some 3 seconds

def start(script, *options, **environment):
    """A script in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, text=True, env=environment, **pipes)

def call(main, *options):
    """main() in this process, which is faster. Returns what it prints."""
    with redirect_stdout(io.StringIO()) as out:
        main(list(map(str, options)))
    return out.getvalue()

def complaint(main, *options):
    """The line with which a script gives up. (Python prints it, and exits with status 1.)"""
    with redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
        main(list(map(str, options)))
    assert "\n" not in stop.value.code
    return stop.value.code

def metrics_of(directory):
    return json.loads(Path(directory, "metrics.json").read_text())

def checkpoint_of(directory):
    return torch.load(Path(directory, "ckpt.pt"), weights_only=True)

@pytest.fixture(autouse=True)
def _in_a_new_directory(tmp_path):
    """Each test runs in an empty directory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        yield

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run that no test may change: its output directory, and what was printed."""
    directory = tmp_path_factory.mktemp("runs") / "shapes"
    return directory, call(train.main, "--run", directory, *TINY)
