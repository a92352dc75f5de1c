"""What a model can be trained on. A task brings its words, its documents, its scores and its own default options.

train.py knows nothing else about it. To train on something else, write a class like these and add it to TASKS.
"""

import random
from typing import NamedTuple

import numpy as np

from data import shapes
from data.documents import (
    edit_document, edit_examples, entropy, examples, make_documents, shapes_document, text_document,
)
from data.scores import score_captions, score_conclusions, score_drawings, score_edits, score_perplexity, score_vae

class Report(NamedTuple):
    """What an evaluation found."""
    scores: dict  # {score: (value, what to compare it with)}
    pictures: np.ndarray | None = None  # uint8 (N, 32, 32 or 64, 3), drawn at the first guidance scale
    prompts: tuple = ()  # what each of them should show
    correct: tuple = ()  # and whether it does

class Shapes:
    """Caption and picture in either order, and some text alone."""

    name = "shapes"
    words = shapes.WORDS
    image_size = shapes.IMAGE_SIZE
    defaults = {}  # options of train.py, where they differ
    make_document = staticmethod(shapes_document)

    def __init__(self, caption_first, unconditional_share):
        self.caption_first, self.unconditional_share = caption_first, unconditional_share

    def documents(self, n, seed):
        return make_documents(self.make_document, n, seed, self.caption_first, self.unconditional_share)

    def entropy(self, kind, scenes):
        return entropy(kind, scenes, self.name, self.caption_first, self.unconditional_share)

    def score_text(self, model, split, n, seed, draws):
        """Perplexities and reasoning, which need no picture. `draws`: does BOI follow a caption, or EOS?"""
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
        """All scores on n examples of a split. The names of drawing scores after the first scale end in "g=scale"."""
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
        return Report(scores, drawn, captions, correct)

class Text(Shapes):
    """The same documents without their pictures, so that what pictures cost the text can be measured."""

    name = "text"
    defaults = {"batch_size": 78}  # about as many positions per step as with pictures
    make_document = staticmethod(text_document)

    def evaluate(self, model, split, n, seed, guidance_scales):
        return Report(self.score_text(model, split, n, seed, draws=False))

class Edit(Shapes):
    """Picture, instruction, edited picture; and enough of the other documents that nothing else is forgotten.

    The picture before is seen clean (noise_cap 0), and the model learns to follow instructions, not to write them
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
        return Report(report.scores | scores, before_and_after, instructions, correct)

TASKS = {task.name: task for task in (Shapes, Text, Edit)}
