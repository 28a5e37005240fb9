"""Run by test_ranks on every rank: each objective, with every kernel, on the rows of all ranks against the same on all rows in one process."""

import torch
import torch.distributed as dist

from pipeline.config import names_in, parse
from pipeline.distributed.comm import LocalComm, connect
from pipeline.kernels import clip_loss
from pipeline.objectives.base import ObjectiveConfig
from pipeline.types import Batch, Selection

ROWS, WIDTH = 12, 8


def given(config: ObjectiveConfig, valid: torch.Tensor) -> tuple[dict[str, torch.Tensor], Batch]:
    """Random features of the whole batch by the names the objective reads: unit rows, and a scale."""
    make = torch.Generator().manual_seed(7)
    rows = {name: torch.randn(ROWS, WIDTH, generator=make, dtype=torch.float64) for name in config.reads() if name != "scale"}
    features = {name: torch.nn.functional.normalize(value) for name, value in rows.items()}
    if "scale" in config.reads():
        features["scale"] = torch.tensor([9.0], dtype=torch.float64)
    ids = torch.arange(ROWS)
    return features, Batch(ids, ids, ids * 0, valid, {})


def gradients(config: ObjectiveConfig, features: dict, batch: Batch, selection: Selection, comm) -> tuple[torch.Tensor, dict]:
    leaves = {name: value.clone().requires_grad_() for name, value in features.items()}
    objective = config.build().double()
    loss = objective(leaves, batch, selection, comm)
    loss.backward()
    shared = {f"parameter {name}": parameter.grad for name, parameter in objective.named_parameters()}
    return loss.detach(), shared | {name: leaf.grad for name, leaf in leaves.items()}


def compare(name: str, impl: str | None, valid: torch.Tensor, weighted: bool) -> str:
    """One line about one objective: the mean over ranks of losses and gradients against the reference's of the whole batch."""
    made = __import__(f"pipeline.objectives.{name}", fromlist=["Config"]).Config
    config = parse(made, {} if impl is None else {"impl": impl}, name)
    features, batch = given(config, valid)
    weights = {name: torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)} if weighted else {}
    reference = parse(made, {} if impl is None else {"impl": "reference"}, name)
    whole, expected = gradients(reference, features, batch, Selection(torch.arange(ROWS), weights), LocalComm())
    comm = connect(torch.device("cpu"))
    mine = torch.arange(ROWS).chunk(comm.size)[comm.rank]
    part = {key: value if key == "scale" else value[mine] for key, value in features.items()}
    chosen = Selection(mine, {key: value[mine] for key, value in weights.items()})
    loss, found = gradients(config, part, batch.take(mine), chosen, comm)
    assert torch.allclose(comm.sum(loss) / comm.size, whole, rtol=1e-12, atol=0), (name, comm.sum(loss) / comm.size, whole)
    for key, gradient in found.items():
        # DDP averages what the ranks have for one parameter; a row's gradient is one rank's, so its share of the average is 1 / size
        if key == "scale" or key.startswith("parameter "):
            assert torch.allclose(comm.sum(gradient) / comm.size, expected[key], rtol=1e-10, atol=1e-13), (name, key)
        else:
            assert torch.allclose(gradient / comm.size, expected[key][mine], rtol=1e-10, atol=1e-13), (name, key)
    assert any(float(value.abs().max()) > 1e-6 for value in expected.values())
    return f"objective {name}, {impl}: {int(valid.sum())} of {ROWS} rows valid, {'weighted' if weighted else 'plain'}: agrees"


def bfloat16_is_added_up_in_float32() -> str:
    """The columns' gradients of all ranks are rounded once, after the sum."""
    make = torch.Generator().manual_seed(3)
    exact = [torch.nn.functional.normalize(torch.randn(64, 32, generator=make)).bfloat16().double().requires_grad_() for _ in range(2)]
    clip_loss(*exact, 20.0, impl="reference").loss.backward()
    comm, scattered = connect(torch.device("cpu")), []
    original = comm.scatter_sum
    comm.scatter_sum = lambda x: scattered.append(x.dtype) or original(x)
    mine = torch.arange(64).chunk(comm.size)[comm.rank]
    rows = [value.detach()[mine].bfloat16().requires_grad_() for value in exact]
    clip_loss(*rows, 20.0, comm=comm, impl="blocked").loss.backward()
    assert scattered == ([torch.float32] if comm.size > 1 else [])
    for value, truth in zip(rows, exact):
        expected = truth.grad[mine] * comm.size
        assert value.grad.dtype == torch.bfloat16
        assert (value.grad - expected).norm() <= 5e-3 * expected.norm()
    return "bfloat16 agrees"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        some = torch.ones(ROWS, dtype=torch.bool)
        some[[1, 7, 8]] = False
        for objective in names_in("pipeline.objectives"):
            kernels = ("reference", "blocked") if objective in ("clip", "siglip") else (None,)
            for impl in kernels:
                for rows in (torch.ones(ROWS, dtype=torch.bool), some):
                    print(compare(objective, impl, rows, weighted=False))
                print(compare(objective, impl, some, weighted=True))
        print(bfloat16_is_added_up_in_float32())
    finally:
        dist.destroy_process_group()
