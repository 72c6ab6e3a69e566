"""Per-image TensorFlow operations: encoded bytes to uint8 (height, width, 3).

Whatever is random is drawn from a seed, int64 (2,), and the operation's own stream of it.
"""

import enum
import math

import tensorflow as tf


class Stream(enum.IntEnum):
  """What an image's seed is used for: independent draws from one seed."""

  SHIFT_AND_SCALE = 0
  CROP = 1
  INTERPOLATION = 2
  FLIP = 3
  RAND_AUGMENT = 4
  COLOR_JITTER = 5


def uniform(seed: tf.Tensor, stream: Stream, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> tf.Tensor:
  """Returns float32 draws from [low, high)."""
  return tf.random.stateless_uniform(shape, seed + tf.constant([0, stream << 48], tf.int64), low, high)


def decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decodes JPEG, PNG, GIF (first frame) or BMP bytes to uint8 RGB; grey images get three equal channels."""
  image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
  image.set_shape((None, None, 3))
  return image


def to_uint8(image: tf.Tensor) -> tf.Tensor:
  """Rounds and clips; bicubic interpolation overshoots."""
  return tf.saturate_cast(tf.round(image), tf.uint8)


def resize_and_center_crop(image: tf.Tensor, size: tuple[int, int], crop: float) -> tf.Tensor:
  """Resizes bicubically so that `size` is the central `crop` share of the shorter side, and cuts it out.

  Antialiases when it shrinks, as Pillow does.
  """
  height, width = size
  shape = tf.cast(tf.shape(image)[:2], tf.float32)
  scale = tf.reduce_max(tf.constant([height, width], tf.float32) / shape) / crop
  resized = tf.cast(tf.round(shape * scale), tf.int32)
  image = tf.image.resize(image, resized, method="bicubic", antialias=True)
  return to_uint8(tf.image.resize_with_crop_or_pad(image, height, width))


def crop_box(shape: tf.Tensor, seed: tf.Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> tf.Tensor:
  """Draws a box as torchvision's RandomResizedCrop does: int32 (top, left, height, width).

  Ten boxes are drawn, of which the first that fits is taken; if none does, the largest central one of allowed shape.

  Args:
    shape: int32 (height, width) of the image.
    seed: int64 (2,).
    scale: bounds of the box's share of the area.
    ratio: bounds of its width over height, which is log-uniform.
  """
  draws = uniform(seed, Stream.CROP, (4, 10))
  height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
  area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
  aspect = tf.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[1])
  widths, heights = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
  fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
  first = tf.argmax(fits)
  h, w = heights[first], widths[first]
  drawn = tf.stack([tf.floor(draws[2, first] * (height - h + 1)), tf.floor(draws[3, first] * (width - w + 1)), h, w])

  h = tf.maximum(tf.minimum(height, tf.round(width / ratio[0])), 1)
  w = tf.maximum(tf.minimum(width, tf.round(height * ratio[1])), 1)
  central = tf.stack([tf.floor((height - h) / 2), tf.floor((width - w) / 2), h, w])
  return tf.cast(tf.where(tf.reduce_any(fits), drawn, central), tf.int32)


def random_resized_crop(
  encoded: tf.Tensor,
  size: tuple[int, int],
  seed: tf.Tensor,
  *,
  scale: tuple[float, float],
  interpolation: str,
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tf.Tensor:
  """Cuts out a random box and resizes it, antialiased as Pillow does; of a JPEG only the box is decoded.

  Args:
    encoded: bytes of an image file.
    size: (height, width) of the result.
    seed: int64 (2,).
    scale, ratio: see `crop_box`.
    interpolation: "bilinear", "bicubic", or "random": one of the two.
  """

  def crop_jpeg():
    box = crop_box(tf.image.extract_jpeg_shape(encoded), seed, scale, ratio)
    return tf.image.decode_and_crop_jpeg(encoded, box, channels=3)

  def crop_decoded():
    image = decode(encoded)
    top, left, height, width = tf.unstack(crop_box(tf.shape(image), seed, scale, ratio))
    return image[top : top + height, left : left + width]

  image = tf.cond(tf.io.is_jpeg(encoded), crop_jpeg, crop_decoded)

  def resize(method):
    return tf.image.resize(image, size, method, antialias=True)

  if interpolation == "random":
    bicubic = uniform(seed, Stream.INTERPOLATION, ()) < 0.5
    return to_uint8(tf.cond(bicubic, lambda: resize("bicubic"), lambda: resize("bilinear")))
  return to_uint8(resize(interpolation))


def random_flip(image: tf.Tensor, seed: tf.Tensor, probability: float) -> tf.Tensor:
  """Mirrors left and right with a probability."""
  return tf.cond(uniform(seed, Stream.FLIP, ()) < probability, lambda: tf.reverse(image, [1]), lambda: image)


def random_shift_and_scale(image: tf.Tensor, seed: tf.Tensor, shift: float, scale: float) -> tf.Tensor:
  """Moves and zooms the picture about its centre, black outside.

  Args:
    image: uint8 (height, width, 3).
    seed: int64 (2,), of tf.random.stateless_uniform.
    shift: largest displacement, as a share of each side.
    scale: largest change of size: the zoom is drawn from [1 - scale, 1 + scale].
  """
  height, width = image.shape[:2]
  draw = uniform(seed, Stream.SHIFT_AND_SCALE, (3,), -1.0, 1.0)
  dy, dx = draw[0] * shift * height, draw[1] * shift * width
  inverse = 1.0 / (1.0 + draw[2] * scale)
  # The transform maps target to source pixels: source = (target - centre - displacement) / zoom + centre.
  centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
  x0 = centre_x - inverse * (centre_x + dx)
  y0 = centre_y - inverse * (centre_y + dy)
  transform = tf.stack([inverse, 0.0, x0, 0.0, inverse, y0, 0.0, 0.0])
  moved = tf.raw_ops.ImageProjectiveTransformV3(
    images=tf.cast(image, tf.float32)[None],
    transforms=transform[None],
    output_shape=(height, width),
    fill_value=0.0,
    interpolation="BILINEAR",
    fill_mode="CONSTANT",
  )
  return to_uint8(moved[0])
