"""Compare finished runs: python -m data.compare runs/shapes runs/chameleon

Prints a Markdown table with one row per run, including the command that trained it, and writes compare.png: the
drawings of all runs, one row for each evaluation.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image

from data import plots
from data.files import save_png

SCORES = ("draw_acc", "frechet", "caption_acc", "caption_ppl", "text_ppl", "text_acc", "edit_acc", "caption_match",
          "draw_match")

def table_row(directory, metrics):
    scores = {name: value for name, (value, _) in metrics["scores"].items()}
    numbers = [f"{scores[name]:.3f}" if name in scores else "" for name in SCORES]
    return [directory.name, f"`{metrics['command']}`", *numbers, f"{metrics['flops']:.2g}", f"{metrics['minutes']:.1f}"]

def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of finished runs")
    parser.add_argument("--out", default="compare.png", type=Path, help="the picture to write [%(default)s]")
    args = parser.parse_args(argv)
    header = ["run", "command", *SCORES, "FLOPs", "minutes"]
    rows, columns = [], []
    for directory in args.runs:
        try:
            rows.append(table_row(directory, json.loads((directory / "metrics.json").read_text())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{directory} is not a finished run of this version: metrics.json cannot be read ({error}).")
        if (directory / "progress.png").is_file():  # a run on text alone draws nothing
            picture = Image.open(directory / "progress.png").convert("RGB")
            columns.append(plots.titled(picture.crop((0, 0, picture.width // 2, picture.height)), directory.name))
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(cells) + " |")
    if columns:
        whole = columns[0]
        for column in columns[1:]:
            whole = plots.beside(whole, column)
        try:
            save_png(whole, args.out)
        except OSError as error:
            sys.exit(str(error))

if __name__ == "__main__":
    main()
