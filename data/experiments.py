"""The paper's tables at toy scale, with several seeds per row:

    python -m data.experiments --list                  the tables, and how long they take
    python -m data.experiments attention target        train the runs of two tables, and print the tables
    python -m data.experiments --show --results data/results.json     print the published results, without training

Every run trains on one thread and goes to runs/experiments. Finished runs are not repeated, and interrupted runs are
resumed. To add a row, add a line to RUNS and one to a table.
"""

import json
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import plots
from data.documents import examples
from data.files import save_png, write_atomically

TRAIN = Path(__file__).parents[1] / "train.py"
DIRECTORY = Path("runs/experiments")

# Options of train.py. The first group has about the FLOPs of the default. The second has its number of steps, at other
# widths (and Chameleon the same FLOPs). The third learns more slowly, and has twice the FLOPs of the default. The
# fourth has other widths, too: linear patches with the steps of `eps`, and U-Nets with the same FLOPs.
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
    "small-eps-unet": "--dim 64 --n-heads 4 --steps 2800 --target eps --t-power 1 --patch-encoder unet",
    "large-eps": "--dim 128 --n-heads 8 --steps 6600 --target eps --t-power 1",
    "large-eps-unet": "--dim 128 --n-heads 8 --steps 4830 --target eps --t-power 1 --patch-encoder unet",
}
# The paper's choices, at toy scale.
PAPER = ("--preset laptop-paper --n-layers 6 --batch-size 64 --caption-first 0.8 --guidance-scale 3 "
         "--sample-steps 250 --eta 1")
RUNS["paper-unet-short"] = f"{PAPER} --patch-encoder unet --steps 5400 --eval-every 1350"  # about half an hour
RUNS["paper-linear-short"] = f"{PAPER} --steps 7700 --eval-every 1925"
RUNS["paper-unet"] = f"{PAPER} --patch-encoder unet --steps 9000 --eval-every 1500"
RUNS["paper-linear"] = f"{PAPER} --steps 12000 --eval-every 2000"
RATES = "2e-3", "4e-3", "8e-3", "16e-3"
for rate in RATES:  # the learning-rate search, on the validation split
    RUNS[f"default-{rate}"] = f"--steps 3300 --eval-split val --lr {rate}"
    RUNS[f"chameleon-{rate}"] = f"--steps 3300 --eval-split val --lr {rate} --model chameleon"

class Table(NamedTuple):
    """What a table compares, and which scores and curves it shows."""
    title: str
    rows: dict  # {label of a row: (name of the run, the paper's result)}
    scores: tuple  # the columns
    curves: tuple = ()  # the scores whose learning curves are drawn
    parity: tuple = ()  # pairs of runs: what share of the second run's FLOPs does the first need to match it?

PICTURE_SCORES = "draw_acc", "frechet", "caption_acc"
ACCURACIES = "draw_acc", "caption_acc"
CURVES = *ACCURACIES, "frechet", "text_ppl"  # the scores whose learning curves are kept
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
        (*PICTURE_SCORES, "text_ppl"), CURVES,
        (("small", "small-chameleon"), ("default", "chameleon"), ("large", "large-chameleon")),
    ),
    "text": Table(
        "Do images hurt the text? (the paper's table 4)",
        {
            "text alone": ("text", "C4 10.1 (0.76B)"),
            "Transfusion": ("default", "C4 10.4"),
            "Chameleon": ("chameleon", "C4 11.8"),
        },
        ("text_ppl", "text_acc"),
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
        PICTURE_SCORES, ACCURACIES,
    ),
    "patches": Table(
        "Elements per image (the paper's table 6)",
        {
            "64, linear, half the steps": ("64-patches", ""),
            "64 elements, linear": ("64-patches-long", "1024 elements: FID 21.0, CIDEr 12.0 (0.76B)"),
            "16 elements, linear": ("x0", "256 elements: FID 20.3, CIDEr 16.0"),
            "4 elements, linear": ("4-patches-long", "64 elements: FID 25.6, CIDEr 14.3"),
            "64 elements, U-Net": ("64-patches-unet", ""),
            "16 elements, U-Net": ("x0-unet", "256 elements: FID 16.7, CIDEr 25.4"),
            "4 elements, U-Net": ("4-patches-unet", "64 elements: FID 16.0, CIDEr 29.9"),
        },
        PICTURE_SCORES, ACCURACIES,
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
        PICTURE_SCORES, ("draw_acc", "frechet"),
    ),
    "noise-cap": Table(
        "The noise cap (the paper's table 8)",
        {
            "no cap": ("no-cap", "CIDEr 25.4 (0.76B, U-Net)"),
            "t at most 0.5": ("default", "CIDEr 29.4"),
        },
        PICTURE_SCORES,
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
        PICTURE_SCORES, ACCURACIES,
    ),
    "recipe": Table(
        "The paper's recipe, trained longer: eps, uniform t, 0.8 of captions first, guidance 3, 250 ancestral steps",
        {
            "linear": ("paper-linear-short", "FID 20.3, CIDEr 16.0 (0.76B)"),
            "U-Net": ("paper-unet-short", "FID 16.7, CIDEr 25.4"),
            "linear, longer": ("paper-linear", ""),
            "U-Net, longer": ("paper-unet", ""),
        },
        PICTURE_SCORES, ACCURACIES,
    ),
    "learning-rate": Table(
        "The learning rate, on the validation split",
        {f"{model}, {rate}": (f"{run}-{rate}", "")
         for (model, run), rate in product({"Transfusion": "default", "Chameleon": "chameleon"}.items(), RATES)},
        (*PICTURE_SCORES, "text_ppl"),
    ),
}

