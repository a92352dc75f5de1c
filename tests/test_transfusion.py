"""What must stay true of transfusion.py. Weights are made random first: zeros would let two wrong paths agree."""

import math
import random
from itertools import pairwise

import pytest
import torch

import transfusion
from transfusion import (BOI, BOS, EOI, EOS, MARKS, PAD, PRESETS, VAE, Config, KVCache, QuantisedVAE, Tokenizer,
                         Transfusion, UNetDown, UNetUp, codes_of, dense_mask, diffusion_target, generate, guide,
                         latents_of, make_batch, make_models, mixed_mask, p_sample, pack, patchify, q_sample, quantise,
                         rows_to_drop, token_losses, unpatchify, without_text, x0_and_eps)

WORDS = ["a", "red", "blue", "circle", "square", "above", "."]
IMAGE = None  # pack takes anything that is not a str for an image
TINY = {"dim": 32, "n_layers": 2, "n_heads": 2, "vae_dim": 8}

def tiny(vocab_size=None, seed=0, **options):
    """A small model with random weights in every place."""
    torch.manual_seed(seed)
    model, _ = make_models(Config(**{**TINY, **options}), vocab_size or len(Tokenizer(WORDS)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False).eval()

def batch(documents, cfg, **options):
    """tokens, image_id and random latents (for Chameleon, codes) and times of documents whose images are IMAGE."""
    tokens, image_id = pack(documents, Tokenizer(WORDS), cfg.n_patches, **options)
    k = int(image_id.max()) + 1
    latents = random_latents(cfg, len(documents), k)
    return tokens, image_id, latents, torch.rand(len(documents), k)

def random_latents(cfg, *shape):
    latents = torch.randn(*shape, *cfg.latent_shape)
    return quantise(latents, cfg.code_levels) if cfg.model == "chameleon" else latents

# ---- The sequence ----------------------------------------------------------------------------------------------------

def test_any_string_round_trips():
    tokenizer, rng = Tokenizer(WORDS), random.Random(0)
    strings = ["", " ", "a", "  a  red", "a red circle above a blue square.", "reddish.a red.",
               "naïve 日本\n\t", "redred"]
    alphabet = " .ared\n\x00é€😀"
    strings += ["".join(rng.choice(alphabet) for _ in range(rng.randrange(30))) for _ in range(300)]
    for text in strings:
        assert tokenizer.decode(tokenizer.encode(text)) == text

def test_words_are_one_token_and_other_text_is_bytes():
    tokenizer = Tokenizer(WORDS)
    assert len(tokenizer.encode("a red circle above a blue square.")) == 8
    assert len(tokenizer.encode("a reddish dog")) == 1 + len(" reddish dog")
    assert min(tokenizer.encode("a red dog.")) >= len(MARKS)

def test_text_that_is_not_utf8_still_decodes():
    tokenizer = Tokenizer(WORDS)
    half = tokenizer.encode("é")[:-1]
    assert tokenizer.decode(half) == "\ufffd"

def test_the_mask_is_causal_and_open_inside_an_image():
    _, image_id = pack([["red.", IMAGE, "a", IMAGE]], Tokenizer(WORDS), n_patches=2)
    mask = dense_mask(mixed_mask(image_id), torch.arange(13)[None], 13)[0, 0]
    assert ["".join("#" if may_see else "." for may_see in row) for row in mask] == [
        "#............",  # BOS
        "##...........",  # red
        "###..........",  # .
        "####.........",  # BOI
        "######.......",  # the first image: each patch sees both
        "######.......",
        "#######......",  # EOI
        "########.....",  # a
        "#########....",  # BOI
        "###########..",  # the second image, which sees the first
        "###########..",
        "############.",  # EOI
        "#############",  # EOS
    ]

def test_without_bidirectional_the_mask_is_causal_and_nothing_else():
    _, image_id = pack([["red.", IMAGE, "a", IMAGE]], Tokenizer(WORDS), n_patches=2)
    mask = dense_mask(mixed_mask(image_id, bidirectional=False), torch.arange(13)[None], 13)[0, 0]
    assert mask.equal(torch.ones(13, 13).tril().bool())

def test_only_rows_with_a_captioned_image_are_dropped():
    documents = [["a red", IMAGE], [IMAGE, "a red"], ["a red"], [IMAGE, "a", IMAGE], [IMAGE]]
    tokens, _ = pack(documents, Tokenizer(WORDS), n_patches=2)
    assert rows_to_drop(tokens, 1.0).tolist() == [True, False, False, True, False]
    share = rows_to_drop(tokens[:1].expand(5000, -1), 0.1).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.03) and not rows_to_drop(tokens, 0.0).any()

