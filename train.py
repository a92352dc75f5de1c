"""Train Transfusion on the toy world: train the VAE, then the model, then score it.

    python train.py                                    the default, to runs/shapes
    python train.py --model chameleon                  the baseline with discrete images, to runs/chameleon
    python train.py --task text                        the same documents without pictures, to runs/text
    python train.py --init runs/shapes --task edit     teach a trained model to edit pictures, to runs/edit
    python train.py --data FOLDER                      your own pictures with captions, to runs/FOLDER
    torchrun --standalone --nproc-per-node=4 -- train.py    the default, split across four processes

The output directory (--run) will contain ckpt.pt, log.csv, progress.png (a row of drawings for each evaluation),
figure.png (the attention mask, and drawings of held-out captions), metrics.json, and run.json with all settings.
Ctrl-C saves a checkpoint, and --resume continues from it as if nothing had happened.
"""

import copy
import inspect
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, fields, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import plots
from data.files import save_png, write_atomically
from data.tasks import TASKS, make_task
from transfusion import (
    BOI, EOS, N_SPECIAL, NO_LOSS, PAD, SPECIAL_TOKENS, VAE, Chameleon, Config, QuantisedVAE, Tokenizer, Transfusion,
    attention_mask, diffusion_target, encode_pictures, generate, micro_batch, next_token_losses, pack, q_sample,
    unconditional,
)

# ---- Options ---------------------------------------------------------------------------------------------------------

# Model options that belong together.
PAPER = {"qk_norm": False, "target": "eps", "t_power": 1.0, "patch_position": False}
PAPER_VAE = {"image_size": 256, "latent_size": 32, "latent_channels": 8, "vae_dim": 128}
PRESETS = {
    "laptop": Config(),
    "laptop-paper": Config(**PAPER),  # the paper's choices of the model, at laptop size
    "tiny": Config(dim=32, n_layers=2, n_heads=2, vae_dim=8),  # for tests
    # The paper's transformer sizes. The VAE and the U-Net are smaller than the paper's. They need --data.
    "0.16B": Config(**PAPER, **PAPER_VAE, dim=768, n_layers=16, n_heads=12),
    "0.37B": Config(**PAPER, **PAPER_VAE, dim=1024, n_layers=24, n_heads=16),
    "0.76B": Config(**PAPER, **PAPER_VAE, dim=1536, n_layers=24, n_heads=24),
    "1.4B": Config(**PAPER, **PAPER_VAE, dim=2048, n_layers=24, n_heads=16),
    "7B": Config(**PAPER, **PAPER_VAE, dim=4096, n_layers=32, n_heads=32),
}

@dataclass
class Run:
    """Every field is a command-line option, and the comment beside it is its help text."""
    run: str = ""  # output directory (default: runs/shapes, or named after the task, the model or the data folder)
    task: str = "shapes"  # what to train on: shapes, text or edit
    data: str = ""  # folder of your own pictures with captions, instead of the toy world
    init: str = ""  # output directory of an earlier run, to start from its model
    seed: int = 0  # random seed of the data, the weights and the noise
    device: str = "auto"  # cpu, cuda or mps; auto picks the best available
    documents: int = 32768  # training documents, made before training starts
    # DEVIATION: in the paper the caption comes first in 0.8 of the pairs (--caption-first 0.8).
    caption_first: float = 0.5  # share of the caption-picture pairs in which the caption comes first
    unconditional_share: float = 0.1  # share of the documents with text before a picture whose text is removed
    vae_steps: int = 1500  # training steps of the VAE, with 16 pictures each
    steps: int = 3300  # training steps of the model
    batch_size: int = 32  # documents per step, across all processes
    accumulate: int = 1  # gradient accumulation: micro-batches per step and process, to save memory
    # DEVIATION: the paper uses AdamW throughout (--optimizer adamw; at this size with --lr 2e-3).
    optimizer: str = "muon"  # muon for the matrices of the transformer, or adamw for everything
    lr: float = 4e-3  # peak learning rate
    warmup: int = 60  # steps of warm-up; then the rate decays like a cosine to 5 percent, as in the paper
    weight_decay: float = 0.1  # decoupled, and only for matrices
    clip: float = 1.0  # clip the gradient to this norm
    ema: float = 0.99  # decay of the moving average of the weights, which is what is scored and sampled from
    eval_every: int = 550  # steps between evaluations, each of which writes a checkpoint
    eval_n: int = 512  # examples per score in the final table
    eval_split: str = "test"  # test for final results, val to choose settings by (the same pictures if --data is given)
    sample_steps: int = 25  # denoising steps in evaluations; the paper takes 250
    eta: float = 0.0  # sampling noise: 0 is DDIM, 1 is DDPM's ancestral sampler
    guidance_scale: float = 2.0  # classifier-free guidance in evaluations; 1 turns it off
    guidance_sweep: bool = False  # also score drawings at guidance 1, 1.5, 2, 3 and 4

