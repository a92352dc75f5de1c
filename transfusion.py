"""Transfusion in one file: one transformer predicts the next token of text and denoises images.

Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model",
arXiv 2408.11039.

Text and images share one sequence. Text is a run of tokens, trained with next-token prediction. An
image is a run of continuous vectors, the patches of its VAE latents, trained with diffusion. The
tokens BOI and EOI (beginning and end of image) surround it. Attention is causal, except that the
patches of one image all see each other. To generate, the model writes text until it predicts BOI.
Then it denoises an image, and carries on with text. (In this file a "picture" is pixels, and an
"image" is the latents of a picture.)

Three training documents, with images of two patches. The row "predicts" is the target of the LM
loss at each position ("-": none). The row "t" is the noise level of each image.

    draw what a caption says
        input     BOS  a    red     circle  .    BOI  patch  patch  EOI  EOS
        predicts  a    red  circle  .       BOI  -    -      -      EOS  -
        t                                             t1     t1

    caption an image
        input     BOS  BOI  patch  patch  EOI  a    red     circle  .    EOS
        predicts  BOI  -    -      -      a    red  circle  .       EOS  -
        t                   t1     t1

    edit an image
        input     BOS  BOI  patch  patch  EOI  make  it     green  .    BOI  patch  patch  EOI  EOS
        predicts  BOI  -    -      -      make it    green  .      BOI  -    -      -      EOS  -
        t                   t1     t1                                        t2     t2

BOI is always followed by the N patches of the image and EOI, so the model never has to predict
these. It predicts text, BOI and EOS. At a patch, the output of the transformer is the prediction
for that same patch, not for the next one.

Each image has its own noise level t, from 0 (clean) to 1 (pure noise), and a diffusion loss. An
image that comes first in a document, with something after it, is there to be captioned or edited,
which is impossible with pure noise. So its t is at most 0.5, the noise cap. Any other image is
there to be generated, which starts from pure noise. So its t can be anything up to 1.

The training documents are a mixture: by default, 10 % text alone, 45 % caption first, and 45 %
image first. DEVIATION: in the paper, 80 % of the pairs have the caption first. In a tenth of the
documents with text before an image, the text is dropped, so that the model also learns to draw
unconditionally, as classifier-free guidance needs. Both happen where documents are made, in
data/tasks.py. `train.py --task edit` adds edits.

In code, one training step and one generation:

    loss, parts = model.loss(documents)
    documents = generate(model, prompts)

What the paper found. FID measures generated images (lower is better), CIDEr captions (higher is).
    - Transfusion needs 3 % of the FLOPs of Chameleon, which turns images into discrete tokens, for
      the same FID (7B parameters).
    - Bidirectional attention inside images instead of causal: FID 61.3 -> 20.3 (0.76B).
    - U-Net patches instead of linear ones: FID 20.3 -> 16.7, CIDEr 16.0 -> 25.4 (0.76B).
    - The noise cap: CIDEr 25.4 -> 29.4 (0.76B, U-Net).

                              this toy         the paper
    parameters                0.25M            0.16B to 7B
    width of the transformer  64               768 to 4096
    pixels of a picture       32 x 32          256 x 256
    latents                   4 x 8 x 8        8 x 32 x 32
    patches of an image       16, of 2 x 2     256, of 2 x 2

The section "Generation" completes the method. After it come the tokenizer, the VAE, U-Net patches
and the baseline Chameleon.
`DEVIATION:` marks a difference from the paper, with the option (if any) that restores the paper's
choice. `NOT STATED:` marks what the paper leaves open.

Shapes: B documents, T positions, M images in the batch, C x H x W latents of an image, N patches of
an image, D width of the transformer, V size of the vocabulary.
"""

import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

# ---- Configuration -------------------------------------------------------------------------------

