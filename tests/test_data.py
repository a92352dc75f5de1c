"""The toy world, its tasks and scores, and how the scores see a trained model."""

import math
import os
import pickle
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import plots, shapes
from data.evaluate import Trained, accuracy, frechet, psnr, score_matching
from data.tasks import Edit, Shapes, Text, examples
from tests.conftest import ROOT, SMALL_MODEL
from train import Run, build_models
from transfusion import BOI, EOS, Config, encode, next_logits

ABOVE = shapes.parse("a red circle above a blue square.")
# All true texts, and the scene of each.
MEANING = shapes.CAPTIONS | {
    shapes.argument(scene, flip): scene for scene in shapes.ARRANGEMENTS for flip in (False, True)
}

class MoreText(Shapes):
    """A task that somebody adds."""
    text_only, single, similar = 0.3, 0.1, 0.5

def make_task(kind, **options):
    return kind(Run(**options), image_size=32)

def texts_of(document):
    return [part for part in document if isinstance(part, str)]

# ---- Scenes, captions, pictures and edits --------------------------------------------------------

def test_pictures_are_read_exactly_and_with_a_little_noise_nearly_so():
    rng = random.Random(0)
    scenes = rng.sample(shapes.SINGLES + shapes.ARRANGEMENTS, 2000)
    pictures = np.stack([shapes.render(scene, rng) for scene in scenes])
    assert accuracy(map(shapes.read, pictures), scenes) >= 0.999
    noise = np.random.default_rng(0).normal(0, 12, pictures.shape)
    noisy = (pictures + noise).clip(0, 255)
    assert accuracy(map(shapes.read, noisy), scenes) >= 0.98

def test_a_third_thing_or_none_or_noise_is_no_scene():
    third = shapes.render(ABOVE, random.Random(0))
    third[:8, :8] = shapes.COLOURS["green"]
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3))
    for picture in (third, np.full_like(third, 245), *noise):
        assert shapes.read(picture) is None

@pytest.mark.parametrize("relation, axis", [("left of", 1), ("above", 0)])
def test_the_picture_shows_what_the_caption_says(relation, axis):
    scene = shapes.parse(f"a red square {relation} a blue ring.")
    picture = shapes.render(scene, random.Random(0))
    first, second = np.split(picture, 2, axis)
    assert (first == shapes.COLOURS["red"]).all(2).any()
    assert (second == shapes.COLOURS["blue"]).all(2).any()

def test_an_argument_describes_a_scene_from_both_ends():
    told = "a red circle is above a blue square. so a blue square is below a red circle."
    assert shapes.argument(ABOVE) == told
    told = "a blue square is below a red circle. so a red circle is above a blue square."
    assert shapes.argument(ABOVE, flip=True) == told

@pytest.mark.parametrize("instruction, caption", [
    ("make the red circle green.", "a green circle above a blue square."),
    ("move the blue square to the left.", "a blue square left of a red circle."),
    ("move the blue square to the right.", "a red circle left of a blue square."),
    ("move the blue square to the top.", "a blue square above a red circle."),
    ("move the red circle to the bottom.", "a blue square above a red circle."),
    ("swap them.", "a blue square above a red circle."),
    ("make the red circle red.", "no change"),
    ("make the red square green.", "no such thing"),
])
def test_edits_by_hand(instruction, caption):
    assert shapes.edit(ABOVE, instruction) == shapes.parse(caption)

@pytest.mark.parametrize("split", shapes.SPLITS)
def test_examples_of_edits_show_what_the_instruction_makes(split):
    rng = random.Random(0)
    task = make_task(Edit)
    for _ in range(200):
        before, after, picture, instruction, edited = task.example(rng, split)
        assert shapes.edit(before, instruction) == after
        assert shapes.split(before) == shapes.split(after) == split
        assert (shapes.read(picture), shapes.read(edited)) == (before, after)
        assert set(instruction[:-1].split()) <= set(shapes.WORDS)
        if instruction.startswith("make"):  # the other thing stays where it was
            changed = (picture != edited).any(2)
            for positions in changed.nonzero():
                assert np.ptp(positions) < shapes.EDGE

# ---- Documents -----------------------------------------------------------------------------------

def test_each_scene_is_in_one_split():
    assert Counter(sum(shapes.SPLITS.values(), [])) == Counter(shapes.ARRANGEMENTS)
    for name in shapes.SPLITS:
        assert {shapes.split(scene) for scene, _, _ in examples(name, 200, 0)} == {name}

@pytest.mark.parametrize("kind", [Shapes, Text, Edit])
def test_documents_show_only_training_scenes(kind):
    for document in make_task(kind).documents(800, seed=0):
        pictures = [part for part in document if not isinstance(part, str)]
        scenes = list(map(shapes.read, pictures))
        if len(scenes) < 2:
            scenes += [MEANING[text] for text in texts_of(document)]
            assert len(set(scenes)) == 1
        assert set(map(shapes.split, scenes)) == {"train"}

