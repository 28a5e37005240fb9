"""The formulas of the distillation objectives, each against its definition written out, and the reductions that hold bit for bit."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distributed.comm import LocalComm
from pipeline.objectives import affinity, cross_entropy, feature_kd, logit_kd, relational_kd, umt
from pipeline.objectives.base import Objective, ObjectiveConfig
from pipeline.types import Batch, Selection


def batch(rows: int, **fields: Tensor) -> Batch:
    ids = torch.arange(rows)
    return Batch(ids, ids, ids * 0, torch.ones(rows, dtype=torch.bool), fields)


def value(config: ObjectiveConfig, features: dict[str, Tensor], **fields: Tensor) -> Tensor:
    rows = next(feature for feature in features.values() if feature.ndim == 2).shape[0]
    return config.build().double()(features, batch(rows, **fields), Selection(torch.arange(rows)), LocalComm())


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_logit_kd_is_hintons() -> None:
    student, teacher = rows(6, 5), rows(6, 5, seed=1)
    wanted, given = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (wanted * (wanted / given).log()).sum(1).mean()
    features = {"logits": student, "teacher.logits": teacher}
    assert torch.allclose(value(logit_kd.Config(temperature=3), features), expected, rtol=1e-12)
    # an ensemble's probabilities, not normalised: a softmax does not see a factor
    mixed = logit_kd.Config(temperature=3, target="probabilities")
    assert torch.allclose(value(mixed, features | {"teacher.logits": 0.3 * teacher.softmax(1)}), expected, rtol=1e-9)
    assert value(logit_kd.Config(), {"logits": teacher, "teacher.logits": teacher}).abs() < 1e-12


def test_the_temperature_keeps_the_size_of_the_gradient() -> None:
    """T^2 makes up for the 1/T^2 of two tempered softmaxes: at high temperature the gradient is that of centred logits."""
    student, teacher = rows(6, 5).requires_grad_(), rows(6, 5, seed=1)
    value(logit_kd.Config(temperature=1e4), {"logits": student, "teacher.logits": teacher}).backward()
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert torch.allclose(student.grad, centred.detach() / 5 / 6, rtol=1e-2, atol=1e-5)


def test_affinity_has_the_gradient_of_open_clips_distill_loss() -> None:
    open_clip = pytest.importorskip("open_clip")
    unit = [F.normalize(rows(7, 6, seed=seed)) for seed in range(4)]
    student = [
        unit[0].clone().requires_grad_(),
        unit[1].clone().requires_grad_(),
        torch.tensor([14.0], dtype=torch.float64).requires_grad_(),
    ]
    teacher = dict(zip(("teacher.image", "teacher.text", "teacher.scale"), [unit[2], unit[3], torch.tensor([30.0], dtype=torch.float64)]))
    ours = value(affinity.Config(), dict(zip(("image", "text", "scale"), student)) | teacher)
    found = torch.autograd.grad(ours, student)
    peer = open_clip.loss.DistillClipLoss()
    _, distill = peer(student[0], student[1], student[2], *teacher.values())
    for mine, theirs in zip(found, torch.autograd.grad(distill, student)):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    logits = 30 * unit[2] @ unit[3].T
    entropy = -sum((side.softmax(1) * side.log_softmax(1)).sum(1).mean() for side in (logits, logits.T)) / 2
    assert torch.allclose(ours + entropy, distill, rtol=1e-9)


def test_relational_kd_is_the_papers_sum_over_pairs_and_triples() -> None:
    student, teacher = rows(5, 3), rows(5, 4, seed=1)
    features = {"embedding": student, "teacher.embedding": teacher}
    distances = [torch.cdist(x, x) for x in (student, teacher)]
    off = ~torch.eye(5, dtype=torch.bool)
    expected = F.smooth_l1_loss(*(d[off] / d[off].mean() for d in distances))
    assert torch.allclose(value(relational_kd.Config(angle_weight=0.0), features), expected, rtol=1e-6)
    losses = []
    for j in range(5):
        for i in range(5):
            for k in range(5):
                if len({i, j, k}) == 3:
                    angles = [F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0) for x in (student, teacher)]
                    losses.append(F.smooth_l1_loss(*angles))
    assert torch.allclose(
        value(relational_kd.Config(distance_weight=0.0, angle_weight=1.0), features), torch.stack(losses).mean(), rtol=1e-9
    )
    scaled_and_turned = 7 * teacher @ torch.linalg.qr(rows(4, 4, seed=2)).Q
    assert value(relational_kd.Config(), {"embedding": scaled_and_turned, "teacher.embedding": teacher}) < 1e-12


def test_equal_rows_have_a_finite_gradient() -> None:
    """Distances of 0 and arms without a direction; a dead unit gives rows of zeros."""
    student = torch.zeros(4, 3, dtype=torch.float64).requires_grad_()
    value(relational_kd.Config(), {"embedding": student, "teacher.embedding": rows(4, 3)}).backward()
    assert student.grad.abs().max() < 10
    student = torch.cat([rows(2, 3)] * 2).requires_grad_()
    value(relational_kd.Config(normalise=True), {"embedding": student, "teacher.embedding": rows(4, 3)}).backward()
    assert student.grad.abs().max() < 10


def test_feature_kd_and_umt_are_mean_square_distances_through_a_projector() -> None:
    student, teacher = rows(6, 3), rows(6, 4, seed=1)
    config = feature_kd.Config(student_width=3, teacher_width=4)
    projector = config.build().double().projector
    features = {"embedding": student, "teacher.embedding": teacher}
    assert torch.allclose(value(config, features), F.mse_loss(projector(student), teacher))
    same = {"embedding": rows(6, 4), "teacher.embedding": teacher}
    assert torch.allclose(value(umt.Config(projector="none"), same), F.mse_loss(rows(6, 4), teacher))
    unit = feature_kd.Config(projector="none", normalise=True)
    assert torch.allclose(value(unit, same), F.mse_loss(F.normalize(rows(6, 4)), F.normalize(teacher)))


@pytest.mark.parametrize("config", [umt.Config(projector="none"), feature_kd.Config(projector="none")], ids=["umt", "feature_kd"])
def test_widths_that_differ_need_a_projector(config: ObjectiveConfig) -> None:
    with pytest.raises(ValueError, match=r"embedding is \[6, 3\] and teacher.embedding \[6, 4\]; set projector: linear"):
        value(config, {"embedding": rows(6, 3), "teacher.embedding": rows(6, 4)})


def test_a_heavy_umt_without_projector_makes_the_encoder_its_teacher() -> None:
    """B-P5: the weight to infinity is the distance alone; under 1 % of the teacher's variance remains."""
    x, teacher = rows(64, 6), rows(64, 6) @ rows(6, 4, seed=1)
    encoder = nn.Linear(6, 4).double()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = value(umt.Config(projector="none"), {"embedding": encoder(x), "teacher.embedding": teacher})
        loss.backward()
        optimizer.step()
    assert loss < 0.01 * teacher.var()


