"""What must stay true of transfusion.py.

Weights are made random before two ways to compute the same thing are compared: fresh ones are so
small that two different ways can agree.
"""

import math
import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from tests.conftest import SMALL_MODEL
from transfusion import (
    BOI,
    BOS,
    CODE_TEMPERATURE,
    EOI,
    EOS,
    N_CODES,
    N_SPECIAL,
    PAD,
    PATCH,
    VAE,
    Chameleon,
    Config,
    Llama,
    QuantisedVAE,
    Tokenizer,
    Transfusion,
    UNetDown,
    UNetUp,
    alpha_bar,
    encode,
    generate,
    next_tokens,
    noise_levels,
    p_sample,
    pack,
    predicted_x0,
    q_sample,
    sample_tokens,
)

TOKENIZER = Tokenizer(["a", "red", "blue", "circle", "square", "above", "."])
N_TEXT = len(TOKENIZER)
SPECIAL = {"PAD": PAD, "BOS": BOS, "EOI": EOI, "PATCH": PATCH, "BOI": BOI, "EOS": EOS}
KINDS = {
    "default": {},
    "causal": {"bidirectional": False},
    "unet": {"patch_encoder": "unet"},
    "chameleon": {"model": "chameleon", "qk_norm": True},
}

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def new_model(cfg):
    kind = Chameleon if cfg.model == "chameleon" else Transfusion
    return kind(cfg, N_TEXT)

def new_vae(kind):
    cfg = Config(**SMALL_MODEL)
    return QuantisedVAE(cfg, N_TEXT) if kind == "chameleon" else VAE(cfg)

def randomise(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)  # activations stay near 1
    return module.requires_grad_(False).eval()

def random_model(kind="default", **options):
    cfg = Config(**SMALL_MODEL, **KINDS[kind], **options)
    return randomise(new_model(cfg))

def make(cfg, *texts):
    """Documents from texts, with a random image for each "*"."""
    documents = []
    for text in texts:
        document = []
        for word in text.split():
            if word != "*":
                document += TOKENIZER.encode(word)
            elif cfg.model == "chameleon":
                document.append(N_TEXT + torch.randint(N_CODES, (cfg.n_patches,)))
            else:
                document.append(torch.randn(cfg.latent_shape))
        documents.append(document)
    return documents

def images_of(documents):
    return [item for document in documents for item in document if torch.is_tensor(item)]

def names(document):
    """A document or a row of tokens as text, to compare and to read."""
    words = []
    for item in document:
        if torch.is_tensor(item):
            words.append("*")
        elif item < N_SPECIAL:
            words.append(list(SPECIAL)[item])
        else:
            words.append(TOKENIZER.decode([item]))
    return " ".join(words)

def spy_on_forward(model):
    """A list that receives the arguments and the results of every call of model.forward."""
    calls = []
    forward = model.forward

    def spy(tokens, xt, t):
        logits, pred = forward(tokens, xt, t)
        calls.append((tokens, xt, t, logits, pred))
        return logits, pred

    model.forward = spy
    return calls

def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)

# ---- Tokens and documents ------------------------------------------------------------------------

def test_any_string_round_trips():
    rng = random.Random(0)
    texts = ["", " ", "  a  red", "a red circle above a blue square.", "reddish.a red.", "日本\n\t"]
    texts += ["".join(rng.choices(" .ared\n\x00é€😀", k=n)) for n in range(100)]
    for text in texts:
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text

def test_known_words_are_one_token_and_other_text_is_bytes():
    assert len(TOKENIZER.encode("a red circle above a blue square.")) == 8
    assert len(TOKENIZER.encode("a reddish dog")) == 1 + len(" reddish dog")
    tokens = TOKENIZER.encode("a red dog.")
    assert min(tokens) >= N_SPECIAL
    assert max(tokens) < N_TEXT

