"""The encoders and heads of SatMIP and SatMIPS (paper, Section 3 and 4.2, supplement B), and of their baselines.

In this order: one attention block -> the image encoder made of it (ViT), and ResNet-50 -> weights of others for a
ViT -> the metadata encoders (text Transformer, FT-Transformer) -> the projection heads -> SatMIP, which puts them
together and runs once a step -> parameter groups.

Letters: B batch, V views of each image, N patches, L text tokens, F table features, D width, E joint
dimension, H heads. Every encoder returns its CLS row after the last norm, [B, D].
"""

import argparse
import copy
import hashlib
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torch.utils.checkpoint import checkpoint


# -----------------------------------------------------------------------------------------------------
# One pre-norm Transformer block for all three encoders


class Attention(nn.Module):
    """Multi-head self-attention; parameter names and packing (q, k, v) as in timm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the number of heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, rows: int) -> Tensor:
        """x [B, L, D] -> [B, rows, D]: the first `rows` tokens ask, all L answer.

        mask: boolean [B, 1, 1, L], True where a token may be looked at; None looks at all.
        """
        B, L, D = x.shape
        weights, biases = self.qkv.weight.split([D, 2 * D]), self.qkv.bias.split([D, 2 * D])
        q = F.linear(x[:, :rows], weights[0], biases[0]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = F.linear(x, weights[1], biases[1]).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, rows, D / H]
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU, or with ReGLU: a * relu(b) over the halves of a layer of twice the width."""

    def __init__(self, width: int, hidden: int, reglu: bool):
        super().__init__()
        self.reglu = reglu
        self.fc1 = nn.Linear(width, 2 * hidden if reglu else hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.reglu:
            a, b = x.chunk(2, dim=-1)
            return self.fc2(a * F.relu(b))
        return self.fc2(F.gelu(x))  # exact, as timm and BERT; NOTE[PAPER] SLIP's own text tower has QuickGELU


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). LayerNorm epsilon as in the source of each encoder."""

    checkpointed = False  # whether to forget what lies within and compute it again for the gradient (train.py sets it)

    def __init__(
        self, width: int, heads: int, hidden: int, epsilon: float, reglu: bool = False, first_norm: bool = True
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, epsilon) if first_norm else nn.Identity()
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, epsilon)
        self.mlp = MLP(width, hidden, reglu)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: int | None = None) -> Tensor:
        """x [B, L, D] -> [B, rows, D]; rows = None keeps all L tokens."""
        rows = x.shape[1] if rows is None else rows
        x = x[:, :rows] + self.attn(self.norm1(x), mask, rows)
        return x + self.mlp(self.norm2(x))


def run_blocks(blocks: nn.ModuleList, norm: nn.LayerNorm, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """x [B, L, D] -> CLS row [B, D]. The last block computes that row only: nothing else of it is ever read."""
    for block in blocks:
        rows = 1 if block is blocks[-1] else None
        if block.checkpointed and block.training:
            x = checkpoint(block, x, mask, rows, use_reentrant=False, preserve_rng_state=False)  # no dropout: no chance
        else:
            x = block(x, mask, rows)
    return norm(x)[:, 0]


# -----------------------------------------------------------------------------------------------------
# Batch normalisation over all processes, in the SimCLR head and in ResNet-50


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


class AllReduce(torch.autograd.Function):
    """Sum over processes, differentiable: what reaches the sum reaches every process's part of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return AllReduce.forward(ctx, gradient)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the global batch, on any backend (torch's SyncBatchNorm refuses gloo)."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # [B, D] and [B, D, h, w] alike

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D] or [B, D, h, w] -> the same shape, in float32"""
        x = x.float()
        if not (self.training and several()):
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1] * dist.get_world_size()  # every process holds the same number of rows
        column = lambda v: v.view(-1, *[1] * (x.ndim - 2))  # noqa: E731
        mean = AllReduce.apply(x.sum(dims)) / count
        variance = AllReduce.apply((x - column(mean)).square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - column(mean)) * column((variance + self.eps).rsqrt() * self.weight) + column(self.bias)


# -----------------------------------------------------------------------------------------------------
# Image encoders: Vision Transformer (supplement B, "Visual encoders"), and the ResNet-50 of Ayush et al.

# width, layers, heads. NOTE[PAPER] vit_small has 12 heads as in MoCo-v3 and SLIP; timm, DeiT and DINO have 6,
# with the same tensor shapes: foreign weights load without complaint and are wrong unless the heads agree.
VITS = {
    "vit_micro": (128, 4, 4),  # the demo's
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 12),
    "vit_small_6": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each through one linear map (a convolution whose stride is its size)."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, N, D]"""
        return self.proj(images).flatten(2).transpose(1, 2)


