"""The sums as an op of torch.library: its registration, one node under torch.compile and export, and what it says when something is missing."""

import sys
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from pipeline.kernels import clip_loss, siglip_loss
from pipeline.kernels.similarity import Pairs, similarity
from tests.unit.test_clip_loss import pairs

KINDS = {"softmax": 0, "rows": 3, "sigmoid": 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_registration_is_sound(kind: str, dtype: torch.dtype, masked: bool) -> None:
    """Schema, fake implementation and autograd registration against what the op does."""
    x, y = (rows.to(dtype) for rows in pairs(130, 24))
    x, offset = x[: 130 - KINDS[kind]], KINDS[kind]
    used = torch.arange(130) % 7 != 0 if masked else None
    mine = None if used is None else used[offset:]
    if masked:
        x, y = x.masked_fill(~mine[:, None], 0), y.masked_fill(~used[:, None], 0)
    bias = torch.tensor(-7.0, requires_grad=True) if kind == "sigmoid" else None
    scale = torch.tensor(14.3, requires_grad=True)
    given = (x.requires_grad_(), y.requires_grad_(), scale, bias, mine, used, offset, kind, "blocked", True)
    # gradients are compared by the tests of the losses; here only how the op is registered
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.dissect.similarity.default, given, test_utils=checks)


def nodes(function: Any, *given: torch.Tensor) -> tuple[list[str], list[str], list[torch.Tensor]]:
    """Our ops in the compiled forward and backward, and the gradients that the compiled function gives."""
    seen: tuple[list[str], list[str]] = ([], [])

    def look(into: list[str]) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            into.extend(str(node.target) for node in graph.graph.nodes if "dissect" in str(node.target))
            return make_boxed_func(graph.forward)

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look(seen[0]), bw_compiler=look(seen[1]))
    torch.compile(function, backend=backend, fullgraph=True)(*given).backward()
    return *seen, [value.grad for value in given]


@pytest.mark.parametrize(
    "loss", [lambda i, t, s: clip_loss(i, t, s, impl="blocked").loss, lambda i, t, s: siglip_loss(i, t, s, -7.0, impl="blocked").loss]
)
def test_a_compiler_sees_one_node_forward_and_one_backward(loss: Any) -> None:
    rows = [*pairs(130, 24), torch.tensor(14.3, dtype=torch.float64)]
    plain, compiled = ([value.clone().requires_grad_() for value in rows] for _ in range(2))
    loss(*plain).backward()
    forward, backward, found = nodes(loss, *compiled)
    assert forward == ["dissect.similarity.default"] and backward == ["dissect.similarity_gradients.default"]
    for gradient, expected in zip(found, plain):
        torch.testing.assert_close(gradient, expected.grad)


def test_weights_do_not_break_the_graph() -> None:
    weights = torch.tensor([1.0, 0, 2] * 40)
    rows = [value[:120].clone().requires_grad_() for value in pairs(130, 24)]
    forward, backward, found = nodes(lambda i, t: clip_loss(i, t, 14.3, weights=weights, impl="blocked").loss, *rows)
    assert len(forward) == len(backward) == 1 and found[0][1::3].abs().max() == 0


def test_export_sees_one_op() -> None:
    class Loss(torch.nn.Module):
        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return clip_loss(image, text, 14.3, impl="blocked").loss

    rows = tuple(value.float() for value in pairs(130, 24))
    program = torch.export.export(Loss(), rows)
    # what runs with autocast off is a graph of its own inside the exported one
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    found = [str(node.target) for graph in graphs for node in graph.nodes if "dissect" in str(node.target)]
    assert found == ["dissect.similarity.default"]
    torch.testing.assert_close(program.module()(*rows), clip_loss(*rows, 14.3, impl="blocked").loss)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("pipeline.kernels.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    rows = torch.ones(4, 2)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dissect-pipeline\[triton\]'"):
        similarity(Pairs(rows, rows, torch.tensor(1.0)), "triton")