@dataclass
class Config:
    """Each field is an option of train.py, and its comment is the help text. Skim them for now."""
    model: Literal["transfusion", "chameleon"] = "transfusion"  # chameleon is the baseline
    dim: int = 64  # width of the transformer
    n_layers: int = 4  # number of transformer blocks
    n_heads: int = 4  # attention heads per block
    # DEVIATION: the paper's Transfusion does not normalise queries and keys (--no-qk-norm).
    qk_norm: bool = True  # normalise queries and keys
    bidirectional: bool = True  # the patches of an image see each other; off: causal attention only
    target: Literal["eps", "x0"] = "x0"  # what the model predicts from a noised image
    t_power: float = 2.0  # t = u^(1 / t_power), u uniform: 1 is uniform, higher is noisier
    patch_encoder: Literal["linear", "unet"] = "linear"  # between latents and transformer
    lambda_ddpm: float = 5.0  # weight of the diffusion loss, as in the paper
    noise_cap: float = 0.5  # largest training t of a document's first image, if something follows
    image_size: int = 32  # pixels per side of a picture
    latent_size: int = 8  # resolution of an image: latents per side
    latent_channels: int = 4  # channels of the latents
    patch_size: int = 2  # latents per side of a patch
    vae_dim: int = 24  # channels of the VAE at half the resolution of the picture

    def __post_init__(self):
        sizes = self.dim, self.n_layers, self.n_heads, self.patch_size, self.latent_channels
        if min(*sizes, self.vae_dim) < 1:
            raise ValueError("dim, n_layers, n_heads and the sizes must be at least 1")
        if not 0 < self.t_power < math.inf or not 0 <= self.noise_cap <= 1:
            raise ValueError("t_power must be more than 0, and noise_cap from 0 to 1")
        self.grid = self.latent_size // self.patch_size  # patches per side of an image
        self.n_patches = self.grid**2
        self.latent_shape = (self.latent_channels, self.latent_size, self.latent_size)
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim ({self.dim}) must be a multiple of 2 * n_heads")
        if self.grid * self.patch_size != self.latent_size:
            raise ValueError(f"patch_size ({self.patch_size}) must divide latent_size")
        if self.patch_encoder == "unet" and self.patch_size not in (1, 2, 4, 8, 16):
            raise ValueError(f"patch_size ({self.patch_size}) must be a power of 2 for a U-Net")
        if self.image_size not in [self.latent_size * 2**n for n in range(1, 9)]:
            raise ValueError(f"image_size ({self.image_size}) must be latent_size * 2, 4, 8, ...")

# ---- Documents -----------------------------------------------------------------------------------

# The special tokens. The model never has to predict the first four.
PAD, BOS, EOI, PATCH, BOI, EOS = range(6)
N_NEVER_PREDICTED, N_SPECIAL = 4, 6  # text tokens are numbered from N_SPECIAL

