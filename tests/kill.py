"""Kill a training run at random moments and resume it: python -m tests.kill [times]

It must end in exactly the weights of a run that was left alone. Each time takes some 15 seconds.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
OPTIONS = ["--preset", "tiny", "--documents", "400", "--vae-steps", "10", "--eval-every", "10",
           "--batch-size", "8", "--eval-n", "20", "--sample-steps", "2", "--device", "cpu"]

def start(*options):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

def finish(process):
    _, error = process.communicate()
    if process.returncode != 0:
        sys.exit(f"The run did not end well: {error}")

def weights(directory):
    checkpoint = torch.load(directory / "ckpt.pt", weights_only=True)
    return checkpoint["step"], {**checkpoint["model"], **{f"ema.{k}": v for k, v in checkpoint["ema"].items()}}

def main(times):
    options = [*OPTIONS, "--steps", 100 * times]
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        begin = time.time()
        finish(start("--run", alone, *options))
        duration = time.time() - begin
        for i in range(times):
            process = start("--run", killed, *(["--resume"] if (killed / "ckpt.pt").is_file() else options))
            time.sleep(random.uniform(1, 5 + 1.5 * duration / times))
            process.kill()
            process.communicate()
            step = weights(killed)[0] if (killed / "ckpt.pt").is_file() else 0
            print(f"killed {i + 1} times, checkpoint at step {step}", flush=True)
        finish(start("--resume", "--run", killed))
        (step, a), (other_step, b) = weights(alone), weights(killed)
        assert step == other_step and a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert (alone / "log.csv").read_text() == (killed / "log.csv").read_text()
    print("The weights and the log are those of the run that was left alone, bit for bit.")

if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
