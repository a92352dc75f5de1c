"""Transfusion in one file: predict the next token of text and denoise the patches of images, with one transformer.

Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model", arXiv 2408.11039.

A document is one sequence. Text is discrete tokens. An image is a run of continuous vectors, the patches of its VAE
latents, between BOI (begin of image) and EOI (end of image):

    BOS  a  red  circle  .  BOI  [patch] [patch] ... [patch]  EOI  EOS

Attention is causal, but the patches of one image see each other. Text places are trained to predict the next token,
patch places to say what the image is under its noise. To generate, sample tokens until the model says BOI, run
diffusion for that image, append EOI, and go on sampling tokens.

Read from top to bottom: sequence and mask, schedule and noise, transformer, patch encoders, model and loss, generation;
then the VAE, a black box until there, and what a discrete baseline, Chameleon, does otherwise. `DEVIATION:` marks what
differs from the paper, with the way back; `NOT STATED:` marks what the paper leaves open.

Shapes: B sequences, T places, K images per sequence, C x H x W latents, N patches per image, P numbers per patch,
D width, V vocabulary. Every batch is rectangular:

    tokens    (B, T) int64       text ids; image places hold PAD, and padding is on the right
    image_id  (B, T) int64       -1 for text, k for a patch of the k-th image of that sequence, from 0
    latents   (B, K, C, H, W)    VAE latents of up to K images; some sequence has all K

and in training every image is noised to a time of its own, t (B, K): 0 is clean, 1 pure noise (the paper's step 1000).
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# ---- Configuration ---------------------------------------------------------------------------------------------------

def option(default, help, choices=None):
    """A dataclass field with a help line; train.py makes a command-line option of each."""
    return field(default=default, metadata={"help": help, "choices": choices})

@dataclass
class Config:
    model: str = option("transfusion", "chameleon is the baseline, with discrete images", ("transfusion", "chameleon"))
    dim: int = option(128, "width of the transformer")
    n_layers: int = option(6, "number of transformer blocks")
    n_heads: int = option(4, "attention heads a block")
    qk_norm: bool = option(False, "normalise queries and keys; Chameleon always does")
    bidirectional: bool = option(True, "the patches of an image see each other; off: causal attention everywhere")
    target: str = option("x0", "what the diffusion head predicts; the paper's is eps", ("eps", "v", "x0", "flow"))
    t_power: float = option(2.0, "density of t, also in drawing: t_power * t^(t_power - 1); 1 is uniform, 2 noisier")
    patch_encoder: str = option("linear", "between latents and transformer: linear or U-Net", ("linear", "unet"))
    unet_dim: int = option(32, "channels of the U-Net at full size, doubled with every halving")
    patch_position: bool = option(True, "add a learned embedding of its place in the picture to every patch")
    lambda_ddpm: float = option(5.0, "weight of the diffusion loss beside the language loss")
    noise_cap: float = option(0.5, "multiplies t of images before all text; 1 is off, 0 shows them clean")
    drop_text: float = option(0.1, "share of the documents with text before an image to train without it, for guidance")
    text_between: bool = option(True, "learn to write the text between two images; off: it is a given instruction")
    image_size: int = option(32, "pixels a side")
    latent_size: int = option(8, "VAE latents a side")
    latent_channels: int = option(4, "channels of a VAE latent")
    patch_size: int = option(2, "latents a side of one patch, which is one place of the sequence")
    vae_dim: int = option(24, "channels of the VAE at half the image's size")
    vae_kl: float = option(1e-3, "weight of the VAE's KL loss")
    code_dim: int = option(4, "Chameleon: numbers of a code, the channels of its discrete latents")
    code_levels: int = option(5, "Chameleon: values of each of these numbers; there are code_levels ** code_dim codes")
    z_loss: float = option(1e-5, "Chameleon: weight of log^2 Z, Z the sum of a softmax")

    def __post_init__(self):
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim ({self.dim}) must be a multiple of 2 * n_heads ({2 * self.n_heads})")
        if self.patch_size not in (1, 2, 4, 8) or self.latent_size % self.patch_size:
            raise ValueError(f"patch_size must be 1, 2, 4 or 8 and divide latent_size {self.latent_size}")
        if self.image_size not in [self.latent_size * 2**stages for stages in range(1, 10)]:
            raise ValueError(f"image_size / latent_size ({self.image_size} / {self.latent_size}) must be 2, 4, 8, ...")
        if not self.t_power > 0:
            raise ValueError(f"t_power must be more than 0, not {self.t_power}")
        for f in fields(self):
            if f.metadata["choices"] and getattr(self, f.name) not in f.metadata["choices"]:
                raise ValueError(f"{f.name} must be one of {f.metadata['choices']}, not {getattr(self, f.name)!r}")

        self.grid = self.latent_size // self.patch_size                        # patches a side
        self.n_patches, self.patch_dim = self.grid**2, self.latent_channels * self.patch_size**2
        self.latent_shape = self.latent_channels, self.latent_size, self.latent_size  # (C, H, W)
        if self.model == "chameleon":  # has one code where Transfusion has one patch
            self.latent_shape = self.code_dim, self.grid, self.grid

LAPTOP = Config()
LAPTOP_PAPER = replace(LAPTOP, target="eps", t_power=1.0, patch_position=False)
PAPER = replace(LAPTOP_PAPER, image_size=256, latent_size=32, latent_channels=8, vae_dim=128)
PRESETS = {
    "laptop": LAPTOP,
    "tiny": replace(LAPTOP, dim=32, n_layers=2, n_heads=2, vae_dim=8),  # for tests: learns little, runs in seconds
    "laptop-paper": LAPTOP_PAPER,
    "0.16B": replace(PAPER, dim=768, n_layers=16, n_heads=12),  # the paper's sizes
    "0.37B": replace(PAPER, dim=1024, n_layers=24, n_heads=16),
    "0.76B": replace(PAPER, dim=1536, n_layers=24, n_heads=24),
    "1.4B": replace(PAPER, dim=2048, n_layers=24, n_heads=16),
    "7B": replace(PAPER, dim=4096, n_layers=32, n_heads=32),
}

# ---- The sequence ----------------------------------------------------------------------------------------------------

MARKS = "PAD", "BOS", "EOS", "BOI", "EOI"
PAD, BOS, EOS, BOI, EOI = range(len(MARKS))
N_SPECIAL = len(MARKS)  # ids below this are marks, the others are text

class Tokenizer:
    """The words of the data set are one token each; everything else falls back to its UTF-8 bytes.

    A word's token includes the space before it, and a space is put before the text, so that every string comes back
    unchanged: "a red dog" is " a", " red", and the bytes of " dog".
    """

    def __init__(self, words):
        self.words = list(words)
        pieces = [word.encode() if word in ".,;:!?" else b" " + word.encode() for word in self.words]
        self.bytes = [b""] * N_SPECIAL + [bytes([i]) for i in range(256)] + pieces
        self.id = {piece: i for i, piece in enumerate(self.bytes) if i >= N_SPECIAL}
        longest_first = sorted(pieces, key=len, reverse=True)
        self.split = re.compile(b"|".join([re.escape(p) + rb"(?!\w)" for p in longest_first] + [b"."]), re.DOTALL)

    def __len__(self):
        return len(self.bytes)

    def encode(self, text):
        return [self.id[piece] for piece in self.split.findall(b" " + text.encode())] if text else []

    def decode(self, ids):
        """Inverse of encode. Marks are skipped; bytes that are not UTF-8, which a model may write, become U+FFFD."""
        return b"".join(self.bytes[i] for i in ids).removeprefix(b" ").decode(errors="replace")

def pack(documents, tokenizer, n_patches, end=True):
    """Lay out documents as a batch: tokens and image_id, both (B, T), padded on the right to the longest.

    A document is a list of parts in reading order: a str, or anything else for an image. `end` says whether EOS closes
    it (training) or it is left open (a prompt).
    """
    rows = []
    for document in documents:
        tokens, image_id, k = [BOS], [-1], 0
        for part in document:
            if isinstance(part, str):
                words = tokenizer.encode(part)
                tokens, image_id = tokens + words, image_id + [-1] * len(words)
            else:
                tokens, image_id = tokens + [BOI] + [PAD] * n_patches + [EOI], image_id + [-1] + [k] * n_patches + [-1]
                k += 1
        rows.append((tokens + [EOS] * end, image_id + [-1] * end))
    length = max(len(tokens) for tokens, _ in rows)
    return (torch.tensor([tokens + [PAD] * (length - len(tokens)) for tokens, _ in rows]),
            torch.tensor([image_id + [-1] * (length - len(image_id)) for _, image_id in rows]))

def without_text(tokens, image_id, rows):
    """The null form for guidance: in the chosen rows (B,) only marks and images stay, moved up to the left.

    "BOS a red circle. BOI [patches] EOI EOS" becomes "BOS BOI [patches] EOI EOS". Training and sampling both use it.
    """
    gone = rows[:, None] & (tokens >= N_SPECIAL)                        # (B, T)
    order = gone.long().argsort(dim=1, stable=True)                     # what stays, in its order, then what goes
    return tokens.masked_fill(gone, PAD).gather(1, order), image_id.gather(1, order)

def rows_to_drop(tokens, share):
    """Which rows (B,) train without their text: the given share of those in which text comes before an image."""
    text_first = ((tokens == BOI) & ((tokens >= N_SPECIAL).cumsum(1) > 0)).any(1)
    return text_first & (torch.rand(len(tokens), device=tokens.device) < share)

def mixed_mask(image_id, bidirectional=True):
    """Section 3, "Transfusion attention", as a predicate: may the query at place q see the key at place kv?

    Row b, head h (all heads share the mask): FlexAttention's signature; below, dense_mask applies it to all pairs.
    Padding needs no rule of its own: it is on the right, where causality hides it.
    """
    def may_see(b, h, q, kv):
        same_image = (image_id[b, q] == image_id[b, kv]) & (image_id[b, q] >= 0)
        return (kv <= q) | same_image if bidirectional else kv <= q
    return may_see

def dense_mask(may_see, query, n_keys):
    """Boolean (B, 1, n, n_keys): the predicate applied to the places query (B, n) and all keys."""
    b = torch.arange(len(query), device=query.device).view(-1, 1, 1, 1)
    return may_see(b, 0, query[:, None, :, None], torch.arange(n_keys, device=query.device))

# ---- Schedule and noise ----------------------------------------------------------------------------------------------

def sample_t(shape, t_power, device):
    """Training times. NOT STATED: the paper names no distribution; DDPM's is uniform (t_power 1).

    The noisy ones, where the text decides what is drawn, need practice: the U-Net draws 0.91 right with 2, 0.37 with 1.
    """
    return torch.rand(shape, device=device) ** (1 / t_power)

def signal_noise(t, target):
    """How much signal a and how much noise s are in x_t = a * x0 + s * eps.

    Cosine schedule (section 2.2): a = sqrt(alpha_bar_t) = cos(t * pi / 2), s = sqrt(1 - alpha_bar_t). Only the target
    "flow" brings a schedule of its own, flow matching's straight path from image to noise.
    """
    if target == "flow":
        return 1 - t, t
    return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)

def q_sample(x0, eps, t, target):
    """Section 2.2: noise the clean x0 (B, K, C, H, W) to time t (B, K)."""
    a, s = signal_noise(t[..., None, None, None], target)
    return a * x0 + s * eps

def diffusion_target(x0, eps, t, target):
    """What the model should say about x_t. Each answer gives the others; only their errors weigh differently.

    An error of x0 is one of v times s, and one of eps times s / a. So with x0 it is the noisy times that count, where
    there is no telling what to draw but from the text, and not the nearly clean ones, where only noise is to be told.

    DEVIATION: the paper predicts eps (target="eps"); the default is x0, which in a toy run draws 0.994 of
    the held-out captions right, and eps 0.004 (README).
    """
    a, s = signal_noise(t[..., None, None, None], target)
    return {"eps": eps, "x0": x0, "v": a * eps - s * x0, "flow": eps - x0}[target]

def x0_and_eps(pred, xt, t, target):
    """Solve the prediction and x_t = a * x0 + s * eps for x0 and eps."""
    a, s = signal_noise(t[..., None, None, None], target)
    if target == "eps":
        # Near t = 1 hardly anything of x0 is left, and dividing by a would only magnify the error of pred: there the
        # best guess is the mean of the latents, 0. They have unit variance, so 5 is a generous bound for the rest.
        x0 = ((xt - s * pred) / a.clamp(min=0.01) * (a > 0.01)).clamp(-5, 5)
        return x0, pred
    if target == "x0":
        return pred, (xt - a * pred) / s
    if target == "v":  # a * eps - s * x0, and a^2 + s^2 = 1
        return a * xt - s * pred, s * xt + a * pred
    return xt - s * pred, xt + a * pred  # flow: eps - x0, and a + s = 1

def p_sample(xt, pred, t, t_next, target, sampler):
    """One denoising step, from time t to t_next < t.

    Both samplers noise the predicted x0 to t_next. "ddim" takes the predicted noise for all of it; "ddpm", the
    paper's ancestral sampler, replaces some by fresh noise: the variance of DDPM's posterior q(x_t_next | x_t, x0).

    DEVIATION: the default is ddim, with 25 to 50 steps where the paper takes 250 (sampler="ddpm" is the way back).
    """
    x0, eps = x0_and_eps(pred, xt, t, target)
    a, s = signal_noise(t[..., None, None, None], target)
    a_next, s_next = signal_noise(t_next[..., None, None, None], target)
    fresh_var = torch.zeros_like(s)
    if sampler == "ddpm":
        fresh_var = (s**2 - (a / a_next * s_next) ** 2).clamp(min=0) * (s_next / s) ** 2
    kept_var = (s_next**2 - fresh_var).clamp(min=0)
    return a_next * x0 + kept_var.sqrt() * eps + fresh_var.sqrt() * torch.randn_like(xt)

# ---- Transformer: Llama's (RMSNorm, RoPE, SwiGLU, no biases) ---------------------------------------------------------

def rope_angles(position, head_dim, base=10000.0):
    """cos and sin of the rotary angles of places (B, T), both (B, 1, T, head_dim / 2)."""
    frequency = base ** -(torch.arange(0, head_dim, 2, device=position.device) / head_dim)
    angle = position[:, None, :, None] * frequency
    return angle.cos(), angle.sin()

def rotate(x, rope):
    """Turn each pair of features by an angle that grows with the place, so that q.k depends on the distance only."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads, head_dim = cfg.n_heads, cfg.dim // cfg.n_heads
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim) if cfg.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if cfg.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, store=None):
        q, k, v = (w(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)      # (B, heads, T, head_dim)
        if store is not None:  # generating: add these keys and values to the earlier ones
            k, v = store(k, v)                                                 # (B, heads, all places, head_dim)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(x.transpose(1, 2).flatten(2))                           # (B, T, D)

class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden = 32 * round(cfg.dim * 8 / 3 / 32)
        self.w1 = nn.Linear(cfg.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, cfg.dim, bias=False)
        self.w3 = nn.Linear(cfg.dim, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(cfg.dim), Attention(cfg)
        self.ffn_norm, self.ffn = nn.RMSNorm(cfg.dim), FeedForward(cfg)

    def forward(self, x, rope, mask, store=None):
        x = x + self.attention(self.attention_norm(x), rope, mask, store)
        return x + self.ffn(self.ffn_norm(x))

class KVCache:
    """For generation only: the keys and values of every layer, and length, how many places of each row are kept.

    The model writes after a row's length and does not move it. To keep what it wrote, its caller moves length; what
    lies past length is free to be overwritten, as every step of denoising is by the next, and no kept place sees it.
    """

    def __init__(self, cfg, rows, places, like):
        shape = (rows, cfg.n_heads, places, cfg.dim // cfg.n_heads)
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(cfg.n_layers)]
        self.image_id = torch.full((rows, places), -1, device=like.device)
        self.length = torch.zeros(rows, dtype=torch.long, device=like.device)

    def store(self, layer, position):
        """For one layer: a function that stores k and v (B, heads, n, head_dim) at places (B, n), and returns all."""
        def write(k, v):
            where = position[:, None, :, None].expand_as(k)
            return [whole.scatter_(2, where, part) for whole, part in zip(self.layers[layer], (k, v))]
        return write

# ---- Patches ---------------------------------------------------------------------------------------------------------

def patchify(latents, p):
    """(..., C, H, W) -> (..., N, P): squares of p x p latents in raster order, each as one vector."""
    x = latents.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))                  # (..., C, H/p, p, W/p, p)
    return x.movedim(-5, -1).transpose(-4, -3).flatten(-5, -4).flatten(-3)     # (..., H/p * W/p, p * p * C)

