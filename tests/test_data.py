"""The toy world: its arrows have inverses, its splits are disjoint, its entropy and its scores are right."""

import ast
import hashlib
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import plots, shapes
from data.documents import edit_examples, examples
from data.files import load_picture
from data.scores import accuracy, frechet, psnr, score_vae
from data.shapes import Scene, Thing
from data.tasks import TASKS
from transfusion import unconditional

ROOT = Path(__file__).parents[1]
WORDINGS = [(tell, flip) for tell in (shapes.describe, shapes.argument) for flip in (False, True)]

def documents(task, n, seed, caption_first=0.5, unconditional_share=0.1):
    return TASKS[task](caption_first, unconditional_share).documents(n, seed)

def form(document):
    """"ti" is text and then an image."""
    return "".join("t" if isinstance(part, str) else "i" for part in document)

@pytest.fixture
def quick_pictures(monkeypatch):
    """Where only the text is looked at: all pictures are the same one, so that nothing is drawn."""
    monkeypatch.setattr(shapes, "render", lambda scene, rng: np.zeros((32, 32, 3), np.uint8))

# ---- Scene, caption and picture ----------------------------------------------------------------------------

def test_ten_thousand_true_pictures_are_read_exactly():
    rng, wrong = random.Random(0), 0
    for i in range(10_000):
        scene = shapes.pick(rng, shapes.SINGLES if i % 10 == 0 else shapes.ARRANGEMENTS)
        wrong += shapes.read(shapes.render(scene, rng)) != scene
    assert wrong <= 10

def test_reading_survives_a_little_noise_and_refuses_what_is_no_scene():
    rng, noise = random.Random(1), np.random.default_rng(1)
    scenes = [shapes.pick(rng, shapes.ARRANGEMENTS) for _ in range(100)]
    pictures = [shapes.render(scene, rng) for scene in scenes]
    noisy = [(p + noise.normal(0, 12, p.shape)).clip(0, 255).astype(np.uint8) for p in pictures]
    assert accuracy(map(shapes.read, noisy), scenes) >= 0.98
    for picture in noise.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8):
        assert shapes.read(picture) is None
    for level in (0, 128, 245, 255):
        assert shapes.read(np.full((32, 32, 3), level, np.uint8)) is None
    halves = [np.concatenate([a[:16], b[16:]]) for a, b in zip(pictures, pictures[1:])]
    assert any(shapes.read(half) is None for half in halves)

def test_one_thing_more_than_the_world_has_is_no_scene():
    squares = np.full((32, 32, 3), shapes.BACKGROUND, np.uint8)
    for x, colour in ((0, "red"), (10, "blue"), (20, "black")):
        squares[x : x + 8, x : x + 8] = shapes.COLOURS[colour]
    assert shapes.read(squares) is None

    corners = [(0, 0, "red"), (20, 0, "blue"), (0, 20, "black"), (20, 20, "green")]
    for n in range(1, shapes.MOST_THINGS + 2):
        picture = Image.new("RGB", (32, 32), shapes.BACKGROUND)
        for x, y, colour in corners[:n]:
            picture.paste(shapes.COLOURS[colour], (x, y), shapes.SPRITES["square"])
        found = shapes.read(np.array(picture))
        assert (found is None) == (n > shapes.MOST_THINGS), n

    for colour in ("red", "blue"):
        single = Scene((Thing(colour, "square"),))
        assert shapes.read(shapes.render(single, random.Random(2))) == single

def test_every_caption_is_parsed_from_either_end():
    for scene in shapes.SINGLES + shapes.ARRANGEMENTS:
        assert shapes.parse(shapes.describe(scene)) == scene
        assert shapes.parse(shapes.describe(scene, flip=True)) == scene
    circle_above = shapes.parse("a red circle above a blue square.")
    assert circle_above == shapes.parse("a blue square below a red circle.")
    assert circle_above != shapes.parse("a blue square above a red circle.")
    assert shapes.parse("a red circle near a blue square.") is None
    for nonsense in ("", "a red circle", "a red dog.", "a red circle above."):
        assert shapes.parse(nonsense) is None