def checksum(seed):
    data = make_task(Edit).documents(100, seed), shapes.WORDS
    return zlib.crc32(pickle.dumps(data))

def test_the_same_seed_gives_the_same_data_in_another_process():
    command = [sys.executable, "-c", "from tests.test_data import *; print(checksum(7))"]
    settings = os.environ | {"PYTHONHASHSEED": "1"}
    printed = subprocess.check_output(command, cwd=ROOT, env=settings)
    assert int(printed) == checksum(7) != checksum(8)

@pytest.mark.parametrize("kind, numbers", [
    (Shapes, {"t": 3000, "pt": 10800, "tp": 8100, "p": 8100}),
    (MoreText, {"t": 9000, "pt": 8400, "tp": 6300, "p": 6300}),
    (Edit, {"t": 1650, "pt": 5940, "tp": 4455, "p": 4455, "ptp": 6750, "pp": 6750}),
    (Text, {"t": 30000}),
])
def test_documents_and_entropy_follow_the_shares(kind, numbers):
    """t is text and p a picture. Half of the texts before a picture are removed."""
    task = make_task(kind, caption_first=0.6, unconditional_share=0.5)
    kinds = Counter()
    first_texts = Counter()
    for document in task.documents(30_000, seed=0):
        letters = ["t" if isinstance(part, str) else "p" for part in document]
        kinds["".join(letters)] += 1
        first_texts.update(texts_of(document[:1]))
    assert kinds == pytest.approx(numbers, abs=300)

    # Scenes of one colour come more often than others. Does the entropy know it?
    found = Counter()
    expected = Counter()
    for text, (things, relation) in MEANING.items():
        if relation and things[0].colour == things[1].colour:
            name = "text" if " so " in text else "caption"
            found[name] += first_texts[text]
            expected[name] += 30_000 * math.exp(-task.entropy(name, [MEANING[text]]))
    for name in ("text", "caption"):
        assert abs(found[name] - expected[name]) < 3 * math.sqrt(expected[name])

# ---- Scores --------------------------------------------------------------------------------------

class Oracle:
    """In place of Trained: all its answers are right, but its VAE loses every other picture."""

    def __init__(self, task):
        self.task = task

    def log_likelihood(self, documents, end=EOS):
        """As likely as in the grammar."""
        log_p = []
        for [text] in documents:
            kind = "text" if " so " in text else "caption"
            log_p.append(-self.task.entropy(kind, [MEANING[text]]))
        return np.array(log_p), np.ones(len(documents))

    def caption(self, pictures):
        return [shapes.describe(shapes.read(picture)) for picture in pictures]

    def reconstruct(self, pictures):
        pictures = np.array(pictures)
        pictures[::2] = shapes.BACKGROUND
        return pictures

    def draw(self, prompts):
        drawings = []
        for *given, text in prompts:
            scene = shapes.edit(shapes.read(*given), text) if given else MEANING[text]
            drawings.append(shapes.render(scene, random.Random(0)))
        return self.reconstruct(drawings), 1.0

@pytest.mark.parametrize("kind, typical", [
    (Shapes, "draw_acc"),
    (Edit, "edit_acc"),
    (Text, "text_ppl"),
])
def test_right_answers_have_the_best_possible_scores(kind, typical):
    task = make_task(kind)
    report = task.evaluate(Oracle(task), "test", 40, 0)
    assert typical in report.scores
    for name, (value, beside) in report.scores.items():
        assert any(word in beside for word in ("floor", "ceiling", "best", "true", "of 1"))
        if name.endswith("acc"):
            best = 1 if name == "caption_acc" else 0.5
            assert value == best
        # As uncertain as the grammar, and as good as the VAE.
        if name in ("text_ppl", "caption_ppl", "draw_acc", "edit_acc"):
            assert f"{value:.4f}" in beside
        if name.endswith("excess"):
            assert value == pytest.approx(0, abs=1e-3)
    assert kind is Text or report.correct == [False, True] * 20

def test_frechet_of_known_distributions():
    a = np.random.default_rng(0).integers(0, 60, (400, 8, 8, 3))
    # Twice the deviation costs (2 - 1)^2 variances, and the mean moves too.
    expected = a.var(0, ddof=1) + (a.mean(0) + 10) ** 2
    assert frechet(a, 2 * a + 10) == pytest.approx(expected.sum() / 255**2)

def test_psnr_is_of_the_mean_error():
    found = psnr(np.uint8([8, 8]), np.uint8([8, 28]))
    assert found == pytest.approx(10 * math.log10(255**2 / 200))