def resample_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Positions [1, 1 + s s, D], the CLS token's first -> [1, 1 + rows columns, D]: the grid resampled (bicubic)."""
    side = math.isqrt(positions.shape[1] - 1)
    if (rows, columns) == (side, side):
        return positions
    cls, grid = positions[:, :1], positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)


def sincos_positions(width: int, side: int, scale: float) -> Tensor:
    """The fixed positions of MAE [1, 1 + side side, D]: sines and cosines of the column, then of the row, zero for
    CLS. Scale-MAE multiplies columns and rows by the ground sample distance relative to its base: `scale`."""
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = scale * torch.arange(side, dtype=torch.float64)[:, None] * frequency  # [side, D / 4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, D / 2]
    column, row = wave.expand(side, side, -1), wave[:, None].expand(side, side, -1)
    grid = torch.cat([column, row], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width), grid.float()])[None]


class ViT(nn.Module):
    """Vision Transformer with learnable positions and CLS output; parameter names and shapes as timm's."""

    def __init__(self, image_size: int, patch: int, width: int, layers: int, heads: int):
        """ValueError when the patch does not divide the image or the heads the width."""
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch}")
        self.width = width
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, 1e-6) for _ in range(layers))
        self.norm = nn.LayerNorm(width, 1e-6)
        initialise(self)

    def positions(self, rows: int, columns: int) -> Tensor:
        """pos_embed for a grid of patches: as trained, or resampled when the image has another size."""
        return resample_positions(self.pos_embed, rows, columns)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, h, w], standardised -> CLS [B, D]"""
        patch = self.patch_embed.proj.stride[0]
        positions = self.positions(images.shape[2] // patch, images.shape[3] // patch)
        x = self.patch_embed(images)  # [B, N, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + positions  # [B, 1 + N, D]
        return run_blocks(self.blocks, self.norm, x)


def build_image_encoder(name: str, image_size: int, patch: int, norm: type[nn.Module] = BatchNorm) -> nn.Module:
    """A row of VITS, or torchvision's "resnet50" under its own names, without the classifier: images -> [B, width]."""
    if name != "resnet50":
        return ViT(image_size, patch, *VITS[name])
    encoder = resnet50(weights=None, norm_layer=norm)
    encoder.fc, encoder.width = nn.Identity(), encoder.fc.in_features
    return encoder


# -----------------------------------------------------------------------------------------------------
# Weights of others (Section 4.6; Table 2)


@dataclass(frozen=True)
class Source:
    """How the authors of some weights store them, and what their images look like to the network."""

    containers: tuple[str, ...]  # keys under which the state dict may lie
    prefixes: tuple[str, ...]  # what may stand before timm's names
    small_heads: int  # heads of a ViT of width 384: the only size on which sources disagree, unseen in any shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False  # trained on blue, green, red
    scaled: bool = False  # positions are computed from the ground sample distance


class WrongWeights(ValueError):
    """A file is not what it is said to be, or does not fit. The message is one line."""


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FMOW = (0.4182007, 0.4214799, 0.3991276), (0.2877428, 0.2754177, 0.2764018)  # SatMAE's
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SLIP_PREFIXES = ("module.visual.", "visual.")
SOURCES = {
    "slip": Source(("state_dict",), SLIP_PREFIXES, 12, *IMAGENET),
    "clip": Source(("state_dict",), SLIP_PREFIXES, 12, *IMAGENET),  # as trained by SLIP's authors
    "mocov3": Source(("state_dict",), ("module.base_encoder.", "base_encoder."), 12, *IMAGENET),
    "dino": Source(("teacher",), ("module.backbone.", "backbone.", ""), 6, *IMAGENET),
    "timm": Source(("model", "state_dict"), ("",), 6, *HALF),  # the "augreg" weights, timm's default
    "deit": Source(("model",), ("",), 6, *IMAGENET),
    "mae": Source(("model",), ("",), 6, *IMAGENET),
    "satmae": Source(("model",), ("",), 6, *FMOW),
    "satmaepp": Source(("model",), ("",), 6, *FMOW, bgr=True),
    "scalemae": Source(("model",), ("",), 6, *IMAGENET, scaled=True),
    "satmip": Source(("model",), ("image_encoder.",), 12, *IMAGENET),  # a checkpoint of train.py; it says its heads
}
# heads and decoders, which no feature passes through
DROPPED = re.compile(r"head|pre_logits|decoder|mask_token|fpn|fcn_|proj_up|up_block")
OPENAI = "OpenAI's CLIP, whose ViT has a norm before its blocks (ln_pre) and QuickGELU; ours has neither: not supported"