def test_what_the_picture_shows_is_what_the_caption_says():
    """The relation in pixels, without `read`."""
    rng = random.Random(3)
    for relation, axis in (("left of", 1), ("above", 0)):
        scene = shapes.parse(f"a red square {relation} a blue ring.")
        picture = shapes.render(scene, rng).astype(int)
        centre = {
            colour: np.argwhere((np.abs(picture - shapes.COLOURS[colour]) < 10).all(-1)).mean(0)
            for colour in ("red", "blue")
        }
        assert centre["red"][axis] + 10 < centre["blue"][axis]

def test_the_argument_is_valid_and_the_other_relations_are_not():
    scene = shapes.parse("a red circle above a blue square.")
    told = "a red circle is above a blue square. so a blue square is below a red circle."
    assert shapes.argument(scene, flip=False) == told
    told = "a blue square is below a red circle. so a red circle is above a blue square."
    assert shapes.argument(scene, flip=True) == told
    for flip in (False, True):
        conclusions = {relation: shapes.argument(scene, flip, relation) for relation in shapes.OPPOSITE}
        assert len(set(conclusions.values())) == 4
        assert conclusions[shapes.conclusion(scene, flip)] == shapes.argument(scene, flip)

# ---- Scenes of three things --------------------------------------------------------------------------------

RED, BLUE, GREEN = Thing("red", "circle"), Thing("blue", "square"), Thing("green", "ring")
THREE = Scene((RED, BLUE, GREEN), "left of")

def test_a_scene_of_three_things_is_described_from_either_end():
    assert shapes.describe(THREE) == "a red circle left of a blue square left of a green ring."
    assert shapes.describe(THREE, flip=True) == "a green ring right of a blue square right of a red circle."
    assert shapes.argument(THREE) == (
        "a red circle is left of a blue square is left of a green ring. "
        "so a green ring is right of a blue square is right of a red circle."
    )
    assert shapes.argument(THREE, flip=True, conclusion="above") == (
        "a green ring is right of a blue square is right of a red circle. "
        "so a red circle is above a blue square is above a green ring."
    )
    assert (shapes.conclusion(THREE), shapes.conclusion(THREE, flip=True)) == ("right of", "left of")

def test_a_scene_of_three_things_is_edited(monkeypatch):
    """In a world that has such scenes, which is all that `edits` asks about it."""
    monkeypatch.setattr(shapes, "is_arrangement", lambda scene: len(set(scene.things)) == 3)
    for instruction, things, relation in (
        ("make the blue square red.", (RED, Thing("red", "square"), GREEN), "left of"),
        ("make the green ring black.", (RED, BLUE, Thing("black", "ring")), "left of"),
        ("move the blue square to the left.", (BLUE, RED, GREEN), "left of"),
        ("move the blue square to the right.", (RED, GREEN, BLUE), "left of"),
        ("move the green ring to the top.", (GREEN, RED, BLUE), "above"),
        ("move the red circle to the bottom.", (BLUE, GREEN, RED), "above"),
        ("swap them.", (GREEN, BLUE, RED), "left of"),
    ):
        assert shapes.edit(THREE, instruction) == Scene(things, relation), instruction
    for nothing in ("make the red circle red.", "move the red circle to the left.", "make the cross green."):
        assert shapes.edit(THREE, nothing) is None, nothing
    number = {kind: len(found) for kind, found in shapes.edits(THREE).items()}
    assert number == {"make": 3 * (len(shapes.COLOURS) - 1), "move": 3 * 4 - 2, "swap": 1}

# ---- Documents ---------------------------------------------------------------------------------------------

