"""Compare finished runs: python -m data.compare runs/shapes runs/chameleon

Prints a Markdown table with one row per run, and writes compare.png: the drawings of all runs for
the same captions, one row for each evaluation.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

import torch

from data import plots

SCORES = "draw_acc", "frechet", "caption_acc", "text_ppl", "edit_acc", "caption_match", "draw_match"

def markdown(header, rows):
    """A Markdown table without the columns that are empty in all rows."""
    columns = [column for column in zip(header, *rows) if any(column[1:])]
    header, *rows = zip(*columns)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

def drawings(directory, n=6):
    """A Pillow image: the first n drawings of every evaluation of a run, below its name."""
    rows = torch.load(directory / "ckpt.pt", weights_only=True)["drawings"]
    rows = [plots.row_of(pictures[:n].numpy()) for pictures in rows]
    return plots.titled(plots.arrange(rows, columns=1, gap=0), directory.name) if rows else None

def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of finished runs")
    args = parser.parse_args(argv)
    rows, columns = [], []
    for directory in args.runs:
        if not (directory / "metrics.json").is_file():
            sys.exit(f"{directory} is not the output directory of a finished run.")
        metrics = json.loads((directory / "metrics.json").read_text())
        scores = metrics["scores"]
        cells = [f"{scores[name][0]:.3f}" if name in scores else "" for name in SCORES]
        costs = [f"{metrics['flops']:.2g}", f"{metrics['minutes']:.1f}"]
        rows.append([directory.name, *cells, *costs])
        columns.append(drawings(directory))
    print(markdown(["run", *SCORES, "FLOPs", "minutes"], rows))
    columns = [column for column in columns if column]  # a run on text alone draws nothing
    if columns:
        plots.arrange(columns, len(columns), gap=24).save("compare.png")

if __name__ == "__main__":
    main()
