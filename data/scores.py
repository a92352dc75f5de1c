"""The scores of anything that writes and draws: accuracies, perplexities, Frechet distance, each with its floor.

What is scored has four methods, in terms of sentences and uint8 (N, 32, 32, 3) pictures:

    draw(prompts, cfg_scale)        documents that end before a picture -> pictures
    say(pictures)                   -> captions
    log_likelihood(texts, drawn)    -> log P and number of tokens of each text, BOI (if drawn) or EOS behind it included
    reconstruct(pictures)           -> what the image tokenizer leaves of them, and its codes (None if it has none)
"""

import math
import random

import numpy as np

from data import shapes
from data.documents import edit_examples, entropy, examples

def evaluate(model, run, split="test"):
    """Score a model on run.eval_n held-out examples. Returns {score: (value, what to compare it with)} and, of what was
    drawn at run.cfg_scale, pictures (N, 32, 32 or 64, 3), what was asked for, and which are right. A model of text
    alone draws nothing: None.
    """
    n, seed = run.eval_n, run.seed + 1
    scenes, captions, pictures = zip(*examples(split, n, seed))
    true, rng, table = np.stack(pictures), random.Random(seed), {}
    flips = [rng.random() < 0.5 for _ in scenes]
    for kind, texts in (("text", list(map(shapes.reasoning, scenes, flips))), ("caption", captions)):
        log_p, count = map(sum, model.log_likelihood(texts, drawn=kind == "caption" and run.task != "text"))
        floor = math.exp(entropy(kind, run.task, run.caption_first) * n / count)
        table[f"{kind}_ppl"] = math.exp(-log_p / count), f"floor {floor:.4f}: the grammar's own"
    conclusions = [[shapes.reasoning(*fact, relation) for fact in zip(scenes, flips)] for relation in shapes.INVERSE]
    ranks = np.argmax([model.log_likelihood(texts, drawn=False)[0] for texts in conclusions], axis=0)
    answers = list(map(shapes.answer, scenes, flips))
    table["text_acc"] = accuracy([list(shapes.INVERSE)[i] for i in ranks], answers), "chance 0.25"
    if run.task == "text":
        return table, None

    table["caption_acc"] = accuracy(map(shapes.parse, model.say(true)), scenes), "ceiling 1"
    other = np.stack([shapes.render(scene, rng) for scene in scenes])
    again, codes = model.reconstruct(true)
    ceiling = "ceiling {:.4f}: VAE, {:.4f}: true pictures".format(
        *(accuracy(map(shapes.read, x), scenes) for x in (again, true)))
    floor = f"floor {frechet(other, true):.4f}: true against true, {frechet(again, true):.4f}: VAE"
    for scale in sorted({1.0, 2.0, 4.0, run.cfg_scale}):
        drawn = model.draw([[caption] for caption in captions], scale)
        right = [a == b for a, b in zip(map(shapes.read, drawn), scenes)]
        table[f"draw_acc cfg {scale:g}"] = sum(right) / n, ceiling
        table[f"frechet cfg {scale:g}"] = frechet(drawn, true), floor
        if scale == run.cfg_scale:
            shown = drawn, captions, right
    if codes is not None:
        share = np.unique(codes, return_counts=True)[1] / codes.size
        table["code_ppl"] = float(np.exp(-(share * np.log(share)).sum())), f"{len(share)} codes used: ceiling"

    if run.task == "edit":
        _, afters, befores, instructions, edited = zip(*edit_examples(split, n, seed))
        drawn = model.draw(list(map(list, zip(befores, instructions))), run.cfg_scale)
        right = [a == b for a, b in zip(map(shapes.read, drawn), afters)]
        best = accuracy(map(shapes.read, model.reconstruct(np.stack(edited))[0]), afters)
        table[f"edit_acc cfg {run.cfg_scale:g}"] = sum(right) / n, f"ceiling {best:.4f}: VAE; floor 0: nothing changed"
        shown = np.concatenate([np.stack(befores), drawn], axis=2), instructions, right
    return table, shown

def accuracy(found, wanted):
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)

def frechet(a, b):
    """Frechet distance between two sets of pictures, uint8 (N, 32, 32, 3).

    The feature space is the 8 x 8 RGB thumbnail, 192 numbers in [0, 1]: |mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B))
    with A and B the covariances. It sees colour and place, and of the shape little more than how much ink it has.
    """
    def statistics(pictures):
        thumbnails = pictures.reshape(len(pictures), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(pictures), -1) / 255
        return thumbnails.mean(0), np.cov(thumbnails, rowvar=False)
    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # symmetric, so that tr sqrt(A B) = tr sqrt(root B root)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)
