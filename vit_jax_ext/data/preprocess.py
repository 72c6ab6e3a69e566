"""Per-image TensorFlow operations: encoded bytes to uint8 (height, width, 3)."""

import enum
import functools
import math

import tensorflow as tf

from vit_jax_ext.data import pillow

# libjpeg's default in TensorFlow is coarser than in Pillow, whose pixels the papers trained on, and no faster.
_decode_options = {"channels": 3, "dct_method": "INTEGER_ACCURATE"}


class Stream(enum.IntEnum):
  """Numbers the transforms, so that one seed gives each its own draws."""

  CROP = 1
  FLIP = 2
  COLOR_JITTER = 3
  RAND_AUGMENT = 4


def uniform(seed: tf.Tensor, stream: Stream, shape: tuple[int, ...]) -> tf.Tensor:
  """Draws from [0, 1); `seed` is int64 (2,), its second number below 2^48."""
  return tf.random.stateless_uniform(shape, seed + tf.constant([0, stream << 48], tf.int64))


def decode(encoded: tf.Tensor) -> tf.Tensor:
  """Decodes JPEG, PNG, GIF (first frame) or BMP bytes to uint8 RGB; grey images get three equal channels."""
  image = tf.cond(
    tf.io.is_jpeg(encoded),
    lambda: tf.io.decode_jpeg(encoded, **_decode_options),
    lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
  )
  image.set_shape((None, None, 3))
  return image


def random_resized_crop(
  encoded: tf.Tensor,
  size: tuple[int, int],
  seed: tf.Tensor,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  interpolation: str = "bicubic",
) -> tf.Tensor:
  """Decodes a random part of an image and resizes it (Szegedy et al. 2015, arXiv 1409.4842, section 6).

  Of a JPEG only that part is decoded.

  Args:
    encoded: what `decode` takes.
    size: (height, width) of the result.
    seed: int64 (2,).
    scale, ratio: see `random_box`.
    interpolation: see `resize`; "random" is one of both.
  """
  draws = uniform(seed, Stream.CROP, (4, 11))

  # A truncated JPEG would pass where the crop ends above the cut.
  complete_jpeg = tf.io.is_jpeg(encoded) & (tf.strings.substr(encoded, -2, 2) == b"\xff\xd9")
  shape = tf.cond(complete_jpeg, lambda: tf.io.extract_jpeg_shape(encoded), lambda: tf.shape(decode(encoded)))
  box = random_box(shape, draws, scale, ratio)
  image = tf.cond(
    complete_jpeg,
    lambda: tf.io.decode_and_crop_jpeg(encoded, box, **_decode_options),
    lambda: tf.slice(decode(encoded), [box[0], box[1], 0], [box[2], box[3], 3]),
  )
  if interpolation != "random":
    return resize(image, size, interpolation)
  return tf.cond(draws[0, 10] < 0.5, lambda: resize(image, size, "bilinear"), lambda: resize(image, size, "bicubic"))


