"""Transfusion in one file: one transformer predicts the next token of text and denoises images.

Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model",
arXiv 2408.11039.

Text and images share one sequence. Text is a run of discrete tokens, trained with next-token
prediction. An image is a run of continuous vectors, the patches of its VAE latents, trained with
diffusion. BOI (beginning of image) and EOI (end of image) surround it. Attention is causal, except
that the patches of one image all see each other. To generate, the model writes text until it
predicts BOI; then it denoises an image and carries on with text.

A document is a Python list of parts in reading order. A part is a str or an image. In this file
"picture" means pixels, and "image" means the VAE latents of a picture, normalised to mean 0 and
variance 1. This is how the model sees three documents in training, with images of two patches. (A
document may also be text alone.) The row "predicts" shows the target of the LM loss at each
position, and "-" where there is none. The row "t" shows the noise level of each image.

    ["a red circle.", image]        draw what a caption says
        input     BOS  a    red     circle  .    BOI  patch  patch  EOI  EOS
        predicts  a    red  circle  .       BOI  -    -      -      EOS  -
        t                                             t1     t1

    [image, "a red circle."]        caption an image
        input     BOS  BOI  patch  patch  EOI  a    red     circle  .    EOS
        predicts  BOI  -    -      -      a    red  circle  .       EOS  -
        t                   t1     t1

    [image, "make it green.", image]        edit an image
        input     BOS  BOI  patch  patch  EOI  make  it     green  .    BOI  patch  patch  EOI  EOS
        predicts  BOI  -    -      -      make it    green  .      BOI  -    -      -      EOS  -
        t                   t1     t1                                        t2     t2

BOI is always followed by the N patches of the image and then EOI. `pack` inserts them, so the model
does not have to predict them. At a patch, the output of the transformer is used to denoise that
same patch, not the next one. (`train.py --task edit` also excludes the instruction from the LM
loss, because it is written by the user, not the model.)

Each image has its own noise level t, from 0 (clean) to 1 (pure noise), and every noised image has a
diffusion loss. An image that comes first, with something after it, is there to be read: there is
nothing in pure noise to caption or edit. So its t is at most 0.5, the noise cap. All other images
are there to be drawn, which starts from pure noise, so they can have any t up to 1. (If text
follows such an image, it is sometimes trained after pure noise.)

For classifier-free guidance, the model must also learn to draw without text. So train.py removes
the text from some of the documents: [text, image] becomes [image].

In code, one training step and one generation, with latents (C, H, W) for images:

    loss, loss_lm, loss_ddpm = model.loss(model.training_batch(documents))
    documents = generate(model, [["a red circle."]])

The section "Generation" completes the method. The rest of the file contains the tokenizer, the VAE,
U-Net patches (the paper's alternative to linear ones), the baseline Chameleon, and micro-batches.
`DEVIATION:` marks a difference from the paper, and names the option (if any) that restores the
paper's choice. `NOT STATED:` marks what the paper leaves open.

Shapes: B documents, T positions, M images in the batch, C x H x W latents (by default 4 x 8 x 8),
N patches per image (4 x 4 = 16), P numbers per patch (4 x 2 x 2 = 16), D width of the transformer
(96), V size of the vocabulary.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ---- Configuration -------------------------------------------------------------------------------

@dataclass
class Config:
    """Every field is an option of train.py, and the comment beside it is its help text.

    Skim them for now: each is explained where it is used.
    """
    model: str = "transfusion"  # or chameleon, the baseline with discrete images
    dim: int = 96  # width of the transformer
    n_layers: int = 4  # number of transformer blocks
    n_heads: int = 6  # attention heads per block
    # DEVIATION: the paper's Llama block has no QK-norm (--no-qk-norm).
    qk_norm: bool = True  # normalise queries and keys; Chameleon always does
    bidirectional: bool = True  # the patches of an image see each other; off: causal attention only
    target: str = "x0"  # what the model predicts from a noised image: eps, v or x0
    t_power: float = 3.0  # of training times t: 1 is uniform, higher values favour noisier images
    patch_encoder: str = "linear"  # between latents and transformer: linear or unet
    unet_dim: int = 32  # channels of the U-Net at full resolution, doubled at each halving
    patch_position: bool = True  # learned embedding of each patch's position in its image
    lambda_ddpm: float = 5.0  # weight of the diffusion loss, as in the paper
    noise_cap: float = 0.5  # largest training t of an image that comes first in a longer document
    instruction_loss: bool = True  # LM loss on text between two images; --task edit turns it off
    image_size: int = 32  # pixels per side of a picture
    latent_size: int = 8  # latents per side of an image
    latent_channels: int = 4  # channels of the latents
    patch_size: int = 2  # latents per side of a patch
    vae_dim: int = 24  # channels of the VAE at half the resolution of the picture
    vae_kl: float = 1e-3  # weight of the VAE's KL loss
    code_dim: int = 4  # Chameleon: length of each codebook vector
    code_levels: int = 5  # Chameleon: values that each of its entries can take
    z_loss: float = 1e-5  # Chameleon: weight of log(Z)^2, with Z the denominator of the softmax

    def __post_init__(self):
        self.grid = self.latent_size // self.patch_size  # patches per side of an image
        self.n_patches = self.grid**2
        self.patch_dim = self.latent_channels * self.patch_size**2
        self.latent_shape = (self.latent_channels, self.latent_size, self.latent_size)

# ---- Documents and batches -----------------------------------------------------------------------

SPECIAL_TOKENS = ["PAD", "BOS", "EOS", "BOI", "EOI", "PATCH"]
PAD, BOS, EOS, BOI, EOI, PATCH = range(len(SPECIAL_TOKENS))
N_SPECIAL = len(SPECIAL_TOKENS)  # ids from here up are text tokens

NO_LOSS = -100  # the "-" of the tables above; F.cross_entropy ignores it

@dataclass
class Batch:
    """Packed documents: the rows of the tables above, and all images in one flat list."""
    tokens: torch.Tensor  # (B, T) int64: token ids; PATCH stands for a patch; PAD is on the right
    targets: torch.Tensor  # (B, T) int64: the token that each position has to predict, or NO_LOSS
    image_id: torch.Tensor  # (B, T) int64: for a patch, the index of its image; elsewhere -1
    images: torch.Tensor  # (M, C, H, W): in reading order, noised to t (Chameleon: codes (M, N))
    t: torch.Tensor  # (M,): the noise level of each image
    image_targets: torch.Tensor  # (M, C, H, W): what the model has to predict for each image
    # The denominators of the two losses: the number of positions with an LM loss, and of images
    # with a diffusion loss. They are stored because a micro-batch keeps those of the whole batch.
    n_text_losses: torch.Tensor = None
    n_image_losses: torch.Tensor = None

def pack(documents, tokenizer, cfg, device="cpu", end=True):
    """Pack documents, whose parts are str or images (C, H, W). If `end`, each ends with EOS."""
    rows, images = [], []
    for document in documents:
        row = [(BOS, False, -1)]  # for each token: (token, is it predicted?, image_id)
        for i, part in enumerate(document):
            if isinstance(part, str):
                is_predicted = cfg.instruction_loss or not is_instruction(document, i)
                row += [(token, is_predicted, -1) for token in tokenizer.encode(part)]
            else:
                row.append((BOI, True, -1))
                row += [(PATCH, False, len(images))] * cfg.n_patches
                row.append((EOI, False, -1))
                images.append(part)
        if end:
            row.append((EOS, True, -1))
        rows.append(row)

    longest = max(len(row) for row in rows)
    rows = [row + [(PAD, False, -1)] * (longest - len(row)) for row in rows]
    tokens, is_predicted, image_id = torch.tensor(rows, device=device).unbind(-1)  # (B, T) each
    targets = torch.where(is_predicted.bool(), tokens, NO_LOSS)
    targets = F.pad(targets[:, 1:], (0, 1), value=NO_LOSS)  # position i predicts token i + 1
    images = [image.to(device) for image in images]
    images = torch.stack(images) if images else torch.zeros(0, *cfg.latent_shape, device=device)
    t = torch.zeros(len(images), device=device)
    # So far the images are clean. `training_batch` replaces images, t and image_targets.
    return Batch(tokens, targets, image_id, images, t, image_targets=images)

def is_instruction(document, i):
    """Is part i of the document text that lies between two images?"""
    is_image = [not isinstance(part, str) for part in document]
    return any(is_image[:i]) and any(is_image[i + 1 :])

def attention_mask(image_id, bidirectional=True):
    """Section 3, "Transfusion attention": may the query (row) see the key (column)?

    image_id (B, T) -> bool (B, 1, T, T), the same for all heads. Padding needs no rule of its own:
    it is on the right, so causality already hides it from everything else.
    """
    T = image_id.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=image_id.device).tril()
    same_image = image_id[:, :, None] == image_id[:, None, :]  # (B, T, T)
    same_image = same_image & (image_id >= 0)[:, :, None]  # -1 means no image
    mask = (causal | same_image) if bidirectional else causal.expand_as(same_image)
    return mask[:, None]

# ---- Diffusion -----------------------------------------------------------------------------------

def alpha_bar(t):
    """The fraction of the variance of x_t that is signal: times (M,) -> (M, 1, 1, 1).

    Cosine schedule (section 2.2): sqrt(alpha_bar) = cos(t * pi / 2). Our t is continuous; the
    paper's timestep is 1000 t. The clamp avoids division by zero. Any schedule that falls from 1 to
    0 would work, but the defaults of t_power and noise_cap were chosen for this one.
    """
    return torch.cos(t * math.pi / 2).square().clamp(1e-6, 1 - 1e-6)[:, None, None, None]

def signal_and_noise(t):
    """The scales a and s in x_t = a x0 + s eps, both (M, 1, 1, 1). The sum a^2 + s^2 is 1."""
    return alpha_bar(t).sqrt(), (1 - alpha_bar(t)).sqrt()

def q_sample(x0, eps, t):
    """Section 2.2: add noise eps ~ N(0, 1) to images x0, both (M, C, H, W), for times t (M,)."""
    a, s = signal_and_noise(t)
    return a * x0 + s * eps

def diffusion_target(x0, eps, t, target):
    """What the model has to predict from x_t: the noise eps, the image x0, or the mixture v
    (v-prediction, arXiv 2202.00512). Given x_t, any one of them determines the other two.

    DEVIATION: the paper predicts eps (--target eps). With x0, a model of this size learns to draw
    in far fewer training steps (data/README.md). The reason lies near t = 1, where the text decides
    what is drawn. There x_t is almost equal to eps, so the model can predict eps well without
    reading the text. It cannot predict x0 that way. (Since eps = (x_t - a x0) / s, an error in x0
    is only a / s times as large in eps, and near t = 1 the signal a is almost 0.)
    """
    a, s = signal_and_noise(t)
    if target == "eps":
        return eps
    if target == "v":
        return a * eps - s * x0
    return x0

def predicted_x0(xt, pred, t, target):
    """Solve x_t = a x0 + s eps for x0, given the prediction of eps, v or x0."""
    a, s = signal_and_noise(t)
    if target == "eps":
        return (xt - s * pred) / a
    if target == "v":  # a x_t - s v = (a^2 + s^2) x0, and a^2 + s^2 = 1
        return a * xt - s * pred
    return pred

def p_sample(xt, pred, t, t_next, target, eta=0.0):
    """One denoising step, from t to t_next < t, each (M,) or (1,).

    The prediction gives estimates of x0 and eps. We noise x0 again, but only to t_next, and with
    the same eps: this is DDIM (arXiv 2010.02502), the default. With eta > 0, a part of eps is
    replaced by fresh noise. With eta = 1 this is the ancestral sampler of DDPM.

    NOT STATED: which sampler the paper uses. DEVIATION: the paper takes 250 steps; here 25 to 50
    DDIM steps are enough (250 steps of DDPM: sample.py --steps 250 --eta 1).
    """
    a, s = signal_and_noise(t)
    x0 = predicted_x0(xt, pred, t, target)
    x0 = x0.clamp(-5, 5)  # for target eps, which was divided by a tiny a if t is near 1
    eps = (xt - a * x0) / s  # so that a x0 + s eps is still x_t
    # Equation 16 of DDIM: sigma^2 = eta^2 (1 - ab_next) / (1 - ab) (1 - ab / ab_next). Divided by
    # 1 - ab_next, the variance of all noise at t_next, it is the fraction that is fresh.
    ab, ab_next = alpha_bar(t), alpha_bar(t_next)
    fresh = eta**2 * (1 - ab / ab_next) / (1 - ab)
    eps = (1 - fresh).sqrt() * eps + fresh.sqrt() * torch.randn_like(xt)
    return q_sample(x0, eps, t_next)

def training_times(n, t_power, device):
    """Random noise levels t (n,) for training images.

    NOT STATED: their distribution. In DDPM it is uniform (t_power = 1). A larger t_power favours
    noisy images: with 3, half of the times are above 0.79.
    """
    return torch.rand(n, device=device) ** (1 / t_power)

def sampling_times(steps, t_power):
    """The noise levels that denoising visits, from 1 to 0: (steps + 1,).

    NOT STATED: their spacing. Here most of them are near 1, as in training: they are evenly spaced
    quantiles of the training times. With t_power = 3, 50 steps visit 1, 0.993, ..., 0.27, 0.
    """
    return torch.linspace(1, 0, steps + 1) ** (1 / t_power)

def unconditional(document):
    """The document without its text. Of an edit, both images stay."""
    return [part for part in document if not isinstance(part, str)]

def guide(with_text, without_text, guidance_scale):
    """Classifier-free guidance: push the prediction away from the one made without the text.

    `without_text` is the prediction for the same x_t in the unconditional document. A scale of 1 is
    no guidance. Guiding x0 or v amounts to guiding eps: given x_t, they determine each other by a
    linear equation. To teach the model to predict without text, train.py strips the text from a
    random tenth of the documents that have text before an image (--unconditional-share). They are
    trained on like any others. NOT STATED: that share. DEVIATION: the scale is 2; the paper uses 3
    or 5 (--guidance-scale).
    """
    return without_text + guidance_scale * (with_text - without_text)

# ---- Transformer: Llama (RMSNorm, RoPE, SwiGLU, no biases) ---------------------------------------

def rope(x, base=10000.0):
    """Rotary position embedding: rotate pairs of features of x (..., T, head_dim) by angles that
    grow with the position.

    The product of a rotated query and a rotated key then depends only on the distance between them.
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
        head_dim = cfg.dim // cfg.n_heads
        self.q_norm = nn.RMSNorm(head_dim) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if cfg.qk_norm else nn.Identity()

    def forward(self, x, mask):
        B, T, D = x.shape
        q = self.wq(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, heads, T, head_dim)
        k = self.wk(x).view(B, T, self.n_heads, -1).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_heads, -1).transpose(1, 2)
        q = rope(self.q_norm(q))
        k = rope(self.k_norm(k))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(x.transpose(1, 2).reshape(B, T, D))

