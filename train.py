"""Train Transfusion on the toy world. First the VAE, then the model, then the scores.

    python train.py                                    the default, to runs/shapes
    python train.py --model chameleon                  the baseline with discrete images, to runs/chameleon
    python train.py --task text                        the same documents without their pictures, to runs/text
    python train.py --init runs/shapes --task edit     teach a finished run to edit pictures, to runs/edit

Everything is written to that folder (or --run): ckpt.pt, log.csv, progress.png (a row of drawings for every
evaluation), figure.png (the mask, and what was drawn for held-out captions), metrics.json. Ctrl-C saves, and --resume
goes on as if nothing had happened.
"""

import copy
import json
import math
import os
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import canvas, shapes
from data.documents import WORDS, documents, edit_examples, examples
from data.scores import accuracy, evaluate
from transfusion import (BOI, EOS, MARKS, N_SPECIAL, PAD, PRESETS, Config, Tokenizer, codes_of, dense_mask, generate,
                         make_batch, make_models, mixed_mask, option, pack, token_losses)

DEFAULTS = {  # of a run, where they are not those below
    "text": {"batch_size": 156},  # as many places a step as with pictures
    "edit": {"documents": 13652, "caption_first": 0.4, "steps": 1500, "batch_size": 32, "optimizer": "adamw",
             "lr": 1.5e-3, "eval_every": 500, "t_power": 4.0, "noise_cap": 0.0, "text_between": False},  # 8192 edits
    "chameleon": {"vae_steps": 1500},
}
OF_THE_LOSS = "noise_cap", "lambda_ddpm", "drop_text", "t_power", "text_between"  # what --init can change of the model

@dataclass
class Run:
    run: str = option("runs/shapes", "folder for everything the run writes; also runs/text, runs/edit, runs/chameleon")
    task: str = option("shapes", "what to train on; text and edit have other defaults", ("shapes", "text", "edit"))
    init: str = option("", "folder of a finished run to start from")
    seed: int = option(0, "seed of the data, the weights and the noise")
    device: str = option("auto", "cpu, cuda or mps; auto takes what is there")
    documents: int = option(32768, "training documents, drawn before the training starts")
    # DEVIATION: 0.8 in the paper, which told 0.61 and drew 1.00; 0.5 0.98 and 0.99 (validation, lambda 3, t_power 1).
    caption_first: float = option(0.5, "share of the pairs in which the caption comes first")
    vae_steps: int = option(500, "training steps of the VAE, 64 pictures each")
    steps: int = option(1200, "training steps of the model")
    batch_size: int = option(64, "documents a step")
    optimizer: str = option("muon", "muon: for the blocks' matrices only; adamw is the paper's", ("muon", "adamw"))
    lr: float = option(4e-3, "peak learning rate")
    warmup: int = option(60, "steps to reach it; then a cosine down to 5 percent, as in the paper")
    weight_decay: float = option(0.1, "decoupled weight decay, on matrices")
    clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.99, "decay of the averaged weights, which are the ones that are scored and sampled")
    eval_every: int = option(200, "steps between evaluations and checkpoints")
    eval_n: int = option(512, "held-out examples behind every score of the final table")
    sample_steps: int = option(25, "denoising steps of an evaluation")
    sampler: str = option("ddim", "ddpm is the paper's, with 250 steps", ("ddim", "ddpm"))
    cfg_scale: float = option(2.0, "guidance scale of the drawings; the table has a few others too")

    def __post_init__(self):
        for f in fields(self):
            if f.type is int and f.name != "seed" and getattr(self, f.name) < 1:
                raise ValueError(f"{f.name} must be at least 1, not {getattr(self, f.name)}")
        if not 0 < self.caption_first <= 1:
            raise ValueError(f"caption_first must be more than 0 and at most 1, not {self.caption_first}")

# ---- Optimiser -------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): momentum, with every singular value of the update moved to about 1.

    DEVIATION: the paper has AdamW alone (--optimizer adamw --lr 2e-3). Of v, 1000 steps tell 0.51 with it, Muon 0.79.
    The update is that of torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), but in fp32 and for all matrices of a group,
    of one shape, at once: for the laptop model 0.04 s a step on 2 cores without bf16 units, the library's 1.3 s.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            grad = torch.stack([p.grad for p in params])
            average = self.state[params[0]].setdefault("momentum", torch.zeros_like(grad)).lerp_(grad, 1 - momentum)
            x = grad.lerp(average, momentum)  # Nesterov
            tall = x.shape[1] > x.shape[2]
            x = (x.mT if tall else x) / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            for _ in range(5):  # Newton-Schulz: an odd polynomial that drives all singular values towards 1
                xx = x @ x.mT
                x = 3.4445 * x + (-4.775 * xx + 2.0315 * xx @ xx) @ x
            size = 0.2 * max(x.shape[1:]) ** 0.5  # that of an AdamW update
            for p, update in zip(params, x.mT if tall else x):
                p.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * size)