def read_encoder(path: Path, name: str, heads: int | None = None) -> tuple[dict[str, Tensor], int, str]:
    """-> an image encoder's tensors by timm's names with RGB channels, its heads, what else the file holds.

    name: of SOURCES. heads: where they are not the source's. WrongWeights when the file is not of that source. Nothing
    unpickled is run: options of the authors' training often lie beside the weights, hence the one class allowed.
    """
    if not path.is_file():
        raise WrongWeights(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WrongWeights(f"{path}: not a file of weights (or one that holds code, which is never run)") from None
    except Exception as error:  # zip and pickle each raise their own for a torn or foreign file
        if "TorchScript" in str(error):
            raise WrongWeights(f"{path}: TorchScript, not weights; perhaps {OPENAI}") from None
        raise WrongWeights(f"{path}: cannot be read as weights ({type(error).__name__})") from None
    source, whole = SOURCES[name], whole if isinstance(whole, dict) else {}
    content = next((whole[key] for key in source.containers if isinstance(whole.get(key), dict)), whole)
    prefix = next((prefix for prefix in source.prefixes if f"{prefix}cls_token" in content), None)
    if prefix is None:
        if any(str(key).endswith("visual.class_embedding") for key in content):
            raise WrongWeights(f"{path}: {OPENAI}")
        keys = ", ".join(list(map(str, content))[:3]) or "nothing"
        raise WrongWeights(f"{path}: not {name} weights: no {source.prefixes[0]}cls_token; it holds {keys}, ...")
    tensors = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    tensors = {key: value for key, value in tensors.items() if not DROPPED.match(key)}
    if source.bgr and "patch_embed.proj.weight" in tensors:  # turned once, here: images stay red, green, blue
        tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flip(1)
    if name == "satmip":
        heads = heads or VITS[whole["model_config"]["vit"]][2]
    width = tensors["cls_token"].shape[-1]
    heads = heads or {384: source.small_heads, 1280: 16}.get(width, width // 64)
    others = [key for key in content if not (key.startswith(prefix) and key.removeprefix(prefix) in tensors)]
    return tensors, heads, f"{len(others)} ({', '.join(others[:2])}, ...)" if others else "none"


def load_encoder(encoder: ViT, path: Path, name: str, heads: int | None = None, scale: float = 1.0) -> str:
    """Put the weights of a file into an image encoder -> one line on what was loaded and what was not.

    Positions are resampled to the encoder's grid; those of Scale-MAE are computed for `scale`, the ground sample
    distance relative to its base. WrongWeights unless every tensor is there in its shape and the heads agree.
    """
    tensors, heads, aside = read_encoder(path, name, heads)
    own = encoder.state_dict()
    side = math.isqrt(own["pos_embed"].shape[1] - 1)
    if SOURCES[name].scaled:
        tensors["pos_embed"] = sincos_positions(encoder.width, side, scale)
    positions, theirs = tensors.get("pos_embed", torch.empty(0)), 0
    if positions.ndim == 3 and positions.shape[1] > 1:
        theirs = math.isqrt(positions.shape[1] - 1)
        if theirs**2 == positions.shape[1] - 1:
            tensors["pos_embed"] = resample_positions(positions.float(), side, side)
    shape = lambda d, key: tuple(d[key].shape) if key in d else "nothing"  # noqa: E731
    wrong = [key for key in own if shape(tensors, key) != shape(own, key)]
    unexpected = [key for key in tensors if key not in own]
    foreign = [key for key in unexpected if key.startswith("blocks.")]  # a block of another architecture
    if wrong or foreign:
        key = (wrong + foreign)[0]
        raise WrongWeights(
            f"{path}: {len(wrong)} of {len(own)} tensors of the model are not in these {name} weights and "
            f"{len(foreign)} of theirs are not in its blocks; {key}: {shape(tensors, key)}, wanted {shape(own, key)}"
        )
    if heads != encoder.blocks[0].attn.heads:
        fit = [vit for vit, size in VITS.items() if size == (encoder.width, len(encoder.blocks), heads)]
        raise WrongWeights(
            f"{path}: {name} has {heads} heads where the model has {encoder.blocks[0].attn.heads}, in tensors of the "
            f"same shapes; use --vit {fit[0] if fit else 'of that many heads'}"
        )
    encoder.load_state_dict({key: tensors[key] for key in own})
    return (
        f"{path} ({name}): loaded {len(own)} tensors; missing: none; unexpected: {', '.join(unexpected) or 'none'}; "
        f"left aside: {aside}; {heads} heads; positions {theirs} x {theirs} -> {side} x {side}"
    )


# -----------------------------------------------------------------------------------------------------
# Metadata encoders (supplement B)


class TextTransformer(nn.Module):
    """BERT-style encoder of tokenised captions: bidirectional, padding masked, learnable positions.

    NOTE[PAPER] the CLS token is CLIP's start-of-text, which every caption begins with.
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int):
        super().__init__()
        self.width = width
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, 1e-5) for _ in range(layers))
        self.norm = nn.LayerNorm(width, 1e-5)
        initialise(self)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens [B, L] int64, lengths [B] -> CLS [B, D]; what stands beyond a caption's length has no effect."""
        L = tokens.shape[1]
        mask = torch.arange(L, device=tokens.device) < lengths[:, None]  # [B, L], True on the caption
        x = self.token_embedding(tokens) + self.pos_embed[:L]
        return run_blocks(self.blocks, self.norm, x, mask[:, None, None])


class FTTransformer(nn.Module):
    """Feature tokenizer + Transformer (Gorishniy et al., 2021) on table rows, without the first block's norm.

    NOTE[PAPER] no dropout (the paper names none; SLIP has none), and the CLS row passes through the final
    LayerNorm but not through the ReLU of FT-Transformer's prediction head.
    """

    def __init__(self, numbers: int, categories: list[int], width: int, layers: int, heads: int):
        """numbers: how many numerical features; categories: how many rows each category's embedding has."""
        super().__init__()
        self.width = width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.weight = nn.Parameter(torch.empty(numbers, width))
        self.bias = nn.Parameter(torch.empty(numbers + len(categories), width))
        self.missing = nn.Parameter(torch.empty(numbers, width))  # stands for x_j W_j when x_j is missing
        self.embeddings = nn.ModuleList(nn.Embedding(rows, width) for rows in categories)
        hidden = int(width * 4 / 3)
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, 1e-5, reglu=True, first_norm=i > 0) for i in range(layers)
        )
        self.norm = nn.LayerNorm(width, 1e-5)
        initialise(self)
        for parameter in (self.cls_token, self.weight, self.bias, self.missing, *self.embeddings.parameters()):
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """numbers [B, F_num] standardised, NaN where missing; categories [B, F_cat] int64 -> CLS [B, D]"""
        absent = numbers.isnan()[:, :, None]
        x = torch.where(absent, self.missing, numbers.nan_to_num(0.0)[:, :, None] * self.weight)  # [B, F_num, D]
        x = [x, *(embed(c)[:, None] for embed, c in zip(self.embeddings, categories.unbind(1)))]
        x = torch.cat(x, dim=1) + self.bias
        return run_blocks(self.blocks, self.norm, torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))


