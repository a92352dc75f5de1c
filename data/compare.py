"""Put runs side by side: `python -m data.compare runs/shapes runs/chameleon`

Prints a Markdown table, a line for every run with the command that made it, and writes compare.png: the drawings of all
runs, one row for every evaluation, as they became clear.
"""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import canvas
from train import write_whole

SCORES = "draw_acc", "frechet", "caption_acc", "caption_ppl", "text_ppl", "text_acc", "edit_acc"

def row(folder, metrics):
    scale = f" cfg {metrics['run']['cfg_scale']:g}"
    scores = {name.removesuffix(scale): value for name, (value, _) in metrics["scores"].items()}
    numbers = [f"{scores[name]:.3f}" if name in scores else "" for name in SCORES]
    return [folder.name, f"`{metrics['command']}`", *numbers, f"{metrics['flops']:.2g}", f"{metrics['minutes']:.1f}"]

def main(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", default="compare.png", type=Path, help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    header, rows, columns = ["run", "command", *SCORES, "FLOPs", "minutes"], [], []
    for folder in args.runs:
        try:
            rows.append(row(folder, json.loads((folder / "metrics.json").read_text())))
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"{folder} is not a finished run of this version: its metrics.json cannot be read ({error}).")
        if (folder / "progress.png").is_file():  # a text-only run draws nothing
            picture = Image.open(folder / "progress.png").convert("RGB")
            label = Image.new("RGB", (picture.width // 2, 24), "white")
            ImageDraw.Draw(label).text((4, 2), folder.name, "black", ImageFont.load_default(16))
            columns.append(canvas.stack(label, picture.crop((0, 0, picture.width // 2, picture.height))))
    print(*("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)), sep="\n")
    if columns:
        whole = columns[0]
        for column in columns[1:]:
            whole = canvas.beside(whole, column)
        write_whole(args.out, lambda path: whole.save(path, "PNG"))

if __name__ == "__main__":
    main()