def test_the_splits_are_disjoint_in_every_wording():
    sides = {name: set(scenes) for name, scenes in shapes.SPLITS.items()}
    n = len(shapes.ARRANGEMENTS)
    assert sum(map(len, sides.values())) == len(set.union(*sides.values())) == n
    assert set.union(*sides.values()) == set(shapes.ARRANGEMENTS)
    assert 0.08 < len(sides["test"]) / n < 0.12 and 0.03 < len(sides["val"]) / n < 0.07
    told = [{tell(scene, flip) for scene in side for tell, flip in WORDINGS} for side in sides.values()]
    assert sum(map(len, told)) == len(set.union(*told)) == len(WORDINGS) * n
    for name in sides:
        assert {scene for scene, _, _ in examples(name, 300, 0)} <= sides[name]

@pytest.mark.parametrize("task", TASKS)
def test_documents_tell_and_show_only_what_is_trained_on(task):
    found = Counter()
    for document in documents(task, 2000, 0):
        scenes = [shapes.read(part) for part in unconditional(document)]
        texts = [part for part in document if isinstance(part, str)]
        if len(scenes) < 2:
            for text in texts:
                scene = shapes.parse(text) or shapes.parse(text.split(" so ")[0].replace(" is ", " "))
                assert text in [tell(scene, flip) for tell, flip in WORDINGS[: 4 if scene.relation else 2]]
                scenes.append(scene)
            assert len(set(scenes)) == 1, document
        elif texts:
            before, after = scenes
            assert shapes.edit(before, *texts) == after
        found.update(map(shapes.split, scenes))
    assert set(found) == {"train"}

def test_the_same_seed_gives_the_same_data_in_another_process():
    program = (
        "import hashlib; from data import shapes; from data.tasks import TASKS;"
        "d = TASKS['edit'](0.5, 0.1).documents(200, 7);"
        "flat = b''.join(p.encode() if isinstance(p, str) else p.tobytes() for x in d for p in x);"
        "print(hashlib.sha256(flat).hexdigest(), sorted(map(str, shapes.SPLITS['test']))[0])"
    )
    printed = {
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": seed, "PATH": ""},
                       capture_output=True, text=True, check=True).stdout
        for seed in ("1", "2")
    }
    here = documents("edit", 200, 7)
    flat = b"".join(part.encode() if isinstance(part, str) else part.tobytes() for d in here for part in d)
    assert len(printed) == 1
    assert printed.pop().split()[0] == hashlib.sha256(flat).hexdigest()
    other = documents("edit", 200, 8)
    assert [d for d in other if len(d) == 1] != [d for d in here if len(d) == 1]

@pytest.mark.parametrize(
    "task, caption_first, unconditional_share",
    [("shapes", 0.8, 0.1), ("shapes", 0.3, 0.5), ("shapes", 0.5, 0), ("text", 0.8, 0.5), ("edit", 0.6, 0.3)],
)
def test_the_entropy_is_that_of_the_documents(task, caption_first, unconditional_share, quick_pictures):
    """exp(-entropy) is how often a text is in the documents. Things alike come more often than others."""
    entropy = TASKS[task](caption_first, unconditional_share).entropy
    data = documents(task, 30_000, 3, caption_first, unconditional_share)
    begins = Counter(document[0] for document in data if isinstance(document[0], str))
    alike, other = [], []
    for scene in shapes.ARRANGEMENTS:
        (alike if min(len(set(words)) for words in zip(*scene.things)) == 1 else other).append(scene)
    for kind, tell in (("text", shapes.argument), ("caption", shapes.describe)):
        for scenes in (alike, other):
            wordings = {tell(scene, flip) for scene in scenes for flip in (False, True)}
            assert len(wordings) == 2 * len(scenes)
            number = sum(begins[text] for text in wordings)
            each = entropy(kind, scenes[:1])
            assert entropy(kind, scenes) == pytest.approx(each * len(scenes))
            # Chance, and what was held out may be a little more of one sort than of the other.
            allowed = 2.5 / math.sqrt(number) + 0.02
            assert math.log(number / len(wordings) / len(data)) == pytest.approx(-each, abs=allowed)