CHOICES = {
    "model": ("transfusion", "chameleon"), "target": ("eps", "v", "x0"), "patch_encoder": ("linear", "unet"),
    "task": tuple(TASKS), "optimizer": ("muon", "adamw"), "eval_split": ("test", "val"),
}
LEAST = {"seed": 0, "eval_n": 2, "code_levels": 2}  # other integers are at least 1, other floats at least 0
MORE_THAN_0 = "caption_first", "lr", "clip", "t_power"
AT_MOST_1 = "caption_first", "unconditional_share", "ema", "eta", "noise_cap"
LESS_THAN_1 = "unconditional_share", "ema"
LOSS_OPTIONS = "noise_cap", "lambda_ddpm", "t_power", "instruction_loss"  # model options that --init can change
# --eval-only can change these:
SCORE_OPTIONS = "eval_n", "eval_split", "sample_steps", "eta", "guidance_scale", "guidance_sweep"
RESUME_OPTIONS = "steps", "eval_every", "accumulate", *SCORE_OPTIONS  # --resume can change these
# Scores that are printed during training, by prefix. log.csv has all of them.
SHOWN_WHILE_TRAINING = "loss", "caption_acc", "draw_acc", "edit_acc", "caption_match", "draw_match"

def check_options(options):
    """Raise ValueError if a number among the options {name: value} is out of range."""
    for name, value in options.items():
        if type(value) is int and value < LEAST.get(name, 1):
            raise ValueError(f"{name} must be at least {LEAST.get(name, 1)}, not {value}")
        if type(value) is float and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number and at least 0, not {value}")
        if name in MORE_THAN_0 and value == 0:
            raise ValueError(f"{name} must be more than 0")
        if name in AT_MOST_1 and value > 1:
            raise ValueError(f"{name} must be at most 1, not {value}")
        if name in LESS_THAN_1 and value == 1:
            raise ValueError(f"{name} must be less than 1")
        if name == "seed" and value > 10**9:
            raise ValueError(f"seed must be at most {10**9}, not {value}")

def check_config(cfg):
    """Raise ValueError if options of the model do not go together."""
    if cfg.code_levels**cfg.code_dim > 2**16:
        raise ValueError("code_levels ** code_dim, the number of codes, must be at most 65536")
    if cfg.dim % (2 * cfg.n_heads):
        raise ValueError(f"dim ({cfg.dim}) must be a multiple of 2 * n_heads ({2 * cfg.n_heads})")
    if cfg.patch_size not in (1, 2, 4, 8) or cfg.latent_size % cfg.patch_size:
        raise ValueError(f"patch_size must be 1, 2, 4 or 8 and divide latent_size ({cfg.latent_size})")
    if cfg.image_size % 8:
        raise ValueError(f"image_size ({cfg.image_size}) must be a multiple of 8")
    if cfg.image_size not in [cfg.latent_size * 2**n for n in range(1, 10)]:
        raise ValueError(f"image_size must be latent_size ({cfg.latent_size}) * 2, 4, 8, ...")

def make_models(cfg, tokenizer):
    """Build the untrained model and its VAE."""
    if cfg.model == "chameleon":
        return Chameleon(cfg, tokenizer), QuantisedVAE(cfg)
    vae = VAE(cfg.image_size, cfg.latent_size, cfg.latent_channels, cfg.vae_dim, cfg.vae_kl)
    return Transfusion(cfg, tokenizer), vae

