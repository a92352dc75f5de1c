"""What the scores are made of, without any model: held-out examples, accuracy, Frechet distance."""

import random

import numpy as np

from data import shapes


def examples(split, n, seed):
    """n examples of a split, each as (Scene, caption from either side, picture). A fact may come twice, drawn anew."""
    rng, result = random.Random(seed), []
    for _ in range(n):
        scene = shapes.pick(rng, shapes.SPLITS[split])
        result.append((scene, shapes.describe(scene, rng.random() < 0.5), shapes.render(scene, rng)))
    return result


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