class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden = 32 * max(1, round(cfg.dim * 8 / 3 / 32))  # 8/3 D, a multiple of 32
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

class Transformer(nn.Module):
    """The trunk of Transfusion and Chameleon: embeddings (B, T, D) and a mask -> (B, T, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.dim)

    def forward(self, x, mask):
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

def init_matrices(module, n_layers):
    """GPT-2's initialisation: N(0, 0.02^2), smaller for the last matrix of a residual branch."""
    for name, p in module.named_parameters():
        if p.dim() == 2:
            ends_branch = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layers) if ends_branch else 0.02)

# ---- Linear patches ------------------------------------------------------------------------------

def patchify(latents, size):
    """(M, C, H, W) -> (M, N, P): size x size squares of latents, flattened, in raster order."""
    M, C, H, W = latents.shape
    squares = latents.reshape(M, C, H // size, size, W // size, size)
    squares = squares.permute(0, 2, 4, 3, 5, 1)  # (M, H / size, W / size, size, size, C)
    return squares.reshape(M, (H // size) * (W // size), size * size * C)

def unpatchify(patches, size, grid):
    """The inverse of patchify for images of grid x grid patches: (M, N, P) -> (M, C, H, W)."""
    M, N, P = patches.shape
    C = P // size**2
    squares = patches.reshape(M, grid, grid, size, size, C)
    squares = squares.permute(0, 5, 1, 3, 2, 4)  # (M, C, grid, size, grid, size)
    return squares.reshape(M, C, grid * size, grid * size)

class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, the paper's timestep, then a small MLP: (M,) -> (M, out_dim)."""

    def __init__(self, out_dim, n_frequencies=64):
        super().__init__()
        frequency = 1000 * 10000 ** -torch.linspace(0, 1, n_frequencies)  # from 1000 to 0.1
        self.register_buffer("frequency", frequency, persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * n_frequencies, 128), nn.SiLU(), nn.Linear(128, out_dim)
        )

    def forward(self, t):
        angle = t[:, None] * self.frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

class LinearPatchEncoder(nn.Module):
    """Section 3: add the embedding of t (P numbers) to every patch, then apply one linear layer.

    With this encoder, t enters the model only here.
    """

    def __init__(self, cfg):
        super().__init__()
        self.patch_size = cfg.patch_size
        self.time = TimeEmbedding(cfg.patch_dim)
        self.linear = nn.Linear(cfg.patch_dim, cfg.dim)

    def forward(self, latents, t):
        patches = patchify(latents, self.patch_size)  # (M, N, P)
        x = self.linear(patches + self.time(t)[:, None, :])  # (M, N, D)
        return x, None  # a U-Net returns its skip connections here, for the decoder

class LinearPatchDecoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.patch_size, self.grid = cfg.patch_size, cfg.grid
        self.linear = nn.Linear(cfg.dim, cfg.patch_dim)

    def forward(self, x, skip):
        return unpatchify(self.linear(x), self.patch_size, self.grid)  # (M, C, H, W)

# ---- Transfusion ---------------------------------------------------------------------------------

def next_token_losses(logits, targets):
    """-log P(target) at each position: (B, T, V) and (B, T) -> (B, T), 0 where there is no loss."""
    logits = logits.transpose(1, 2)
    return F.cross_entropy(logits, targets, ignore_index=NO_LOSS, reduction="none")

def is_capped(documents):
    """For each image, in reading order: is it first in its document, with something after it?

    An image on its own is not capped: it is an unconditional document, and the model must learn to
    draw it.
    """
    return [
        position == 0 and len(document) > 1
        for document in documents
        for position, part in enumerate(document)
        if not isinstance(part, str)
    ]

class Transfusion(nn.Module):
    def __init__(self, cfg, tokenizer):
        super().__init__()
        assert cfg.target in ("eps", "v", "x0") and cfg.patch_encoder in ("linear", "unet")
        self.cfg, self.tokenizer = cfg, tokenizer
        self.token_embedding = nn.Embedding(len(tokenizer), cfg.dim)
        # DEVIATION: patches have a learned embedding of their position in the image. The paper
        # mentions only RoPE, over the raster order of the patches (--no-patch-position).
        if cfg.patch_position:
            position = torch.empty(cfg.n_patches, cfg.dim)  # filled by init_matrices
            self.patch_position = nn.Parameter(position)
        else:
            self.patch_position = 0
        self.transformer = Transformer(cfg)
        self.lm_head = nn.Linear(cfg.dim, len(tokenizer), bias=False)
        if cfg.patch_encoder == "linear":
            self.patch_encoder = LinearPatchEncoder(cfg)
            self.patch_decoder = LinearPatchDecoder(cfg)
        init_matrices(self, cfg.n_layers)
        if cfg.patch_encoder == "unet":  # created after init_matrices, to keep PyTorch's own init
            self.patch_encoder = UNetDown(cfg)
            self.patch_decoder = UNetUp(cfg)

    def forward(self, batch):
        """Run the model on a Batch whose images are noised to batch.t.

        Returns the logits of the next token (B, T, V), and for each image the prediction of eps, v
        or x0 (M, C, H, W).
        """
        is_patch = batch.image_id >= 0  # (B, T)
        x = self.token_embedding(batch.tokens)  # (B, T, D)
        patches, skip = self.patch_encoder(batch.images, batch.t)
        patches = patches + self.patch_position  # (M, N, D)
        # The patches replace the embeddings of PATCH. Row by row, the True positions of is_patch
        # are the patches of images[0], images[1], ... (.to() matters under autocast.)
        x[is_patch] = patches.flatten(0, 1).to(x.dtype)
        x = self.transformer(x, attention_mask(batch.image_id, self.cfg.bidirectional))
        logits = self.lm_head(x)
        pred = self.patch_decoder(x[is_patch].view(patches.shape), skip)
        return logits, pred

    def pack(self, documents, end=True):
        return pack(documents, self.tokenizer, self.cfg, self.lm_head.weight.device, end)

    def training_batch(self, documents):
        """Pack documents of clean images, then add noise to the images. Returns a Batch."""
        batch = self.pack(documents)
        x0 = batch.images

        # Each image has its own t. The noise cap (table 8) limits some of them. NOT STATED: how a
        # capped t is distributed. Here it is uniform.
        t = training_times(len(x0), self.cfg.t_power, x0.device)  # (M,)
        capped_t = self.cfg.noise_cap * torch.rand_like(t)
        capped = torch.tensor(is_capped(documents), dtype=torch.bool, device=t.device)
        batch.t = torch.where(capped, capped_t, t)

        eps = torch.randn_like(x0)
        batch.images = q_sample(x0, eps, batch.t)  # the latents are noised, not the patches
        batch.image_targets = diffusion_target(x0, eps, batch.t, self.cfg.target)

        batch.n_text_losses = (batch.targets != NO_LOSS).sum()
        # Every noised image has a diffusion loss. (With noise_cap = 0, capped images stay clean.)
        batch.n_image_losses = (batch.t > 0).sum()
        return batch

    def loss(self, batch):
        """Section 3, training objective: L = L_LM + lambda * L_DDPM, for a training batch.

        Returns (loss, loss_lm, loss_ddpm).
        """
        logits, pred = self(batch)

        # LM loss: the mean over all positions that have a target.
        loss_lm = next_token_losses(logits, batch.targets).sum() / batch.n_text_losses.clamp(min=1)

        # Diffusion loss: the mean squared error of each image, then the mean over noised images.
        error = (pred - batch.image_targets).square().mean((1, 2, 3))  # (M,)
        loss_ddpm = (error * (batch.t > 0)).sum() / batch.n_image_losses.clamp(min=1)

        return loss_lm + self.cfg.lambda_ddpm * loss_ddpm, loss_lm, loss_ddpm

    def logits(self, documents, end=True):
        """Documents with clean images -> their next-token logits (B, T, V), and their Batch.

        NOT STATED: the t of images that are in the prompt or already drawn. Here it is 0, although
        in training they are noised: up to noise_cap if they come first, and otherwise to any t.
        """
        batch = self.pack(documents, end)
        logits, _ = self(batch)
        return logits, batch

    def predict_last_image(self, documents, t):
        """Predict eps, v or x0 (B, C, H, W) for the last image of each document, which is an x_t.

        All documents share the same t. The images before x_t are clean.
        """
        # end=False leaves out EOS. EOI is already there, but no patch can see it.
        batch = self.pack(documents, end=False)
        # Images are numbered in reading order, so the last one of a row has its largest image_id.
        last = batch.image_id.amax(1)
        batch.t[last] = t  # all other images keep t = 0
        _, pred = self(batch)
        return pred[last]

    def draw(self, documents, steps, guidance_scale, eta, show):
        """Diffusion mode: append noise to each document, in place, and denoise it step by step.

        `generate` calls this when the model has predicted BOI, and displays the documents in
        show(). Every step runs the model on the whole sequence. A key-value cache would avoid
        recomputing what precedes the image, but would pay off only with long texts or many images.
        """
        device = self.lm_head.weight.device
        xt = torch.randn(len(documents), *self.cfg.latent_shape, device=device)
        for document, image in zip(documents, xt):
            document.append(image)
        for t, t_next in pairwise(sampling_times(steps, self.cfg.t_power).to(device)):
            pred = self.predict_last_image(documents, t)
            if guidance_scale != 1:
                without_text = [unconditional(document) for document in documents]  # keeps x_t
                pred = guide(pred, self.predict_last_image(without_text, t), guidance_scale)
            xt = p_sample(xt, pred, t[None], t_next[None], self.cfg.target, eta)
            for document, image in zip(documents, xt):
                document[-1] = image
            show()

# ---- Generation ----------------------------------------------------------------------------------

def next_token_logits(model, documents):
    """Logits (B, V) of the token after each document, which can be text, BOI or EOS."""
    logits, batch = model.logits(documents, end=False)
    last = (batch.tokens != PAD).sum(1) - 1  # the last position that is not padding (B,)
    logits = logits[torch.arange(len(last), device=last.device), last]
    logits = logits[:, : len(model.tokenizer)]  # Chameleon's vocabulary has image codes after these
    logits[:, [PAD, BOS, EOI, PATCH]] = -math.inf  # only `pack` inserts these
    return logits

def sample_tokens(logits, temperature):
    """One token for each row of logits (B, V). Temperature 0 is greedy, the paper's choice."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]

def append_token(document, token, tokenizer):
    """Append a text token to a document, in place.

    Documents hold text, as in training, so the token is decoded here, and `pack` encodes the text
    again. (If the model spells a known word in bytes, the word then becomes one token.)
    """
    if document and isinstance(document[-1], str):
        document[-1] = tokenizer.decode(tokenizer.encode(document[-1]) + [token])
    else:
        document.append(tokenizer.decode([token]))

def write(model, documents, max_tokens, temperature, show):
    """LM mode: append text to documents, in place, until the model predicts BOI or EOS, or has
    written max_tokens. Returns the documents that got BOI; the others are finished.
    """
    wants_image = []
    for _ in range(max_tokens):
        if not documents:
            break
        tokens = sample_tokens(next_token_logits(model, documents), temperature)
        still_writing = []
        for document, token in zip(documents, tokens.tolist()):
            if token == BOI:  # not stored: `pack` puts it before the image
                wants_image.append(document)
            elif token != EOS:
                append_token(document, token, model.tokenizer)
                still_writing.append(document)
        documents = still_writing
        show()
    return wants_image

@torch.no_grad()
def generate(
    model, documents, max_tokens=64, max_images=1,
    steps=50, guidance_scale=2.0, eta=0.0,  # how images are sampled
    temperature=0.0,  # how text is sampled
    show=lambda documents: None,
):
    """Section 3, inference: continue documents of str and images until EOS. Returns them.

    The model itself decides when to draw, by predicting BOI. A document also ends after max_tokens
    of text in a row, or at a BOI once max_images have been drawn. The function `show` is called
    with all documents after every token and every denoising step.
    """
    documents = [list(document) for document in documents]  # copies, which grow below
    show_all = partial(show, documents)  # show_all() is show(documents)
    active = documents  # the unfinished ones; their images are drawn together
    while True:
        active = write(model, active, max_tokens, temperature, show_all)
        if not active or max_images == 0:
            return documents
        model.draw(active, steps, guidance_scale, eta, show_all)  # `pack` adds BOI and EOI
        max_images -= 1

# ---- Tokenizer: text to tokens and back ----------------------------------------------------------

class Tokenizer:
    """A known word, with the space before it, is one token. Other text is encoded as UTF-8 bytes.

    Encoding puts a space before the text, and decoding removes it. So if only " a" and " red" are
    known, "a red dog" becomes the tokens " a" and " red", and one token for each byte of " dog".
    """

    def __init__(self, words):
        self.words = list(words)
        pieces = [word if word in ".,;:!?" else " " + word for word in self.words]
        self.bytes_of = [b""] * N_SPECIAL + [bytes([i]) for i in range(256)]
        self.bytes_of += [piece.encode() for piece in pieces]
        self.id_of = {piece: N_SPECIAL + 256 + i for i, piece in enumerate(pieces)}

    def __len__(self):
        return len(self.bytes_of)

    @staticmethod
    def split(text):
        """A list of pieces: words with the space before them, and all other characters."""
        return re.findall(r" ?[^\s.,;:!?]+|.", " " + text, re.DOTALL)

    def encode(self, text):
        """str -> list of token ids."""
        ids = []
        for piece in self.split(text):
            if piece in self.id_of:
                ids.append(self.id_of[piece])
            else:
                ids += [N_SPECIAL + byte for byte in piece.encode(errors="surrogateescape")]
        return ids

    def decode(self, ids):
        """List of token ids -> str, the inverse of encode. Special tokens are skipped.

        A model may write invalid UTF-8. Such bytes become surrogates, which encode turns back into
        bytes.
        """
        text_bytes = b"".join(self.bytes_of[i] for i in ids).removeprefix(b" ")
        return text_bytes.decode(errors="surrogateescape")

# ---- VAE: pictures to latents and back -----------------------------------------------------------

class VAE(nn.Module):
    """A small convolutional VAE, trained before the transformer and then frozen.

    Pictures are uint8 pixels (M, H, W, 3). DEVIATION: the paper's VAE has 86M parameters.
    """

    def __init__(self, image_size, latent_size, latent_channels, dim, kl):
        super().__init__()
        self.kl = kl
        n_halvings = int(math.log2(image_size / latent_size))
        # Channels from high to low resolution, at most 4 * dim: here 24 (16 x 16) and 48 (8 x 8).
        widths = [dim * 2 ** min(i, 2) for i in range(n_halvings)]
        wide = widths[-1]
        down, up = [], []
        for n_in, n_out in pairwise([3, *widths]):
            down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.SiLU()]
        for n_in, n_out in pairwise([*widths[::-1], 3]):
            up += [nn.SiLU(), nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(
            *down,
            nn.Conv2d(wide, wide, 3, padding=1), nn.SiLU(),
            nn.Conv2d(wide, 2 * latent_channels, 1),  # mean and log variance of the posterior
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, wide, 3, padding=1), nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            *up,
        )
        # Statistics of the latents, so that diffusion sees them with mean 0 and variance 1.
        # NOT STATED: how the paper scales its latents.
        self.register_buffer("mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("std", torch.ones(latent_channels, 1, 1))

    def to_input(self, pictures):
        """uint8 (M, H, W, 3) -> float (M, 3, H, W) in [-1, 1], on the device of the VAE."""
        return pictures.to(self.mean.device).permute(0, 3, 1, 2) / 127.5 - 1

    def to_pictures(self, x):
        """The inverse of to_input."""
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    def loss(self, pictures):
        """Squared error of the reconstruction + kl * KL(posterior, N(0, 1)), both averaged."""
        x = self.to_input(pictures)
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        kl = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        return F.mse_loss(self.decoder(z), x) + self.kl * kl

    @torch.no_grad()
    def calibrate(self, pictures):
        """Measure the statistics of the latents, once, after training."""
        mean, _ = self.encoder(self.to_input(pictures)).chunk(2, dim=1)
        self.mean.copy_(mean.mean((0, 2, 3))[:, None, None])
        self.std.copy_(mean.std((0, 2, 3))[:, None, None])

    @torch.no_grad()
    def encode(self, pictures):
        """uint8 (M, H, W, 3) -> latents (M, C, h, w): the mean of the posterior, normalised."""
        encoded = [self.encoder(self.to_input(part)) for part in pictures.split(512)]
        mean, _ = torch.cat(encoded).chunk(2, dim=1)
        return (mean - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """Latents (M, C, h, w) -> uint8 (M, H, W, 3)."""
        return self.to_pictures(self.decoder(latents * self.std + self.mean))

def encode_pictures(documents, vae):
    """Documents of str and pictures, uint8 (H, W, 3) -> documents of str and latents (or codes)."""
    parts = [part for document in documents for part in document]
    pictures = [torch.as_tensor(part) for part in parts if not isinstance(part, str)]
    images = iter(vae.encode(torch.stack(pictures)) if pictures else [])
    return [
        [part if isinstance(part, str) else next(images) for part in document]
        for document in documents
    ]

# ---- U-Net patches -------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """Like DDPM's residual block: two convolutions, with the embedding of t added in between."""

    def __init__(self, n_in, n_out, time_dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time = nn.Linear(time_dim, n_out)
        self.norm2 = nn.GroupNorm(1, n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h

class UNetDown(nn.Module):
    """The paper's other patch encoder, and its better one (tables 5 to 7): the first half of a
    U-Net, from latents and t to patches.

    It halves the resolution log2(patch_size) times, until each patch is one pixel. Its features at
    all resolutions, and the embedding of t, bypass the transformer and go to the second half.
    """

    def __init__(self, cfg, time_dim=128):
        super().__init__()
        n_resolutions = 1 + int(math.log2(cfg.patch_size))
        widths = [cfg.unet_dim * 2**i for i in range(n_resolutions)]
        self.time = TimeEmbedding(time_dim)
        self.first = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(width, width, time_dim) for width in widths)
        downsample = [nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.downsample = nn.ModuleList([*downsample, nn.Identity()])  # none after the last block
        self.last = nn.Linear(widths[-1], cfg.dim)

    def forward(self, latents, t):
        time = self.time(t)
        x = self.first(latents)
        features = []
        for block, downsample in zip(self.blocks, self.downsample):
            x = block(x, time)
            features.append(x)  # (M, width, H / 2^i, W / 2^i)
            x = downsample(x)
        x = x.flatten(2).transpose(1, 2)  # (M, N, width)
        return self.last(x), (time, features)  # (M, N, D)

class UNetUp(nn.Module):
    """The second half of the U-Net: from the transformer's output to a prediction (M, C, H, W)."""

    def __init__(self, cfg, time_dim=128):
        super().__init__()
        self.grid = cfg.grid
        n_resolutions = 1 + int(math.log2(cfg.patch_size))
        widths = [cfg.unet_dim * 2**i for i in reversed(range(n_resolutions))]
        self.first = nn.Linear(cfg.dim, widths[0])
        self.blocks = nn.ModuleList(ResBlock(2 * width, width, time_dim) for width in widths)
        upsample = [nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.upsample = nn.ModuleList([*upsample, nn.Identity()])  # none after the last block
        self.last = nn.Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, x, skip):
        time, features = skip
        x = self.first(x).transpose(1, 2)  # (M, width, N)
        x = x.unflatten(2, (self.grid, self.grid))
        for block, upsample, feature in zip(self.blocks, self.upsample, reversed(features)):
            x = block(torch.cat([x, feature], dim=1), time)
            x = upsample(x)
        return self.last(x)  # (M, C, H, W)

# ---- Chameleon: the baseline, with discrete images -----------------------------------------------

class QuantisedVAE(VAE):
    """A VAE whose latent vectors, one for each patch, are rounded to the nearest in a codebook.

    It adds no noise and has no KL loss. An image becomes codes (N,), indices into the codebook.

    DEVIATION: the paper learns 16,384 vectors, with a codebook loss. Our codebook is fixed: all
    points of a grid (FSQ, arXiv 2309.15505). Four entries of five levels give 5^4 = 625 vectors.
    """

    def __init__(self, cfg):
        super().__init__(
            cfg.image_size, latent_size=cfg.grid, latent_channels=cfg.code_dim,
            dim=cfg.vae_dim, kl=cfg.vae_kl,
        )
        self.grid = cfg.grid
        # Normalise to variance 1. Otherwise nearly all entries would become the middle level.
        # (After training, call vae.eval(), so that BatchNorm uses its running statistics.)
        self.normalise = nn.BatchNorm2d(cfg.code_dim, affine=False)
        # The vector of a code: its digits in base 5, the lowest first, minus 2. (Code 7 has the
        # digits 2, 1, 0, 0, and the vector 0, -1, -2, -2.)
        codes = torch.arange(cfg.code_levels**cfg.code_dim)[:, None]
        place_values = cfg.code_levels ** torch.arange(cfg.code_dim)  # 1, 5, 25, 125
        digits = (codes // place_values) % cfg.code_levels
        self.register_buffer("codebook", digits - (cfg.code_levels - 1) / 2)  # (codes, code_dim)

    def quantise(self, pictures):
        """uint8 (M, H, W, 3) -> codes (M, N), and their vectors (M, code_dim, grid, grid)."""
        z, _ = self.encoder(self.to_input(pictures)).chunk(2, dim=1)  # log variances: not used
        z = self.normalise(z).tanh() * self.codebook.max()  # within the grid
        distances = torch.cdist(z.detach().flatten(2).transpose(1, 2), self.codebook)
        codes = distances.argmin(-1)  # the nearest vectors of the codebook
        # Straight-through: the value is the nearest vector, but the gradient is that of z.
        return codes, z + (self.vectors_of(codes) - z).detach()

    def vectors_of(self, codes):
        """(M, N) -> (M, code_dim, grid, grid)."""
        return self.codebook[codes].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def loss(self, pictures):
        _, vectors = self.quantise(pictures)
        return F.mse_loss(self.decoder(vectors), self.to_input(pictures))

    def calibrate(self, pictures):
        """Nothing to measure: the codebook has a fixed scale."""

    @torch.no_grad()
    def encode(self, pictures):
        """uint8 (M, H, W, 3) -> codes (M, N) int64."""
        return torch.cat([self.quantise(part)[0] for part in pictures.split(64)])

    @torch.no_grad()
    def decode(self, codes):
        """Codes (M, N) -> uint8 (M, H, W, 3)."""
        return self.to_pictures(self.decoder(self.vectors_of(codes)))

class Chameleon(nn.Module):
    """The discrete baseline (arXiv 2405.09818): a language model with the same trunk and documents.

    An image is N codes between BOI and EOI. Codes are tokens: their ids follow those of text. So
    there is only the next-token loss, attention is causal, and drawing means sampling codes. There
    is no diffusion, no t, no patch encoder, and no embedding of the position in the image.
    """

    def __init__(self, cfg, tokenizer):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        vocab_size = len(tokenizer) + cfg.code_levels**cfg.code_dim  # text, then codes
        self.token_embedding = nn.Embedding(vocab_size, cfg.dim)
        # DEVIATION: for stability the paper's Chameleon has QK-norm, a z-loss, and norms after its
        # layers. Ours has the first two, but keeps the norms before the layers, as in Llama.
        self.transformer = Transformer(replace(cfg, qk_norm=True))
        self.lm_head = nn.Linear(cfg.dim, vocab_size, bias=False)
        init_matrices(self, cfg.n_layers)

    def forward(self, batch):
        """Next-token logits (B, T, V), for text and codes."""
        mask = attention_mask(batch.image_id, bidirectional=False)
        return self.lm_head(self.transformer(self.token_embedding(batch.tokens), mask))

    def pack(self, documents, end=True):
        """Pack documents of str and codes (N,), with the ids of the codes in place of PATCH."""
        batch = pack(documents, self.tokenizer, self.cfg, self.lm_head.weight.device, end)
        # Without images, batch.images is an empty tensor of floats, so .long() is needed.
        batch.tokens[batch.image_id >= 0] = len(self.tokenizer) + batch.images.flatten().long()
        return batch

    def training_batch(self, documents):
        """Pack documents. Each code becomes the target of the position before it."""
        batch = self.pack(documents)
        batch.n_text_losses = (batch.targets != NO_LOSS).sum()  # before codes become targets
        next_is_code = batch.image_id[:, 1:] >= 0
        batch.targets[:, :-1][next_is_code] = batch.tokens[:, 1:][next_is_code]
        batch.n_image_losses = next_is_code.sum()
        return batch

    def loss(self, batch):
        """The mean next-token loss of text and codes, with a z-loss.

        Returns (loss, loss_text, loss_codes).
        """
        logits = self(batch)
        losses = next_token_losses(logits, batch.targets)
        is_code = batch.targets >= len(self.tokenizer)
        loss_text = (losses * ~is_code).sum() / batch.n_text_losses.clamp(min=1)
        loss_codes = (losses * is_code).sum() / batch.n_image_losses.clamp(min=1)

        z_loss = self.cfg.z_loss * logits.logsumexp(-1).square() * (batch.targets != NO_LOSS)
        loss = (losses + z_loss).sum() / (batch.n_text_losses + batch.n_image_losses).clamp(min=1)
        return loss, loss_text, loss_codes

    def logits(self, documents, end=True):
        """Next-token logits (B, T, V) of documents, and their Batch."""
        batch = self.pack(documents, end)
        return self(batch), batch

    def predict_last_image(self, documents):
        """Logits (B, N, codes) for the codes in the last image of each document."""
        batch = self.pack(documents, end=False)
        is_last = batch.image_id == batch.image_id.amax(1, keepdim=True)  # positions of these codes
        logits = self(batch)[:, :-1]  # each code is predicted one position before it
        logits = logits[is_last[:, 1:]].view(len(documents), self.cfg.n_patches, -1)
        return logits[:, :, len(self.tokenizer) :]

    def draw(self, documents, steps, guidance_scale, eta, show):
        """Append an image to each document, in place, code by code. Calls show() after every code.

        Codes not yet drawn are 0; since attention is causal, their values do not matter. `steps`
        and `eta` belong to diffusion and have no effect.
        """
        device = self.lm_head.weight.device
        codes = torch.zeros(len(documents), self.cfg.n_patches, dtype=torch.long, device=device)
        for document, image in zip(documents, codes):
            document.append(image)
        for n in range(self.cfg.n_patches):
            logits = self.predict_last_image(documents)[:, n]
            if guidance_scale != 1:
                without_text = [unconditional(document) for document in documents]
                logits_without = self.predict_last_image(without_text)[:, n]
                logits = guide(logits, logits_without, guidance_scale)
            codes[:, n] = sample_tokens(logits, temperature=1.0)
            for document, image in zip(documents, codes.clone()):  # `codes` is modified later
                document[-1] = image
            show()

# ---- Micro-batches -------------------------------------------------------------------------------

def micro_batch(batch, i, n):
    """Documents i, i + n, i + 2n, ... of a training batch, and their images.

    Several processes, or the steps of gradient accumulation, run one micro-batch each. The
    denominators stay those of the whole batch, so the losses of all micro-batches add up to the
    loss of the batch. (image_id stays too: all that matters is which positions share an id.)
    """
    row_of_image = (batch.tokens == BOI).nonzero()[:, 0]  # each image has one BOI (M,)
    own = row_of_image % n == i
    return replace(
        batch,
        tokens=batch.tokens[i::n], targets=batch.targets[i::n], image_id=batch.image_id[i::n],
        images=batch.images[own], t=batch.t[own], image_targets=batch.image_targets[own],
    )
