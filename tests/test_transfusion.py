"""What must stay true of transfusion.py.

Weights are made random first: zeros would let two wrong paths agree.
"""

import math
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import transfusion
from train import PRESETS, check_config, check_options, log_likelihood, make_models, parse_options
from transfusion import (
    BOI, BOS, EOI, EOS, N_SPECIAL, NO_LOSS, PAD, PATCH, SPECIAL_TOKENS, VAE, Batch, Chameleon, Config,
    QuantisedVAE, Tokenizer, Transfusion, Transformer, UNetDown, UNetUp, alpha_bar, append_token,
    attention_mask, diffusion_target, encode_pictures, generate, guide, micro_batch, next_token_logits,
    p_sample, pack, patchify, predicted_x0, q_sample, rope,
    sample_tokens, sampling_times, training_times, unconditional, unpatchify,
)

WORDS = ["a", "red", "blue", "circle", "square", "above", "."]
TOKENIZER = Tokenizer(WORDS)
IMAGE = None  # in the documents below; with_images puts a random image in its place
TINY = {"dim": 32, "n_layers": 2, "n_heads": 2, "vae_dim": 8}
# All that pack needs of a Config:
TWO_PATCHES = SimpleNamespace(n_patches=2, latent_shape=(4, 8, 8), instruction_loss=True)

KINDS = {
    "default": {},
    "causal": {"bidirectional": False},
    "unet": {"patch_encoder": "unet", "unet_dim": 8},
    "chameleon": {"model": "chameleon"},
}
DIFFUSION_KINDS = ["default", "causal", "unet"]
TARGETS = ["eps", "v", "x0"]

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def tiny(seed=0, **options):
    """A small model with random weights everywhere."""
    torch.manual_seed(seed)
    model, _ = make_models(Config(**{**TINY, **options}), TOKENIZER)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False).eval()

def random_image(cfg):
    """Latents, or Chameleon's codes."""
    if cfg.model == "chameleon":
        return torch.randint(cfg.code_levels**cfg.code_dim, (cfg.n_patches,))
    return torch.randn(cfg.latent_shape)

def with_images(documents, cfg):
    return [[random_image(cfg) if part is IMAGE else part for part in document] for document in documents]

def spy_on_forward(model):
    """A list that receives (arguments, results) of every call of model.forward."""
    calls, forward = [], model.forward

    def spy(*args, **named):
        calls.append(((*args, *named.values()), forward(*args, **named)))
        return calls[-1][1]
    model.forward = spy
    return calls

def loss_of(model, documents):
    return model.loss(model.training_batch(documents))

def drawing(rows):
    """Booleans as strings, one per row: # is true."""
    return ["".join("#" if value else "." for value in row) for row in rows]

# ---- Tokens and documents ------------------------------------------------------------------------

def test_any_string_round_trips():
    rng = random.Random(0)
    strings = ["", " ", "  ", "a", "  a  red", "a red circle above a blue square.", "reddish.a red.",
               "redred", "naïve 日本\n\t", ".", " .", "\udcff\udc80a"]
    alphabet = " .ared\n\x00é€😀"
    strings += ["".join(rng.choice(alphabet) for _ in range(rng.randrange(30))) for _ in range(300)]
    for text in strings:
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text

def test_known_words_are_one_token_and_other_text_is_bytes():
    assert len(TOKENIZER.encode("a red circle above a blue square.")) == 8
    assert len(TOKENIZER.encode("a reddish dog")) == 1 + len(" reddish dog")
    assert min(TOKENIZER.encode("a red dog.")) >= N_SPECIAL
    assert max(TOKENIZER.encode("a red dog.")) < len(TOKENIZER)

def test_special_tokens_are_skipped_when_text_is_decoded():
    a, red = TOKENIZER.encode("a red")
    assert TOKENIZER.decode([BOS, a, BOI, PATCH, EOI, red, EOS, PAD]) == "a red"

def test_text_grows_token_by_token_through_bytes_that_are_not_utf8():
    rng = random.Random(0)
    pieces = ["naïve 日本😀", "a red circle.", "a dog", "dog", " dog", "  a red  .", "reddish"]
    pieces += [bytes([0x80 | rng.randrange(128) for _ in range(8)]).decode(errors="surrogateescape")
               for _ in range(20)]
    for text in pieces:
        raw = text.encode(errors="surrogateescape")
        document = [torch.zeros(1)]
        for n, byte in enumerate(b" " + raw):
            append_token(document, N_SPECIAL + byte, TOKENIZER)
            assert document[1].encode(errors="surrogateescape") == raw[:n]
        assert document[1:] == [text]

        document, ids = [], TOKENIZER.encode(text)
        for n, token in enumerate(ids, start=1):
            append_token(document, token, TOKENIZER)  # what is packed next has the bytes of all tokens so far
            packed = TOKENIZER.encode(document[0])
            found, expected = (b"".join(TOKENIZER.bytes_of[i] for i in x) for x in (packed, ids[:n]))
            assert found == expected
        assert document == [text] and packed == ids

def test_documents_are_packed_as_the_head_of_the_module_shows():
    caption, edit = ["a red circle.", IMAGE], [IMAGE, "a blue.", IMAGE]
    documents = with_images([caption, [IMAGE, "a red circle."], edit, ["a"], []], Config())
    batch = pack(documents, TOKENIZER, TWO_PATCHES)
    tokens, image_id = batch.tokens, batch.image_id
    names = [*SPECIAL_TOKENS, *[None] * 256, *WORDS]
    rows = [" ".join(names[token] for token in row if token != PAD) for row in tokens.tolist()]
    assert rows == [
        "BOS a red circle . BOI PATCH PATCH EOI EOS",
        "BOS BOI PATCH PATCH EOI a red circle . EOS",
        "BOS BOI PATCH PATCH EOI a blue . BOI PATCH PATCH EOI EOS",
        "BOS a EOS",
        "BOS EOS",
    ]
    assert (image_id >= 0).equal(tokens == PATCH)
    images_of = [row[row >= 0].tolist() for row in image_id]
    assert images_of == [[0, 0], [1, 1], [2, 2, 3, 3], [], []]
    images = [documents[0][1], documents[1][0], documents[2][0], documents[2][2]]
    assert batch.images.equal(torch.stack(images)) and batch.t.equal(torch.zeros(4))
    assert tokens.shape == (5, 13) and tokens[3].tolist()[3:] == [PAD] * 10

    has_target = batch.targets != NO_LOSS
    rows = [" ".join(names[token] if token != NO_LOSS else "-" for token in row) for row in batch.targets.tolist()]
    assert rows == [
        "a red circle . BOI - - - EOS - - - -",
        "BOI - - - a red circle . EOS - - - -",
        "BOI - - - a blue . BOI - - - EOS -",
        "a EOS" + " -" * 11,
        "EOS" + " -" * 12,
    ]
    assert batch.targets[:, :-1][has_target[:, :-1]].equal(tokens[:, 1:][has_target[:, :-1]])

    prompt = pack(documents, TOKENIZER, TWO_PATCHES, end=False)
    for row in range(5):
        whole = tokens[row][tokens[row] != PAD]
        assert prompt.tokens[row][prompt.tokens[row] != PAD].equal(whole[:-1]) and whole[-1] == EOS
    assert prompt.image_id.equal(image_id[:, :12])

def test_images_on_several_devices_are_packed_onto_one():
    """A picture of the user's, on the CPU, and an image that was drawn on a GPU."""
    images = [torch.ones(4, 8, 8), torch.ones(4, 8, 8, device="meta")]
    batch = pack([["a", *images]], TOKENIZER, TWO_PATCHES, device="meta")
    tensors = [batch.tokens, batch.targets, batch.image_id, batch.images, batch.t, batch.image_targets]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and batch.images.shape == (2, 4, 8, 8)

def test_the_unconditional_form_is_packed_as_the_document_without_its_text():
    documents = with_images([["a red.", IMAGE, "a", IMAGE], [IMAGE, "a dog."], ["a blue."]], Config())
    batch = pack(documents, TOKENIZER, TWO_PATCHES)
    before = [len(document) for document in documents]
    without_text = pack([unconditional(d) for d in documents], TOKENIZER, TWO_PATCHES)
    assert without_text.images.equal(batch.images) and before == [len(document) for document in documents]
    tokens, image_id, found, found_id = batch.tokens, batch.image_id, without_text.tokens, without_text.image_id
    for row in range(3):
        is_special = (tokens[row] != PAD) & (tokens[row] < N_SPECIAL)
        n = is_special.sum()
        assert found[row, :n].equal(tokens[row, is_special]) and (found[row, n:] == PAD).all()
        assert found_id[row, :n].equal(image_id[row, is_special]) and (found_id[row, n:] == -1).all()