def unpatchify(patches, p, channels):
    """The inverse of patchify, for square images."""
    side = math.isqrt(patches.shape[-2])
    x = patches.unflatten(-2, (side, side)).unflatten(-1, (p, p, channels))    # (..., H/p, W/p, p, p, C)
    return x.transpose(-4, -3).movedim(-1, -5).flatten(-2).flatten(-3, -2)     # (..., C, H, W)

class TimeEmbedding(nn.Module):
    """Sinusoids of t, counted in 1000 steps, then a small MLP (DiT's). (...) -> (..., out_dim)."""

    def __init__(self, out_dim, n_frequencies=64):
        super().__init__()
        self.register_buffer("frequency", 1000 * 10000 ** -torch.linspace(0, 1, n_frequencies), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * n_frequencies, 128), nn.SiLU(), nn.Linear(128, out_dim))

    def forward(self, t):
        angle = t[..., None] * self.frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

class LinearPatchEncoder(nn.Module):
    """Section 3: the embedding of t is added to every patch vector, then one linear layer. This is where t enters.
    Like every patch encoder, returns the patch vectors and what its decoder needs besides: here nothing.
    """

    def __init__(self, cfg):
        super().__init__()
        self.patch_size = cfg.patch_size
        self.time = TimeEmbedding(cfg.patch_dim)
        self.linear = nn.Linear(cfg.patch_dim, cfg.dim)

    def forward(self, latents, t):
        x = patchify(latents, self.patch_size) + self.time(t)[..., None, :]    # (B, K, N, P)
        return self.linear(x), None                                            # (B, K, N, D)

class LinearPatchDecoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.patch_size, self.channels = cfg.patch_size, cfg.latent_channels
        self.linear = nn.Linear(cfg.dim, cfg.patch_dim)

    def forward(self, x, _):
        return unpatchify(self.linear(x), self.patch_size, self.channels)      # (B, K, C, H, W)

class ResBlock(nn.Module):
    """Two convolutions and a shortcut around them; the embedding of t is added in the middle (as in DDPM)."""

    def __init__(self, n_in, n_out, time_dim):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(1, n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time = nn.Linear(time_dim, n_out)
        self.norm2, self.conv2 = nn.GroupNorm(1, n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.shortcut = nn.Conv2d(n_in, n_out, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[..., None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class UNetDown(nn.Module):
    """The paper's other encoder: the down half of a U-Net, from noised latents and t to one vector a patch.

    The side is halved log2(patch_size) times: never for patches of one latent, twice for 4 x 4. What every size looked
    like on the way goes to the up half, after the transformer: h_in = (embedding of t, skips), the long skip.
    """

    def __init__(self, cfg, time_dim=128):
        super().__init__()
        widths = [cfg.unet_dim * 2**i for i in range(cfg.patch_size.bit_length())]
        self.time = TimeEmbedding(time_dim)
        self.first = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(width, width, time_dim) for width in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1], cfg.dim)

    def forward(self, latents, t):
        x, time, skips = self.first(latents.flatten(0, 1)), self.time(t.flatten()), []   # all images in one batch
        for block, shrink in zip(self.blocks, [*self.shrink, nn.Identity()]):
            skips.append(block(x, time))                                       # (B * K, width, H / 2^i, W / 2^i)
            x = shrink(skips[-1])
        return self.last(x.flatten(2).mT).unflatten(0, t.shape), (time, skips)  # (B, K, N, D)

class UNetUp(nn.Module):
    """The up half: from the transformer's vectors, t and the long skip to the prediction for every latent."""

    def __init__(self, cfg, time_dim=128):
        super().__init__()
        self.grid = cfg.grid
        widths = [cfg.unet_dim * 2**i for i in range(cfg.patch_size.bit_length())][::-1]
        self.first = nn.Linear(cfg.dim, widths[0])
        self.blocks = nn.ModuleList(ResBlock(2 * width, width, time_dim) for width in widths)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.last = nn.Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, x, h_in):
        (time, skips), shape = h_in, x.shape[:2]
        x = self.first(x.flatten(0, 1)).mT.unflatten(-1, (self.grid, self.grid))
        for block, skip, grow in zip(self.blocks, reversed(skips), [*self.grow, nn.Identity()]):
            x = grow(block(torch.cat([x, skip], 1), time))
        return self.last(x).unflatten(0, shape)                                # (B, K, C, H, W)

PATCH_CODERS = {"linear": (LinearPatchEncoder, LinearPatchDecoder), "unet": (UNetDown, UNetUp)}

# ---- The model and its loss ------------------------------------------------------------------------------------------

def take(x, index):
    """Rows of x (B, M, D) by index (B, T) -> (B, T, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

def mean_where(x, counts):
    return (x * counts).sum() / counts.sum().clamp(min=1)

def nth_patch(image_id):
    """(B, T): which of its row's patches, all images in one list, an image place holds. Elsewhere unused."""
    return (image_id >= 0).cumsum(1).sub(1).clamp(min=0)

def token_losses(logits, tokens, image_id, text_between=True):
    """-log P(next token) of each place but the last, and which of them count: both (B, T - 1).

    logits (B, T - 1, V) are those of all places but the last. There is no LM loss where the input is BOI (what follows
    is an image) or a patch (EOI is appended, not predicted), nor where padding follows; nor, without text_between,
    where an instruction follows, text between two images, which is given and not to be imitated.
    """
    inputs, targets, n_images = tokens[:, :-1], tokens[:, 1:], image_id.cummax(1).values[:, 1:] + 1
    instructs = (targets >= N_SPECIAL) & (n_images > 0) & (n_images < n_images[:, -1:])
    counts = (inputs != BOI) & (image_id[:, :-1] < 0) & (targets != PAD) & (~instructs | text_between)
    error = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return error.view_as(targets), counts

class Transfusion(nn.Module):
    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, cfg.dim)
        encoder, decoder = PATCH_CODERS[cfg.patch_encoder]
        self.patch_encoder = encoder(cfg)
        # DEVIATION: patches know their place in the picture by a learned embedding; the paper has only the RoPE of
        # their raster order in the sequence (patch_position=False). Its share in the result was not measured apart.
        self.patch_position = nn.Parameter(torch.empty(cfg.n_patches, cfg.dim)) if cfg.patch_position else 0
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.dim)
        self.lm_head = nn.Linear(cfg.dim, vocab_size, bias=False)
        self.patch_decoder = decoder(cfg)
        for name, p in self.named_parameters():
            if p.dim() == 2 and (cfg.patch_encoder == "linear" or "coder" not in name):  # the U-Net keeps PyTorch's
                last_of_block = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * cfg.n_layers) if last_of_block else 1))

    def forward(self, tokens, image_id, latents=None, t=None, cache=None):
        """tokens, image_id (B, T), noised latents (B, K, C, H, W), t (B, K) -> logits (B, T, V), pred (B, K, C, H, W).

        With a cache the T places come behind those that are in it, and see them too; latents are then only those of
        the images among the T places. Without images, pred is latents as given.
        """
        is_patch, has_images = image_id >= 0, latents is not None and latents.shape[1] > 0
        x = self.token_embedding(tokens)                                       # (B, T, D)
        if has_images:
            patches, h_in = self.patch_encoder(latents, t)                     # (B, K, N, D)
            patches = patches + self.patch_position
            x = torch.where(is_patch[..., None], take(patches.flatten(1, 2), nth_patch(image_id)), x)

        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if cache is not None:
            position = position + cache.length[:, None]
            image_id = cache.image_id.scatter_(1, position, image_id)          # (B, all places)
        may_see = mixed_mask(image_id, self.cfg.bidirectional)
        mask = dense_mask(may_see, position, image_id.shape[1])                # (B, 1, T, all places)
        rope = rope_angles(position, self.cfg.dim // self.cfg.n_heads)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache and cache.store(i, position))      # (B, T, D)
        x = self.norm(x)
        logits = self.lm_head(x)                                               # (B, T, V)
        if not has_images:
            return logits, latents                                             # None, or empty
        # The inverse of that take: bring the image places to the front, in their order. Where a row has fewer than K
        # images, text places fill up, which the loss ignores. (Some row has all K, so there are at least K * N places.)
        places = is_patch.logical_not().long().argsort(dim=1, stable=True)[:, :patches.shape[1] * patches.shape[2]]
        return logits, self.patch_decoder(take(x, places).unflatten(1, patches.shape[1:3]), h_in)

    def loss(self, tokens, image_id, latents):
        """The joint loss of a batch of clean latents: (loss, loss_lm, loss_ddpm). Section 3, training objective."""
        # For guidance, some rows with a captioned image lose their text and train images only. NOT STATED: how often.
        drop = rows_to_drop(tokens, self.cfg.drop_text)

        # Every image has a t of its own. Text sees the images before it as noised as they are. So that there is
        # something to see, images that precede all text are noised at most to noise_cap (table 8 of the paper).
        k = torch.arange(latents.shape[1], device=tokens.device)[:, None]
        here = image_id[:, None] == k                                          # (B, K, T) the places of each image
        n_before = (tokens >= N_SPECIAL).cumsum(1)                             # (B, T) text tokens up to here
        all_text_follows = (n_before == 0) & (n_before[:, -1:] > 0)
        exists, shown_first = here.any(-1), (here & all_text_follows[:, None]).any(-1)  # (B, K)
        t = sample_t(exists.shape, self.cfg.t_power, tokens.device)
        t = torch.where(shown_first, t * self.cfg.noise_cap, t)

        # The text goes only now, after the cap: without its instruction too, an edit's first image keeps its t.
        tokens, image_id = without_text(tokens, image_id, drop)
        eps = torch.randn_like(latents)
        xt = q_sample(latents, eps, t, self.cfg.target)                        # the latents are noised, not the patches
        logits, pred = self(tokens[:, :-1], image_id[:, :-1], xt, t)           # the last place is never a patch

        # Diffusion loss: the mean square error of every image, then the mean over the images of the batch.
        error = (pred - diffusion_target(latents, eps, t, self.cfg.target)).square().mean((2, 3, 4))  # (B, K)
        loss_ddpm = mean_where(error, exists & (t > 0))                        # a clean image has nothing to tell

        # LM loss: a mean over the tokens that count.
        error, counts = token_losses(logits, tokens, image_id, self.cfg.text_between)
        loss_lm = mean_where(error, counts & ~drop[:, None])
        return loss_lm + self.cfg.lambda_ddpm * loss_ddpm, loss_lm, loss_ddpm

    def draw(self, look, logits, shape, steps, cfg_scale, sampler):
        """Diffusion mode: denoise images of the given shape (B, 1, C, H, W), and yield them after every step.

        look(xt, t) runs the model on them behind what was written; logits are those at the BOI before them.
        NOT STATED: the times. Here as dense as in training: a step adds an error, so few lie where it trained little.
        """
        xt = torch.randn(shape, device=logits.device)
        for t, t_next in pairwise(torch.linspace(1, 0, steps + 1, device=logits.device) ** (1 / self.cfg.t_power)):
            _, pred = look(xt, t)
            xt = p_sample(xt, guide(pred, cfg_scale), t, t_next, self.cfg.target, sampler)
            yield xt

# ---- Generation ------------------------------------------------------------------------------------------------------

def guide(out, cfg_scale):
    """Classifier-free guidance: away from the answer without the text. Rows with text come first, then their twins."""
    with_text, without = (out, out) if cfg_scale == 1 else out.chunk(2)
    return without + cfg_scale * (with_text - without)

@torch.no_grad()
def generate(model, tokens, image_id, latents, max_length=None, max_images=1, steps=50, cfg_scale=2.0, sampler="ddim",
             temperature=0.0, watch=None):
    """Go on from prompts until EOS, in one loop of two states. It is the LM head that switches, by saying BOI.

    Takes tokens, image_id (as pack makes them with end=False) and clean latents (K may be 0). Returns the same three,
    with what was written, and max_images more slots in latents, zero where nothing was drawn (cut off those that no row
    uses before you give them to the model again). A row ends with EOS, at max_length (by default room for 64 tokens and
    the images), or with a BOI after max_images. temperature 0 is greedy, as in the paper; cfg_scale 1 no guidance.
    `watch` is called with the three so far (copy what you keep) after every step. ValueError if a prompt does not fit.
    """
    cfg, B, n, device = model.cfg, len(tokens), model.cfg.n_patches, tokens.device
    max_length = max_length or tokens.shape[1] + 64 + max_images * (n + 2)
    if tokens.shape[1] > max_length:
        raise ValueError(f"the longest prompt takes {tokens.shape[1]} places, and max_length is {max_length}")
    images = torch.cat([latents, latents.new_zeros(B, max_images, *latents.shape[2:])], dim=1)
    n_images = image_id.amax(1) + 1                                            # (B,) images so far
    most_images = n_images + max_images
    length = ((tokens != PAD) * torch.arange(1, tokens.shape[1] + 1, device=device)).amax(1)

    def with_twins(x, twins=None):
        """For guidance every row gets a twin, a row with the same marks and images and no text, the null form of
        training: rows B to 2B. This stacks the twins' values, by default those of x again, under x (B, ...).
        """
        return x if cfg_scale == 1 else torch.cat([x, x if twins is None else twins])

    n_text = (tokens >= N_SPECIAL).sum(1)
    null_tokens, null_id = without_text(tokens, image_id, torch.ones_like(n_text, dtype=torch.bool))
    cache = KVCache(cfg, len(with_twins(tokens)), max_length + n + 1, like=model.lm_head.weight)  # + what is not kept
    written = torch.full((B, cache.image_id.shape[1]), PAD, device=device)     # the tokens of the places in the cache
    pads = torch.full((len(cache.length), n), PAD, device=device)
    logits = torch.zeros(len(cache.length), model.lm_head.out_features, device=device)  # at each row's last place

    def append(new_tokens, new_id, n_keep, new_latents=None):
        """Run new places after every row, images clean at t = 0. The first n_keep (rows,) of them stay in the cache,
        their tokens in written, and the logits at the last of them in logits.
        """
        t = None if new_latents is None else torch.zeros(new_latents.shape[:2], device=device)
        out, _ = model(new_tokens, new_id, new_latents, t, cache)
        written.scatter_(1, cache.length[:B, None] + torch.arange(new_tokens.shape[1], device=device), new_tokens[:B])
        newest = out[torch.arange(len(out), device=device), (n_keep - 1).clamp(min=0)]
        logits.copy_(torch.where(n_keep[:, None] > 0, newest, logits))
        cache.length += n_keep

    def so_far():
        kept = torch.arange(cache.length[:B].max(), device=device) < cache.length[:B, None]
        tokens, image_id = (x[:B, :kept.shape[1]] for x in (written, cache.image_id))
        return tokens.where(kept, PAD), image_id.where(kept, -1), images

    append(with_twins(tokens, null_tokens), with_twins(image_id, null_id), with_twins(length, length - n_text),
           with_twins(latents))
    while True:
        length = cache.length[:B]
        last = written.gather(1, length[:, None] - 1)[:, 0]
        writing = (last != BOI) & (last != EOS) & (length < max_length)
        drawing = (last == BOI) & (length + n < max_length) & (n_images < most_images)

        if writing.any():  # LM mode. A row that has said BOI waits until the others have too, or have ended.
            text_logits = logits[:B, :model.vocab_size]
            if temperature == 0:
                token = text_logits.argmax(-1)
            else:
                token = torch.multinomial((text_logits / temperature).softmax(-1), 1)[:, 0]
            # All rows run, but those that do not write keep nothing; and twins keep no text.
            n_keep = with_twins(writing, writing & (token < N_SPECIAL)).long()
            append(with_twins(token)[:, None], torch.full_like(n_keep, -1)[:, None], n_keep)
            if watch:
                watch(*so_far())

        elif drawing.any():  # Diffusion mode, for all rows that wait. The others run as text, and keep nothing.
            ids = with_twins(n_images.where(drawing, -1))[:, None].expand_as(pads)

            def look(xt, t, ids=ids):
                """Run only the images' own places, against the cached prefix; the next step writes over them."""
                return model(pads, ids, with_twins(xt), t.expand(len(pads), 1), cache)

            for xt in model.draw(look, logits, (B, 1, *latents.shape[2:]), steps, cfg_scale, sampler):
                images[drawing, n_images[drawing]] = xt[drawing, 0]
                if watch:
                    watch(*so_far())
            # NOT STATED: what stays. Here the finished image, run once more clean, and EOI, appended, not predicted.
            eoi = torch.full_like(pads[:, :1], EOI)
            append(torch.cat([pads, eoi], 1), torch.cat([ids, torch.full_like(eoi, -1)], 1),
                   with_twins(drawing) * (n + 1), with_twins(xt))
            n_images = n_images + drawing

        else:
            return so_far()

# ---- VAE: pictures to latents and back -------------------------------------------------------------------------------

class VAE(nn.Module):
    """A small convolutional VAE, trained first and then frozen. Pictures are uint8 (B, H, W, 3)."""

    def __init__(self, cfg):
        super().__init__()
        channels, side, _ = cfg.latent_shape
        stages = int(math.log2(cfg.image_size / side))                         # each halves the side
        widths = [cfg.vae_dim * 2 ** min(i, 2) for i in range(stages)]
        wide, self.kl = widths[-1], cfg.vae_kl
        down, up = [], []
        for n_in, n_out in zip([3] + widths, widths):
            down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.SiLU()]
        for n_in, n_out in zip(widths[::-1], widths[-2::-1] + [3]):
            up += [nn.SiLU(), nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(wide, wide, 3, padding=1), nn.SiLU(),
                                     nn.Conv2d(wide, 2 * channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(channels, wide, 3, padding=1), nn.SiLU(),
                                     nn.Conv2d(wide, wide, 3, padding=1), *up)
        # The statistics of the latents, so that diffusion sees every channel with mean 0 and variance 1.
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def posterior(self, pictures):
        """uint8 (B, H, W, 3) -> the pictures in [-1, 1], and mean and log variance of their latents (B, C, h, w)."""
        x = pictures.to(self.mean.device).movedim(-1, 1) / 127.5 - 1
        return x, *self.encoder(x).chunk(2, dim=1)

    def loss(self, pictures):
        """Squared error plus the KL divergence from N(0, 1), both a mean over their elements."""
        x, mean, log_var = self.posterior(pictures)
        z = mean + torch.randn_like(mean) * (log_var / 2).exp()
        kl = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        return F.mse_loss(self.decoder(z), x) + self.kl * kl

    @torch.no_grad()
    def calibrate(self, pictures):
        _, mean, _ = self.posterior(pictures)
        self.mean.copy_(mean.mean((0, 2, 3)).view(-1, 1, 1))
        self.std.copy_(mean.std((0, 2, 3)).view(-1, 1, 1))

    @torch.no_grad()
    def encode(self, pictures):
        """uint8 (B, H, W, 3) -> latents (B, C, h, w): the posterior's mean, scaled to unit variance."""
        return torch.cat([(self.posterior(some)[1] - self.mean) / self.std for some in pictures.split(512)])

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, C, h, w) -> uint8 pictures (B, H, W, 3)."""
        x = self.decoder(latents * self.std + self.mean).clamp(-1, 1)
        return ((x + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)

def make_batch(documents, vae, tokenizer, cfg, end=True):
    """Documents, lists of str and uint8 (H, W, 3) pictures, as tokens, image_id and latents: the data contract."""
    tokens, image_id = pack(documents, tokenizer, cfg.n_patches, end=end)
    pictures = [[torch.as_tensor(part) for part in document if not isinstance(part, str)] for document in documents]
    counts = torch.tensor([len(row) for row in pictures])
    filled = torch.arange(counts.max()) < counts[:, None]                      # (B, K)
    latents = vae.mean.new_zeros(*filled.shape, *cfg.latent_shape)
    if filled.any():
        everything = torch.stack([picture for row in pictures for picture in row])
        latents[filled.to(latents.device)] = vae.encode(everything)
    return tokens.to(latents.device), image_id.to(latents.device), latents

# ---- Chameleon: the baseline, with discrete images -------------------------------------------------------------------

def quantise(z, levels):
    """Finite scalar quantisation (Mentzer et al., 2023): every number takes the nearest of `levels` values around 0.

    DEVIATION: the paper's quantiser takes the nearest of 16,384 learned vectors, with a codebook loss (beta 0.25). Here
    the codes are a fixed grid: no codebook to train or to collapse, and a code's number follows from its vector.
    """
    z, middle = z.tanh() * (levels - 1) / 2, (levels - 1) / 2
    return z + ((z + middle).round() - middle - z).detach()                    # the gradient sees no rounding

def codes_of(latents, levels):
    """Quantised (B, K, C, H, W) -> codes (B, K, H * W), numbers with C digits to the base `levels`."""
    digits = (latents + (levels - 1) / 2).round().long().flatten(-2).mT        # (B, K, N, C)
    return (digits * levels ** torch.arange(digits.shape[-1], device=digits.device)).sum(-1)

def latents_of(codes, levels, shape):
    """The inverse of codes_of: (B, K, N) -> (B, K, C, H, W), with (C, H, W) = shape."""
    digits = codes[..., None] // levels ** torch.arange(shape[0], device=codes.device) % levels
    return (digits - (levels - 1) / 2).mT.unflatten(-1, shape[1:])

class QuantisedVAE(VAE):
    """The VAE with a quantised bottleneck: no noise, no KL loss."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # Unit variance, or nearly all numbers would round to the middle value at first, and never learn to leave it.
        self.levels, self.spread = cfg.code_levels, nn.BatchNorm2d(cfg.code_dim, affine=False)

    def posterior(self, pictures):
        x, z, log_var = super().posterior(pictures)
        return x, quantise(self.spread(z), self.levels), log_var

    def loss(self, pictures):
        x, z, _ = self.posterior(pictures)
        return F.mse_loss(self.decoder(z), x)

    def calibrate(self, pictures):
        """Nothing to do: the grid has its scale."""

