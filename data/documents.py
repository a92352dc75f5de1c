"""What a model is trained on: documents, each a list of parts in reading order, a str or a picture (32, 32, 3) uint8.

Three tasks. "shapes" has pairs of picture and caption, in either order, and some documents of text alone. "text" has
the same documents with their pictures taken out. "edit" has picture, instruction and edited picture in three documents
of five; the others are those of "shapes", so that drawing and telling are not unlearned.
"""

import copy
import math
import random

from data import shapes
from data.edits import edits
from data.edits import WORDS as EDIT_WORDS

WORDS = [*shapes.WORDS, *(word for word in EDIT_WORDS if word not in shapes.WORDS)]
TEXT_ONLY, SINGLE = 0.1, 0.1  # shares: of all documents, of the pairs

def documents(task, n, seed, caption_first=0.5):
    """n training documents of a task; of the pairs of picture and caption, this share has the caption first."""
    rng, result = random.Random(seed), []
    for i in range(n):
        if task == "edit" and i % 5 < 3:
            kinds = "make", "make", "make", "move", "move", "swap"  # mixed so on validation
            _, _, *document = an_edit("train", rng, kinds)
        elif rng.random() < TEXT_ONLY:
            document = [shapes.reasoning(shapes.pick(rng, shapes.SPLITS["train"]), flip=rng.random() < 0.5)]
        else:
            scene = shapes.pick(rng, shapes.SINGLES if rng.random() < SINGLE else shapes.SPLITS["train"])
            pair = [shapes.describe(scene, flip=rng.random() < 0.5), shapes.render(scene, rng)]
            document = pair if rng.random() < caption_first else pair[::-1]
        result.append([part for part in document if isinstance(part, str)] if task == "text" else document)
    return result

def examples(split, n, seed):
    """n examples of a split, each as (Scene, caption from either side, picture). A fact may come twice, drawn anew."""
    rng, result = random.Random(seed), []
    for _ in range(n):
        scene = shapes.pick(rng, shapes.SPLITS[split])
        result.append((scene, shapes.describe(scene, rng.random() < 0.5), shapes.render(scene, rng)))
    return result

def an_edit(split, rng, kinds=("make", "move", "swap")):
    """(before, after, picture, instruction, edited picture), both Scenes of this split, each kind as often as named."""
    kind = shapes.pick(rng, kinds)
    while True:
        before = shapes.pick(rng, shapes.SPLITS[split])
        found = [edit for edit in edits(before)[kind].items() if shapes.split(edit[1]) == split]
        if found:
            instruction, after = shapes.pick(rng, found)
            jitter = copy.copy(rng)  # the same for both pictures: every thing keeps its own
            edited = shapes.render(after, jitter, second_first=after.first == before.second)
            return before, after, shapes.render(before, rng), instruction, edited

def edit_examples(split, n, seed):
    """n times (before, after, picture, instruction, edited picture). In "test" neither scene was ever trained on."""
    rng = random.Random(seed)
    return [an_edit(split, rng) for _ in range(n)]

def entropy(kind, task, caption_first):
    """Exact nats per document of the grammar, whose only choices are the kind of document and the fact it tells.

    "caption": up to what follows the caption of two things (BOI; in task "text" EOS); "text": a whole text-only
    document. All facts count, those held out too: it is the cost of a held-out document to a model that has the
    grammar and no memory.
    """
    share = {"caption": (1 - TEXT_ONLY) * (1 - SINGLE), "text": TEXT_ONLY}[kind] * (0.4 if task == "edit" else 1)
    if kind == "caption" and task != "text":
        share *= caption_first
    return -math.log(share) + math.log(2 * len(shapes.FACTS))