def test_the_mask_is_causal_and_open_inside_an_image():
    documents = with_images([["red.", IMAGE, "a", IMAGE]], Config())
    image_id = pack(documents, TOKENIZER, TWO_PATCHES).image_id
    assert drawing(attention_mask(image_id)[0, 0]) == [
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
    documents = with_images([["red.", IMAGE, "a", IMAGE], ["a"]], Config())
    image_id = pack(documents, TOKENIZER, TWO_PATCHES).image_id
    mask = attention_mask(image_id, bidirectional=False)
    assert mask.shape == (2, 1, 13, 13) and all(m.equal(torch.ones(13, 13).tril().bool()) for m in mask[:, 0])

def lm_loss_positions(document, instruction_loss=True):
    """# where a document has an LM loss, for all positions but the last; with padding on the right."""
    documents = with_images([document, ["a red circle above a blue square.", IMAGE, IMAGE]], Config())
    cfg = SimpleNamespace(**vars(TWO_PATCHES) | {"instruction_loss": instruction_loss})
    batch = pack(documents, TOKENIZER, cfg)
    row, = drawing(batch.targets[:1] != NO_LOSS)
    n = (batch.tokens[0] != PAD).sum() - 1
    assert set(row[n:]) == {"."}, "neither the last token nor padding has a loss"
    return row[:n]

@pytest.mark.parametrize("document, positions", [
    (["red.", IMAGE], "###...#"),  # BOS red . BOI patch patch EOI
    ([IMAGE, "red."], "#...###"),  # BOS BOI patch patch EOI red .
    (["a"], "##"),  # BOS a
    ([], "#"),  # BOS
    ([IMAGE], "#...#"),  # an unconditional document: BOS and EOI predict, nothing else does
    ([IMAGE, IMAGE], "#...#...#"),
    ([IMAGE, "red.", IMAGE], "#...###...#"),
    ([IMAGE, "red.", IMAGE, "a"], "#...###...##"),
    (["a", IMAGE, "red.", IMAGE], "##...###...#"),
])
def test_where_there_is_an_lm_loss(document, positions):
    assert lm_loss_positions(document) == positions

@pytest.mark.parametrize("document, positions", [
    ([IMAGE, "red.", IMAGE], "#.....#...#"),  # "." still predicts BOI
    ([IMAGE, "red.", IMAGE, "a"], "#.....#...##"),  # EOI still predicts text after the last image
    (["a", IMAGE, "red.", IMAGE], "##.....#...#"),
    ([IMAGE, IMAGE], "#...#...#"),
    (["red.", IMAGE], "###...#"),
    ([IMAGE, "red."], "#...###"),
    (["red."], "###"),
])
def test_without_instruction_loss_an_instruction_is_never_a_target(document, positions):
    assert lm_loss_positions(document, False) == positions

# ---- Schedule and samplers -----------------------------------------------------------------------
# Except for the first one, these hold for every sensible schedule.

def test_the_schedule_is_the_cosine_one():
    t = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(alpha_bar(t)[:, 0, 0, 0].sqrt(), torch.cos(t * math.pi / 2), atol=1e-5, rtol=0)

def test_the_signal_decreases_from_all_to_nothing():
    signal = alpha_bar(torch.linspace(0, 1, 51))
    assert signal.shape == (51, 1, 1, 1)
    assert signal[0] > 0.99 and signal[-1] < 0.01 and (signal.flatten().diff() < 0).all()
    assert (signal > 0).all() and (signal < 1).all()  # so that nothing divides by zero

def test_noising_goes_from_the_image_to_the_noise_and_every_image_has_its_own_time():
    x0, eps, t = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), -1.0), torch.tensor([0.0, 0.5, 1.0])
    xt = q_sample(x0, eps, t)
    assert (xt[0] - 2).abs().max() < 0.05 and (xt[2] + 1).abs().max() < 0.05
    signal = alpha_bar(t)[1].item()
    torch.testing.assert_close(xt[1], torch.full((1, 2, 2), 2 * math.sqrt(signal) - math.sqrt(1 - signal)))

def test_noising_keeps_the_variance():
    torch.manual_seed(0)
    xt = q_sample(torch.randn(9, 4, 50, 50), torch.randn(9, 4, 50, 50), torch.linspace(0, 1, 9))
    assert (xt.std((1, 2, 3)) - 1).abs().max() < 0.05

@pytest.mark.parametrize("target", TARGETS)
def test_a_right_prediction_gives_back_the_image(target):
    x0, eps, t = torch.randn(50, 1, 8, 8), torch.randn(50, 1, 8, 8), torch.rand(50) * 0.8 + 0.1
    xt = q_sample(x0, eps, t)
    found = predicted_x0(xt=xt, pred=diffusion_target(x0, eps, t, target), t=t, target=target)
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=1e-4)

def test_the_targets_are_what_their_names_say():
    x0, eps, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    signal = alpha_bar(t)
    assert diffusion_target(x0, eps, t, "eps").equal(eps) and diffusion_target(x0, eps, t, "x0").equal(x0)
    v = signal.sqrt() * eps - (1 - signal).sqrt() * x0  # Salimans and Ho, arXiv 2202.00512
    torch.testing.assert_close(diffusion_target(x0, eps, t, "v"), v)

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("target", TARGETS)
def test_the_sampler_reproduces_a_gaussian(target, eta):
    """With the best possible prediction for x0 ~ N(0.3, 0.5^2), samples must be N(0.3, 0.5^2)."""
    torch.manual_seed(0)
    x, mean, var = torch.randn(2000, 1, 4, 4), 0.3, 0.25
    for t, t_next in pairwise(torch.linspace(1, 0, 301)[:, None]):
        signal = alpha_bar(t)
        x0 = mean + signal.sqrt() * var / (signal * var + 1 - signal) * (x - signal.sqrt() * mean)  # E[x0|xt]
        eps = (x - signal.sqrt() * x0) / (1 - signal).sqrt()
        x = p_sample(x, diffusion_target(x0, eps, t, target), t, t_next, target, eta)
    assert abs(x.mean() - mean) < 0.02
    assert abs(x.std() - 0.5) < 0.02

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_one_step_has_the_mean_and_the_variance_that_it_should(eta):
    """eta = 1 is DDPM's posterior q(x_next | x_t, x0). The test above passes with any variance."""
    torch.manual_seed(0)
    x, x0, t, t_next = torch.full((40_000, 1, 1, 1), 0.4), 0.7, torch.tensor([0.6]), torch.tensor([0.45])
    drawn = p_sample(x, torch.full_like(x, x0), t, t_next, "x0", eta)
    signal, signal_next = alpha_bar(t).item(), alpha_bar(t_next).item()
    alpha = signal / signal_next
    posterior_var = (1 - alpha) * (1 - signal_next) / (1 - signal)
    posterior_mean = (math.sqrt(signal_next) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - signal_next) * 0.4)
    if eta == 1:  # equation 7 of DDPM
        assert drawn.mean().item() == pytest.approx(posterior_mean / (1 - signal), abs=0.01)
    fresh_var = eta**2 * posterior_var
    eps = (0.4 - math.sqrt(signal) * x0) / math.sqrt(1 - signal)
    mean = math.sqrt(signal_next) * x0 + math.sqrt(1 - signal_next - fresh_var) * eps  # equation 12 of DDIM
    assert drawn.mean().item() == pytest.approx(mean, abs=0.01)
    assert drawn.var().item() == pytest.approx(fresh_var, rel=0.05, abs=1e-9)

@pytest.mark.parametrize("target, pred", [("x0", 100.0), ("x0", -100.0), ("eps", 100.0), ("v", 100.0)])
def test_after_the_image_is_clamped_the_noise_is_the_one_that_goes_with_it(target, pred):
    xt, t, t_next = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), torch.full((4,), 0.4)
    x0 = 5.0 if target == "x0" and pred > 0 else -5.0  # a large eps or v means a small x0
    signal, signal_next = alpha_bar(t), alpha_bar(t_next)
    eps = (xt - signal.sqrt() * x0) / (1 - signal).sqrt()
    found = p_sample(xt, torch.full_like(xt, pred), t, t_next, target, eta=0.0)
    torch.testing.assert_close(found, signal_next.sqrt() * x0 + (1 - signal_next).sqrt() * eps)

@pytest.mark.parametrize("target", TARGETS)
def test_one_step_to_the_end_gives_the_predicted_image_even_from_pure_noise(target):
    x0, eps, t, t_next = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4), torch.zeros(4)
    xt = q_sample(x0, eps, t)
    for eta in (0.0, 1.0):
        found = p_sample(xt, diffusion_target(x0, eps, t, target), t, t_next, target, eta)
        assert (found - x0).abs().max() < 0.1

