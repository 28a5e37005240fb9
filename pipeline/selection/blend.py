"""Level and change of the score together: a pair's mean score says whether it is clean, DISSect's differential which clean pair is due."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline import kernels
from pipeline.selection.base import Candidates, Selection, Selector, SelectorConfig

ABOVE = 300.0  # lifts what passes the gate over every level; scores lie in [0, 100], differentials in [-100, 100]


class Config(SelectorConfig):
    """Ranks inside the gate by `order`; the gate itself has no setting."""

    order: Literal["change", "lot"] = Field(
        "change", description="of the pairs that pass: what is being forgotten first, or a random choice"
    )

    def build(self, num_samples: int, warmup_steps: int = 0, seed: int = 0) -> "Blend":
        """See SelectorConfig.build."""
        return Blend(self, num_samples, warmup_steps, seed)


class Blend(Selector):
    """A gate on the level of the score, and inside it the order of DISSect.

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

    The gate is the split of a group's m into two classes that maximises the variance between them (Otsu, IEEE Trans. SMC 9(1), 1979;
    the most likely hard assignment to two Gaussians of one variance). It follows the noise: where few pairs are clean few pass, and
    the next ones by m fill up. What passes is not ranked by m, which would train the easiest pairs over and over and never the others
    (it costs accuracy where no pair is noisy), but by d_i = m_i - s_i before the update, as DISSect ranks: a pair that was trained rises
    above its mean and makes room for one that is being forgotten.

    State and costs are DISSect's: a score and a counter for each pair, and a sort of the group. A pair without history is judged by the
    score it has now.
    """

    def needs(self, step: int) -> frozenset[str]:
        """The cosine, in warm-up too: the mean begins there."""
        return frozenset({"cosine"})

    def select(self, group: Candidates) -> Selection:
        """Scores the group and chooses `keep` rows. Raises ValueError when `group.cosine` is None."""
        scored = kernels.score(
            self.given(group, "cosine"), slot=group.slot, history=self.scores.score, visits=self.scores.visits, valid=group.valid, mean=True
        )
        if self.in_warmup(group.step):
            return self.warmup(group)
        level = self.scores.score[group.slot]
        counted = scored.current == scored.current  # NaN is no score
        passes = level > split(level, counted if group.valid is None else counted & group.valid)
        due = scored.differential if self.config.order == "change" else self.lot(group)
        return self.ranked(group, torch.where(passes, ABOVE + due, level))


def split(value: Tensor, counted: Tensor) -> Tensor:
    """Otsu's threshold of `value` float [g] over the rows `counted` bool [g], float [1]: the largest value of the lower class.

    Asks nothing of the device: no branch on a value, no choice by mask. With one value or none the lower class holds everything.
    """
    order = value.masked_fill(~counted, torch.inf).argsort()
    weight, ordered = counted[order].double(), value.masked_fill(~counted, 0)[order].double()  # NaN times 0 is NaN
    count, total = weight.cumsum(0), (ordered * weight).cumsum(0)
    rest = count[-1:] - count
    between = (total * count[-1:] - total[-1:] * count).square() / (count * rest).clamp_min(1)
    cut = torch.where(rest > 0, between, -1).argmax(0, keepdim=True)
    return ordered.gather(0, cut).to(value.dtype)