# ---- Training --------------------------------------------------------------------------------------------------------

def is_finished(results, name, seed):
    """Do the results contain this run, with its current options?"""
    result = results.get(f"{name}-{seed}")
    return result is not None and result["options"] == RUNS[name]

def train(name, seed):
    """Train a run, or resume it. Returns its result, or an error message."""
    directory = DIRECTORY / f"{name}-{seed}"
    options = ["--run", str(directory), "--seed", str(seed), *RUNS[name].split()]
    if (directory / "ckpt.pt").is_file():
        if json.loads((directory / "run.json").read_text())["command"] != shlex.join(["python", "train.py", *options]):
            return f"{directory} was trained with options other than those in RUNS. Move it away."
        options = ["--run", str(directory), "--resume"]
    if not has_its_own_scores(directory):
        with open(DIRECTORY / f"{name}-{seed}.log", "a") as log:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.call([sys.executable, TRAIN, *options], stdout=log, stderr=log, env=one_thread)
        if code != 0:
            return f"{directory} did not finish training: see {log.name}."
    return read_result(directory, RUNS[name])

def has_its_own_scores(directory):
    """Are the scores in this directory those of the whole run, with its own options?"""
    try:
        metrics, settings = [json.loads((directory / name).read_text()) for name in ("metrics.json", "run.json")]
        return metrics["step"] == metrics["run"]["steps"] and metrics["run"] == settings["run"]
    except (OSError, ValueError, KeyError):
        return False

def read_result(directory, options):
    """The part of a run that results.json stores."""
    metrics = json.loads((directory / "metrics.json").read_text())
    header, *rows = [line.split(",") for line in (directory / "log.csv").read_text().splitlines()]
    steps = metrics["run"]["steps"]
    columns = {name: [float(row[i]) for row in rows] for i, name in enumerate(header) if name in ("step", *CURVES)}
    columns["flops"] = [metrics["flops"] * step / steps for step in columns.pop("step")]
    return {
        "options": options,
        "scores": metrics["scores"],
        "flops": metrics["flops"],
        "minutes": round(metrics["minutes"] + metrics["scoring_minutes"], 1),
        "machine": f"{metrics['device']}, torch {metrics['torch']}",
        "curves": columns,  # on 32 validation examples
    }

