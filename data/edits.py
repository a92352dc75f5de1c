"""Edits of the toy world: an instruction makes one scene of another.

    scene, "make the red circle green." --apply--> scene
"""

from data.shapes import COLOURS, FACTS, Scene, Thing

SIDES = {"left": ("left of", True), "right": ("left of", False), "top": ("above", True), "bottom": ("above", False)}
POSSIBLE = set(FACTS)

def edits(scene):
    """Every instruction that makes another scene of this one, which has two things: {kind: {instruction: Scene}}."""
    first, relation, second = scene
    make, move, swap = {}, {}, {"swap them.": Scene(second, relation, first)}
    for old, other in ((first, second), (second, first)):
        name = f"the {' '.join(old)}"
        for colour in COLOURS:
            new = Thing(colour, old.shape)
            make[f"make {name} {colour}."] = Scene(*(new if x == old else x for x in scene))
        for side, (towards, goes_first) in SIDES.items():
            pair = (old, other) if goes_first else (other, old)
            move[f"move {name} to the {side}."] = Scene(pair[0], towards, pair[1])
    kinds = {"make": make, "move": move, "swap": swap}
    return {kind: {instruction: after for instruction, after in found.items() if after in POSSIBLE and after != scene}
            for kind, found in kinds.items()}

def apply(scene, instruction):
    """The scene that an instruction makes of a scene of two things; None where it makes none, or changes nothing."""
    possible = {words: after for kind in edits(scene).values() for words, after in kind.items()}
    return possible.get(" ".join(instruction.split()))

WORDS = ["make", "the", "move", "to", *SIDES, "swap", "them"]
