"""Train Transfusion on the toy world: train the VAE, then the model, then score it.

    python train.py                                    the default, to runs/shapes
    python train.py --preset chameleon                 the baseline with discrete images
    python train.py --task text                        the same documents without pictures
    python train.py --init runs/shapes --task edit     teach a trained model to edit pictures
    python train.py --data FOLDER                      your own pictures with captions
    torchrun --standalone --nproc-per-node=4 -- train.py    the default, split across 4 processes

The output directory (--run) gets ckpt.pt, log.csv, progress.png (a row of drawings for each
evaluation), figure.png (the attention mask, and drawings of held-out captions), metrics.json, and
run.json with all settings. While the model trains, Ctrl-C finishes the step, evaluates, saves a
checkpoint and stops. --resume continues from there.

Options come from these sources. Each source overrides those to its left:
    a new run                the defaults below, the task, --preset, the command line
    --init                   the same, but with the checkpoint's Config as the model's defaults
    --resume, --eval-only    the checkpoint, --preset, the command line

To add an option, add a field, with its help as a comment on the same line: to Config in
transfusion.py if it describes the model, and to Run below if not. To add a part of the loss, add it
to the sum in Transfusion.loss and to the parts that it returns. A part "x" appears in log.csv as
the column loss_x. To add a task, write a class like those in data/tasks.py, and add it to TASKS. To
add a score, add it to the dict of scores that the `evaluate` of a task returns.
"""

import atexit
import copy
import inspect
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from threading import Event
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.evaluate import Trained, best_row, validate, write_progress, write_scores
from data.tasks import TASKS
from transfusion import VAE, Chameleon, Config, QuantisedVAE, Tokenizer, Transfusion, encode

# ---- Options -------------------------------------------------------------------------------------

