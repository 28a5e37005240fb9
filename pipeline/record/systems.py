"""What the report says of students that are no pair of image and text towers: label maps (CromSS), related items (NoteLLM-2)."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline.record.figures import count, percent
from pipeline.record.runs import Run, dig, number

Figures = list[tuple[str, str, Callable[[Any], str], int, str]]  # label, key of the result, how it is written, what is better, chance


def sentence(main: Run) -> str:
    """What the first run reached, for the headline; empty where it has no such figures."""
    if maps := dig(main.result, "segmentation"):
        figures = ", ".join(f"{percent(dig(told, 'miou'))} with {name}" for name, told in maps.items())
        return f"On {count(dig(main.result, 'images'))} held-out maps {main.label} reaches a mIoU of {figures}."
    found, asked = (dig(main.result, f"related.whole.{key}") for key in ("r10", "queries"))
    if number(found) is None:
        return ""
    return f"Of {count(asked)} held-out items {main.label} finds the related one of {percent(found)} among the first ten."


def rows(runs: Sequence[Run]) -> list[tuple[str, Figures]]:
    """The groups of the comparison."""
    sensors = dict.fromkeys(name for run in runs for name in dig(run.result, "segmentation") or {})
    named = (("mIoU", "miou"), ("mean F1", "mf1"), ("pixels right", "oa"))
    maps = [(f"{name} {title}", f"segmentation.{name}.{key}", percent, +1, "") for name in sensors for title, key in named]
    shown = (("R@10", "whole"), ("R@10, image only", "image_only"), ("R@10, text only", "text_only"), ("R@10, short text", "short_text"))
    items = [(title, f"related.{key}.r10", percent, +1, f"related.{key}.chance.r10") for title, key in shown]
    return [("Segmentation, held-out maps", maps), ("Related items, held-out pairs", items)]