class Chameleon(Transfusion):
    """The discrete baseline (arXiv 2405.09818). The same transformer, sequence and generation loop; what changes:

    1. A patch is a code, and every code is one more token of the vocabulary. There is no t.
    2. Attention is causal everywhere, and queries and keys are normalised.
    3. One loss, that of the next token, be it text or image, with a z-loss that keeps the logits small.
    4. To draw is to sample code after code, with guidance on the logits.
    """

    def __init__(self, cfg, vocab_size):
        super().__init__(replace(cfg, bidirectional=False, qk_norm=True), vocab_size + cfg.code_levels**cfg.code_dim)
        self.vocab_size = vocab_size                                           # of the text; the codes come after it
        del self.patch_encoder, self.patch_decoder                             # for the methods of these names

    def patch_encoder(self, latents, t):
        return self.token_embedding(self.vocab_size + codes_of(latents, self.cfg.code_levels)), None

    def patch_decoder(self, x, h_in):
        """Nothing: the logits have said it."""

    def loss(self, tokens, image_id, latents):
        """(loss, that of the text, that of the images), where the loss is a mean over all tokens, words and codes."""
        drop = rows_to_drop(tokens, self.cfg.drop_text)
        tokens, image_id = without_text(tokens, image_id, drop)
        logits, _ = self(tokens[:, :-1], image_id[:, :-1], latents)
        codes = self.vocab_size + codes_of(latents, self.cfg.code_levels).flatten(1)
        codes = F.pad(codes, (0, 1))                                           # so that there is one without images too
        tokens = tokens.where(image_id < 0, codes.gather(1, nth_patch(image_id)))
        error, is_text = token_losses(logits, tokens, image_id, self.cfg.text_between)
        is_text, is_code = is_text & ~drop[:, None], image_id[:, 1:] >= 0
        loss = mean_where(error + self.cfg.z_loss * logits.logsumexp(-1) ** 2, is_text | is_code)
        return loss, mean_where(error, is_text), mean_where(error, is_code)

    def draw(self, look, logits, shape, steps, cfg_scale, sampler):
        """Like Transfusion.draw, but code after code at temperature 1; `steps` and `sampler` are diffusion's."""
        codes = torch.zeros(shape[0], 1, self.cfg.n_patches, dtype=torch.long, device=logits.device)
        for n in range(self.cfg.n_patches):
            probability = guide(logits, cfg_scale)[:, self.vocab_size:].softmax(-1)
            codes[:, 0, n] = torch.multinomial(probability, 1)[:, 0]
            latents = latents_of(codes, self.cfg.code_levels, self.cfg.latent_shape)
            yield latents
            if n + 1 < self.cfg.n_patches:  # codes still to come are not seen, and t = 0 means nothing here
                logits = look(latents, logits.new_zeros(()))[0][:, n]

def make_models(cfg, vocab_size):
    """The transformer and the VAE that cfg.model names, untrained."""
    kinds = {"transfusion": (Transfusion, VAE), "chameleon": (Chameleon, QuantisedVAE)}
    return kinds[cfg.model][0](cfg, vocab_size), kinds[cfg.model][1](cfg)