def make_optimizers(model, run):
    """Muon for the matrices of the blocks, AdamW for the rest (or for all); weight decay not on vectors."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and run.optimizer == "muon"]
    rest = [p for p in model.parameters() if not any(p is q for q in matrices)]  # convolutions are the U-Net's
    groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": run.weight_decay},
              {"params": [p for p in rest if p.dim() > 2], "weight_decay": run.weight_decay, "share": 0.5},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), eps=1e-8)
    by_shape = [{"params": [p for p in matrices if p.shape == shape]} for shape in sorted({p.shape for p in matrices})]
    return [adamw, Muon(by_shape, run.lr, run.weight_decay)] if matrices else [adamw]

def learning_rate(run, step):
    progress = min(1, max(0, step - run.warmup) / max(1, run.steps - run.warmup))
    return run.lr * min((step + 1) / run.warmup, 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)

def train_vae(vae, run, pictures):
    pictures = torch.from_numpy(np.stack(pictures))
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=0)
    for step in (bar := tqdm(range(run.vae_steps), "VAE  ", disable=None)):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 30) * (1 - step / run.vae_steps)
        loss = vae.loss(pictures[torch.randint(len(pictures), (64,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.calibrate(pictures[:1000])

# ---- What is scored --------------------------------------------------------------------------------------------------

class Trained:
    """A trained model as the scores and the reports see it: sentences and uint8 (N, H, W, 3) pictures, no tensors."""

    def __init__(self, model, vae, tokenizer, run):
        self.model, self.vae, self.tokenizer, self.run = model, vae, tokenizer, run

    @torch.no_grad()
    def log_likelihood(self, texts, drawn):
        """log P and number of tokens of each text with the mark behind it: BOI if something is drawn, else EOS."""
        tokens, image_id = pack([[text] for text in texts], self.tokenizer, self.model.cfg.n_patches)
        tokens, image_id = (x.to(self.vae.mean.device) for x in (tokens, image_id))
        tokens = tokens.masked_fill(tokens == EOS, BOI if drawn else EOS)
        error, counts = token_losses(self.model(tokens[:, :-1], image_id[:, :-1])[0], tokens, image_id)
        return -(error * counts).sum(1).cpu().numpy(), counts.sum(1).cpu().numpy()

    def go_on(self, prompts, **options):
        """Complete prompts, 128 at a time: what was written (a list of str), and the last image's latents of each."""
        texts, latents = [], []
        for i in range(0, len(prompts), 128):
            batch = make_batch(prompts[i:i + 128], self.vae, self.tokenizer, self.model.cfg, end=False)
            options.update(steps=self.run.sample_steps, sampler=self.run.sampler)
            tokens, _, images = generate(self.model, *batch, **options)
            texts += [self.tokenizer.decode(row) for row in tokens.tolist()]
            latents.append(images[:, -1])
        return texts, torch.cat(latents)

    def draw(self, prompts, cfg_scale):
        """The next picture of each prompt. Where the model does not choose to draw, latents stay 0: no scene."""
        return self.vae.decode(self.go_on(prompts, cfg_scale=cfg_scale)[1]).cpu().numpy()

    def say(self, pictures):
        return self.go_on([[picture] for picture in pictures], cfg_scale=1, max_images=0)[0]

    def reconstruct(self, pictures):
        latents, cfg = self.vae.encode(torch.from_numpy(pictures)), self.model.cfg
        codes = codes_of(latents[None], cfg.code_levels).cpu().numpy() if cfg.model == "chameleon" else None
        return self.vae.decode(latents).cpu().numpy(), codes

# ---- The run ---------------------------------------------------------------------------------------------------------

