"""Statistics of seeds against plain transcriptions of their formulas and published tables."""

import math

import numpy as np
import pytest
import scipy.stats

from vit_jax_ext.studies import statistics

MODEL, BASELINE = [71.0, 74.0, 73.5, 70.0, 76.0], [70.0, 71.0, 72.0, 70.5, 71.0]


def test_interval():
  """Student's t of 4 degrees of freedom is 2.776 at 97.5%."""
  mean, spread = np.mean(MODEL), np.std(MODEL, ddof=1)
  half = 2.7764451 * spread / math.sqrt(5)
  assert statistics.interval(MODEL) == pytest.approx((mean - half, mean + half), rel=1e-6)
  assert statistics.interval([3.0]) is None


def test_the_paired_test_is_scipys():
  differences = np.subtract(MODEL, BASELINE)
  assert statistics.paired_p(differences) == pytest.approx(scipy.stats.ttest_rel(MODEL, BASELINE).pvalue)
  assert statistics.effect_size(differences) == pytest.approx(2.0 / math.sqrt(np.var(differences, ddof=1)))


@pytest.mark.parametrize(("values", "p", "effect"), [([0, 0], 1, 0), ([2, 2], 0, math.inf), ([-1, -1], 0, -math.inf)])
def test_differences_that_do_not_spread(values, p, effect):
  assert statistics.paired_p(values) == p
  assert statistics.effect_size(values) == effect


def test_holm():
  """Each p times the number of those not smaller, never below the one before; as R's p.adjust gives it."""
  assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
  assert statistics.holm([]) == []


def test_power():
  """Of the simulated test; and Cohen's tables: d = 0.5 needs 34 pairs at 5% for a power of 0.8."""
  rng = np.random.default_rng(0)
  draws = rng.normal(0.8, 1, (20_000, 10))
  rate = (scipy.stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
  assert statistics.power(0.8, 10, 0.05) == pytest.approx(rate, abs=0.01)
  assert statistics.seeds_needed(0.5, 0.05) == 34
  assert statistics.seeds_needed(-0.5, 0.05) == 34
  assert statistics.seeds_needed(0.5, 0.01) > 34
  assert statistics.seeds_needed(0.01, 0.05) is None
  assert statistics.seeds_needed(math.inf, 0.05) == 2


def test_verdicts():
  up, down = [80.0, 81.0, 82.0, 80.5], [60.0, 61.0, 62.5, 60.0]
  better, worse, unclear = statistics.compare([(up, down), (down, up), (up, [80.1, 80.9, 82.3, 80.4])])
  assert better.verdict == "supported" and better.difference == pytest.approx(20)
  assert better.interval[0] < 20 < better.interval[1] and better.p < 0.001
  assert worse.verdict == "contradicted" and worse.effect == -better.effect
  assert unclear.verdict.startswith("not decided with 4 seeds; about ") and unclear.p > 0.05
  seeds = int(unclear.verdict.split("about ")[1].split()[0])
  assert (
    statistics.power(unclear.effect, seeds, 0.05 / 3) >= 0.8 > statistics.power(unclear.effect, seeds - 1, 0.05 / 3)
  )


def test_comparisons_are_corrected_for_their_number():
  alone = statistics.compare([(MODEL, BASELINE)])[0].p
  among = statistics.compare([(MODEL, BASELINE)] * 3)[0].p
  assert among == pytest.approx(3 * alone)


def test_equal_models_and_one_seed():
  (equal,) = statistics.compare([([50.0, 51.0], [50.0, 51.0])])
  assert "nor would be with 1,000" in equal.verdict and equal.p == 1
  (single,) = statistics.compare([([50.0], [40.0])])
  assert single.verdict == "not decided: one seed gives no interval" and single.interval is single.p is None


def test_a_pair_with_one_seed_leaves_the_others_their_verdict():
  """As long as a study is not finished, its claims have different numbers of seeds."""
  single, several = statistics.compare([([50.0], [40.0]), (MODEL, BASELINE)])
  assert single.verdict == "not decided: one seed gives no interval"
  assert several.p == pytest.approx(2 * statistics.compare([(MODEL, BASELINE)])[0].p) and several.interval
