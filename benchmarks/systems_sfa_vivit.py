"""SFA-ViViT on two-event clips: a short training on 8 frames, then 32 frames with the frame encoder frozen, against training 32 frames whole.

Every row starts from one image checkpoint, a frame encoder that was trained to tell the glyphs apart wherever they are: it knows nothing of
places, and the class is the order of two places. `frozen` and `frozen, adapter` therefore cannot work; the stage-1 rows can.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import saved_bytes
from pipeline.data.video import ClipConfig
from pipeline.towers import video
from pipeline.towers._frames import Frames
from tools.sources import clips

TRAIN, TEST, BATCH = 3000, 800, 32
WHOLE, STAGE_2, IMAGES = 200, 80, 200  # steps
IMAGE_BATCH = 128
LR, LR_STAGE_2 = 5e-3, 2e-3  # chosen on seed 0, for training whole as well
LONG, SHORT, STRIDE = clips.FRAMES, 8, 4
Rows = dict[str, dict[str, float]]


def config(frames: int, **given: object) -> video.Config:
    """The tower of the spec's experiment: 3 spatial and 2 temporal layers of 32 columns, every frame a token."""
    net = {"patch": 4, "width": 32, "layers": 3, "heads": 4, "embed_dim": 32, "temporal_layers": 2, "temporal_heads": 4}
    net |= {"tubelet": 1, "pool": "mean", "token_std": 0.5, "classes": len(clips.PAIRS)}
    return video.Config(clip=ClipConfig(frames=frames, size=clips.SIDE), **net | given)


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips uint8 [count, 32, 3, 8, 8] and their classes int64 [count]."""
    rng = np.random.default_rng(seed)
    drawn = [clips.draw(rng) for _ in range(count)]
    frames = torch.from_numpy(clips.pixels(clips.noisy(np.stack([one.shown for one in drawn]), rng)))
    return frames[:, :, None].expand(-1, -1, 3, -1, -1), torch.tensor([one.label for one in drawn])


def taken(frames: Tensor, length: int, start: int) -> Tensor:
    """Clips of 32 or of 8 frames."""
    return frames if length == LONG else frames[:, start : start + (length - 1) * STRIDE + 1 : STRIDE]


def image_checkpoint(seed: int) -> tuple[dict[str, Tensor], float]:
    """The frame encoder's weights after learning the glyphs from single frames, and how many of new ones it tells, in percent."""
    rng, seen = np.random.default_rng(seed), []
    torch.manual_seed(seed)
    model = nn.ModuleDict({"spatial": Frames(config(SHORT)), "head": nn.Linear(32, 4)})

    def loss(step: int) -> Tensor:
        glyph, place = rng.integers(0, 4, IMAGE_BATCH), rng.integers(0, 4, IMAGE_BATCH)
        frames = np.zeros((IMAGE_BATCH, clips.SIDE, clips.SIDE), np.float32)
        for frame, g, p in zip(frames, glyph, place):
            frame[4 * (p // 2) : 4 * (p // 2) + 4, 4 * (p % 2) : 4 * (p % 2) + 4] = clips.GLYPHS[g]
        shown = torch.from_numpy(clips.pixels(clips.noisy(frames, rng)))[:, None, None].expand(-1, -1, 3, -1, -1)
        logits = model["head"](model["spatial"](shown)[0][:, 0])
        seen.append(100 * float((logits.argmax(1).numpy() == glyph).mean()))  # frames are never drawn twice
        return F.cross_entropy(logits, torch.from_numpy(glyph))

    descend(model, loss, IMAGES, LR)
    weights = {name: value for name, value in model.state_dict().items() if name.startswith("spatial.")}
    return weights, float(np.mean(seen[-10:]))


def descend(model: nn.Module, loss: object, steps: int, lr: float) -> None:
    """AdamW with one cycle of the learning rate over what is not frozen."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()


def made(length: int, seed: int, stored: dict[str, Tensor], parts: tuple[str, ...], **given: object) -> video.Video:
    """A tower that takes `parts` of stored weights over, as init_from does."""
    torch.manual_seed(seed)
    tower = config(length, **given).build(None)
    with torch.no_grad():
        for name, value in tower.state_dict().items():
            if name.split(".")[0] in parts:
                value.copy_(tower.fitted(name, stored[name], value))
    return tower


class Experiment:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.train, self.test = data(TRAIN, 2 * seed), data(TEST, 2 * seed + 1)
        self.results: Rows = {}

    def fit(self, row: str, tower: video.Video, length: int, steps: int, lr: float, before: float = 0.0) -> float:
        """Trains, tests and notes the row; gives its CPU seconds, `before` (of an earlier stage) among them."""
        order = np.random.default_rng(self.seed)
        frames, labels = self.train

        def loss(step: int) -> Tensor:
            chosen = torch.from_numpy(order.choice(TRAIN, BATCH, replace=False))
            clip = taken(frames[chosen], length, int(order.integers(STRIDE)))
            return F.cross_entropy(tower({"video": clip})["logits"], labels[chosen])

        began = time.process_time()
        descend(tower, loss, steps, lr)
        seconds = time.process_time() - began
        kept = saved_bytes(tower, lambda: loss(0))
        found = {"accuracy": self.accuracy(tower, length), "cpu_s": before + seconds, "saved_mb": kept / 1e6}
        self.results[row] = found | {"step_ms": 1000 * seconds / steps}
        return before + seconds

    def cached(self, row: str, tower: video.Video, steps: int) -> None:
        """What a step costs where the frozen encoder's outputs are read instead of computed."""
        frames, labels = self.train
        with torch.no_grad():
            kept = tower.spatial(frames[: 4 * BATCH])[0].split(BATCH)

        def loss(step: int) -> Tensor:
            return F.cross_entropy(tower({"frames.frames": kept[step % 4]})["logits"], labels[:BATCH])

        began = time.process_time()
        descend(tower, loss, steps, LR_STAGE_2)
        self.results[row] = {"step_ms": 1000 * (time.process_time() - began) / steps}

    @torch.no_grad()
    def accuracy(self, tower: video.Video, length: int) -> float:
        """In percent, on the middle clip."""
        tower.eval()
        frames, labels = taken(self.test[0], length, 1), self.test[1]
        logits = torch.cat([tower({"video": part})["logits"] for part in frames.split(200)])
        return 100 * float((logits.argmax(1) == labels).float().mean())

    def run(self) -> Rows:
        """All rows."""
        (image, glyphs), seed = image_checkpoint(self.seed), self.seed
        self.results["image checkpoint, glyphs"] = {"accuracy": glyphs}
        bottleneck = {"frozen": True, "adapter": "bottleneck"}
        self.fit("full, 32 frames", made(LONG, seed, image, ("spatial",)), LONG, WHOLE, LR)
        self.fit("I frozen", made(LONG, seed, image, ("spatial",), frozen=True), LONG, WHOLE, LR)
        self.fit("III frozen, adapter", made(LONG, seed, image, ("spatial",), **bottleneck), LONG, WHOLE, LR)
        short = made(SHORT, seed, image, ("spatial",))
        spent = self.fit("stage 1, 8 frames", short, SHORT, WHOLE, LR)
        stored, all_parts = short.state_dict(), ("spatial", "temporal", "head")
        untouched = made(LONG, seed, stored, all_parts)
        self.results["stage 1 on 32 frames"] = {"accuracy": self.accuracy(untouched, LONG), "cpu_s": spent}
        for row, parts, given in (
            ("SFA, 32 frames", all_parts, bottleneck),
            ("SFA without adapter", all_parts, {"frozen": True}),
            ("random temporal", ("spatial",), bottleneck),
        ):
            self.fit(row, made(LONG, seed, stored, parts, **given), LONG, STAGE_2, LR_STAGE_2, spent)
        self.cached("SFA, cached frames", made(LONG, seed, stored, all_parts, cached="frames", adapter="bottleneck"), STAGE_2)
        full = self.results["full, 32 frames"]
        for row in self.results.values():
            if "cpu_s" not in row:
                continue
            row["cpu_share"] = 100 * row["cpu_s"] / full["cpu_s"]
            if "saved_mb" in row:
                row["saved_share"] = 100 * row["saved_mb"] / full["saved_mb"]
        return self.results


def run(seeds: Sequence[int]) -> dict[int, Rows]:
    """Accuracy in percent, CPU seconds (stage 1's included), MB kept for the backward, milliseconds of CPU a step; the shares of full
    training's are in percent."""
    return {seed: Experiment(seed).run() for seed in seeds}


def bars(results: list[Rows]) -> list[dict[str, object]]:
    """What was promised, in every seed."""
    sfa, full = "SFA, 32 frames", "full, 32 frames"
    promised = {
        "frozen: accuracy below 20": lambda r: r["I frozen"]["accuracy"] < 20,
        "frozen, adapter: accuracy below 25": lambda r: r["III frozen, adapter"]["accuracy"] < 25,
        "SFA: accuracy above 95": lambda r: r[sfa]["accuracy"] > 95,
        "SFA: at most a point below full training": lambda r: r[sfa]["accuracy"] >= r[full]["accuracy"] - 1,
        "SFA: at most 0.7 of its CPU time, stage 1 included": lambda r: r[sfa]["cpu_share"] <= 70,
        "SFA: at most 0.15 of its bytes kept for the backward": lambda r: r[sfa]["saved_share"] <= 15,
    }
    return [
        {"what": f"{what} ({sum(map(test, results))}/{len(results)})", "holds": all(map(test, results))} for what, test in promised.items()
    ]