# ---- Optimisers ------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): momentum whose updates are made nearly orthogonal (all singular values about 1).

    The same as torch.optim.Muon(adjust_lr_fn="match_rms_adamw", ns_steps=3), but in fp32 and for all matrices of one
    shape at once, which is many times faster on CPUs without bf16 units.
    """

    def __init__(self, groups, lr, weight_decay, momentum=0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:  # a group is all matrices of one shape
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            grad = torch.stack([p.grad for p in params])  # (matrices, rows, columns)
            state = self.state[params[0]]  # of the whole group
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - momentum)
            update = orthogonalise(grad.lerp(state["momentum"], momentum))  # Nesterov momentum
            scale = 0.2 * max(grad.shape[1:]) ** 0.5  # matches the RMS of AdamW's update
            for p, u in zip(params, update):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(u, alpha=-lr * scale)

def orthogonalise(x, steps=3):
    """Newton-Schulz iteration: a polynomial moves all singular values of the matrices (n, rows, columns) towards 1."""
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, steps).mT  # the products below are smaller this way
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        xx = x @ x.mT
        x = 3.4445 * x + (-4.775 * xx + 2.0315 * xx @ xx) @ x
    return x

def make_optimizers(model, run):
    """Muon for the matrices of the transformer, AdamW for everything else. Only matrices and kernels decay."""
    muon_params = [p for p in model.transformer.parameters() if p.dim() == 2] if run.optimizer == "muon" else []
    in_muon = {id(p) for p in muon_params}
    rest = [p for p in model.parameters() if id(p) not in in_muon]
    groups = [
        {"params": [p for p in rest if p.dim() == 2], "weight_decay": run.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        # NOT STATED: whether the U-Net has its own learning rate. Here its convolutions have half.
        {"params": [p for p in rest if p.dim() > 2], "weight_decay": run.weight_decay, "lr_scale": 0.5},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), eps=1e-8)]
    if muon_params:
        shapes = sorted({p.shape for p in muon_params})
        groups = [{"params": [p for p in muon_params if p.shape == shape]} for shape in shapes]
        optimizers.append(Muon(groups, run.lr, run.weight_decay))
    return optimizers

def learning_rate(run, step):
    """Linear warm-up, then a cosine from the peak to 5 percent of it."""
    progress = min(1, max(0, step - run.warmup) / max(1, run.steps - run.warmup))
    cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
    return run.lr * min((step + 1) / run.warmup, cosine)

def train_vae(vae, pictures, steps):
    """Train the VAE on pictures, uint8 (M, H, W, 3)."""
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=0)
    bar = progress_bar(range(steps), "VAE  ")
    for step in bar:
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        batch = torch.randint(len(pictures), (16,))
        loss = vae.loss(pictures[batch])
        if not torch.isfinite(loss):
            sys.exit(f"The loss of the VAE is {loss.item()} at step {step + 1}. No checkpoint was written.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.calibrate(pictures[:1000])

# ---- Evaluation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def log_likelihood(model, documents, next_token=EOS):
    """Returns two tensors (B,): log P of each document, and the number of tokens that it covers.

    It covers all tokens with an LM loss. At the end, next_token replaces EOS: pass BOI to score "an image follows". The
    images are clean and are not scored.
    """
    logits, batch = model.logits(documents)
    targets = torch.where(batch.targets == EOS, next_token, batch.targets)
    return -next_token_losses(logits, targets).sum(1), (targets != NO_LOSS).sum(1)

class Trained:
    """The interface that data/scores.py expects: texts and pictures, uint8 (N, H, W, 3), in and out."""

    def __init__(self, model, vae, run):
        self.model, self.vae, self.run = model, vae, run

    def complete(self, documents, **options):
        """Continue documents of str and pictures, 128 at a time. Returns documents of str and latents (or codes)."""
        results = []
        for i in range(0, len(documents), 128):
            encoded = encode_pictures(documents[i : i + 128], self.vae)
            results += generate(self.model, encoded, max_tokens=16, steps=self.run.sample_steps, eta=self.run.eta,
                                **options)
        return results

    def caption(self, pictures):
        documents = self.complete([[picture] for picture in pictures], max_images=0)
        return ["".join(document[1:]) for document in documents]

    def draw(self, prompts, guidance_scale):
        """The picture that follows each prompt; black where the model chose not to draw one."""
        documents = self.complete(prompts, guidance_scale=guidance_scale)
        size = self.model.cfg.image_size
        pictures = np.zeros((len(prompts), size, size, 3), np.uint8)
        images = [unconditional(document) for document in documents]  # without their text
        drew = [i for i, prompt in enumerate(prompts) if len(images[i]) > len(unconditional(prompt))]
        if drew:
            images = torch.stack([images[i][-1] for i in drew])
            pictures[drew] = self.vae.decode(images).cpu().numpy()
        return pictures

    def log_likelihood(self, texts, draws):
        return self.log_likelihood_of([[text] for text in texts], BOI if draws else EOS)

    def log_likelihood_after(self, pictures, captions):
        return self.log_likelihood_of([list(pair) for pair in zip(pictures, captions)], EOS)

    def log_likelihood_of(self, documents, next_token):
        log_p, n_tokens = [], []
        for i in range(0, len(documents), 128):
            result = log_likelihood(self.model, encode_pictures(documents[i : i + 128], self.vae), next_token)
            log_p.append(result[0].cpu().numpy())
            n_tokens.append(result[1].cpu().numpy())
        return np.concatenate(log_p), np.concatenate(n_tokens)

    @torch.no_grad()
    def diffusion_loss(self, captions, pictures, times=(0.3, 0.5, 0.7, 0.9)):
        """The diffusion loss of each picture (N,), averaged over some times. All share the same noise, so that the
        losses are comparable.
        """
        if self.model.cfg.model == "chameleon":
            return None
        eps = torch.randn(1, *self.model.cfg.latent_shape, generator=torch.Generator().manual_seed(0))
        losses = []
        for i in range(0, len(captions), 128):
            x0 = self.vae.encode(torch.from_numpy(pictures[i : i + 128]))
            noise = eps.to(x0.device).expand_as(x0)
            errors = []
            for t in x0.new_tensor(times):
                xt = q_sample(x0, noise, t.expand(len(x0)))
                documents = [list(pair) for pair in zip(captions[i : i + 128], xt)]
                pred = self.model.predict_last_image(documents, t)
                target = diffusion_target(x0, noise, t.expand(len(x0)), self.model.cfg.target)
                errors.append((pred - target).square().mean((1, 2, 3)))
            losses.append(torch.stack(errors).mean(0).cpu().numpy())
        return np.concatenate(losses)

    def reconstruct(self, pictures):
        return self.vae.decode(self.vae.encode(torch.from_numpy(pictures))).cpu().numpy()

    def codes(self, pictures):
        if self.model.cfg.model != "chameleon":
            return None
        return self.vae.encode(torch.from_numpy(pictures)).cpu().numpy()

def validate(trained, task, step, losses):
    """Score a few validation examples. Returns a row of log.csv, and 12 drawings or None."""
    run = trained.run
    torch.manual_seed(run.seed)  # the same noise each time, so that each column of progress.png follows one drawing
    report = task.evaluate(trained, "val", 32, run.seed, [run.guidance_scale])
    loss_text, loss_image = np.mean(losses, axis=0).tolist()
    row = {"step": step, "loss_text": loss_text, "loss_image": loss_image}
    row |= {score: value for score, (value, _) in report.scores.items()}
    return row, None if report.pictures is None else torch.from_numpy(report.pictures[:12])

def write_progress(directory, history, drawings):
    """Write log.csv and progress.png, with one row per validation."""
    lines = [",".join(history[0])] + [",".join(f"{value:.6g}" for value in row.values()) for row in history]
    write_atomically(directory / "log.csv", lambda path: path.write_text("\n".join(lines) + "\n"))
    if drawings:
        picture = plots.row_of(drawings[0].numpy())
        for row in drawings[1:]:
            picture = plots.stack(picture, plots.row_of(row.numpy()))
        save_png(picture, directory / "progress.png")

def draw_figure(report, cfg, tokenizer):
    """The attention mask of a short document, and drawings with their prompts."""
    small = replace(cfg, latent_size=2 * cfg.patch_size, image_size=4 * cfg.patch_size)  # images of 4 patches
    batch = pack([["a red circle.", torch.zeros(small.latent_shape)]], tokenizer, small)
    is_patch = batch.image_id[0] >= 0
    names = [
        "patch" if patch else SPECIAL_TOKENS[token] if token < N_SPECIAL else tokenizer.decode([token])
        for token, patch in zip(batch.tokens[0].tolist(), is_patch.tolist())
    ]
    bidirectional = cfg.bidirectional and cfg.model == "transfusion"
    mask = plots.mask_picture(attention_mask(batch.image_id, bidirectional)[0, 0], names, is_patch)
    if report.pictures is None:
        return mask
    grid = plots.captioned_grid(report.pictures[:18], report.prompts[:18], report.correct[:18])
    return plots.beside(mask, grid)

def write_scores(trained, task, directory, about):
    """Print the final table, write it with `about` to metrics.json, and write figure.png."""
    run, cfg = trained.run, trained.model.cfg
    start_time = time.time()
    torch.manual_seed(run.seed)
    scales = [run.guidance_scale]
    if run.guidance_sweep:
        scales += [scale for scale in (1, 1.5, 2, 3, 4) if scale != run.guidance_scale]
    report = task.evaluate(trained, run.eval_split, run.eval_n, run.seed + 1, scales)
    held_out = "held-out" if run.eval_split == "test" else "validation"
    print(f"\n{report.n} {held_out} examples, seed {run.seed}, guidance {run.guidance_scale:g}, "
          f"{run.sample_steps} denoising steps, eta {run.eta:g}")
    for name, (value, beside) in report.scores.items():
        print(f"{name:14} {value:8.4f}   {beside}")
    save_png(draw_figure(report, cfg, trained.model.tokenizer), directory / "figure.png")
    metrics = about | {"scoring_minutes": (time.time() - start_time) / 60, "scores": report.scores}
    write_atomically(directory / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))
    written = [name for name in ("figure.png", "progress.png", "log.csv") if (directory / name).exists()]
    print(f"\n{', '.join(written)} and metrics.json are in {directory}.")
    print(f"Training took {metrics['minutes']:.1f} minutes ({metrics['flops']:.2g} FLOPs), "
          f"and scoring {metrics['scoring_minutes']:.1f}.")

# ---- The run ---------------------------------------------------------------------------------------------------------

def parse_options(argv):
    """Every field of Config and Run is an option. Returns a dict of the ones given."""
    parser = ArgumentParser(description=__doc__, argument_default=SUPPRESS, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="model options to start from [laptop]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run in --run; --steps sets a new end")
    mode.add_argument("--eval-only", action="store_true", help="only score the checkpoint in --run")
    for options in (Config, Run):
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(options), re.MULTILINE))
        for f in fields(options):
            if f.type is bool:
                kind = {"action": BooleanOptionalAction}
            else:
                kind = {"type": f.type, "choices": CHOICES.get(f.name)}
            default = "" if f.default == "" else f" [{f.default}]"
            parser.add_argument("--" + f.name.replace("_", "-"), help=comments[f.name] + default, **kind)
    return vars(parser.parse_args(argv))

def as_typed(names):
    """("eval_n", "eta") -> "--eval-n, --eta"."""
    return ", ".join("--" + name.replace("_", "-") for name in names)

class Loss(torch.nn.Module):
    """A model whose forward pass is its loss: DistributedDataParallel works on the forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)

