"""Bicubic resize of images and of grids of tokens, as torch has it."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.models.attention import platform, widest


def cubic_taps(size_in: int, size_out: int, a: float = -0.75) -> tuple[np.ndarray, np.ndarray]:
  """Returns the four source indices and weights of each target position, both (size_out, 4).

  torch's `interpolate(mode="bicubic", align_corners=False)`: Keys' kernel with a = -0.75, half-pixel centres, repeated
  border, no antialiasing. (`jax.image.resize` has a = -0.5 and antialiases.)
  """
  centre = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
  index = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)
  distance = np.abs(centre[:, None] - index)
  near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
  far = a * (((distance - 5) * distance + 8) * distance - 4)
  return np.clip(index, 0, size_in - 1), np.where(distance <= 1, near, far)


def resize_bicubic(images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes (..., H, W, C) to (..., *size, C) as torch's bicubic `interpolate` does; computes in at least float32."""
  dtype = images.dtype
  images = images.astype(widest(dtype))
  for axis, size_out in zip((-3, -2), size, strict=True):
    if images.shape[axis] == size_out:
      continue
    index, weight = cubic_taps(images.shape[axis], size_out)
    weight = weight.astype(images.dtype)
    if platform() == "tpu":  # whose matrix units multiply by zeros for less than gathers take
      matrix = np.zeros((images.shape[axis], size_out), weight.dtype)
      np.add.at(matrix, (index, np.arange(size_out)[:, None]), weight)
      images = jnp.tensordot(images, matrix, ((axis,), (0,)), precision=jax.lax.Precision.HIGHEST)
      images = jnp.moveaxis(images, -1, axis)
      continue
    # Gathering four taps costs 2 multiply-adds per thousand of the dense matrix product, and is faster on CPU too.
    weight = weight.reshape(size_out, 4, *[1] * (-1 - axis))
    images = sum(jnp.take(images, index[:, tap], axis) * weight[:, tap] for tap in range(4))
  return images.astype(dtype)