TABLES = {
    "a red circle. *": (
        "BOS a red circle . BOI PATCH PATCH EOI EOS",
        "a red circle . BOI - - - EOS",
    ),
    "* a red circle.": (
        "BOS BOI PATCH PATCH EOI a red circle . EOS",
        "BOI - - - a red circle . EOS",
    ),
    "* a blue. *": (
        "BOS BOI PATCH PATCH EOI a blue . BOI PATCH PATCH EOI EOS",
        "BOI - - - a blue . BOI - - - EOS",
    ),
    "a": ("BOS a EOS", "a EOS"),
    "*": ("BOS BOI PATCH PATCH EOI EOS", "BOI - - - EOS"),
    "": ("BOS EOS", "EOS"),
}

def two_patches():
    cfg = Config()
    cfg.n_patches = 2  # as in the tables at the head of the module
    return cfg

def test_documents_are_packed_and_predicted_as_the_head_of_the_module_shows():
    cfg = two_patches()
    documents = make(cfg, *TABLES)
    tokens, images = pack(documents, cfg, "cpu")
    targets, has_loss = next_tokens(tokens)
    for row, (inputs, predicts) in enumerate(TABLES.values()):
        n = len(inputs.split())
        assert names(tokens[row, :n].tolist()) == inputs
        assert (tokens[row, n:] == PAD).all()
        assert has_loss[row, n - 1 :].sum() == 0
        predicted = [
            names([target]) if yes else "-"
            for target, yes in zip(targets[row, : n - 1].tolist(), has_loss[row])
        ]
        assert " ".join(predicted) == predicts
    assert images.equal(torch.stack(images_of(documents)))

def test_the_codes_of_chameleon_are_packed_as_tokens():
    tokens, _ = pack([[7, torch.tensor([300, 500]), 8]], Config(), "cpu")
    assert tokens.tolist() == [[BOS, 7, BOI, 300, 500, EOI, 8, EOS]]

# ---- Diffusion -----------------------------------------------------------------------------------

def test_the_schedule_is_the_cosine_one():
    t = torch.linspace(0, 1, 51)
    ab = alpha_bar(t)
    close(ab.flatten().sqrt(), torch.cos(t * math.pi / 2), 2e-3)

@pytest.mark.parametrize("target", ["eps", "x0"])
def test_a_right_prediction_gives_back_the_image_even_from_pure_noise(target):
    x0, eps = torch.randn(2, 11, 1, 8, 8)
    t = torch.linspace(0, 1, 11)
    pred = {"eps": eps, "x0": x0}[target]
    close(predicted_x0(q_sample(x0, eps, t), pred, t, target), x0, 5e-3)

@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_one_step_has_the_right_mean_and_variance(eta):
    t, t_next = torch.tensor([0.6]), torch.tensor([0.45])
    xt, x0 = 1.2, 0.7
    ones = torch.ones(40_000, 1, 1, 1)
    drawn = p_sample(xt * ones, x0 * ones, t, t_next, eta)

    ab, ab_next = alpha_bar(t).item(), alpha_bar(t_next).item()
    beta = 1 - ab / ab_next
    variance = eta**2 * beta * (1 - ab_next) / (1 - ab)
    if eta == 1:  # the posterior of DDPM, equation 7
        x0_share = ab_next**0.5 * beta / (1 - ab)
        xt_share = (1 - beta) ** 0.5 * (1 - ab_next) / (1 - ab)
        mean = x0_share * x0 + xt_share * xt
    else:  # equation 12 of DDIM
        eps = (xt - ab**0.5 * x0) / (1 - ab) ** 0.5
        mean = ab_next**0.5 * x0 + (1 - ab_next - variance) ** 0.5 * eps
    assert drawn.mean().item() == pytest.approx(mean, abs=0.01)
    assert drawn.var().item() == pytest.approx(variance, rel=0.05, abs=1e-9)

# ---- The transformer -----------------------------------------------------------------------------

def rotate(x):
    """RoPE: features 2 i and 2 i + 1 of x (T, 2n) are one complex number, which is turned."""
    real, imaginary = x[:, 0::2], x[:, 1::2]
    T, n = real.shape
    angle = [[position * 10000 ** (-i / n) for i in range(n)] for position in range(T)]
    return torch.complex(real, imaginary) * torch.polar(torch.ones(T, n), torch.tensor(angle))

