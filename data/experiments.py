"""The paper's tables at toy scale, with several seeds per row:

    python -m data.experiments attention target     train the runs of two tables, and print them
    python -m data.experiments --show --results data/results.json     print the published results
    python -m data.experiments --jobs 8 --options="--device cuda --val-n 64"     all, on a GPU

Runs go to runs/experiments. Finished runs are not repeated, and interrupted runs are resumed. To
add a row, add a line to RUNS and one to a table.
"""

import json
import math
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
from data.compare import markdown

TRAIN = Path(__file__).parents[1] / "train.py"
DIRECTORY = Path("runs/experiments")
SCORES = "draw_acc", "frechet", "caption_acc", "text_excess"  # the columns of all tables
GOAL = 0.9  # of accuracies: the tables say how many documents a model needs to reach it

# Options of train.py. All runs vary the default. The number of steps gives them about the default's
# FLOPs, except for short, those that end in -long, the tiny ones and the paper's recipe.
RUNS = {
    "default": "",
    "chameleon": "--preset chameleon --steps 1944",
    "chameleon-long": "--preset chameleon --steps 5832 --documents 98304",
    "short": "--steps 920",
    "causal": "--no-bidirectional",
    "no-cap": "--noise-cap 1",
    # As many passes over the documents as Transfusion makes.
    "text": "--task text --batch-size 82 --documents 41984",

    "64-patches": "--patch-size 1 --steps 870",
    "4-patches": "--patch-size 4 --steps 2890",
    "64-unet": "--patch-size 1 --patch-encoder unet --steps 727",
    "unet": "--patch-encoder unet --steps 1140",
    "4-unet": "--patch-size 4 --patch-encoder unet --steps 996",
    "unet-long": "--patch-encoder unet",

    "eps": "--preset laptop-paper --sample-steps 50",
}
SCALES = 1, 3, 5  # of guidance, beside the default's 2
for scale in SCALES:
    for name in ("default", "chameleon"):
        RUNS[f"{name}-guidance-{scale}"] = f"{RUNS[name]} --guidance-scale {scale}".strip()
TINY = "--dim 32 --n-layers 2 --n-heads 2"
PAPER = "--preset laptop-paper --caption-first 0.8 --lr 4e-3 --guidance-scale 3 --sample-steps 250"
RUNS |= {
    "tiny": TINY,
    "tiny-chameleon": f"--preset chameleon {TINY} --steps 1524",
    "tiny-text": f"{RUNS['text']} {TINY}",
    "paper-unet": f"{PAPER} --steps 8000 --patch-encoder unet",
    "paper-linear": f"{PAPER} --steps 8000",
    "paper-linear-long": f"{PAPER} --steps 16100 --documents 65536",  # paper-unet's FLOPs
}

class Table(NamedTuple):
    """The runs that a table compares."""
    title: str
    rows: dict  # {label: (name of the run, the paper's result)}; all are compared with the first