@pytest.mark.parametrize("t_power", [1.0, 2.0, 4.0])
def test_the_times_of_training_have_the_density_that_they_should(t_power):
    torch.manual_seed(0)
    t = training_times(20_000, t_power, "cpu")
    assert t.shape == (20_000,) and t.min() >= 0 and t.max() <= 1
    for end in (0.3, 0.5, 0.8):  # the integral of t_power * t^(t_power - 1) from 0 to end
        assert abs((t < end).float().mean() - end**t_power) < 0.02

@pytest.mark.parametrize("t_power", [1.0, 2.0, 4.0])
def test_the_times_of_sampling_are_as_dense_as_those_of_training(t_power):
    times = sampling_times(200, t_power)
    assert len(times) == 201 and times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    for end in (0.3, 0.5, 0.8):
        assert abs((times < end).float().mean() - end**t_power) < 0.02

def test_guidance_moves_away_from_the_unconditional_prediction():
    with_text, without = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(guide(with_text, without, 3.0), 3 * with_text - 2 * without)
    torch.testing.assert_close(guide(with_text, without, 1.0), with_text)
    torch.testing.assert_close(guide(with_text, without, 0.0), without)

# ---- The transformer -----------------------------------------------------------------------------

def as_complex(x, base=10000.0):
    """RoPE on its own: features i and i + d / 2 of x (T, d) are one number, turned by p * base^(-2i / d)."""
    first, second = x.double().chunk(2, dim=-1)
    angle = torch.tensor([[p * base ** (-2 * i / x.shape[1]) for i in range(x.shape[1] // 2)]
                          for p in range(len(x))], dtype=torch.float64)
    return torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)

def test_positions_turn_features_by_the_angles_of_rope():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 60, 8)  # (B, heads, T, head_dim)
    found = rope(x).double()
    for b, head in [(0, 0), (1, 2)]:
        expected = as_complex(x[b, head])
        assert (found[b, head, :, :4] - expected.real).abs().max() < 1e-4
        assert (found[b, head, :, 4:] - expected.imag).abs().max() < 1e-4

def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * weight.double()

def llama(transformer, x, mask, n_heads, qk_norm):
    """An independent forward pass: x (T, D), mask (T, T), one head after the other, in double precision."""
    x, weight = x.double(), {name: p.double() for name, p in transformer.named_parameters()}
    for i in range(len(transformer.blocks)):
        w = {name.removeprefix(f"blocks.{i}."): p for name, p in weight.items()}
        h, heads = rms_norm(x, w["attention_norm.weight"]), []
        matrices = [w[f"attention.{name}.weight"] for name in ("wq", "wk", "wv")]
        for q, k, v in zip(*((h @ matrix.T).chunk(n_heads, dim=1) for matrix in matrices)):
            if qk_norm:
                q, k = rms_norm(q, w["attention.q_norm.weight"]), rms_norm(k, w["attention.k_norm.weight"])
            scores = (as_complex(q) @ as_complex(k).conj().T).real / math.sqrt(q.shape[1])
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, dim=1) @ w["attention.wo.weight"].T
        h = rms_norm(x, w["ffn_norm.weight"])
        x = x + (F.silu(h @ w["ffn.w1.weight"].T) * (h @ w["ffn.w3.weight"].T)) @ w["ffn.w2.weight"].T
    return rms_norm(x, weight["norm.weight"])

@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_transformer_is_llama(qk_norm):
    torch.manual_seed(0)
    cfg = Config(**TINY, qk_norm=qk_norm)
    transformer, x = Transformer(cfg).requires_grad_(False), torch.randn(2, 40, 32)
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    mask = (torch.rand(2, 40, 40) > 0.5) | torch.eye(40).bool()
    found = transformer(x, mask[:, None])
    for row in range(2):
        expected = llama(transformer, x[row], mask[row], cfg.n_heads, qk_norm)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-4, rtol=1e-4)

# ---- What depends on what ------------------------------------------------------------------------

DOCUMENTS = {
    "caption first": ["a red.", IMAGE],
    "image first": [IMAGE, "a red."],
    "edit": [IMAGE, "red.", IMAGE],
    "images in between": ["a", IMAGE, "red.", IMAGE, "blue"],
    "unconditional edit": [IMAGE, IMAGE],
    "text": ["a red circle."],
}

@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_has_a_loss_depends_on_its_own_target(kind, document):
    """By gradient, with respect to all that goes in: embedded tokens, latents and times.

    A logit that has a loss must depend on no later token or image, and the prediction of an image on nothing
    after it.
    """
    model = tiny(**KINDS[kind])
    entered = []

    def keep_output(module, args, output):
        entered.append(output.requires_grad_())
        return output.clone()
    model.token_embedding.register_forward_hook(keep_output)
    batch = model.pack(with_images([DOCUMENTS[document]], model.cfg))

    def gradients(output):
        return torch.autograd.grad(output.square().sum(), inputs, retain_graph=True, materialize_grads=True)
    if kind == "chameleon":
        logits, inputs = model(batch), entered
        counts = torch.ones_like(batch.tokens[:, :-1])  # even EOI, which follows the last code, must not be seen
    else:
        batch.t = torch.rand(len(batch.images)).requires_grad_()
        batch.images.requires_grad_()
        logits, pred = model(batch)
        inputs = [*entered, batch.images, batch.t]
        counts = batch.targets != NO_LOSS

    begins = (batch.tokens[0] == BOI).nonzero()[:, 0]  # of each image
    n_checked = 0
    for q in counts[0].nonzero()[:, 0].tolist():
        by_token, *by_image = gradients(logits[0, q])
        assert by_token[0, q].abs().sum() > 0 and by_token[0, q + 1:].abs().sum() == 0, q
        for grad in by_image:
            assert grad[begins < q].abs().sum() > 0 or not (begins < q).any()
            assert grad[begins > q].abs().sum() == 0, q
        n_checked += 1
    assert n_checked > 0

    if kind != "chameleon":
        for m, begin in enumerate(begins.tolist()):
            by_token, by_latents, by_t = gradients(pred[m])
            assert (by_token[0, [0, begin]].abs().sum(1) > 0).all()
            assert by_token[0, begin + 1:].abs().sum() == 0
            for grad in (by_latents, by_t):
                assert all(grad[i].abs().sum() > 0 for i in range(m + 1)) and grad[m + 1:].abs().sum() == 0

@pytest.mark.parametrize("kind", KINDS)
def test_every_position_depends_on_exactly_what_the_mask_lets_it_see(kind):
    """By gradient, through all layers: a position depends on all before it, and a patch on its whole image.

    Chameleon, and images with causal attention, depend on nothing that comes later.
    """
    model = tiny(**KINDS[kind])
    entered = []

    def keep_input(module, args):
        entered.append(args[0].detach().requires_grad_())
        return entered[0], *args[1:]
    model.transformer.blocks[0].register_forward_pre_hook(keep_input)
    documents = with_images([["a red", IMAGE, "above", IMAGE]], model.cfg)
    logits, batch = model.logits(documents)
    n = batch.tokens.shape[1]
    mask = attention_mask(batch.image_id, bidirectional=kind in ("default", "unet"))[0, 0]
    assert mask.shape == (n, n)
    for q in range(n):
        grad, = torch.autograd.grad(logits[0, q].square().sum(), entered[0], retain_graph=True)
        assert (grad[0].abs().amax(1) > 0).equal(mask[q]), q

