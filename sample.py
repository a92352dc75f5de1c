"""Write and draw with a trained model.

    python sample.py "a red circle above a blue square."    draws it
    python sample.py "<picture.png>"                         writes a caption
    python sample.py --run runs/edit "<picture.png> make the red circle green."    edits it
    python sample.py --temperature 1                         writes and draws freely

A prompt is text in which <file.png> stands for a picture. The model continues it, and switches from
text to diffusion by itself, when it predicts BOI.
"""

import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import count
from pathlib import Path

import torch
from PIL import Image

from data import plots
from data.folder import caption_words, clean, load_picture
from train import build, build_models, is_trained, load_checkpoint, start_processes
from transfusion import Config, encode, generate

def parse_options(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", default=[""], help="text in which <file.png> stands for a picture")
    add("--run", default="runs/shapes", help="output directory of the training run [%(default)s]")
    add("--out", default="samples", type=Path, help="directory for the pictures [%(default)s]")
    add("--steps", default=50, type=int, help="denoising steps; the paper takes 250 [%(default)s]")
    add("--guidance-scale", default=2.0, type=float, help="1 is no guidance [%(default)s]")
    add("--eta", default=1.0, type=float, help="0 is DDIM, 1 is ancestral sampling [%(default)s]")
    add("--temperature", default=0.0, type=float, help="of text; 0 is greedy [%(default)s]")
    add("--seed", default=0, type=int, help="random seed of the noise and the text [%(default)s]")
    add("--device", default="auto", help="cpu, cuda or mps; auto is cuda or cpu [%(default)s]")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 <= args.eta <= 1 or not args.temperature >= 0:
        parser.error("--steps must be at least 1, --eta from 0 to 1, --temperature at least 0")
    if args.out.is_file():
        parser.error(f"--out must be a directory, but {args.out} is a file")
    return args

def parse_prompt(prompt, image_size):
    """Split "some text <a.png> more text" into ["some text", picture, "more text"]."""
    document, text = [], ""
    for piece in re.split(r"(<[^<>]+>)", prompt):
        file = os.path.expanduser(piece[1:-1].strip())
        if piece.startswith("<") and is_picture(file):
            document += [clean(text), load_picture(file, image_size)]
            text = ""
        else:
            text += piece
    return [part for part in [*document, clean(text)] if len(part) > 0]  # no empty texts

def is_picture(file):
    suffix = os.path.splitext(file)[1].lower()
    return os.path.isfile(file) or suffix in Image.registered_extensions()

def as_text(document, tokenizer):
    """A document of tokens and images as one line."""
    tokens = []
    for item in document:
        tokens += [item] if isinstance(item, int) else tokenizer.encode("[BOI] picture [EOI]")
    return tokenizer.decode(tokens)

def save_drawing(steps, directory):
    """Write the last of the pictures, uint8 (steps, H, W, 3), as a PNG and all of them as a GIF."""
    n = next(n for n in count(1) if not any(directory.glob(f"{n:03d}.*")))
    directory.mkdir(parents=True, exist_ok=True)
    png, gif = directory / f"{n:03d}.png", directory / f"{n:03d}.gif"
    plots.enlarge(steps[-1], 256).save(png)
    plots.save_gif(steps, gif)
    print(png, gif)

def main(argv=None):
    args = parse_options(argv)
    device, _, _ = start_processes(args.device)
    checkpoint = load_checkpoint(args.run)
    cfg = build(Config, checkpoint["cfg"])
    tokenizer, model, vae = build_models(cfg, checkpoint["words"], device, checkpoint)
    try:
        prompts = [parse_prompt(prompt, cfg.image_size) for prompt in args.prompts]
    except ValueError as error:
        sys.exit(str(error))
    parts = [part for prompt in prompts for part in prompt]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) < len(parts) and not is_trained(vae):
        sys.exit(f"{args.run} was trained on text alone, so a prompt cannot have pictures.")
    unknown = {word for text in texts for word in caption_words(text)} - set(checkpoint["words"])
    if unknown:
        print(f"The model may not know: {', '.join(sorted(unknown))}")

    torch.manual_seed(args.seed)
    for prompt in encode(prompts, tokenizer, vae):
        steps = []  # of all images, one after the other
        [document] = generate(
            model, [prompt], max_images=4, steps=args.steps, guidance_scale=args.guidance_scale,
            eta=args.eta, temperature=args.temperature, show=steps.append,
        )
        print(as_text(document, tokenizer))
        drawn = [item for item in document[len(prompt) :] if not isinstance(item, int)]
        if drawn:
            for shown in torch.cat(steps).chunk(len(drawn)):
                save_drawing(vae.decode(shown).cpu().numpy(), args.out)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped.")
