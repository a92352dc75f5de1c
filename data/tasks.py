"""What a model is trained on, and how it is scored: one class for each task.

To train on something else, write a class like these, and add it to TASKS. Nothing else knows about
it. A document is a list of str and pictures, uint8 (H, W, 3), in reading order.
"""

import copy
import math
import random
from typing import NamedTuple

import numpy as np

from data import shapes
from data.evaluate import (
    accuracy,
    perplexity,
    psnr,
    score_frechet,
    score_matching,
    score_perplexity,
)
from data.folder import frequent_words, load_folder
from transfusion import BOI, EOS

WOULD_DRAW = "of 1: how often the model itself predicts BOI after the caption"

class Report(NamedTuple):
    """The results of an evaluation on n examples."""
    n: int
    scores: dict  # {score: (value, what to compare it with)}
    pictures: np.ndarray | None = None  # uint8 (N, H, W, 3): what the model drew
    prompts: tuple = ()  # what each picture should show
    correct: tuple = ()  # whether each picture shows it

def is_similar(scene):
    """Do all things have the same colour, or all the same shape?"""
    colours, forms = zip(*scene.things)
    return len(set(colours)) == 1 or len(set(forms)) == 1

SIMILAR = [scene for scene in shapes.ARRANGEMENTS if is_similar(scene)]
SIMILAR_TRAIN = [scene for scene in SIMILAR if shapes.split(scene) == "train"]

def examples(split, n, seed):
    """n examples of a split: (Scene, caption, picture). Scenes may repeat, in other pictures."""
    rng = random.Random(seed)
    result = []
    for _ in range(n):
        scene = shapes.pick(rng, shapes.SPLITS[split])
        caption = shapes.describe(scene, rng.random() < 0.5)
        result.append((scene, caption, shapes.render(scene, rng)))
    return result