@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_rest_of_the_batch_change_nothing(kind):
    model = tiny(**KINDS[kind])
    documents = with_images([["a", IMAGE], ["a red circle above a blue square.", IMAGE, "a", IMAGE], ["red"],
                             [IMAGE, "a red."]], model.cfg)
    batch = model.pack(documents)
    if kind == "chameleon":
        logits = model(batch)
        for row, document in enumerate(documents):
            alone = model(model.pack([document]))[0]
            torch.testing.assert_close(logits[row, :len(alone)], alone, atol=1e-4, rtol=1e-4)
        return
    batch.t = torch.rand(4)
    logits, pred = model(batch)
    n_before = 0  # images in the documents before this one
    for row, document in enumerate(documents):
        mine = slice(n_before, n_before + len(unconditional(document)))
        batch_alone = model.pack([document])
        batch_alone.t = batch.t[mine]
        alone, alone_pred = model(batch_alone)
        torch.testing.assert_close(logits[row, :alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(pred[mine], alone_pred, atol=1e-4, rtol=1e-4)
        n_before = mine.stop
    assert n_before == 4

def test_patches_are_squares_in_raster_order():
    latents = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    patches = patchify(latents, 2)
    assert patches.shape == (2, 4, 12)
    for n, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        square = latents[:, :, row:row + 2, column:column + 2]
        assert patches[:, n].sort().values.equal(square.flatten(1).sort().values)
        other = torch.zeros_like(patches)
        other[:, n] = patches[:, n]
        back = unpatchify(other, 2, grid=2)  # and it goes back to where it was
        assert back[:, :, row:row + 2, column:column + 2].equal(square) and back.sum() == square.sum()
    assert unpatchify(patches, 2, grid=2).equal(latents)

@pytest.mark.parametrize("kind", DIFFUSION_KINDS)
def test_a_patch_is_decoded_where_it_was_encoded(kind):
    """Without mixing in between, the prediction at a corner depends on the latents at that corner only."""
    model = tiny(**{**KINDS[kind], "n_layers": 1})
    model.transformer.forward = lambda x, mask: x
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    batch = model.pack([[latents.detach()[0]]])
    batch.images, batch.t = latents, torch.tensor([0.3])
    _, pred = model(batch)
    pred[0, :, :2, -2:].square().sum().backward()
    is_moved = latents.grad[0].abs().sum(0) > 0
    assert is_moved[:2, -2:].all()
    if kind != "unet":  # whose convolutions mix neighbours
        assert is_moved.sum() == 4

def test_the_linear_encoder_adds_the_embedding_of_t_to_every_patch():
    encoder, latents, t = tiny().patch_encoder, torch.randn(3, 4, 8, 8), torch.rand(3)
    patches, _ = encoder(latents, t)
    expected = patchify(latents, 2) + encoder.time(t)[:, None]
    torch.testing.assert_close(patches, expected @ encoder.linear.weight.T + encoder.linear.bias)
    times = encoder.time(torch.linspace(0, 1, 200))
    distances = (times[:, None] - times).norm(dim=-1) + 1e6 * torch.eye(200)
    assert distances.min() > 1e-3  # it tells all times apart

@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_the_unet_makes_patches_of_every_size_and_depends_on_t_and_the_skips(patch_size):
    cfg = Config(**TINY, patch_size=patch_size, patch_encoder="unet", unet_dim=8)
    torch.manual_seed(0)
    down, up, latents, t = UNetDown(cfg), UNetUp(cfg), torch.randn(6, 4, 8, 8), torch.rand(6)
    with torch.no_grad():
        patches, skip = down(latents, t)
        other_patches, other_skip = down(latents, 1 - t)
        pred = up(patches, skip)
        assert patches.shape == (6, cfg.n_patches, cfg.dim) and pred.shape == latents.shape
        assert (patches - other_patches).abs().amax((1, 2)).min() > 1e-3  # patches know their t
        (time, skips), (other_time, _) = skip, other_skip
        assert (up(patches, (other_time, skips)) - pred).abs().amax((1, 2, 3)).min() > 1e-3
        assert len(skips) == int(math.log2(patch_size)) + 1
        for i in range(len(skips)):
            without = [torch.zeros_like(x) if i == j else x for j, x in enumerate(skips)]
            assert (up(patches, (time, without)) - pred).abs().max() > 1e-3  # every resolution has its skip
        assert up(patches + 1, skip).sub(pred).abs().max() > 1e-3
        one, _ = down(latents[:1], t[:1])  # images do not mix
        torch.testing.assert_close(one[0], patches[0], atol=1e-5, rtol=1e-5)

def test_patches_know_their_position_in_the_image():
    predictions = {}
    for patch_position in (True, False):
        model = tiny(patch_position=patch_position)
        for block in model.transformer.blocks:  # without attention RoPE cannot tell either
            block.attention.wo.weight.zero_()
        _, pred = model(model.pack([[torch.ones(4, 8, 8)]]))
        pred = patchify(pred, model.cfg.patch_size)
        predictions[patch_position] = (pred[0, 1:] - pred[0, 0]).abs().amax(1)
    assert predictions[True].min() > 1e-3 and predictions[False].max() < 1e-5

# ---- The loss ------------------------------------------------------------------------------------

def times_of(documents, **options):
    """The times to which the images of these documents are noised in training, in reading order."""
    model = tiny(**options)
    calls = spy_on_forward(model)
    loss_of(model, with_images(documents, model.cfg))
    [((batch,), _)] = calls
    return batch.t

@pytest.mark.parametrize("t_power", [1.0, 2.0])
def test_an_image_that_opens_its_document_and_is_followed_by_something_is_noised_up_to_the_cap(t_power):
    small = {"patch_size": 8, "t_power": t_power, "noise_cap": 0.4}

    def density_is_right(t, cap, power):
        assert t.max() <= cap and len(t.unique()) > 595  # each has its own, none piles up at the cap
        for end in (0.3, 0.5, 0.9):
            assert abs((t < end * cap).float().mean() - end**power) < 0.06
    for opening in ([IMAGE, "a red."], [IMAGE, "a", IMAGE], [IMAGE, IMAGE]):
        t = times_of([opening] * 600, **small).view(600, -1)
        density_is_right(t[:, 0], cap=0.4, power=1)  # uniform up to the cap
        if t.shape[1] == 2:
            density_is_right(t[:, 1], cap=1.0, power=t_power)
            assert abs(t.T.corrcoef()[0, 1]) < 0.15
    for free in ([IMAGE], ["a", IMAGE], ["a red.", IMAGE, "blue"]):
        density_is_right(times_of([free] * 600, **small), cap=1.0, power=t_power)

def test_a_batch_of_all_kinds_has_the_cap_at_the_right_images():
    documents = [["a red circle.", IMAGE], [IMAGE, "a red circle."], [IMAGE, "a", IMAGE], [IMAGE], ["a"]]
    t = times_of(documents * 100, patch_size=8, noise_cap=0.2).view(100, 5)
    is_capped = torch.tensor([False, True, True, False, False])
    assert (t[:, is_capped] <= 0.2).all() and (t[:, ~is_capped].amax(0) > 0.8).all() and len(t.unique()) > 495

def test_a_cap_of_one_is_no_cap_and_a_cap_of_zero_keeps_images_clean():
    documents = [[IMAGE, "a"], ["a", IMAGE]] * 200
    free, clean = (times_of(documents, patch_size=8, noise_cap=cap).view(200, 2) for cap in (1.0, 0.0))
    assert free.amax(0).min() > 0.9
    assert clean[:, 0].max() == 0 and clean[:, 1].max() > 0.9

def loss_by_hand(model, documents, call):
    """(LM loss, diffusion loss, implied noise), from what one call of forward received and gave."""
    (batch,), (logits, pred) = call
    tokens, xt, t = batch.tokens, batch.images, batch.t
    log_p, losses = logits.log_softmax(-1), []
    for row, document in enumerate(documents):
        ids = [BOS]
        for part in document:
            is_text = isinstance(part, str)
            ids += TOKENIZER.encode(part) if is_text else [BOI, *[PATCH] * model.cfg.n_patches, EOI]
        ids.append(EOS)
        assert tokens[row].tolist() == ids + [PAD] * (tokens.shape[1] - len(ids))
        losses += [-log_p[row, q, ids[q + 1]] for q in range(len(ids) - 1) if ids[q] not in (BOI, PATCH)]
    signal = alpha_bar(t)
    x0 = torch.stack([part for document in documents for part in unconditional(document)])
    eps = (xt - signal.sqrt() * x0) / (1 - signal).sqrt()
    wanted = {"eps": eps, "x0": x0, "v": signal.sqrt() * eps - (1 - signal).sqrt() * x0}[model.cfg.target]
    errors = [(pred[m] - wanted[m]).square().mean() for m in range(len(x0)) if t[m] > 0]
    return torch.stack(losses).mean(), torch.stack(errors).mean(), eps

@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", DIFFUSION_KINDS)
@pytest.mark.parametrize("noise_cap", [0.5, 0.0])
def test_the_joint_loss_equals_one_computed_by_hand(kind, target, noise_cap):
    """LM: the mean over all positions of the batch with a loss. Diffusion: the mean over noised images."""
    model = tiny(**KINDS[kind], target=target, lambda_ddpm=3.0, noise_cap=noise_cap)
    documents = with_images([["a red circle above a blue square.", IMAGE], [IMAGE, "a", IMAGE], ["a"],
                             [IMAGE], [IMAGE, "a dog."]], model.cfg)
    calls = spy_on_forward(model)
    loss, loss_lm, loss_ddpm = loss_of(model, documents)
    assert len(calls) == 1
    expected_lm, expected_ddpm, eps = loss_by_hand(model, documents, calls[0])
    torch.testing.assert_close(loss_lm, expected_lm, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss_ddpm, expected_ddpm, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(loss, loss_lm + 3 * loss_ddpm)
    if noise_cap:  # the latents themselves are noised, with fresh N(0, 1) for each image
        assert (eps.std((1, 2, 3)) - 1).abs().max() < 0.2 and eps.mean().abs() < 0.1
        assert eps.flatten(1).corrcoef().sub(torch.eye(5)).abs().max() < 0.3

@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_and_gradients_of_all_parts_add_up_to_those_of_the_batch(kind):
    """Parts of different lengths, one of them without an image and one that has nothing else."""
    model = tiny(**KINDS[kind]).requires_grad_(True)
    documents = with_images([["a red circle above a blue square.", IMAGE], [IMAGE], ["a"], [IMAGE, "a", IMAGE],
                             [IMAGE, "a dog."]], model.cfg)

    def losses_and_gradient(part, n_parts):
        torch.manual_seed(3)
        model.zero_grad()
        losses = torch.stack(model.loss(micro_batch(model.training_batch(documents), part, n_parts)))
        losses[0].backward()
        gradient = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()]
        return losses.detach(), torch.cat(gradient)

    whole = losses_and_gradient(0, 1)
    for n_parts in (2, 3, 5):
        parts = [losses_and_gradient(part, n_parts) for part in range(n_parts)]
        torch.testing.assert_close(sum(losses for losses, _ in parts), whole[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sum(gradient for _, gradient in parts), whole[1], atol=1e-4, rtol=1e-3)

@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_the_loss_is_nearly_the_same_and_trains(kind):
    model = tiny(**KINDS[kind]).requires_grad_(True)
    documents = with_images([["a red circle.", IMAGE], [IMAGE, "a"]], model.cfg)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, *_ = loss_of(model, documents)
        losses.append(loss.item())
    loss.backward()
    assert losses[1] == pytest.approx(losses[0], rel=0.1) and losses[0] != losses[1]
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

def test_noise_and_times_are_drawn_anew_for_each_batch():
    model = tiny()
    documents = with_images([["a", IMAGE]], model.cfg)
    calls = spy_on_forward(model)
    loss_of(model, documents), loss_of(model, documents)
    ((first,), _), ((second,), _) = calls
    assert first.t != second.t and not first.images.equal(second.images)

def test_clean_images_alone_have_no_diffusion_loss():
    model = tiny(noise_cap=0.0)
    loss, loss_lm, loss_ddpm = loss_of(model, with_images([[IMAGE, "a"]], model.cfg))
    assert loss == loss_lm > 0 and loss_ddpm == 0

def test_without_instruction_loss_the_instruction_costs_nothing():
    documents = with_images([[IMAGE, "red.", IMAGE]], Config())
    model = tiny(instruction_loss=False)
    calls = spy_on_forward(model)
    _, loss_lm, _ = loss_of(model, documents)
    (batch,), (logits, _) = calls[0]
    log_p, n = logits[0].log_softmax(-1), model.cfg.n_patches
    full_stop = n + 4  # after BOS BOI patches EOI red
    assert batch.tokens[0, full_stop:full_stop + 2].tolist() == [TOKENIZER.encode("red.")[1], BOI]
    end = 2 * n + 6
    by_hand = -(log_p[0, BOI] + log_p[full_stop, BOI] + log_p[end, EOS]) / 3
    torch.testing.assert_close(loss_lm, by_hand)

@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_text_alone_trains_and_generates(kind):
    model = tiny(**KINDS[kind]).requires_grad_(True)
    loss, loss_text, loss_image = loss_of(model, [["a red circle."], ["a"]])
    loss.backward()
    assert loss.item() == pytest.approx(loss_text.item(), rel=1e-2) and loss_text > 0 and loss_image == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads) and sum(grad.abs().sum() for grad in grads) > 0
    documents = generate(model, [["a red"]], max_tokens=2, steps=1)
    assert documents[0][0].startswith("a red")

SWITCHES = [
    *({"target": target} for target in TARGETS), {"bidirectional": False}, {"noise_cap": 1.0},
    {"qk_norm": False}, {"t_power": 1.0}, {"lambda_ddpm": 1.0}, {"patch_position": False},
    {"patch_encoder": "unet"},
    *({"patch_size": size, "patch_encoder": kind} for size in (1, 4) for kind in ("linear", "unet")),
    {"model": "chameleon"}, {"model": "chameleon", "patch_size": 4},
]

@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: "-".join(map(str, switch.values())))
def test_one_batch_is_overfitted(switch):
    torch.manual_seed(0)
    cfg = Config(**TINY, unet_dim=8, **switch)
    model, _ = make_models(cfg, TOKENIZER)
    documents = with_images([["a red circle.", IMAGE], [IMAGE, "a blue square."]], cfg) * 4
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=6e-3), []
    for _ in range(70):
        loss, *parts = loss_of(model, documents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([part.item() for part in parts])
    first, last = losses[0], [sum(column) / 10 for column in zip(*losses[-10:])]
    assert last[0] < 0.1 * first[0]  # what is left is which of the two documents it is
    assert last[1] < (0.1 if cfg.model == "chameleon" else 0.5) * first[1]

# ---- Generation ----------------------------------------------------------------------------------

def test_temperature_zero_is_greedy_and_others_sample():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
    assert sample_tokens(logits, 0).tolist() == [2, 0]
    for temperature in (0.5, 2.0):
        drawn = sample_tokens(logits[:1].expand(20_000, 3), temperature)
        share = drawn.bincount(minlength=3) / 20_000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(-1), atol=0.015, rtol=0)

