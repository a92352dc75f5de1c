"""The paper's tables at toy scale, with several seeds per row:

    python -m data.experiments attention target     train the runs of two tables, and print them
    python -m data.experiments --show --results data/results.json     print the published results

Every run trains on one thread and goes to runs/experiments. Finished runs are not repeated, and
interrupted runs are resumed. To add a row, add a line to RUNS and one to a table.
"""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import plots
from data.compare import drawings, markdown

TRAIN = Path(__file__).parents[1] / "train.py"
DIRECTORY = Path("runs/experiments")
SCORES = "draw_acc", "frechet", "caption_acc", "text_ppl"  # the columns of all tables

# Options of train.py. The first group has about the FLOPs of the default. The second has its number
# of steps, at other widths (and Chameleon the same FLOPs). The third learns more slowly, and has
# twice the FLOPs of the default. The fourth has other widths, too: linear patches with the steps of
# `eps`, and U-Nets with the same FLOPs.
RUNS = {
    "default": "",
    "causal": "--no-bidirectional",
    "no-cap": "--noise-cap 1",
    "64-patches": "--patch-size 1 --batch-size 13",
    "chameleon": "--model chameleon --lr 8e-3 --steps 3100",
    "text": "--task text",

    "small": "--dim 64 --n-heads 4",
    "small-chameleon": "--dim 64 --n-heads 4 --model chameleon --lr 8e-3 --steps 3100",
    "large": "--dim 128 --n-heads 8",
    "large-chameleon": "--dim 128 --n-heads 8 --model chameleon --lr 8e-3 --steps 3100",

    "eps": "--steps 6600 --target eps --t-power 1",
    "eps-unet": "--steps 4000 --target eps --t-power 1 --patch-encoder unet",
    "v": "--steps 6600 --target v",
    "v-unet": "--steps 4000 --target v --patch-encoder unet",
    "x0": "--steps 6600",
    "x0-causal": "--steps 6600 --no-bidirectional",
    "x0-unet": "--steps 4000 --patch-encoder unet",
    "x0-unet-causal": "--steps 4000 --patch-encoder unet --no-bidirectional",
    "64-patches-long": "--patch-size 1 --batch-size 13 --steps 6600",
    "64-patches-unet": "--patch-size 1 --batch-size 13 --steps 5280 --patch-encoder unet",
    "4-patches-long": "--patch-size 4 --batch-size 52 --steps 6600",
    "4-patches-unet": "--patch-size 4 --batch-size 52 --steps 1960 --patch-encoder unet",

    "small-eps": "--dim 64 --n-heads 4 --steps 6600 --target eps --t-power 1",
    "small-eps-unet": "--dim 64 --n-heads 4 --steps 2800 --target eps --t-power 1 "
                      "--patch-encoder unet",
    "large-eps": "--dim 128 --n-heads 8 --steps 6600 --target eps --t-power 1",
    "large-eps-unet": "--dim 128 --n-heads 8 --steps 4830 --target eps --t-power 1 "
                      "--patch-encoder unet",
}
# The paper's choices, at toy scale.
PAPER = (
    "--preset laptop-paper --n-layers 6 --batch-size 64 --caption-first 0.8 --guidance-scale 3 "
    "--sample-steps 250 --eta 1"
)
# About half an hour on one thread:
RUNS["paper-unet-short"] = f"{PAPER} --patch-encoder unet --steps 5400 --eval-every 1350"
RUNS["paper-linear-short"] = f"{PAPER} --steps 7700 --eval-every 1925"
RUNS["paper-unet"] = f"{PAPER} --patch-encoder unet --steps 9000 --eval-every 1500"
RUNS["paper-linear"] = f"{PAPER} --steps 12000 --eval-every 2000"
MODELS = "default", "chameleon"
RATES = "2e-3", "4e-3", "8e-3", "16e-3"
for rate in RATES:  # the learning-rate search, on the validation split
    RUNS[f"default-{rate}"] = f"--steps 3300 --eval-split val --lr {rate}"
    RUNS[f"chameleon-{rate}"] = f"--steps 3300 --eval-split val --lr {rate} --model chameleon"

