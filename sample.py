"""Write and draw with a trained model.

    python sample.py "a red circle above a blue square."             draws it
    python sample.py "<picture.png>"                                 writes a caption
    python sample.py --run runs/edit "<picture.png> make the red circle green."    edits it (train.py --task edit)
    python sample.py                                                 lets the model write and draw what it likes

A prompt is text in which <file.png> stands for a picture. Several prompts run as one batch. The model continues the
prompt, and decides by itself, by predicting the token BOI, when to switch from text to diffusion.
"""

import argparse
import math
import os
import re
import sys
from itertools import count
from pathlib import Path

import torch

from data import plots
from data.files import load_picture, save_png
from train import load_checkpoint, pick_device
from transfusion import encode_pictures, generate

LIMITS = {  # minimum and maximum of the numeric options
    "steps": (1, None), "guidance_scale": (0, None), "eta": (0, 1), "temperature": (0, None),
    "max_tokens": (1, None), "max_images": (0, None), "seed": (0, 10**9),
}

def parse_options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help="text in which <file.png> stands for a picture [start from nothing]")
    parser.add_argument("--run", default="runs/shapes", help="output directory of the training run [%(default)s]")
    parser.add_argument("--out", default="samples", type=Path, help="directory for the pictures [%(default)s]")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps; the paper takes 250 [50]")
    parser.add_argument("--guidance-scale", type=float, help="classifier-free guidance; 1 turns it off [as in the run]")
    parser.add_argument("--eta", type=float, default=0.0, help="sampling noise: 0 is DDIM, 1 is ancestral sampling [0]")
    parser.add_argument("--temperature", type=float, help="of text; 0 is greedy [0, or 1 without prompts]")
    parser.add_argument("--max-tokens", type=int, default=64, help="maximum of text tokens in a row [64]")
    parser.add_argument("--max-images", type=int, default=4, help="maximum of drawings per prompt [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the noise and the text [%(default)s]")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps; auto picks the best available")
    args = parser.parse_args(argv)
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if value is None:  # not given
            continue
        if not math.isfinite(value) or value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"between {least} and {most}"
            parser.error(f"argument --{name.replace('_', '-')}: must be {limits}, not {value}")
    if args.temperature and args.temperature < 0.01:
        parser.error(f"argument --temperature: must be 0 or at least 0.01, not {args.temperature}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a directory that can be written to: {error}")
    if args.temperature is None:
        args.temperature = 0.0 if args.prompts else 1.0
    return args

def parse_prompt(prompt, image_size):
    """Split "some text <a.png> more text" into ["some text", picture, "more text"]."""
    document = []
    for i, piece in enumerate(re.split(r"<([^<>]+)>", prompt)):
        if i % 2 == 1:  # the text between < and >
            document.append(load_picture(piece, image_size))
        elif piece.strip():
            document.append(piece.strip())
    return document

def printable(text):
    """Replace control characters and invalid UTF-8 by U+FFFD, so that printing is safe."""
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)

def as_text(document, frames):
    """A document as readable text. frames is {index of a part: its denoising steps}, for images that were drawn."""
    words = []
    for i, part in enumerate(document):
        if isinstance(part, str):
            words.append(printable(part))
        elif i in frames:
            words.append("[BOI] " + "." * (len(frames[i]) // 5) + " [EOI]")  # a dot for every five steps
        else:
            words.append("[BOI] (picture) [EOI]")
    return " ".join(words)

class Progress:
    """Called as documents grow: prints the first one, and records the denoising steps of all images."""

    def __init__(self, prompts):
        self.prompts = prompts
        self.frames = [{} for _ in prompts]  # of each document: {index of a part: its latents (or codes) at each step}
        self.printed = ""

    def __call__(self, documents):
        for prompt, document, frames in zip(self.prompts, documents, self.frames):
            last = len(document) - 1
            if last >= len(prompt) and not isinstance(document[last], str):
                steps = frames.setdefault(last, [])
                if not steps or steps[-1] is not document[last]:  # a new step
                    steps.append(document[last])
        # The end of the text may still change: an image gets more steps, and a character more bytes.
        self.print_rest(as_text(documents[0], self.frames[0]).removesuffix(" [EOI]").rstrip("\ufffd"))

    def print_rest(self, text):
        """Print the part of the text that is not printed yet."""
        print(text[len(self.printed):], end="", flush=True)
        self.printed = text

def save_drawing(frames, directory):
    """Write the last of the frames, uint8 (steps, H, W, 3), as a PNG and all of them as a GIF. Returns both paths."""
    paths = ((directory / f"{n:03d}.png", directory / f"{n:03d}.gif") for n in count(1))
    png, gif = next(pair for pair in paths if not any(path.exists() for path in pair))
    save_png(plots.enlarge(frames[-1], 256), png)
    plots.save_gif(frames, gif)
    return png, gif

def main(argv=None):
    args = parse_options(argv)
    device = pick_device(args.device)
    checkpoint, model, vae = load_checkpoint(args.run, device)
    scale = checkpoint["run"].guidance_scale if args.guidance_scale is None else args.guidance_scale
    try:
        prompts = [parse_prompt(prompt, model.cfg.image_size) for prompt in args.prompts or [""]]
    except ValueError as error:
        sys.exit(str(error))
    has_pictures = any(not isinstance(part, str) for prompt in prompts for part in prompt)
    if has_pictures and not checkpoint.get("vae_is_trained", True):
        sys.exit(f"{args.run} was trained on text alone, so a prompt cannot have pictures.")

    torch.manual_seed(args.seed)
    progress = Progress(prompts)
    documents = generate(
        model, encode_pictures(prompts, vae), args.max_tokens, args.max_images, args.steps, scale, args.eta,
        args.temperature, progress,
    )
    progress.print_rest(as_text(documents[0], progress.frames[0]) + "\n")
    for document, document_frames in list(zip(documents, progress.frames))[1:]:
        print(as_text(document, document_frames))

    for document_frames in progress.frames:
        for latents in document_frames.values():
            pictures = vae.decode(torch.stack(latents)).cpu().numpy()
            if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
                print(plots.terminal_picture(pictures[-1]))
            print(*save_drawing(pictures, args.out))

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for terminals that cannot show every character
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:  # the disk is full, for example; or Ctrl-C
        sys.exit(f"Stopped{f': {error}' if str(error) else ''}.")