def next_tokens(model, documents, temperature):
    return sample_tokens(next_token_logits(model, documents), temperature).tolist()

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_the_next_token_is_text_or_the_begin_of_an_image_or_the_end_and_nothing_else(kind):
    model = tiny(**KINDS[kind])
    allowed = {BOI, EOS, *range(N_SPECIAL, len(TOKENIZER))}
    drawn = next_tokens(model, [["a red"], []] * 3000, temperature=1e4)
    assert set(drawn) <= allowed and {BOI, EOS} <= set(drawn) and len(set(drawn)) > 200
    documents = with_images([["a"], [IMAGE], []], model.cfg)
    logits_of = model.logits
    for forbidden in [PAD, BOS, EOI, PATCH, *range(len(TOKENIZER), model.lm_head.out_features, 100)]:
        def certain(*args, forbidden=forbidden, **named):
            logits, batch = logits_of(*args, **named)
            logits[..., forbidden] += 1e6
            return logits, batch
        model.logits = certain
        assert set(next_tokens(model, documents, temperature=0)) <= allowed
        assert set(next_tokens(model, documents, temperature=1.0)) <= allowed

def test_the_next_token_follows_the_last_one_of_each_document():
    model = tiny()
    documents = with_images([["a red circle."], ["a"], [IMAGE], ["a", IMAGE, "red"]], model.cfg)
    expected = []
    for document in documents:
        logits, _ = model.logits([document], end=False)
        allowed = logits[0, -1, [EOS, BOI, *range(N_SPECIAL, len(TOKENIZER))]]
        expected.append([EOS, BOI, *range(N_SPECIAL, len(TOKENIZER))][allowed.argmax()])
    assert next_tokens(model, documents, temperature=0) == expected

def forward_by_hand(model, document, t=0.0, is_drawing=False):
    """The logits at the last position of one document, and the prediction for its last image, at time t.

    Images before it are clean, at t = 0. While an image is being drawn, EOI is missing.
    """
    is_chameleon, tokens, image_id, images = isinstance(model, Chameleon), [BOS], [-1], []
    for part in document:
        if isinstance(part, str):
            tokens += TOKENIZER.encode(part)
        else:
            patches = (len(TOKENIZER) + part).tolist() if is_chameleon else [PATCH] * model.cfg.n_patches
            tokens += [BOI, *patches, EOI]
            image_id += [-1, *[len(images)] * len(patches), -1]
            images.append(part)
        image_id += [-1] * (len(tokens) - len(image_id))
    end = len(tokens) - is_drawing
    tokens, image_id = torch.tensor([tokens[:end]]), torch.tensor([image_id[:end]])
    if is_chameleon:
        return model(Batch(tokens, None, image_id, None, None, None))[0, -1], None
    latents, times = torch.zeros(0, *model.cfg.latent_shape), torch.zeros(len(images))
    if images:
        latents, times[-1] = torch.stack(images), t
    logits, pred = model(Batch(tokens, None, image_id, latents, times, None))
    return logits[0, -1], pred[-1:]

def guided_by_hand(model, document, t, guidance_scale):
    conditional = forward_by_hand(model, document, t, is_drawing=True)
    if guidance_scale == 1:
        return conditional
    without_text = forward_by_hand(model, [p for p in document if not isinstance(p, str)], t, is_drawing=True)
    return [None if a is None else (1 - guidance_scale) * b + guidance_scale * a
            for a, b in zip(conditional, without_text)]