def initialise(encoder: nn.Module) -> None:
    """timm's initialisation: truncated normal of 0.02 for weights, positions and CLS, zero for biases."""
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, PatchEmbed):  # timm treats the patch map as the linear layer it is
            nn.init.trunc_normal_(module.proj.weight, std=0.02)
            nn.init.zeros_(module.proj.bias)
    for name in ("cls_token", "pos_embed"):
        if hasattr(encoder, name):
            nn.init.trunc_normal_(getattr(encoder, name), std=0.02)


# -----------------------------------------------------------------------------------------------------
# Projection heads (supplement B, "Projection heads")


def image_mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """SimCLR's head as in SLIP.

    NOTE[PAPER] supplement B speaks of "3 4096-dim hidden layers", Section 4.2 of a 3-layer MLP, and both of
    following SLIP, whose head has three linear layers and thus two hidden ones: SLIP's is built here.
    """
    return nn.Sequential(
        nn.Linear(width, hidden), BatchNorm(hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), BatchNorm(hidden), nn.ReLU(),
        nn.Linear(hidden, out),
    )  # fmt: skip


# -----------------------------------------------------------------------------------------------------
# SatMIP


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild a model; stored in the checkpoint. The defaults are the paper's."""

    image_size: int = 224
    patch_size: int = 16
    vit: str = "vit_small"  # a row of VITS, or "resnet50"
    metadata_encoder: str = "none"  # "none", "text" or "table"
    metadata_width: int = 512  # text 512, table 192 (supplement B)
    metadata_layers: int = 3
    metadata_heads: int = 8
    vocabulary: int = 49408  # text: rows of the token embedding; set from the data
    context: int = 77  # text: longest caption, in tokens; set from the data
    numbers: int = 0  # table: numerical features
    categories: tuple[int, ...] = ()  # table: embedding rows of each categorical feature
    joint_dim: int = 512
    image_image: str = "none"  # "none", "simclr" or "moco"
    mlp_hidden: int = 4096
    mlp_out: int = 256
    queue: int = 65536  # MoCo: how many keys it keeps
    places: int = 0  # Geo: how many clusters of places are told apart