TABLES = {
    "models": Table(
        "Transfusion and Chameleon (the paper's table 3)",
        {
            "Transfusion": ("default", "FID 16.8, CIDEr 27.2, C4 7.72 (7B)"),
            "Chameleon": ("chameleon", "FID 29.6, CIDEr 18.0, C4 8.41 (7B)"),
            "Transfusion, 0.4 FLOPs": ("short", ""),
            "Chameleon, long": ("chameleon-long", ""),
        },
    ),
    "guidance": Table(
        "The guidance scale",
        {"Transfusion, 2": ("default", "")}
        | {f"Transfusion, {scale}": (f"default-guidance-{scale}", "") for scale in SCALES}
        | {"Chameleon, 2": ("chameleon", "")}
        | {f"Chameleon, {scale}": (f"chameleon-guidance-{scale}", "") for scale in SCALES},
    ),
    "text": Table(
        "Do images hurt the text? (the paper's table 4)",
        {
            "text alone": ("text", "C4 10.1 (0.76B)"),
            "Transfusion": ("default", "C4 10.4"),
            "Chameleon": ("chameleon", "C4 11.8 (11.0 without images)"),
        },
    ),
    "tiny": Table(
        "The same with models of width 32",
        {
            "text alone": ("tiny-text", ""),
            "Transfusion": ("tiny", ""),
            "Chameleon": ("tiny-chameleon", ""),
        },
    ),
    "attention": Table(
        "Attention inside images (the paper's table 5)",
        {
            "bidirectional": ("default", "FID 20.3, CIDEr 16.0 (0.76B)"),
            "causal": ("causal", "FID 61.3, CIDEr 12.7"),
        },
    ),
    "noise-cap": Table(
        "The noise cap (the paper's table 8)",
        {
            "t at most 0.5": ("default", "CIDEr 29.4 (0.76B, U-Net)"),
            "no cap": ("no-cap", "CIDEr 25.4"),
        },
    ),
    "patches": Table(
        "Elements per image (the paper's table 6)",
        {
            "16 elements, linear": ("default", "256: FID 20.3, CIDEr 16.0 (0.76B)"),
            "64 elements, linear": ("64-patches", "1024: FID 21.0, CIDEr 12.0"),
            "4 elements, linear": ("4-patches", "64: FID 25.6, CIDEr 14.3"),
            "64 elements, U-Net": ("64-unet", ""),
            "16 elements, U-Net": ("unet", "256: FID 16.7, CIDEr 25.4"),
            "4 elements, U-Net": ("4-unet", "64: FID 16.0, CIDEr 29.9"),
            "16 elements, U-Net, long": ("unet-long", ""),
        },
    ),
    "target": Table(
        "The target (the paper's is eps)",
        {
            "x0": ("default", ""),
            "eps": ("eps", "FID 20.3, CIDEr 16.0 (0.76B)"),
        },
    ),
    "recipe": Table(
        "The paper's recipe: eps, uniform t, 0.8 captions first, guidance 3, 250 ancestral steps",
        {
            "U-Net patches": ("paper-unet", "FID 16.7, CIDEr 25.4 (0.76B)"),
            "linear patches": ("paper-linear", "FID 20.3, CIDEr 16.0"),
            "linear patches, long": ("paper-linear-long", ""),
        },
    ),
}

# ---- Training ------------------------------------------------------------------------------------

def train(name, seed, more_options):
    """Train a run, or go on with it. Returns its result, or None if training fails."""
    directory = DIRECTORY / f"{name}-{seed}"
    if not (directory / "metrics.json").is_file():
        options = ["--resume"] if (directory / "ckpt.pt").is_file() else RUNS[name].split()
        options = ["--run", directory, "--seed", str(seed), *options, *more_options]
        with open(DIRECTORY / f"{name}-{seed}.log", "a") as log:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            if subprocess.call([sys.executable, TRAIN, *options], stdout=log, stderr=log,
                               env=one_thread):
                return None
    metrics = json.loads((directory / "metrics.json").read_text())
    header, *rows = [line.split(",") for line in (directory / "log.csv").read_text().splitlines()]
    columns = dict(zip(header, zip(*[map(float, row) for row in rows])))
    curves = {score: columns[score] for score in SCORES if score in columns}
    batch_size = metrics["run"]["batch_size"]
    curves["documents"] = [step * batch_size for step in columns["step"]]
    curves["flops"] = [metrics["flops"] * step / metrics["step"] for step in columns["step"]]
    revision = ["git", "-C", TRAIN.parent, "describe", "--always", "--dirty"]
    return {
        "options": RUNS[name], "scores": metrics["scores"], "flops": metrics["flops"],
        "minutes": round(metrics["minutes"] + metrics["scoring_minutes"], 1),
        "machine": metrics["machine"], "curves": curves,
        "revision": subprocess.run(revision, capture_output=True, text=True).stdout.strip(),
    }

