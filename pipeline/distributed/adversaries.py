"""Modules that some objectives train against, outside of the Task: small, replicated on every rank, each with an AdamW of its own."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipeline.distributed.checkpoint import CheckpointError
from pipeline.distributed.comm import Comm
from pipeline.distributed.host import Files, Host, save_file

FILE = "adversaries.safetensors"


class _Adversary(NamedTuple):
    module: nn.Module
    adam: torch.optim.AdamW


class Adversaries:
    """By the name of their objective. They train after the model's step, on what `StepOutput.adversary` holds under "<objective>/"."""

    def __init__(self, objectives: nn.ModuleDict, device: torch.device, comm: Comm) -> None:
        self.comm, self._all = comm, {}
        for name, objective in objectives.items():
            if (module := objective.adversary()) is not None:
                module.to(device)
                self._all[name] = _Adversary(module, torch.optim.AdamW(module.parameters(), **module.adamw))

    def train(self, rows: dict[str, Tensor]) -> None:
        """One step of each; gradients are averaged over ranks, so that all of them stay equal. Collective."""
        for name, (module, adam) in self._all.items():
            inputs = {key.removeprefix(f"{name}/"): value for key, value in rows.items() if key.startswith(f"{name}/")}
            if not inputs:
                continue
            adam.zero_grad(set_to_none=True)
            with torch.autocast(next(module.parameters()).device.type, enabled=False):
                module(inputs).backward()
            for parameter in module.parameters():
                parameter.grad = self.comm.sum(parameter.grad) / self.comm.size
            adam.step()

    def file(self, host: Host) -> Files:
        """Rank 0's file of weights and moments; none where there are none."""
        if not self._all or self.comm.rank:
            return {}
        tensors, steps = {}, {}
        for path, parameter, state in self._parameters():
            values = {"weight": parameter} | {moment: state[moment] for moment in ("exp_avg", "exp_avg_sq") if state}
            tensors |= {f"{name}|{path}": host.take(f"adversary|{name}|{path}", value) for name, value in values.items()}
            steps[path] = int(state["step"]) if state else 0
        return {FILE: partial(save_file, tensors, metadata={"steps": json.dumps(steps)})}

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What `file` wrote, on every rank. Raises CheckpointError where the checkpoint holds other ones."""
        if not self._all:
            return
        if not (folder / FILE).is_file():
            raise CheckpointError(f"{folder}: holds no {FILE}, but objectives {', '.join(self._all)} train against a module of their own")
        with safe_open(folder / FILE, "pt") as file:
            steps = json.loads(file.metadata()["steps"])
            if steps.keys() != {path for path, _, _ in self._parameters()}:
                raise CheckpointError(f"{folder / FILE}: is of other objectives ({', '.join(sorted(steps))})")
            for path, parameter, state in self._parameters():
                parameter.copy_(file.get_tensor(f"weight|{path}"))
                if steps[path]:
                    state["step"] = torch.tensor(float(steps[path]))
                    state |= {moment: file.get_tensor(f"{moment}|{path}").to(parameter.device) for moment in ("exp_avg", "exp_avg_sq")}

    def _parameters(self) -> list[tuple[str, nn.Parameter, dict]]:
        """(objective.parameter, the parameter, its optimizer state)."""
        return [
            (f"{name}.{inner}", parameter, adam.state[parameter])
            for name, (module, adam) in self._all.items()
            for inner, parameter in module.named_parameters()
        ]
