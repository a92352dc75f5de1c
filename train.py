"""Train Transfusion on the toy world: `python train.py`. First the VAE, then the model, then the scores.

Everything is written to runs/shapes (or --run): ckpt.pt, log.csv, progress.png (a row of drawings for every evaluation),
drawings.png (held-out captions and what was drawn), metrics.json. Ctrl-C saves; --resume goes on as if nothing had been.
"""

import argparse
import copy
import csv
import json
import math
import os
import platform
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import canvas, shapes
from data.scores import accuracy, examples, frechet
from transfusion import (BOI, EOS, PRESETS, VAE, Config, Tokenizer, Transfusion, generate, make_batch, option, pack,
                         token_losses)


@dataclass
class Run:
    run: str = option("runs/shapes", "folder for everything the run writes")
    seed: int = option(0, "seed of the data, the weights and the noise")
    device: str = option("auto", "cpu, cuda or mps; auto takes what is there")
    documents: int = option(32768, "training documents, drawn before the training starts")
    vae_steps: int = option(600, "training steps of the VAE, 64 pictures each")
    steps: int = option(640, "training steps of the model")
    batch_size: int = option(128, "documents a step")
    optimizer: str = option("muon", "muon (for the blocks' matrices, AdamW for the rest) or adamw (the paper's)")
    lr: float = option(4e-3, "peak learning rate")
    warmup: int = option(40, "steps to reach it; then a cosine down to 5 percent, as in the paper")
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.99, "decay of the averaged weights, which are the ones that are scored and sampled")
    compile: bool = option(False, "torch.compile the blocks: half a minute first, then about 1.2 times faster on a CPU")
    eval_every: int = option(80, "steps between evaluations and checkpoints")
    eval_n: int = option(512, "held-out examples behind every score of the final table")
    sample_steps: int = option(25, "denoising steps of an evaluation")
    sampler: str = option("ddim", "ddim or ddpm (the paper's, with 250 steps)")
    cfg_scale: float = option(3.0, "guidance scale of the drawings; the table has a few others too")

    def __post_init__(self):
        for name, choices in (("optimizer", ("muon", "adamw")), ("sampler", ("ddim", "ddpm"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("documents", "vae_steps", "steps", "batch_size", "eval_every", "eval_n", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


# ---- Optimiser -------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): momentum, with every singular value of the update moved to about 1.

    The update of torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but in fp32 and for all matrices of a group, which
    must have one shape, at once: without bf16 units the library's takes 1.3 s a step for the laptop model, this 0.06 s.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            grad = torch.stack([p.grad for p in params])
            average = self.state[params[0]].setdefault("momentum", torch.zeros_like(grad))
            average.lerp_(grad, 1 - momentum)
            x = grad.lerp(average, momentum)  # Nesterov
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):  # Newton-Schulz: an odd polynomial that drives all singular values towards 1
                xx = x @ x.mT
                x = 3.4445 * x + (-4.775 * xx + 2.0315 * xx @ xx) @ x
            scale = 0.2 * max(x.shape[1:]) ** 0.5  # the size of an AdamW update
            for p, update in zip(params, x.mT if tall else x):
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)


def make_optimizers(model, run):
    """Muon for the matrices of the blocks, AdamW for the rest (or for all), weight decay on matrices only."""
    blocks = {}
    for p in model.blocks.parameters():
        if p.dim() == 2 and run.optimizer == "muon":
            blocks.setdefault(p.shape, []).append(p)
    taken = {p for params in blocks.values() for p in params}
    rest = [p for p in model.parameters() if p not in taken]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": run.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), eps=1e-8)
    muon = [Muon([{"params": params} for params in blocks.values()], run.lr, run.weight_decay)] if blocks else []
    return [adamw] + muon


def learning_rate(run, step):
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - run.warmup)
    return run.lr * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)


