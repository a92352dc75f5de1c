"""A toy world that can be checked exactly: one or two coloured shapes on a 32 x 32 picture.

    scene --render--> image      scene --describe--> caption
    scene <--read---- image      scene <--parse----- caption

So both directions of a model are scored without a judge: a drawing is right when what is read off it is the scene that
its caption tells. Nothing is downloaded, and a seed gives the same data on every machine.
"""

import zlib
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 32
BACKGROUND = (245, 245, 245)
COLOURS = {
    "red": (225, 45, 45), "yellow": (245, 205, 40), "green": (45, 165, 75), "cyan": (60, 200, 220),
    "blue": (45, 80, 225), "purple": (150, 60, 190), "black": (35, 35, 35),
}
EDGE = 12  # pixels of a shape from edge to edge
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# A shape is a drawing in the unit square: a list of (Pillow method, coordinates, 1 to add or 0 to cut out).
SHAPES = {
    "circle": [("ellipse", (0, 0, 1, 1), 1)],
    "square": [("rectangle", (0, 0, 1, 1), 1)],
    "triangle": [("polygon", (0.5, 0, 1, 1, 0, 1), 1)],
    "cross": [("rectangle", (0.32, 0, 0.68, 1), 1), ("rectangle", (0, 0.32, 1, 0.68), 1)],
    "ring": [("ellipse", (0, 0, 1, 1), 1), ("ellipse", (0.27, 0.27, 0.73, 0.73), 0)],
}

class Thing(NamedTuple):
    colour: str
    shape: str

class Scene(NamedTuple):
    """One thing (relation and second are None), or two. "B below A" is stored as "A above B": one fact, one Scene."""
    first: Thing
    relation: str | None = None  # "left of" or "above"
    second: Thing | None = None

THINGS = [Thing(*words) for words in product(COLOURS, SHAPES)]
SINGLES = [Scene(thing) for thing in THINGS]
FACTS = [Scene(a, relation, b) for relation in ("left of", "above") for a, b in product(THINGS, THINGS) if a != b]

# ---- scene <-> caption -----------------------------------------------------------------------------------------------

def describe(scene, flip=False, verb=""):
    """"a red circle above a blue square.", or from the other side ("... below ...") with flip."""
    first, relation, second = scene
    if second is None:
        return f"a {' '.join(first)}."
    if flip:
        first, relation, second = second, INVERSE[relation], first
    return f"a {' '.join(first)} {verb}{relation} a {' '.join(second)}."

CAPTIONS = {describe(scene, flip): scene for scene in SINGLES + FACTS for flip in (False, True)}

def parse(caption):
    """The Scene that a caption tells, whichever side it tells it from; None if it is not a caption of this world."""
    return CAPTIONS.get(" ".join(caption.split()))

def reasoning(scene, flip=False, conclusion=None):
    """A text-only document: a sentence, and what follows from it (or another, wrong, conclusion)."""
    first, second = (scene.first, scene.second) if flip else (scene.second, scene.first)
    follows = f"so a {' '.join(first)} is {conclusion or answer(scene, flip)} a {' '.join(second)}."
    return f"{describe(scene, flip, verb='is ')} {follows}"

def answer(scene, flip=False):
    """The relation that follows in `reasoning`."""
    return scene.relation if flip else INVERSE[scene.relation]

WORDS = sorted(set(" ".join(map(reasoning, FACTS)).replace(".", "").split())) + ["."]

# ---- scene <-> image -------------------------------------------------------------------------------------------------

def sprite(shape, zoom=16):
    """A shape's coverage of EDGE x EDGE pixels: drawn large, then averaged down. A uint8 Pillow image."""
    canvas = Image.new("L", (EDGE * zoom, EDGE * zoom))
    for method, coordinates, ink in SHAPES[shape]:
        corners = [round(x * (canvas.width - 1)) for x in coordinates]
        getattr(ImageDraw.Draw(canvas), method)(corners, fill=255 * ink)
    return canvas.reduce(zoom)

