"""Write and draw with a trained run.

    python sample.py "a red circle above a blue square."             draws it
    python sample.py "<picture.png>"                                 says what the picture shows
    python sample.py "<picture.png> make the red circle green."      edits it, after train.py --task edit
    python sample.py                                                 lets the model write and draw what it likes

A prompt is text, in which <file.png> stands for a picture. Several prompts run as one batch. The model goes on from the
prompt and decides by itself, by writing the token BOI, when to switch from text to diffusion.
"""

import argparse
import os
import re
import sys
from itertools import count, groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data.canvas import enlarge, half_blocks
from train import load_run, pick_device
from transfusion import MARKS, N_SPECIAL, PAD, generate, make_batch

def parse_options(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", help='text, with <file.png> for a picture; none: start from nothing')
    parser.add_argument("--run", help="folder of the trained run (default: the one in runs that was written last)")
    parser.add_argument("--out", default="samples", help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, the paper's: 250 (default: 50)")
    parser.add_argument("--cfg-scale", type=float, help="guidance scale, 1 is none (default: the run's)")
    parser.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="ddpm is the paper's")
    parser.add_argument("--temperature", type=float, help="of the text, 0: greedy (default: 0, or 1 without prompt)")
    parser.add_argument("--max-length", type=int, default=128, help="most places of a sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and the text (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps; auto takes what is there")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    if args.temperature is not None and args.temperature < 0:
        parser.error(f"--temperature must be 0 or more, not {args.temperature:g}")
    if Path(args.out).is_file():
        parser.error(f"--out must be a folder, and {args.out} is a file")
    return args

def parse_prompt(prompt, image_size):
    """"some text <a.png> more text" -> a document: ["some text", picture, "more text"]."""
    parts = re.split(r"<([^<>]+)>", prompt)
    texts, files = parts[::2], parts[1::2]
    document = [texts[0].strip()]
    for file, text in zip(files, texts[1:]):
        document += [load_picture(file, image_size), text.strip()]
    return [part for part in document if not isinstance(part, str) or part]

def load_picture(file, size):
    """uint8 (size, size, 3) from any picture file: the middle square, made smaller by averaging."""
    try:
        with Image.open(file) as image:
            image = image.convert("RGBA")
    except FileNotFoundError:
        sys.exit(f"There is no picture at {file}.")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError) as error:
        sys.exit(f"{file} is not a picture that can be read: {error}")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.BOX))

def as_text(tokens, image_id, tokenizer):
    """A sequence as a person reads it: its words, its marks, and its images as a number of patches."""
    def kind(place):
        return "image" if place[1] >= 0 else "mark" if place[0] < N_SPECIAL else "text"
    pieces = []
    for name, places in groupby(zip(tokens.tolist(), image_id.tolist()), kind):
        ids = [token for token, _ in places]
        if name == "text":
            text = tokenizer.decode(ids)
            pieces.append("".join(c if c.isprintable() else "\ufffd" for c in text))  # nothing that moves the cursor
        elif name == "image":
            pieces.append(f"({len(ids)} patches)")
        else:
            pieces += ["[" + MARKS[token] + "]" for token in ids if token != PAD]
    return " ".join(pieces)

class Screen:
    """Sees every token and every denoising step: prints the first row's text, and keeps the images for the GIFs."""

    def __init__(self, tokenizer):
        self.tokenizer, self.shown, self.frames = tokenizer, "", []

    def __call__(self, tokens, image_id, images):
        self.frames.append(images.clone())
        text = as_text(tokens[0], image_id[0], self.tokenizer).rstrip("\ufffd")  # bytes still to come
        if text == self.shown:
            text += "."[len(self.frames) % 5:]  # a dot for every five denoising steps
            print(text[len(self.shown):], end="", flush=True)
        else:
            print(text.removeprefix(self.shown), end="", flush=True)
            self.shown = text

    def frames_of(self, row, k):
        """The latents of one image after every step in which it changed, (steps, C, H, W)."""
        history = torch.stack([images[row, k] for images in self.frames])
        changed = (history.diff(dim=0, prepend=torch.zeros_like(history[:1])) != 0).flatten(1).any(1)
        return history[changed]

def save_image(frames, folder):
    """The last frame as a PNG and all of them as an animated GIF, eight times enlarged, under the next free number."""
    folder.mkdir(parents=True, exist_ok=True)
    n = next(n for n in count(1) if not (folder / f"{n:03d}.png").exists())
    png, gif = folder / f"{n:03d}.png", folder / f"{n:03d}.gif"
    large = [enlarge(frame, 8) for frame in frames]
    large[-1].save(png)
    large[0].save(gif, save_all=True, append_images=large[1:], duration=[40] * (len(large) - 1) + [1500], loop=0)
    return png, gif

def main(argv=None):
    args = parse_options(argv)
    device = pick_device(args.device)
    newest = max(Path("runs").glob("*/ckpt.pt"), key=os.path.getmtime, default=Path("runs/shapes/ckpt.pt")).parent
    saved, (model, vae, tokenizer) = load_run(args.run or newest, device)
    print(f"({args.run or newest})", file=sys.stderr)
    documents = [parse_prompt(prompt, model.cfg.image_size) for prompt in args.prompts or [""]]
    tokens, image_id, latents = make_batch(documents, vae, tokenizer, model.cfg, end=False)
    if tokens.shape[1] >= args.max_length:
        sys.exit(f"The longest prompt takes {tokens.shape[1]} places, and --max-length is only {args.max_length}.")

    torch.manual_seed(args.seed)
    screen, given = Screen(tokenizer), image_id.amax(1) + 1
    temperature = args.temperature if args.temperature is not None else 0.0 if args.prompts else 1.0
    scale = saved["run"].cfg_scale if args.cfg_scale is None else args.cfg_scale
    tokens, image_id, _ = generate(model, tokens, image_id, latents, args.max_length, max_images=4, steps=args.steps,
                                   cfg_scale=scale, sampler=args.sampler, temperature=temperature, watch=screen)
    print("", *(as_text(t, i, tokenizer) for t, i in zip(tokens[1:], image_id[1:])), sep="\n")
    for row in range(len(tokens)):
        for k in range(given[row], image_id[row].max() + 1):
            frames = vae.decode(screen.frames_of(row, k)).cpu().numpy()
            if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
                print(half_blocks(frames[-1]))
            print(*save_image(frames, Path(args.out)))

if __name__ == "__main__":
    main()
