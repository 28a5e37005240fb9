"""Run by test_ranks on every rank: each objective, with every kernel, on the rows of all ranks against the same on all rows in one process."""

import torch
import torch.distributed as dist

from pipeline.distributed.comm import LocalComm, connect
from pipeline.kernels import clip_loss
from pipeline.objectives.base import ObjectiveConfig
from pipeline.types import Batch, Selection
from tests.objective_cases import OF_A_RANK, ROWS, batch_of, cases, config_of, features_of


def gradients(config: ObjectiveConfig, features: dict, batch: Batch, selection: Selection, comm) -> tuple[torch.Tensor, dict, dict]:
    """The loss of a second step, for queues and banks hold rows then; gradients; and what is the same on every rank: buffers."""
    torch.manual_seed(0)  # initial weights
    objective = config.build().double()
    for _ in range(2):
        leaves = {name: value.clone().requires_grad_() for name, value in features.items()}
        objective.zero_grad()
        loss = objective(leaves, batch, selection, comm)
        loss.backward()
        objective.after_step()
    shared = {f"parameter {name}": parameter.grad for name, parameter in objective.named_parameters()}
    critic = objective.adversary()
    if critic is not None:
        critic.double()(objective.adversary_inputs).backward()
        shared |= {f"parameter critic {name}": parameter.grad for name, parameter in critic.named_parameters()}
    trained = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return loss.detach(), shared | trained, dict(objective.named_buffers()) | objective.telemetry


def compare(name: str, case: str, impl: str | None, valid: torch.Tensor, weighted: bool) -> str:
    """One line about one objective: the mean over ranks of losses and gradients against the reference's of the whole batch."""
    config = config_of(name, case, **({} if impl is None else {"impl": impl}))
    features, batch = features_of(config), batch_of(config, valid=valid)
    weights = {name: torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)} if weighted else {}
    reference = config_of(name, case, **({} if impl is None else {"impl": "reference"}))
    whole, expected, state = gradients(reference, features, batch, Selection(torch.arange(ROWS), weights), LocalComm())
    comm = connect(torch.device("cpu"))
    mine = torch.arange(ROWS).chunk(comm.size)[comm.rank]
    part = {key: value[mine] if value.ndim >= 2 else value for key, value in features.items()}
    chosen = Selection(mine, {key: value[mine] for key, value in weights.items()})
    taken = batch.take(mine)
    taken.unselected = batch.unselected and {key: value.chunk(comm.size)[comm.rank] for key, value in batch.unselected.items()}
    loss, found, here = gradients(config, part, taken, chosen, comm)
    assert torch.allclose(comm.sum(loss) / comm.size, whole, rtol=1e-12, atol=0), (name, case, comm.sum(loss) / comm.size, whole)
    assert found.keys() == expected.keys() and here.keys() == state.keys()
    for key, gradient in found.items():
        # DDP averages what the ranks have for one parameter; a row's gradient is one rank's, so its share of the average is 1 / size
        if key.startswith("parameter ") or features[key].ndim < 2:
            assert torch.allclose(comm.sum(gradient) / comm.size, expected[key], rtol=1e-9, atol=1e-13), (name, case, key)
        else:
            assert torch.allclose(gradient / comm.size, expected[key][mine], rtol=1e-9, atol=1e-13), (name, case, key)
    for key, value in here.items():  # a buffer is equal everywhere, so it is its own mean; what is recorded is a mean of parts
        assert torch.allclose(comm.sum(value.double()) / comm.size, state[key].double(), rtol=1e-5), (name, case, key)
    assert any(float(value.abs().max()) > 1e-6 for value in expected.values())
    return f"objective {name}, {impl or case}: {int(valid.sum())} of {ROWS} rows valid, {'weighted' if weighted else 'plain'}: agrees"


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
        for objective, case in (one for one in cases() if one not in OF_A_RANK):
            kernels = ("reference", "blocked") if objective in ("clip", "siglip") else (None,)
            for impl in kernels:
                for rows in (torch.ones(ROWS, dtype=torch.bool), some):
                    print(compare(objective, case, impl, rows, weighted=False))
                print(compare(objective, case, impl, some, weighted=True))
        print(bfloat16_is_added_up_in_float32())
    finally:
        dist.destroy_process_group()