class Embeddings(NamedTuple):
    """What one forward gives to the losses, in float32, unit vectors but for the last three; None for what the method
    lacks."""

    image: Tensor | None  # [B, E] of the view that meets the metadata
    metadata: Tensor | None  # [B, E]
    first: Tensor | None  # [B, E] of the two views that meet each other
    second: Tensor | None
    scale: Tensor | None  # exp(logit_scale) = 1 / temperature of the metadata-image loss
    queue: Tensor | None  # [K, E] MoCo's earlier keys
    place: Tensor | None  # [B, C] Geo's logits, no unit vectors


class SatMIP(nn.Module):
    """SatMIP, SatMIPS or a baseline, depending on which heads the configuration asks for (Fig. 2).

    With MoCo the second view goes through a slowly following copy of the image encoder and of its head, and is
    compared with a queue of earlier keys. Its ResNet-50 keeps batch statistics per process, as the original does: that
    the statistics of queries and keys differ is part of the method (`encode_keys`), so its results depend on the number
    of processes. A ViT has no batch statistics, and MoCo's head neither.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        norm = nn.BatchNorm2d if c.image_image == "moco" else BatchNorm
        self.image_encoder = build_image_encoder(c.vit, c.image_size, c.patch_size, norm)
        width = self.image_encoder.width
        if c.metadata_encoder != "none":
            size = (c.metadata_width, c.metadata_layers, c.metadata_heads)
            if c.metadata_encoder == "text":
                self.metadata_encoder = TextTransformer(c.vocabulary, c.context, *size)
            else:
                self.metadata_encoder = FTTransformer(c.numbers, list(c.categories), *size)
            self.image_projection = nn.Linear(width, c.joint_dim, bias=False)
            self.metadata_projection = nn.Linear(c.metadata_width, c.joint_dim, bias=False)
            for projection in (self.image_projection, self.metadata_projection):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if c.image_image == "simclr":
            self.image_mlp = image_mlp(width, c.mlp_hidden, c.mlp_out)
        if c.image_image == "moco":
            hidden = nn.Linear(width, c.mlp_hidden)
            self.image_mlp = nn.Sequential(hidden, nn.ReLU(), nn.Linear(c.mlp_hidden, c.mlp_out))
            self.key_encoder, self.key_mlp = (copy.deepcopy(m) for m in (self.image_encoder, self.image_mlp))
            self.key_encoder.requires_grad_(False), self.key_mlp.requires_grad_(False)
            self.register_buffer("queue", unit(torch.randn(c.queue, c.mlp_out)))  # any directions, until it is filled
            self.register_buffer("enqueued", torch.zeros((), dtype=torch.long))
        # NOTE[PAPER] "on top of SimCLR" is all it says of Geo: the head reads the first view's embedding before it
        # becomes a unit vector, as its authors' code does with MoCo's; without two views, the features
        if c.places:
            self.place_head = nn.Linear(width if c.image_image == "none" else c.mlp_out, c.places)

    def forward(self, views: Tensor, metadata: tuple[Tensor, ...]) -> Embeddings:
        """views [V, B, 3, h, w], metadata what its encoder takes -> Embeddings. Called once a step."""
        return self.project(self.encode(views, metadata), self.encode_keys(views))

    def encode(self, views: Tensor, metadata: tuple[Tensor, ...]) -> list[Tensor]:
        """The backbones, each sample by itself -> CLS features of its views [B, V, D] and of its metadata [B, D]."""
        queries = views[:-1] if self.config.image_image == "moco" else views
        features = [self.image_encoder(queries.flatten(0, 1)).unflatten(0, queries.shape[:2]).transpose(0, 1)]
        if self.config.metadata_encoder != "none":
            features.append(self.metadata_encoder(*metadata))
        return features

    def project(self, features: list[Tensor], keys: Tensor | None) -> Embeddings:
        """The heads, on the whole batch. The first view meets the metadata, the last two meet each other. With V = 2
        they share the first view (Section 3.2, "Efficient view coupling"); V = 3 decouples them (Table 6); V = 1 is
        SatMIP alone."""
        c, (views, *encoded) = self.config, features
        image = metadata = first = second = scale = place = None
        if c.metadata_encoder != "none":
            image = unit(self.image_projection(views[:, 0]))
            metadata, scale = unit(self.metadata_projection(encoded[0])), self.logit_scale.exp()
        if c.image_image == "simclr":  # NOTE[PAPER] batch statistics of each view apart, as in SLIP
            first, second = self.image_mlp(views[:, -2]), unit(self.image_mlp(views[:, -1]))
        if c.image_image == "moco":
            first, second = self.image_mlp(views[:, -1]), keys
        if c.places:
            place = self.place_head(views[:, 0] if first is None else F.relu(first)).float()
        first = None if first is None else unit(first)
        queue = self.queue if c.image_image == "moco" else None
        return Embeddings(image, metadata, first, second, scale, queue, place)

    @torch.no_grad()
    def encode_keys(self, views: Tensor) -> Tensor | None:
        """MoCo's keys [B, E] of the last view; None without. For ResNet-50 on samples dealt out anew to the processes,
        so that no query shares its batch statistics with its own key and can tell it by them. The deal is always the
        same: which samples make a batch is random already."""
        if self.config.image_image != "moco":
            return None
        if self.config.vit != "resnet50" or not several():
            return unit(self.key_mlp(self.key_encoder(views[-1])))
        world, rank, B = dist.get_world_size(), dist.get_rank(), views.shape[1]
        order = torch.arange(world * B, device=views.device).view(world, B).T.flatten()  # some of everyone's each
        keys = unit(self.key_mlp(self.key_encoder(everyone(views[-1])[order.chunk(world)[rank]])))
        return everyone(keys)[order.argsort()[rank * B : (rank + 1) * B]]

    @torch.no_grad()
    def follow(self, momentum: float, skipped: Tensor) -> None:
        """MoCo, after a step that was not skipped: the key encoder and its head come nearer to the queries'."""
        for key, query in ((self.key_encoder, self.image_encoder), (self.key_mlp, self.image_mlp)):
            for p, q in zip(key.parameters(), query.parameters()):
                p.lerp_(q, (1 - momentum) * (~skipped).to(p.dtype))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, skipped: Tensor) -> None:
        """MoCo, after a step that was not skipped: the keys [G, E] of all processes take the place of the oldest."""
        at = (self.enqueued + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[at] = torch.where(skipped, self.queue[at], keys)
        self.enqueued += torch.where(skipped, 0, len(keys))


def everyone(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, without gradient."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def describe_encoder(model: SatMIP, mean: list[float], std: list[float]) -> dict:
    """What another program must know to use the image encoder's state dict, as plain types for JSON."""
    c, digest = model.config, hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    common = {"mean": mean, "std": std, "channels": "red, green, blue in 0..1", "sha256": digest.hexdigest()}
    if c.vit == "resnet50":
        return {"torchvision": {"model": "resnet50"}, "feature": "mean over places, before fc", **common}
    width, layers, heads = VITS[c.vit]
    shape = {"img_size": c.image_size, "patch_size": c.patch_size, "embed_dim": width, "depth": layers}
    return {
        "timm": {"model": "vit_base_patch16_224", "arguments": {**shape, "num_heads": heads, "num_classes": 0}},
        "heads": heads, "feature": "CLS token after the norm", **common,
    }  # fmt: skip


def unit(x: Tensor) -> Tensor:
    """Unit vectors in float32, whatever autocast says: the losses are computed on these."""
    return F.normalize(x.float(), dim=-1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """No weight decay for biases, norms and whatever else is 1-d, as in SLIP; positions and embeddings do decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim < 2 or name.endswith("bias")]
    decayed = [p for name, p in named if not (p.ndim < 2 or name.endswith("bias"))]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