def test_without_text_is_the_same_document_packed_without_its_text():
    documents = [["a red circle.", IMAGE, "a", IMAGE], [IMAGE, "a red circle."], ["a blue square."]]
    tokens, image_id = pack(documents, Tokenizer(WORDS), n_patches=4)
    rows = torch.tensor([True, True, False])
    null, null_id = without_text(tokens, image_id, rows)
    expected, expected_id = pack([[IMAGE, IMAGE], [IMAGE], ["a blue square."]], Tokenizer(WORDS), n_patches=4)
    n = expected.shape[1]
    assert null[:, :n].equal(expected) and null_id[:, :n].equal(expected_id)
    assert (null[:, n:] == PAD).all() and (null_id[:, n:] == -1).all()

def test_where_there_is_an_lm_loss():
    tokens, image_id = pack([["red.", IMAGE], [IMAGE, "red."], ["a"]], Tokenizer(WORDS), n_patches=2)
    _, counts = token_losses(torch.zeros(3, tokens.shape[1] - 1, len(Tokenizer(WORDS))), tokens, image_id)
    assert ["".join("#" if counted else "." for counted in row) for row in counts] == [
        "###...#",  # BOS red . | BOI patch patch | EOI: each of these but BOI and the patches predicts what follows
        "#...###",  # BOS | BOI patch patch | EOI red .
        "##.....",  # BOS a | EOS and padding
    ]

def test_an_instruction_is_not_imitated_where_the_text_between_images_is_left_out():
    tokens, image_id = pack([[IMAGE, "red.", IMAGE, "a"], ["a", IMAGE]], Tokenizer(WORDS), n_patches=2)
    logits = torch.zeros(2, tokens.shape[1] - 1, len(Tokenizer(WORDS)))
    for text_between, expected in ((True, "#...###...##"), (False, "#.....#...##")):  # "." still predicts BOI
        _, counts = token_losses(logits, tokens, image_id, text_between)
        assert "".join("#" if counted else "." for counted in counts[0]) == expected
        assert counts[1].sum() == 3  # BOS a | EOI: one image, and no text between two

# ---- Schedule and samplers -------------------------------------------------------------------------------------------

TARGETS = ["eps", "v", "x0", "flow"]