def test_distillation_of_one_modality_does_not_see_another() -> None:
    """B-P8: what the second encoder is fed changes nothing about the first one's gradient."""
    entries = [umt.Config(student=name, teacher=f"teacher.{name}", student_width=4, teacher_width=4) for name in ("image", "audio")]
    gradients = []
    for seed in (1, 2):
        features = {"image": rows(6, 4).requires_grad_(), "teacher.image": rows(6, 4, seed=3)}
        features |= {"audio": rows(6, 4, seed=seed).requires_grad_(), "teacher.audio": rows(6, 4, seed=4)}
        sum(value(entry, features) for entry in entries).backward()
        gradients.append((features["image"].grad, features["audio"].grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and not torch.equal(gradients[0][1], gradients[1][1])


def test_cross_entropy_leaves_unlabelled_rows_out_and_refuses_labels_beyond_the_classes() -> None:
    logits, label = rows(4, 3).requires_grad_(), torch.tensor([2, -1, 0, -1])
    loss = value(cross_entropy.Config(), {"logits": logits}, label=label)
    assert torch.allclose(loss, F.cross_entropy(logits[[0, 2]], label[[0, 2]]) / 2)  # of 4 rows two have a label
    loss.backward()
    assert not logits.grad[[1, 3]].any()
    with pytest.raises(ValueError, match="label 3 in field 'label', but logits has 3 classes"):
        value(cross_entropy.Config(), {"logits": logits}, label=torch.tensor([0, 1, 2, 3]))


def test_a_row_without_its_modality_counts_nothing() -> None:
    student, teacher = rows(4, 3).requires_grad_(), rows(4, 3, seed=1)
    features, present = {"embedding": student, "teacher.embedding": teacher}, torch.tensor([True, False, True, True])
    loss = value(umt.Config(projector="none", present="audio.present"), features, **{"audio.present": present})
    assert torch.allclose(loss, F.mse_loss(student[present], teacher[present]) * 3 / 4)
    loss.backward()
    assert not student.grad[1].any() and student.grad[present].any()
    nothing = value(umt.Config(projector="none", present="audio.present"), features, **{"audio.present": present & False})
    assert nothing == 0


def trained(objectives: list[tuple[float, Objective]]) -> dict[str, Tensor]:
    """A few steps of a small classifier with other objectives beside the task's loss."""
    torch.manual_seed(3)
    encoder, head = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU()), nn.Linear(16, 4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters(), *(p for _, o in objectives for p in o.parameters())], lr=1e-2)
    task, data = cross_entropy.Config().build(), batch(12, label=torch.arange(12) % 4)
    for step in range(5):
        embedding = encoder(rows(12, 6, seed=step).float())
        features = {"embedding": embedding, "logits": head(embedding), "teacher.embedding": rows(12, 16, seed=9).float()}
        terms = [(1.0, task), *objectives]
        optimizer.zero_grad()
        sum(weight * objective(features, data, Selection(torch.arange(12)), LocalComm()) for weight, objective in terms).backward()
        optimizer.step()
    return encoder.state_dict() | head.state_dict()


def test_a_weight_of_0_is_plain_finetuning_bit_for_bit() -> None:
    """A-P8 and B-P5, whatever is added: no initial weight, no random number and no rounding of the student changes."""
    from pipeline.objectives import amid, crd

    widths = {"student_width": 16, "teacher_width": 16}
    others = [umt.Config(**widths), crd.Config(**widths), relational_kd.Config(), amid.Config(**widths, auxiliary_weight=0.0)]
    plain = trained([])
    torch.manual_seed(3)
    beside = trained([(0.0, config.build()) for config in others])
    assert all(torch.equal(plain[name], beside[name]) for name in plain)
    heavy = trained([(1.0, config.build()) for config in others])
    assert not any(torch.equal(plain[name], heavy[name]) for name in plain)


def test_a_tempered_teacher_of_equal_classes_has_the_entropy_of_a_fair_die() -> None:
    student = torch.zeros(3, 6, dtype=torch.float64)
    sure = torch.full((3, 6), -1e9, dtype=torch.float64).index_fill(1, torch.tensor([2]), 0.0)
    assert value(logit_kd.Config(temperature=1.0), {"logits": student, "teacher.logits": sure}).item() == pytest.approx(math.log(6))