def llama(model, x, mask):
    """An independent forward pass of one document: x (T, D), mask (T, T), head by head."""
    for block in model.blocks:
        h = block.attention_norm(x)
        w = block.attention
        heads = []
        qkv = [part.chunk(model.cfg.n_heads, dim=1) for part in (w.wq(h), w.wk(h), w.wv(h))]
        for q, k, v in zip(*qkv):
            if model.cfg.qk_norm:
                q = F.rms_norm(q, q.shape[1:], w.q_norm.weight)
                k = F.rms_norm(k, k.shape[1:], w.k_norm.weight)
            scores = (rotate(q) @ rotate(k).conj().T).real / math.sqrt(q.shape[1])
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v)
        x = x + w.wo(torch.cat(heads, dim=1))
        h = block.ffn_norm(x)
        w = block.ffn
        x = x + w.w2(F.silu(w.w1(h)) * w.w3(h))
    return model.norm(x)

@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_transformer_is_llama(qk_norm):
    cfg = Config(**SMALL_MODEL, qk_norm=qk_norm)
    model = randomise(Llama(cfg, N_TEXT))
    x = torch.randn(2, 40, 32)
    mask = (torch.rand(2, 40, 40) > 0.5) | torch.eye(40).bool()
    found = model.transformer(x, mask[:, None])
    for row in range(2):
        close(found[row], llama(model, x[row], mask[row]))

# ---- What depends on what ------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_everything_depends_on_exactly_what_it_may_see(kind):
    """By gradient with respect to all that enters: embedded tokens, images and their times.

    A position sees itself and all before it, and a patch its whole image, unless attention is
    causal. It sees the images that begin before it. A prediction sees what the last patch of
    its image sees. Nothing sees its target.
    """
    model = random_model(kind)
    del model.blocks[1:]  # more blocks see more, through others
    entered = []

    def keep_output(module, args, output):
        entered.append(output.requires_grad_())
        return output.clone()

    model.token_embedding.register_forward_hook(keep_output)
    documents = make(model.cfg, "a * red. * blue")
    if kind == "chameleon":
        tokens, logits = model.logits(documents)
        pred = []
    else:
        tokens, images = pack(documents, model.cfg, "cpu")
        t = torch.tensor([0.3, 0.6], requires_grad=True)
        logits, pred = model(tokens, images.requires_grad_(), t)
        entered += [images, t]

    begins = (tokens[0] == BOI).nonzero()[:, 0]
    ends = begins + model.cfg.n_patches  # the last patch of each image
    sees = torch.ones(tokens.shape[1], tokens.shape[1]).tril().bool()
    if kind in ("default", "unet"):
        for begin, end in zip(begins, ends):
            patches = slice(begin + 1, end + 1)
            sees[patches, patches] = True
    outputs = [*enumerate(logits[0]), *zip(ends, pred)]
    for position, output in outputs:
        gradients = torch.autograd.grad(output.square().sum(), entered, retain_graph=True)
        by_token, *by_image_and_t = gradients
        assert by_token[0].any(1).equal(sees[position])
        for gradient in by_image_and_t:
            assert gradient.view(2, -1).any(1).equal(begins < position)

@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_rest_of_the_batch_change_nothing(kind):
    model = random_model(kind)
    documents = make(model.cfg, "a", "a * red circle above *", "* a red.", "red", "")
    _, logits = model.logits(documents)
    for row, document in enumerate(documents):
        _, alone = model.logits([document])
        close(logits[row, : alone.shape[1]], alone[0])
    if kind == "chameleon":
        return
    xt = torch.randn(5, *model.cfg.latent_shape)
    t = torch.tensor([0.6])
    together = model.predict_x0(documents, xt, t)
    for row, document in enumerate(documents):
        alone = model.predict_x0([document], xt[row : row + 1], t)
        close(together[row], alone[0])