def join_processes():
    """Returns the rank of this process and the number of processes: (0, 1) without torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    if dist.get_rank() > 0:
        sys.stdout = io.StringIO()  # only the first process reports
    return dist.get_rank(), dist.get_world_size()

def progress_bar(steps, description, **options):
    """A bar in the terminal of the first process. Where there is no terminal, there is no bar."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    return tqdm(steps, description, disable=None if is_first else True, **options)

def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        sys.exit(f"The device {name} is not available on this machine; try --device cpu.")
    return device

def load_checkpoint(directory, device):
    """Returns (checkpoint, averaged model, VAE). Exits with a message if they cannot be loaded."""
    path = Path(directory) / "ckpt.pt"
    if not path.is_file():
        sys.exit(f"There is no checkpoint at {path}: train a model first (python train.py), or give another directory.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["cfg"] = Config(**checkpoint["cfg"])
        checkpoint["run"] = Run(**checkpoint["run"])
        model, vae = make_models(checkpoint["cfg"], Tokenizer(checkpoint["words"]))
        model.load_state_dict(checkpoint["ema"])
        vae.load_state_dict(checkpoint["vae"])
    except Exception as error:
        sys.exit(f"{path} is not a checkpoint that this version can read ({type(error).__name__}).")
    return checkpoint, model.to(device).requires_grad_(False), vae.to(device).requires_grad_(False).eval()

def checksum_of(documents):
    """A checksum of texts and pictures, to notice when --resume would train on other data."""
    checksum = 0
    for document in documents:
        for part in document:
            checksum = zlib.crc32(part.encode() if isinstance(part, str) else part, checksum)
    return checksum

def save_checkpoint(checkpoint, path):
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))

