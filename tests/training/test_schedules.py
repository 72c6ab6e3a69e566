"""Learning rates of every recipe against the authors' schedulers and loops, transcribed here."""

import math

import numpy as np
import pytest

from tests.test_configs import SPECS, load
from vit_jax_ext.training.experiment import learning_rate_schedule, number_of_steps

EXAMPLES = 1_281_167


def timm_cosine(t, *, base, floor, start, length, warmup):
  """Timm's CosineLRScheduler with one cycle: at time t, in epochs or steps; the cosine lies under the warm-up."""
  if t < warmup:
    return start + t * (base - start) / warmup
  return floor + 0.5 * (base - floor) * (1 + math.cos(math.pi * t / length)) if t < length else floor


def by_epoch(epochs, cooldown, lag, **schedule):
  """The rates of all epochs: a loop that trains, then calls scheduler.step(epoch) or scheduler.step(epoch + 1).

  lag 1: with `epoch` (DeiT, CrossViT); lag 0: with `epoch + 1` (timm's train.py: DeepViT, CSWin).
  """
  rates, rate = [], timm_cosine(0, length=epochs - cooldown, **schedule)
  for epoch in range(epochs):
    rates.append(rate)
    rate = timm_cosine(epoch + 1 - lag, length=epochs - cooldown, **schedule)
  return rates


# Recipe -> what the authors' command lines and defaults say; lag None: Swin steps with every update.
FINE = dict(base=5e-6, floor=5e-6, start=1e-6, warmup=5)
AUTHORS = {
  "crossvit": dict(epochs=300, cooldown=0, lag=1, base=4e-3, floor=1e-5, start=1e-6, warmup=30),
  "crossvit_384": dict(epochs=30, cooldown=0, lag=1, **FINE),
  "deit": dict(epochs=300, cooldown=0, lag=1, base=1e-3, floor=1e-5, start=1e-6, warmup=5),
  "deit_384": dict(epochs=30, cooldown=0, lag=1, **FINE),
  "deepvit": dict(epochs=310, cooldown=10, lag=0, base=5e-4, floor=1e-5, start=1e-6, warmup=5),
  "cswin": dict(epochs=310, cooldown=10, lag=0, base=2e-3, floor=1e-5, start=1e-6, warmup=20),
  "cswin_base": dict(epochs=310, cooldown=10, lag=0, base=1e-3, floor=1e-5, start=1e-6, warmup=20),
  "cswin_384": dict(epochs=30, cooldown=10, lag=0, base=5e-6, floor=5e-7, start=1e-6, warmup=0),
  "swin": dict(epochs=300, cooldown=0, lag=None, base=1e-3, floor=1e-5, start=1e-6, warmup=20),
  "swin_384": dict(epochs=30, cooldown=0, lag=None, base=4e-5, floor=4e-7, start=4e-8, warmup=5),
}


def authors(spec):
  """The entry of AUTHORS for a config."""
  family, argument = spec.removeprefix("configs/").split(".py:")
  if family == "boat":
    family = argument.split("_")[0]
  if family == "vit":
    family = "deit" if argument.startswith("deit") else "deepvit"
  if argument == "l_384":  # as DeiT, by DeepViT's program
    return AUTHORS["deit_384"] | dict(lag=0)
  if argument.endswith("_384"):
    return AUTHORS[f"{family}_384"]
  return AUTHORS["cswin_base" if family == "cswin" and argument.endswith("base") else family]


@pytest.mark.parametrize("spec", SPECS)
def test_rates_of_all_epochs(spec):
  config, theirs = load(spec), dict(authors(spec))
  steps = number_of_steps(config, EXAMPLES)
  if theirs["lag"] is None:  # in steps, which changes nothing at the beginning of an epoch
    epochs, _, _ = (theirs.pop(name) for name in ("epochs", "cooldown", "lag"))
    expected = [timm_cosine(e, length=epochs, **theirs) for e in range(epochs)]
  else:
    expected = by_epoch(**theirs)
  schedule, per_epoch = learning_rate_schedule(config, EXAMPLES), steps / len(expected)
  ours = [float(schedule(math.ceil(e * per_epoch))) for e in range(len(expected))]
  np.testing.assert_allclose(ours, expected, rtol=2e-3)
  np.testing.assert_allclose(sum(ours), sum(expected), rtol=1e-4)
  np.testing.assert_allclose(ours[-1], expected[-1], rtol=1e-4)


def test_the_first_two_epochs_of_deit_begin_the_warm_up():
  config = load("configs/vit.py:deit_small")
  schedule = learning_rate_schedule(config, EXAMPLES)
  assert [float(schedule(step)) for step in (0, 1251, 2501)] == pytest.approx([1e-6] * 3, rel=1e-4)
  assert float(schedule(2502)) == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5, rel=1e-3)


def test_a_run_too_short_for_its_warm_up_scales_it_and_says_so(caplog):
  """The default config in 20 steps, and a recipe in 100: a tenth of the run, in the recipe's proportion."""
  config = load("configs/digits.py:crossvit")
  config.total_steps = 20
  rates = np.array([learning_rate_schedule(config, 1437)(step) for step in range(20)])
  np.testing.assert_allclose(rates[[0, 1, 2]], [1e-6, (1e-6 + 1.5e-3) / 2, 1.5e-3], rtol=1e-5)
  assert (np.diff(rates[2:]) < 0).all()
  assert "50 and 0 steps do not fit into 20 steps; they are scaled to 2 and 0" in caplog.text
  config = load("configs/deepvit.py:s")
  config.total_steps, config.total_epochs = 100, None
  learning_rate_schedule(config, 1_281_167)
  assert "do not fit into 100 steps; they are scaled to 3 and 6" in caplog.text
  config.total_steps = 1
  assert learning_rate_schedule(config, 1_281_167)(0) == config.optimizer.learning_rate