@pytest.mark.parametrize("kind", ["default", "unet"])
def test_patches_are_squares_in_raster_order_and_decoded_where_they_were_encoded(kind):
    model = random_model(kind)
    latents = torch.randn(1, 4, 8, 8)
    t = torch.tensor([0.3])
    patches, skips = model.patch_encoder(latents, t)
    pred = model.patch_decoder(patches, skips)
    for n, row, column in [(1, 0, 2), (4, 2, 0), (15, 6, 6)]:
        square = torch.zeros(1, 4, 8, 8)
        square[:, :, row : row + 2, column : column + 2] = 1
        changed, _ = model.patch_encoder(latents + square, t)
        assert (changed - patches).norm(dim=-1).argmax() == n
        changed = patches.clone()
        changed[0, row // 2, column // 2] += 1
        change = (model.patch_decoder(changed, skips) - pred).abs()
        assert F.avg_pool2d(change.sum(1), 2).argmax() == n

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_patches_know_their_position_in_the_image(kind):
    model = random_model(kind)
    for block in model.blocks:
        block.attention.wo.weight.zero_()  # RoPE knows positions too
    image = torch.full([16], N_TEXT) if kind == "chameleon" else torch.ones(4, 8, 8)
    tokens, logits = model.logits([[7, image, image]])
    is_patch = (tokens == PATCH) | (tokens >= N_TEXT)
    first, second = logits[is_patch].chunk(2)
    close(first, second)
    assert torch.pdist(first).min() > 1e-3

@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_the_unet_has_patches_of_every_size_and_uses_t_and_every_skip(patch_size):
    cfg = Config(**SMALL_MODEL, patch_size=patch_size, patch_encoder="unet")
    down = randomise(UNetDown(cfg))
    up = randomise(UNetUp(cfg))
    latents = torch.randn(3, 4, 8, 8)
    t = torch.tensor([0.1, 0.3, 0.7], requires_grad=True)
    patches, (time, features) = down(latents, t)
    entered = [x.detach().requires_grad_() for x in (patches, time, *features)]
    pred = up(entered[0], (entered[1], entered[2:]))
    assert patches.shape == (3, cfg.grid, cfg.grid, cfg.dim)
    assert pred.shape == latents.shape
    assert len(features) == 1 + math.log2(patch_size)
    of_patches = torch.autograd.grad(patches.square().sum(), t)
    of_pred = torch.autograd.grad(pred.square().sum(), entered)
    for gradient in [*of_patches, *of_pred]:
        assert gradient.reshape(3, -1).any(1).all()

# ---- The loss ------------------------------------------------------------------------------------

@pytest.mark.parametrize("t_power", [1.0, 3.0])
def test_times_have_their_density_and_only_images_to_be_read_have_the_cap(t_power):
    texts = ["a red. *", "* a red.", "* a *", "*", "* *", "a * red", "a"] * 600
    is_capped = torch.tensor([False, True, True, False, False, True, False, False])
    model = random_model(patch_size=8, noise_cap=0.4, t_power=t_power)
    calls = spy_on_forward(model)
    model.loss(make(model.cfg, *texts))
    [(_, _, t, _, _)] = calls
    assert len(t.unique()) > 0.99 * len(t)  # each image has its own
    t = t.view(600, 8)
    capped = t[:, is_capped]
    free = t[:, ~is_capped]
    assert capped.max() <= 0.4
    for end in (0.3, 0.5, 0.9):
        close((capped < 0.4 * end).float().mean(0), torch.full([3], end), 0.05)  # uniform
        close((free < end).float().mean(0), torch.full([5], end**t_power), 0.05)

def by_hand(tokens, logits):
    """The targets of a language model, its losses and its log Z, of all positions with a target.

    They are text, BOI, EOS and codes.
    """
    rows = []
    for tokens_of_row, logits_of_row in zip(tokens, logits):
        for q, target in enumerate(tokens_of_row[1:]):
            if target not in (PAD, PATCH, EOI):
                log_z = logits_of_row[q].exp().sum().log()
                rows.append((target, log_z - logits_of_row[q, target], log_z))
    return [torch.stack(column) for column in zip(*rows)]

@pytest.mark.parametrize("kind", ["default", "unet"])
@pytest.mark.parametrize("target", ["eps", "x0"])
def test_the_joint_loss_equals_one_computed_by_hand(kind, target):
    model = random_model(kind, target=target, lambda_ddpm=3.0)
    texts = "a red circle above a blue square. *", "* a *", "a", "*", "* red.", "red"
    documents = make(model.cfg, *texts)
    calls = spy_on_forward(model)
    loss, parts = model.loss(documents)
    [(tokens, xt, t, logits, pred)] = calls

    # LM: the mean over all positions with a target.
    _, losses, _ = by_hand(tokens, logits)
    close(parts["text"], losses.mean())

    # Diffusion: the mean over the images of the mean squared error of each.
    x0 = torch.stack(images_of(documents))
    ab = alpha_bar(t)
    eps = (xt - ab.sqrt() * x0) / (1 - ab).sqrt()
    error = pred - {"eps": eps, "x0": x0}[target]
    close(parts["image"], error.square().mean(), 1e-3)
    close(loss, parts["text"] + 3 * parts["image"])

    # The noise is N(0, 1), and fresh for each image.
    assert (eps.flatten(1).cov() - torch.eye(5)).abs().max() < 0.4

@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_has_no_image_loss_and_still_trains(kind):
    model = random_model(kind).requires_grad_(True)
    loss, parts = model.loss(make(model.cfg, "a red circle.", "a"))
    loss.backward()
    assert parts["image"] == 0
    assert loss.isfinite() and all(part.isfinite() for part in parts.values())
    grad_norm = clip_grad_norm_(model.parameters(), 1.0)
    assert grad_norm.isfinite()
    assert grad_norm > 0

@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_the_loss_is_nearly_the_same_and_trains(kind):
    model = random_model(kind).requires_grad_(True)
    documents = make(model.cfg, "a red circle. *", "* a")
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = model.loss(documents)
        losses.append(loss.item())
    loss.backward()
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert clip_grad_norm_(model.parameters(), 1.0).isfinite()

SWITCHES = [
    {},
    {"target": "eps"},
    {"bidirectional": False, "qk_norm": True},
    {"patch_encoder": "unet"},
    {"model": "chameleon"},
]

@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_one_batch_is_overfitted(switch):
    cfg = Config(**SMALL_MODEL, **switch)
    model = new_model(cfg)
    documents = make(cfg, "a red circle. *", "* a blue square.") * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    losses = []
    for _ in range(100):
        loss, parts = model.loss(documents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([parts["text"].item(), parts["image"].item()])
    text, image = torch.tensor(losses[-10:]).mean(0)
    assert text < 0.1 * losses[0][0]  # what is left is which of the two documents it is
    assert image < 0.5 * losses[0][1]

# ---- Generation ----------------------------------------------------------------------------------

def test_temperature_zero_is_greedy_and_others_sample():
    logits = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 0.0]])
    assert sample_tokens(logits, 0).tolist() == [2, 0]
    for temperature in (0.5, 2.0):
        drawn = sample_tokens(logits[:1].expand(20_000, 3), temperature)
        share = drawn.bincount(minlength=3) / 20_000
        close(share, (logits[0] / temperature).softmax(-1), 0.015)

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_every_token_of_text_can_be_written_and_no_other(kind):
    model = random_model(kind)
    documents = generate(model, [[]] * 4000, max_tokens=1, max_images=0, temperature=1e4)
    written = {token for document in documents for token in document}
    assert written == set(range(N_SPECIAL, N_TEXT))

