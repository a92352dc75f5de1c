"""Transfusion in one file: one transformer predicts the next token of text and denoises images.

Zhou et al., "Transfusion: Predict the Next Token and Diffuse Images with One Multi-Modal Model",
arXiv 2408.11039.

Text and images share one sequence. Text is a run of tokens, trained with next-token prediction. An
image is a run of patches, cut from the latents of a VAE, and trained with diffusion. The tokens BOI
and EOI (beginning and end of image) surround each image. Attention is causal, except that the
patches of one image all see each other. To generate, the model writes text until it predicts BOI.
Then it denoises an image, and continues with text.

In this file, an "image" is what the transformer reads and generates: latents. A "picture" is in
pixels.

Here are three training documents, with images of two patches. The row "predicts" shows the target
of the LM loss at each position, or "-" where there is none. The row "t" shows the range of the
noise level of each image: 0 is clean, and 1 is pure noise.

    text to image
        input     BOS  a    red     circle  .    BOI  patch  patch  EOI  EOS
        predicts  a    red  circle  .       BOI  -    -      -      EOS  -
        t                                             0 to 1

    captioning
        input     BOS  BOI  patch  patch  EOI  a    red     circle  .    EOS
        predicts  BOI  -    -      -      a    red  circle  .       EOS  -
        t                   0 to 0.5

    editing
        input     BOS  BOI  patch  patch  EOI  make  it     green  .    BOI  patch  patch  EOI  EOS
        predicts  BOI  -    -      -      make it    green  .      BOI  -    -      -      EOS  -
        t                   0 to 0.5                                     0 to 1

BOI and patches have no LM loss, because what follows them is known: all patches of the image, then
EOI. EOS has none, because nothing follows. So the targets are text tokens, BOI and EOS. At a patch,
the transformer denoises that same patch, not the next one.

Each image has its own noise level and a diffusion loss. If a document begins with an image and
continues after it, this image is a condition: the rest of the document depends on what it shows. So
its t is at most 0.5, the noise cap. In all other places, the model has to generate images, starting
from pure noise, so t goes up to 1.

A comment with `DEVIATION:` says where this file differs from the paper, and which option, if any,
restores the paper's choice. `NOT STATED:` means that the paper does not say.

The documents come from data/tasks.py. By default, 10 % are text alone, and 90 % are pairs of a
caption and an image. In half of the pairs, the caption comes first. DEVIATION: in the paper, this
is so in 80 % of the pairs (--caption-first 0.8). A caption that comes first is dropped with
probability 0.1. This leaves a single image, without a noise cap, and teaches the model to generate
without text, for classifier-free guidance. With --task edit, 45 % of the documents are edits, whose
instruction is dropped with the same probability.

This is how the model is trained and used (train.py has the training loop):

    loss, parts = model.loss(encode(documents, tokenizer, vae))
    documents = generate(model, encode(prompts, tokenizer, vae))

The paper reports FID for generated images (lower is better) and CIDEr for captions (higher is
better). Its findings:
    - Chameleon, the baseline, turns images into discrete tokens. Transfusion reaches the same FID
      with 3 % of its FLOPs (7B parameters).
    - Bidirectional attention inside images improves FID from 61.3 to 20.3 (0.76B).
    - If the two halves of a U-Net then replace the linear layers before and after the transformer,
      FID improves to 16.7, and CIDEr from 16.0 to 25.4 (0.76B).
    - The noise cap then improves CIDEr to 29.4 (0.76B).

                              here              the paper
    parameters                0.25M             0.16B to 7B
    width of the transformer  64                768 to 4096
    picture                   32 x 32 pixels    256 x 256 pixels
    latents                   4 x 8 x 8         8 x 32 x 32
    patches per image         16, of 2 x 2      256, of 2 x 2

The method ends with the section "Generation". The tokenizer, the VAE, U-Net patches and the
baseline Chameleon come after it.

Shapes: B documents, T positions, M images in the batch, C x H x W latents, N patches per image
(grid x grid), D width of the transformer, V size of the vocabulary, S x S pixels.
"""

import math
import re
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

# ---- Configuration -------------------------------------------------------------------------------