def make_directory(directory, settings):
    """Make the output directory of a new run. An earlier run there is renamed. Exits if anything else is there."""
    directory = Path(os.path.abspath(directory))
    marker, temporary = directory / "run.json", "writing-run.json"
    if marker.is_file():
        new_name = next(path for i in count(1) if not (path := directory.with_name(f"{directory.name}.{i}")).exists())
        directory.rename(new_name)
        print(f"The earlier run in {directory} is now {new_name}.")
    elif os.path.lexists(directory) and not (directory.is_dir() and not set(os.listdir(directory)) - {temporary}):
        sys.exit(f"{directory} exists and is not the output of an earlier run. Choose another directory with --run.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(marker, lambda path: path.write_text(json.dumps(settings, indent=1)))
    except OSError as error:
        sys.exit(f"Cannot write to {directory}: {error}.")

def on_interrupt(action):
    """Set what Ctrl-C does from here on: exit with a message, or call a function."""
    signal.signal(signal.SIGINT, (lambda *_: sys.exit(action)) if isinstance(action, str) else lambda *_: action())

def main(argv=None):
    start_time = time.time()
    options = parse_options(argv)
    command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    preset = options.pop("preset", None)
    resume = options.pop("resume", False)
    eval_only = options.pop("eval_only", False)
    is_new = not resume and not eval_only
    on_interrupt("Stopped before training: " + ("nothing is saved." if is_new else "the checkpoint is unchanged."))
    rank, n_processes = join_processes()  # before pick_device, because it gives each process its own GPU
    device = pick_device(options.get("device", "auto"))

    # The output directory, by default named after the data folder, the task or the baseline.
    default_name = options.get("task", Run.task)
    if default_name == Run.task and options.get("model") == "chameleon":
        default_name = "chameleon"
    if options.get("data"):
        default_name = Path(options["data"]).resolve().name
    options.setdefault("run", f"runs/{default_name}")
    directory = Path(options["run"])

    # Split the options into those of the model and those of the run.
    if is_new:
        options = TASKS[options.get("task", "shapes")].defaults | options
    model_options = {name: value for name, value in options.items() if name in Config.__dataclass_fields__}
    run_options = {name: value for name, value in options.items() if name in Run.__dataclass_fields__}

    # Continue or score a checkpoint, start from that of another run, or start from scratch.
    try:
        check_options(options)
        if resume or eval_only:
            checkpoint, averaged, vae = load_checkpoint(directory, device)
            can_change = RESUME_OPTIONS if resume else SCORE_OPTIONS
            if preset or model_options or not set(run_options) <= {"run", "device", *can_change}:
                sys.exit("--resume and --eval-only take all options from the checkpoint. "
                         f"Besides --run and --device, only these can be given: {as_typed(can_change)}.")
            cfg = checkpoint["cfg"]
            run = replace(checkpoint["run"], **run_options)
            command = checkpoint["command"]
            minutes_before = checkpoint["minutes"]
        elif "init" in run_options:
            if Path(run_options["init"]).resolve() == directory.resolve():
                sys.exit(f"--init and --run are both {directory}. Choose another output directory with --run.")
            checkpoint, averaged, vae = load_checkpoint(run_options["init"], device)
            if preset or not set(model_options) <= set(LOSS_OPTIONS):
                sys.exit("--init takes the model from the checkpoint. Of the model's options, only these can be given: "
                         f"{as_typed(LOSS_OPTIONS)}.")
            cfg = replace(checkpoint["cfg"], **model_options)
            averaged.cfg = cfg
            run = Run(**run_options)
            minutes_before = 0
        else:
            checkpoint = None
            cfg = replace(PRESETS[preset or "laptop"], **model_options)
            run = Run(**run_options)
            minutes_before = 0
        check_config(cfg)
    except ValueError as error:
        sys.exit(f"These options do not work: {error}.")
    if resume and run.steps < checkpoint["step"]:
        sys.exit(f"{directory} is already at step {checkpoint['step']}, beyond --steps {run.steps}.")
    if run.data and Path(run.data).resolve().is_relative_to(directory.resolve()):
        sys.exit(f"{run.data} is inside the output directory {directory}. Choose another one with --run.")
    n_micro_batches = n_processes * run.accumulate
    if run.batch_size < n_micro_batches:
        sys.exit(f"A batch of {run.batch_size} documents cannot be divided into {n_micro_batches} parts.")
    try:
        task = make_task(run, cfg.image_size)
    except ValueError as error:
        sys.exit(str(error))
    settings = {"command": command, "cfg": asdict(cfg), "run": asdict(run)}
    if is_new and rank == 0:
        make_directory(directory, settings)

    if not eval_only:
        words = checkpoint["words"] if checkpoint else task.words
        with torch.device("meta"):  # to count the parameters without memory for them
            n_all = sum(p.numel() for p in make_models(cfg, Tokenizer(words))[0].parameters())
        print(f"{n_all / 1e6:.2f}M parameters: weights, their average, gradients and the optimizer's states take at "
              f"most {20 * n_all / 1e9:.2g} GB, plus the activations.", flush=True)

        # The documents, and a new VAE and model if there is no checkpoint.
        torch.manual_seed(run.seed)
        print("Making the training documents.", flush=True)
        documents = task.documents(run.documents, run.seed)
        checksum = checksum_of(documents)
        if resume and checkpoint.get("checksum", checksum) != checksum:
            sys.exit(f"{run.data or 'The toy world'} has other pictures or captions than {directory} was trained on.")
        if checkpoint is None:
            averaged, vae = make_models(cfg, Tokenizer(words))
            averaged.to(device).requires_grad_(False)
            vae.to(device)
        # Each picture once, although several documents of a folder have the same one.
        pictures = {id(part): part for document in documents for part in unconditional(document)}
        vae_is_trained = checkpoint is not None and checkpoint.get("vae_is_trained", True)
        if pictures and not vae_is_trained:  # a task may be text alone
            print(f"Training the VAE on {len(pictures)} pictures, {run.vae_steps} steps.", flush=True)
            vae.requires_grad_(True).train()
            train_vae(vae, torch.from_numpy(np.stack(list(pictures.values()))), run.vae_steps)
            vae_is_trained = True
            if n_processes > 1:  # GPUs round differently, but all processes need the same VAE
                for tensor in vae.state_dict().values():
                    dist.broadcast(tensor, src=0)
        vae.requires_grad_(False).eval()
        in_parts = [documents[i : i + 1024] for i in range(0, len(documents), 1024)]
        documents = [document for part in in_parts for document in encode_pictures(part, vae)]

        # The model that is trained. `averaged` is its moving average, which is scored and sampled from.
        model = copy.deepcopy(averaged).requires_grad_(True)
        optimizers = make_optimizers(model, run)
        loss_of = Loss(model)
        if n_processes > 1:
            loss_of = DistributedDataParallel(loss_of)  # averages the gradients of all processes
        first_step, losses, history, drawings = 0, [], [], []
        if resume:
            model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            first_step = checkpoint["step"]
            if rank == 0 and first_step < run.steps:
                write_atomically(directory / "run.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
                (directory / "metrics.json").unlink(missing_ok=True)  # which has the scores of an earlier step
            losses = checkpoint["losses"]
            history = checkpoint["history"]
            drawings = checkpoint["drawings"]

        # FLOPs as the paper counts them, 6 N D: N parameters without the embedding, D positions without padding.
        n_params = sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel()
        tokens = averaged.pack(documents[:1024]).tokens
        positions_per_document = (tokens != PAD).sum().item() / len(tokens)
        flops_per_step = 6 * n_params * positions_per_document * run.batch_size
        print(f"Training the model, {run.steps} steps of {flops_per_step:.1e} FLOPs each.", flush=True)

        interrupted = []  # not empty after Ctrl-C, which lets the step finish first
        on_interrupt(lambda: interrupted.append(True))
        bar = progress_bar(range(first_step, run.steps), "model", total=run.steps, initial=first_step)
        for step in bar:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(run, step) * group.get("lr_scale", 1)
            # Seed each step by its number, so that all processes, and a resumed run, draw the same random numbers.
            torch.manual_seed(run.seed * 1_000_000 + step)
            chosen = torch.randint(len(documents), (run.batch_size,)).tolist()
            batch = model.training_batch([documents[j] for j in chosen])
            step_losses = torch.zeros(3, device=device)  # loss, loss_text, loss_image
            for i in range(run.accumulate):
                part = micro_batch(batch, rank * run.accumulate + i, n_micro_batches)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    losses_of_part = loss_of(part)
                (n_processes * losses_of_part[0]).backward()  # the processes' gradients are averaged, not summed
                step_losses += torch.stack(losses_of_part).detach()
            if n_processes > 1:
                dist.all_reduce(step_losses)
            loss, loss_text, loss_image = step_losses.tolist()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip).item()
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                sys.exit(f"Stopped at step {step + 1}: the loss is {loss}, the norm of its gradient {grad_norm}. "
                         "The last checkpoint, if there is one, is kept.")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append((loss_text, loss_image))
            decay = min(run.ema, (1 + step) / (10 + step))  # a short memory at first
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
            bar.set_postfix(text=f"{loss_text:.3f}", image=f"{loss_image:.3f}")
            if rank > 0:
                continue

            is_evaluation = (step + 1) % run.eval_every == 0 or step + 1 == run.steps
            if is_evaluation:
                row, pictures = validate(Trained(averaged, vae, run), task, step + 1, losses)
                history.append(row)
                if pictures is not None:
                    drawings.append(pictures)
                losses = []
                shown = {name: value for name, value in row.items() if name.startswith(SHOWN_WHILE_TRAINING)}
                tqdm.write(f"step {step + 1}  " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()))
            if is_evaluation or interrupted:
                checkpoint = {
                    "cfg": asdict(cfg),
                    "run": asdict(run),
                    "command": command,
                    "words": averaged.tokenizer.words,
                    "vae": vae.state_dict(),
                    "vae_is_trained": vae_is_trained,
                    "model": model.state_dict(),
                    "ema": averaged.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "step": step + 1,
                    "minutes": minutes_before + (time.time() - start_time) / 60,
                    "flops": flops_per_step * (step + 1),
                    "checksum": checksum,
                    "losses": losses,  # since the last evaluation
                    "history": history,
                    "drawings": drawings,
                }
                save_checkpoint(checkpoint, directory / "ckpt.pt")
                if history:
                    write_progress(directory, history, drawings)
            if interrupted:
                sys.exit(f"Saved at step {step + 1}. To continue: python train.py --resume --run {directory}")
        if history and rank == 0:
            write_progress(directory, history, drawings)

    if n_processes > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    on_interrupt(f"Stopped while scoring. To score the checkpoint: python train.py --eval-only --run {directory}")
    about = {
        "command": command, "step": checkpoint["step"], "minutes": checkpoint["minutes"], "flops": checkpoint["flops"],
        "device": str(device), "cores": os.cpu_count(), "torch": torch.__version__,
        "cfg": asdict(cfg), "run": asdict(run),
    }
    write_scores(Trained(averaged, vae, run), task, directory, about)

if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # the disk is full, for example
        sys.exit(f"Stopped: {error}.")