@dataclass
class Run:
    """All options but those of the model. The comment of each field is its help text."""
    run: str = ""  # output directory [runs/NAME: the task, the folder of --data, or chameleon]
    task: Literal[tuple(TASKS)] = ""  # what to train on [shapes, or folder with --data]
    data: str = ""  # folder of your own pictures with captions
    init: str = ""  # output directory of an earlier run, to start from its model
    seed: int = 0  # random seed of the data, the weights and the noise
    device: str = "auto"  # cpu, cuda or mps; auto is cuda or cpu
    documents: int = 32768  # training documents, made before training starts
    caption_first: float = 0.5  # share of pairs with the caption before the picture (paper: 0.8)
    unconditional_share: float = 0.1  # share of documents whose text before a picture is removed
    vae_steps: int = 1000  # training steps of the VAE, with 16 pictures each
    steps: int = 0  # training steps of the model; 0: as many as the task needs
    batch_size: int = 64  # documents per step, across all processes
    bf16: bool = False  # matrix products in bf16, for large models on a GPU
    accumulate: int = 1  # micro-batches per step in each process, to save memory
    # DEVIATION: the paper uses AdamW throughout (--optimizer adamw --lr 2e-3).
    optimizer: Literal["muon", "adamw"] = "muon"  # for the matrices of the transformer
    lr: float = 6e-3  # peak learning rate
    evaluations: int = 12  # number of evaluations in training; each writes a checkpoint
    eval_n: int = 512  # examples per score in the final table
    val_n: int = 16  # examples per score in each evaluation before it, on the validation split
    eval_split: Literal["test", "val"] = "test"  # test for final results, val to choose settings
    sample_steps: int = 25  # denoising steps in evaluations (paper: 250)
    eta: float = 1.0  # sampling noise: 0 is DDIM, 1 is DDPM's ancestral sampler
    guidance_scale: float = 2.0  # classifier-free guidance in evaluations; 1 turns it off

    def __post_init__(self):
        for name in ("documents", "batch_size", "accumulate", "evaluations", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if min(self.eval_n, self.val_n) < 2:
            raise ValueError("eval_n and val_n must be at least 2")
        if self.steps < 0 or abs(self.seed) >= 2**63:
            raise ValueError("steps must be at least 0, and seed less than 2^63")
        if not 0 < self.caption_first <= 1 or not 0 <= self.unconditional_share < 1:
            raise ValueError("caption_first and unconditional_share must be shares of documents")

PAPER = {"target": "eps", "t_power": 1.0}  # the paper's target, and DDPM's uniform noise levels
PAPER_SIZE = PAPER | {
    "image_size": 256, "latent_size": 32, "latent_channels": 8, "vae_dim": 128, "bf16": True,
}
PRESETS = {
    "laptop-paper": PAPER,
    "chameleon": {"model": "chameleon", "qk_norm": True, "vae_steps": 3000},
    # The paper's sizes, for --data. The paper's VAE and U-Net are larger than ours.
    "0.16B": PAPER_SIZE | {"dim": 768, "n_layers": 16, "n_heads": 12},
    "0.37B": PAPER_SIZE | {"dim": 1024, "n_layers": 24, "n_heads": 16},
    "0.76B": PAPER_SIZE | {"dim": 1536, "n_layers": 24, "n_heads": 24},
    "1.4B": PAPER_SIZE | {"dim": 2048, "n_layers": 24, "n_heads": 16},
    "7B": PAPER_SIZE | {"dim": 4096, "n_layers": 32, "n_heads": 32},
}

def parse_options(argv):
    """A dict of only those options that are on the command line or in the preset."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, argument_default=SUPPRESS
    )
    parser.add_argument("--preset", choices=PRESETS, help="options to start from")
    parser.add_argument("--resume", action="store_true",
                        help="continue the run in --run; --steps sets a new end")
    parser.add_argument("--eval-only", action="store_true",
                        help="only score the checkpoint in --run")
    for cls in (Config, Run):
        # The line of a field is "name: type = default  # help".
        lines = inspect.getsource(cls).splitlines()
        comments = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in lines}
        for f in fields(cls):
            text = comments[f.name].replace("%", "%%")  # argparse formats %
            if f.default != "":
                text += f" [{f.default}]"
            choices = get_args(f.type)  # empty if the type is not a Literal
            if f.type is bool:
                kwargs = {"action": BooleanOptionalAction}
            else:
                kwargs = {"choices": choices} if choices else {"type": f.type}
            parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kwargs)
    given = vars(parser.parse_args(argv))
    return PRESETS.get(given.get("preset"), {}) | given

def build(cls, options):
    """A Config or a Run from the options that are fields of it."""
    return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})

# ---- The run -------------------------------------------------------------------------------------

def main(argv=None):
    start_time = time.time()

    # Options. In a | b, those of b win.
    given = parse_options(argv)  # the command line and --preset
    task_name = given.get("task", "folder" if "data" in given else "shapes")
    given.setdefault("run", default_directory(task_name, given))
    directory = Path(given["run"])
    of_task = TASKS[task_name].defaults | {"task": task_name}
    loaded = None
    if "resume" in given or "eval_only" in given:  # the task is that of the checkpoint
        loaded = load_checkpoint(directory)
        options = loaded["cfg"] | loaded["run"] | given
    elif "init" in given:
        loaded = load_checkpoint(given["init"])
        options = loaded["cfg"] | of_task | given
    else:
        options = of_task | given
    # From here on, only the first process prints.
    device, rank, n_processes = start_processes(options.get("device", Run.device))
    try:
        cfg, run = build(Config, options), build(Run, options)
        task = TASKS[run.task](run, cfg.image_size)  # reads the folder, if there is one
    except ValueError as error:  # options that do not fit, or a folder that cannot be used
        sys.exit(str(error))
    run.steps = run.steps or task.steps

    # Models. A trained model keeps its vocabulary, and reads other words as bytes.
    torch.manual_seed(run.seed)  # in all processes, so that they start with the same model
    words = loaded["words"] if loaded else task.words
    tokenizer, model, vae = build_models(cfg, words, device, loaded)
    # There are three sets of weights: those that are trained (model), their average, which is
    # scored (ema), and a copy of the average from the best evaluation (best).
    ema = copy.deepcopy(model)
    trained = Trained(ema, tokenizer, vae, run)  # always has the current average
    if "eval_only" in given:
        if rank == 0:
            write_scores(trained, task, directory, loaded)
        return
    micro_batch_size = divide_batch(run, n_processes)
    optimizers = make_optimizers(model, run)
    first_step, history, drawings, best = 0, [], [], None
    if "resume" in given:
        load_state(model, loaded["model"])  # the latest weights, not the best
        load_state(ema, loaded["ema"])
        for optimizer, state in zip(optimizers, loaded["optimizers"]):
            load_state(optimizer, state)
        first_step, history = loaded["step"], loaded["history"]
        drawings, best = loaded["drawings"], loaded["best"]
        start_time -= 60 * loaded["minutes"]  # so that earlier minutes count
        checkpoint = loaded  # in case no step remains
    settings = {"cfg": asdict(cfg), "run": asdict(run)}
    if rank == 0:
        if "resume" not in given:
            rename_earlier_run(directory)
        write_settings(directory, settings)

    # Documents and VAE.
    documents = task.documents(run.documents, run.seed)
    train_vae(vae, documents, run.vae_steps, n_processes)
    documents = encode(documents, tokenizer, vae)

    # Training. The loop begins with the training step.
    eval_every = math.ceil(run.steps / run.evaluations)
    flops_per_step = run.batch_size * flops_per_document(model, documents)
    interrupted = Event()  # from here on, Ctrl-C sets this flag, and the loop checks it
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    losses = []  # since the last evaluation
    bar = progress_bar(range(first_step, run.steps), "model")
    for step in bar:
        # Each step has its own random numbers, so a resumed run takes the same steps as one without
        # an interruption. (The hash of integers is always the same.)
        torch.manual_seed(hash((run.seed, step, rank)))
        for _ in range(run.accumulate):
            chosen = torch.randint(len(documents), (micro_batch_size,)).tolist()
            with torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
                loss, parts = model.loss([documents[i] for i in chosen])
            (loss / run.accumulate).backward()
        if n_processes > 1:
            average_gradients(model, n_processes)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(grad_norm):
            sys.exit(f"Stopped at step {step + 1}: the loss is {loss}, the norm of its gradient "
                     f"{grad_norm}. The last checkpoint, if there is one, is kept.")
        lr = learning_rate(step, run.steps, run.lr)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        update_average(ema, model, step)

        # Only the first process logs, evaluates and saves. Meanwhile, the others wait in their next
        # call of average_gradients. What is logged are the losses of its last micro-batch.
        if rank > 0:
            continue
        steps_done = step + 1
        losses.append({f"loss_{k}": torch.as_tensor(part).item() for k, part in parts.items()})
        bar.set_postfix(losses[-1])
        if steps_done % eval_every == 0 or steps_done == run.steps or interrupted.is_set():
            means = {k: sum(row[k] for row in losses) / len(losses) for k in losses[0]}
            losses = []
            scores, pictures = validate(trained, task)
            history.append({"step": steps_done} | means | scores)
            drawings += pictures
            write_progress(directory, history, drawings)
            if best_row(history) is history[-1]:
                best = copy.deepcopy(ema.state_dict())
            checkpoint = settings | {
                "words": words, "step": steps_done, "flops": flops_per_step * steps_done,
                "minutes": (time.time() - start_time) / 60,
                "history": history, "drawings": drawings, "vae": vae.state_dict(),
                "model": model.state_dict(), "ema": ema.state_dict(), "best": best,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            save_checkpoint(checkpoint, directory / "ckpt.pt")
            if interrupted.is_set():
                sys.exit(f"Stopped after step {steps_done}. To go on: "
                         f"python train.py --resume --run {shlex.quote(run.run)}")

    # The result.
    if rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # now Ctrl-C stops at once
        ema.load_state_dict(best)
        write_scores(trained, task, directory, checkpoint)

# ---- What main calls -----------------------------------------------------------------------------

def learning_rate(step, steps, peak):
    """Linear warm-up for 2 percent of the steps, then a linear decay to zero.

    DEVIATION: the paper's warm-up is 1.6 percent of the steps, and its decay a cosine to 1.5e-5.
    """
    warmup = 0.02 * steps
    return peak * min((step + 1) / warmup, (steps - step) / (steps - warmup))

@torch.no_grad()
def update_average(ema, model, step):
    """Exponential moving average of the weights, over about 100 steps, over fewer at first."""
    decay = min(0.99, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

def average_gradients(model, n_processes):
    """What DistributedDataParallel does, in its simplest form. Every parameter needs a gradient,
    even if it is zero, like that of the patch encoder in a batch without images.
    """
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= n_processes

def divide_batch(run, n_processes):
    """The number of documents in a micro-batch."""
    n_micro_batches = run.accumulate * n_processes
    if run.batch_size % n_micro_batches:
        sys.exit(f"A batch of {run.batch_size} documents cannot be divided by {n_micro_batches}.")
    return run.batch_size // n_micro_batches

def train_vae(vae, documents, steps, n_processes):
    """Train the VAE on the pictures of documents, unless there are none or it is trained."""
    parts = [part for document in documents for part in document]
    pictures = [part for part in parts if not isinstance(part, str)]
    if not pictures or is_trained(vae):
        return
    print(f"Training the VAE, {steps} steps.", flush=True)
    pictures = torch.from_numpy(np.stack(pictures))
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.95), weight_decay=0)
    vae.train()
    bar = progress_bar(range(steps), "VAE")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak=2e-3)
        loss = vae.loss(pictures[torch.randint(len(pictures), (16,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=loss.item())
    vae.eval()
    if n_processes > 1:  # GPUs may round differently, but all processes need the same VAE
        for tensor in vae.state_dict().values():
            dist.broadcast(tensor, src=0)

def is_trained(vae):
    """A BatchNorm counts the training steps."""
    return vae.normalise.num_batches_tracked > 0

@torch.no_grad()
def flops_per_document(model, documents):
    """FLOPs of training on one document. A backward pass costs twice as many as a forward pass."""
    documents = documents[:256]
    with FlopCounterMode(display=False) as counter:
        model.logits(documents)
    return 3 * counter.get_total_flops() / len(documents)

# ---- Optimisers ----------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): momentum whose updates are made nearly orthogonal.

    The same as torch.optim.Muon(adjust_lr_fn="match_rms_adamw", ns_steps=3), but in fp32, and with
    the matrices of a group, which have the same shape, stacked into one tensor. This is several
    times as fast on a CPU. main sets the learning rate before each step.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]
            grad = torch.stack([p.grad for p in group["params"]])  # (matrices, rows, columns)
            state = self.state[group["params"][0]]  # that of the whole group
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - momentum)
            nesterov = grad.lerp(state["momentum"], momentum)
            updates = orthogonalise(nesterov)
            scale = 0.2 * max(grad.shape[1:]) ** 0.5  # matches the RMS of AdamW's update
            for p, update in zip(group["params"], updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)

def orthogonalise(x, steps=3):
    """Newton-Schulz iteration: a polynomial moves all singular values of matrices towards 1. The
    coefficients are those of Jordan et al.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT, steps).mT  # makes x @ x.mT the smaller of the two products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        xx = x @ x.mT
        x = 3.4445 * x + (-4.775 * xx + 2.0315 * (xx @ xx)) @ x
    return x