def random_box(shape: tf.Tensor, draws: tf.Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> tf.Tensor:
  """Returns (top, left, height, width) of a random part of an image, as torchvision and timm draw it.

  The first of ten attempts that fits; if none does, the central part whose ratio is allowed.

  Args:
    shape: of the image.
    draws: float32 (4, 10 or more), uniform in [0, 1).
    scale: range of the part's share of the area, which is uniform.
    ratio: range of width to height, whose logarithm is uniform.
  """
  height, width = shape[0], shape[1]
  h, w = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
  area = h * w * (scale[0] + (scale[1] - scale[0]) * draws[0, :10])
  aspect = tf.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * draws[1, :10])
  heights, widths = tf.round(tf.sqrt(area / aspect)), tf.round(tf.sqrt(area * aspect))
  fits = (heights >= 1) & (heights <= h) & (widths >= 1) & (widths <= w)
  tops, lefts = tf.floor(draws[2, :10] * (h - heights + 1)), tf.floor(draws[3, :10] * (w - widths + 1))
  first = tf.argmax(fits)
  largest_h, largest_w = tf.minimum(h, tf.round(w / ratio[0])), tf.minimum(w, tf.round(h * ratio[1]))
  central = tf.stack([(h - largest_h) // 2, (w - largest_w) // 2, largest_h, largest_w])
  box = tf.where(fits[first], tf.stack([tops, lefts, heights, widths])[:, first], central)
  return tf.cast(box, tf.int32)


def resize(image: tf.Tensor, size: tuple[int, int], interpolation: str) -> tf.Tensor:
  """Resizes as Pillow does, antialiased; to uint8 (height, width, 3).

  Args:
    image: uint8 (any height, any width, 3).
    size: (height, width).
    interpolation: "bilinear" or "bicubic".
  """
  return _resize_and_crop(image, tf.constant(size), (0, 0), size, interpolation)


def resize_and_center_crop(image: tf.Tensor, size: tuple[int, int], crop: float) -> tf.Tensor:
  """Resizes bicubically so that `size` is the central `crop` share of the shorter side, and cuts it out.

  Rounds the sizes as timm does, by way of torchvision's Resize and CenterCrop.
  """
  shape, whole = tf.shape(image)[:2], tf.constant([math.floor(side / crop) for side in size])
  fitting = tf.argmax(whole / shape)
  resized = whole[fitting] * shape // shape[fitting]
  offset = tf.cast(tf.round((resized - size) / 2), tf.int32)
  return _resize_and_crop(image, resized, offset, size, "bicubic")


def _resize_and_crop(image, resized, offset, size, interpolation):
  """Returns `size` pixels of the image resized to `resized` from `offset` on; all are (height, width)."""
  # The op is slow along rows: it steps over three channels. Given whole rows as channels it steps over thousands.
  rows = _resize_columns(image, resized[0], offset[0], size[0], interpolation)
  columns = _resize_columns(tf.transpose(rows, (1, 0, 2)), resized[1], offset[1], size[1], interpolation)
  return _transpose_to_uint8(columns)


def _resize_columns(image, resized, offset, size, interpolation):
  height, width = tf.shape(image)[0], image.shape[1] or tf.shape(image)[1]
  result = tf.raw_ops.ScaleAndTranslate(
    images=tf.reshape(image, (1, height, 1, width * 3)),
    size=(size, 1),
    scale=tf.stack([tf.cast(resized / height, tf.float32), 1.0]),
    translation=tf.stack([-tf.cast(offset, tf.float32), 0.0]),
    kernel_type={"bilinear": "triangle", "bicubic": "keyscubic"}[interpolation],
    antialias=True,
  )
  return tf.reshape(result, (size, width, 3))


@tf.function(autograph=False, jit_compile=True)
def _transpose_to_uint8(image):
  return tf.transpose(tf.cast(tf.clip_by_value(image + 0.5, 0, 255), tf.uint8), (1, 0, 2))


def random_flip(image: tf.Tensor, seed: tf.Tensor, probability: float) -> tf.Tensor:
  """Mirrors an image of static shape with a probability, left to right."""
  return _flip(image, uniform(seed, Stream.FLIP, ()) < probability)


@tf.function(autograph=False, jit_compile=True)
def _flip(image, flip):
  return tf.where(flip, image[:, ::-1], image)


def color_jitter(image: tf.Tensor, seed: tf.Tensor, strength: float = 0.4) -> tf.Tensor:
  """Changes brightness, contrast and saturation, in random order, by factors from [1 - strength, 1 + strength]."""
  draws = uniform(seed, Stream.COLOR_JITTER, (2, 3))
  factors = 1 + strength * (2 * draws[1] - 1)
  for which in tf.unstack(tf.argsort(draws[0])):
    image = _change_color(image, which, factors[which])
  return image


@tf.function(autograph=False, jit_compile=True)
def _change_color(image, which, factor):
  changes = [pillow.brightness, pillow.contrast, pillow.color]
  return tf.switch_case(which, [functools.partial(change, image, factor) for change in changes])


def random_shift_and_scale(image: tf.Tensor, seed: tf.Tensor, shift: float, scale: float) -> tf.Tensor:
  """Moves and zooms the picture about its centre, black outside.

  Args:
    image: uint8 (height, width, 3).
    seed: int64 (2,), of tf.random.stateless_uniform.
    shift: largest displacement, as a share of each side.
    scale: largest change of size: the zoom is drawn from [1 - scale, 1 + scale].
  """
  height, width = image.shape[:2]
  draw = tf.random.stateless_uniform((3,), seed, -1.0, 1.0)
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
  return tf.saturate_cast(tf.round(moved[0]), tf.uint8)