@dataclass
class Config:
    """Each field is an option of train.py, and its comment is the help text. Skip this at first."""
    model: Literal["transfusion", "chameleon"] = "transfusion"  # chameleon is the baseline
    dim: int = 64  # width of the transformer
    n_layers: int = 4  # number of transformer blocks
    n_heads: int = 4  # attention heads per block
    qk_norm: bool = False  # normalise queries and keys
    bidirectional: bool = True  # the patches of an image see each other; off: causal attention only
    target: Literal["eps", "x0"] = "x0"  # what the model predicts: the noise or the clean image
    t_power: float = 2.0  # t has density t_power * t^(t_power - 1); 1: uniform, above 1: more noise
    patch_encoder: Literal["linear", "unet"] = "linear"  # and patch decoder
    lambda_ddpm: float = 5.0  # weight of the diffusion loss; the paper uses 5, with eps
    noise_cap: float = 0.5  # largest t, in training, of an image that is a condition
    image_size: int = 32  # pixels per side of a picture
    latent_size: int = 8  # height and width of the latents
    latent_channels: int = 4  # channels of the latents
    patch_size: int = 2  # height and width of a patch, in positions of the latents
    vae_dim: int = 24  # channels of the VAE at half the resolution of the picture

    def __post_init__(self):
        for f in fields(self):
            if f.type is int and getattr(self, f.name) < 1:
                raise ValueError(f"{f.name} must be at least 1")
        if not 0 < self.t_power < math.inf or not 0 <= self.noise_cap <= 1:
            raise ValueError("t_power must be more than 0, and noise_cap from 0 to 1")
        if self.dim % (2 * self.n_heads):  # RoPE rotates pairs of features of each head
            raise ValueError(f"dim ({self.dim}) must be a multiple of 2 * n_heads")
        if self.latent_size % self.patch_size:
            raise ValueError(f"patch_size ({self.patch_size}) must divide latent_size")
        if self.patch_encoder == "unet" and self.patch_size not in (1, 2, 4, 8, 16):
            raise ValueError(f"patch_size ({self.patch_size}) must be a power of 2 for a U-Net")
        if self.image_size not in [self.latent_size * 2**n for n in range(1, 9)]:
            raise ValueError(f"image_size ({self.image_size}) must be latent_size * 2, 4, 8, ...")
        self.grid = self.latent_size // self.patch_size  # patches per side of an image
        self.n_patches = self.grid**2
        self.latent_shape = (self.latent_channels, self.latent_size, self.latent_size)

# ---- Documents -----------------------------------------------------------------------------------

# The special tokens. PATCH is a placeholder for each patch of an image.
PAD, BOS, EOI, PATCH = 0, 1, 2, 3  # the model never predicts these
BOI, EOS = 4, 5  # the model predicts these, and text tokens, which begin at 6
N_NEVER_PREDICTED, N_SPECIAL = 4, 6

