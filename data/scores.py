"""How text, captions, drawings and edits are scored, each with a value to compare it with.

A model can be scored if it has the methods below. Texts are str, and pictures are uint8 (N, H, W, 3):

    log_likelihood(texts, draws)      log P and number of tokens of each text, including the token after it: BOI if
                                      `draws`, else EOS
    log_likelihood_after(pictures, captions)    the same for each caption, given its picture
    diffusion_loss(captions, pictures)          for each picture, given its caption; None without diffusion
    caption(pictures)                 a caption for each picture
    draw(prompts, guidance_scale)     the next picture of each document
    reconstruct(pictures)             the pictures after the VAE's encoder and decoder
    codes(pictures)                   the codes of a discrete tokenizer, or None

Every scoring function returns {score: (value, what to compare it with)}.
"""

import math
import random

import numpy as np

from data import shapes

def accuracy(found, wanted):
    """The share of positions at which the lists agree."""
    return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)

def score_perplexity(model, name, texts, draws, entropy=None):
    """Perplexity per token, and that of the true grammar if its `entropy` (of all texts, in nats) is given."""
    log_p, n_tokens = map(sum, model.log_likelihood(texts, draws))
    beside = "" if entropy is None else f"best possible {math.exp(entropy / n_tokens):.4f}: the true grammar"
    return {name: (perplexity(log_p, n_tokens), beside)}

def perplexity(log_p, n_tokens):
    return math.exp(min(-log_p / n_tokens, 100))  # exp would overflow for a model that diverged

def score_conclusions(model, scenes, flips):
    """How often is the correct conclusion the likeliest of the four relations?"""
    relations = list(shapes.OPPOSITE)
    log_p = []
    for relation in relations:
        texts = [shapes.argument(scene, flip, relation) for scene, flip in zip(scenes, flips)]
        log_p.append(model.log_likelihood(texts, draws=False)[0])
    chosen = [relations[i] for i in np.argmax(log_p, axis=0)]
    return {"text_acc": (accuracy(chosen, map_all(shapes.conclusion, scenes, flips)), "chance 0.25")}

def score_captions(model, scenes, pictures):
    """How often does the caption of a picture describe its scene?"""
    captions = model.caption(pictures)
    return {"caption_acc": (accuracy(map_all(shapes.parse, captions), scenes), "ceiling 1, floor 0")}

def score_vae(model, scenes, pictures):
    """What does the VAE lose? Its accuracy is the ceiling for drawings."""
    again = model.reconstruct(pictures)
    blank = np.full_like(pictures, shapes.BACKGROUND)
    scores = {
        "vae_psnr": (psnr(again, pictures), f"dB; floor {psnr(blank, pictures):.1f}: a blank picture"),
        "vae_acc": (accuracy(map_all(shapes.read, again), scenes), "ceiling 1"),
    }
    codes = model.codes(pictures)
    if codes is not None:
        share = np.unique(codes, return_counts=True)[1] / codes.size
        perplexity = float(np.exp(-(share * np.log(share)).sum()))
        scores["code_ppl"] = perplexity, f"ceiling {len(share)}: the number of codes in use"
    return scores

def score_drawings(model, scenes, captions, pictures, guidance_scale, seed):
    """How often does a drawing show the scene of its caption? Also returns the drawings, and whether each is correct.

    The Frechet distance is between drawings and true pictures of the same scenes.
    """
    drawn = model.draw([[caption] for caption in captions], guidance_scale)
    correct = [shapes.read(picture) == scene for picture, scene in zip(drawn, scenes)]
    rng = random.Random(seed)
    others = np.stack([shapes.render(scene, rng) for scene in scenes])
    again = model.reconstruct(pictures)
    ceiling = accuracy(map_all(shapes.read, again), scenes)
    return {
        "draw_acc": (sum(correct) / len(correct), f"ceiling {ceiling:.4f}: VAE; floor 0"),
        "frechet": (
            frechet(drawn, pictures),
            f"{frechet(others, pictures):.4f}: other true pictures, {frechet(again, pictures):.4f}: VAE",
        ),
    }, drawn, correct

def score_edits(model, edits, guidance_scale):
    """How often does an edited picture show the scene that the instruction asks for? Returns the same as above."""
    _, after, pictures, instructions, edited = zip(*edits)
    drawn = model.draw([list(prompt) for prompt in zip(pictures, instructions)], guidance_scale)
    correct = [shapes.read(picture) == scene for picture, scene in zip(drawn, after)]
    ceiling = accuracy(map_all(shapes.read, model.reconstruct(np.stack(edited))), after)
    value = sum(correct) / len(correct), f"ceiling {ceiling:.4f}: VAE; floor 0: the picture unchanged"
    return {"edit_acc": value}, drawn, correct

def score_matching(model, captions, pictures, seed, n_choices=8):
    """Does the model know which captions and pictures belong together? This is tested without generating anything.

    caption_match: is a caption most likely after its own picture, among 8? draw_match: does a picture have the smallest
    diffusion loss after its own caption, among 8? The other 7 are chosen at random from pairs with other captions.
    """
    rng = random.Random(seed)
    n_choices = min(n_choices, len(set(captions)))
    if n_choices < 2:
        return {}  # all captions are the same
    choices = []  # for each pair, the indices of n_choices pairs, its own first
    for i, caption in enumerate(captions):
        by_caption = {other: j for j, other in enumerate(captions) if other != caption}
        choices.append([i, *rng.sample(sorted(by_caption.values()), n_choices - 1)])
    own = [i for i, row in enumerate(choices) for _ in row]
    other = [j for row in choices for j in row]

    log_p, n_tokens = model.log_likelihood_after(pictures[other], [captions[i] for i in own])
    log_p, n_tokens = log_p.reshape(-1, n_choices), n_tokens.reshape(-1, n_choices)
    beside = f"chance {1 / n_choices:.4f}"
    scores = {
        "caption_ppl_after": (perplexity(log_p[:, 0].sum(), n_tokens[:, 0].sum()), "of captions after their picture"),
        "caption_match": (float((log_p[:, 0] > log_p[:, 1:].max(1)).mean()), beside),
    }
    losses = model.diffusion_loss([captions[j] for j in other], pictures[own])
    if losses is not None:
        losses = losses.reshape(-1, n_choices)
        scores["diffusion_loss"] = float(losses[:, 0].mean()), "of pictures after their caption"
        scores["draw_match"] = float((losses[:, 0] < losses[:, 1:].min(1)).mean()), beside
    return scores

def map_all(function, *lists):
    return list(map(function, *lists))

def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 pictures in dB, from the mean square error over all of them."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-10)))

def frechet(a, b):
    """Frechet distance between two sets of pictures, uint8 (N, H, W, 3): small if the two sets are similar.

    |mean_a - mean_b|^2 + tr(A + B - 2 sqrt(A B)), where A and B are the covariances of 8 x 8 RGB thumbnails (192
    numbers in [0, 1]). It is sensitive to colours and positions, but hardly to shapes beyond their area.
    """
    mean_a, cov_a = thumbnail_statistics(a)
    mean_b, cov_b = thumbnail_statistics(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # sqrt(A); and tr sqrt(A B) = tr sqrt(root B root)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)

def thumbnail_statistics(pictures):
    """Mean (192,) and covariance (192, 192) of the pictures' 8 x 8 thumbnails."""
    n, height, width, _ = pictures.shape
    thumbnails = pictures.reshape(n, 8, height // 8, 8, width // 8, 3).mean((2, 4)).reshape(n, -1) / 255
    return thumbnails.mean(0), np.cov(thumbnails, rowvar=False)
