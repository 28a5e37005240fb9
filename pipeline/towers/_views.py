"""Cheaper views of an image for the scoring pass: open_clip's ViT on smaller images, or on a part of its patches.

open_clip embeds images of one size. Here its embedding also takes another size, with the position embeddings interpolated as for a
change of resolution (Dosovitskiy et al. 2021, section 3.2), and a field of patches to keep (as in Li et al. 2023, FLIP, but chosen
outside). Images of the trained size go through open_clip's own code.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KEPT = "image.patches"  # the field: int64 [b, m], which patches of each image are embedded, ascending


def allow_views(visual: Any) -> int | None:
    """Lets an open_clip image tower embed views; the side of its square patches, or None where it is no ViT or its patches are not square."""
    from open_clip.transformer import VisionTransformer

    if (
        not isinstance(visual, VisionTransformer)
        or visual.patch_size[0] != visual.patch_size[1]
        or visual.grid_size[0] != visual.grid_size[1]
    ):
        return None
    visual.kept = None
    visual._embeds = MethodType(_embeds, visual)  # open_clip has no argument for it; its forward calls _embeds for everything up to ln_pre
    return visual.patch_size[0]


def _embeds(visual: Any, pixels: Tensor) -> Tensor:
    """[b, 3, s, s] -> [b, 1 + patches, width]."""
    trained, side = visual.grid_size[0], pixels.shape[-1] // visual.patch_size[0]
    if visual.kept is None and side == trained:
        return type(visual)._embeds(visual, pixels)
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    own, places = visual.positional_embedding[:1], visual.positional_embedding[1:]
    if side != trained:
        grid = places.unflatten(0, (trained, trained)).permute(2, 0, 1)[None]
        places = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).T
    x = x + places.to(x.dtype)
    if visual.kept is not None:
        x = x.gather(1, visual.kept[:, :, None].expand(-1, -1, x.shape[2]))
    first = (visual.class_embedding + own).to(x.dtype).expand(x.shape[0], 1, -1)
    return visual.ln_pre(torch.cat([first, x], dim=1))