def pack(documents, cfg, device):
    """Documents -> tokens (B, T) and images (M, C, H, W).

    A document is a list of text tokens (int) and images, in reading order. An image is a float
    tensor (C, H, W), or, in the baseline Chameleon, an int tensor (N,).
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
            else:  # Chameleon's images are tokens
                row += [BOI, *item.tolist(), EOI]
        rows.append(torch.tensor([*row, EOS]))
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    images = torch.stack(images) if images else torch.zeros(0, *cfg.latent_shape, device=device)
    return tokens.to(device), images

def next_tokens(tokens):
    """The row "predicts" of the tables above: for all positions but the last, the next token
    (B, T - 1), and whether it is a target of the LM loss, bool (B, T - 1).

    In Chameleon, images are tokens and so targets, too.
    """
    targets = tokens[:, 1:]
    return targets, targets >= N_NEVER_PREDICTED

def attention_mask(tokens, bidirectional):
    """Section 3, "Transfusion attention": which keys (columns) each query (row) attends to.

    tokens (B, T) -> bool (B, 1, T, T), the same for all heads. Padding is on the right, so causal
    attention hides it.
    """
    T = tokens.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    is_patch = tokens == PATCH
    image_index = (tokens == BOI).cumsum(1)  # 1 from the first image on, 2 from the second on, ...
    same_image = image_index[:, :, None] == image_index[:, None, :]
    both_patches = is_patch[:, :, None] & is_patch[:, None, :]
    return (causal | (same_image & both_patches & bidirectional))[:, None]

# ---- Diffusion -----------------------------------------------------------------------------------

def noise_levels(u, cfg):
    """Numbers u in [0, 1] -> noise levels t.

    In training, u is random and uniform. In sampling, u falls from 1 to 0 in equal steps. NOT
    STATED: the distribution of t. DDPM's is uniform (--t-power 1). The default here is t = sqrt(u),
    which is above 0.5 three times out of four. High noise gets more training, because at high noise
    the text determines what the image shows.
    """
    return u ** (1 / cfg.t_power)

def alpha_bar(t):
    """Cosine schedule (section 2.2): t (M,) -> alpha_bar (M, 1, 1, 1).

    sqrt(alpha_bar) = cos(t * pi / 2). If x0 has variance 1, so has x_t, and alpha_bar is the share
    of this variance that is signal. Here t is continuous; the paper's timestep is 1000 t. The clamp
    prevents division by zero in the functions below.
    """
    return torch.cos(t * math.pi / 2).square().clamp(1e-6, 1 - 1e-6)[:, None, None, None]

def q_sample(x0, eps, t):
    """Section 2.2: add noise eps ~ N(0, 1) to images x0, both (M, C, H, W), at levels t (M,)."""
    ab = alpha_bar(t)
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps

def predicted_x0(xt, pred, t, target):
    """The predicted x0, for a model that predicts x0 or eps.

    From eps, it follows by solving the equation of q_sample for x0:
        x0 = (x_t - sqrt(1 - ab) eps) / sqrt(ab), where ab is alpha_bar
    DEVIATION: the paper predicts eps (--target eps --t-power 1). At this size, predicting x0 needs
    far fewer training steps (data/README.md). A likely reason: near t = 1, x_t is almost equal to
    eps, so eps can be predicted without reading the text, but x0 cannot.
    """
    ab = alpha_bar(t)
    return pred if target == "x0" else (xt - (1 - ab).sqrt() * pred) / ab.sqrt()

def p_sample(xt, x0, t, t_next, eta):
    """One denoising step, from t to t_next < t, given the predicted x0.

    The noise in x_t follows by solving the equation of q_sample for eps:
        eps = (x_t - sqrt(ab) x0) / sqrt(1 - ab)
    Then x0 is noised again, to the lower level t_next:
        x_next = sqrt(ab_next) x0 + sqrt(1 - ab_next - sigma^2) eps + sigma z
        sigma = eta sqrt((1 - ab_next) / (1 - ab) * (1 - ab / ab_next))
    With eta = 0 (DDIM), sigma is 0, and this is q_sample(x0, eps, t_next): the noise stays the
    same. With eta = 1 (DDPM's ancestral sampler), fresh noise z ~ N(0, 1) replaces part of eps. For
    eta from 0 to 1, the variance of all the noise is 1 - ab_next, as level t_next requires. These
    are equations 12 and 16 of the DDIM paper (arXiv 2010.02502). NOT STATED: the sampler of
    Transfusion.
    """
    ab, ab_next = alpha_bar(t), alpha_bar(t_next)
    eps = (xt - ab.sqrt() * x0) / (1 - ab).sqrt()
    sigma = eta * ((1 - ab_next) / (1 - ab) * (1 - ab / ab_next)).sqrt()
    z = torch.randn(xt.shape, device=xt.device)
    eps_scale = (1 - ab_next - sigma**2).clamp(min=0).sqrt()  # clamp: rounding errors
    return ab_next.sqrt() * x0 + eps_scale * eps + sigma * z

def guide(conditional, unconditional, guidance_scale):
    """Classifier-free guidance: move a prediction away from the one made without the text.

    A scale of 1 is no guidance. Guiding x0 has the same effect as guiding eps, because for a given
    x_t one is an affine function of the other, and the weights of the predictions add up to 1.
    Chameleon guides logits. DEVIATION: the default is 2; the paper uses 3, and 5 in the comparison
    with Chameleon (--guidance-scale). NOT STATED: how often the paper drops the text in training
    (here: --unconditional-share 0.1).
    """
    return unconditional + guidance_scale * (conditional - unconditional)

def without_text(documents):
    """Documents for the unconditional prediction. They keep their images, for example to edit."""
    return [[item for item in document if not isinstance(item, int)] for document in documents]

# ---- Transformer: Llama (RMSNorm, RoPE, SwiGLU, no biases) ---------------------------------------

def rope(x):
    """Rotary position embedding of queries or keys x (..., T, head_dim).

    Each pair of neighbouring features is read as a complex number, and rotated by an angle that is
    proportional to the position. The dot product of a query and a key then depends on the distance
    between their positions. Each patch takes one position, in raster order.
    """
    T, head_dim = x.shape[-2:]
    frequency = 10000 ** -(torch.arange(0, head_dim, 2, device=x.device) / head_dim)
    angle = torch.arange(T, device=x.device)[:, None] * frequency  # (T, head_dim / 2)
    rotation = torch.complex(angle.cos(), angle.sin())
    x = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x * rotation).flatten(-2)

class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.dim // cfg.n_heads
        self.wq = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.wo = nn.Linear(cfg.dim, cfg.dim, bias=False)
        norm = nn.RMSNorm if cfg.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim)
        self.k_norm = norm(self.head_dim)

    def forward(self, x, mask):
        q = self.split_heads(self.wq(x))  # (B, heads, T, head_dim)
        k = self.split_heads(self.wk(x))
        v = self.split_heads(self.wv(x))
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(x.transpose(1, 2).flatten(2))  # (B, T, D)

    def split_heads(self, x):
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

class FeedForward(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        hidden = 32 * round(8 / 3 * cfg.dim / 32)  # 8/3 D, rounded to a multiple of 32
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
    """What Transfusion and Chameleon share: embeddings, transformer blocks and the LM head.

    The vocabulary has n_text tokens, special ones included. Chameleon adds the codes of its images.
    """

    def __init__(self, cfg, n_text, n_codes=0):
        super().__init__()
        self.cfg, self.n_text = cfg, n_text
        self.token_embedding = nn.Embedding(n_text + n_codes, cfg.dim)
        # DEVIATION: the paper mentions only RoPE. With a learned embedding for each patch of the
        # grid as well, models of this size generate and caption more reliably.
        self.patch_position = nn.Parameter(torch.empty(cfg.n_patches, cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(cfg.dim)
        self.lm_head = nn.Linear(cfg.dim, n_text + n_codes, bias=False)

    @property
    def device(self):
        return self.lm_head.weight.device

    def embed(self, tokens):
        """Tokens (B, T) -> embeddings (B, T, D)."""
        is_patch = (tokens == PATCH) | (tokens >= self.n_text)  # the latter are Chameleon's codes
        # 0 to N - 1 in each image, as all images have N patches. It has no effect on text.
        position = (is_patch.cumsum(1) - 1) % self.cfg.n_patches
        x = self.token_embedding(tokens)
        return x + is_patch[:, :, None] * self.patch_position[position]

    def transformer(self, x, mask):
        """Embeddings (B, T, D) and a mask (B, 1, T, T) -> (B, T, D)."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

def init_weights(model):
    """As in GPT-2: N(0, 0.02^2), and smaller for wo and w2, which end a residual branch.

    This includes the patch encoder and decoder, which learn more slowly with PyTorch's own
    initialisation. As in DiT, the last layer of the patch decoder is zero. All other norms and
    biases keep PyTorch's initialisation.
    """
    for name, p in model.named_parameters():
        if name.startswith("patch_decoder.last"):
            nn.init.zeros_(p)
        elif p.dim() > 1:
            std = 0.02
            if name.endswith(("wo.weight", "w2.weight")):
                std /= math.sqrt(2 * model.cfg.n_layers)
            nn.init.normal_(p, std=std)

# ---- Linear patches ------------------------------------------------------------------------------

class TimeEmbedding(nn.Module):
    """Sinusoids of the paper's timestep, 1000 t, then a small MLP: (M,) -> (M, out_dim)."""

    def __init__(self, out_dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, out_dim))

    def forward(self, t):
        frequency = 10000 ** -torch.linspace(0, 1, 64, device=t.device)  # from 1 to 0.0001
        angle = 1000 * t[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

class LinearPatchEncoder(nn.Module):
    """Section 3: the same linear layer for all patches. Then the embedding of t is added.

    With linear patches, t enters the model here and nowhere else. DEVIATION: the paper adds the
    embedding of t before the linear layer, to the values of the patch. Here a patch has only 16
    values (4 x 2 x 2), too few for a useful embedding of t.
    """

    def __init__(self, cfg):
        super().__init__()
        # A convolution whose stride is its kernel size is one linear layer for all patches.
        p = cfg.patch_size
        self.linear = nn.Conv2d(cfg.latent_channels, cfg.dim, kernel_size=p, stride=p)
        self.time = TimeEmbedding(cfg.dim)

    def forward(self, xt, t):
        patches = self.linear(xt).movedim(1, -1)  # (M, grid, grid, D)
        skips = None  # only a U-Net has skip connections
        return patches + self.time(t)[:, None, None], skips

class LinearPatchDecoder(nn.Module):
    """One linear layer, applied to the transformer's output at every patch."""

    def __init__(self, cfg):
        super().__init__()
        p = cfg.patch_size
        self.last = nn.ConvTranspose2d(cfg.dim, cfg.latent_channels, kernel_size=p, stride=p)

    def forward(self, x, skips):
        return self.last(x.movedim(-1, 1))  # (M, grid, grid, D) -> (M, C, H, W)

# ---- Transfusion ---------------------------------------------------------------------------------

class Transfusion(Llama):
    def __init__(self, cfg, n_text):
        super().__init__(cfg, n_text)
        is_linear = cfg.patch_encoder == "linear"
        self.patch_encoder = LinearPatchEncoder(cfg) if is_linear else UNetDown(cfg)
        self.patch_decoder = LinearPatchDecoder(cfg) if is_linear else UNetUp(cfg)
        init_weights(self)

    def forward(self, tokens, xt, t):
        """Tokens (B, T), noisy images (M, C, H, W) and their noise levels (M,) -> logits of the
        next token (B, T, V), and the prediction of eps or x0 (M, C, H, W).
        """
        x = self.embed(tokens)  # (B, T, D)
        patches, skips = self.patch_encoder(xt, t)  # (M, grid, grid, D)

        # So far, x at a patch is the embedding of PATCH plus that of the position in the grid. Add
        # the encoded patch. x[is_patch] (M * N, D) has the patches in reading order, document by
        # document, like the images of `pack`.
        is_patch = tokens == PATCH
        x[is_patch] += patches.flatten(0, 2)

        x = self.transformer(x, attention_mask(tokens, self.cfg.bidirectional))
        logits = self.lm_head(x)
        pred = self.patch_decoder(x[is_patch].view(patches.shape), skips)
        return logits, pred

    def loss(self, documents):
        """Section 3, training objective: L = L_LM + lambda * L_DDPM.

        Returns the loss, and a dict of its two parts, for the log.
        """
        cfg = self.cfg
        tokens, x0 = pack(documents, cfg, self.device)

        t = noise_levels(torch.rand(len(x0), device=self.device), cfg)  # (M,), one for each image
        # The noise cap (table 8) is for conditions: the document begins with the image (BOI is at
        # position 1), and continues after it (the token after EOI is not EOS).
        row, column = (tokens == BOI).nonzero(as_tuple=True)  # where each of the M images begins
        after_eoi = tokens[row, column + cfg.n_patches + 2]  # BOI, N patches, EOI: N + 2 positions
        is_condition = (column == 1) & (after_eoi != EOS)
        # NOT STATED: the distribution of t under the cap. Here it is uniform, whatever t_power is.
        t = torch.where(is_condition, cfg.noise_cap * torch.rand_like(t), t)

        eps = torch.randn_like(x0)
        xt = q_sample(x0, eps, t)  # noise is added to the latents, before they are cut into patches
        logits, pred = self(tokens, xt, t)

        # L_LM: the mean over all positions of the batch that have a target.
        targets, has_loss = next_tokens(tokens)
        loss_lm = F.cross_entropy(logits[:, :-1][has_loss], targets[has_loss])

        # L_DDPM: the mean squared error of each image, then the mean over the images of the batch.
        target = x0 if cfg.target == "x0" else eps
        error = (pred - target).square()  # (M, C, H, W)
        loss_ddpm = error.mean((1, 2, 3)).sum() / max(1, len(error))  # 0 without images

        return loss_lm + cfg.lambda_ddpm * loss_ddpm, {"text": loss_lm, "image": loss_ddpm}

    def logits(self, documents):
        """Documents with clean images -> their tokens (B, T) and the logits (B, T, V).

        NOT STATED: which t the model gets for clean images in inference. Here it is 0.
        """
        tokens, images = pack(documents, self.cfg, self.device)
        logits, _ = self(tokens, images, t=torch.zeros(len(images), device=self.device))
        return tokens, logits

    def predict_x0(self, documents, xt, t):
        """Append xt[i] to document i, and predict its x0: (B, C, H, W) -> (B, C, H, W).

        All images in xt have noise level t (1,). Earlier images of the documents are clean.
        """
        with_xt = [[*document, image] for document, image in zip(documents, xt)]
        tokens, images = pack(with_xt, self.cfg, self.device)
        # `images` has those of the first document, then those of the second, and so on. Each xt[i]
        # is the last of its document: if three documents have 1, 2 and 1 images, the last ones are
        # at index 0, 2 and 3. What `pack` adds after xt[i] has no effect: attention is causal.
        last = (tokens == BOI).sum(1).cumsum(0) - 1  # (B,)
        t_of_images = torch.zeros(len(images), device=self.device)
        t_of_images[last] = t
        _, pred = self(tokens, images, t_of_images)
        return predicted_x0(xt, pred[last], t, self.cfg.target)

    def draw(self, documents, steps, guidance_scale, eta, show):
        """Diffusion mode: generate the next image of each document. Returns (B, C, H, W).

        Each step runs the model on the whole sequence. For a sequence this short, a KV cache would
        not pay off. DEVIATION: the paper uses 250 steps; here the default is 50 (--steps).
        """
        both = documents + without_text(documents)  # 2B documents: each xt has two predictions
        xt = torch.randn(len(documents), *self.cfg.latent_shape, device=self.device)
        # NOT STATED: the noise levels of the steps. Here they are distributed as in training.
        times = noise_levels(torch.linspace(1, 0, steps + 1, device=self.device), self.cfg)
        for t, t_next in pairwise(times.split(1)):  # each (1,)
            conditional, unconditional = self.predict_x0(both, torch.cat([xt, xt]), t).chunk(2)
            x0 = guide(conditional, unconditional, guidance_scale)
            # Near t = 1, predicted_x0 divides the error of a predicted eps by a number near 0. The
            # clamp limits the result. True latents rarely exceed 5 in magnitude.
            x0 = x0.clamp(-5, 5)
            xt = p_sample(xt, x0, t, t_next, eta)
            show(xt)
        return xt

# ---- Generation ----------------------------------------------------------------------------------

def next_logits(model, documents):
    """Logits (B, V) of the token after each document."""
    tokens, logits = model.logits(documents)
    # `pack` ends every document with EOS, even an unfinished one. Attention is causal, so EOS does
    # not change the logits at the position before it, and these are the logits of the next token.
    is_before_eos = tokens[:, 1:] == EOS
    return logits[:, :-1][is_before_eos]

def sample_tokens(logits, temperature):
    """One token for each row of logits (B, V). Temperature 0 is greedy, the paper's choice."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]

def write(model, documents, max_tokens, temperature):
    """LM mode: append text to each document, in place, until the model predicts BOI or EOS, or has
    written max_tokens. Returns the documents for which it predicted BOI; all others are finished.

    BOI and EOS are not appended, since `pack` inserts them.
    """
    wants_image = []
    for _ in range(max_tokens):
        if not documents:
            break
        logits = next_logits(model, documents)[:, : model.n_text]  # without Chameleon's codes
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
    show=lambda xt: None,  # called with the noisy images after each denoising step
):
    """Section 3, inference: continue documents, which are lists of tokens and images.

    The model itself switches to diffusion mode, by predicting BOI. After the image, `pack` inserts
    EOI, and LM mode continues. A document is finished when the model predicts EOS, has written
    max_tokens tokens in a row, or predicts BOI after max_images new images.
    """
    documents = [list(document) for document in documents]  # copies, which are extended in place
    unfinished = documents
    for _ in range(max_images):
        wants_image = write(model, unfinished, max_tokens, temperature)
        if not wants_image:
            return documents
        images = model.draw(wants_image, steps, guidance_scale, eta, show)
        for document, image in zip(wants_image, images):
            document.append(image)
        unfinished = wants_image
    write(model, unfinished, max_tokens, temperature)  # the text after the last image
    return documents

# ---- Tokenizer: text to tokens and back ----------------------------------------------------------

class Tokenizer:
    """A known word is one token, together with the space before it. All other text becomes UTF-8
    bytes, one token each.

    If only "a" and "red" are known, "a red dog" becomes the tokens " a" and " red", and one token
    for each byte of " dog". Encoding adds the first space, and decoding removes it.
    """

    def __init__(self, words):
        pieces = [word if word in ".,;:!?" else " " + word for word in words]
        self.bytes_of = [bytes([i]) for i in range(256)] + [piece.encode() for piece in pieces]
        self.token_of = {piece: N_SPECIAL + 256 + i for i, piece in enumerate(pieces)}

    def __len__(self):
        return N_SPECIAL + len(self.bytes_of)

    @staticmethod
    def split(text):
        """A list of pieces: words with the space before them, and all other characters.

        "a red circle." -> [" a", " red", " circle", "."]
        """
        return re.findall(r" ?[^\s.,;:!?]+|.", " " + text, re.DOTALL)

    def encode(self, text):
        """str -> list of tokens."""
        tokens = []
        for piece in self.split(text):
            if piece in self.token_of:
                tokens.append(self.token_of[piece])
            else:
                tokens += [N_SPECIAL + byte for byte in piece.encode(errors="replace")]
        return tokens

    def decode(self, tokens):
        """List of tokens -> str. Bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.bytes_of[token - N_SPECIAL] for token in tokens)
        return text.removeprefix(b" ").decode(errors="replace")