def generate_by_hand(model, document, max_tokens, max_images, steps, guidance_scale, eta, temperature):
    """The generation of one document, straight from the paper."""
    cfg, document, n_images = model.cfg, list(document), 0
    while True:
        for _ in range(max_tokens):
            logits, _ = forward_by_hand(model, document)
            logits = logits[:len(TOKENIZER)].clone()
            for special in (PAD, BOS, EOI, PATCH):
                logits[special] = -math.inf
            token = logits.argmax()
            if temperature > 0:
                token = torch.multinomial((logits / temperature).softmax(0), 1)
            if token in (BOI, EOS):
                break
            ids = TOKENIZER.encode(document.pop()) if document and isinstance(document[-1], str) else []
            document.append(TOKENIZER.decode([*ids, int(token)]))
        if token != BOI or n_images == max_images:
            return document
        n_images += 1
        if cfg.model == "chameleon":
            document.append(torch.zeros(0, dtype=torch.long))
            for _ in range(cfg.n_patches):
                logits, _ = guided_by_hand(model, document, 0.0, guidance_scale)
                code = torch.multinomial(logits[len(TOKENIZER):].softmax(0), 1)
                document[-1] = torch.cat([document[-1], code])
            continue
        x = torch.randn(1, *cfg.latent_shape)
        document.append(x[0])
        times = [(1 - i / steps) ** (1 / cfg.t_power) for i in range(steps + 1)]
        for t, t_next in pairwise(times):
            _, pred = guided_by_hand(model, document, t, guidance_scale)
            x = p_sample(x, pred, torch.tensor([t]), torch.tensor([t_next]), cfg.target, eta)
            document[-1] = x[0]

def eager_to_draw(seed, kind, weight=3.0):
    """A random model that writes BOI more often than random ones do."""
    model = tiny(seed=seed, **KINDS[kind])
    model.lm_head.weight[N_SPECIAL:len(TOKENIZER)] *= 0.3
    model.lm_head.weight[BOI] *= weight
    return model

def assert_same_document(found, expected, atol=0.0):
    assert [part if isinstance(part, str) else IMAGE for part in found] == [
        part if isinstance(part, str) else IMAGE for part in expected]
    for a, b in zip(unconditional(found), unconditional(expected)):
        if a.dtype == torch.long:
            assert a.equal(b)
        else:
            torch.testing.assert_close(a, b, atol=max(atol, 2e-3), rtol=2e-3)