class Table(NamedTuple):
    """The runs that a table compares."""
    title: str
    rows: dict  # {label of a row: (name of the run, the paper's result)}

TABLES = {
    "models": Table(
        "Transfusion and Chameleon at three sizes (the paper's table 3)",
        {
            "Transfusion, width 64": ("small", ""),
            "Transfusion, width 96": ("default", ""),
            "Transfusion, width 128": ("large", "FID 16.8, CIDEr 27.2, C4 7.72 (7B)"),
            "Chameleon, width 64": ("small-chameleon", ""),
            "Chameleon, width 96": ("chameleon", ""),
            "Chameleon, width 128": ("large-chameleon", "FID 29.6, CIDEr 18.0, C4 8.41 (7B)"),
        },
    ),
    "text": Table(
        "Do images hurt the text? (the paper's table 4)",
        {
            "text alone": ("text", "C4 10.1 (0.76B)"),
            "Transfusion": ("default", "C4 10.4"),
            "Chameleon": ("chameleon", "C4 11.8"),
        },
    ),
    "attention": Table(
        "Attention inside images (the paper's table 5)",
        {
            "causal, linear, half the steps": ("causal", ""),
            "bidirectional, linear, half the steps": ("default", ""),
            "causal, linear": ("x0-causal", "FID 61.3, CIDEr 12.7 (0.76B)"),
            "bidirectional, linear": ("x0", "FID 20.3, CIDEr 16.0"),
            "causal, U-Net": ("x0-unet-causal", "FID 16.8, CIDEr 23.3"),
            "bidirectional, U-Net": ("x0-unet", "FID 16.7, CIDEr 25.4"),
        },
    ),
    "patches": Table(
        "Elements per image (the paper's table 6)",
        {
            "64, linear, half the steps": ("64-patches", ""),
            "64 elements, linear": ("64-patches-long", "1024: FID 21.0, CIDEr 12.0 (0.76B)"),
            "16 elements, linear": ("x0", "256: FID 20.3, CIDEr 16.0"),
            "4 elements, linear": ("4-patches-long", "64: FID 25.6, CIDEr 14.3"),
            "64 elements, U-Net": ("64-patches-unet", ""),
            "16 elements, U-Net": ("x0-unet", "256: FID 16.7, CIDEr 25.4"),
            "4 elements, U-Net": ("4-patches-unet", "64: FID 16.0, CIDEr 29.9"),
        },
    ),
    "size": Table(
        "U-Net and linear patches by model size, target eps (the paper's table 7)",
        {
            "linear, width 64": ("small-eps", "FID 37.6, CIDEr 6.2 (0.16B)"),
            "U-Net, width 64": ("small-eps-unet", "FID 18.8, CIDEr 15.3 (0.16B)"),
            "linear, width 96": ("eps", "FID 20.3, CIDEr 16.0 (0.76B)"),
            "U-Net, width 96": ("eps-unet", "FID 16.7, CIDEr 25.4 (0.76B)"),
            "linear, width 128": ("large-eps", "FID 18.6, CIDEr 27.2 (7B)"),
            "U-Net, width 128": ("large-eps-unet", "FID 16.0, CIDEr 33.7 (7B)"),
        },
    ),
    "noise-cap": Table(
        "The noise cap (the paper's table 8)",
        {
            "no cap": ("no-cap", "CIDEr 25.4 (0.76B, U-Net)"),
            "t at most 0.5": ("default", "CIDEr 29.4"),
        },
    ),
    "target": Table(
        "Targets and patch encoders (not in the paper, whose target is eps)",
        {
            "eps, linear": ("eps", "FID 20.3, CIDEr 16.0 (0.76B)"),
            "eps, U-Net": ("eps-unet", "FID 16.7, CIDEr 25.4"),
            "v, linear": ("v", ""),
            "v, U-Net": ("v-unet", ""),
            "x0, linear": ("x0", ""),
            "x0, U-Net": ("x0-unet", ""),
        },
    ),
    "recipe": Table(
        "The paper's recipe: eps, uniform t, 0.8 captions first, guidance 3, 250 ancestral steps",
        {
            "linear": ("paper-linear-short", "FID 20.3, CIDEr 16.0 (0.76B)"),
            "U-Net": ("paper-unet-short", "FID 16.7, CIDEr 25.4"),
            "linear, longer": ("paper-linear", ""),
            "U-Net, longer": ("paper-unet", ""),
        },
    ),
    "learning-rate": Table(
        "The learning rate, on the validation split",
        {f"{run}, {rate}": (f"{run}-{rate}", "") for run, rate in product(MODELS, RATES)},
    ),
}
# Pairs of runs: what share of the second run's FLOPs does the first need to match it?
PARITY = ("small", "small-chameleon"), ("default", "chameleon"), ("large", "large-chameleon")