def encode(documents, tokenizer, vae):
    """Documents of str and pictures, uint8 (S, S, 3) -> documents of tokens and images."""
    parts = [part for document in documents for part in document]
    pictures = [torch.as_tensor(part) for part in parts if not isinstance(part, str)]
    images = []
    if pictures:
        n = max(1, 2**19 // pictures[0].shape[0] ** 2)  # limits memory: 512 pictures of 32 x 32
        for batch in torch.stack(pictures).split(n):
            images += vae.encode(batch)
    images = iter(images)
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

    DEVIATION: the paper's VAE has 86M parameters.
    """

    def __init__(self, cfg):
        super().__init__()
        n_halvings = int(math.log2(cfg.image_size / cfg.latent_size))
        widths = [3] + [cfg.vae_dim * 2**i for i in range(n_halvings)]  # channels: 3, 24, 48, ...
        wide = widths[-1]
        down, up = [], []
        for n_in, n_out in pairwise(widths):
            down += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1), nn.SiLU()]
        for n_in, n_out in pairwise(widths[::-1]):
            up += [nn.SiLU(), nn.ConvTranspose2d(n_in, n_out, 4, stride=2, padding=1)]
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
        # The noise schedule assumes latents of mean 0 and variance 1. So the posterior means are
        # normalised. The decoder reads normalised latents, and log_var is on the same scale.
        # vae.eval() freezes the statistics. NOT STATED: how the paper scales its latents.
        self.normalise = nn.BatchNorm2d(cfg.latent_channels, affine=False)

    def to_input(self, pictures):
        """uint8 (M, S, S, 3) -> float (M, 3, S, S) in [-1, 1], on the device of the VAE."""
        return pictures.movedim(-1, 1).to(self.normalise.running_mean.device) / 127.5 - 1

    def posterior(self, x):
        """The mean and the log variance of the latents, both (M, C, H, W)."""
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return self.normalise(mean), log_var

    def loss(self, pictures, kl_weight=1e-3):
        """Squared error of the reconstruction + kl_weight * KL(posterior, N(0, 1)).

        Both are means over all elements. The KL keeps the variance of the posterior from shrinking
        to 0.
        """
        x = self.to_input(pictures)
        mean, log_var = self.posterior(x)
        z = mean + (log_var / 2).exp() * torch.randn_like(mean)
        kl = (mean**2 + log_var.exp() - 1 - log_var).mean() / 2
        return F.mse_loss(self.decoder(z), x) + kl_weight * kl

    @torch.no_grad()
    def encode(self, pictures):
        """uint8 (M, S, S, 3) -> latents (M, C, H, W): the mean of the posterior."""
        return self.posterior(self.to_input(pictures))[0]

    @torch.no_grad()
    def decode(self, latents):
        """Latents (M, C, H, W) -> uint8 (M, S, S, 3)."""
        x = self.decoder(latents).clamp(-1, 1)
        return ((x + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)

# ---- U-Net patches -------------------------------------------------------------------------------

UNET_DIM = 32  # channels at the resolution of the latents; each halving doubles them
TIME_DIM = 128  # dimension of the embedding of t

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
    """The first half of a U-Net. In the paper, U-Net patches are better than linear ones (table 5).

    Convolutions mix neighbouring patches. Skip connections bypass the transformer: they carry the
    features of every resolution to the second half, which also gets the embedding of t.
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
        patches = self.last(x.movedim(1, -1))  # (M, grid, grid, D)
        return patches, (time, features)

class UNetUp(nn.Module):
    """The second half of the U-Net: from the transformer's output to a prediction (M, C, H, W).

    It begins at the resolution of the patches. At each resolution, it concatenates the skip
    connection and applies a block. Then a transposed convolution doubles the resolution. At the
    last resolution, a plain convolution makes the prediction instead.
    """

    def __init__(self, cfg):
        super().__init__()
        widths = unet_widths(cfg)[::-1]
        self.first = nn.Linear(cfg.dim, widths[0])
        self.blocks = nn.ModuleList(ResBlock(2 * width, width) for width in widths)
        doublings = [nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairwise(widths)]
        self.last = nn.Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)
        self.convs = nn.ModuleList(doublings)

    def forward(self, x, skips):
        time, features = skips
        x = self.first(x).movedim(-1, 1)  # (M, width, grid, grid)
        convs = [*self.convs, self.last]
        for block, conv, feature in zip(self.blocks, convs, reversed(features)):
            x = conv(block(torch.cat([x, feature], dim=1), time))
        return x  # (M, C, H, W)

