"""What a scoring pass costs and whether its scores are worth it, told once at the beginning and once after warm-up.

A full training step is 3 forwards a sample (one, and a backward of two). Selection at rate r costs 3 r + c, where c is the scoring
pass in forwards of a sample: counted FLOP, no time is measured but the machine's rate.
"""

import math

import torch

from pipeline import kernels
from pipeline.record.profile import forward_flops, measured_peak
from pipeline.selection.scoring import Scoring
from pipeline.types import Batch


def cost(scoring: Scoring, batch: Batch) -> tuple[float, float, float]:
    """FLOP of a sample's training forward and of its scoring forward, and the machine's FLOP/s in training's precision. Collective."""
    engine, view = scoring.engine, scoring.view(batch)
    forward = forward_flops(engine, batch)
    scored = forward if view is batch else forward_flops(engine, view)
    return forward, scored, measured_peak(engine.device, engine.config.dtype)


def describe(scoring: Scoring, costs: tuple[float, float, float]) -> str:
    """The cost model in one line, from counted FLOP and, where precisions differ, this machine's rates of large products in both."""
    forward, scored, peak = costs
    engine, groups, selector, every = scoring.engine, scoring.groups, scoring.groups.selector, scoring.config.every
    faster = 1.0 if scoring.dtype in (None, engine.config.dtype) else measured_peak(engine.device, scoring.dtype) / peak
    read = bool(selector.needs(selector.warmup_steps)) or scoring.negatives
    share = read * scored / forward / faster / every
    rate = 1.0 if selector.trains_all(selector.warmup_steps) else groups.keep(math.inf) / groups.size
    all_rows = selector.trains_all(0)
    free = scoring.late(0) or not (scoring.needs(0) or (scoring.negatives and not all_rows))
    warm = 0.0 if free else scored / forward / faster
    return (
        f"scoring: a sample's scoring forward is {scored / forward:.2f} of its training forward in FLOP"
        + (f", {scored / forward / faster:.2f} in time at {faster:.2f} times the rate" if faster != 1 else "")
        + (f", every {every} visits" if every > 1 else "")
        + f"; a step is {(share + 3 * rate) / 3:.2f} of full training's (scoring {share / 3:.2f} + rate {rate:.2f})"
        + (f", in warm-up {(warm + 3 * (1.0 if all_rows else rate)) / 3:.2f}" if selector.in_warmup(0) else "")
        + (f"; ahead: {_ahead(engine.device)}" if scoring.config.ahead and (share or warm) else "")
    )


def _ahead(device: torch.device) -> str:
    """What `scoring.ahead` is worth on this device; no FLOP is saved."""
    if device.type == "cuda":
        return "the same FLOP beside training, hidden where the GPU has room or waits for the other ranks"
    return "nothing is hidden on a CPU, which does the same one after the other, by scores that are a step older"


def agreement(scoring: Scoring, batch: Batch, step: int) -> float | None:
    """Spearman's rank correlation between a batch's scores in the scoring pass and as trained, at the first step after warm-up; None at
    every other step, and where both are the same images. Two more forwards, once. Collective in stage 3.

    A view may cost next to nothing and know nothing: of 32 px icons scored at 16 px the choice is by chance (docs/evidence.md).
    """
    same = scoring.config.image_size is None and scoring.config.patches == 1
    if same or not step or step != scoring.groups.selector.warmup_steps or not scoring.needs(step):
        return None
    pairs = [scoring.embed(batch), scoring.embed(batch, as_trained=True)]
    ranks = torch.stack([kernels.cosine(found["image"], found["text"])[batch.valid].argsort().argsort().float() for found in pairs])
    return float(torch.corrcoef(ranks)[0, 1])
