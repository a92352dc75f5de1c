"""Write and draw with a trained model.

    python sample.py "a red circle above a blue square."    draws it
    python sample.py "<picture.png>"                         writes a caption
    python sample.py --run runs/edit "<picture.png> make the red circle green."    edits it
    python sample.py                                         writes and draws freely

A prompt is text in which <file.png> stands for a picture. Several prompts run as one batch. The
model continues each of them, and switches from text to diffusion by itself, when it predicts BOI.
"""

import math
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from itertools import count, groupby
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data import plots
from data.folder import caption_words, clean, load_picture
from train import build, build_models, is_trained, load_checkpoint, start_processes
from transfusion import Config, encode, generate

def parse_options(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", help="text in which <file.png> stands for a picture [from nothing]")
    add("--run", default="runs/shapes", help="output directory of the training run [%(default)s]")
    add("--out", default="samples", type=Path, help="directory for the pictures [%(default)s]")
    add("--steps", type=int, default=50, help="denoising steps; the paper takes 250 [%(default)s]")
    add("--guidance-scale", type=float, help="classifier-free guidance, 1 is none [as in the run]")
    add("--eta", type=float, help="0 is DDIM, 1 is ancestral sampling [as in the run]")
    add("--temperature", type=float, help="of text; 0 is greedy [0, or 1 without prompts]")
    add("--max-tokens", type=int, default=64, help="maximum of text tokens in a row [%(default)s]")
    add("--max-images", type=int, default=4, help="maximum of drawings per prompt [%(default)s]")
    add("--seed", type=int, default=0, help="random seed of the noise and the text [%(default)s]")
    add("--device", default="auto", help="cpu, cuda or mps; auto is cuda or cpu [%(default)s]")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.max_images < 0 or not 0 <= (args.eta or 0) <= 1:
        parser.error("--steps must be at least 1, --max-images at least 0, --eta from 0 to 1")
    if not 0 <= (args.temperature or 0) < math.inf or not math.isfinite(args.guidance_scale or 0):
        parser.error("--temperature must be at least 0, and --guidance-scale a number")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a directory, but {args.out} is a file")
    if args.temperature is None:
        args.temperature = 0.0 if args.prompts else 1.0
    return args

def parse_prompt(prompt, image_size):
    """Split "some text <a.png> more text" into ["some text", picture, "more text"]."""
    document, text = [], ""
    for i, piece in enumerate(re.split(r"(<[^<>]+>)", prompt)):
        file = os.path.expanduser(piece[1:-1].strip())
        if i % 2 == 1 and is_picture(file):
            document += [clean(text), load_picture(file, image_size)]
            text = ""
        else:
            text += piece
    return [part for part in [*document, clean(text)] if not isinstance(part, str) or part]

def is_picture(file):
    suffix = os.path.splitext(file)[1].lower()
    return os.path.isfile(file) or suffix in Image.registered_extensions()

def as_text(document, tokenizer):
    """A document of tokens and images as one line."""
    parts = []
    for is_text, items in groupby(document, lambda item: isinstance(item, int)):
        if is_text:
            parts.append(tokenizer.decode(items))
        else:
            parts += ["[BOI] picture [EOI]"] * len(list(items))
    return " ".join(parts)

def save_drawing(steps, directory):
    """Write the last of the pictures, uint8 (steps, H, W, 3), as a PNG and all of them as a GIF."""
    paths = ((directory / f"{n:03d}.png", directory / f"{n:03d}.gif") for n in count(1))
    png, gif = next(pair for pair in paths if not any(path.exists() for path in pair))
    directory.mkdir(parents=True, exist_ok=True)
    plots.enlarge(steps[-1], 256).save(png)
    plots.save_gif(steps, gif)
    print(png, gif)

def main(argv=None):
    args = parse_options(argv)
    device, _, _ = start_processes(args.device)
    checkpoint = load_checkpoint(args.run)
    cfg = build(Config, checkpoint["cfg"])
    tokenizer, model, vae = build_models(cfg, checkpoint["words"], device, checkpoint)
    if args.guidance_scale is None:
        args.guidance_scale = checkpoint["run"]["guidance_scale"]
    if args.eta is None:
        args.eta = checkpoint["run"]["eta"]
    try:
        prompts = [parse_prompt(prompt, cfg.image_size) for prompt in args.prompts or [""]]
    except ValueError as error:
        sys.exit(str(error))
    texts = [part for prompt in prompts for part in prompt if isinstance(part, str)]
    unknown = {word for text in texts for word in caption_words(text)} - set(checkpoint["words"])
    if unknown:
        print(f"The model may not know: {', '.join(sorted(unknown))}")
    if not is_trained(vae) and any(not isinstance(part, str) for p in prompts for part in p):
        sys.exit(f"{args.run} was trained on text alone, so a prompt cannot have pictures.")

    drawings = defaultdict(list)  # {(id of a document, index of an image in it): its steps}
    bar = tqdm(desc="drawing", unit="step", disable=None)

    def show(documents, images):
        bar.update()
        for document, image in zip(documents, images):
            drawings[id(document), len(document)].append(image)

    torch.manual_seed(args.seed)
    documents = generate(
        model, encode(prompts, tokenizer, vae),
        max_tokens=args.max_tokens, max_images=args.max_images,
        steps=args.steps, guidance_scale=args.guidance_scale, eta=args.eta,
        temperature=args.temperature, show=show,
    )
    bar.close()
    for document in documents:
        print(as_text(document, tokenizer))
        for i in range(len(document)):
            if (id(document), i) in drawings:
                steps = vae.decode(torch.stack(drawings[id(document), i]))
                save_drawing(steps.cpu().numpy(), args.out)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped.")
