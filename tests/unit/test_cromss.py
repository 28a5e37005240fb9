"""CromSS: what its masks, its smoothing and its losses promise (specification's list of nine), and that nothing flows where it must not."""

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import ConfigError, parse
from pipeline.distributed.comm import LocalComm
from pipeline.objectives.noisy_segmentation import Config, smoothed
from pipeline.selection import cromss
from pipeline.towers import unet
from pipeline.types import Batch, Selection

K, SIDE = 5, 8
PLAIN = {"select": False, "alpha": 0.0, "beta": 0.0, "consistency": 0.0}


def problem(rows: int = 4, seed: int = 0) -> tuple[dict[str, Tensor], Batch]:
    """Logits of two sensors in float64, labels and a prior."""
    make = torch.Generator().manual_seed(seed)
    logits = {f"{name}.logits": 2 * torch.randn(rows, K, SIDE, SIDE, generator=make, dtype=torch.float64) for name in ("s1", "s2")}
    ids = torch.arange(rows)
    label = torch.randint(0, K, (rows, SIDE, SIDE), generator=make).to(torch.uint8)
    prior = torch.randint(0, 256, (rows, K, SIDE, SIDE), generator=make).to(torch.uint8)
    fields = {"segmentation": label, "prior": prior}
    return logits, Batch(ids, ids, ids * 0, torch.ones(rows, dtype=torch.bool), fields)


