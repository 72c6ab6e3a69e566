"""Mixup, cutmix and erasing against plain NumPy, and on eight devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax_ext as vx
from vit_jax_ext.training import mixup, sharding

CLASSES = 10


def batch(size=8, height=24, width=16, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.standard_normal((size, height, width, 3)).astype(np.float32)
  return jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32)


def timm_targets(labels, share, smoothing):
  """The targets of timm's `mixup_target`: smoothed one-hot vectors, then mixed with those of the flipped batch."""
  off = smoothing / CLASSES
  one_hot = np.full((len(labels), CLASSES), off)
  one_hot[np.arange(len(labels)), labels] = 1 - smoothing + off
  return share * one_hot + (1 - share) * one_hot[::-1]


def timm_box(height, width, share, centre_y, centre_x):
  """The edges of timm's `rand_bbox` and the corrected share."""
  cut_h, cut_w = (int(size * np.sqrt(1 - share)) for size in (height, width))
  top, bottom = (np.clip(centre_y + sign * (cut_h // 2), 0, height) for sign in (-1, 1))
  left, right = (np.clip(centre_x + sign * (cut_w // 2), 0, width) for sign in (-1, 1))
  return top, bottom, left, right, 1 - (bottom - top) * (right - left) / (height * width)


def remains_of(mixed, images):
  """Recovers what is left of each pixel of the first image of a batch of two that was mixed."""
  first, second = np.asarray(images, np.float64)
  return (np.asarray(mixed[0], np.float64) - second) / (first - second)


@functools.partial(jax.jit, static_argnames=("mixup_alpha", "cutmix_alpha", "mixing_batch"))
def mix(key, images, labels, mixup_alpha, cutmix_alpha, mixing_batch=None):
  targets = jax.nn.one_hot(labels, CLASSES)
  return mixup.mix(key, images, targets, mixup_alpha, cutmix_alpha, mixing_batch=mixing_batch)


def many(function, number, *args):
  """Runs `function(key, *args)` with `number` keys at once."""
  keys = jax.random.split(jax.random.key(7), number)
  return jax.jit(jax.vmap(lambda key: function(key, *args)))(keys)


def test_mixup_equals_numpy():
  images, labels = batch()
  for seed in range(5):
    mixed, targets = mix(jax.random.key(seed), images, labels, 0.8, 0.0)
    share = float(np.median(remains_of(mixed[jnp.array([0, -1])], images[jnp.array([0, -1])])))
    assert 0 <= share <= 1
    expected = share * np.asarray(images) + (1 - share) * np.asarray(images)[::-1]
    np.testing.assert_allclose(mixed, expected, atol=1e-4)
    smoothed = 0.9 * np.asarray(targets) + 0.1 / CLASSES  # as the loss does
    np.testing.assert_allclose(smoothed, timm_targets(np.asarray(labels), share, 0.1), atol=1e-4)


def test_cutmix_equals_numpy():
  """Whatever the box, its side, its centre and the share in the target fit together as timm computes them."""
  images, labels = batch()
  height, width = images.shape[1:3]
  for seed in range(10):
    mixed, targets = mix(jax.random.key(seed), images, labels, 0.0, 1.0)
    taken = np.asarray(mixed) == np.asarray(images)[::-1]
    rows, columns = (np.flatnonzero(taken[0, ..., 0].any(axis)) for axis in (1, 0))
    expected = np.array(images)
    share = 1.0
    if len(rows):
      top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
      expected[:, top:bottom, left:right] = np.asarray(images)[::-1, top:bottom, left:right]
      share = 1 - (bottom - top) * (right - left) / (height * width)
    np.testing.assert_array_equal(mixed, expected)
    smoothed = 0.9 * np.asarray(targets) + 0.1 / CLASSES
    np.testing.assert_allclose(smoothed, timm_targets(np.asarray(labels), share, 0.1), atol=1e-6)


def test_cutmix_boxes_are_timms():
  """The distribution of the remaining share, after cutting off at the edges, and of the box's corners."""
  height, width, number = 30, 20, 4000
  share = np.random.default_rng(0).beta(1, 1, number)
  box = np.asarray(mixup._cutmix_box(jax.random.key(0), jnp.asarray(share, jnp.float32), height, width))
  rng = np.random.default_rng(1)
  theirs = np.array([timm_box(height, width, s, rng.integers(height), rng.integers(width)) for s in share])
  np.testing.assert_allclose(
    np.quantile(1 - box.mean((1, 2)), [0.1, 0.3, 0.5, 0.7, 0.9]),
    np.quantile(theirs[:, 4], [0.1, 0.3, 0.5, 0.7, 0.9]), atol=0.03,
  )  # fmt: skip
  for axis, size, low, high in ((2, height, 0, 1), (1, width, 2, 3)):
    covered = box.any(axis).mean(0)  # how often each row or column is hit
    expected = np.mean([(np.arange(size) >= row[low]) & (np.arange(size) < row[high]) for row in theirs], axis=0)
    np.testing.assert_allclose(covered, expected, atol=0.05)
  # A box that touches no edge has timm's sides exactly; an odd one loses a pixel.
  for axis, size in ((2, height), (1, width)):
    lines = box.any(axis)
    whole = lines.any(1) & ~(lines[:, 0] | lines[:, -1])
    np.testing.assert_array_equal(lines[whole].sum(1), 2 * (np.int64(size * np.sqrt(1 - share[whole])) // 2))


@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.0])
def test_share_is_beta_distributed(alpha):
  images, labels = jnp.stack([jnp.ones((1, 1, 3)), jnp.zeros((1, 1, 3))]), jnp.arange(2)
  number = 5_000  # their distribution is within 0.023 of the true one with 99% probability (Kolmogorov and Smirnov)
  share, _ = many(lambda key: mix(key, images, labels, alpha, 0.0), number)
  ours, theirs = np.sort(share[:, 0, 0, 0, 0]), np.sort(np.random.default_rng(0).beta(alpha, alpha, 200_000))
  points = np.linspace(0.01, 0.99, 99)
  cumulated = (np.searchsorted(values, points) / len(values) for values in (ours, theirs))
  np.testing.assert_allclose(*cumulated, atol=0.025)


def test_switch():
  """Half of the batches by cutmix, where a pixel is from one image alone."""
  images, labels = batch(size=2, height=8, width=8)
  mixed, _ = many(lambda key: mix(key, images, labels, 0.8, 1.0), 2000)
  by_cutmix = np.all((np.asarray(mixed) == images) | (np.asarray(mixed) == images[::-1]), axis=(1, 2, 3, 4))
  assert abs(by_cutmix.mean() - 0.5) < 0.05


def test_mixing_batches_draw_for_themselves_and_keep_to_themselves():
  images, labels = batch(size=12)
  mixed, targets = mix(jax.random.key(0), images, labels, 0.8, 0.0, mixing_batch=4)
  shares = []
  for start in (0, 4, 8):
    part, own = np.asarray(images[start : start + 4]), np.asarray(mixed[start : start + 4])
    shares.append(np.median((own - part[::-1]) / (part - part[::-1])))
    np.testing.assert_allclose(own, shares[-1] * part + (1 - shares[-1]) * part[::-1], atol=1e-4)
  assert len({round(float(share), 3) for share in shares}) == 3
  assert np.allclose(targets.sum(1), 1)


@pytest.mark.parametrize(
  ("group", "batch_size", "nearest"), [(5, 64, "4, 8"), (128, 64, "64"), (16, 48, "12, 24"), (0, 16, "1")]
)
def test_a_group_that_does_not_fit(group, batch_size, nearest):
  """Neither cut the batch nor be cut by the devices, of which there are eight."""
  mesh = sharding.make_mesh(dict(data=8, fsdp=1, model=1))
  with pytest.raises(vx.UserError, match=f"augment.mixing_batch {group} .*the nearest that fit: {nearest}$"):
    sharding.check_group("augment.mixing_batch", group, batch_size, mesh)
  for fits in (None, 1, 2, 4, 8, 16):
    sharding.check_group("augment.mixing_batch", fits, 16, mesh)


def timm_erased(rng, height, width, number):
  """The rectangles of timm's `RandomErasing`, (height, width, top, left), None where nothing was erased."""
  rectangles = []
  for _ in range(number):
    rectangles.append(None)
    if rng.random() > 0.25:
      continue
    for _ in range(10):
      area = rng.uniform(0.02, 1 / 3) * height * width
      aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
      h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
      if h < height and w < width:
        rectangles[-1] = (h, w, rng.integers(0, height - h + 1), rng.integers(0, width - w + 1))
        break
  return rectangles


def test_erasing_is_timms():
  height, width, number = 20, 30, 8000
  images = jnp.zeros((number, height, width, 1))
  erased = np.asarray(jax.jit(mixup.erase)(jax.random.key(0), images, 0.25))[..., 0]
  hit = erased != 0
  images_hit = hit.any((1, 2))
  theirs = timm_erased(np.random.default_rng(0), height, width, 40_000)
  chosen = np.array([rectangle for rectangle in theirs if rectangle])
  assert abs(images_hit.mean() - len(chosen) / len(theirs)) < 0.02
  rows, columns = hit.any(2)[images_hit], hit.any(1)[images_hit]
  # Solid rectangles.
  np.testing.assert_array_equal(hit[images_hit], rows[:, :, None] & columns[:, None, :])
  ours = np.stack([rows.sum(1), columns.sum(1), rows.argmax(1), columns.argmax(1)], axis=1)
  quantiles = np.linspace(0.1, 0.9, 9)
  for values, expected, scale in [*zip(ours.T, chosen.T, (height, width, height, width), strict=True),
                                  (ours[:, 0] * ours[:, 1], chosen[:, 0] * chosen[:, 1], height * width),
                                  (ours[:, 0] / ours[:, 1], chosen[:, 0] / chosen[:, 1], 3)]:  # fmt: skip
    np.testing.assert_allclose(np.quantile(values, quantiles) / scale, np.quantile(expected, quantiles) / scale,
                               atol=0.06)  # fmt: skip
    np.testing.assert_allclose(values.mean() / scale, expected.mean() / scale, atol=0.015)
  noise = erased[hit]
  assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
  assert len(np.unique(noise)) > 0.9 * noise.size  # a draw for each pixel


def test_order_of_erasing_and_mixing():
  """Erased first, noise is mixed with the partner; erased last, it is of full strength."""
  images, labels = jnp.zeros((64, 12, 12, 3)), jnp.arange(64) % CLASSES
  options = dict(num_classes=CLASSES, mixup=50.0, erasing=1.0)  # Beta(50, 50): all shares are about a half
  before, _ = mixup.augment(jax.random.key(0), images, labels, **options)
  after, targets = mixup.augment(jax.random.key(0), images, labels, **options, erase_mixed=True)
  assert abs(np.std(after[after != 0]) - 1) < 0.03
  assert np.std(before[before != 0]) < 0.8
  assert np.mean(before != 0) > np.mean(after != 0)
  assert targets.shape == (64, CLASSES)


def test_off_changes_nothing():
  images, labels = batch()
  same, same_labels = mixup.augment(jax.random.key(0), images, labels, num_classes=CLASSES)
  np.testing.assert_array_equal(same, images)
  np.testing.assert_array_equal(same_labels, labels)


@pytest.mark.parametrize("mixing_batch", [2, 8, None])
def test_eight_devices_compute_the_same(mixing_batch):
  """The same draws, to rounding; and where a mixing batch lies on one device, nothing crosses."""
  images, labels = batch(size=32)
  augment = functools.partial(
    mixup.augment, num_classes=CLASSES, mixup=0.8, cutmix=1.0, mixing_batch=mixing_batch, erasing=0.25
  )
  alone = jax.jit(augment)(jax.random.key(3), images, labels)
  mesh = sharding.make_mesh(dict(data=4, fsdp=2, model=1))
  by_batch = sharding.batch_sharding(mesh)
  together = jax.jit(augment, in_shardings=(None, by_batch, by_batch), out_shardings=by_batch)
  compiled = together.lower(jax.random.key(3), images, labels).compile()
  for ours, theirs in zip(compiled(jax.random.key(3), *jax.device_put((images, labels), by_batch)), alone, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
  collectives = re.findall(r"(?:all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text())
  assert bool(collectives) == (mixing_batch != 2)