def forward_by_hand(model, document, t=0.0):
    """The logits after a document, and the prediction for its last image, at time t.

    The images before the last are clean.
    """
    if isinstance(model, Chameleon):
        _, logits = model.logits([document])
        return logits[0, -2], None  # before EOS
    tokens, images = pack([document], model.cfg, "cpu")
    times = torch.zeros(len(images))
    times[-1:] = t
    logits, pred = model(tokens, images, times)
    return logits[0, -2], pred[-1:]

def generate_by_hand(model, document, max_tokens, max_images, steps, guidance_scale, eta):
    """Greedy generation of one document, straight from the paper."""
    cfg = model.cfg
    document = list(document)
    while True:
        for _ in range(max_tokens):
            logits, _ = forward_by_hand(model, document)
            allowed = [BOI, EOS, *range(N_SPECIAL, N_TEXT)]
            token = allowed[logits[allowed].argmax()]
            if token in (BOI, EOS):
                break
            document.append(token)
        if token != BOI or max_images == 0:
            return document
        max_images -= 1
        images = images_of([document])

        if cfg.model == "chameleon":
            codes = []
            for _ in range(cfg.n_patches):
                a, _ = forward_by_hand(model, [*document, BOI, *codes])
                b, _ = forward_by_hand(model, [*images, BOI, *codes])
                logits = b + guidance_scale * (a - b)
                code = torch.multinomial((logits[N_TEXT:] / CODE_TEMPERATURE).softmax(0), 1)
                codes.append(N_TEXT + code.item())
            document.append(torch.tensor(codes))
            continue

        x = torch.randn(1, *cfg.latent_shape)
        times = noise_levels(1 - torch.arange(steps + 1) / steps, cfg)
        for t, t_next in pairwise(times.split(1)):
            _, a = forward_by_hand(model, [*document, x[0]], t)
            _, b = forward_by_hand(model, [*images, x[0]], t)
            x0 = predicted_x0(x, b + guidance_scale * (a - b), t, cfg.target)
            x = p_sample(x, x0, t, t_next, eta)
        document.append(x[0])