def pack(documents, cfg, device):
    """Documents -> tokens (B, T) and images (M, C, H, W).

    A document is a list, in reading order, of text tokens (int) and images, float (C, H, W). The
    baseline Chameleon has discrete images: the tokens of their patches, int (N,).
    """
    rows, images = [], []
    for document in documents:
        row = [BOS]
        for item in document:
            if isinstance(item, int):
                row.append(item)
            elif item.is_floating_point():
                row += [BOI] + [PATCH] * cfg.n_patches + [EOI]
                images.append(item.to(device))
            else:
                row += [BOI, *item.tolist(), EOI]
        rows.append([*row, EOS])
    rows = [torch.tensor(row, device=device) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    images = torch.stack(images) if images else torch.zeros(0, *cfg.latent_shape, device=device)
    return tokens, images

def next_tokens(tokens):
    """Row "predicts" of the tables above: tokens (B, T) -> the token after each position but the
    last, and whether it has an LM loss, both (B, T - 1).
    """
    targets = tokens[:, 1:]
    return targets, targets >= N_NEVER_PREDICTED

def attention_mask(tokens, bidirectional=True):
    """Section 3, "Transfusion attention": may the query (row) see the key (column)?

    tokens (B, T) -> bool (B, 1, T, T), the same for all heads. Padding needs no rule of its own: it
    is on the right, so causal attention already hides it.
    """
    T = tokens.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    # For each position: 1, 2, ... in the patches of the first, second, ... image, and 0 elsewhere.
    image_number = (tokens == BOI).cumsum(1) * (tokens == PATCH)
    same_image = image_number[:, :, None] == image_number[:, None, :]
    same_image = same_image & (image_number > 0)[:, None, :]  # two zeros are not the same image
    return (causal | (same_image & bidirectional))[:, None]

# ---- Diffusion -----------------------------------------------------------------------------------

def noise_levels(u, cfg):
    """Numbers u from 0 to 1 -> noise levels t. In training, u is random and uniform. In sampling, u
    falls from 1 to 0 in equal steps.

    NOT STATED: the distribution of t. DDPM's is uniform, as here with t_power = 1. With 2, half of
    the levels are above 0.71.
    """
    return u ** (1 / cfg.t_power)

def alpha_bar(t):
    """The share of the variance of x_t that is signal: noise levels t (M,) -> (M, 1, 1, 1).

    Cosine schedule (section 2.2): sqrt(alpha_bar) = cos(t * pi / 2). Here t is continuous; the
    paper's timestep is 1000 t. The clamp prevents division by zero.
    """
    return torch.cos(t * math.pi / 2).square().clamp(1e-6, 1 - 1e-6)[:, None, None, None]

def signal_and_noise(t):
    """The scales a and s in x_t = a x0 + s eps. a^2 + s^2 = 1, and x0 and x_t have variance 1."""
    return alpha_bar(t).sqrt(), (1 - alpha_bar(t)).sqrt()

def q_sample(x0, eps, t):
    """Section 2.2: add noise eps ~ N(0, 1) to images x0, both (M, C, H, W), at levels t (M,)."""
    a, s = signal_and_noise(t)
    return a * x0 + s * eps

def predicted_x0(xt, pred, t, target):
    """The image x0 that a prediction means: x0 itself, or x_t = a x0 + s eps solved for x0.

    DEVIATION: the paper predicts eps (--target eps; DDPM's uniform t goes with it: --t-power 1). At
    this size, a model that predicts x0 learns to draw in far fewer training steps (data/README.md).
    The reason lies near t = 1, where the text decides what is drawn. There x_t is almost eps, so a
    model can predict eps well without reading the text. It cannot predict x0 without the text.
    """
    a, s = signal_and_noise(t)
    return pred if target == "x0" else (xt - s * pred) / a

def p_sample(xt, x0, t, t_next, eta):
    """One denoising step, from t to t_next < t, given the predicted x0.

    x_t and x0 determine the noise eps. With the same eps, x0 is noised again, but to t_next: this
    is DDIM, eta = 0. With eta > 0, fresh noise z of standard deviation sigma replaces a part of it:
        x_next = sqrt(ab_next) x0 + sqrt(1 - ab_next - sigma^2) eps + sigma z
    so that the variance of all noise is still 1 - ab_next. The sigma below with eta = 1 makes this
    DDPM's ancestral sampler (arXiv 2010.02502, equations 12 and 16). NOT STATED: the paper's.
    """
    ab, ab_next = alpha_bar(t), alpha_bar(t_next)
    eps = (xt - ab.sqrt() * x0) / (1 - ab).sqrt()
    sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt()
    kept = (1 - ab_next - sigma**2).clamp(min=0).sqrt()  # the clamp is for rounding errors
    return ab_next.sqrt() * x0 + kept * eps + sigma * torch.randn(xt.shape, device=xt.device)

def guide(conditional, unconditional, guidance_scale):
    """Classifier-free guidance: move the prediction away from the one made without the text.

    A scale of 1 is no guidance. Guiding x0 is the same as guiding eps: given x_t, one is a linear
    function of the other. DEVIATION: the scale is 2; the paper's is 3 or 5 (--guidance-scale).
    NOT STATED: how often the text is dropped in training (here --unconditional-share 0.1).
    """
    return unconditional + guidance_scale * (conditional - unconditional)

def without_text(documents):
    """The unconditional documents. Only text is dropped: the image to edit stays."""
    return [[item for item in document if not isinstance(item, int)] for document in documents]

# ---- Transformer: Llama (RMSNorm, RoPE, SwiGLU, no biases) ---------------------------------------

def rope(x, base=10000.0):
    """Rotary position embedding: rotate pairs of features of x (..., T, head_dim) by angles that
    grow with the position.

    In the dot product of a rotated query and a rotated key, only their distance then matters.
    Patches are counted like tokens, in raster order.
    """
    T, head_dim = x.shape[-2:]
    frequency = base ** -(torch.arange(0, head_dim, 2, device=x.device) / head_dim)
    angle = torch.arange(T, device=x.device)[:, None] * frequency  # (T, head_dim / 2)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)  # feature i forms a pair with feature i + head_dim / 2
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.q_norm = nn.RMSNorm(cfg.dim // cfg.n_heads) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(cfg.dim // cfg.n_heads) if cfg.qk_norm else nn.Identity()

    def forward(self, x, mask):
        q, k, v = [
            w(x).unflatten(2, (self.n_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
            for w in (self.wq, self.wk, self.wv)
        ]
        q = rope(self.q_norm(q.type_as(x)))  # under autocast, q and k are bf16
        k = rope(self.k_norm(k.type_as(x)))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(x.transpose(1, 2).flatten(2))  # (B, T, D)

class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden = 32 * round(cfg.dim / 12)  # 8/3 D, rounded to a multiple of 32
        self.w1 = nn.Linear(cfg.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attention_norm = nn.RMSNorm(cfg.dim)
        self.attention = Attention(cfg)
        self.ffn_norm = nn.RMSNorm(cfg.dim)
        self.ffn = FeedForward(cfg)

    def forward(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.ffn(self.ffn_norm(x))

class Llama(nn.Module):
    """What Transfusion and Chameleon have in common: the parts of a language model.

    The vocabulary has n_text special and text tokens, and, in Chameleon, codes after them.
    """

    def __init__(self, cfg, n_text, n_codes=0):
        super().__init__()
        self.cfg, self.n_text = cfg, n_text
        self.token_embedding = nn.Embedding(n_text + n_codes, cfg.dim)
        # DEVIATION: the paper mentions no embedding of the position of a patch in its image, only
        # RoPE. With this one, models of this size draw and caption more reliably.
        self.patch_position = nn.Parameter(torch.empty(cfg.n_patches, cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.dim)
        self.lm_head = nn.Linear(cfg.dim, n_text + n_codes, bias=False)

    @property
    def device(self):
        return self.lm_head.weight.device

    def embed(self, tokens):
        """Tokens (B, T) -> embeddings (B, T, D), with the position of each patch in its image."""
        is_patch = (tokens == PATCH) | (tokens >= self.n_text)  # the latter are Chameleon's codes
        position = (is_patch.cumsum(1) - 1) % self.cfg.n_patches
        return self.token_embedding(tokens) + is_patch[:, :, None] * self.patch_position[position]

    def transformer(self, x, mask):
        """Embeddings (B, T, D) and a mask (B, 1, T, T) -> (B, T, D)."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

def init_weights(model):
    """GPT-2's initialisation: N(0, 0.02^2), smaller for the last matrix of a residual branch.

    This matters most in the patch encoder and decoder. With PyTorch's own initialisation there, a
    model learns to draw and to caption clearly more slowly. As in DiT, the first predictions of
    images are zero.
    """
    for name, p in model.named_parameters():
        if name.startswith("patch_decoder.last"):
            nn.init.zeros_(p)
        elif p.dim() > 1:
            ends_branch = name.endswith(("wo.weight", "w2.weight"))
            n_branches = 2 * model.cfg.n_layers if ends_branch else 1
            nn.init.normal_(p, std=0.02 / math.sqrt(n_branches))

# ---- Linear patches ------------------------------------------------------------------------------

class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, the paper's timestep, then a small MLP: (M,) -> (M, out_dim)."""

    def __init__(self, out_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, out_dim))

    def forward(self, t):
        frequency = 1000 * 10000 ** -torch.linspace(0, 1, 64, device=t.device)  # from 1000 to 0.1
        angle = t[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

class LinearPatchEncoder(nn.Module):
    """Section 3: a linear layer for each patch, and the embedding of t.

    With linear patches, t enters the model only here. DEVIATION: the paper adds the embedding of t
    before the linear layer. There it could have only 16 dimensions, those of a patch.
    """

    def __init__(self, cfg):
        super().__init__()
        # A convolution with a stride of its kernel size applies one linear layer to every patch.
        self.linear = nn.Conv2d(cfg.latent_channels, cfg.dim, cfg.patch_size, cfg.patch_size)
        self.time = TimeEmbedding(cfg.dim)

    def forward(self, xt, t):
        patches = self.linear(xt).flatten(2).transpose(1, 2)  # (M, N, D), in raster order
        return [patches + self.time(t)[:, None, :]]  # a U-Net returns more than the patches

class LinearPatchDecoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.grid = cfg.grid
        self.last = nn.ConvTranspose2d(
            cfg.dim, cfg.latent_channels, cfg.patch_size, cfg.patch_size
        )

    def forward(self, x):
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (M, D, grid, grid)
        return self.last(x)  # (M, C, H, W)

# ---- Transfusion ---------------------------------------------------------------------------------

class Transfusion(Llama):
    def __init__(self, cfg, n_text):
        super().__init__(cfg, n_text)
        linear = LinearPatchEncoder, LinearPatchDecoder
        encoder, decoder = {"linear": linear, "unet": (UNetDown, UNetUp)}[cfg.patch_encoder]
        self.patch_encoder = encoder(cfg)
        self.patch_decoder = decoder(cfg)
        init_weights(self)

    def forward(self, tokens, xt, t):
        """Tokens (B, T) and images noised to t, (M, C, H, W) and (M,) -> logits of the next token
        (B, T, V), and the prediction of eps or x0 for each image (M, C, H, W).
        """
        x = self.embed(tokens)  # (B, T, D)
        # A U-Net also returns features that skip the transformer. Linear patches have none.
        patches, *skip = self.patch_encoder(xt, t)  # (M, N, D)

        # The patches are added to the embeddings of PATCH and of their positions. Row by row, these
        # are the patches of the first image, then those of the second, and so on.
        is_patch = tokens == PATCH
        x[is_patch] += patches.flatten(0, 1)

        x = self.transformer(x, attention_mask(tokens, self.cfg.bidirectional))
        logits = self.lm_head(x)
        pred = self.patch_decoder(x[is_patch].view(patches.shape), *skip)
        return logits, pred

    def loss(self, documents):
        """Section 3, training objective: L = L_LM + lambda * L_DDPM.

        Returns the loss and its parts, which train.py logs under their names.
        """
        cfg = self.cfg
        tokens, x0 = pack(documents, cfg, self.device)

        t = noise_levels(torch.rand(len(x0), device=self.device), cfg)  # (M,), one for each image
        # The noise cap (table 8), for an image that is first in its document (its BOI is in column
        # 1) and not last (after BOI, the N patches and EOI comes another token than EOS).
        row, column = (tokens == BOI).nonzero(as_tuple=True)
        after_image = tokens[row, column + cfg.n_patches + 2]
        is_capped = (column == 1) & (after_image != EOS)
        # NOT STATED: the distribution of a capped t. Here it is uniform.
        t = torch.where(is_capped, cfg.noise_cap * torch.rand_like(t), t)

        eps = torch.randn_like(x0)
        xt = q_sample(x0, eps, t)  # the latents are noised, not the patches
        logits, pred = self(tokens, xt, t)

        # L_LM: the mean over all positions of the batch that have a target.
        targets, has_loss = next_tokens(tokens)
        loss_lm = F.cross_entropy(logits[:, :-1][has_loss], targets[has_loss])

        # L_DDPM: the mean squared error of each image, then the mean over the images of the batch
        # (if it has any).
        target = {"eps": eps, "x0": x0}[cfg.target]
        error = (pred - target).square().mean((1, 2, 3))  # (M,)
        loss_ddpm = error.sum() / max(1, len(error))

        return loss_lm + cfg.lambda_ddpm * loss_ddpm, {"text": loss_lm, "image": loss_ddpm}

    def logits(self, documents):
        """Documents with clean images -> their tokens (B, T) and next-token logits (B, T, V).

        NOT STATED: the t of images that are given or already drawn. Here it is 0.
        """
        tokens, images = pack(documents, self.cfg, self.device)
        logits, _ = self(tokens, images, t=torch.zeros(len(images), device=self.device))
        return tokens, logits

    def predict_x0(self, documents, xt, t):
        """Predict x0 (B, C, H, W) for noisy images x_t (B, C, H, W), one to follow each document.

        All x_t have the same t (1,). Images before them are clean.
        """
        documents = [[*document, image] for document, image in zip(documents, xt)]
        tokens, images = pack(documents, self.cfg, self.device)
        last = (tokens == BOI).sum(1).cumsum(0) - 1  # index of each document's last image (B,)
        times = torch.zeros(len(images), device=self.device)
        times[last] = t
        _, pred = self(tokens, images, times)
        return predicted_x0(xt, pred[last], t, self.cfg.target)

    def draw(self, documents, steps, guidance_scale, eta, show):
        """Diffusion mode: generate an image to follow each document. Returns (B, C, H, W).

        DEVIATION: the paper takes 250 steps (--steps 250). Each step runs the model on the whole
        sequence. A key-value cache of what precedes the image would pay off only with long texts.
        """
        both = documents + without_text(documents)  # for guidance
        xt = torch.randn(len(documents), *self.cfg.latent_shape, device=self.device)
        # NOT STATED: the noise levels of the steps. Here they are spaced like those of training.
        times = noise_levels(torch.linspace(1, 0, steps + 1, device=self.device), self.cfg)
        for t, t_next in pairwise(times.split(1)):
            conditional, unconditional = self.predict_x0(both, torch.cat([xt, xt]), t).chunk(2)
            x0 = guide(conditional, unconditional, guidance_scale)
            x0 = x0.clamp(-5, 5)  # an x0 that is computed from eps can be huge near t = 1
            xt = p_sample(xt, x0, t, t_next, eta)
            show(xt)
        return xt

# ---- Generation ----------------------------------------------------------------------------------

def next_logits(model, documents):
    """Logits (B, V) of the token after each document."""
    tokens, logits = model.logits(documents)
    # `pack` ends every document with EOS. The position before it cannot see this EOS, and predicts
    # the next token.
    before_eos = tokens[:, 1:] == EOS
    return logits[:, :-1][before_eos]

def sample_tokens(logits, temperature):
    """One token for each row of logits (B, V). Temperature 0 is greedy, the paper's choice."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]

def write(model, documents, max_tokens, temperature):
    """LM mode: append text to documents, in place, until the model predicts BOI or EOS, or has
    written max_tokens. Returns the documents for which it predicted BOI. BOI itself is not
    appended: `pack` puts it before the image that follows.
    """
    wants_image = []
    for _ in range(max_tokens):
        if not documents:
            break
        logits = next_logits(model, documents)[:, : model.n_text]  # none of Chameleon's codes
        logits[:, :N_NEVER_PREDICTED] = -math.inf
        still_writing = []
        for document, token in zip(documents, sample_tokens(logits, temperature).tolist()):
            if token == BOI:
                wants_image.append(document)
            elif token != EOS:
                document.append(token)
                still_writing.append(document)
        documents = still_writing
    return wants_image

@torch.no_grad()
def generate(
    model, documents, max_tokens=64, max_images=1,
    steps=50, guidance_scale=2.0, eta=0.0,  # for diffusion mode
    temperature=0.0,  # for LM mode
    show=lambda xt: None,
):
    """Section 3, inference: continue documents, lists of tokens and images, until EOS.

    The model itself switches to diffusion mode, by predicting BOI. After a finished image, `pack`
    inserts EOI, and LM mode goes on. A document also ends after max_tokens without an image, or at
    the next BOI once it has max_images new images. `show` is called after every denoising step,
    with the images x_t.
    """
    documents = [list(document) for document in documents]  # copies, which grow below
    active = documents
    while active:
        active = write(model, active, max_tokens, temperature)
        if not active or max_images == 0:
            break
        images = model.draw(active, steps, guidance_scale, eta, show)
        for document, image in zip(active, images):
            document.append(image)
        max_images -= 1
    return documents

# ---- Tokenizer: text to tokens and back ----------------------------------------------------------

class Tokenizer:
    """A known word, with the space before it, is one token. All other text is UTF-8 bytes.

    Encoding puts a space before the text, and decoding removes it. If only " a" and " red" are
    known, "a red dog" becomes the tokens " a" and " red", and one token for each byte of " dog".
    """

    def __init__(self, words):
        self.words = list(words)
        pieces = [word if word in ".,;:!?" else " " + word for word in self.words]
        self.bytes_of = [b""] * N_SPECIAL + [bytes([i]) for i in range(256)]
        self.bytes_of += [piece.encode() for piece in pieces]
        self.token_of = {piece: token for token, piece in enumerate(self.bytes_of)}

    def __len__(self):
        return len(self.bytes_of)

    @staticmethod
    def split(text):
        """A list of pieces: words with the space before them, and all other characters."""
        return re.findall(r" ?[^\s.,;:!?]+|.", " " + text, re.DOTALL)

    def encode(self, text):
        """str -> list of tokens."""
        tokens = []
        for piece in self.split(text):
            piece = piece.encode(errors="replace")
            parts = [piece] if piece in self.token_of else [bytes([byte]) for byte in piece]
            tokens += [self.token_of[part] for part in parts]
        return tokens

    def decode(self, tokens):
        """List of tokens -> str, the inverse of encode. Bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.bytes_of[token] for token in tokens)
        return text.removeprefix(b" ").decode(errors="replace")

def encode(documents, tokenizer, vae):
    """Documents of str and pictures, uint8 (H, W, 3) -> documents of tokens and images."""
    parts = [part for document in documents for part in document]
    pictures = [torch.as_tensor(part) for part in parts if not isinstance(part, str)]
    batches = []
    if pictures:  # 512 of 32 x 32 pixels at a time, and fewer of larger ones
        batches = torch.stack(pictures).split(max(1, 2**19 // pictures[0].shape[0] ** 2))
    images = iter([image for batch in batches for image in vae.encode(batch)])
    encoded = []
    for document in documents:
        items = []
        for part in document:
            items += tokenizer.encode(part) if isinstance(part, str) else [next(images)]
        encoded.append(items)
    return encoded

# ---- VAE: pictures to latents and back -----------------------------------------------------------

class VAE(nn.Module):
    """A small convolutional VAE, trained before the transformer and then frozen.

    Pictures are uint8 pixels (M, H, W, 3). DEVIATION: the paper's VAE has 86M parameters.
    """

    def __init__(self, cfg):
        super().__init__()
        n_halvings = int(math.log2(cfg.image_size / cfg.latent_size))
        widths = [cfg.vae_dim * 2**i for i in range(n_halvings)]  # 24 (16 x 16) and 48 (8 x 8)
        down, up = [], []
        for n_in, n_out in pairwise([3, *widths]):
            down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.SiLU()]
            up = [nn.SiLU(), nn.ConvTranspose2d(n_out, n_in, 4, stride=2, padding=1), *up]
        wide = widths[-1]
        self.encoder = nn.Sequential(
            *down,
            nn.Conv2d(wide, wide, 3, padding=1), nn.SiLU(),
            nn.Conv2d(wide, 2 * cfg.latent_channels, 1),  # mean and log variance of the posterior
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(cfg.latent_channels, wide, 3, padding=1), nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            *up,
        )
        # Makes latents of mean 0 and variance 1, because noise levels are relative to variance 1.
        # After training, call vae.eval(), which fixes the statistics.
        # NOT STATED: how the paper scales its latents.
        self.normalise = nn.BatchNorm2d(cfg.latent_channels, affine=False)

    def to_input(self, pictures):
        """uint8 (M, H, W, 3) -> float (M, 3, H, W) in [-1, 1], on the device of the VAE."""
        return pictures.permute(0, 3, 1, 2).to(self.normalise.running_mean) / 127.5 - 1

    def posterior(self, x):
        """The mean and the log variance of the latents, both (M, C, h, w)."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return self.normalise(mean), log_var

    def loss(self, pictures, kl_weight=1e-3):
        """Squared error of the reconstruction + kl_weight * KL(posterior, N(0, 1)), averaged."""
        x = self.to_input(pictures)
        mean, log_var = self.posterior(x)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        # The means are normalised already. The KL keeps the variance from shrinking to 0.
        kl = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        return F.mse_loss(self.decoder(z), x) + kl_weight * kl

    @torch.no_grad()
    def encode(self, pictures):
        """uint8 (M, H, W, 3) -> latents (M, C, h, w): the mean of the posterior."""
        return self.posterior(self.to_input(pictures))[0]

    @torch.no_grad()
    def decode(self, latents):
        """Latents (M, C, h, w) -> uint8 (M, H, W, 3)."""
        x = self.decoder(latents).clamp(-1, 1)
        return ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

# ---- U-Net patches -------------------------------------------------------------------------------

UNET_DIM, TIME_DIM = 32, 128  # channels at the latents' resolution; dimension of the embedding of t

def unet_widths(cfg):
    """Channels at the resolution of the latents, at half of it, and so on, down to the patches."""
    return [UNET_DIM * 2**i for i in range(1 + int(math.log2(cfg.patch_size)))]

def norm_conv(n_in, n_out):
    return nn.Sequential(nn.GroupNorm(1, n_in), nn.SiLU(), nn.Conv2d(n_in, n_out, 3, padding=1))

class ResBlock(nn.Module):
    """Like DDPM's residual block: two convolutions, with the embedding of t added in between."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1 = norm_conv(n_in, n_out)
        self.time = nn.Linear(TIME_DIM, n_out)
        self.conv2 = norm_conv(n_out, n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x, time):
        h = self.conv1(x) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(h)

class UNetDown(nn.Module):
    """The paper's better patch encoder (tables 5 to 7): the first half of a U-Net.

    Its features at all resolutions, and the embedding of t, skip the transformer and go to the
    second half. Unlike linear patches, its convolutions mix neighbouring patches.
    """

    def __init__(self, cfg):
        super().__init__()
        widths = unet_widths(cfg)
        self.time = TimeEmbedding(TIME_DIM)
        first = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        halvings = [nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.convs = nn.ModuleList([first, *halvings])
        self.blocks = nn.ModuleList(ResBlock(width, width) for width in widths)
        self.last = nn.Linear(widths[-1], cfg.dim)

    def forward(self, x, t):
        time, features = self.time(t), []
        for conv, block in zip(self.convs, self.blocks):
            x = block(conv(x), time)
            features.append(x)  # (M, width, H / 2^i, W / 2^i)
        patches = self.last(x.flatten(2).transpose(1, 2))  # (M, N, D)
        return patches, time, features

class UNetUp(nn.Module):
    """The second half of the U-Net: from the transformer's output to a prediction (M, C, H, W)."""

    def __init__(self, cfg):
        super().__init__()
        self.grid, widths = cfg.grid, unet_widths(cfg)[::-1]
        self.first = nn.Linear(cfg.dim, widths[0])
        self.blocks = nn.ModuleList(ResBlock(2 * width, width) for width in widths)
        doublings = [nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.last = nn.Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)
        self.convs = nn.ModuleList([*doublings, nn.Identity()])

    def forward(self, x, time, features):
        x = self.first(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        for block, conv, skip in zip(self.blocks, self.convs, reversed(features)):
            x = conv(block(torch.cat([x, skip], dim=1), time))
        return self.last(x)  # (M, C, H, W)

# ---- Chameleon: the baseline, with discrete images -----------------------------------------------

N_LEVELS, CODE_DIM = 5, 4  # a code stands for CODE_DIM integers from -2 to 2
N_CODES = N_LEVELS**CODE_DIM  # 625
CODE_TEMPERATURE = 0.5  # 1 draws worse, and 0 with less variety

class QuantisedVAE(VAE):
    """A VAE whose latents, one for each patch, are rounded to integers from -2 to 2.

    It has no noise and no KL loss. An image becomes N codes, which are tokens, numbered after those
    of text. The integers of a latent are the digits of its code, a number in base 5.

    DEVIATION: the paper learns a codebook of 16,384 vectors, and an image has a code for each of
    its latents. Here the codebook is fixed: all points of a grid (FSQ, arXiv 2309.15505). And an
    image has a code for each patch, as many as Transfusion has patches (--patch-size 1: 64 codes).
    """

    def __init__(self, cfg, n_text):
        super().__init__(replace(cfg, latent_size=cfg.grid, patch_size=1, latent_channels=CODE_DIM))
        self.n_text = n_text
        place_values = N_LEVELS ** torch.arange(CODE_DIM)  # 1, 5, 25, 125
        self.register_buffer("place_values", place_values[:, None, None])

    def quantise(self, x):
        mean, _ = self.posterior(x)
        z = mean.tanh() * (N_LEVELS // 2)
        error = (z.round() - z).detach()  # straight-through: rounded, with the gradient of z
        if self.training and torch.rand(()) < 0.5:
            error = torch.rand_like(z) - 0.5  # noise of the same size, without which some runs fail
        return z + error

    def loss(self, pictures):
        x = self.to_input(pictures)
        return F.mse_loss(self.decoder(self.quantise(x)), x)

    @torch.no_grad()
    def encode(self, pictures):
        """uint8 (M, H, W, 3) -> codes (M, N) int64."""
        digits = self.quantise(self.to_input(pictures)).round().long() + N_LEVELS // 2
        return self.n_text + (digits * self.place_values).sum(1).flatten(1)

    def decode(self, codes):
        """Codes (M, N) -> uint8 (M, H, W, 3)."""
        grid = math.isqrt(codes.shape[1])
        codes = (codes - self.n_text).unflatten(1, (1, grid, grid))  # (M, 1, grid, grid)
        digits = codes // self.place_values % N_LEVELS
        return super().decode((digits - N_LEVELS // 2).float())

class Chameleon(Llama):
    """The discrete baseline (arXiv 2405.09818): a language model of text and codes.

    Documents and transformer are those of Transfusion. But there is only the next-token loss,
    attention is causal, and an image is generated by sampling its codes. There is no diffusion.

    DEVIATION: for stability, the paper's Chameleon has QK-norm, a z-loss, and norms after its
    layers. Ours has the first two, but keeps the norms before the layers, as in Llama.
    """

    def __init__(self, cfg, n_text):
        super().__init__(cfg, n_text, N_CODES)
        init_weights(self)

    def logits(self, documents):
        """Documents -> their tokens (B, T) and next-token logits (B, T, V), for text and codes."""
        tokens, _ = pack(documents, self.cfg, self.device)
        mask = attention_mask(tokens, bidirectional=False)
        x = self.transformer(self.embed(tokens), mask)
        return tokens, self.lm_head(x)

    def loss(self, documents, z_weight=1e-5):
        """The next-token loss of text and codes, and a z-loss: log(Z)^2, with Z the denominator of
        the softmax.
        """
        tokens, logits = self.logits(documents)
        targets, has_loss = next_tokens(tokens)
        logits, targets = logits[:, :-1][has_loss], targets[has_loss]
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = losses.mean() + z_weight * logits.logsumexp(-1).square().mean()

        is_code = targets >= self.n_text
        loss_codes = losses[is_code].sum() / is_code.sum().clamp(min=1)
        return loss, {"text": losses[~is_code].mean(), "image": loss_codes}

    def draw(self, documents, steps, guidance_scale, eta, show):
        """Sample an image to follow each document, code by code. Returns codes (B, N).

        `steps`, `eta` and `show` are for diffusion, and have no effect.
        """
        both = documents + without_text(documents)  # for guidance
        both = [[*document, BOI] for document in both]
        for _ in range(self.cfg.n_patches):
            conditional, unconditional = next_logits(self, both).chunk(2)
            logits = guide(conditional, unconditional, guidance_scale)[:, self.n_text :]
            codes = self.n_text + sample_tokens(logits, CODE_TEMPERATURE)
            for document, code in zip(both, [*codes.tolist(), *codes.tolist()]):
                document.append(code)
        drawn = [document[-self.cfg.n_patches :] for document in both[: len(documents)]]
        return torch.tensor(drawn, device=self.device)