def train_all(missing, jobs, results, path):
    """Train these (name, seed) pairs, several at a time. Write the results as they come in."""
    complaints = []
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for (name, seed), result in zip(missing, pool.map(lambda run: train(*run), missing)):
                if isinstance(result, str):
                    complaints.append(result)
                    continue
                results[f"{name}-{seed}"] = result
                save_results(results, path)
                print(f"{name}, seed {seed}: {result['minutes']:.1f} minutes", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("Stopped. Run the same command to continue.")
    if complaints:
        sys.exit("\n".join(complaints))

def save_results(results, path):
    text = json.dumps(dict(sorted(results.items())))
    write_atomically(path, lambda temporary: temporary.write_text(text.replace('}, "', '},\n"') + "\n"))

# ---- Tables and curves -----------------------------------------------------------------------------------------------

def mean_and_range(values, digits=3):
    """"0.985 (0.980 to 0.990)", or the value alone if there is one."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"

def results_of(results, run):
    """The results of all seeds of a run, with its current options."""
    of_run = [result for key, result in results.items() if key.rpartition("-")[0] == run]
    return [result for result in of_run if result["options"] == RUNS[run]]

def markdown(table, results):
    """A table as Markdown. Rows without results are left out."""
    header = ["", "options of train.py", *table.scores, "FLOPs / 10^12", "seeds", "the paper"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for label, (run, paper) in table.rows.items():
        found = results_of(results, run)
        if not found:
            continue
        cells = [label, f"`{RUNS[run]}`" if RUNS[run] else "none"]
        cells += [mean_and_range([result["scores"][score][0] for result in found]) for score in table.scores]
        cells += [mean_and_range([found[0]["flops"] / 1e12], 1), str(len(found)), paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

def mean_curve(results, run, score):
    """FLOPs of a run's evaluations, and the mean of the score over its seeds. Returns two arrays of equal length."""
    curves = [result["curves"] for result in results_of(results, run)]
    return [np.mean([curve[column] for curve in curves], axis=0) for column in ("flops", score)]

def parity(results, run, baseline, score):
    """The share of the baseline's FLOPs at which the run reaches the baseline's final score; None if it never does.

    It is read from the mean curves, on validation, by linear interpolation between evaluations.
    """
    flops, values = mean_curve(results, run, score)
    baseline_flops, baseline_values = mean_curve(results, baseline, score)
    sign = 1 if score.endswith("_acc") else -1  # for a distance or a perplexity, lower is better
    ahead = sign * (values - baseline_values[-1])
    if ahead.max() < 0:
        return None
    i = int(np.argmax(ahead >= 0))  # the first evaluation that reaches it
    reached_at = flops[i] if i == 0 else np.interp(0, ahead[i - 1 : i + 1], flops[i - 1 : i + 1])
    return float(reached_at / baseline_flops[-1])

def parity_markdown(table, results):
    """Parity in the picture scores, as Markdown, for pairs with results.

    text_ppl is left out, because all models soon come close to the best value.
    """
    labels = {run: label for label, (run, _) in table.rows.items()}
    lines = ["| FLOPs for parity | " + " | ".join(PICTURE_SCORES) + " |", "|" + "---|" * (1 + len(PICTURE_SCORES))]
    for run, baseline in table.parity:
        if results_of(results, run) and results_of(results, baseline):
            shares = [parity(results, run, baseline, score) for score in PICTURE_SCORES]
            cells = ["not reached" if share is None else f"{share:.2f}" for share in shares]
            lines.append("| " + " | ".join([f"{labels[run]} / {labels[baseline]}", *cells]) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""

def draw_curves(table, results, score):
    """A Pillow image: the score against FLOPs, a thin line for each seed and a thick one for their mean."""
    lines = {}
    for label, (run, _) in table.rows.items():
        curves = [(result["curves"]["flops"], result["curves"][score]) for result in results_of(results, run)]
        if curves:
            lines[label] = curves
    return plots.learning_curves(lines, f"{score} on validation, against training FLOPs")

def draw_examples(table, n=8):
    """A Pillow image: true pictures of n validation captions, then each row's final drawings for them (seed 0)."""
    first_row = plots.row_of([picture for _, _, picture in examples("val", 32, 0)][:n])
    rows = [plots.titled(first_row, "true pictures")]
    for label, (run, _) in table.rows.items():
        path = DIRECTORY / f"{run}-0" / "progress.png"
        if path.is_file():
            with Image.open(path) as progress:
                last_row = progress.crop((0, progress.height - first_row.height, first_row.width, progress.height))
            rows.append(plots.titled(last_row, label))
    return reduce(plots.stack, rows)

def print_list(tables, results, seeds):
    for name, table in tables.items():
        print(f"\n{name}: {table.title}")
        for label, (run, _) in table.rows.items():
            n_finished = sum(is_finished(results, run, seed) for seed in seeds)
            found = results_of(results, run)
            minutes = f"{found[0]['minutes']:.0f} minutes each" if found else "not trained yet"
            print(f"  {label:32} {n_finished} of {len(seeds)} seeds, {minutes:22} {RUNS[run]}")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"tables to print: {', '.join(TABLES)} [all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds to train [0 1 2]")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at a time, one thread each [%(default)s]")
    parser.add_argument("--results", type=Path, default=DIRECTORY / "results.json",
                        help="file that collects results; runs in it are not trained again [%(default)s]")
    parser.add_argument("--figures", type=Path, default=DIRECTORY,
                        help="directory for learning curves and drawings [%(default)s]")
    parser.add_argument("--show", action="store_true", help="print the tables from the results, without training")
    parser.add_argument("--list", action="store_true", help="only show the tables, their runs and times")
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    unknown = set(args.tables) - set(TABLES)
    if unknown or args.jobs < 1:
        parser.error(f"there is no table {', '.join(unknown)}" if unknown else "--jobs must be at least 1")
    if args.show and not args.results.exists():
        sys.exit(f"There are no results at {args.results} to show.")
    try:
        results = json.loads(args.results.read_text()) if args.results.exists() else {}
    except (OSError, ValueError) as error:
        sys.exit(f"{args.results} cannot be read: {error}.")
    tables = {name: TABLES[name] for name in args.tables or TABLES}
    if args.list:
        print_list(tables, results, args.seeds)
        return

    runs = dict.fromkeys(run for table in tables.values() for run, _ in table.rows.values())
    missing = [(run, seed) for seed, run in product(args.seeds, runs) if not is_finished(results, run, seed)]
    if missing and not args.show:
        print(f"Training {len(missing)} runs, {args.jobs} at a time, in {DIRECTORY}.", flush=True)
        train_all(missing, args.jobs, results, args.results)
    args.figures.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        print(f"\n{table.title}\n\n{markdown(table, results)}")
        if table.parity:
            print(f"\n{parity_markdown(table, results)}")
        if table.curves and any(results_of(results, run) for run, _ in table.rows.values()):
            for score in table.curves:
                save_png(draw_curves(table, results, score), args.figures / f"{name}-{score}.png")
            if not args.show:
                save_png(draw_examples(table), args.figures / f"{name}.png")

if __name__ == "__main__":
    main()
