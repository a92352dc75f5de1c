"""The toy world: its four arrows agree, its splits are apart, its entropy is right."""

import hashlib
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import canvas, shapes
from data.documents import WORDS, documents, edit_examples, entropy, examples
from data.edits import apply, edits
from data.scores import accuracy, frechet

ROOT = Path(__file__).parents[1]

def test_ten_thousand_true_pictures_are_read_exactly():
    rng, wrong = random.Random(0), 0
    for i in range(10_000):
        scene = shapes.pick(rng, shapes.SINGLES if i % 10 == 0 else shapes.FACTS)
        wrong += shapes.read(shapes.render(scene, rng)) != scene
    assert wrong <= 10

def test_reading_survives_a_little_noise_and_refuses_what_is_no_scene():
    rng, noise = random.Random(1), np.random.default_rng(1)
    scenes = [shapes.pick(rng, shapes.FACTS) for _ in range(100)]
    pictures = [shapes.render(scene, rng) for scene in scenes]
    noisy = [(p + noise.normal(0, 12, p.shape)).clip(0, 255).astype(np.uint8) for p in pictures]
    assert accuracy(map(shapes.read, noisy), scenes) >= 0.98
    for picture in noise.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8):
        assert shapes.read(picture) is None
    for level in (0, 128, 245, 255):
        assert shapes.read(np.full((32, 32, 3), level, np.uint8)) is None
    halves = [np.concatenate([a[:16], b[16:]]) for a, b in zip(pictures, pictures[1:])]
    assert any(shapes.read(half) is None for half in halves)

def test_three_things_are_no_scene():
    rng = random.Random(2)
    left, right = (shapes.render(shapes.Scene(shapes.Thing(c, "square")), rng) for c in ("red", "blue"))
    three = np.full((32, 32, 3), 245, np.uint8)
    for x, colour in ((0, "red"), (10, "blue"), (20, "black")):
        three[x:x + 8, x:x + 8] = shapes.COLOURS[colour]
    assert shapes.read(three) is None
    assert shapes.read(left).second is None and shapes.read(right).second is None

def test_every_sentence_is_parsed_from_either_side():
    for scene in shapes.SINGLES + shapes.FACTS:
        assert shapes.parse(shapes.describe(scene)) == scene
        assert shapes.parse(shapes.describe(scene, flip=True)) == scene
    assert shapes.parse("a red circle above a blue square.") == shapes.parse("a blue square below a red circle.")
    assert shapes.parse("a red circle above a blue square.") != shapes.parse("a blue square above a red circle.")
    for nonsense in ("", "a red circle", "a red dog.", "a red circle above.", "a red circle near a blue square."):
        assert shapes.parse(nonsense) is None

def test_what_the_picture_shows_is_what_the_sentence_says():
    """The relation in pixels, without `read`."""
    rng = random.Random(3)
    for relation, axis in (("left of", 1), ("above", 0)):
        scene = shapes.Scene(shapes.Thing("red", "square"), relation, shapes.Thing("blue", "ring"))
        picture = shapes.render(scene, rng).astype(int)
        centre = {c: np.argwhere((np.abs(picture - shapes.COLOURS[c]) < 10).all(-1)).mean(0) for c in ("red", "blue")}
        assert centre["red"][axis] + 10 < centre["blue"][axis]

def test_no_composition_is_on_two_sides_in_any_wording():
    sides = {name: set(facts) for name, facts in shapes.SPLITS.items()}
    assert sum(map(len, sides.values())) == len(set(shapes.FACTS)) == len(shapes.FACTS)
    assert 0.08 < len(sides["test"]) / len(shapes.FACTS) < 0.12
    told = Counter()
    for document in documents("shapes", 3000, seed=0):
        text = next(part for part in document if isinstance(part, str))
        scene = shapes.parse(text) or shapes.parse(text.split(" so ")[0].replace(" is ", " "))
        assert scene is not None
        told[shapes.split(scene)] += 1
        for part in document:
            assert isinstance(part, str) or shapes.read(part) == scene
    assert set(told) == {"train"}
    assert {scene for scene, _, _ in examples("test", 300, 0)} <= sides["test"]

def test_the_same_seed_gives_the_same_data_in_another_process():
    program = ("import hashlib; from data import shapes; from data.documents import documents;"
               "d = documents('edit', 200, 7);"
               "print(hashlib.sha256(b''.join(p.encode() if isinstance(p, str) else p.tobytes() for x in d for p in x))"
               ".hexdigest(), sorted(map(str, shapes.SPLITS['test']))[0])")
    runs = {subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": seed, "PATH": ""},
                           capture_output=True, text=True, check=True).stdout for seed in ("1", "2")}
    here = documents("edit", 200, 7)
    flat = b"".join(p.encode() if isinstance(p, str) else p.tobytes() for d in here for p in d)
    assert len(runs) == 1 and runs.pop().startswith(hashlib.sha256(flat).hexdigest())
    other = documents("edit", 200, 8)
    assert [d for d in other if len(d) == 1] != [d for d in here if len(d) == 1]

def test_reasoning_follows_and_the_other_relations_do_not():
    scene = shapes.parse("a red circle above a blue square.")
    assert shapes.reasoning(scene, flip=False) == (
        "a red circle is above a blue square. so a blue square is below a red circle.")
    assert shapes.reasoning(scene, flip=True) == (
        "a blue square is below a red circle. so a red circle is above a blue square.")
    assert {shapes.reasoning(scene, True, r) for r in shapes.INVERSE} > {shapes.reasoning(scene, True)}