def parse_options(argv):
    """Every field of Config and Run is an option. Returns those that were given, and nothing else."""
    parser = ArgumentParser(description=__doc__, argument_default=SUPPRESS, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="a set of model options to start from (default: laptop)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run")
    parser.add_argument("--eval-only", action="store_true", help="only score the checkpoint in --run")
    for f in (*fields(Config), *fields(Run)):
        kw = {"action": BooleanOptionalAction} if f.type is bool else {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + f" [{f.default}]", **kw)
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
    """(checkpoint, (averaged model, VAE, tokenizer)). Exits with one sentence where there is none that can be used."""
    path = Path(folder) / "ckpt.pt"
    if not path.is_file():
        sys.exit(f"There is no checkpoint at {path}: train one first (python train.py), or name its folder with --run.")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        saved["cfg"], saved["run"], tokenizer = Config(**saved["cfg"]), Run(**saved["run"]), Tokenizer(saved["words"])
        model, vae = (part.to(device) for part in make_models(saved["cfg"], len(tokenizer)))
        model.load_state_dict(saved["ema"])
        vae.load_state_dict(saved["vae"])
    except Exception as error:
        sys.exit(f"{path} is not a checkpoint that this version can read ({type(error).__name__}).")
    return saved, (model.requires_grad_(False), vae.requires_grad_(False).eval(), tokenizer)

def report(folder, step, losses, trained, run):
    """While training, on the validation split: a row of log.csv and a row of progress.png."""
    torch.manual_seed(run.seed)  # the same noise every time, so that a column shows one drawing becoming clear
    loss_text, loss_image = np.mean(losses, axis=0)
    row = {"step": step, "loss_text": f"{loss_text:.4f}", "loss_image": f"{loss_image:.4f}"}
    if run.task != "text":
        scenes, captions, pictures = zip(*examples("val", 32, run.seed))
        drawn = trained.draw([[caption] for caption in captions], run.cfg_scale)
        row["val_draw_acc"] = accuracy(map(shapes.read, drawn), scenes)
        row["val_caption_acc"] = accuracy(map(shapes.parse, trained.say(pictures)), scenes)
        if run.task == "edit":
            _, after, before, instructions, _ = zip(*edit_examples("val", 32, run.seed))
            drawn = trained.draw(list(map(list, zip(before, instructions))), run.cfg_scale)
            row["val_edit_acc"] = accuracy(map(shapes.read, drawn), after)
        progress, picture = folder / "progress.png", canvas.side_by_side(drawn[:12])
        if progress.exists():
            picture = canvas.stack(Image.open(progress).convert("RGB"), picture)
        write_whole(progress, lambda path: picture.save(path, "PNG"))
    with open(folder / "log.csv", "a") as file:
        if file.tell() == 0:
            print(*row, sep=",", file=file)
        print(*row.values(), sep=",", file=file)
    tqdm.write("  ".join(f"{name} {value}" for name, value in row.items()))

def draw_figure(shown, cfg, tokenizer):
    """The attention mask of a short document, and what was drawn for held-out prompts."""
    tokens, image_id = pack([["a red circle.", None]], tokenizer, n_patches=4)
    names = ["patch" if k >= 0 else MARKS[i] if i < N_SPECIAL else tokenizer.decode([i])
             for i, k in zip(tokens[0], image_id[0])]
    mask = dense_mask(mixed_mask(image_id, cfg.bidirectional), torch.arange(len(names))[None], len(names))[0, 0]
    mask = canvas.mask_picture(mask, names, image_id[0] >= 0)
    return canvas.beside(mask, canvas.captioned_grid(*(part[:18] for part in shown))) if shown else mask