def test_the_tasks_have_the_documents_that_they_say():
    shares = {}
    for task in ("shapes", "text", "edit"):
        data = documents(task, 2000, 0, unconditional_share=0)
        shares[task] = {key: n / 2000 for key, n in Counter(map(form, data)).items()}
    assert shares["text"] == {"t": 1.0}
    assert shares["shapes"] == pytest.approx({"t": 0.1, "ti": 0.45, "it": 0.45}, abs=0.04)
    assert shares["edit"] == pytest.approx({"t": 0.05, "ti": 0.225, "it": 0.225, "iti": 0.5}, abs=0.03)

def test_the_text_task_has_the_texts_of_the_shapes_task():
    with_pictures = documents("shapes", 50, 1, unconditional_share=0)
    texts = [[part for part in document if isinstance(part, str)] for document in with_pictures]
    assert texts == documents("text", 50, 1)

@pytest.mark.parametrize("task, forms", [("shapes", {"ti"}), ("edit", {"ti", "iti"}), ("text", set())])
def test_the_share_of_unconditional_documents_is_as_asked(task, forms, quick_pictures):
    """Only those with text before a picture; nothing else about the documents changes."""
    for share in (0.1, 0.4):
        became = {}
        with_text = documents(task, 4000, 0, unconditional_share=0)
        for before, after in zip(with_text, documents(task, 4000, 0, unconditional_share=share), strict=True):
            lost_text = len(after) < len(before)
            expected = unconditional(before) if lost_text else before
            assert [part if isinstance(part, str) else "picture" for part in after] == [
                part if isinstance(part, str) else "picture" for part in expected]
            became.setdefault(form(before), []).append(lost_text)
        assert {key for key in became if any(became[key])} == forms
        for key in forms:
            assert np.mean(became[key]) == pytest.approx(share, abs=0.04)

# ---- Edits -------------------------------------------------------------------------------------------------

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
        assert shapes.edit(scene, instruction) == shapes.parse(caption), instruction
    for nothing in (
        "make the red circle red.", "move the red circle to the top.", "make the red square green.", "no"
    ):
        assert shapes.edit(scene, nothing) is None
    both = shapes.parse("a red circle above a blue circle.")
    assert shapes.edit(both, "make the red circle blue.") is None  # two of the same thing are no scene

def test_what_an_instruction_makes_is_read_back_from_the_picture():
    """Scene and instruction to scene, picture and instruction to picture: the arrows agree in every split."""
    for split in shapes.SPLITS:
        kinds, found = Counter(), edit_examples(split, 200, 0)
        for before, after, picture, instruction, edited in found:
            assert shapes.split(before) == shapes.split(after) == split and before != after
            assert shapes.edit(before, instruction) == after
            assert shapes.read(picture) == before and shapes.read(edited) == after
            kinds[instruction.split()[0]] += 1
        assert set(kinds) == {"make", "move", "swap"} and min(kinds.values()) > 40
        words = {word for *_, instruction, _ in found for word in instruction.removesuffix(".").split()}
        assert words <= set(shapes.WORDS)

def test_an_edit_leaves_the_other_thing_where_it_was():
    checked = 0
    for before, after, picture, instruction, edited in edit_examples("train", 60, 1):
        if instruction.startswith("make"):
            (old,) = [a for a, b in zip(before.things, after.things) if a != b]
            changed = (picture != edited).any(-1)
            for kept in [a for a, b in zip(before.things, after.things) if a == b]:
                ink = (np.abs(picture.astype(int) - shapes.COLOURS[kept.colour]) < 5).all(-1)
                assert ink.any() and changed.any()
                if kept.colour != old.colour:
                    assert not (changed & ink).any()
                    checked += 1
    assert checked > 5

