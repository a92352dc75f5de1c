"""A trained model as texts and pictures in and out, and how it is scored.

A score is a pair: (value, what to compare it with). Texts are str, and pictures are uint8
(N, H, W, 3).
"""

import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from tqdm import tqdm

from data import plots
from transfusion import (
    BOI,
    BOS,
    EOI,
    EOS,
    PATCH,
    attention_mask,
    encode,
    generate,
    next_logits,
    next_tokens,
    pack,
    q_sample,
)

class Trained:
    """A trained model, with all that it needs to read and to write texts and pictures."""

    def __init__(self, model, tokenizer, vae, run):
        self.model, self.tokenizer, self.vae, self.run = model, tokenizer, vae, run

    def encode_in_parts(self, documents):
        """Documents of str and pictures -> documents of tokens and images, 128 at a time."""
        for i in range(0, len(documents), 128):
            yield encode(documents[i : i + 128], self.tokenizer, self.vae)

    def caption(self, pictures):
        """A caption for each picture."""
        captions = []
        for part in self.encode_in_parts([[picture] for picture in pictures]):
            for _, *tokens in generate(self.model, part, max_tokens=16, max_images=0):
                captions.append(self.tokenizer.decode(tokens))
        return captions

    @torch.no_grad()
    def draw(self, prompts):
        """A picture after each prompt, and the share of them where the model chooses to draw."""
        run, pictures, chosen = self.run, [], []
        for part in self.encode_in_parts(prompts):
            chosen += (next_logits(self.model, part).argmax(-1) == BOI).tolist()
            images = self.model.draw(
                part, run.sample_steps, run.guidance_scale, run.eta, show=lambda xt: None
            )
            pictures.append(self.vae.decode(images).cpu().numpy())
        return np.concatenate(pictures), float(np.mean(chosen))

    def reconstruct(self, pictures):
        """The pictures after the VAE's encoder and decoder."""
        parts = torch.from_numpy(pictures).split(128)
        return np.concatenate([self.vae.decode(self.vae.encode(part)).cpu() for part in parts])

    @torch.no_grad()
    def log_likelihood(self, documents, end=EOS):
        """log P (N,) of the text of each document, and its number of tokens (N,).

        They include BOI before an image, and the token after the document: EOS, or BOI to score
        "an image follows". Images are clean and are not scored themselves.
        """
        log_p, n_tokens = [], []
        for part in self.encode_in_parts(documents):
            tokens, logits = self.model.logits(part)
            targets, has_loss = next_tokens(tokens)
            has_loss = has_loss & (targets < self.model.n_text)  # not Chameleon's codes
            targets = torch.where(targets == EOS, end, targets)[..., None]
            log_p_of_token = logits[:, :-1].log_softmax(-1).gather(2, targets)[..., 0]
            log_p.append((log_p_of_token * has_loss).sum(1).cpu().numpy())
            n_tokens.append(has_loss.sum(1).cpu().numpy())
        return np.concatenate(log_p), np.concatenate(n_tokens)

    @torch.no_grad()
    def diffusion_loss(self, captions, pictures, times=(0.3, 0.5, 0.7, 0.9)):
        """The squared error of x0 for each picture after its caption (N,), averaged over times.

        All pictures get the same noise, so that their losses can be compared.
        """
        cfg, losses = self.model.cfg, []
        eps = torch.randn(1, *cfg.latent_shape, generator=torch.Generator().manual_seed(0))
        prompts = self.encode_in_parts([[caption] for caption in captions])
        for documents, part in zip(prompts, torch.from_numpy(pictures).split(128)):
            x0 = self.vae.encode(part)
            error = 0
            for t in torch.tensor(times, device=x0.device).split(1):
                xt = q_sample(x0, eps.to(x0.device), t)
                error = error + (self.model.predict_x0(documents, xt, t) - x0).square()
            losses.append(error.mean((1, 2, 3)).cpu().numpy() / len(times))
        return np.concatenate(losses)

# ---- Scores --------------------------------------------------------------------------------------

