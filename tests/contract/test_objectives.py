"""One contract for every objective in the folder: what its config claims to train is trained, and nothing else."""

import copy
import importlib

import pytest
import torch
from torch import Tensor

from pipeline.config import ConfigError, dump, names_in, parse
from pipeline.distributed.comm import LocalComm
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection
from tests.objective_cases import CASES, ROWS, batch_of, cases, config_of, features_of

ALL = pytest.mark.parametrize(("name", "case"), cases())
WEIGHTED = Selection(torch.arange(ROWS))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def run(config: ObjectiveConfig, objective: Objective, features: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of features and parameters by name (None where there is none)."""
    leaves = {name: value.clone().requires_grad_() for name, value in features.items()}
    loss = objective(leaves, batch, Selection(torch.arange(len(batch))), LocalComm())
    if loss.requires_grad:
        loss.backward()
    found = {f"parameter {name}": parameter.grad for name, parameter in objective.named_parameters()}
    return loss.detach(), found | {name: leaf.grad for name, leaf in leaves.items()}


def built(config: ObjectiveConfig) -> Objective:
    return config.build().double()


def test_every_case_is_of_an_objective() -> None:
    assert set(CASES) <= set(names_in("pipeline.objectives"))
    assert {"amid", "umt", "logit_kd", "feature_kd", "relational_kd", "crd", "affinity", "clip", "siglip"} <= set(
        names_in("pipeline.objectives")
    )


@ALL
def test_trains_every_parameter_it_has_and_every_feature_it_claims_and_no_other(name: str, case: str) -> None:
    config = config_of(name, case)
    objective = built(config)
    _, gradients = run(config, objective, features_of(config), batch_of(config))
    assert set(config.trains()) <= set(config.reads())
    for key, gradient in gradients.items():
        if key.startswith("parameter ") or key in config.trains():
            assert gradient is not None and float(gradient.abs().max()) > 1e-9, f"{key} is claimed and receives nothing"
            assert gradient.isfinite().all(), key
        else:
            assert gradient is None or not gradient.any(), f"{key} must not be trained"
    critic = objective.adversary()
    if critic is not None:
        assert all(parameter.grad is None for parameter in critic.parameters()), "the model's step must not train the critic"
        critic.double()(objective.adversary_inputs).backward()
        for key, parameter in critic.named_parameters():
            # paired and unpaired: the bias of the last layer may cancel, nothing else
            assert parameter.grad is not None and (parameter.grad.any() or key == "net.2.bias"), key
        names = {id(p) for p in objective.parameters()}
        assert not names & {id(p) for p in critic.parameters()}, "the critic is no part of the task"


@ALL
def test_rows_that_do_not_count_may_hold_anything_and_receive_nothing(name: str, case: str) -> None:
    config = config_of(name, case)
    valid = torch.ones(ROWS, dtype=torch.bool)
    valid[[1, 7, 8]] = False
    features, batch = features_of(config), batch_of(config, valid=valid)
    loss, gradients = run(config, built(config), features, batch)
    spoiled = {key: value.clone() for key, value in features.items()}
    for value in spoiled.values():
        if value.ndim >= 2:
            value[~valid] = torch.nan
    again, others = run(config, built(config), spoiled, batch)
    assert torch.allclose(again, loss, rtol=1e-12, atol=0)
    for key, gradient in others.items():
        if gradient is None:
            continue
        assert torch.allclose(gradient, gradients[key], rtol=1e-9, atol=1e-12), key
        if key in features and features[key].ndim >= 2:
            assert not gradient[~valid].any(), key


@ALL
def test_without_a_row_that_counts_there_is_nothing_to_learn(name: str, case: str) -> None:
    config = config_of(name, case)
    batch = batch_of(config, valid=torch.zeros(ROWS, dtype=torch.bool))
    loss, gradients = run(config, built(config), features_of(config), batch)
    assert loss == 0 and all(gradient is None or not gradient.any() for gradient in gradients.values())


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_rows_of_half_precision_are_finite(name: str, case: str, dtype: torch.dtype) -> None:
    config = config_of(name, case)
    objective = config.build()
    features = {key: value.to(dtype) for key, value in features_of(config, rows=2).items()}
    if name in ("clip", "siglip"):
        features["scale"] = features["scale"].float()
    loss, gradients = run(config, objective, features, batch_of(config, rows=2))
    assert loss.isfinite() and loss.dtype == torch.float32
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    assert all(value.isfinite() and not value.requires_grad and value.shape == () for value in objective.telemetry.values())


@ALL
def test_two_forwards_of_a_step_are_one(name: str, case: str) -> None:
    """Gradient accumulation computes the loss twice; state moves in after_step, and goes through a checkpoint."""
    config = config_of(name, case)
    objective = built(config)
    features, batch = features_of(config), batch_of(config)
    first, _ = run(config, objective, features, batch)
    assert torch.equal(run(config, objective, features, batch)[0], first)
    objective.after_step()
    objective.after_step()
    other = features_of(config, seed=8)
    second = built(config)
    second.load_state_dict(copy.deepcopy(objective.state_dict()))
    assert torch.equal(run(config, second, other, batch)[0], run(config, objective, other, batch)[0])


@ALL
def test_initial_weights_draw_nothing_from_the_generator_and_depend_on_the_seed_only(name: str, case: str) -> None:
    config, before = config_of(name, case), torch.get_rng_state()
    first = config.build()
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(3)
    second = config.build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    torch.manual_seed(6)
    drawn = [parameter for parameter in config.build().parameters() if parameter.ndim > 1]
    assert not any(torch.equal(a, b) for a, b in zip(drawn, (p for p in first.parameters() if p.ndim > 1)))


@ALL
def test_no_parameter_is_a_scalar_and_the_config_survives_a_dump(name: str, case: str) -> None:
    config = config_of(name, case)
    assert all(parameter.ndim >= 1 for parameter in config.build().parameters())  # DeepSpeed and FSDP refuse scalars
    assert parse(type(config), dump(config), "dump") == config


@pytest.mark.parametrize("name", [name for name in names_in("pipeline.objectives") if name not in ("clip", "siglip")])
def test_what_is_missing_is_named(name: str) -> None:
    config = config_of(name, next(iter(CASES[name])))
    features, batch = features_of(config), batch_of(config)
    with pytest.raises(ValueError, match=rf"{name} reads '{config.reads()[0]}'"):
        config.build()({}, batch, WEIGHTED, LocalComm())
    for case in CASES[name]:
        for field in config_of(name, case).fields():
            lacking = batch_of(config_of(name, case))
            del lacking.fields[field]
            with pytest.raises(ValueError, match=f"'{field}'"):
                config_of(name, case).build()(features_of(config_of(name, case)), lacking, WEIGHTED, LocalComm())
    on_batch = Batch(batch.sample, batch.slot, batch.visit, batch.valid, batch.fields, teacher=features)
    whole = built(config)(features, batch, WEIGHTED, LocalComm())
    assert torch.equal(built(config)({}, on_batch, WEIGHTED, LocalComm()), whole)  # a frozen teacher's rows come with the batch


@pytest.mark.parametrize("name", ["amid", "crd", "umt", "feature_kd"])
def test_widths_that_a_map_needs_are_asked_for_before_training(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*student_width"):
        importlib.import_module(f"pipeline.objectives.{name}").Config().build()