@pytest.mark.parametrize("target", TARGETS)
def test_a_right_prediction_gives_back_the_image_and_the_noise(target):
    x0, eps, t = torch.randn(4, 2, 1, 8, 8), torch.randn(4, 2, 1, 8, 8), torch.rand(4, 2) * 0.8 + 0.1
    xt = q_sample(x0, eps, t, target)
    found_x0, found_eps = x0_and_eps(diffusion_target(x0, eps, t, target), xt, t, target)
    torch.testing.assert_close(found_x0, x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_eps, eps, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("target", TARGETS)
def test_noising_keeps_the_ends_and_gives_every_image_its_own_time(target):
    x0, eps = torch.full((1, 3, 1, 2, 2), 2.0), torch.full((1, 3, 1, 2, 2), -1.0)
    xt = q_sample(x0, eps, torch.tensor([[0.0, 0.5, 1.0]]), target)[0, :, 0, 0, 0]
    middle = 0.5 if target == "flow" else math.sqrt(0.5)  # x0 = 2 and eps = -1 leave one of their weight
    torch.testing.assert_close(xt, torch.tensor([2.0, middle, -1.0]))

@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("target", TARGETS)
def test_samplers_reproduce_a_gaussian(target, sampler):
    """With the best possible prediction for x0 ~ N(0.3, 0.5^2), samples must be N(0.3, 0.5^2)."""
    torch.manual_seed(0)
    x, mean, var = torch.randn(2000, 1, 1, 4, 4), 0.3, 0.25
    for t, t_next in pairwise(torch.linspace(1, 0, 101)):
        a, s = transfusion.signal_noise(t, target)
        x0 = mean + a * var / (a**2 * var + s**2) * (x - a * mean)             # E[x0 | xt]
        eps = (x - a * x0) / s
        x = p_sample(x, diffusion_target(x0, eps, t, target), t, t_next, target, sampler)
    assert abs(x.mean() - mean) < 0.02
    assert abs(x.std() - 0.5) < 0.02

def test_ddim_is_deterministic_and_ddpm_is_not():
    x, pred, t = torch.randn(2, 1, 1, 4, 4), torch.randn(2, 1, 1, 4, 4), torch.tensor(0.5)
    once, again = ([p_sample(x, pred, t, t / 2, "v", sampler) for sampler in ("ddim", "ddpm")] for _ in range(2))
    assert once[0].equal(again[0]) and not once[1].equal(again[1])

def test_the_ancestral_sampler_has_ddpms_posterior_variance():
    """Any variance keeps a Gaussian's marginals, so it is checked by itself: beta_t (1 - abar_next) / (1 - abar_t)."""
    torch.manual_seed(0)
    x, t, t_next = torch.full((20_000, 1, 1, 1, 1), 0.4), torch.tensor(0.6), torch.tensor(0.5)
    drawn = p_sample(x, torch.full_like(x, 0.2), t, t_next, "v", "ddpm")
    abar, abar_next = (math.cos(time.item() * math.pi / 2) ** 2 for time in (t, t_next))
    expected = (1 - abar / abar_next) * (1 - abar_next) / (1 - abar)
    assert drawn.var().item() == pytest.approx(expected, rel=0.05)

# ---- Who sees what ---------------------------------------------------------------------------------------------------

KINDS = {"default": {}, "causal": {"bidirectional": False}, "unet": {"patch_encoder": "unet"},
         "chameleon": {"model": "chameleon"}}

@pytest.mark.parametrize("kind", KINDS)
def test_every_place_depends_on_exactly_what_the_mask_lets_it_see(kind):
    """By gradient, through all layers: no logit moves when a later token does, a patch sees its image and no later.

    Chameleon, and causal images, see nothing that comes later at all.
    """
    model = tiny(**KINDS[kind])
    tokens, image_id, latents, t = batch([["a red", IMAGE, "above", IMAGE]], model.cfg)
    seen = {}

    def keep_input(module, args):
        seen["x"] = args[0].requires_grad_()
        return seen["x"], *args[1:]
    model.blocks[0].register_forward_pre_hook(keep_input)
    logits, _ = model(tokens, image_id, latents, t)
    may_see = mixed_mask(image_id, bidirectional=kind in ("default", "unet"))
    mask = dense_mask(may_see, torch.arange(tokens.shape[1])[None], tokens.shape[1])[0, 0]
    for q in range(tokens.shape[1]):
        grad, = torch.autograd.grad(logits[0, q].square().sum(), seen["x"], retain_graph=True)
        assert (grad[0].abs().amax(1) > 0).equal(mask[q]), q

@pytest.mark.parametrize("kind", ["default", "causal", "unet"])
def test_an_image_depends_on_its_own_time_and_on_earlier_images_only(kind):
    model = tiny(**KINDS[kind])
    tokens, image_id, latents, t = batch([["a", IMAGE, "red", IMAGE]], model.cfg)
    latents.requires_grad_(), t.requires_grad_()
    _, pred = model(tokens, image_id, latents, t)
    first = torch.autograd.grad(pred[:, 0].square().sum(), (latents, t), retain_graph=True)
    second = torch.autograd.grad(pred[:, 1].square().sum(), (latents, t))
    assert all(grad[:, 0].abs().sum() > 0 and grad[:, 1].abs().sum() == 0 for grad in first)
    assert all(grad[:, 0].abs().sum() > 0 and grad[:, 1].abs().sum() > 0 for grad in second)

def test_chameleon_draws_code_after_code():
    """No logit up to a code depends on it, and every later one does: the place of a code predicts the next."""
    model = tiny(model="chameleon")
    tokens, image_id, latents, _ = batch([["a", IMAGE, "red", IMAGE]], model.cfg)
    before, _ = model(tokens, image_id, latents)
    first_place = (image_id[0] == 0).nonzero()[0].item()
    for n in (0, 5, 15):
        other = latents.clone()
        row, column = divmod(n, model.cfg.grid)
        other[0, 0, :, row, column] = other[0, 0, :, row, column].roll(1) * -1
        assert not other.equal(latents)
        moved = (model(tokens, image_id, other)[0] - before)[0].abs().amax(-1) > 1e-5
        assert not moved[:first_place + n].any() and moved[first_place + n:].all()

def test_padding_and_the_rest_of_the_batch_change_nothing():
    model = tiny()
    short, long = ["a", IMAGE], ["a red circle above a blue square.", IMAGE, "a red circle."]
    tokens, image_id, latents, t = batch([short, long], model.cfg)
    logits, pred = model(tokens, image_id, latents, t)
    for row, document in enumerate([short, long]):
        alone, alone_id = pack([document], Tokenizer(WORDS), model.cfg.n_patches)
        alone_logits, alone_pred = model(alone, alone_id, latents[[row]], t[[row]])
        torch.testing.assert_close(logits[[row], :alone.shape[1]], alone_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pred[[row]], alone_pred, atol=1e-4, rtol=1e-4)

def test_patches_are_squares_in_raster_order():
    latents = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    patches = patchify(latents, 2)
    assert patches.shape == (2, 4, 12)
    for n, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        square = latents[:, :, row:row + 2, column:column + 2]
        assert patches[:, n].sort().values.equal(square.flatten(1).sort().values)
    assert unpatchify(patches, 2, 3).equal(latents)

@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_the_unet_makes_patches_of_every_size_and_depends_on_t_and_the_skip(patch_size):
    cfg = Config(**TINY, patch_size=patch_size, patch_encoder="unet", unet_dim=8)
    torch.manual_seed(0)
    down, up, latents, t = UNetDown(cfg), UNetUp(cfg), torch.randn(3, 2, 4, 8, 8), torch.rand(3, 2)
    with torch.no_grad():
        patches, h_in = down(latents, t)
        other_patches, other_h_in = down(latents, 1 - t)
        pred = up(patches, h_in)
        assert patches.shape == (3, 2, cfg.n_patches, cfg.dim) and pred.shape == latents.shape
        assert (patches - other_patches).abs().amax((2, 3)).min() > 1e-3           # every image's patches know its t
        (time, skips), (other_time, _) = h_in, other_h_in
        assert (up(patches, (other_time, skips)) - pred).abs().amax((2, 3, 4)).min() > 1e-3
        assert len(skips) == int(math.log2(patch_size)) + 1
        for i in range(len(skips)):
            without = [torch.zeros_like(skip) if i == j else skip for j, skip in enumerate(skips)]
            assert (up(patches, (time, without)) - pred).abs().max() > 1e-3        # every size has its skip
        assert up(patches + 1, h_in).sub(pred).abs().max() > 1e-3
        one, _ = down(latents[:1, :1], t[:1, :1])                                  # images do not mix
        torch.testing.assert_close(one[0, 0], patches[0, 0], atol=1e-5, rtol=1e-5)

def test_patches_know_their_place():
    model = tiny(patch_position=True)
    tokens, image_id = pack([[IMAGE]], Tokenizer(WORDS), model.cfg.n_patches)
    same = torch.ones(1, 1, model.cfg.latent_channels, model.cfg.latent_size, model.cfg.latent_size)
    pred = patchify(model(tokens, image_id, same, torch.zeros(1, 1))[1][0, 0], model.cfg.patch_size)
    assert (pred[0] - pred[1]).abs().max() > 1e-3

# ---- The loss --------------------------------------------------------------------------------------------------------

def times_and_losses(monkeypatch, documents, **options):
    model, times = tiny(**options), []

    def spy(x0, eps, t, target):
        times.append(t)
        return q_sample(x0, eps, t, target)
    monkeypatch.setattr(transfusion, "q_sample", spy)
    tokens, image_id, latents, _ = batch(documents, model.cfg)
    return *model.loss(tokens, image_id, latents), times[0]

@pytest.mark.parametrize("t_power", [1.0, 2.0, 4.0])
def test_the_times_have_the_density_that_they_should(t_power):
    t = transfusion.sample_t((20000,), t_power, "cpu")
    assert t.min() >= 0 and t.max() <= 1
    for end in (0.3, 0.5, 0.8):  # the integral of t_power * t^(t_power - 1) from 0 to end
        assert abs((t < end).float().mean() - end**t_power) < 0.02

@pytest.mark.parametrize("t_power", [1.0, 2.0, 4.0])
def test_the_steps_of_drawing_lie_as_densely_as_the_times_of_training(t_power):
    model, seen = tiny(t_power=t_power), []
    def look(xt, t):
        seen.append(t)
        return None, xt
    for _ in model.draw(look, torch.zeros(1, 1), (1, 1, *model.cfg.latent_shape), 200, cfg_scale=1, sampler="ddim"):
        pass
    assert len(seen) == 200 and seen[0] == 1
    for end in (0.3, 0.5, 0.8):
        assert abs((torch.stack(seen) < end).float().mean() - end**t_power) < 0.02

@pytest.mark.parametrize("drop_text", [0.0, 1.0])  # a document that loses its text for guidance keeps its times
@pytest.mark.parametrize("t_power", [1.0, 2.0])
def test_an_image_before_its_text_is_noised_at_most_to_the_cap(monkeypatch, t_power, drop_text):
    documents = [["a red circle.", IMAGE]] * 200 + [[IMAGE, "a red circle."]] * 200 + [[IMAGE, "a", IMAGE]] * 200
    documents += [[IMAGE]] * 200
    *_, t = times_and_losses(monkeypatch, documents, t_power=t_power, noise_cap=0.5, drop_text=drop_text)
    assert t[:200, 0].max() > 0.8
    assert 0.4 < t[200:400, 0].max() <= 0.5
    assert t[400:600, 0].max() <= 0.5 and t[400:600, 1].max() > 0.8
    assert t[600:, 0].max() > 0.8  # no text looks at it
    assert len(t[:, 0].unique()) > 790  # every sequence and every image has its own

def test_dropped_text_costs_no_lm_loss_and_cannot_help_the_image(monkeypatch):
    losses = []
    for text in ("a red circle.", "a blue square above a"):
        _, loss_lm, loss_ddpm, _ = times_and_losses(monkeypatch, [[text, IMAGE]] * 4, drop_text=1.0)
        losses.append(loss_ddpm)
        assert loss_lm == 0
    torch.testing.assert_close(losses[0], losses[1])
    *_, kept_ddpm, _ = times_and_losses(monkeypatch, [["a red circle.", IMAGE]] * 4, drop_text=0.0)
    assert abs(kept_ddpm - losses[0]) > 1e-4

def test_the_joint_loss_weighs_tokens_and_images(monkeypatch):
    documents = [["a red circle.", IMAGE], ["a"]]
    loss, loss_lm, loss_ddpm, _ = times_and_losses(monkeypatch, documents, lambda_ddpm=3.0, drop_text=0.0)
    torch.testing.assert_close(loss, loss_lm + 3 * loss_ddpm)
    # A document without images neither adds to the diffusion loss nor dilutes it.
    torch.manual_seed(0)
    *_, alone, _ = times_and_losses(monkeypatch, documents[:1], lambda_ddpm=3.0, drop_text=0.0)
    assert alone > 0 and abs(loss_ddpm / alone - 1) < 0.5

SWITCHES = [*({"target": target} for target in TARGETS), {"bidirectional": False}, {"noise_cap": 1.0},
            {"qk_norm": True}, {"t_power": 1.0}, {"lambda_ddpm": 1.0}, {"drop_text": 0.0}, {"patch_position": False},
            *({"patch_size": size, "patch_encoder": kind} for size in (1, 4) for kind in ("linear", "unet")),
            {"patch_encoder": "unet"}, {"model": "chameleon"}, {"model": "chameleon", "patch_size": 4}]

@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: "-".join(map(str, switch.values())))
def test_one_batch_is_overfitted(switch):
    torch.manual_seed(0)
    cfg = Config(**TINY, unet_dim=8, **switch)
    model, _ = make_models(cfg, len(Tokenizer(WORDS)))
    tokens, image_id, latents, _ = batch([["a red circle.", IMAGE], [IMAGE, "a blue square."]] * 8, cfg)
    latents = latents[:2].repeat(8, 1, 1, 1, 1)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=4e-3), []
    for _ in range(120):
        loss, *parts = model.loss(tokens, image_id, latents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([part.item() for part in parts])
    first, last = losses[0], [sum(column) / 10 for column in zip(*losses[-10:])]
    assert last[0] < 0.1 * first[0]  # what is left is which of the two documents it is
    assert last[1] < (0.1 if cfg.model == "chameleon" else 0.7) * first[1]

# ---- Generation ------------------------------------------------------------------------------------------------------

def test_pieces_through_the_cache_equal_the_whole():
    """Rows of different lengths, an image denoised in drafts, then clean: as one pass over everything."""
    model = tiny()
    documents = [["a red circle.", IMAGE, "a red"], ["a", IMAGE, "above a"]]
    tokens, image_id, latents, _ = batch(documents, model.cfg, end=False)
    n, clean = model.cfg.n_patches, torch.zeros(2, 1)
    whole, _ = model(tokens, image_id, latents, clean)
    start = (tokens == BOI).int().argmax(1) + 1                                # where the patches begin, row by row

    cache = KVCache(model.cfg, 2, 40, model.lm_head.weight)
    logits, _ = model(tokens[:, :6], image_id[:, :6].clamp(max=-1), cache=cache)  # the short row's tail is draft
    for row in range(2):
        torch.testing.assert_close(logits[row, :start[row]], whole[row, :start[row]], atol=1e-4, rtol=1e-4)
    cache.length += start
    patches = torch.full((2, n), PAD), torch.zeros(2, n, dtype=torch.long)
    for t in (0.9, 0.4):
        noisy, noisy_t = torch.randn_like(latents), torch.full((2, 1), t)
        _, pred = model(*patches, noisy, noisy_t, cache)
        for row in range(2):
            end = start[row] + n
            _, expected = model(tokens[[row], :end], image_id[[row], :end], noisy[[row]], noisy_t[[row]])
            torch.testing.assert_close(pred[[row]], expected, atol=1e-4, rtol=1e-4)
    model(*patches, latents, clean, cache)
    cache.length += n
    rest = torch.stack([tokens[row, start[row] + n:start[row] + n + 3] for row in range(2)])
    logits, _ = model(rest, torch.full_like(rest, -1), cache=cache)
    for row in range(2):
        torch.testing.assert_close(logits[row], whole[row, start[row] + n:start[row] + n + 3], atol=1e-4, rtol=1e-4)

def generate_slowly(model, tokens, image_id, latents, max_length, steps, cfg_scale, temperature, sampler):
    """The generation loop for one row without a cache: everything is computed anew, every time."""
    cfg = model.cfg
    images = latents.clone()

    def extended(new_tokens, k):
        return (torch.cat([tokens, torch.tensor([new_tokens])], 1),
                torch.cat([image_id, torch.tensor([[k] * len(new_tokens)])], 1))
    while tokens.shape[1] < max_length and tokens[0, -1] not in (EOS, BOI) or tokens[0, -1] == BOI:
        k = images.shape[1]
        if tokens[0, -1] != BOI:
            logits, _ = model(tokens, image_id, images, torch.zeros(1, k))
            token = torch.multinomial((logits[:, -1, :model.vocab_size] / temperature).softmax(-1), 1).item()
            tokens, image_id = extended([token], -1)
            continue
        if tokens.shape[1] + cfg.n_patches >= max_length:
            break
        tokens, image_id = extended([PAD] * cfg.n_patches, k)
        null = without_text(tokens, image_id, torch.tensor([True]))
        kept = tokens.shape[1] - (tokens >= len(MARKS)).sum()
        if cfg.model == "chameleon":
            codes = torch.zeros(1, 1, cfg.n_patches, dtype=torch.long)
            for n in range(cfg.n_patches):
                x = latents_of(codes, cfg.code_levels, cfg.latent_shape)
                logits, _ = model(tokens, image_id, torch.cat([images, x], 1))
                without, _ = model(null[0][:, :kept], null[1][:, :kept], torch.cat([images, x], 1))
                logits, without = logits[:, n - cfg.n_patches - 1], without[:, n - cfg.n_patches - 1]
                guided = (without + cfg_scale * (logits - without))[:, model.vocab_size:]
                codes[0, 0, n] = torch.multinomial(guided.softmax(-1), 1).item()
            images = torch.cat([images, latents_of(codes, cfg.code_levels, cfg.latent_shape)], 1)
            tokens, image_id = extended([EOI], -1)
            continue
        x = torch.randn(1, 1, *cfg.latent_shape)
        for t, t_next in pairwise(torch.linspace(1, 0, steps + 1) ** (1 / cfg.t_power)):
            times = torch.cat([torch.zeros(1, k), t.view(1, 1)], 1)
            pred = model(tokens, image_id, torch.cat([images, x], 1), times)[1][:, -1:]
            without = model(null[0][:, :kept], null[1][:, :kept], torch.cat([images, x], 1), times)[1][:, -1:]
            x = p_sample(x, without + cfg_scale * (pred - without), t, t_next, cfg.target, sampler)
        images = torch.cat([images, x], 1)
        tokens, image_id = extended([EOI], -1)
    return tokens, image_id, images

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler, cfg_scale", [("ddim", 2.5), ("ddpm", 1.0)])
def test_generation_with_the_cache_equals_generation_without(kind, sampler, cfg_scale):
    """Same seed, same tokens, same switches, same images: from a prompt that already holds an image."""
    tokenizer, drawn = Tokenizer(WORDS), 0
    for seed in range(40):
        if drawn >= 3:
            break
        model = tiny(seed=seed, **KINDS[kind])
        model.lm_head.weight[len(MARKS):model.vocab_size] *= 0.2
        model.lm_head.weight[BOI] *= 3                                         # make it draw more often
        tokens, image_id = pack([["a red", IMAGE, "a"]], tokenizer, model.cfg.n_patches, end=False)
        latents = random_latents(model.cfg, 1, 1)
        options = {"max_length": 64, "steps": 4, "cfg_scale": cfg_scale, "temperature": 1.5, "sampler": sampler}
        torch.manual_seed(seed)
        slow = generate_slowly(model, tokens, image_id, latents, **options)
        torch.manual_seed(seed)
        fast = generate(model, tokens, image_id, latents, max_images=3, **options)
        assert fast[0].equal(slow[0]) and fast[1].equal(slow[1])
        n = slow[2].shape[1]
        size = 1 + slow[2].abs().mean().item()                                 # large where random weights blow up
        torch.testing.assert_close(fast[2][:, :n], slow[2], atol=2e-3 * size, rtol=2e-3)
        drawn += n - 1
    assert drawn >= 3, "the test has to see the switch"

def test_what_stays_in_the_cache_is_the_finished_image_seen_clean():
    """The logits of the text after a drawn image equal those of one pass over the whole, images clean at t = 0."""
    model, recorded = tiny(seed=3), []
    forward = model.forward

    def spy(tokens, *args):
        recorded.append(forward(tokens, *args))
        return recorded[-1]
    model.forward = spy
    prompt = torch.tensor([[BOS, *Tokenizer(WORDS).encode("a red"), BOI]])
    torch.manual_seed(3)
    tokens, image_id, latents = generate(model, prompt, torch.full_like(prompt, -1), torch.zeros(1, 0, 4, 8, 8),
                                         max_length=30, steps=3, cfg_scale=1, temperature=1.0)
    assert (image_id >= 0).sum() == model.cfg.n_patches and image_id[0, -1] == -1 and tokens.shape[1] > 22
    whole, _ = forward(tokens, image_id, latents, torch.zeros(1, 1))
    torch.testing.assert_close(recorded[-1][0][:, -1], whole[:, -1], atol=1e-3, rtol=1e-3)

def test_rows_of_a_batch_do_not_disturb_each_other(monkeypatch):
    """Prompts of different lengths, some that draw and some that write, give what each gives alone."""
    model = tiny(seed=1)
    prompts = [["a red circle above a blue square."], ["a"], [IMAGE], ["red", IMAGE, "blue"]]
    noise = torch.randn(1, 1, 4, 8, 8)
    monkeypatch.setattr(transfusion.torch, "randn", lambda n, *shape, device=None: noise.expand(n, *shape))
    tokens, image_id, latents, _ = batch(prompts, model.cfg, end=False)
    tokens = torch.cat([tokens, torch.full((4, 1), PAD)], 1)
    for row in (0, 3):                                                         # these two draw at once
        tokens[row, (tokens[row] != PAD).nonzero().max() + 1] = BOI
    image_id = torch.cat([image_id, torch.full((4, 1), -1)], 1)
    together = generate(model, tokens, image_id, latents, max_length=60, steps=3)
    assert ((together[1] >= 0).sum(1) >= torch.tensor([16, 0, 16, 32])).all()
    for row in range(4):
        length = (tokens[row] != PAD).nonzero().max() + 1
        k = int(image_id[row].max()) + 1
        alone = generate(model, tokens[[row], :length], image_id[[row], :length], latents[[row], :k], max_length=60,
                         steps=3)
        end = alone[0].shape[1]
        assert together[0][[row], :end].equal(alone[0]) and (together[0][row, end:] == PAD).all()
        for i in range(int(alone[1].max()) + 1):
            # the batch keeps room for a prompt image in every row; drawn images come right after a row's own
            torch.testing.assert_close(together[2][row, i], alone[2][0, i], atol=1e-3, rtol=1e-3)

def test_a_batch_of_text_alone_trains_and_generates():
    model = tiny()
    tokens, image_id, latents, _ = batch([["a red circle."], ["a"]], model.cfg)
    loss, loss_lm, loss_ddpm = model.loss(tokens, image_id, latents)
    assert loss == loss_lm > 0 and loss_ddpm == 0
    prompt, prompt_id = pack([["a red"]], Tokenizer(WORDS), model.cfg.n_patches, end=False)
    with pytest.raises(ValueError, match="3 places, and max_length is 2"):
        generate(model, prompt, prompt_id, latents[:1], max_length=2)

def test_generation_stops_at_its_limit_and_ends_with_what_it_was_given():
    model = tiny(seed=2)
    tokens, image_id = pack([["a red"]], Tokenizer(WORDS), model.cfg.n_patches, end=False)
    no_images = torch.zeros(1, 0, 4, 8, 8)
    out, out_id, _ = generate(model, tokens, image_id, no_images, max_length=20, steps=2, temperature=1.0)
    assert out.shape[1] <= 20 and out[:, :3].equal(tokens) and out[0, 0] == BOS
    assert (out_id >= 0).sum() in (0, model.cfg.n_patches)

def test_guidance_moves_away_from_the_answer_without_the_text():
    with_text, without = torch.randn(3, 5), torch.randn(3, 5)
    out = torch.cat([with_text, without])
    torch.testing.assert_close(guide(out, 3.0), 3 * with_text - 2 * without)
    assert guide(with_text, 1).equal(with_text)

# ---- Chameleon's codes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels, dim", [(5, 4), (4, 3), (2, 6)])
def test_codes_are_in_range_and_come_back(levels, dim):
    z = torch.randn(2, 3, dim, 4, 4) * 4
    latents = quantise(z, levels)
    assert (latents - (levels - 1) / 2).frac().abs().max() == 0                    # on the grid
    assert latents.abs().max() <= (levels - 1) / 2 and len(latents.unique()) == levels
    codes = codes_of(latents, levels)
    assert codes.shape == (2, 3, 16) and codes.min() >= 0 and codes.max() < levels**dim
    assert latents_of(codes, levels, (dim, 4, 4)).equal(latents)
    every = torch.arange(levels**dim).view(1, 1, -1)
    assert codes_of(latents_of(every, levels, (dim, levels**dim, 1)), levels).equal(every)

def test_the_gradient_passes_through_the_quantiser():
    z = torch.linspace(-2, 2, 50, requires_grad=True)
    grad, = torch.autograd.grad(quantise(z, 5).sum(), z)
    torch.testing.assert_close(grad, 2 * (1 - z.detach().tanh() ** 2))             # that of 2 tanh, all along the steps

def test_codes_to_picture_to_codes():
    """A trained tokenizer: its pictures are what it was trained on, and their codes are the codes they came from."""
    torch.manual_seed(0)
    cfg = Config(**{**TINY, "vae_dim": 16}, model="chameleon")
    vae = QuantisedVAE(cfg)
    pictures = torch.randint(0, 256, (16, 4, 4, 3)).repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    for _ in range(300):
        optimizer.zero_grad()
        vae.loss(pictures).backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for name, p in vae.encoder.named_parameters() if not name.endswith("bias"))
    vae.eval()
    vae.calibrate(pictures)
    latents = vae.encode(pictures)
    codes = codes_of(latents[None], cfg.code_levels)[0]
    assert latents.shape == (16, 4, 4, 4) and codes.shape == (16, 16) and len(codes.unique()) > 30
    again = vae.decode(latents_of(codes[None], cfg.code_levels, cfg.latent_shape)[0])
    assert (again.float() - pictures).abs().mean() < 0.5 * (pictures - pictures.float().mean()).abs().mean()
    assert (codes_of(vae.encode(again)[None], cfg.code_levels)[0] == codes).float().mean() > 0.5  # chance: under 1 %

