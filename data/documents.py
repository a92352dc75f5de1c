"""The documents that a model is trained on, and the examples that it is scored on.

A document is a list of parts in reading order, each of which is a str or a picture, uint8 (32, 32, 3).
"""

import copy
import math
import random

from data import shapes
from transfusion import unconditional

TEXT_ONLY = 0.1  # share of the documents that are text alone
SINGLE = 0.2  # share of the captioned pictures that show a single thing
SIMILAR = 0.25  # share chosen to show things of the same colour or shape (others do so by chance)
EDITS = 0.5  # share of the documents that are edits, in the task "edit"
EDIT_KINDS = ("make", "make", "make", "move", "move", "swap")  # chosen uniformly, so half of the edits are "make"

def is_similar(scene):
    """Do all things have the same colour, or all the same shape?"""
    return len({thing.colour for thing in scene.things}) == 1 or len({thing.shape for thing in scene.things}) == 1

SIMILAR_TRAIN = [scene for scene in shapes.SPLITS["train"] if is_similar(scene)]

def captioned_picture(rng, caption_first):
    """[caption, picture] or [picture, caption]."""
    choice = rng.random()
    if choice < SINGLE:
        scene = shapes.pick(rng, shapes.SINGLES)
    elif choice < SINGLE + SIMILAR:
        scene = shapes.pick(rng, SIMILAR_TRAIN)
    else:
        scene = shapes.pick(rng, shapes.SPLITS["train"])
    pair = [shapes.describe(scene, flip=rng.random() < 0.5), shapes.render(scene, rng)]
    return pair if rng.random() < caption_first else pair[::-1]

def text_alone(rng):
    """["a red circle is above a blue square. so a blue square is below a red circle."]"""
    return [shapes.argument(shapes.pick(rng, shapes.SPLITS["train"]), flip=rng.random() < 0.5)]

def shapes_document(rng, caption_first):
    """A document of the task "shapes"."""
    return text_alone(rng) if rng.random() < TEXT_ONLY else captioned_picture(rng, caption_first)

def text_document(rng, caption_first):
    """A document of the task "text": one of "shapes" without its picture."""
    return [part for part in shapes_document(rng, caption_first) if isinstance(part, str)]

def edit_document(rng, caption_first):
    """A document of the task "edit": [picture, instruction, edited picture], or one of "shapes"."""
    if rng.random() < EDITS:
        _, _, *document = edit_example(rng, "train", EDIT_KINDS)
        return document
    return shapes_document(rng, caption_first)

def make_documents(make_document, n, seed, caption_first=0.5, unconditional_share=0.1):
    """n training documents, made by one of the functions above.

    A share of those with text before a picture lose their text. NOT STATED: how large that share is.
    """
    rng = random.Random(seed)
    documents = []
    for _ in range(n):
        document = make_document(rng, caption_first)
        drop_text = rng.random() < unconditional_share
        if drop_text and text_before_picture(document):
            document = unconditional(document)
        documents.append(document)
    return documents

def text_before_picture(document):
    kinds = [isinstance(part, str) for part in document]
    return any(first and not second for first, second in zip(kinds, kinds[1:]))

def entropy(kind, scenes, task, caption_first, unconditional_share):
    """-log P of the documents of these scenes under the grammar, in nats: the lowest possible loss on them.

    "text" is a document of text alone. "caption" is a caption that comes first, up to the token after it. The grammar
    chooses the kind of document, the arrangement, and the end from which it is described; this determines the words. It
    may choose any arrangement, held out or not: this is the loss of a model that knows the grammar but has memorised no
    arrangement.
    """
    n_arrangements = len(shapes.ARRANGEMENTS)
    n_similar = sum(map(is_similar, shapes.ARRANGEMENTS))
    total = 0.0
    for scene in scenes:
        if kind == "text":
            probability = TEXT_ONLY / n_arrangements
        else:
            probability = (1 - SINGLE - SIMILAR) / n_arrangements
            if is_similar(scene):
                probability += SIMILAR / n_similar
            probability *= 1 - TEXT_ONLY
            if task != "text":  # if there are pictures, the caption may also come last or be removed
                probability *= caption_first * (1 - unconditional_share)
        if task == "edit":
            probability *= 1 - EDITS
        total -= math.log(probability / 2)  # each of the two ends is equally likely
    return total

def examples(split, n, seed):
    """n examples of a split: (Scene, caption, picture). An arrangement may occur twice, with two different pictures."""
    rng = random.Random(seed)
    result = []
    for _ in range(n):
        scene = shapes.pick(rng, shapes.SPLITS[split])
        result.append((scene, shapes.describe(scene, rng.random() < 0.5), shapes.render(scene, rng)))
    return result

def edit_example(rng, split, kinds=("make", "move", "swap")):
    """(Scene before, Scene after, picture, instruction, edited picture), both scenes from this split."""
    kind = shapes.pick(rng, kinds)
    while True:
        before = shapes.pick(rng, shapes.SPLITS[split])
        possible = [edit for edit in shapes.edits(before)[kind].items() if shapes.split(edit[1]) == split]
        if possible:
            instruction, after = shapes.pick(rng, possible)
            edited = shapes.render(after, copy.copy(rng))  # the same random shifts as in the unedited picture
            return before, after, shapes.render(before, rng), instruction, edited

def edit_examples(split, n, seed):
    """n edits of a split. All kinds are equally likely."""
    rng = random.Random(seed)
    return [edit_example(rng, split) for _ in range(n)]