def train_vae(cfg, run, pictures, device):
    """pictures: uint8 (N, H, W, 3)."""
    vae, peak = VAE(cfg).to(device), 4e-3
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0)
    bar = tqdm(range(run.vae_steps), "VAE  ", disable=None)
    for step in bar:
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30) * (1 - step / run.vae_steps)
        loss = vae.loss(pictures[torch.randint(len(pictures), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.calibrate(pictures[:1000])
    return vae.requires_grad_(False).eval()


# ---- Scores ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def log_likelihood(model, texts, tokenizer, then=EOS):
    """log P and number of tokens of each text and the mark that follows it, both (B,)."""
    tokens, image_id = pack([[text] for text in texts], tokenizer, model.cfg.n_patches)
    tokens, image_id = tokens.masked_fill(tokens == EOS, then).to(model.device), image_id.to(model.device)
    error, counts = token_losses(model(tokens[:, :-1], image_id[:, :-1])[0], tokens, image_id)
    return -(error * counts).sum(1), counts.sum(1)


def complete(model, vae, tokenizer, prompts, run, cfg_scale, max_images):
    """Go on from prompts, 128 at a time: the text of each, and a picture (grey where the model drew none)."""
    texts, pictures = [], []
    for i in range(0, len(prompts), 128):
        batch = make_batch(prompts[i:i + 128], vae, tokenizer, model.cfg, end=False)
        tokens, image_id, latents = generate(model, *batch, max_length=48, max_images=max_images, steps=run.sample_steps,
                                             cfg_scale=cfg_scale, sampler=run.sampler)
        texts += [tokenizer.decode(row) for row in tokens.tolist()]
        drawn = (image_id >= 0).any(1).view(-1, 1, 1, 1)
        pictures.append((vae.decode(latents[:, -1]) * drawn).cpu().numpy())
    return texts, np.concatenate(pictures)


def draw(model, vae, tokenizer, captions, run, cfg_scale):
    return complete(model, vae, tokenizer, [[caption] for caption in captions], run, cfg_scale, max_images=1)[1]


def say(model, vae, tokenizer, pictures, run):
    return complete(model, vae, tokenizer, [[picture] for picture in pictures], run, cfg_scale=1, max_images=0)[0]


def evaluate(model, vae, tokenizer, run):
    """The score table on held-out facts: {score: (value, what to compare it with)}, and the drawings."""
    torch.manual_seed(run.seed)
    rng = random.Random(run.seed + 1)
    scenes, captions, pictures = (list(column) for column in zip(*examples("test", run.eval_n, run.seed + 1)))
    table = {}

    texts = [shapes.reasoning(scene, rng.random() < 0.5) for scene in scenes]
    for kind, documents, then in (("text", texts, EOS), ("caption", captions, BOI)):
        log_p, count = (x.sum().item() for x in log_likelihood(model, documents, tokenizer, then))
        floor = math.exp(shapes.entropy(kind) * len(documents) / count)
        table[f"{kind}_ppl"] = math.exp(-log_p / count), f"floor {floor:.4f}, the grammar's own"
    relations = list(shapes.INVERSE)
    ranks = [log_likelihood(model, [shapes.reasoning(s, True, r) for s in scenes], tokenizer)[0] for r in relations]
    chosen = [relations[i] for i in torch.stack(ranks).argmax(0).tolist()]
    table["text_acc"] = accuracy(chosen, [shapes.answer(s, True) for s in scenes]), "chance 0.25"

    said = say(model, vae, tokenizer, pictures, run)
    table["caption_acc"] = accuracy(map(shapes.parse, said), scenes), "ceiling 1"

    true = np.stack(pictures)
    again = vae.decode(vae.encode(torch.from_numpy(true))).cpu().numpy()
    other = np.stack([shapes.render(scene, rng) for scene in scenes])
    ceiling = [accuracy(map(shapes.read, x), scenes) for x in (again, true)]
    for scale in sorted({1.0, 2.0, 5.0, run.cfg_scale}):
        drawn = draw(model, vae, tokenizer, captions, run, scale)
        if scale == run.cfg_scale:
            drawings = drawn
        table[f"draw_acc cfg {scale:g}"] = (accuracy(map(shapes.read, drawn), scenes),
                                            f"ceiling {ceiling[0]:.4f} VAE, {ceiling[1]:.4f} true pictures")
        table[f"frechet cfg {scale:g}"] = (frechet(drawn, true),
                                           f"floor {frechet(other, true):.4f} true, {frechet(again, true):.4f} VAE")
    return table, drawings


# ---- The run ---------------------------------------------------------------------------------------------------------

def parse_options(argv):
    """Every field of Config and Run is an option. Returns those that were given, and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, help="a set of model options to start from (default: laptop)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run")
    parser.add_argument("--eval-only", action="store_true", help="only score the checkpoint in --run")
    for title, cls in (("model", Config), ("run", Run)):
        group = parser.add_argument_group(title)
        for f in fields(cls):
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            group.add_argument("--" + f.name.replace("_", "-"), help=f"{f.metadata['help']} (default: {f.default})", **kind)
    return vars(parser.parse_args(argv))


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        sys.exit(f"{name} is not a device that this machine and this torch have; try --device cpu.")


def write_whole(path, write):
    """Write a file beside its place and then move it there, so that nobody ever finds half a file."""
    temporary = path.with_name("writing-" + path.name)
    write(temporary)
    os.replace(temporary, path)


def load_run(folder, device):
    """(checkpoint, averaged model, VAE, tokenizer). Exits with one sentence when there is nothing that can be used."""
    path = Path(folder) / "ckpt.pt"
    if not path.is_file():
        sys.exit(f"There is no checkpoint at {path}: train one first (python train.py), or name another run with --run.")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        saved["cfg"], saved["run"], tokenizer = Config(**saved["cfg"]), Run(**saved["run"]), Tokenizer(saved["words"])
        model, vae = Transfusion(saved["cfg"], len(tokenizer)).to(device), VAE(saved["cfg"]).to(device)
        model.load_state_dict(saved["ema"])
        vae.load_state_dict(saved["vae"])
    except Exception as error:
        sys.exit(f"{path} is not a checkpoint that this version can read ({type(error).__name__}).")
    return saved, model.requires_grad_(False).eval(), vae.requires_grad_(False).eval(), tokenizer


def report(folder, step, recent, model, vae, tokenizer, run):
    """One evaluation while training, on the validation split: a row of log.csv and a row of progress.png."""
    torch.manual_seed(run.seed)  # the same noise every time, so that a column shows one drawing becoming clear
    scenes, captions, pictures = zip(*examples("val", 64, run.seed))
    drawn = draw(model, vae, tokenizer, captions, run, run.cfg_scale)
    said = say(model, vae, tokenizer, list(pictures), run)
    loss_lm, loss_ddpm = np.mean(recent, axis=0)
    row = {"step": step, "loss_lm": f"{loss_lm:.4f}", "loss_ddpm": f"{loss_ddpm:.4f}",
           "val_draw_acc": accuracy(map(shapes.read, drawn), scenes),
           "val_caption_acc": accuracy(map(shapes.parse, said), scenes)}
    log, progress = folder / "log.csv", folder / "progress.png"
    with open(log, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
    picture = canvas.side_by_side(drawn[:12])
    if progress.exists():
        picture = canvas.stack(Image.open(progress).convert("RGB"), picture)
    write_whole(progress, lambda path: picture.save(path, "PNG"))
    tqdm.write("  ".join(f"{name} {value}" for name, value in row.items()))


def main(argv=None):
    given = parse_options(argv)
    preset, resume, eval_only = (given.pop(name, None) for name in ("preset", "resume", "eval_only"))
    for_model = {name: given.pop(name) for name in list(given) if name in Config.__dataclass_fields__}
    try:
        run, cfg = Run(**given), replace(PRESETS[preset or "laptop"], **for_model)
    except ValueError as error:
        sys.exit(f"These options do not work: {error}.")
    device, folder, saved, started = pick_device(run.device), Path(run.run), None, time.time()

    # Begin, or go on from a checkpoint.
    if resume or eval_only:
        if preset or for_model:
            sys.exit("A checkpoint has its own model: the model's options cannot be given with --resume or --eval-only.")
        saved, ema, vae, tokenizer = load_run(folder, device)
        cfg, run = saved["cfg"], replace(saved["run"], **given)
    else:
        tokenizer = Tokenizer(shapes.WORDS)
        if folder.exists():  # keep an earlier run under another name
            folder.rename(next(p for i in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.{i}")).exists()))
        folder.mkdir(parents=True)

    if not eval_only:
        torch.manual_seed(run.seed)
        documents = shapes.documents(run.documents, run.seed)
        if not saved:
            pictures = [part for document in documents for part in document if not isinstance(part, str)]
            vae = train_vae(cfg, run, torch.from_numpy(np.stack(pictures)), device)
        tokens, image_id, latents = make_batch(documents, vae, tokenizer, cfg)
        model = Transfusion(cfg, len(tokenizer)).to(device)
        optimizers, first, recent = make_optimizers(model, run), 0, []
        if saved:
            model.load_state_dict(saved["model"])
            first, recent = saved["step"], saved["recent"]
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        else:
            ema = copy.deepcopy(model).requires_grad_(False).eval()
        for block in model.blocks if run.compile else []:
            block.compile()

        def save(step):
            write_whole(folder / "ckpt.pt", lambda path: torch.save({
                "cfg": asdict(cfg), "run": asdict(run), "words": tokenizer.words, "step": step, "recent": recent,
                "vae": vae.state_dict(), "model": model.state_dict(), "ema": ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, path))

        stop = []
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # finish the step first
        bar = tqdm(range(first, run.steps), "model", run.steps, initial=first, disable=None)
        for step in bar:
            # All randomness of a step follows from its number, which thereby is the random state of a checkpoint.
            torch.manual_seed(run.seed * 1_000_000 + step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(run, step)
            pick = torch.randint(len(tokens), (run.batch_size,), device=device)
            loss, loss_lm, loss_ddpm = model.loss(tokens[pick], image_id[pick], latents[pick])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay = min(run.ema, (1 + step) / (10 + step))  # a short memory at first
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            recent.append((loss_lm.item(), loss_ddpm.item()))
            bar.set_postfix(lm=f"{recent[-1][0]:.3f}", ddpm=f"{recent[-1][1]:.3f}")

            if (step + 1) % run.eval_every == 0 or step + 1 == run.steps:
                report(folder, step + 1, recent, ema, vae, tokenizer, run)
                recent.clear()
                save(step + 1)
            elif stop:
                save(step + 1)
            if stop:
                sys.exit(f"Saved at step {step + 1} of {run.steps}. To go on: python train.py --resume --run {folder}")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # The scores, and a picture to go with them.
    table, drawn = evaluate(ema, vae, tokenizer, run)
    print(f"\n{run.eval_n} held-out examples, seed {run.seed}, {run.sample_steps} {run.sampler} steps")
    print("\n".join(f"{name:16} {value:8.4f}   {beside}" for name, (value, beside) in table.items()))
    held_out = examples("test", run.eval_n, run.seed + 1)[:18]
    right = [shapes.read(picture) == scene for picture, (scene, _, _) in zip(drawn, held_out)]
    grid = canvas.captioned_grid(drawn[:18], [caption for _, caption, _ in held_out], right)
    write_whole(folder / "drawings.png", lambda path: grid.save(path, "PNG"))
    metrics = {"scores": table, "minutes": (time.time() - started) / 60, "device": str(device), "torch": torch.__version__,
               "processor": f"{platform.processor()}, {os.cpu_count()} cores", "cfg": asdict(cfg), "run": asdict(run)}
    write_whole(folder / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))
    print(f"\nIn {folder}: drawings.png, progress.png, log.csv, metrics.json, ckpt.pt. {metrics['minutes']:.1f} minutes.")


if __name__ == "__main__":
    main()