def test_chameleon_trains_images_by_their_codes_alone():
    """The loss of a code is that of the next token at the place before it, BOI's for the first."""
    model = tiny(model="chameleon", drop_text=0.0, z_loss=0.0)
    tokens, image_id, latents, _ = batch([["a", IMAGE]], model.cfg)
    loss, loss_text, loss_image = model.loss(tokens, image_id, latents)
    log_p = model(tokens, image_id, latents)[0][0].log_softmax(-1)
    codes = model.vocab_size + codes_of(latents, model.cfg.code_levels)[0, 0]
    boi = tokens[0].tolist().index(BOI)
    by_hand = -torch.stack([log_p[boi + n, code] for n, code in enumerate(codes)])
    torch.testing.assert_close(loss_image, by_hand.mean())
    text = -torch.stack([log_p[i, tokens[0, i + 1]] for i in (0, 1, boi + 17)])    # BOS a | BOI codes | EOI
    torch.testing.assert_close(loss_text, text.mean())
    torch.testing.assert_close(loss, torch.cat([by_hand, text]).mean())
    with_z = tiny(model="chameleon", drop_text=0.0, z_loss=1.0).loss(tokens, image_id, latents)[0]
    assert with_z > loss + 1

# ---- VAE, presets, options -------------------------------------------------------------------------------------------

