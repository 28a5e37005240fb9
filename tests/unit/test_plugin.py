"""A fifth system from outside of the tree, a file for each room, through every command: nothing of this project is edited for it."""

import json
import textwrap
from pathlib import Path

import pytest

from pipeline.config import ConfigError, load
from pipeline.run import RunConfig
from pipeline.task import check_wiring
from tests.runs import DEBUG, Launcher, selection_log

FILES = {
    "source": '''
        """Squares of one shade, and its name."""

        import io

        import numpy as np
        from PIL import Image

        from tools.sources import base
        from tools.sources.base import Pair, Plan

        class Source(base.Source):
            """Four shades."""

            @staticmethod
            def add_arguments(parser):
                parser.add_argument("--count", type=int, default=8)

            def __init__(self, options):
                self.count = options.count

            def fingerprint(self):
                return {"source": "shades", "count": self.count}

            def plan(self, seed, captions, window):
                return Plan(np.arange(self.count), None)

            def pairs(self, rows):
                for row in rows:
                    out = io.BytesIO()
                    Image.new("L", (8, 8), int(row) % 4 * 60).save(out, "png")
                    yield Pair("png", out.getvalue(), f"shade {row % 4}")
    ''',
    "tower": '''
        """How bright an image is, by a number that is learnt."""

        import torch

        from pipeline.data.decode import ImageDecoder, Resize
        from pipeline.towers.base import Tower, TowerConfig

        class Config(TowerConfig):
            size: int = 8

            def reads(self):
                return ("image",)

            def gives(self):
                return ("brightness",)

            def decoders(self, folder, train):
                return {"image": ImageDecoder(self.size, Resize(self.size))}

            def measured_by(self):
                return "lab.figures"

            def build(self, folder):
                return Brightness()

        class Brightness(Tower):
            def __init__(self):
                super().__init__()
                self.map = torch.nn.Linear(1, 1)

            def forward(self, fields):
                return {"brightness": self.map(fields["image"].float().mean((1, 2, 3))[:, None] / 255)}
    ''',
    "objective": '''
        """Half of what a teacher says."""

        from pipeline.objectives.base import Objective, ObjectiveConfig

        class Config(ObjectiveConfig):
            share: float = 0.5

            def reads(self):
                return ("brightness", "dark.said")

            def trains(self):
                return ("brightness",)

            def build(self):
                made = Half()
                made.share = self.share
                return made

        class Half(Objective):
            def forward(self, features, batch, selection, comm):
                weight = selection.weight("follow", batch.valid)
                return ((features["brightness"] - self.share * batch.teacher["dark.said"]).square().squeeze(1) * weight).mean()
    ''',
    "selector": '''
        """Every second row."""

        import torch

        from pipeline.selection.base import Selection, Selector, SelectorConfig

        class Config(SelectorConfig):
            def build(self, num_samples, warmup_steps=0, seed=0):
                return Second(self, num_samples, warmup_steps, seed)

        class Second(Selector):
            def select(self, group):
                return Selection(torch.arange(group.keep) * 2)
    ''',
    "teacher": '''
        """Says one number of everything."""

        import torch

        from pipeline.teachers.base import Teacher, TeacherConfig

        class Config(TeacherConfig):
            value: float = 1.0

            def gives(self):
                return ("said",)

            def reads(self):
                return ("image",)

            def open(self, sources):
                made = Says()
                made.digest, made.value = f"says {self.value}", self.value
                return made

        class Says(Teacher):
            def forward(self, fields):
                return {"said": torch.full((len(fields["image"]), 1), self.value)}
    ''',
    "figures": '''
        """What the tower says of held-out images."""

        from pipeline.evaluation.student import outputs

        def measure(run, url, *, batch, workers):
            said = outputs(run, [url], batch=batch, workers=workers)["brightness"]
            return {"brightness": {"images": len(said), "mean": said.mean().item()}}
    ''',
}
RUN = """
out: {out}
steps: 60
data: {{sources: [{{url: {shards}}}], batch: 8, lanes: 2, groups: 1, workers: 1}}
towers: {{student: {{name: lab.tower}}}}
teachers: {{dark: {{name: lab.teacher, value: 0.8}}}}
objectives: {{follow: {{name: lab.objective, share: 0.25}}}}
selector: {{name: lab.selector, rate: 0.5}}
optimizer: {{lr: 0.1}}
engine: {{precision: fp32, threads: 1}}
evaluation: {{data: {shards}, workers: 0}}
"""


@pytest.mark.slow
def test_a_system_from_outside_is_made_trained_measured_and_reported(launcher: Launcher, tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / "lab").mkdir(exist_ok=True)
        (tmp_path / "lab" / f"{name}.py").write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    shards, out, file = tmp_path / "shards", tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(RUN.format(out=out, shards=shards), encoding="utf-8")

    def python(*command: object) -> str:
        return launcher.run([str(word) for word in command], PYTHONPATH=str(tmp_path))

    assert "16 samples in 2 shards" in python("tools.make_shards", "lab.source", shards, "--count", 16, "--shard-size", 8, "--workers", 1)
    python("train", file)
    python("evaluate", out)
    result = json.loads((out / "result.json").read_text())
    assert result["brightness"]["images"] == 16 and abs(result["brightness"]["mean"] - 0.2) < 0.05 and result["step"] == 60
    kept = selection_log(out)["kept"].to_pylist()
    assert sum(kept) * 2 == len(kept)
    python("report", out)
    assert "lab.selector" in (tmp_path / "report.html").read_text()
    missing = launcher.start(["tools.make_shards", "lab.nothing", str(shards)], PYTHONPATH=str(tmp_path))
    assert missing.wait() == 1 and "no module 'lab.nothing'; is the folder that holds it on PYTHONPATH?" in missing.output()


@pytest.mark.parametrize("changes", [["objectives.half={name: clip}"], ['towers={student: {name: linear}, "a.b": {name: linear}}']])
def test_a_name_that_torch_has_taken_is_refused(changes: list[str]) -> None:
    config = load(RunConfig, DEBUG, changes)
    with pytest.raises(ConfigError, match=r"(objectives.half|towers.a.b): cannot be a name here"):
        check_wiring(config.towers, config.objectives)