# ---- Training ------------------------------------------------------------------------------------

def train(name, seed):
    """Train a run, or go on with it. Returns its result, or None if training fails."""
    directory = DIRECTORY / f"{name}-{seed}"
    if not (directory / "metrics.json").is_file():
        options = ["--resume"] if (directory / "ckpt.pt").is_file() else RUNS[name].split()
        command = [sys.executable, TRAIN, "--run", directory, "--seed", str(seed), *options]
        with open(DIRECTORY / f"{name}-{seed}.log", "a") as log:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.call(command, stdout=log, stderr=log, env=one_thread):
                return None
    metrics = json.loads((directory / "metrics.json").read_text())
    header, *rows = [line.split(",") for line in (directory / "log.csv").read_text().splitlines()]
    columns = dict(zip(header, zip(*[map(float, row) for row in rows])))
    curves = {score: columns[score] for score in SCORES if score in columns}
    curves["flops"] = [metrics["flops"] * step / metrics["step"] for step in columns["step"]]
    return {
        "options": RUNS[name], "scores": metrics["scores"], "flops": metrics["flops"],
        "minutes": round(metrics["minutes"] + metrics["scoring_minutes"], 1),
        "machine": metrics["machine"], "curves": curves,
    }

def train_missing(runs, seeds, jobs, results, path):
    """Train the runs that have no result with their current options, several at a time."""
    missing = [
        (name, seed) for seed, name in product(seeds, runs)
        if results.get(f"{name}-{seed}", {}).get("options") != RUNS[name]
    ]
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    print(f"Training {len(missing)} runs, {jobs} at a time, in {DIRECTORY}.", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for (name, seed), result in zip(missing, pool.map(lambda run: train(*run), missing)):
            if result is None:
                print(f"{name}-{seed} failed: see {DIRECTORY}/{name}-{seed}.log.", flush=True)
                continue
            results[f"{name}-{seed}"] = result
            lines = [f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results)]
            path.write_text("{" + ",\n".join(lines) + "}\n")
            print(f"{name}-{seed}: {result['minutes']:.1f} minutes", flush=True)

# ---- Tables and curves ---------------------------------------------------------------------------

def results_of(results, run):
    """The results of all seeds of a run, with its current options."""
    of_run = [result for key, result in results.items() if key.rpartition("-")[0] == run]
    return [result for result in of_run if result["options"] == RUNS[run]]

def mean_and_range(values):
    """"0.985 (0.980 to 0.990)", or the value alone if there is one."""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"

