"""The toy world: pictures of one or two coloured shapes, which can be scored exactly.

    scene --render--> picture     scene --describe--> caption     scene, instruction --edit--> scene
    scene <--read---- picture     scene <--parse----- caption

Rendering and describing each have an inverse, so no judge model is needed. A drawing is correct
when the scene that `read` finds in its pixels is the scene that its caption describes. Nothing is
downloaded, and a seed gives the same data on every machine.
"""

import zlib
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 32  # pixels per side
BACKGROUND = (245, 245, 245)
COLOURS = {
    "red": (225, 45, 45), "yellow": (245, 205, 40), "green": (45, 165, 75), "cyan": (60, 200, 220),
    "blue": (45, 80, 225), "purple": (150, 60, 190), "black": (35, 35, 35),
}
EDGE = 12  # pixels per side of a shape; 9 leaves room for three things in a row

# A shape is drawn in the unit square, as a list of (Pillow method, coordinates, ink). Ink 1 adds to
# the shape, and 0 cuts out of it.
SHAPES = {
    "circle": [("ellipse", (0, 0, 1, 1), 1)],
    "square": [("rectangle", (0, 0, 1, 1), 1)],
    "triangle": [("polygon", (0.5, 0, 1, 1, 0, 1), 1)],
    "cross": [("rectangle", (0.32, 0, 0.68, 1), 1), ("rectangle", (0, 0.32, 1, 0.68), 1)],
    "ring": [("ellipse", (0, 0, 1, 1), 1), ("ellipse", (0.27, 0.27, 0.73, 0.73), 0)],
}
OPPOSITE = {"left of": "right of", "above": "below", "right of": "left of", "below": "above"}
# The relations of a Scene. A caption may start from the other end, with the opposite relation.
RELATIONS = ["left of", "above"]

class Thing(NamedTuple):
    colour: str
    shape: str

class Scene(NamedTuple):
    """Things in a row or column. The relation holds between each thing and the next.

    It is None for a single thing. "B below A" is stored as "A above B", so that each arrangement
    has exactly one Scene.
    """
    things: tuple[Thing, ...]
    relation: str | None = None

