"""The losses of SatMIP and SatMIPS (paper, Eq. 1 to 4) and of its baselines, on one process or many.

Every process p of W holds B rows of the global batch, G = W B. It compares its own rows a with everyone's
rows b, so that each pair of the G x G matrix is computed once in the whole world (W = 2, B = 3):

             b of p 0   b of p 1
    a of p 0 [ + . . ]  [ . . . ]       +  the positive: row i of process p meets column p B + i
             [ . + . ]  [ . . . ]       .  the negatives
             [ . . + ]  [ . . . ]
    a of p 1 [ . . . ]  [ + . . ]
             [ . . . ]  [ . + . ]
             [ . . . ]  [ . . + ]

Each process averages over its rows and DistributedDataParallel averages the gradients, which together is the
gradient of the mean over all G rows, provided the gather carries gradient back: b of process 1 takes part in
the loss of process 0. SLIP gathers without gradient in its image-text loss and loses half of it.

All functions take unit vectors in float32, and run outside autocast.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

MAX_SCALE = math.log(100)  # logit_scale is clamped to [0, ln 100] after every step, as in CLIP and SLIP


class AllGather(torch.autograd.Function):
    """[B, E] on each process -> [G, E] on all; the gradient of a row sums what every process's loss says of it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # gloo has no reduce-scatter; these matrices are small
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, differentiable: the one gather that every loss uses."""
    return AllGather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


class Matching(NamedTuple):
    """A matching task's loss, and the share of its rows that pick their own partner."""

    loss: Tensor
    accuracy: Tensor


def own_columns(a: Tensor, b: Tensor) -> Tensor:
    """[B]: at which of everyone's rows b [G, ...] this process's rows a [B, ...] stand."""
    offset = dist.get_rank() * len(a) if len(b) > len(a) else 0
    return offset + torch.arange(len(a), device=a.device)


def same_area(areas: Tensor) -> Tensor:
    """areas [B], -1 where a sample has none -> [B, G], True where two different samples show one area.

    Another date of the same place is no negative (--mask-same-area); the paper's losses do not ask.
    """
    everyone = gather(areas)
    same = (areas[:, None] == everyone) & (areas >= 0)[:, None]
    return same.scatter(1, own_columns(areas, everyone)[:, None], False)


def contrast(
    a: Tensor, b: Tensor, scale: Tensor | float, others: Tensor | None = None, masked: Tensor | None = None
) -> Matching:
    """L^clr of Eq. 1, mean over the local rows: a [B, E], b [G, E] of all processes, scale = 1 / temperature.

    others [G, E]: further negatives from a's own view; a's meeting with itself is left out. masked [B, G]: pairs
    that are no negatives.
    """
    target = own_columns(a, b)
    logits = scale * a @ b.T  # [B, G]
    if others is not None:
        same = (scale * a @ others.T).scatter(1, target[:, None], -math.inf)
        logits = torch.cat([logits, same], dim=1)  # [B, 2 G]
    if masked is not None:
        logits = logits.masked_fill(masked.repeat(1, logits.shape[1] // masked.shape[1]), -math.inf)
    return Matching(F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean())


def symmetric(one: Matching, other: Matching) -> Matching:
    """The mean of both directions."""
    return Matching((one.loss + other.loss) / 2, (one.accuracy + other.accuracy) / 2)


def metadata_image_loss(image: Tensor, metadata: Tensor, scale: Tensor, masked: Tensor | None = None) -> Matching:
    """L^MI of Eq. 2: image and metadata embeddings [B, E], scale the learnable inverse temperature."""
    to_metadata = contrast(image, gather(metadata), scale, masked=masked)
    return symmetric(to_metadata, contrast(metadata, gather(image), scale, masked=masked))


def image_image_loss(
    first: Tensor, second: Tensor, temperature: float = 0.1, same_view_negatives: bool = False,
    masked: Tensor | None = None,
) -> Matching:  # fmt: skip
    """L^Sim of Eq. 3: embeddings [B, E] of the two views.

    NOTE[PAPER] as printed, a view is compared with the G rows of the other view. SimCLR and SLIP also take the
    G - 1 other rows of its own view for negatives, 2 G - 1 in all: same_view_negatives.
    """
    all_first, all_second = gather(first), gather(second)
    own = (all_first, all_second) if same_view_negatives else (None, None)
    scale = 1 / temperature
    to_second = contrast(first, all_second, scale, own[0], masked)
    return symmetric(to_second, contrast(second, all_first, scale, own[1], masked))


def momentum_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2) -> Matching:
    """MoCo's loss: each query [B, E] against its own key [B, E] and the keys of earlier steps [K, E]."""
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature  # [B, 1 + K]
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return Matching(F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean())


def place_loss(logits: Tensor, places: Tensor) -> Matching:
    """L_g of Ayush et al., Eq. 4: logits [B, C] of the clusters of places, places [B], -1 where a sample has none.

    A sample without place counts as zero, not as absent: so the mean over processes is that of the whole batch.
    """
    loss = F.cross_entropy(logits, places, ignore_index=-1, reduction="sum") / len(places)
    return Matching(loss, (logits.argmax(1) == places).float().mean())


def total_loss(
    metadata_image: Matching | None, image_image: Matching | None, weight: float = 1.0, place: Matching | None = None
) -> Tensor:
    """Eq. 4: L^MI + lambda L^Sim, or the one that the method has; and L_g, with weight 1 (Ayush et al., Eq. 5)."""
    terms = [part.loss for part in (metadata_image, place) if part is not None]
    if image_image is not None:
        terms.append(image_image.loss if metadata_image is None else weight * image_image.loss)
    return sum(terms)