def accuracy(found, wanted):
    """The share of positions at which two sequences agree."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)

def perplexity(log_p, n_tokens):
    """Perplexity per token, from what Trained.log_likelihood returns."""
    return math.exp(min(-log_p.sum() / n_tokens.sum(), 100))

def score_perplexity(name, trained, texts, end, entropy):
    """Perplexity per token of texts, beside that of the true grammar: `entropy` nats for all. And
    their difference as a loss: the excess.
    """
    log_p, n_tokens = trained.log_likelihood([[text] for text in texts], end)
    value = perplexity(log_p, n_tokens)
    best = entropy / n_tokens.sum()
    return {
        f"{name}_ppl": (value, f"best possible {math.exp(best):.4f}: the true grammar"),
        f"{name}_excess": (1000 * float(math.log(value) - best), "best 0, in nats per 1000 tokens"),
    }

def score_matching(trained, captions, pictures, seed, n_choices=8):
    """Does the model know which captions and pictures belong together? Nothing is generated.

    caption_match: is a caption the likeliest after its own picture, among 8? draw_match: does a
    picture have the smallest diffusion loss after its own caption, among 8? The other 7 are chosen
    at random from pairs with another caption and another picture.
    """
    rng = random.Random(seed)
    others = []  # for each pair, the indices of pairs with other captions and other pictures
    for caption, picture in zip(captions, pictures):
        by_caption = {
            other: j for j, other in enumerate(captions)
            if other != caption and (pictures[j] != picture).any()
        }
        others.append(sorted(by_caption.values()))
    n_choices = min(n_choices, 1 + min(map(len, others)))
    if n_choices < 2:
        return {}
    choices = [[i, *rng.sample(row, n_choices - 1)] for i, row in enumerate(others)]
    own = [i for i, row in enumerate(choices) for _ in row]
    other = [j for row in choices for j in row]

    pairs = [[pictures[j], captions[i]] for i, j in zip(own, other)]
    log_p = trained.log_likelihood(pairs)[0].reshape(-1, n_choices)
    chance = f"chance {1 / n_choices:.4f}"
    scores = {"caption_match": (float((log_p[:, 0] > log_p[:, 1:].max(1)).mean()), chance)}
    if trained.model.cfg.model == "transfusion":
        losses = trained.diffusion_loss([captions[j] for j in other], pictures[own])
        losses = losses.reshape(-1, n_choices)
        scores["draw_match"] = float((losses[:, 0] < losses[:, 1:].min(1)).mean()), chance
        scores["diffusion_loss"] = float(losses[:, 0].mean()), "of pictures after their caption"
    return scores

def psnr(a, b):
    """Peak signal-to-noise ratio of pictures in dB, from the mean square error over all of them."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-10)))