def test_every_edit_of_a_scene_makes_another_scene_that_an_edit_makes_back():
    for scene in shapes.SPLITS["test"][:40]:
        for kind in shapes.edits(scene).values():
            for after in kind.values():
                assert after in shapes.ARRANGEMENTS and after != scene
                assert scene in [back for kinds in shapes.edits(after).values() for back in kinds.values()]

# ---- Scores ------------------------------------------------------------------------------------------------

def test_frechet_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = np.full((400, 32, 32, 3), 100, np.uint8) + rng.integers(0, 60, (400, 8, 8, 3), dtype=np.uint8).repeat(
        4, axis=1).repeat(4, axis=2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 10) == pytest.approx(192 * (10 / 255) ** 2, rel=1e-6)  # a shift costs its square
    # Twice the deviation costs (2 - 1)^2 variances, and the shift of the mean.
    spread = ((a.astype(int) - 100) * 2 + 100).clip(0, 255).astype(np.uint8)
    thumbnails = a[:, ::4, ::4].reshape(400, -1) / 255
    shift = ((thumbnails.mean(0) - 100 / 255) ** 2).sum()
    assert frechet(a, spread) == pytest.approx(shift + thumbnails.var(0, ddof=1).sum(), rel=1e-5)

def test_psnr_of_known_noise():
    rng = np.random.default_rng(0)
    grey = np.full((50, 32, 32, 3), 128, np.uint8)
    expected = 20 * math.log10(255 / 10)
    assert psnr(grey, grey + 10) == psnr(grey + 10, grey) == pytest.approx(expected, abs=1e-4)
    noisy = (grey + rng.normal(0, 20, grey.shape)).round().astype(np.uint8)
    assert psnr(grey, noisy) == pytest.approx(20 * math.log10(255 / 20), abs=0.05)
    half = np.concatenate([grey, grey + 10])  # over all pictures: the mean of the errors, not of the decibels
    assert psnr(half, np.concatenate([grey, grey])) == pytest.approx(expected + 10 * math.log10(2), abs=1e-3)
    assert 90 < psnr(grey, grey) < math.inf

class Oracle:
    """A model with answers that are right by construction. `lose` is what its VAE does to pictures."""

    def __init__(self, task, lose=lambda pictures: pictures):
        self.task, self.lose = task, lose

    def log_likelihood(self, texts, draws):
        """As likely as the grammar has them; a wrong conclusion is nearly impossible."""
        log_p = []
        for text in texts:
            kind = "text" if " so " in text else "caption"
            premise = shapes.parse(text.split(" so ")[0].replace(" is ", " "))
            is_true = any(text == tell(premise, flip) for tell, flip in WORDINGS)
            log_p.append(-self.task.entropy(kind, [premise]) if is_true else -100.0)
        return np.array(log_p), np.array([len(text.split()) + 2 for text in texts])

    def caption(self, pictures):
        return [shapes.describe(shapes.read(picture)) for picture in pictures]

    def draw(self, prompts, guidance_scale):
        scenes = [shapes.parse(*p) if len(p) == 1 else shapes.edit(shapes.read(p[0]), p[1]) for p in prompts]
        return self.lose(np.stack([shapes.render(scene, random.Random(0)) for scene in scenes]))

    def reconstruct(self, pictures):
        return self.lose(pictures)

    def codes(self, pictures):
        return None

@pytest.mark.parametrize("name", TASKS)
def test_who_knows_the_world_has_the_best_possible_scores(name):
    task = TASKS[name](0.5, 0.1)
    report = task.evaluate(Oracle(task), "test", 40, 0, [2.0, 1.0])
    for score, (value, beside) in report.scores.items():
        assert any(word in beside for word in ("floor", "ceiling", "chance", "best possible", "true pictures"))
        if score.endswith("ppl"):
            assert f"best possible {value:.4f}: " in beside  # it is exactly as uncertain as the grammar
        elif "acc" in score:
            assert value == 1, score
    if name == "text":
        assert set(report.scores) == {"text_ppl", "caption_ppl", "text_acc"} and report.pictures is None
    else:
        drawing = {"draw_acc", "frechet", "draw_acc g=1", "frechet g=1"}
        assert {"caption_acc", "vae_psnr", "vae_acc", *drawing} <= set(report.scores)
        assert len(report.pictures) == len(report.prompts) == len(report.correct) == 40
        assert all(report.correct)
    assert ("edit_acc" in report.scores) == (name == "edit")