@pytest.mark.parametrize("task, caption_first", [("shapes", 0.8), ("shapes", 0.3), ("text", 0.8), ("edit", 0.6)])
def test_the_entropy_is_that_of_the_documents(task, caption_first):
    """The grammar's choices counted another way: how many texts of a kind there are, and how often the kind comes."""
    texts = {shapes.reasoning(fact, flip) for fact in shapes.FACTS for flip in (False, True)}
    captions = {shapes.describe(fact, flip) for fact in shapes.FACTS for flip in (False, True)}
    data = documents(task, 8000, 3, caption_first)
    begun = [d[0] for d in data if isinstance(d[0], str)]
    first = {"text": sum(text in texts for text in begun), "caption": sum(text in captions for text in begun)}
    for kind, wordings in (("text", texts), ("caption", captions)):
        expected = math.log(len(wordings)) - math.log(first[kind] / len(data))
        assert entropy(kind, task, caption_first) == pytest.approx(expected, abs=0.1)

def test_the_tasks_have_the_documents_that_they_say():
    kinds = {}
    for task in ("shapes", "text", "edit"):
        forms = ["".join("t" if isinstance(part, str) else "i" for part in d) for d in documents(task, 2000, 0, 0.5)]
        kinds[task] = {form: n / 2000 for form, n in Counter(forms).items()}
    assert kinds["text"] == {"t": 1.0}
    assert kinds["shapes"] == pytest.approx({"t": 0.1, "ti": 0.45, "it": 0.45}, abs=0.04)
    assert kinds["edit"] == pytest.approx({"t": 0.04, "ti": 0.18, "it": 0.18, "iti": 0.6}, abs=0.03)
    stripped = [[part for part in d if isinstance(part, str)] for d in documents("shapes", 50, 1)]
    assert stripped == documents("text", 50, 1)

def test_edits_by_hand():
    scene = shapes.parse("a red circle above a blue square.")
    for instruction, caption in {
        "make the red circle green.": "a green circle above a blue square.",
        "make the blue square red.": "a red circle above a red square.",
        "move the blue square to the left.": "a blue square left of a red circle.",
        "move the blue square to the right.": "a blue square right of a red circle.",
        "move the blue square to the top.": "a blue square above a red circle.",
        "move the red circle to the bottom.": "a blue square above a red circle.",
        "swap them.": "a blue square above a red circle.",
    }.items():
        assert apply(scene, instruction) == shapes.parse(caption), instruction
    for nothing in ("make the red circle red.", "move the red circle to the top.", "make the red square green.", "no"):
        assert apply(scene, nothing) is None
    both = shapes.parse("a red circle above a blue circle.")
    assert apply(both, "make the red circle blue.") is None  # two of the same thing are no scene

def test_what_an_instruction_makes_is_read_back_from_the_picture():
    """Scene and instruction to scene, and picture and instruction to picture: the arrows agree, in every split."""
    for split in shapes.SPLITS:
        kinds, found = Counter(), edit_examples(split, 200, 0)
        for before, after, picture, instruction, edited in found:
            assert shapes.split(before) == shapes.split(after) == split and before != after
            assert apply(before, instruction) == after
            assert shapes.read(picture) == before and shapes.read(edited) == after
            kinds[instruction.split()[0]] += 1
        assert set(kinds) == {"make", "move", "swap"} and min(kinds.values()) > 40
    assert {word for *_, instruction, _ in found for word in instruction.rstrip(".").split()} <= set(WORDS)

def test_an_edit_leaves_the_other_thing_where_it_was():
    for before, after, picture, instruction, edited in edit_examples("train", 60, 1):
        if instruction.startswith("make"):
            kept = before.second if before.first != after.first else before.first
            ink = (np.abs(picture.astype(int) - shapes.COLOURS[kept.colour]) < 5).all(-1)
            changed = (picture != edited).any(-1)
            assert changed.any() and not (changed & ink).any() or before.first.colour == before.second.colour

def test_every_edit_of_a_scene_makes_another_scene_that_an_edit_makes_back():
    for scene in shapes.SPLITS["test"][:40]:
        for kind in edits(scene).values():
            for after in kind.values():
                assert after in shapes.FACTS and after != scene
                assert scene in [back for kinds in edits(after).values() for back in kinds.values()]

def test_frechet_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = np.full((400, 32, 32, 3), 100, np.uint8) + rng.integers(0, 60, (400, 8, 8, 3), dtype=np.uint8).repeat(
        4, axis=1).repeat(4, axis=2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 10) == pytest.approx(192 * (10 / 255) ** 2, rel=1e-6)  # a shift costs its square
    spread = ((a.astype(int) - 100) * 2 + 100).clip(0, 255).astype(np.uint8)  # twice the deviation: (2 - 1)^2 variances
    thumbnails = a[:, ::4, ::4].reshape(400, -1) / 255
    shift = ((thumbnails.mean(0) - 100 / 255) ** 2).sum()
    assert frechet(a, spread) == pytest.approx(shift + thumbnails.var(0, ddof=1).sum(), rel=1e-5)

def test_pictures_for_people():
    rng = random.Random(0)
    pictures = [shapes.render(shapes.pick(rng, shapes.FACTS), rng) for _ in range(7)]
    row = canvas.side_by_side(pictures)
    assert canvas.stack(row, row).height == 2 * row.height
    grid = canvas.captioned_grid(pictures, ["a red circle above a blue square."] * 7, [True] * 6 + [False], columns=3)
    reddish = (np.asarray(grid).astype(int) - (200, 0, 0)).__abs__().max(-1) == 0
    assert reddish.any() and reddish.nonzero()[0].min() > grid.height * 2 / 3  # only the last caption is red
    text = canvas.half_blocks(pictures[0])
    assert text.count("▀") == 32 * 16 and len(text.splitlines()) == 16
