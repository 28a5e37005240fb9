"""Where an item's vector looks: how much of the attention that matters to the loss flows into it from the image and from the text."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.towers._item import ItemEncoder, Views


def saliency(items: ItemEncoder, ids: Tensor, states: Tensor, loss: Callable[[Views], Tensor]) -> Tensor:
    """float32 [layers, 3], each row adding up to 1: |attention x d loss / d attention|, summed over heads and items, that flows into the
    last token from the visual tokens, from the text, and from the rest of the prompt and the token itself (NoteLLM-2's diagnostic).

    `ids` and `states` as ItemEncoder takes them; `loss` is a scalar of its views. Leaves no gradients behind. Raises ValueError for a
    model without attention weights.
    """
    before, weights = items.llm.config._attn_implementation, []
    items.llm.set_attn_implementation("eager")  # fused kernels keep no weights
    try:
        with torch.enable_grad():
            found = loss(items(ids, states, weights))
        if not weights:
            raise ValueError(f"saliency: {type(items.llm).__name__} gives no attention weights")
        slopes = torch.autograd.grad(found, weights)
    finally:
        items.llm.set_attn_implementation(before)
    last, rows = items.last(ids), torch.arange(len(ids), device=ids.device)
    flow = torch.stack([(weight * slope).abs().sum(1)[rows, last] for weight, slope in zip(weights, slopes)]).detach().float()
    at, places = torch.arange(flow.shape[2], device=ids.device), items.places
    visual = torch.zeros_like(at, dtype=torch.bool)
    if items.connector is not None:
        visual = (at >= places.image_at) & (at < places.image_at + items.tokens)
    text = (at >= places.text_at + items.shift) & (at <= last[:, None] - places.tail)
    parts = torch.stack([flow * visual, flow * text, flow * ~(visual | text)]).sum((2, 3))
    return (parts / parts.sum(0).clamp_min(torch.finfo(torch.float32).tiny)).T