def make_optimizers(model, run):
    """Muon for the matrices of the transformer, AdamW for the rest. No weight decay for vectors."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    muon = matrices if run.optimizer == "muon" else []
    taken = set(map(id, muon))
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.95))]
    if muon:
        shapes = sorted({p.shape for p in muon})
        groups = [{"params": [p for p in muon if p.shape == shape]} for shape in shapes]
        optimizers.append(Muon(groups, defaults={"weight_decay": 0.1, "momentum": 0.95}))
    return optimizers

# ---- Processes, models, files --------------------------------------------------------------------

def start_processes(name):
    """Returns the device, the rank of this process, and the number of processes."""
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="replace")  # an odd character never stops a run
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    by_torchrun = dist.is_torchelastic_launched()
    if by_torchrun and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"The device {name} is not available: {reason}")
    if not by_torchrun:
        return device, 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = io.StringIO()  # only the first process prints
    return device, dist.get_rank(), dist.get_world_size()

def progress_bar(steps, description):
    """A bar, if the standard output is a terminal."""
    return tqdm(
        steps, description, steps.stop, initial=steps.start, file=sys.stdout, disable=None
    )

def build_models(cfg, words, device, checkpoint=None):
    """Returns tokenizer, model and VAE, with the best averaged weights of a checkpoint if given."""
    tokenizer = Tokenizer(words)
    if cfg.model == "chameleon":
        model, vae = Chameleon(cfg, len(tokenizer)), QuantisedVAE(cfg, len(tokenizer))
    else:
        model, vae = Transfusion(cfg, len(tokenizer)), VAE(cfg)
    if checkpoint:
        load_state(model, checkpoint["best"])
        load_state(vae, checkpoint["vae"])
    return tokenizer, model.to(device), vae.to(device).eval()

def load_state(thing, state):
    """Load the state of a model or an optimiser from a checkpoint."""
    try:
        thing.load_state_dict(state)
    except (RuntimeError, ValueError) as error:  # it says which keys and shapes differ
        sys.exit(f"The checkpoint does not fit these options. {error}")

def load_checkpoint(directory):
    path = Path(directory) / "ckpt.pt"
    if not path.is_file():
        sys.exit(f"There is no checkpoint at {path}: train a model first (python train.py).")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "best" not in checkpoint:
            raise ValueError("another version wrote it")
    except Exception as error:  # torch.load raises many kinds
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        sys.exit(f"{path} cannot be used: {reason}")
    return checkpoint

def save_checkpoint(checkpoint, path):
    """Write to another file first, so that an interruption never leaves half a checkpoint."""
    temporary = path.with_name("writing-" + path.name)
    torch.save(checkpoint, temporary)
    for seconds in (1, 2, 4):  # on Windows, another program may have the file open
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(seconds)
    os.replace(temporary, path)  # or fail

def default_directory(name, options):
    """runs/ and the name of the folder, of the baseline, or of the task."""
    if "data" in options:
        name = Path(options["data"]).resolve().name
    elif name == "shapes" and options.get("model") == "chameleon":
        name = "chameleon"
    return f"runs/{name}"

def rename_earlier_run(directory):
    """Make room for a new run. Exits if the directory has anything but an earlier run."""
    if (directory / "run.json").is_file():
        names = (f"{directory}.{i}" for i in count(1))
        new_name = next(name for name in names if not Path(name).exists())
        directory.rename(new_name)
        print(f"The earlier run in {directory} is now {new_name}.")
    elif directory.is_file() or any(directory.glob("*")):
        sys.exit(f"{directory} is not the output of an earlier run. Choose another with --run.")

def write_settings(directory, settings):
    """Write run.json, and remove the scores of an earlier step."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "metrics.json").unlink(missing_ok=True)
        (directory / "run.json").write_text(json.dumps(settings, indent=1))
    except OSError as error:
        sys.exit(f"Cannot write to {directory}: {error}.")

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped.")