def test_make_batch_puts_every_picture_in_its_slot():
    cfg = Config(**TINY)
    vae, tokenizer = VAE(cfg).requires_grad_(False), Tokenizer(WORDS)
    pictures = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    documents = [["a", pictures[0].numpy()], ["a red"], [pictures[1].numpy(), "red", pictures[2].numpy()]]
    tokens, image_id, latents = make_batch(documents, vae, tokenizer, cfg)
    expected = vae.encode(pictures)
    assert latents.shape == (3, 2, 4, 8, 8) and (image_id.amax(1) + 1).tolist() == [1, 0, 2]
    torch.testing.assert_close(latents[[0, 2, 2], [0, 0, 1]], expected)
    assert latents[[0, 1, 1], [1, 0, 1]].abs().sum() == 0
    assert [(row == EOS).sum().item() for row in tokens] == [1, 1, 1]

def test_the_vae_learns_and_calibrates():
    torch.manual_seed(0)
    vae = VAE(Config(**TINY))
    pictures = torch.randint(0, 256, (8, 2, 2, 3)).repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    before = vae.loss(pictures).item()
    for _ in range(60):
        optimizer.zero_grad()
        vae.loss(pictures).backward()
        optimizer.step()
    assert vae.loss(pictures).item() < 0.3 * before
    vae.calibrate(pictures)
    latents = vae.encode(pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    error = (vae.decode(latents).float() - pictures.float()).abs().mean()
    assert error < 0.5 * (pictures.float() - pictures.float().mean()).abs().mean()

@pytest.mark.parametrize("name", ["0.16B", "0.37B", "0.76B", "1.4B", "7B"])
def test_the_papers_sizes_have_the_papers_parameters(name):
    with torch.device("meta"):
        model = Transfusion(PRESETS[name], vocab_size=32000)  # Llama's vocabulary
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert abs(billions / float(name[:-1]) - 1) < 0.06
    assert model.cfg.n_patches == 256 and model.cfg.target == "eps"

@pytest.mark.parametrize("options, word", [
    ({"dim": 99}, "n_heads"), ({"patch_size": 3}, "patch_size"), ({"image_size": 48}, "2, 4, 8"),
    ({"patch_size": 16}, "patch_size"), ({"patch_encoder": "conv"}, "patch_encoder"), ({"model": "gpt"}, "model"),
    ({"target": "noise"}, "target"), ({"t_power": 0.0}, "t_power"),
])
def test_a_config_that_cannot_be_says_why(options, word):
    with pytest.raises(ValueError, match=word):
        Config(**options)