def table_of(table, results):
    """A table as Markdown. Rows without results are left out."""
    rows = []
    for label, (run, paper) in table.rows.items():
        found = results_of(results, run)
        if found:
            cells = []
            for name in SCORES:
                values = [result["scores"][name][0] for result in found if name in result["scores"]]
                cells.append(mean_and_range(values) if values else "")
            flops = f"{found[0]['flops'] / 1e12:.1f}"
            options = f"`{RUNS[run]}`" if RUNS[run] else "none"
            rows.append([label, options, *cells, flops, str(len(found)), paper])
    header = ["", "options of train.py", *SCORES, "FLOPs / 10^12", "seeds", "the paper"]
    return markdown(header, rows) if rows else "no results yet"

def parity(results, run, baseline, score):
    """The share of the baseline's FLOPs at which the run reaches the baseline's final score, as
    text. It is read from the mean curves, on validation, by linear interpolation.
    """
    def mean_curve(name, column):
        curves = [result["curves"][column] for result in results_of(results, name)]
        return np.mean(curves, axis=0)

    flops, values = mean_curve(run, "flops"), mean_curve(run, score)
    baseline_flops, baseline_values = mean_curve(baseline, "flops"), mean_curve(baseline, score)
    sign = 1 if score.endswith("_acc") else -1  # for a distance, lower is better
    ahead = sign * (values - baseline_values[-1])
    if ahead.max() < 0:
        return "not reached"
    i = int(np.argmax(ahead >= 0))  # the first evaluation that reaches it
    reached = flops[i] if i == 0 else np.interp(0, ahead[i - 1 : i + 1], flops[i - 1 : i + 1])
    return f"{reached / baseline_flops[-1]:.2f}"

def parity_table(results):
    """Parity in the picture scores as Markdown, for pairs with results."""
    scores = "draw_acc", "frechet", "caption_acc"
    rows = [
        [f"{run} / {baseline}", *(parity(results, run, baseline, score) for score in scores)]
        for run, baseline in PARITY
        if results_of(results, run) and results_of(results, baseline)
    ]
    return markdown(["FLOPs for parity", *scores], rows) if rows else ""

def draw_curves(table, results, score):
    """A Pillow image: the score of each seed against FLOPs; None without results."""
    lines = {}
    for label, (run, _) in table.rows.items():
        curves = [result["curves"] for result in results_of(results, run)]
        if curves and score in curves[0]:
            lines[label] = [(curve["flops"], curve[score]) for curve in curves]
    title = f"{score} on validation, against training FLOPs"
    return plots.learning_curves(lines, title) if lines else None

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} [all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each [2]")
    parser.add_argument("--results", type=Path, default=DIRECTORY / "results.json",
                        help="collects results; what it has is not trained again [%(default)s]")
    parser.add_argument("--show", action="store_true", help="print the results, without training")
    args = parser.parse_args(argv)
    if not set(args.tables) <= set(TABLES):
        parser.error(f"the tables are {', '.join(TABLES)}")
    if args.show and not args.results.is_file():
        sys.exit(f"There are no results at {args.results}.")
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    tables = {name: TABLES[name] for name in args.tables or TABLES}
    if not args.show:
        runs = dict.fromkeys(run for table in tables.values() for run, _ in table.rows.values())
        train_missing(runs, args.seeds, args.jobs, results, args.results)
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        print(f"\n{table.title}\n\n{table_of(table, results)}")
        for score in SCORES:
            curves = draw_curves(table, results, score)
            if curves:
                curves.save(DIRECTORY / f"{name}-{score}.png")
        final = []
        for label, (run, _) in table.rows.items():
            if (DIRECTORY / f"{run}-0" / "ckpt.pt").is_file():
                final.append(drawings(DIRECTORY / f"{run}-0", label, slice(-1, None), n=8))
        final = [row for row in final if row]  # a run on text alone draws nothing
        if final:
            plots.arrange(final, columns=1).save(DIRECTORY / f"{name}.png")
    if "models" in tables:
        print("\n" + parity_table(results))

if __name__ == "__main__":
    main()