SPRITES = {shape: sprite(shape) for shape in SHAPES}

def render(scene, rng, second_first=False):
    """Draw a Scene with rng (random.Random) jittering the places. Returns uint8 (32, 32, 3).

    The first thing takes its jitter from rng first, or the second one.
    """
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    things = [scene.first] if scene.second is None else [scene.first, scene.second]
    for i, thing in sorted(enumerate(things), reverse=second_first):
        along, across = 16 + jitter(rng, 4), 16 + jitter(rng, 4)
        if len(things) == 2:  # the first thing of a pair is always the left or the upper one
            along = 8 + 16 * i + jitter(rng, 1)
        x, y = (across, along) if scene.relation == "above" else (along, across)
        image.paste(COLOURS[thing.colour], (x - EDGE // 2, y - EDGE // 2), SPRITES[thing.shape])
    return np.array(image)

def jitter(rng, most):  # random() is the one method whose stream Python promises to keep
    return int(rng.random() * (2 * most + 1)) - most

def read(image, tolerance=0.15):
    """The Scene in a uint8 (32, 32, 3) picture, or None when it is not a scene.

    Matching pursuit: find the thing and the place that explain most of the picture, take it away, and do so once more.
    It is a scene if less than `tolerance` of the picture's energy, its squared distance from the background, remains.
    """
    rest = np.asarray(image, np.float32) - np.float32(BACKGROUND)
    energy, found = (rest**2).sum(), []
    for _ in range(2):
        gain, thing, x, y = best_match(rest)
        if gain > 0.05 * energy:
            found.append((thing, x, y))
            rest[y : y + EDGE, x : x + EDGE] -= MASKS[thing.shape][..., None] * INKS[thing.colour]
    if not found or (rest**2).sum() > tolerance * energy:
        return None
    if len(found) == 1:
        return Scene(found[0][0])
    across = abs(found[0][1] - found[1][1]) >= abs(found[0][2] - found[1][2])
    (first, *_), (second, *_) = sorted(found, key=lambda match: match[1 if across else 2])
    return Scene(first, "left of" if across else "above", second) if first != second else None

MASKS = {shape: np.float32(SPRITES[shape]) / 255 for shape in SHAPES}
INKS = {colour: np.float32(COLOURS[colour]) - np.float32(BACKGROUND) for colour in COLOURS}

def best_match(rest):
    """(squared error it removes, Thing, x, y) of the best thing: |r|^2 - |r - m ink|^2 = 2 m.r.ink - |m|^2 |ink|^2."""
    masks, inks = np.stack([m.ravel() for m in MASKS.values()]), np.stack(list(INKS.values()))
    windows = np.lib.stride_tricks.sliding_window_view(rest, (EDGE, EDGE), axis=(0, 1))  # (rows, columns, 3, ...)
    overlap = windows.reshape(-1, EDGE * EDGE) @ masks.T                                 # (places * 3, shapes)
    overlap = overlap.reshape(-1, 3, len(masks)).transpose(0, 2, 1) @ inks.T             # (places, shapes, colours)
    gain = 2 * overlap - (masks**2).sum(1)[:, None] * (inks**2).sum(1)
    place, shape, colour = np.unravel_index(gain.argmax(), gain.shape)
    y, x = divmod(int(place), IMAGE_SIZE - EDGE + 1)
    return gain.max(), Thing(list(COLOURS)[colour], list(SHAPES)[shape]), x, y

# ---- what is held out ------------------------------------------------------------------------------------------------

def split(scene):
    """"test" (10 %), "val" (5 %) or "train", by a hash of the fact, so that no fact is on two sides in any wording."""
    bucket = zlib.crc32(describe(scene).encode()) % 100
    return "train" if scene.second is None or bucket >= 15 else "test" if bucket < 10 else "val"

SPLITS = {name: [fact for fact in FACTS if split(fact) == name] for name in ("train", "val", "test")}

def pick(rng, items):
    return items[int(rng.random() * len(items))]