def main(argv=None):
    given = parse_options(argv)
    made = {"command": " ".join(["python train.py", *(argv or sys.argv[1:])])}
    preset, resume, eval_only = (given.pop(name, None) for name in ("preset", "resume", "eval_only"))
    name = given.get("task", "chameleon" if given.get("model") == "chameleon" else "shapes")
    given = {"run": f"runs/{name}", **({} if resume or eval_only else DEFAULTS.get(name, {})), **given}
    for_model = {name: given.pop(name) for name in list(given) if name in Config.__dataclass_fields__}
    try:
        run, cfg = Run(**given), replace(PRESETS[preset or "laptop"], **for_model)
    except ValueError as error:
        sys.exit(f"These options do not work: {error}.")
    device, folder, saved, started = pick_device(run.device), Path(run.run), None, time.time()
    old = folder if resume or eval_only else run.init
    if old and (preset or set(for_model) - (set(OF_THE_LOSS) if run.init else set())):
        sys.exit("A checkpoint has its own model: its options cannot be given with --resume, --eval-only or --init.")
    if old:
        saved, (ema, vae, tokenizer) = load_run(old, device)
        ema.cfg, cfg = (replace(cfg, **for_model) for cfg in (ema.cfg, saved["cfg"]))
    if resume or eval_only:
        run, made = replace(saved["run"], **given), saved["made"] if resume else {**saved["made"], **made}
    else:
        if folder.exists():  # keep an earlier run under another name
            folder.rename(next(p for i in count(1) if not (p := folder.with_name(f"{folder.name}.{i}")).exists()))
        folder.mkdir(parents=True)

    if not eval_only:
        torch.manual_seed(run.seed)
        data = documents(run.task, run.documents, run.seed, run.caption_first)
        if not saved:
            tokenizer = Tokenizer(WORDS)
            ema, vae = (part.to(device) for part in make_models(cfg, len(tokenizer)))
            pictures = [part for document in data for part in document if not isinstance(part, str)]
            if pictures:  # a text-only run has none
                train_vae(vae, run, pictures)
            vae.requires_grad_(False).eval()
        tokens, image_id, latents = make_batch(data, vae, tokenizer, cfg)
        model = copy.deepcopy(ema).requires_grad_(True)
        # FLOPs as the paper counts them, 6 N D: N parameters without the embedding, D places without padding.
        n_params = sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel()
        places = ((tokens != PAD) | (image_id >= 0)).sum().item() / len(tokens)
        made["flops"] = 6 * n_params * places * run.batch_size * run.steps
        ema.requires_grad_(False)
        optimizers, first, losses = make_optimizers(model, run), 0, []
        if resume:
            model.load_state_dict(saved["model"])
            first, losses = saved["step"], saved["losses"]
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)

        def save(step):
            write_whole(folder / "ckpt.pt", lambda path: torch.save({
                "cfg": asdict(cfg), "run": asdict(run), "words": tokenizer.words, "step": step, "losses": losses,
                "made": made, "vae": vae.state_dict(), "model": model.state_dict(), "ema": ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, path))

        stop = []  # Ctrl-C lets the step finish first
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
        bar = tqdm(range(first, run.steps), "model", run.steps, initial=first, disable=None)
        for step in bar:
            # All randomness of a step follows from its number, which thereby is the random state of a checkpoint.
            torch.manual_seed(run.seed * 1_000_000 + step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(run, step) * group.get("share", 1)
            pick = torch.randint(len(tokens), (run.batch_size,), device=device)
            loss, loss_lm, loss_ddpm = model.loss(tokens[pick], image_id[pick], latents[pick])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            decay = min(run.ema, (1 + step) / (10 + step))  # a short memory at first
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            losses.append((loss_lm.item(), loss_ddpm.item()))
            bar.set_postfix(lm=f"{losses[-1][0]:.3f}", ddpm=f"{losses[-1][1]:.3f}")

            if evaluated := (step + 1) % run.eval_every == 0 or step + 1 == run.steps:
                report(folder, step + 1, losses, Trained(ema, vae, tokenizer, run), run)
                losses.clear()
            if evaluated or stop:
                save(step + 1)
            if stop:
                sys.exit(f"Saved at step {step + 1} of {run.steps}. To go on: python train.py --resume --run {folder}")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # The scores on held-out facts, and a picture to go with them.
    torch.manual_seed(run.seed)
    table, shown = evaluate(Trained(ema, vae, tokenizer, run), run)
    print(f"\n{run.eval_n} held-out examples, seed {run.seed}, {run.sample_steps} {run.sampler} steps",
          *(f"{name:16} {value:8.4f}   {beside}" for name, (value, beside) in table.items()), sep="\n")
    figure = draw_figure(shown, ema.cfg, tokenizer)
    write_whole(folder / "figure.png", lambda path: figure.save(path, "PNG"))
    metrics = {**made, "minutes": (time.time() - started) / 60, "device": str(device), "cores": os.cpu_count(),
               "torch": torch.__version__, "cfg": asdict(cfg), "run": asdict(run), "scores": table}
    write_whole(folder / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))
    print(f"\nfigure.png, progress.png, log.csv and metrics.json are in {folder}. {metrics['minutes']:.1f} minutes, "
          f"{metrics['flops']:.2g} FLOPs.")

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing was lost that --resume or a new run does not bring back.")