def frechet(a, b):
    """Frechet distance between two sets of pictures: small if the two sets are similar.

    |mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)), where A and B are the covariances of 8 x 8 RGB
    thumbnails (192 numbers in [0, 1]). It is sensitive to colours and positions, but hardly to
    shapes beyond their area.
    """
    mean_a, cov_a = thumbnail_statistics(a)
    mean_b, cov_b = thumbnail_statistics(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # tr sqrt(A B) = tr sqrt(root B root)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)

def thumbnail_statistics(pictures):
    """Mean (192,) and covariance (192, 192) of the pictures' 8 x 8 thumbnails."""
    n, height, width, _ = pictures.shape
    thumbnails = pictures.reshape(n, 8, height // 8, 8, width // 8, 3).mean((2, 4)).reshape(n, -1)
    return thumbnails.mean(0) / 255, np.cov(thumbnails / 255, rowvar=False)

def score_frechet(drawn, pictures, others, reconstructed):
    """Frechet distance of drawings from true pictures, beside that of others and of the VAE."""
    beside = f"{frechet(others, pictures):.4f}: other true pictures, "
    return frechet(drawn, pictures), beside + f"{frechet(reconstructed, pictures):.4f}: VAE"

# ---- What a run writes ---------------------------------------------------------------------------

def validate(trained, task):
    """Score validation examples. Returns {score: value}, and a list with one row of drawings, or
    none if the task has none.
    """
    # The same noise each time, so that each column of progress.png follows one drawing.
    run = trained.run
    torch.manual_seed(run.seed)
    report = task.evaluate(trained, "val", run.val_n, run.seed)
    drawings = [] if report.pictures is None else [torch.from_numpy(report.pictures[:12])]
    return {name: value for name, (value, _) in report.scores.items()}, drawings

# What evaluations print: scores with these prefixes. log.csv has all of them.
SHOWN = ("loss", "caption_acc", "draw_acc", "edit_acc", "caption_match", "draw_match")

def write_progress(directory, history, drawings):
    """Write log.csv and progress.png, with one row per validation, and print the last row."""
    names = list(history[-1])
    shown = [f"{name} {history[-1][name]:.3f}" for name in names if name.startswith(SHOWN)]
    tqdm.write(f"step {history[-1]['step']}  " + "  ".join(shown))
    sys.stdout.flush()
    rows = [names] + [[f"{row.get(name, math.nan):.6g}" for name in names] for row in history]
    text = "".join(",".join(row) + "\n" for row in rows)
    try_to_write(directory / "log.csv", lambda path: path.write_text(text))
    if drawings:
        rows = [plots.row_of(pictures.numpy()) for pictures in drawings]
        try_to_write(directory / "progress.png", plots.arrange(rows, columns=1, gap=0).save)

def try_to_write(path, write):
    """A warning is enough where a file is open in another program, as can happen on Windows."""
    try:
        write(path)
    except OSError as error:
        print(f"Warning: {path} could not be written: {error}")

def best_row(history):
    """The evaluation with the lowest held-out loss, or the last, for tasks without this score."""
    return min(reversed(history), key=lambda row: row.get("held_out_loss", 0))

def draw_figure(report, model, tokenizer):
    """The attention mask of a short document, and drawings with their prompts."""
    p = model.cfg.patch_size
    cfg = replace(model.cfg, latent_size=2 * p, image_size=4 * p)  # images of 4 patches
    image = torch.zeros(cfg.latent_shape)
    if cfg.model == "chameleon":
        image = torch.full((4,), model.n_text)
    text = report.prompts[0] if report.prompts else "a red circle."
    tokens, _ = pack([[*tokenizer.encode(text)[:8], image]], cfg, "cpu")
    special = {BOS: "BOS", EOI: "EOI", PATCH: "patch", BOI: "BOI", EOS: "EOS", model.n_text: "code"}
    names = [special.get(token) or tokenizer.decode([token]) for token in tokens[0].tolist()]
    mask = attention_mask(tokens, cfg.bidirectional)[0, 0]
    figure = plots.mask_picture(mask, names, tokens[0] == PATCH)
    if report.pictures is None:
        return figure
    grid = plots.captioned_grid(report.pictures[:18], report.prompts[:18], report.correct[:18])
    return plots.arrange([figure, grid], columns=2, gap=24)

def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {os.cpu_count()} cores, {torch.get_num_threads()} threads"

def write_scores(trained, task, directory, checkpoint):
    """Print the final table, and write metrics.json and figure.png."""
    run, start_time = trained.run, time.time()
    torch.manual_seed(run.seed)
    report = task.evaluate(trained, run.eval_split, run.eval_n, run.seed + 1)
    split = "held-out" if run.eval_split == "test" else "validation"
    print(f"\n{report.n} {split} examples, seed {run.seed}, guidance {run.guidance_scale:g}, "
          f"{run.sample_steps} denoising steps, eta {run.eta:g}, "
          f"weights of step {best_row(checkpoint['history'])['step']}")
    for name, (value, beside) in report.scores.items():
        print(f"{name:14} {value:8.4f}   {beside}")
    figure = draw_figure(report, trained.model, trained.tokenizer)
    try_to_write(directory / "figure.png", figure.save)
    metrics = {name: checkpoint[name] for name in ("step", "minutes", "flops")} | {
        "scoring_minutes": (time.time() - start_time) / 60,
        "machine": f"{device_name(trained.model.device)}, torch {torch.__version__}",
        "cfg": asdict(trained.model.cfg), "run": asdict(run), "scores": report.scores,
    }
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(f"\nThe results are in {directory}. Training took {metrics['minutes']:.1f} minutes "
          f"({metrics['flops']:.2g} FLOPs), and scoring {metrics['scoring_minutes']:.1f} minutes.")
