"""The tasks that a model can be trained on. A task defines its words, documents, scores and default options.

train.py knows nothing else about it. To train on something else, write a class like these and add it to TASKS.
"""

import random
from typing import NamedTuple

import numpy as np

from data import shapes
from data.documents import (
    edit_document, edit_examples, entropy, examples, make_documents, shapes_document, text_document,
)
from data.folder import frequent_words, load_folder
from data.scores import (
    frechet, psnr, score_captions, score_conclusions, score_drawings, score_edits, score_matching, score_perplexity,
    score_vae,
)

class Report(NamedTuple):
    """The results of an evaluation on n examples."""
    n: int
    scores: dict  # {score: (value, what to compare it with)}
    pictures: np.ndarray | None = None  # uint8 (N, 32, 32 or 64, 3), drawn at the first guidance scale
    prompts: tuple = ()  # what each picture should show
    correct: tuple = ()  # whether each picture shows it

class Shapes:
    """Captions and pictures in either order, and some documents of text alone."""

    name = "shapes"
    words = shapes.WORDS
    image_size = shapes.IMAGE_SIZE
    defaults = {}  # options of train.py whose defaults differ
    make_document = staticmethod(shapes_document)

    def __init__(self, caption_first, unconditional_share):
        self.caption_first, self.unconditional_share = caption_first, unconditional_share

    def documents(self, n, seed):
        return make_documents(self.make_document, n, seed, self.caption_first, self.unconditional_share)

    def entropy(self, kind, scenes):
        return entropy(kind, scenes, self.name, self.caption_first, self.unconditional_share)

    def score_text(self, model, split, n, seed, draws):
        """The scores that need no picture: perplexity and reasoning. `draws`: is a caption followed by BOI, not EOS?"""
        scenes, captions, _ = zip(*examples(split, n, seed))
        rng = random.Random(seed)
        flips = [rng.random() < 0.5 for _ in scenes]
        texts = [shapes.argument(scene, flip) for scene, flip in zip(scenes, flips)]
        return {
            **score_perplexity(model, "text_ppl", texts, False, self.entropy("text", scenes)),
            **score_perplexity(model, "caption_ppl", captions, draws, self.entropy("caption", scenes)),
            **score_conclusions(model, scenes, flips),
        }

    def evaluate(self, model, split, n, seed, guidance_scales):
        """All scores on n examples of a split. At all guidance scales but the first, names end in "g=scale"."""
        scenes, captions, pictures = zip(*examples(split, n, seed))
        pictures = np.stack(pictures)
        scores = self.score_text(model, split, n, seed, draws=True)
        scores |= score_captions(model, scenes, pictures)
        scores |= score_vae(model, scenes, pictures)
        drawing_scores, drawn, correct = score_drawings(model, scenes, captions, pictures, guidance_scales[0], seed)
        scores |= drawing_scores
        for scale in guidance_scales[1:]:
            drawing_scores, _, _ = score_drawings(model, scenes, captions, pictures, scale, seed)
            scores |= {f"{name} g={scale:g}": value for name, value in drawing_scores.items()}
        return Report(n, scores, drawn, captions, correct)

class Text(Shapes):
    """The same documents without their pictures, to measure how much pictures hurt the text."""

    name = "text"
    defaults = {"batch_size": 78}  # about as many positions per step as with pictures
    make_document = staticmethod(text_document)

    def evaluate(self, model, split, n, seed, guidance_scales):
        return Report(n, self.score_text(model, split, n, seed, draws=False))

class Edit(Shapes):
    """Picture, instruction, edited picture; and enough other documents that little is forgotten.

    The picture to edit has no noise (noise_cap 0), and the model learns to follow instructions, not to write them
    (instruction_loss off).
    """

    name = "edit"
    defaults = {
        "documents": 16384, "caption_first": 0.35, "steps": 2800, "optimizer": "adamw", "lr": 1.5e-3,
        "eval_every": 700, "t_power": 4.0, "noise_cap": 0.0, "instruction_loss": False,
    }
    make_document = staticmethod(edit_document)

    def evaluate(self, model, split, n, seed, guidance_scales):
        report = super().evaluate(model, split, n, seed, guidance_scales)
        edits = edit_examples(split, n, seed)
        scores, drawn, correct = score_edits(model, edits, guidance_scales[0])
        _, _, before, instructions, _ = zip(*edits)
        before_and_after = np.concatenate([np.stack(before), drawn], axis=2)
        return Report(n, report.scores | scores, before_and_after, instructions, correct)

class Folder:
    """Your own pictures with captions. No program can read their content, so the scores differ from those above.

    Validation and the final table use the same held-out pictures, but validation uses only the first of them.
    """

    defaults = {}

    def __init__(self, folder, image_size, caption_first, unconditional_share):
        self.image_size = image_size
        self.caption_first, self.unconditional_share = caption_first, unconditional_share
        self.train, self.held_out = load_folder(folder, image_size)
        for pairs in (self.train, self.held_out):  # a folder is sorted, perhaps by what the pictures show
            random.Random(0).shuffle(pairs)
        self.words = frequent_words([caption for caption, _ in self.train])

    def documents(self, n, seed):
        """n documents, but at most 4 per picture."""
        if n < len(self.train):
            print(f"Only {n} of {len(self.train)} pictures are used: --documents is {n}.")
        rng = random.Random(seed)
        documents = []
        for i in range(min(n, 4 * len(self.train))):
            caption, picture = self.train[i % len(self.train)]
            if rng.random() > self.caption_first:
                documents.append([picture, caption])
            elif rng.random() < self.unconditional_share:
                documents.append([picture])
            else:
                documents.append([caption, picture])
        return documents

    def evaluate(self, model, split, n, seed, guidance_scales):
        held_out = self.held_out[:n]
        captions, pictures = [caption for caption, _ in held_out], np.stack([picture for _, picture in held_out])
        others = np.stack([picture for _, picture in random.Random(seed).choices(self.train, k=len(held_out))])
        again = model.reconstruct(pictures)
        drawn = model.draw([[caption] for caption in captions], guidance_scales[0])
        scores = {
            **score_perplexity(model, "caption_ppl", captions, True),
            **score_matching(model, captions, pictures, seed),
            "vae_psnr": (psnr(again, pictures), "dB"),
            "frechet": (
                frechet(drawn, pictures),
                f"{frechet(others, pictures):.4f}: other true pictures, {frechet(again, pictures):.4f}: VAE",
            ),
        }
        for scale in guidance_scales[1:]:
            drawn_at_scale = model.draw([[caption] for caption in captions], scale)
            scores[f"frechet g={scale:g}"] = (frechet(drawn_at_scale, pictures), "")
        return Report(len(held_out), scores, drawn, captions, [True] * len(captions))

TASKS = {task.name: task for task in (Shapes, Text, Edit)}

def make_task(run, image_size):
    """The task that the options of train.py ask for. Raises ValueError if they do not go together."""
    if run.data and run.task != Shapes.name:
        raise ValueError(f"--data cannot be combined with --task {run.task}: leave out one of them.")
    if run.data:
        return Folder(run.data, image_size, run.caption_first, run.unconditional_share)
    task = TASKS[run.task](run.caption_first, run.unconditional_share)
    if image_size != task.image_size:
        raise ValueError(f"The toy world has pictures of {task.image_size} pixels, but image_size is {image_size}.")
    return task