@pytest.mark.parametrize("guidance_scale, eta, temperature", [
    (1.0, 0.0, 1.5), (1.0, 1.0, 0.0), (2.5, 0.0, 0.0), (2.5, 1.0, 1.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_generation_by_hand(kind, guidance_scale, eta, temperature):
    """Same seed, same text, same switches, same images: from a prompt that already holds an image."""
    n_drawn, n_switches_back = 0, 0
    for seed in range(40):
        model = eager_to_draw(seed, kind, weight=10.0 if temperature else 3.0)
        prompt, = with_images([["a red", IMAGE, "a"]], model.cfg)
        options = {"max_tokens": 4, "max_images": 2, "steps": 3, "guidance_scale": guidance_scale, "eta": eta,
                   "temperature": temperature}
        torch.manual_seed(seed)
        expected = generate_by_hand(model, prompt, **options)
        torch.manual_seed(seed)
        found, = generate(model, [prompt], **options)
        assert_same_document(found, expected)
        n_drawn += len(unconditional(found)) - 1
        n_switches_back += len(unconditional(found)) > 1 and isinstance(found[-1], str)
        if n_drawn >= 3 and n_switches_back >= 1:
            return
    raise AssertionError("the test has to see the switch, there and back")

@pytest.mark.parametrize("kind", KINDS)
def test_the_documents_of_a_batch_do_not_disturb_each_other(kind, monkeypatch):
    """Prompts of different lengths, some that draw and some that only write, give what each gives alone."""
    prompts = with_images([["a red circle above a blue square."], ["a"], [IMAGE], ["red", IMAGE, "blue"], []],
                          Config(**KINDS[kind]))
    noise = torch.randn(1, 4, 8, 8)
    monkeypatch.setattr(torch, "randn", lambda n, *shape, device=None: noise.repeat(n, 1, 1, 1))
    monkeypatch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
    n_drawn = []
    for seed in range(20):
        model = eager_to_draw(seed, kind)
        options = {"max_tokens": 3, "max_images": 2, "steps": 3, "guidance_scale": 1.5}
        together = generate(model, prompts, **options)
        for prompt, found in zip(prompts, together, strict=True):
            alone, = generate(model, [prompt], **options)
            assert_same_document(found, alone)
            n_drawn.append(len(unconditional(found)) - len(unconditional(prompt)))
        some = n_drawn[-5:]
        if {0, 2} <= set(some) and sum(some) >= 4:
            return
    raise AssertionError("the test has to see documents that draw and documents that do not, in one batch")

def scripted(monkeypatch, *scripts):
    """Let the documents of a batch write these tokens, whatever the model says. It is still asked."""
    script_of = {}

    def logits_of_script(model, documents):
        if not script_of:
            script_of.update(zip(map(id, documents), map(iter, scripts), strict=True))
        logits = next_token_logits(model, documents)
        for row, document in zip(logits, documents, strict=True):
            row[next(script_of[id(document)])] = 1e9
        return logits
    monkeypatch.setattr(transfusion, "next_token_logits", logits_of_script)

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_documents_end_as_they_should_and_every_step_is_shown(kind, monkeypatch):
    model = tiny(**KINDS[kind])
    a, red = TOKENIZER.encode("a red")
    prompts = with_images([["blue"], [], ["a"], [IMAGE], [IMAGE, "a"]], model.cfg)
    scripted(
        monkeypatch,
        [EOS],  # ends at once
        [a, red, a],  # ends after max_tokens
        [red, BOI, red, EOS],  # writes, draws, writes
        [BOI, BOI],  # ends where it asks for a second image
        [a, BOI, a, a, a],  # ends after max_tokens, which count anew after an image
    )
    snapshots = []

    def show(documents):
        snapshots.append([list(document) for document in documents])
    assert generate(model, prompts, max_tokens=3, max_images=1, steps=2, show=show) == snapshots[-1]
    n_steps = 16 if kind == "chameleon" else 2
    assert len(snapshots) == 3 + n_steps + 3  # tokens, steps, tokens

    def shape(document):
        return [part if isinstance(part, str) else IMAGE for part in document]
    assert [shape(document) for document in snapshots[-1]] == [
        ["blue"], ["a red a"], ["a red", IMAGE, "red"], [IMAGE, IMAGE], [IMAGE, "a a", IMAGE, "a a a"]]
    progress = [shape(documents[2]) for documents in snapshots]
    assert progress == [["a red"]] * 3 + [["a red", IMAGE]] * n_steps + [["a red", IMAGE, "red"]] * 3
    assert [shape(documents[1]) for documents in snapshots[:3]] == [["a"], ["a red"], ["a red a"]]
    assert [shape(documents[3]) for documents in snapshots[:4]] == [[IMAGE]] * 3 + [[IMAGE, IMAGE]]
    images = [documents[2][1] for documents in snapshots[3:]]
    for i, (before, after) in enumerate(pairwise(images)):
        assert before.equal(after) == (i >= n_steps - 1)  # each step changes the image, and text does not
    if kind == "chameleon":
        for n, image in enumerate(images[:16], 1):
            assert image[:n].equal(images[15][:n]) and not image[n:].any()  # code by code

def test_without_images_left_a_document_ends_where_it_asks_for_one(monkeypatch):
    model = tiny()
    a, = TOKENIZER.encode("a")
    scripted(monkeypatch, [a, BOI], [EOS])
    prompts = [["red"], ["blue"]]
    shown = []
    generate(model, prompts, max_images=0, show=lambda documents: shown.append([list(d) for d in documents]))
    assert shown == [[["red a"], ["blue"]]] * 2

def test_generation_leaves_the_prompts_unchanged(monkeypatch):
    for kind in ("default", "chameleon"):
        model = tiny(**KINDS[kind])
        prompts = with_images([["a"], [IMAGE, "red"], [IMAGE]], model.cfg)
        copies = [[part if isinstance(part, str) else part.clone() for part in prompt] for prompt in prompts]
        with monkeypatch.context() as patch:
            scripted(patch, *[[*TOKENIZER.encode("a"), BOI, EOS]] * 3)
            documents = generate(model, prompts, steps=2)
        assert [len(unconditional(document)) for document in documents] == [1, 2, 2]
        for prompt, copy in zip(prompts, copies, strict=True):
            assert len(prompt) == len(copy)
            for part, original in zip(prompt, copy):
                assert part == original if isinstance(part, str) else part.equal(original)

@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_images_before_the_one_that_is_drawn_are_seen_clean(guidance_scale, monkeypatch):
    model = tiny()
    prompts = with_images([["a", IMAGE, "red"], [IMAGE]], model.cfg)
    given = [prompts[0][1], prompts[1][0]]
    scripted(monkeypatch, [BOI, BOI, EOS], [BOI, BOI, EOS])
    calls = spy_on_forward(model)
    documents = generate(model, prompts, max_images=2, steps=3, guidance_scale=guidance_scale)
    n_calls = 1 if guidance_scale == 1 else 2  # of each step
    times = [t for t in sampling_times(3, model.cfg.t_power)[:-1].tolist() for _ in range(n_calls)]
    expected = [[0.0] * 2, *([0.0, t] * 2 for t in times), [0.0] * 4, *([0.0, 0.0, t] * 2 for t in times),
                [0.0] * 6]
    assert len(calls) == len(expected)
    for ((batch,), _), expected_t in zip(calls, expected):
        latents, t = batch.images, batch.t
        torch.testing.assert_close(t, torch.tensor(expected_t))
        n = len(t) // 2  # images of each document
        assert latents[0].equal(given[0]) and latents[n].equal(given[1])
        if n == 3:  # the first drawn image is part of the context now, as it was finished
            assert latents[1].equal(documents[0][3]) and latents[4].equal(documents[1][1])

@pytest.mark.parametrize("next_token", [BOI, EOS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_likelihood_is_the_sum_over_the_tokens(kind, next_token):
    model = tiny(**KINDS[kind])
    texts = ["a red circle.", "a", "naïve", ""]
    log_p, n_tokens = log_likelihood(model, [[text] for text in texts], next_token)
    for i, text in enumerate(texts):
        ids = [BOS, *TOKENIZER.encode(text)]
        tokens = torch.tensor([ids])
        batch = Batch(tokens, None, torch.full_like(tokens, -1), torch.zeros(0, 4, 8, 8), torch.zeros(0), None)
        logits = model(batch)[0] if kind == "chameleon" else model(batch)[0][0]
        total = sum(logits[q].log_softmax(0)[token] for q, token in enumerate([*ids[1:], next_token]))
        assert n_tokens[i] == len(ids)
        torch.testing.assert_close(log_p[i], total, atol=1e-3, rtol=1e-4)

@pytest.mark.parametrize("kind", KINDS)
def test_the_log_likelihood_of_a_caption_leaves_out_the_inside_of_the_image(kind):
    model = tiny(**KINDS[kind])
    document, = with_images([[IMAGE, "a red."]], model.cfg)
    ids, (image, _) = TOKENIZER.encode("a red."), document
    log_p, n_tokens = log_likelihood(model, [document, ["a red circle above a blue square."]])
    prefixes = [[image, TOKENIZER.decode(ids[:n])] if n else [image] for n in range(4)]
    written = [([], BOI), *zip(prefixes, [*ids, EOS])]
    total = sum(forward_by_hand(model, prefix)[0].log_softmax(0)[token] for prefix, token in written)
    assert n_tokens[0] == len(written) == 5
    torch.testing.assert_close(log_p[0], total, atol=1e-3, rtol=1e-4)

def test_the_log_likelihood_ends_with_eos_by_default():
    model = tiny()
    assert log_likelihood(model, [["a"]])[0] == log_likelihood(model, [["a"]], EOS)[0]

# ---- VAE and pictures ----------------------------------------------------------------------------

def random_vae(**options):
    torch.manual_seed(0)
    return make_models(Config(**TINY, **options), TOKENIZER)[1].requires_grad_(False).eval()

def random_squares(n, squares_per_side):
    """Pictures of squares, each of one random colour: simpler to learn than noise."""
    colours = torch.randint(0, 256, (n, squares_per_side, squares_per_side, 3), dtype=torch.uint8)
    size = 32 // squares_per_side
    return colours.repeat_interleave(size, 1).repeat_interleave(size, 2)

def test_pictures_become_latents_of_unit_variance_and_come_back():
    vae = random_vae()
    pictures = torch.randint(0, 256, (520, 32, 32, 3), dtype=torch.uint8)  # more than encode takes at once
    vae.encoder[-1].weight.mul_(torch.linspace(2, 5, 8)[:, None, None, None])
    means = vae.encoder(pictures.permute(0, 3, 1, 2) / 127.5 - 1)[:, :4]
    assert (means.std((0, 2, 3)) - 1).abs().min() > 0.1, "the test has to see a scale"
    vae.calibrate(pictures)
    latents = vae.encode(pictures)
    assert latents.shape == (520, 4, 8, 8)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.encode(pictures[:7]), latents[:7], atol=1e-4, rtol=1e-4)

    decoded = vae.decoder(means[:20])  # decode undoes the normalisation
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    found = vae.decode(latents[:20])
    assert found.dtype == torch.uint8 and (found - expected).abs().max() < 0.51

def test_pictures_survive_the_conversion_to_numbers_and_back():
    vae = random_vae()
    pictures = torch.randint(0, 256, (3, 4, 6, 3), dtype=torch.uint8)
    x = vae.to_input(pictures)
    assert x.shape == (3, 3, 4, 6) and x.min() >= -1 and x.max() <= 1
    assert vae.to_pictures(x).equal(pictures)

def test_the_loss_of_the_vae_is_reconstruction_and_divergence():
    vae = random_vae()
    pictures = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    x = pictures.permute(0, 3, 1, 2) / 127.5 - 1
    mean, log_var = vae.encoder(x).chunk(2, dim=1)
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    vae.kl = 0.0
    torch.manual_seed(1)
    reconstruction = vae.loss(pictures)
    vae.kl = 2.0
    torch.manual_seed(1)
    torch.testing.assert_close(vae.loss(pictures), reconstruction + 2 * kl)
    torch.manual_seed(1)
    z = mean + (log_var / 2).exp() * torch.randn_like(mean)
    torch.testing.assert_close(reconstruction, (vae.decoder(z) - x).square().mean())

def test_the_vae_learns_and_calibrates():
    torch.manual_seed(0)
    _, vae = make_models(Config(**TINY), TOKENIZER)
    pictures = random_squares(8, squares_per_side=2)
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

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_every_picture_is_encoded_in_its_place(kind):
    vae = random_vae(**KINDS[kind])
    pictures = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    documents = [["a", pictures[0].numpy()], ["a red"], [pictures[1].numpy(), "red", pictures[2]], [],
                 [pictures[3]]]
    before = [list(document) for document in documents]
    encoded = encode_pictures(documents, vae)
    images = vae.encode(pictures)
    wanted = [["a", images[0]], ["a red"], [images[1], "red", images[2]], [], [images[3]]]
    assert [len(document) for document in encoded] == [2, 1, 3, 0, 1]
    for document, expected in zip(encoded, wanted):
        for part, right in zip(document, expected):
            if isinstance(part, str):
                assert part == right
            else:
                torch.testing.assert_close(part, right, atol=1e-5, rtol=1e-5)
    assert all(a is b for old, new in zip(before, documents) for a, b in zip(old, new))
    assert encode_pictures([["a red"], []], vae) == [["a red"], []]

# ---- Chameleon -----------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [2, 4, 5])
def test_quantised_numbers_are_the_nearest_of_evenly_spaced_levels(levels):
    vae = random_vae(model="chameleon", code_levels=levels, code_dim=3)
    z = torch.randn(2, 3, 4, 4) * 4
    vae.encoder.forward = lambda x: torch.cat([z, z], dim=1)
    (_, found), half = vae.quantise(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)), (levels - 1) / 2
    grid = torch.arange(levels) - half
    assert torch.isclose(found[..., None], grid).any(-1).all()
    assert len(found.round(decimals=3).unique()) == levels
    assert (found - vae.normalise(z).tanh() * half).abs().max() <= 0.5 + 1e-5

def test_the_gradient_passes_straight_through_the_quantiser():
    vae = random_vae(model="chameleon")
    vae.normalise = torch.nn.Identity()
    z = torch.linspace(-2, 2, 64).view(1, 4, 4, 4).requires_grad_()
    vae.encoder.forward = lambda x: torch.cat([z, z], dim=1)
    _, vectors = vae.quantise(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    grad, = torch.autograd.grad(vectors.sum(), z)
    torch.testing.assert_close(grad, 2 * (1 - z.detach().tanh() ** 2))  # that of 2 tanh, all along the steps

@pytest.mark.parametrize("levels, dim", [(5, 4), (4, 3), (2, 6)])
def test_codes_are_in_range_and_come_back(levels, dim):
    """Every vector of the grid has a code of its own, and the decoder receives that vector again."""
    vae = random_vae(model="chameleon", code_levels=levels, code_dim=dim)
    n_codes, received = levels**dim, []
    vectors = torch.cartesian_prod(*[torch.arange(levels) - (levels - 1) / 2] * dim)  # (n_codes, dim)
    n_pictures = math.ceil(n_codes / 16)
    z = torch.zeros(n_pictures * 16, dim)
    z[:n_codes] = vectors
    z = z.view(n_pictures, 4, 4, dim).permute(0, 3, 1, 2)
    inside = torch.atanh(0.9 * z / z.max())  # nearest to z again, after tanh
    vae.normalise, vae.encoder.forward = torch.nn.Identity(), lambda x: torch.cat([inside, inside], dim=1)
    vae.decoder.forward = lambda x: received.append(x) or torch.zeros(len(x), 3, 32, 32)
    codes = vae.encode(torch.zeros(n_pictures, 32, 32, 3, dtype=torch.uint8))
    assert codes.shape == (n_pictures, 16) and codes.dtype == torch.long
    assert codes.flatten()[:n_codes].sort().values.equal(torch.arange(n_codes))
    vae.decode(codes)
    torch.testing.assert_close(received[0], z)

def test_codes_to_picture_to_codes():
    """After training, pictures come back, and so do the codes of the pictures that come back."""
    torch.manual_seed(0)
    vae = QuantisedVAE(Config(**{**TINY, "vae_dim": 16}, model="chameleon"))
    pictures = random_squares(16, squares_per_side=4)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    for _ in range(300):
        optimizer.zero_grad()
        vae.loss(pictures).backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in vae.encoder.parameters() if p.dim() > 1)
    vae.eval()
    vae.calibrate(pictures)
    codes = vae.encode(pictures)
    assert codes.shape == (16, 16) and codes.min() >= 0 and codes.max() < 5**4 and len(codes.unique()) > 30
    again = vae.decode(codes)
    assert (again.float() - pictures).abs().mean() < 0.5 * (pictures - pictures.float().mean()).abs().mean()
    assert (vae.encode(again) == codes).float().mean() > 0.5  # by chance under 1 %

def test_chameleon_packs_codes_as_tokens():
    model = tiny(model="chameleon")
    codes, n_text = torch.randint(625, (2, 16)), len(TOKENIZER)
    batch = model.pack([["a", codes[0], "red"], ["a red"], [codes[1]]], end=False)
    rows = [
        [BOS, *TOKENIZER.encode("a"), BOI, *(n_text + codes[0]).tolist(), EOI, *TOKENIZER.encode("red")],
        [BOS, *TOKENIZER.encode("a red")],
        [BOS, BOI, *(n_text + codes[1]).tolist(), EOI],
    ]
    assert batch.tokens.tolist() == [row + [PAD] * (len(rows[0]) - len(row)) for row in rows]
    assert (batch.image_id >= 0).equal(batch.tokens >= n_text)
    assert model.pack([["a", codes[0]]]).tokens.tolist() == [[*rows[0][:20], EOS]]
    assert model.pack([["a"]]).tokens.tolist() == [[BOS, *TOKENIZER.encode("a"), EOS]]
    assert model.lm_head.out_features == n_text + 625

def test_chameleon_has_one_loss_the_mean_over_text_and_codes():
    """BOI predicts the first code, and a code the next one. EOI is appended and never predicted."""
    documents = with_images([["a", IMAGE], [IMAGE, "a red."], ["a"]], Config(model="chameleon"))
    model = tiny(model="chameleon", z_loss=0.0)
    loss, loss_text, loss_image = loss_of(model, documents)
    text, codes, z = [], [], []
    for document in documents:
        batch = model.pack([document])
        tokens, logits = batch.tokens, model(batch)[0]
        for q, target in enumerate(tokens[0, 1:].tolist()):
            if target == EOI:
                continue
            (codes if target >= len(TOKENIZER) else text).append(-logits[q].log_softmax(0)[target])
            z.append(logits[q].exp().sum().log().square())
    assert len(codes) == 2 * 16
    torch.testing.assert_close(loss_image, torch.stack(codes).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss_text, torch.stack(text).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, torch.stack(text + codes).mean(), atol=1e-4, rtol=1e-4)
    with_z = loss_of(tiny(model="chameleon", z_loss=0.5), documents)[0]
    torch.testing.assert_close(with_z, loss + 0.5 * torch.stack(z).mean(), atol=1e-4, rtol=1e-4)

def test_chameleon_without_instruction_loss_does_not_train_the_instruction():
    documents = with_images([[IMAGE, "red.", IMAGE]], Config(model="chameleon"))
    model = tiny(model="chameleon")
    with_it = loss_of(model, documents)
    without_it = loss_of(tiny(model="chameleon", instruction_loss=False), documents)
    tokens, log_p = model.pack(documents).tokens, model(model.pack(documents))[0].log_softmax(-1)
    assert tokens[0, 19:21].tolist() == TOKENIZER.encode("red.")
    rest = [(0, BOI), (20, BOI), (38, EOS)]  # at BOS, at "." and at the last EOI
    torch.testing.assert_close(without_it[1], -sum(log_p[q, token] for q, token in rest) / 3)
    every = [*rest, (18, tokens[0, 19]), (19, tokens[0, 20])]
    torch.testing.assert_close(with_it[1], -sum(log_p[q, token] for q, token in every) / 5)
    torch.testing.assert_close(with_it[2], without_it[2])
    loss, loss_text, loss_image = without_it
    torch.testing.assert_close(loss, (3 * loss_text + 32 * loss_image) / 35, atol=0.01, rtol=0)

# ---- Presets and options -------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["0.16B", "0.37B", "0.76B", "1.4B", "7B"])
def test_the_papers_sizes_have_the_papers_parameters(name):
    with torch.device("meta"):
        model = Transfusion(PRESETS[name], range(32_000))  # of a tokenizer only the length counts: Llama's
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert abs(billions / float(name[:-1]) - 1) < 0.06
    cfg, laptop = model.cfg, PRESETS["laptop-paper"]  # which makes the same choices
    for choice in ("target", "t_power", "qk_norm", "patch_position", "lambda_ddpm", "bidirectional"):
        assert getattr(cfg, choice) == getattr(laptop, choice)
    assert cfg.n_patches == 256 and cfg.target == "eps" and cfg.t_power == 1 and cfg.lambda_ddpm == 5
    assert not cfg.qk_norm and not cfg.patch_position and cfg.bidirectional

def test_the_models_of_a_config_are_those_that_it_names():
    transfusion_model, vae = make_models(Config(**TINY), TOKENIZER)
    chameleon, quantised_vae = make_models(Config(**TINY, model="chameleon"), TOKENIZER)
    assert isinstance(transfusion_model, Transfusion) and type(vae) is VAE
    assert isinstance(chameleon, Chameleon) and type(quantised_vae) is QuantisedVAE
    assert all(p.abs().sum() > 0 for p in transfusion_model.transformer.parameters())

@pytest.mark.parametrize("options", [
    {"dim": 99}, {"dim": 0}, {"n_heads": 0}, {"n_heads": -4}, {"n_layers": 0}, {"n_layers": -1},
    {"patch_size": 3}, {"patch_size": 16}, {"patch_size": 0}, {"image_size": 48}, {"image_size": 8},
    {"latent_size": 0}, {"latent_channels": 0}, {"vae_dim": 0}, {"unet_dim": -1}, {"code_dim": 0},
    {"code_levels": 0}, {"t_power": 0.0}, {"t_power": -1.0}, {"t_power": math.nan}, {"t_power": math.inf},
    {"lambda_ddpm": -1.0}, {"lambda_ddpm": math.nan}, {"lambda_ddpm": math.inf},
    {"noise_cap": 1.1}, {"noise_cap": -0.1}, {"noise_cap": math.nan}, {"vae_kl": -1e-3}, {"z_loss": -1e-5},
    {"z_loss": math.nan},
], ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()))
def test_a_config_that_cannot_be_says_which_option_is_wrong(options):
    (name, _), = options.items()
    with pytest.raises(ValueError, match=f"^{name} .*must be"):
        check_options(options)
        check_config(Config(**{**TINY, **options}))

def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="^dim .* n_heads"):
        check_config(Config(dim=32, n_heads=3))

@pytest.mark.parametrize("name, choices", [("model", ["transfusion", "chameleon"]), ("target", TARGETS),
                                           ("patch_encoder", ["linear", "unet"])])
def test_a_wrong_choice_is_answered_with_the_right_ones(name, choices, capsys):
    option = "--" + name.replace("_", "-")
    with pytest.raises(SystemExit):
        parse_options([option, "something"])
    said = capsys.readouterr().err
    assert all(word in said for word in [option, "something", *choices])
    for choice in choices:
        assert parse_options([option, choice]) == {name: choice}
    if name != "model":  # the model refuses it too, for those who make a Config themselves
        with pytest.raises(AssertionError):
            Transfusion(Config(**TINY, **{name: "something"}), TOKENIZER)

def test_the_ends_of_the_allowed_ranges_are_allowed():
    for options in (
        {"noise_cap": 0.0, "lambda_ddpm": 0.0, "z_loss": 0.0, "vae_kl": 0.0, "code_levels": 2},
        {"noise_cap": 1.0, "t_power": 0.01, "patch_size": 8, "n_layers": 1, "n_heads": 1},
    ):
        check_options(options)
        check_config(Config(**options))