@pytest.mark.parametrize("guidance_scale, eta", [(1.0, 1.0), (2.5, 0.0), (2.5, 1.0)])
@pytest.mark.parametrize("kind", ["default", "unet", "chameleon"])
def test_generation_equals_generation_by_hand(kind, guidance_scale, eta):
    # With one channel, all memory formats are the same, and so is the noise.
    model = random_model(kind, latent_channels=1)
    if kind != "chameleon":
        for p in [*model.patch_decoder.parameters()][-2:]:  # of the last layer
            p *= 0.1  # nothing is clamped
    options = {
        "max_tokens": 4,
        "max_images": 2,
        "steps": 3,
        "guidance_scale": guidance_scale,
        "eta": eta,
    }
    for prompt in make(model.cfg, "a red * a", "* blue", "a", "circle *"):
        # The model draws where it would write the third token.
        model.lm_head.weight[BOI] = 0
        text, = generate(model, [prompt], max_tokens=3, max_images=0)
        model.lm_head.weight[BOI] = 1.01 * model.lm_head.weight[text[-1]]
        torch.manual_seed(1)
        expected = generate_by_hand(model, prompt, **options)
        torch.manual_seed(1)
        shown = []
        found, = generate(model, [prompt], **options, show=shown.append)
        close(found, expected)
        *_, image = images_of([found[len(prompt) :]])
        assert image.equal(shown[-1][0])

def test_what_is_drawn_stays_in_the_range_of_latents():
    model = random_model(target="eps")  # a little error of eps is a huge one of x0 near t = 1
    images = model.draw(make(model.cfg, "a", "*"), 4, 2.0, 0.0, lambda xt: None)
    assert images.shape == (2, 4, 8, 8)
    assert images.abs().max() < 5.1

def script(kind, successors):
    """A model whose next token depends on the last one alone: {"a": "red"} writes red after a."""
    model = random_model(kind)
    for block in model.blocks:
        block.attention.wo.weight.zero_()
        block.ffn.w2.weight.zero_()
    model.norm.weight.fill_(1)
    model.lm_head.weight[:N_TEXT] = 0
    for pair in successors.items():
        last, following = [SPECIAL.get(name) or TOKENIZER.encode(name)[0] for name in pair]
        model.lm_head.weight[following] += model.token_embedding.weight[last]
    return model

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_documents_end_as_they_should(kind):
    model = script(kind, {"a": "EOS", "red": "red", "blue": "BOI", "EOI": "red"})
    prompts = make(model.cfg, "a", "red", "a blue", "* blue", "*")
    copies = [list(prompt) for prompt in prompts]

    def endings(max_images):
        documents = generate(model, prompts, max_tokens=3, max_images=max_images, steps=1)
        return [names(document[len(prompt) :]) for document, prompt in zip(documents, prompts)]

    text = "red red red"  # max_tokens, which count anew after an image
    assert endings(max_images=1) == ["", text, f"* {text}", f"* {text}", text]
    assert endings(max_images=0) == ["", text, "", "", text]
    assert prompts == copies  # they are left as they were

    model = script(kind, {"a": "EOS", "red": "EOS", "blue": "BOI", "EOI": "BOI"})
    assert endings(max_images=2) == ["", "", "* *", "* *", "* *"]

# ---- VAE -----------------------------------------------------------------------------------------

def random_pictures(n, size=32):
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8)