def train_missing(runs, seeds, jobs, more_options, results, path):
    """Train the runs that have no result with their current options, several at a time."""
    missing = [
        (name, seed) for seed, name in product(seeds, runs)
        if results.get(f"{name}-{seed}", {}).get("options") != RUNS[name]
    ]
    print(f"Training {len(missing)} runs, {jobs} at a time, in {DIRECTORY}.", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        trained = pool.map(lambda run: train(*run, more_options), missing)
        for (name, seed), result in zip(missing, trained):
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

def values_of(found, score):
    return [result["scores"][score][0] for result in found if score in result["scores"]]

def p_value(a, b):
    """Welch's t-test, two-sided: the probability of such a difference of the means by chance."""
    if min(len(a), len(b)) < 2 or np.var(a) + np.var(b) == 0:
        return 1.0
    errors = np.array([np.var(x, ddof=1) / len(x) for x in (a, b)])
    t = abs(np.mean(a) - np.mean(b)) / math.sqrt(errors.sum())
    df = errors.sum() ** 2 / (errors[0] ** 2 / (len(a) - 1) + errors[1] ** 2 / (len(b) - 1))
    x = np.linspace(0, t, 10_001)  # the density of Student's t, integrated from 0 to t
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density = math.exp(log_scale) * (1 + x**2 / df) ** (-(df + 1) / 2)
    return 1 - 2 * float(((density[1:] + density[:-1]) / 2 * np.diff(x)).sum())

def mean_and_spread(values, reference):
    """"0.985 ± 0.004 *": mean, standard deviation, and whether it differs from the reference."""
    digits = 3 if abs(np.mean(values)) < 10 else 1
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    mark = " *" if p_value(values, reference) < 0.05 else ""
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}{mark}"

def documents_to_goal(found, score):
    """Thousands of training documents until a score reaches GOAL on validation, interpolated: the
    mean over the seeds.
    """
    counts = []
    for result in found:
        documents, values = result["curves"]["documents"], result["curves"][score]
        reached = [i for i, value in enumerate(values) if value >= GOAL]
        if not reached:
            return "not reached"
        around = slice(max(0, reached[0] - 1), reached[0] + 1)  # the evaluation before, and this
        counts.append(np.interp(GOAL, values[around], documents[around]))
    return f"{np.mean(counts) / 1000:.0f}"

def table_of(table, results):
    """A table as Markdown. Rows without results are left out."""
    rows, reference = [], None
    for label, (run, paper) in table.rows.items():
        found = results_of(results, run)
        if not found:
            continue
        reference = reference or found
        cells = []
        for score in SCORES:
            values = values_of(found, score)
            cells.append(mean_and_spread(values, values_of(reference, score)) if values else "")
        has_pictures = "draw_acc" in found[0]["scores"]
        cells += [documents_to_goal(found, score) if has_pictures else ""
                  for score in ("draw_acc", "caption_acc")]
        flops = f"{found[0]['flops'] / 1e12:.1f}"
        rows.append([label, f"`{run}`", *cells, flops, str(len(found)), paper])
    goals = [f"documents to draw_acc {GOAL}", f"to caption_acc {GOAL}"]
    header = ["", "run", *SCORES, *goals, "FLOPs / 10^12", "seeds", "the paper"]
    return markdown(header, rows) if rows else "no results yet"

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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4],
                        help="[0 1 2 3 4]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each [2]")
    parser.add_argument("--results", type=Path, default=DIRECTORY / "results.json",
                        help="collects results; what it has is not trained again [%(default)s]")
    parser.add_argument("--show", action="store_true", help="print the results, without training")
    parser.add_argument("--options", default="--val-n 64",
                        help="more options of train.py, for all runs [%(default)s]")
    args = parser.parse_args(argv)
    if not set(args.tables) <= set(TABLES):
        parser.error(f"the tables are {', '.join(TABLES)}")
    if args.show and not args.results.is_file():
        sys.exit(f"There are no results at {args.results}.")
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    tables = {name: TABLES[name] for name in args.tables or TABLES}
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    if not args.show:
        runs = dict.fromkeys(run for table in tables.values() for run, _ in table.rows.values())
        train_missing(runs, args.seeds, args.jobs, args.options.split(), results, args.results)
    for name, table in tables.items():
        print(f"\n{table.title}\n\n{table_of(table, results)}")
        for score in SCORES:
            curves = draw_curves(table, results, score)
            if curves:
                curves.save(DIRECTORY / f"{name}-{score}.png")

if __name__ == "__main__":
    main()