def loss_of(settings: dict[str, Any], logits: dict[str, Tensor], batch: Batch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss at a step, and its gradients by sensor."""
    objective = parse(Config, settings, "test").build()
    objective.step += step
    leaves = {name: value.detach().clone().requires_grad_() for name, value in logits.items()}
    loss = objective(leaves, batch, Selection(torch.arange(len(batch))), LocalComm())
    loss.backward()
    return loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def confidences(seed: int = 0) -> tuple[Tensor, Tensor]:
    return tuple(torch.rand(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_entangling_lowers_and_never_below_half() -> None:
    one, other = confidences()
    one[0, 0, 0], other[0, 0, 1] = 0, 1
    lowered, also = cromss.entangled(one, other)
    assert (lowered <= one).all() and (lowered >= one / 2).all()
    assert torch.equal(lowered == one, (other == 1) | (one == 0))
    swapped = cromss.entangled(other, one)
    assert torch.equal(swapped[0], also) and torch.equal(swapped[1], lowered)


@pytest.mark.parametrize("shape", ["exp", "linear"])
def test_the_ramp_rises_from_almost_nothing_to_all(shape: str) -> None:
    ramped = torch.stack([cromss.ramp(step, 20, shape) for step in range(30)])
    assert (ramped.diff() >= 0).all() and (ramped[20:] == 1).all()
    assert float(ramped[0]) == pytest.approx(math.exp(-5) if shape == "exp" else 0)
    keep = cromss.keep_ratio(ramped, 0.5)
    confidence = confidences()[0]
    assert (keep[20:] == 0.5).all() and torch.equal(cromss.consistency_mask(confidence, ramped[25]), confidence)
    if shape == "exp":
        assert float(keep[0]) == pytest.approx(0.9966, abs=1e-4)
        assert (cromss.consistency_mask(confidence, ramped[0]) >= 0.9932).all()
    assert cromss.ramp(0, 0) == 1  # no ramp: selection is there at once


def test_each_class_keeps_its_share_at_weight_one() -> None:
    confidence, label = confidences()[0], torch.randint(-1, K + 1, (4, SIDE, SIDE), generator=torch.Generator().manual_seed(3))
    for keep in (0.5, 0.9, 0.01):
        mask = cromss.class_balanced_mask(confidence, label, keep, K)
        assert (mask >= 0).all() and (mask <= 1).all() and not mask[(label < 0) | (label >= K)].any()
        for k in range(K):
            of = mask[label == k]
            kept = int(len(of) * keep)
            assert int((of == 1).sum()) == kept  # no ties here
            assert kept or not of.any()
    scaled = confidence * torch.tensor([0.3, 2.0, 5.0, 0.1, 1.0, 1.0, 1.0], dtype=torch.float64)[label]
    mask = cromss.class_balanced_mask(confidence, label, 0.5, K)
    assert torch.allclose(cromss.class_balanced_mask(scaled, label, 0.5, K), mask, rtol=1e-12)
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(4))
    mixed = cromss.class_balanced_mask(confidence.flatten()[order], label.flatten()[order], 0.5, K)
    assert torch.equal(mixed, mask.flatten()[order])
    known = (label >= 0) & (label < K)
    assert torch.equal(cromss.class_balanced_mask(confidence, label, 1.0, K), known.double())
    assert torch.equal(cromss.class_balanced_mask(confidence, label, 0.0, K), confidence * known)
    assert torch.equal(cromss.class_balanced_mask(confidence * 0, label, 0.5, K), known.double())  # ties at 0: all ones


def test_no_gradient_flows_through_masks_or_into_a_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, batch = problem()
    whole, gradients = loss_of({}, logits, batch)
    objective = parse(Config, {}, "test").build()
    probability = [value.softmax(1) for value in logits.values()]
    label, known = batch.fields["segmentation"].long(), torch.ones(4, SIDE, SIDE, dtype=torch.bool)
    constants = objective._masks(probability, label, known)
    monkeypatch.setattr(type(objective), "_masks", lambda *_: constants)
    again, others = loss_of({}, logits, batch)
    assert again == whole and all(torch.equal(gradients[name], others[name]) for name in logits)
    # each term of the consistency pulls the one that follows, and not the one that is followed
    from pipeline.objectives.noisy_segmentation import follow

    leaves = [value.clone().requires_grad_() for value in logits.values()]
    follow(leaves[0], leaves[1].detach().softmax(1), known.double(), LocalComm()).backward()
    assert leaves[0].grad.any() and leaves[1].grad is None


def test_without_its_additions_it_is_cross_entropy_and_dice_of_each_net() -> None:
    logits, batch = problem()
    label = batch.fields["segmentation"].long()
    loss, gradients = loss_of(PLAIN, logits, batch)
    hot, expected = F.one_hot(label, K).movedim(-1, 1).double(), 0.0
    for z in logits.values():
        q, places = z.softmax(1), (0, 2, 3)
        dice = 1 - 2 * (q * hot).sum(places) / (q + hot).sum(places)
        expected += F.cross_entropy(z, label) + dice.mean()
    assert torch.allclose(loss, expected, rtol=1e-12)
    other = logits | {"s2.logits": -logits["s2.logits"]}
    assert torch.equal(loss_of(PLAIN, other, batch)[1]["s1.logits"], gradients["s1.logits"])  # the nets do not meet
    chosen = PLAIN | {"select": True}
    assert not torch.equal(loss_of(chosen, other, batch)[1]["s1.logits"], loss_of(chosen, logits, batch)[1]["s1.logits"])  # but in masks
    alone = chosen | {"entangle": False}
    assert torch.equal(loss_of(alone, other, batch)[1]["s1.logits"], loss_of(alone, logits, batch)[1]["s1.logits"])
    single, _ = loss_of(PLAIN | {"second": None}, {"s1.logits": logits["s1.logits"]}, batch)
    pair, _ = loss_of(PLAIN, logits | {"s2.logits": logits["s1.logits"]}, batch)
    assert torch.allclose(2 * single, pair, rtol=1e-12)


def test_smoothed_labels_are_distributions_that_keep_their_class() -> None:
    _, batch = problem()
    label, prior = batch.fields["segmentation"].long(), batch.fields["prior"].clone()
    prior[0, :, 0, 0] = 0  # a pixel without a prior
    target = smoothed(label, prior, K, 0.15, 0.05, torch.float64)
    assert torch.allclose(target.sum(1), torch.ones(()).double(), rtol=1e-12) and torch.equal(target.argmax(1), label)
    constant = torch.full_like(label, 2)
    certain = F.one_hot(constant, K).movedim(-1, 1) * 255
    target = smoothed(constant, certain, K, 0.15, 0.05, torch.float64)
    assert torch.allclose(target[:, 2], torch.tensor(0.95 + 0.05 / K).double()) and torch.allclose(
        target[:, 0], torch.tensor(0.01).double()
    )


@pytest.mark.parametrize("fusion", ["late", "middle"])
def test_late_fusion_shares_nothing_and_middle_fusion_its_decoder_and_head(fusion: str) -> None:
    small = {
        "sensors": {"s1": 2, "s2": 4},
        "classes": K,
        "encoder": "plain",
        "depth": 2,
        "width": 4,
        "decoder_width": 4,
        "image_size": SIDE,
    }
    net = parse(unet.Config, small | {"fusion": fusion}, "test").build(None)
    make = torch.Generator().manual_seed(0)
    fields = {
        name: torch.randint(0, 256, (2, bands, SIDE, SIDE), generator=make, dtype=torch.uint8) for name, bands in (("s1", 2), ("s2", 4))
    }

    def touched(*names: str) -> dict[str, Tensor]:
        net.zero_grad()
        out = net.eval()(fields)
        assert set(out) == {"s1.logits", "s2.logits"} and out["s1.logits"].shape == (2, K, SIDE, SIDE)
        sum(out[f"{name}.logits"].square().sum() for name in names).backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}

    first, second, both = touched("s1"), touched("s2"), touched("s1", "s2")
    shared = set(first) & set(second)
    assert set(both) == set(first) | set(second) == {name for name, _ in net.named_parameters()}
    if fusion == "late":
        assert not shared
    else:
        assert shared == {name for name, _ in net.named_parameters() if name.startswith(("decoders.shared.", "heads.shared."))}
        assert all(torch.allclose(both[name], first[name] + second[name], rtol=1e-3, atol=1e-5) for name in shared)
    assert len(net.state_dict()) == len({value.data_ptr() for value in net.state_dict().values()})  # nothing is saved twice
    with pytest.raises(ConfigError, match="data.modalities.s2.optional: blank tiles would be learnt"):
        net(fields | {"s2.present": torch.tensor([True, False])})


@pytest.mark.parametrize(("encoder", "depth", "height"), [("resnet18", 3, 30), ("efficientnet-b0", 5, 32)])
def test_an_encoder_of_the_library_trains_what_is_used_and_no_more(encoder: str, depth: int, height: int) -> None:
    given = {"sensors": {"s1": 2}, "classes": K, "encoder": encoder, "depth": depth, "decoder_width": 4, "image_size": 32}
    net = parse(unet.Config, given, "test").build(None)
    out = net({"s1": torch.zeros(2, 2, height, 32)})["s1.logits"]  # a resnet's sides need not be multiples of anything
    assert out.shape == (2, K, height, 32)
    out.square().sum().backward()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in net.named_parameters() if p.grad is not None}
    if encoder == "resnet18":
        assert "encoders.s1.layer2.0.conv1.weight" in trained and not any(".layer3." in name or ".layer4." in name for name in trained)
    else:
        assert 0 < sum(not p.requires_grad for p in net.parameters()) < 10  # the classifying layer's


def test_uniform_predictions_and_maps_without_a_label_give_zero_and_no_nan() -> None:
    logits, batch = problem()
    uniform = torch.full((2, K, SIDE, SIDE), 1 / K, dtype=torch.float64)
    assert torch.allclose(cromss.prediction_confidence(uniform), torch.zeros(()).double(), atol=1e-12)
    certain = F.one_hot(torch.zeros(2, SIDE, SIDE, dtype=torch.int64), K).movedim(-1, 1).double()
    assert torch.equal(cromss.prediction_confidence(certain), torch.ones(2, SIDE, SIDE).double())
    flat = {name: torch.zeros_like(value) for name, value in logits.items()}
    loss, gradients = loss_of({"alpha": 0.0}, flat, batch)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
    batch.fields["segmentation"][:] = 255
    loss, gradients = loss_of({}, logits, batch)
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    batch.fields["segmentation"][0, 0, 0] = 7
    with pytest.raises(ConfigError, match="holds class 7, but s1.logits has 5 classes"):
        loss_of({}, logits, batch)
    batch.fields["segmentation"] = batch.fields["segmentation"][:, 1:]
    with pytest.raises(ConfigError, match=r"the label maps in 'segmentation' need \[4, 5, 7, 8\]"):
        loss_of({}, logits, batch)


def test_entangled_confidence_ranks_wrong_labels_lower() -> None:
    """Each sensor sees the class with errors of its own; the labels are wrong by others."""
    make = torch.Generator().manual_seed(1)
    truth = torch.randint(0, K, (8, 32, 32), generator=make)
    wrong = torch.rand(truth.shape, generator=make) < 0.45
    label = torch.where(wrong, (truth + 1) % K, truth)
    clues = F.one_hot(truth, K).movedim(-1, 1).double()
    seen = [2 * clues + torch.randn(clues.shape, generator=make, dtype=torch.float64) for _ in range(2)]
    single = [cromss.label_confidence(z.softmax(1), label) for z in seen]
    for one, both in zip(single, cromss.entangled(*single)):
        alone, together = (roc_auc_score(~wrong.flatten(), c.flatten()) for c in (one, both))
        assert together > alone + 0.01 > 0.7