def test_the_loss_of_the_vae_is_reconstruction_and_divergence():
    vae = randomise(new_vae("default"))
    vae.normalise.running_mean.fill_(3)
    vae.normalise.running_var.fill_(4)
    pictures = random_pictures(5)
    x = pictures.permute(0, 3, 1, 2) / 127.5 - 1
    mean, log_var = vae.encoder(x).chunk(2, dim=1)
    mean = (mean - 3) / 2
    std = (log_var / 2).exp()
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).mean()
    torch.manual_seed(1)
    reconstruction = vae.decoder(mean + std * torch.randn_like(mean))
    torch.manual_seed(1)
    loss = vae.loss(pictures, kl_weight=2.0)
    close(loss, F.mse_loss(reconstruction, x) + 2 * kl)

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_the_vae_learns_to_give_pictures_back_and_normalises_its_latents(kind):
    vae = new_vae(kind)
    pictures = random_pictures(16, size=2)  # of four squares
    pictures = pictures.repeat_interleave(16, 1).repeat_interleave(16, 2)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        vae.loss(pictures).backward()
        optimizer.step()
    vae.eval()
    encoded = vae.encode(pictures)
    error = vae.decode(encoded).float() - pictures
    assert error.abs().mean() < 20  # of 63 for a grey picture
    if kind == "default":
        close(encoded.mean((0, 2, 3)), torch.zeros(4), 0.25)
        close(encoded.var((0, 2, 3)), torch.ones(4), 0.25)

@pytest.mark.parametrize("kind", ["default", "chameleon"])
def test_every_picture_is_encoded_in_its_place(kind):
    vae = randomise(new_vae(kind))
    pictures = random_pictures(3)
    first, second, third = pictures
    documents = [["a", first.numpy()], ["a"], [second, "a", third], []]
    a, = TOKENIZER.encode("a")
    first, second, third = vae.encode(pictures)
    close(encode(documents, TOKENIZER, vae), [[a, first], [a], [second, a, third], []])
    assert encode([["a"], []], TOKENIZER, vae) == [[a], []]

# ---- Chameleon -----------------------------------------------------------------------------------

def test_every_vector_of_integers_has_a_code_of_its_own_and_comes_back():
    vae = randomise(new_vae("chameleon"))  # not in training mode, so without noise,
    vae.normalise.train()  # but normalised by the statistics of these pictures
    received = []
    vae.decoder.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    pictures = random_pictures(100)
    vae.decode(vae.encode(pictures))
    vae.loss(pictures)
    vae.decode(N_TEXT + torch.arange(N_CODES).view(25, 25))
    from_codes, from_loss, all_vectors = received
    close(from_codes, from_loss)
    assert from_loss.unique().tolist() == [-2, -1, 0, 1, 2]
    assert all_vectors.transpose(0, 1).flatten(1).unique(dim=1).shape == (4, N_CODES)

@pytest.mark.parametrize("is_training", [False, True])
def test_the_gradient_passes_straight_through_the_rounding(is_training):
    vae = randomise(new_vae("chameleon")).train(is_training)
    latents = []

    def keep_output(module, args, output):
        latents.append(output.requires_grad_())

    vae.normalise.register_forward_hook(keep_output)
    quantised = vae.quantise(torch.randn(4, 3, 32, 32))
    gradient, = torch.autograd.grad(quantised.sum(), latents)
    before = 2 * latents[0].tanh()
    assert (quantised - before).abs().max() <= 0.5  # the nearest integer, or noise of that size
    close(gradient, 2 - before.square() / 2)  # the gradient of 2 tanh

def test_the_loss_of_chameleon_is_that_of_a_language_model_and_a_z_loss():
    model = random_model("chameleon")
    documents = make(model.cfg, "a *", "* a red.", "a")
    loss, parts = model.loss(documents, z_weight=0.5)
    targets, losses, log_z = by_hand(*model.logits(documents))
    is_code = targets >= N_TEXT
    assert is_code.sum() == 2 * model.cfg.n_patches
    close(parts["text"], losses[~is_code].mean())
    close(parts["image"], losses[is_code].mean())
    close(loss, losses.mean() + 0.5 * log_z.square().mean())