# ---- Chameleon: the baseline, with discrete images -----------------------------------------------

CODE_LEVELS, CODE_DIM = 5, 4
N_CODES = CODE_LEVELS**CODE_DIM  # 625
CODE_TEMPERATURE = 0.5  # if higher, drawings match captions less often; if lower, they vary less

class QuantisedVAE(VAE):
    """An autoencoder with a latent vector of 4 integers, from -2 to 2, for each patch. Add 2 to
    each, and they are the digits of a number in base 5, from 0 to 624. The code of the patch is the
    token n_text + this number.

    DEVIATION: the paper learns a codebook of 16,384 vectors, and has one code for each position of
    its 32 x 32 latents. Here the codebook is fixed, with all combinations of integers (FSQ, arXiv
    2309.15505), and an image has one code for each patch.
    """

    def __init__(self, cfg, n_text):
        # Each latent vector covers as many pixels as one of Transfusion's patches.
        super().__init__(replace(cfg, latent_size=cfg.grid, patch_size=1, latent_channels=CODE_DIM))
        self.n_text = n_text
        powers = CODE_LEVELS ** torch.arange(CODE_DIM)  # 1, 5, 25, 125
        self.register_buffer("powers", powers[:, None, None])

    def quantise(self, x):
        """Pictures (M, 3, S, S) -> integers (M, 4, grid, grid), as floats.

        In half of the training steps, uniform noise replaces the rounding error. Without this
        noise, training sometimes fails.
        """
        mean, _ = self.posterior(x)
        z = mean.tanh() * (CODE_LEVELS // 2)  # from -2 to 2
        if self.training and torch.rand(()) < 0.5:
            return z + (torch.rand_like(z) - 0.5)
        return z + (z.round() - z).detach()  # straight-through: rounded, with the gradient of z

    def loss(self, pictures):
        """Squared error of the reconstruction. There is no KL."""
        x = self.to_input(pictures)
        return F.mse_loss(self.decoder(self.quantise(x)), x)

    @torch.no_grad()
    def encode(self, pictures):
        """uint8 (M, S, S, 3) -> codes (M, N) int64."""
        digits = self.quantise(self.to_input(pictures)).round().long() + CODE_LEVELS // 2
        return self.n_text + (digits * self.powers).sum(1).flatten(1)

    def decode(self, codes):
        """Codes (M, N) -> uint8 (M, S, S, 3)."""
        grid = math.isqrt(codes.shape[1])
        codes = (codes - self.n_text).unflatten(1, (1, grid, grid))  # (M, 1, grid, grid)
        digits = codes // self.powers % CODE_LEVELS  # (M, 4, grid, grid)
        return super().decode((digits - CODE_LEVELS // 2).float())

class Chameleon(Llama):
    """The discrete baseline (arXiv 2405.09818): a language model of text and codes.

    The documents and the transformer are those of Transfusion. But there is only the next-token
    loss, attention is causal, and an image is generated by sampling its codes.

    For stability, it has a z-loss, and QK-norm with --preset chameleon of train.py. DEVIATION: its
    blocks are pre-norm, as in Llama. In the paper, Chameleon's blocks are post-norm.
    """

    def __init__(self, cfg, n_text):
        super().__init__(cfg, n_text, N_CODES)
        init_weights(self)

    def logits(self, documents):
        """Documents -> their tokens (B, T) and next-token logits (B, T, V), for text and codes."""
        tokens, _ = pack(documents, self.cfg, self.device)
        mask = attention_mask(tokens, bidirectional=False)
        return tokens, self.lm_head(self.transformer(self.embed(tokens), mask))

    def loss(self, documents, z_weight=1e-5):
        """The next-token loss, and a z-loss: log(Z)^2, with Z the denominator of the softmax."""
        tokens, logits = self.logits(documents)
        targets, has_loss = next_tokens(tokens)
        logits, targets = logits[:, :-1][has_loss], targets[has_loss]
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = losses.mean() + z_weight * logits.logsumexp(-1).square().mean()

        is_code = targets >= self.n_text
        loss_codes = losses[is_code].sum() / max(1, is_code.sum())  # 0 without images
        return loss, {"text": losses[~is_code].mean(), "image": loss_codes}

    def draw(self, documents, steps, guidance_scale, eta, show):
        """Sample the codes of the next image of each document, one code at a time. Returns (B, N).

        steps and eta are ignored, and `show` gets only the result.
        """
        both = documents + without_text(documents)  # 2B documents, for guidance
        # BOI and codes are appended as ints, like text. `pack` would treat a tensor as a complete
        # image, and add EOI.
        both = [[*document, BOI] for document in both]
        drawn = []
        for _ in range(self.cfg.n_patches):
            conditional, unconditional = next_logits(self, both).chunk(2)
            logits = guide(conditional, unconditional, guidance_scale)[:, self.n_text :]
            codes = self.n_text + sample_tokens(logits, CODE_TEMPERATURE)
            drawn.append(codes)
            for document, code in zip(both, codes.repeat(2).tolist()):
                document.append(code)
        images = torch.stack(drawn, dim=1)
        show(images)
        return images