THINGS = [Thing(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
SINGLES = [Scene((thing,)) for thing in THINGS]
ARRANGEMENTS = [
    Scene(things, relation) for relation in RELATIONS for things in permutations(THINGS, 2)
]
MOST_THINGS = max(len(scene.things) for scene in ARRANGEMENTS)

# ---- Scene and caption ---------------------------------------------------------------------------

def name(thing):
    return f"{thing.colour} {thing.shape}"

def describe(scene, flip=False):
    """"a red circle above a blue square.", or with flip "a blue square below a red circle."."""
    things, relation = scene
    if flip and relation:
        things, relation = things[::-1], OPPOSITE[relation]
    return f" {relation} ".join(f"a {name(thing)}" for thing in things) + "."

CAPTIONS = {
    describe(scene, flip): scene for scene in SINGLES + ARRANGEMENTS for flip in (False, True)
}

def parse(caption):
    """The Scene that a caption describes, from either end; None if it describes none."""
    return CAPTIONS.get(" ".join(caption.split()))

def argument(scene, flip=False):
    """A document of text alone: the scene described from one end, then from the other.

    "a red circle is above a blue square. so a blue square is below a red circle."
    """
    relation, opposite = scene.relation, OPPOSITE[scene.relation]
    if flip:
        relation, opposite = opposite, relation
    premise = describe(scene, flip).replace(f" {relation} ", f" is {relation} ")
    conclusion = describe(scene, not flip).replace(f" {opposite} ", f" is {opposite} ")
    return f"{premise} so {conclusion}"

# ---- Scene and picture ---------------------------------------------------------------------------

def sprite(shape, zoom=16):
    """How much of each of EDGE x EDGE pixels a shape covers, 0 to 255: a Pillow image.

    It is drawn large and scaled down.
    """
    large = Image.new("L", (EDGE * zoom, EDGE * zoom))
    for method, coordinates, ink in SHAPES[shape]:
        corners = [round(x * (large.width - 1)) for x in coordinates]
        getattr(ImageDraw.Draw(large), method)(corners, fill=255 * ink)
    return large.reduce(zoom)

SPRITES = {shape: sprite(shape) for shape in SHAPES}

def render(scene, rng):
    """Draw a Scene, each thing shifted by a few pixels at random. Returns uint8 (32, 32, 3).

    rng is a random.Random.
    """
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    cell = IMAGE_SIZE // len(scene.things)  # the space for each thing along the row
    for i, thing in enumerate(scene.things):
        along = cell * i + cell // 2 + jitter(rng, min(4, (cell - EDGE) // 4))
        across = IMAGE_SIZE // 2 + jitter(rng, 4)
        x, y = (across, along) if scene.relation == "above" else (along, across)
        picture.paste(COLOURS[thing.colour], (x - EDGE // 2, y - EDGE // 2), SPRITES[thing.shape])
    return np.array(picture)

def jitter(rng, most):
    """A random integer from -most to most.

    random() gives the same numbers in all versions of Python.
    """
    return int(rng.random() * (2 * most + 1)) - most

def read(picture, tolerance=0.15):
    """The Scene in a uint8 (32, 32, 3) picture, or None if it is not a scene.

    Matching pursuit: find the thing and the position that explain most of the picture, subtract it,
    and repeat. The picture is a scene if less than `tolerance` of its energy (squared distance from
    the background) is left over.
    """
    rest = np.asarray(picture, np.float32) - np.float32(BACKGROUND)
    energy, found = (rest**2).sum(), []
    for _ in range(MOST_THINGS):
        gain, thing, x, y = best_match(rest)
        if gain > 0.05 * energy:
            found.append((x, y, thing))
            rest[y : y + EDGE, x : x + EDGE] -= MASKS[thing.shape][..., None] * INKS[thing.colour]
    if not found or (rest**2).sum() > tolerance * energy:
        return None
    if len(found) == 1:
        return Scene((found[0][2],))
    width, height = (max(positions) - min(positions) for positions in list(zip(*found))[:2])
    relation, axis = ("left of", 0) if width >= height else ("above", 1)
    found.sort(key=lambda match: match[axis])
    scene = Scene(tuple(thing for *_, thing in found), relation)
    return scene if describe(scene) in CAPTIONS else None

MASKS = {shape: np.float32(SPRITES[shape]) / 255 for shape in SHAPES}
INKS = {colour: np.float32(COLOURS[colour]) - np.float32(BACKGROUND) for colour in COLOURS}

def best_match(rest):
    """The single thing that explains most of `rest`: (squared error that it removes, Thing, x, y).

    A thing with mask m and ink c, drawn on a window r, removes
    |r|^2 - |r - m c|^2 = 2 m.r.c - |m|^2 |c|^2.
    """
    masks = np.stack([mask.ravel() for mask in MASKS.values()])  # (shapes, EDGE^2)
    inks = np.stack(list(INKS.values()))  # (colours, 3)
    windows = np.lib.stride_tricks.sliding_window_view(rest, (EDGE, EDGE), axis=(0, 1))
    overlap = windows.reshape(-1, 3, EDGE * EDGE) @ masks.T  # (positions, 3, shapes)
    overlap = overlap.transpose(0, 2, 1) @ inks.T  # (positions, shapes, colours)
    gain = 2 * overlap - (masks**2).sum(1)[:, None] * (inks**2).sum(1)
    position, shape, colour = np.unravel_index(gain.argmax(), gain.shape)
    y, x = divmod(int(position), IMAGE_SIZE - EDGE + 1)
    return gain.max(), Thing(list(COLOURS)[colour], list(SHAPES)[shape]), x, y

# ---- Edits ---------------------------------------------------------------------------------------

SIDES = {
    "left": ("left of", 0), "right": ("left of", -1), "top": ("above", 0), "bottom": ("above", -1)
}

def edits(scene):
    """All instructions that turn this scene into another: {kind of edit: {instruction: Scene}}."""
    things, relation = scene
    kinds = {"make": {}, "move": {}, "swap": {"swap them.": Scene(things[::-1], relation)}}
    for i, thing in enumerate(things):
        others = things[:i] + things[i + 1 :]
        for colour in COLOURS:
            recoloured = things[:i] + (Thing(colour, thing.shape),) + things[i + 1 :]
            kinds["make"][f"make the {name(thing)} {colour}."] = Scene(recoloured, relation)
        for side, (new_relation, end) in SIDES.items():
            moved = (thing, *others) if end == 0 else (*others, thing)
            kinds["move"][f"move the {name(thing)} to the {side}."] = Scene(moved, new_relation)
    return {
        kind: {
            text: after for text, after in found.items()
            if after != scene and is_arrangement(after)
        }
        for kind, found in kinds.items()
    }

def is_arrangement(scene):
    return len(scene.things) > 1 and describe(scene) in CAPTIONS

def edit(scene, instruction):
    """The scene that an instruction turns this one into; None if the instruction does not apply."""
    results = {text: after for found in edits(scene).values() for text, after in found.items()}
    return results.get(" ".join(instruction.split()))

# ---- Words, and what is held out -----------------------------------------------------------------

EDIT_WORDS = ["make", "the", "move", "to", *SIDES, "swap", "them"]
RELATION_WORDS = " ".join(OPPOSITE).split()
WORDS = sorted({*COLOURS, *SHAPES, *RELATION_WORDS, "a", "is", "so", *EDIT_WORDS}) + ["."]

def split(scene):
    """"test" (10 %), "val" (5 %) or "train".

    All captions and pictures of an arrangement are in the same split.
    """
    if len(scene.things) == 1:
        return "train"
    bucket = zlib.crc32(describe(scene).encode()) % 100
    return "test" if bucket < 10 else "val" if bucket < 15 else "train"

SPLITS = {
    side: [scene for scene in ARRANGEMENTS if split(scene) == side]
    for side in ("train", "val", "test")
}

def pick(rng, items):
    """A random item of a list."""
    return items[int(rng.random() * len(items))]