class Shapes:
    """Captions and pictures in either order, and some documents of text alone."""

    words = shapes.WORDS
    defaults = {}  # options of train.py whose defaults differ for this task
    steps = 2300  # of training, unless --steps says otherwise
    text_only = 0.1  # share of the documents that are text alone
    edits = 0.0  # share of the documents that are edits
    single = 0.1  # share of the captioned pictures that show a single thing
    similar = 0.25  # share chosen to show things of the same colour or shape

    def __init__(self, run, image_size):
        """`run` has the options of train.py. Raises ValueError if the task cannot use them."""
        if run.data:
            raise ValueError("Only the task folder has --data.")
        if image_size != shapes.IMAGE_SIZE:
            raise ValueError(f"The toy world has pictures of {shapes.IMAGE_SIZE} pixels, "
                             f"but image_size is {image_size}.")
        # DEVIATION: in the paper the caption comes first in 0.8 of the pairs (--caption-first 0.8).
        self.caption_first = run.caption_first
        self.unconditional_share = run.unconditional_share

    def document(self, rng):
        """A training document."""
        if rng.random() < self.text_only:
            scene = shapes.pick(rng, shapes.SPLITS["train"])
            return [shapes.argument(scene, flip=rng.random() < 0.5)]
        choice = rng.random()
        if choice < self.single:
            scenes = shapes.SINGLES
        elif choice < self.single + self.similar:
            scenes = SIMILAR_TRAIN
        else:
            scenes = shapes.SPLITS["train"]
        scene = shapes.pick(rng, scenes)
        pair = [shapes.describe(scene, flip=rng.random() < 0.5), shapes.render(scene, rng)]
        return pair if rng.random() < self.caption_first else pair[::-1]

    def documents(self, n, seed):
        """n training documents. A share of those with text before a picture lose their text."""
        rng = random.Random(seed)
        documents = []
        for _ in range(n):
            document = self.document(rng)
            is_text = [isinstance(part, str) for part in document]
            has_prompt = (True, False) in zip(is_text, is_text[1:])
            if rng.random() < self.unconditional_share and has_prompt:
                document = [part for part in document if not isinstance(part, str)]
            documents.append(document)
        return documents

    def entropy(self, kind, scenes):
        """-log P of documents about these scenes, in nats: the lowest possible loss on them.

        "text" is a document of text alone. "caption" is a caption that comes first, up to the token
        after it. The grammar chooses the kind of document, the arrangement, and the end from which
        it is described; this determines the words. It may choose any arrangement, held out or not:
        this is the loss of a model that knows the grammar but has memorised no arrangement.
        """
        total = 0.0
        for scene in scenes:
            if kind == "text":
                probability = self.text_only / len(shapes.ARRANGEMENTS)
            else:
                probability = (1 - self.single - self.similar) / len(shapes.ARRANGEMENTS)
                if is_similar(scene):
                    probability += self.similar / len(SIMILAR)
                first_and_kept = self.caption_first * (1 - self.unconditional_share)
                probability *= (1 - self.text_only) * first_and_kept
            total -= math.log(probability * (1 - self.edits) / 2)  # either end is equally likely
        return total

    def score_text(self, trained, split, n, seed, after_caption=BOI):
        """The scores that need no picture."""
        scenes, captions, _ = zip(*examples(split, n, seed))
        rng = random.Random(seed)
        texts = [shapes.argument(scene, flip=rng.random() < 0.5) for scene in scenes]
        of_text, of_captions = self.entropy("text", scenes), self.entropy("caption", scenes)
        return (
            score_perplexity("text", trained, texts, EOS, of_text)
            | score_perplexity("caption", trained, captions, after_caption, of_captions)
        )

    def evaluate(self, trained, split, n, seed):
        """Returns a Report of all scores on n examples of a split."""
        scenes, captions, pictures = zip(*examples(split, n, seed))
        pictures = np.stack(pictures)
        blank = np.full_like(pictures, shapes.BACKGROUND)
        again = trained.reconstruct(pictures)
        drawn, would_draw = trained.draw([[caption] for caption in captions])
        vae_acc = accuracy(map(shapes.read, again), scenes)
        correct = [shapes.read(picture) == scene for picture, scene in zip(drawn, scenes)]
        rng = random.Random(seed)
        others = np.stack([shapes.render(scene, rng) for scene in scenes])
        captioned = map(shapes.parse, trained.caption(pictures))
        scores = self.score_text(trained, split, n, seed) | {
            "caption_acc": (accuracy(captioned, scenes), "ceiling 1, floor 0"),
            "vae_psnr": (psnr(again, pictures), f"dB; floor {psnr(blank, pictures):.1f}: blank"),
            "vae_acc": (vae_acc, "ceiling 1"),
            "draw_acc": (sum(correct) / n, f"ceiling {vae_acc:.4f}: VAE; floor 0"),
            "would_draw": (would_draw, WOULD_DRAW),
            "frechet": score_frechet(drawn, pictures, others, again),
        }
        return Report(n, scores, drawn, captions, correct)

class Text(Shapes):
    """The same documents without their pictures, to measure how much pictures hurt the text."""

    defaults = {"batch_size": 156}  # about as many positions per step as with pictures

    def __init__(self, run, image_size):
        super().__init__(run, image_size)
        self.caption_first, self.unconditional_share = 1.0, 0.0  # all captions stay

    def document(self, rng):
        return [part for part in super().document(rng) if isinstance(part, str)]

    def evaluate(self, trained, split, n, seed):
        return Report(n, self.score_text(trained, split, n, seed, after_caption=EOS))