def test_matching_is_how_often_the_own_pair_wins():
    """A caption is a number, and its picture is the same number."""
    def fit(own, others):
        """Knows the even numbers. All others fit an odd one equally well, which is not a win."""
        return -abs(own - others) * (own % 2 == 0)

    def log_likelihood(documents):
        pictures, captions = np.int64(documents).T
        return [fit(captions, pictures)]

    def diffusion_loss(captions, pictures):
        return -fit(pictures, np.int64(captions))

    matcher = SimpleNamespace(
        model=SimpleNamespace(cfg=Config()),
        log_likelihood=log_likelihood,
        diffusion_loss=diffusion_loss,
    )
    captions = [str(i) for i in range(200)]
    scores = score_matching(matcher, captions, np.arange(200), seed=0)
    for name in ("caption_match", "draw_match"):
        value, beside = scores[name]
        assert value == 0.5
        assert "0.125" in beside

    # A second caption of a picture is no wrong choice: 1 beside 0, and 3 beside 2.
    _, chance = score_matching(matcher, list("0123"), np.int64([0, 0, 2, 2]), seed=0)["draw_match"]
    assert "0.3333" in chance  # the own pair, and two others

@pytest.mark.parametrize("text", ["größer", "5 €", "кот", "猫"])
def test_captions_are_drawn_in_a_font_that_has_their_letters(text):
    font = plots.find_font(text, 12)
    if font.getname() == plots.find_font("a", 12).getname():
        pytest.skip("no font of this machine has them")
    drawn = {bytes(font.getmask(c)) for c in {*text, "\uffff"}}  # the last is in no font
    assert len(drawn) == len({*text, "\uffff"})

# ---- A trained model -----------------------------------------------------------------------------

PICTURES = np.stack([picture for _, _, picture in examples("val", 3, 0)])

@pytest.fixture(params=["transfusion", "chameleon"])
def untrained(request):
    """With random weights."""
    torch.manual_seed(0)
    cfg = Config(model=request.param, **SMALL_MODEL)
    tokenizer, model, vae = build_models(cfg, shapes.WORDS, torch.device("cpu"))
    for p in [*model.parameters(), *vae.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    return Trained(model, tokenizer, vae, Run())

@pytest.mark.parametrize("end", [BOI, EOS])
def test_log_likelihood_is_the_sum_over_all_text(untrained, end):
    """Also over BOI before a picture, and over the end, but not over the codes of Chameleon."""
    documents = [
        ["a ring."],
        ["so", PICTURES[0], "a red"],
        [PICTURES[1]],
    ]
    expected = []
    for document in encode(documents, untrained.tokenizer, untrained.vae):
        log_p = []
        for i, item in enumerate([*document, end]):
            token = item if isinstance(item, int) else BOI
            logits = next_logits(untrained.model, [document[:i]])[0]
            log_p.append(logits.log_softmax(-1)[token].item())
        expected.append((sum(log_p), len(log_p)))
    found = untrained.log_likelihood(documents * 50, end)
    assert np.allclose(np.transpose(found), expected * 50, rtol=1e-4)

def test_drawings_belong_to_their_prompts(untrained, monkeypatch):
    """The drawing of this model is the picture in its prompt."""
    def draw(documents, *settings, show):
        return torch.stack([document[-1] for document in documents])

    monkeypatch.setattr(untrained.model, "draw", draw)
    prompts = [["a", picture] for picture in PICTURES] * 50
    documents = encode(prompts[:3], untrained.tokenizer, untrained.vae)
    head = untrained.model.lm_head.weight.requires_grad_(False)
    head[BOI] = 1.01 * head[next_logits(untrained.model, documents)[0].argmax()]
    drawn, chosen = untrained.draw(prompts)
    expected = np.concatenate([untrained.reconstruct(PICTURES)] * 50)
    assert np.allclose(drawn, expected, atol=1)  # the size of a batch may change the rounding

    likeliest = next_logits(untrained.model, documents).argmax(-1).tolist()
    assert chosen == likeliest.count(BOI) / 3 > 0

@pytest.mark.parametrize("untrained", ["transfusion"], indirect=True)
def test_diffusion_loss_belongs_to_its_pair(untrained):
    captions = ["a red ring.", "a blue ring.", "a green ring."]
    pictures = np.concatenate([PICTURES] * 50)
    losses = untrained.diffusion_loss(captions * 50, pictures)
    [alone] = untrained.diffusion_loss(captions[1:2], PICTURES[1:2])
    [other] = untrained.diffusion_loss(captions[:1], PICTURES[1:2])
    assert np.allclose(losses[1::3], alone)
    assert not np.isclose(other, alone)

# ---- Imports -------------------------------------------------------------------------------------

def imports(path):
    """The packages that a file imports."""
    pattern = r"^ *(?:import|from) (\w+)[\w.]*(?: import| as|$)"
    return set(re.findall(pattern, path.read_text(), re.MULTILINE))

def test_imports_point_one_way():
    assert imports(ROOT / "transfusion.py") <= {"torch", *sys.stdlib_module_names}
    for file in (ROOT / "data").glob("*.py"):
        assert not imports(file) & {"train", "sample", "tests"}, file
