"""Augmentation inside the training step: random erasing, mixup and cutmix of normalised images. Pure JAX.

All shapes are static and every draw comes from the key that is passed in. The reference is what timm did in 2021, when
the recipes were written: each GPU augments a batch of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

QUANTILES = 1024  # of a Beta distribution, between which is interpolated
# timm's defaults, which every recipe keeps: share of the image's area, height over width, and how often it tries.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


def augment(
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  *,
  num_classes: int,
  mixup: float = 0.0,
  cutmix: float = 0.0,
  switch_probability: float = 0.5,
  mixing_batch: int | None = None,
  erasing: float = 0.0,
  erase_mixed: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns the images and targets that the model is trained on.

  Args:
    key: of all draws.
    images: float32 (B, H, W, 3), normalised.
    labels: int32 (B,), or bool (B, classes) where an image has several.
    num_classes: of the dataset.
    mixup, cutmix, switch_probability, mixing_batch: see `mix`; without mixup and cutmix the labels stay as they are.
    erasing: probability of `erase`.
    erase_mixed: erase after mixing, as timm's train.py does (DeepViT, CSWin, BOAT on CSWin: its loader mixes while it
      collates and erases on the GPU). False: before, as DeiT's main.py does (CrossViT, Swin, BOAT on Swin: erasing is
      the last of the transforms of one image). Erased pixels are half transparent after mixup in the one, noise of
      full strength in the other.
  """
  mix_key, erase_key = jax.random.split(key)
  if erasing and not erase_mixed:
    # Each image is read twice by `mix`: without the barrier the noise would be drawn twice.
    images = jax.lax.optimization_barrier(erase(erase_key, images, erasing))
  if mixup or cutmix:
    targets = jax.nn.one_hot(labels, num_classes) if labels.ndim == 1 else labels.astype(jnp.float32)
    images, labels = mix(mix_key, images, targets, mixup, cutmix, switch_probability, mixing_batch)
  if erasing and erase_mixed:
    images = erase(erase_key, images, erasing)
  return images, labels


def mix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  mixup: float,
  cutmix: float,
  switch_probability: float = 0.5,
  mixing_batch: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image with another one by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019), in timm's batch mode.

  The batch is cut into mixing batches of neighbouring images. One draw decides for a whole mixing batch: mixup or
  cutmix, the share from Beta(alpha, alpha), the box. An image's partner is its mirror image in the mixing batch, the
  last for the first and so on.

  In the papers' recipes a mixing batch is what one GPU gets: torch gives every process its own draws. As a number of
  images, not of devices, it makes the result independent of the devices that compute it; and where it divides a
  device's part of the batch, no image leaves its device.

  Args:
    key: of the draws.
    images: (B, H, W, C).
    targets: probabilities, or several labels, (B, classes). Smoothing them afterwards equals mixing smoothed ones, as
      timm does, because both are linear.
    mixup, cutmix: alpha of each, 0 for never; not both 0.
    switch_probability: of cutmix, where both are possible.
    mixing_batch: number of images, which divides the batch; the whole batch if None.

  Returns:
    Images and targets, mixed. With cutmix the share in the target is that of the pixels: a box may reach over the edge.
  """
  batch, height, width, channels = images.shape
  size = mixing_batch or batch
  number = batch // size
  switch_key, share_key, box_key = jax.random.split(key, 3)
  use_cutmix = jnp.full(number, cutmix > 0)
  if mixup and cutmix:
    use_cutmix = jax.random.bernoulli(switch_key, switch_probability, (number,))
  # Of the two the one that is off, if any, is never taken.
  share = jnp.where(use_cutmix, _beta(share_key, cutmix or 1.0, number), _beta(share_key, mixup or 1.0, number))
  outside = ~_cutmix_box(box_key, share, height, width)

  # What remains of an image: a share of every pixel, or every pixel outside of the box.
  pixels = jnp.where(use_cutmix[:, None, None], outside, share[:, None, None])
  share = jnp.where(use_cutmix, jnp.mean(outside, axis=(1, 2)), share)

  def blend(values, remains):
    return values * remains + values[:, ::-1] * (1 - remains)

  images = blend(images.reshape(number, size, height, width, channels), pixels[:, None, :, :, None])
  targets = blend(targets.reshape(number, size, -1), share[:, None, None])
  return images.reshape(batch, height, width, channels), targets.reshape(batch, -1)


def _beta(key: jax.Array, alpha: float, number: int) -> jax.Array:
  """Returns (number,) draws from Beta(alpha, alpha), by the inverse of its distribution function.

  jax.random.beta rejects draws in a loop, which all devices would have to leave together and a GPU's host would watch.
  """
  quantiles = jnp.asarray(scipy.special.betaincinv(alpha, alpha, np.linspace(0, 1, QUANTILES + 1)), jnp.float32)
  position = QUANTILES * jax.random.uniform(key, (number,), jnp.float32)
  below = position.astype(jnp.int32)
  return quantiles[below] + (position - below) * (quantiles[below + 1] - quantiles[below])


def _cutmix_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
  """Returns (N, height, width), True inside boxes of 1 - share of the area, centred anywhere, cut off at the edges."""

  def inside(key, size):
    half = jnp.floor(size * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    centre = jax.random.randint(key, share.shape, 0, size, jnp.int32)
    return _between(centre - half, centre + half, size)

  y_key, x_key = jax.random.split(key)
  return inside(y_key, height)[:, :, None] & inside(x_key, width)[:, None, :]


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
  """Replaces a rectangle by normal noise, one draw per pixel and channel (Zhong et al. 2020; timm's mode "pixel").

  Area and aspect ratio (log-uniform) are drawn up to ten times until the rectangle is smaller than the image; here all
  ten are drawn and the first that fits is taken.

  Args:
    key: of the draws.
    images: (B, H, W, C), normalised: noise of mean 0 and variance 1 looks like an image then.
    probability: for each image.
  """
  batch, height, width, _ = images.shape
  chance_key, area_key, aspect_key, top_key, left_key, noise_key = jax.random.split(key, 6)
  attempts = (batch, ERASING_ATTEMPTS)
  area = height * width * jax.random.uniform(area_key, attempts, jnp.float32, *ERASED_AREA)
  aspect = jnp.exp(jax.random.uniform(aspect_key, attempts, jnp.float32, *np.log(ERASED_ASPECT)))
  heights, widths = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area * aspect, area / aspect))
  fits = (heights < height) & (widths < width)
  first = jnp.argmax(fits, axis=1)[:, None]
  h, w = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (heights, widths))
  top = jax.random.randint(top_key, (batch,), 0, height - h + 1, jnp.int32)
  left = jax.random.randint(left_key, (batch,), 0, width - w + 1, jnp.int32)

  erased = fits.any(axis=1) & jax.random.bernoulli(chance_key, probability, (batch,))
  rectangle = _between(top, top + h, height)[:, :, None] & _between(left, left + w, width)[:, None, :]
  noise = jax.random.normal(noise_key, images.shape, jnp.float32)
  return jnp.where((erased[:, None, None] & rectangle)[..., None], noise, images)


def _between(start: jax.Array, end: jax.Array, size: int) -> jax.Array:
  """Returns (N, size), True from `start` (N,) to before `end` (N,)."""
  positions = jnp.arange(size, dtype=jnp.int32)
  return (positions >= start[:, None]) & (positions < end[:, None])