class Edit(Shapes):
    """Picture, instruction, edited picture; and enough other documents that little is forgotten."""

    edits = 0.45
    # The picture to edit is not very noisy, as it is clean in sampling. Enough documents begin with
    # a picture and its caption that a picture alone is still captioned. The LM loss of
    # instructions, which cannot be predicted, would otherwise outweigh the diffusion loss.
    # DEVIATION: the paper's weight is 5, and its cap 0.5 (--lambda-ddpm 5 --noise-cap 0.5).
    defaults = {
        "documents": 16384, "batch_size": 32, "caption_first": 0.3, "t_power": 4.0,
        "noise_cap": 0.3, "lambda_ddpm": 20.0, "lr": 1e-2,
    }
    steps = 8000

    def document(self, rng):
        if rng.random() >= self.edits:
            return super().document(rng)
        _, _, *document = self.example(rng, "train")
        return document

    def example(self, rng, split):
        """(Scene before, Scene after, picture, instruction, edited picture), both of this split."""
        kind = shapes.pick(rng, ("make", "move", "swap"))
        while True:
            before = shapes.pick(rng, shapes.SPLITS[split])
            edits = shapes.edits(before)[kind].items()
            possible = [edit for edit in edits if shapes.split(edit[1]) == split]
            if possible:
                instruction, after = shapes.pick(rng, possible)
                edited = shapes.render(after, copy.copy(rng))  # shifted like the first picture
                return before, after, shapes.render(before, rng), instruction, edited

    def evaluate(self, trained, split, n, seed):
        report = super().evaluate(trained, split, n, seed)
        rng = random.Random(seed)
        _, after, before, instructions, edited = zip(*[self.example(rng, split) for _ in range(n)])
        drawn, _ = trained.draw([list(prompt) for prompt in zip(before, instructions)])
        correct = [shapes.read(picture) == scene for picture, scene in zip(drawn, after)]
        ceiling = accuracy(map(shapes.read, trained.reconstruct(np.stack(edited))), after)
        beside = f"ceiling {ceiling:.4f}: VAE; floor 0: the picture unchanged"
        scores = report.scores | {"edit_acc": (sum(correct) / n, beside)}
        both = np.concatenate([np.stack(before), drawn], axis=2)
        return Report(n, scores, both, instructions, correct)

class Folder:
    """Your own pictures with captions. No program can read them, so the scores are others.

    Validation and the final table use the same held-out pictures, but validation only the first.
    """

    # Real pictures have more detail than the toy world's. Captions are learned by heart soon, so
    # the diffusion loss needs more weight. And the held-out loss, which decides what weights are
    # kept, needs more examples. DEVIATION: the paper's weight is 5 (--lambda-ddpm 5).
    defaults = {"latent_channels": 8, "lambda_ddpm": 20.0, "val_n": 128}
    passes = 60  # how often each picture is seen

    def __init__(self, run, image_size):
        if not run.data:
            raise ValueError("The task folder needs --data FOLDER.")
        self.caption_first, self.unconditional_share = run.caption_first, run.unconditional_share
        self.train, self.held_out = load_folder(run.data, image_size)
        for pairs in (self.train, self.held_out):  # a folder is sorted, perhaps by content
            random.Random(0).shuffle(pairs)
        self.words = frequent_words([caption for caption, _ in self.train])
        self.steps = math.ceil(self.passes * len(self.train) / run.batch_size)

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

    def evaluate(self, trained, split, n, seed):
        captions, pictures = zip(*self.held_out[:n])
        prompts, pairs = [[c] for c in captions], [list(pair) for pair in zip(pictures, captions)]
        pictures = np.stack(pictures)
        others = random.Random(seed).choices(self.train, k=len(captions))
        others = np.stack([picture for _, picture in others])
        again = trained.reconstruct(pictures)
        drawn, would_draw = trained.draw(prompts)

        log_p, n_tokens = trained.log_likelihood(prompts, BOI)
        log_p -= math.log(self.caption_first * (1 - self.unconditional_share))  # given a caption
        before = perplexity(log_p, n_tokens)
        after = perplexity(*trained.log_likelihood(pairs))
        scores = score_matching(trained, captions, pictures, seed)
        loss = math.log(after)
        if "diffusion_loss" in scores:
            loss += trained.model.cfg.lambda_ddpm * scores["diffusion_loss"][0]
        scores |= {
            "held_out_loss": (loss, "captions after their picture, and pictures after theirs"),
            "caption_ppl": (before, f"{after:.4f}: captions after their picture"),
            "vae_psnr": (psnr(again, pictures), "dB"),
            "frechet": score_frechet(drawn, pictures, others, again),
            "would_draw": (would_draw, WOULD_DRAW),
        }
        both = np.concatenate([pictures, drawn], axis=2)  # the true picture beside its drawing
        return Report(len(captions), scores, both, captions, [True] * len(captions))

TASKS = {"shapes": Shapes, "text": Text, "edit": Edit, "folder": Folder}
