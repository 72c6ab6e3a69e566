"""What accuracies over seeds allow to say: intervals, paired tests and their correction, and a verdict in words."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np
import scipy.stats

LEVEL = 0.05  # of significance, and 1 - LEVEL of the intervals
POWER = 0.8
MOST_SEEDS = 1000  # that `seeds_needed` tries
SUPPORTED = "supported"


def interval(values: Sequence[float]) -> tuple[float, float] | None:
  """Returns the ends of the 95% interval of the mean after Student's t; None for fewer than two values."""
  if len(values) < 2:
    return None
  half = scipy.stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * scipy.stats.sem(values)
  return float(np.mean(values) - half), float(np.mean(values) + half)


def paired_p(differences: Sequence[float]) -> float:
  """Returns the two-sided p of Student's paired t-test; equal differences are certain if they are not 0."""
  spread = np.std(differences, ddof=1)
  if spread == 0:
    return 1.0 if np.mean(differences) == 0 else 0.0
  return float(scipy.stats.ttest_1samp(differences, 0).pvalue)


def effect_size(differences: Sequence[float]) -> float:
  """Returns Cohen's d of pairs, the mean difference by its standard deviation; infinite where they do not spread."""
  mean, spread = np.mean(differences), np.std(differences, ddof=1)
  if spread == 0:
    return math.copysign(math.inf, mean) if mean else 0.0
  return float(mean / spread)


def holm(ps: Sequence[float]) -> list[float]:
  """Returns p values corrected for their number (Holm 1979), in the same order."""
  corrected, largest = [0.0] * len(ps), 0.0
  for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
    largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
    corrected[i] = largest
  return corrected


def power(effect: float, seeds: int, level: float) -> float:
  """Returns the probability that the paired t-test of so many seeds finds an effect of this size."""
  freedom, shift = seeds - 1, effect * math.sqrt(seeds)
  critical = scipy.stats.t.ppf(1 - level / 2, freedom)
  return float(scipy.stats.nct.sf(critical, freedom, shift) + scipy.stats.nct.cdf(-critical, freedom, shift))


def seeds_needed(effect: float, level: float) -> int | None:
  """Returns with how many seeds an effect of this size is found with a probability of 0.8; None: over MOST_SEEDS."""
  if math.isinf(effect):
    return 2
  return next((n for n in range(2, MOST_SEEDS + 1) if power(abs(effect), n, level) >= POWER), None)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A model beside its baseline, from the same seeds.

  Attributes:
    difference: of the mean accuracies.
    interval: of the difference, see `interval`.
    effect: see `effect_size`; None for fewer than two seeds, as `p`.
    p: corrected for the number of comparisons.
    verdict: in words.
  """

  difference: float
  interval: tuple[float, float] | None
  effect: float | None
  p: float | None
  verdict: str


def compare(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Comparison]:
  """Compares accuracies of models with those of their baselines, each pair over the same seeds in the same order.

  One that has a single seed yet counts among those that the others are corrected for.
  """
  differences = [np.subtract(model, baseline) for model, baseline in pairs]
  ps = holm([paired_p(values) if len(values) > 1 else 1.0 for values in differences])
  found = []
  for values, p in zip(differences, ps, strict=True):
    tested = len(values) > 1
    effect = effect_size(values) if tested else None
    verdict = _verdict(effect, p if tested else None, len(values), LEVEL / len(pairs))
    found.append(Comparison(float(np.mean(values)), interval(values), effect, p if tested else None, verdict))
  return found


def _verdict(effect: float | None, p: float | None, seeds: int, level: float) -> str:
  """Returns a verdict in words; `level` is that of one comparison among all."""
  if p is None:
    return "not decided: one seed gives no interval"
  if p < LEVEL:
    return SUPPORTED if effect > 0 else "contradicted"
  needed = seeds_needed(effect, level)
  if needed is None:
    return f"not decided with {seeds} seeds, nor would be with {MOST_SEEDS:,} if the difference is as small as it looks"
  return f"not decided with {seeds} seeds; about {max(needed, seeds + 1)} would, if the difference is what it looks"