def test_what_the_vae_loses_is_the_ceiling_of_a_drawing():
    """It blanks every other picture, so that half of the drawings can be right at best."""
    def lose(pictures):
        pictures = pictures.copy()
        pictures[::2] = shapes.BACKGROUND
        return pictures

    task = TASKS["shapes"](0.5, 0.1)
    scores = task.evaluate(Oracle(task, lose), "test", 40, 0, [2.0]).scores
    assert scores["vae_acc"][0] == scores["draw_acc"][0] == 0.5 and "ceiling 0.5000" in scores["draw_acc"][1]
    scenes, _, pictures = zip(*examples("test", 40, 0))
    pictures = np.stack(pictures)
    again = score_vae(Oracle(task, lose), scenes, pictures)
    assert again["vae_psnr"][0] == scores["vae_psnr"][0] == psnr(lose(pictures), pictures)
    assert f"floor {psnr(np.full_like(pictures, shapes.BACKGROUND), pictures):.1f}" in again["vae_psnr"][1]

# ---- Files and plots ---------------------------------------------------------------------------------------

def test_pictures_for_people():
    rng = random.Random(0)
    pictures = [shapes.render(shapes.pick(rng, shapes.ARRANGEMENTS), rng) for _ in range(7)]
    row = plots.row_of(pictures)
    assert plots.stack(row, row).height == 2 * row.height
    captions = ["a red circle above a blue square."] * 7
    grid = plots.captioned_grid(pictures, captions, [True] * 6 + [False], columns=3)
    reddish = np.abs(np.asarray(grid).astype(int) - plots.RED).max(-1) == 0
    assert reddish.any() and reddish.nonzero()[0].min() > grid.height * 2 / 3  # only the last caption is red
    text = plots.terminal_picture(pictures[0])
    assert text.count("▀") == 32 * 16 and len(text.splitlines()) == 16

def test_any_picture_becomes_its_middle_square_on_white(tmp_path):
    wide = Image.new("RGBA", (120, 64), (255, 0, 0, 255))
    wide.paste((0, 0, 255, 255), (28, 0, 92, 64))  # the middle square is blue,
    wide.paste((0, 0, 0, 0), (28, 0, 60, 64))  # and its left half transparent
    wide.save(tmp_path / "wide.png")
    picture = load_picture(tmp_path / "wide.png", 32)
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
    assert (picture[:, :16] == 255).all() and (picture[:, 16:] == (0, 0, 255)).all()

# ---- Imports -----------------------------------------------------------------------------------------------

def imports(path):
    """The modules that a file imports, each as its full dotted name, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found

def test_data_imports_no_script():
    files = sorted((ROOT / "data").glob("*.py"))
    assert len(files) >= 6
    for file in files:
        used = {name.split(".")[0] for name in imports(file)}
        assert not used & {"train", "sample", "tests"}, file
        if file.name in ("shapes.py", "scores.py", "plots.py", "files.py"):
            assert not used & {"torch", "transfusion"}, f"{file} works on NumPy arrays and sentences"

def test_transfusion_needs_only_torch_and_touches_nothing_outside():
    source = (ROOT / "transfusion.py").read_text()
    used = {name.split(".")[0] for name in imports(ROOT / "transfusion.py")}
    assert "torch" in used and used <= set(sys.stdlib_module_names) | {"torch"}
    for word in ("print(", "open(", "argparse", "sys.", "pathlib", "torch.load", "torch.save"):
        assert word not in source, word
