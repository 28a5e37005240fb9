"""Level and change of the score together: a pair's mean score says how likely it is clean, DISSect's differential which clean one is due;
where the scores show no second class of pairs, the choice is random."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import kernels
from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig


class Config(SelectorConfig):
    """`change` 0 ranks by the level alone; the larger it is, the more it is DISSect on the mean history."""

    level: Literal["cosine", "confidence"] = Field(
        "cosine",
        description="a pair's level is the mean of its cosines, or of exp(-loss) in its group: that tells wrong captions which many pairs share, "
        "loses where few pairs are wrong, and needs a score at every visit",
    )
    change: float = Field(0.3, ge=0, description="weight of the differential, in its group's standard deviations, beside log P(clean)")
    classes: Literal["auto", "two"] = Field(
        "auto",
        description="auto: random rows where the scores at the end of warm-up show one class of pairs, which it sees by cosines, hardly by "
        "confidence; two: the user knows of noise",
    )

    @property
    def reads(self) -> str:
        """What it needs of every candidate."""
        return "cosine" if self.level == "cosine" else "loss"

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "Blend":
        """See SelectorConfig.build."""
        return Blend(self, num_samples, warmup_steps, seed)


class Blend(Selector):
    """Ranks by log P(clean | level) + c x change.

    Let s_it be the score of pair i at its visit t, in [0, 100]. Within the clean and within the noisy pairs take the history h and the
    present score s as jointly Gaussian with one covariance C; let D be the difference of the two means. The most powerful test of
    "clean" is then linear (Fisher's discriminant), h - L s with

        L = - w_s / w_h,   w = C^-1 D.

    L = 1 is DISSect and L = 0 a frozen history; where the present score still separates, its weight is of the same sign as the
    history's and L is negative: the test leans on the level. L comes out positive only when memorising has closed the gap in s (D_s
    below C_sh / C_hh D_h). On swapped captions the fitted L is -0.5 to -1.4 from the end of warm-up to the last visit
    (docs/evidence.md): s is one more look at the same level. With more than two looks of like gap and like jitter, w is equal for all of
    them, and the test statistic is the pair's mean over its visits,

        m_i = mean over t of s_it,

    which one number a pair keeps as a running mean. It also forgives a warm-up of the wrong length: the frozen score of a late
    warm-up has lost the gap, the mean has not.

    To rank by m alone trains the easiest pairs over and over and the others never; where no pair is noisy that costs accuracy. So m only
    says how likely a pair is clean. A group's m is split in two so that the variance between the classes is largest (Otsu, IEEE Trans.
    SMC 9(1), 1979: the most likely hard assignment to two Gaussians of one variance). With the classes' means a < b, their pooled
    variance v and the cut t,

        P(clean | m) = sigmoid((b - a) / v x (m - t)),

    which saturates: among pairs that are clearly clean it says nothing more. There the change takes over, DISSect's d_i = m_i - s_i (m
    before the update): a pair that was trained rises above its mean and makes room for one that is being forgotten. If what a pair
    is worth grows with its change like exp(c z_i), z being d in standard deviations of the group, then the k rows of the largest expected
    worth P(clean) exp(c z) are those of the largest log P(clean | m_i) + c z_i.

    A split is found in everything, in clean data too, and then it is between easy and hard pairs and the hard ones are lost. So at the end
    of warm-up the histories of all pairs together say whether there are two classes. With a share p of noisy ones, both classes
    symmetric and as wide as each other, v, a distance D apart and without excess kurtosis of their own, the cumulants of the mixture are

        k3 = p q (p - q) D^3,   k4 = p q (1 - 6 p q) D^4,   q = 1 - p;

    k4 is below 0 for p between 1/2 - 1/sqrt(12) = 21 % and 79 % (Darlington, The American Statistician 24(2), 1970: kurtosis says how
    far from bimodal), k3 is above 0 for p above one half. Clean pairs alone have neither: their scores rise towards one ceiling and the
    hard pairs trail behind, a tail to the left, k3 < 0 < k4. That is taken for one class, and from there on rows are drawn at random,
    as `random` draws them, without a scoring pass. What it costs: less than some tenth of noisy pairs is not seen, and trained on; and a
    warm-up that ends before the classes have come apart is one class for good (docs/evidence.md), so `warmup_visits: auto` goes with it. What
    does not work is the usual test, the likelihood of one Gaussian against that of two: of 3,000 clean pairs it finds two by 85 to 185 nats,
    for the tail is no Gaussian, and a group of 64 rows is too few to find the two that are there (docs/evidence.md).

    `level: confidence` takes for s not the cosine but exp(-loss), the geometric mean of the two probabilities that the group's softmax gives
    the pair, its caption among the captions and its image among the images; its mean over the visits is the confidence of Dataset
    Cartography (arXiv 2009.10795). The cosine says how near a caption is, this how much nearer than the others. A wrong caption that many
    pairs share is learnt first, as the centre of its images, and its pairs' cosines are the highest of all; but m of them in a
    group share one probability, about 1 / m each. It tells noisy pairs better than the cosine wherever there are many, and hard clean
    ones are lost with them: where few are noisy that costs more (docs/evidence.md). Clean pairs alone have no tail to the left then,
    their confidence being still low at the end of a warm-up, so `classes: auto` takes them for two classes. It takes the product of the group's rows, and a
    probability among others cannot be remembered from another visit: neither scoring.every nor training's own scores stand in.

    State and costs are DISSect's: a score and a counter for each pair, and a sort of the group. A pair without history is judged by the
    score it has now. The cut is as good as the group is large: 64 rows do.
    """

    def __init__(self, config: Config, num_samples: int, warmup_steps: int, seed: int) -> None:
        super().__init__(config, num_samples, warmup_steps, seed)
        self.judges = config.classes == "auto"
        self.one_class = False

    def judge(self, skewness: float, kurtosis: float) -> str:
        """One class or two, from the shape of the histories; see above."""
        self.one_class = skewness < 0 and kurtosis > 3
        found = f"histories of skewness {skewness:.2f} and excess kurtosis {kurtosis - 3:.2f}"
        return f"{found}: one class of pairs, rows are drawn at random" if self.one_class else f"{found}: two classes of pairs"

    def needs(self, step: int) -> frozenset[str]:
        """The cosine or the loss, in warm-up too: the mean begins there. Nothing once there is nothing to select by."""
        return frozenset() if self.one_class and not self.in_warmup(step) else frozenset({self.config.reads})

    def select(self, group: Candidates) -> Selection:
        """Scores the group and chooses `keep` rows. Raises ValueError when the group lacks what it needs."""
        if self.one_class and not self.in_warmup(group.step):
            return self.ranked(group, self.lot(group))
        scored = kernels.score(
            self._score(group),
            slot=group.slot,
            history=self.scores.score,
            visits=self.scores.visits,
            valid=group.valid,
            mean=True,
        )
        if self.in_warmup(group.step):
            return self.warmup(group)
        counted = scored.current == scored.current  # NaN is no score
        counted = counted if group.valid is None else counted & group.valid
        change = scored.differential
        spread = moments(change, counted)[1].sqrt().clamp_min(1e-6)
        return self.ranked(group, log_clean(self.scores.score[group.slot], counted) + self.config.change * change / spread)

    def _score(self, group: Candidates) -> Tensor:
        """float [g], at most 1."""
        found = self.given(group, self.config.reads)
        return found if self.config.level == "cosine" else (-found.float()).exp()


def log_clean(level: Tensor, counted: Tensor) -> Tensor:
    """log P(clean) float32 [g] of the levels float [g], by a split into two classes of the rows `counted` bool [g].

    Asks nothing of the device: no branch on a value, no choice by mask. Without two different values every row is the same.
    """
    level = level.double()
    cut = split(level, counted)
    (low, below), (high, above) = (moments(level, counted & side) for side in (level <= cut, level > cut))
    share = (counted & (level > cut)).double().mean() / counted.double().mean().clamp_min(1e-9)
    pooled = ((1 - share) * below + share * above).clamp_min(1e-6)
    slope = torch.where(share > 0, (high - low) / pooled, 0)
    return torch.nn.functional.logsigmoid(slope * (level - cut)).float()


def moments(value: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of `value` float [g] over the rows `counted` bool [g]; 0 where there is none."""
    weight, value = counted.to(value.dtype), value.masked_fill(~counted, 0)
    count = weight.sum().clamp_min(1)
    mean = value.sum() / count
    return mean, (weight * (value - mean).square()).sum() / count


def split(value: Tensor, counted: Tensor) -> Tensor:
    """Otsu's threshold of `value` float [g] over the rows `counted` bool [g], float [1]: half way between the classes.

    With one value or none it is that of some row.
    """
    order = value.masked_fill(~counted, torch.inf).argsort()
    weight, ordered = counted[order].double(), value.masked_fill(~counted, 0)[order].double()  # NaN times 0 is NaN
    count, total = weight.cumsum(0), (ordered * weight).cumsum(0)
    rest = count[-1:] - count
    between = (total * count[-1:] - total[-1:] * count).square() / (count * rest).clamp_min(1)
    cut = torch.where(rest > 0, between, -1).argmax(0, keepdim=True)
    above = (cut + 1).clamp_max(len(value) - 1)
    return ((ordered.gather(0, cut) + ordered.gather(0, above)) / 2).to(value.dtype)
