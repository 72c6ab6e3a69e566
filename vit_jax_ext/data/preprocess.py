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
  """Decodes JPEG, PNG, GIF (first frame) or BMP bytes to uint8 RGB, to the pixels of Pillow's `convert("RGB")`.

  Grey images get three equal channels, transparency is dropped, and 16 bits of grey are cut off at 255, as there. A
  BMP's palette alone is not looked up.
  """
  # A PNG's header has the bits per sample in byte 24 and the colour type, 0 for grey, in byte 25.
  grey_16 = tf.cond(
    tf.strings.length(encoded) > 25,
    lambda: tf.strings.substr(encoded, 1, 3) + tf.strings.substr(encoded, 24, 2) == b"PNG\x10\x00",
    lambda: tf.constant(False),
  )
  image = tf.case(
    [
      (tf.io.is_jpeg(encoded), lambda: tf.io.decode_jpeg(encoded, **_decode_options)),
      (grey_16, lambda: tf.cast(tf.minimum(tf.io.decode_png(encoded, channels=3, dtype=tf.uint16), 255), tf.uint8)),
    ],
    default=lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
  )
  image.set_shape((None, None, 3))
  return image


def _decode_part(encoded, choose, shortest=None):
  """Decodes no more than a part of an image.

  Args:
    encoded: what `decode` takes.
    choose: (height, width) of the image, int32 (2,), to (top, left, height, width) of the part.
    shortest: (height, width) that the part may be scaled down to while a JPEG is decoded, by 2, 4 or 8; None: as it is.

  Returns:
    An image, uint8; which of its columns hold the part, (first, number) int32; (top, left, height, width) of the part
    in these, float64; and what `choose` was given and has returned.
  """

  def part_of_jpeg():
    shape = tf.io.extract_jpeg_shape(encoded)[:2]
    box = choose(shape)
    return *_decode_box(encoded, shape, box, shortest), shape, box

  def part_of_all():
    image = decode(encoded)
    shape = tf.shape(image)[:2]
    box = choose(shape)
    image = tf.slice(image, tf.pad(box[:2], [[0, 1]]), tf.pad(box[2:], [[0, 1]], constant_values=3))
    columns = tf.stack([0, box[3]])
    return image, columns, tf.cast(tf.concat([(0, 0), box[2:]], axis=0), tf.float64), shape, box

  # A truncated JPEG would pass where the part ends above the cut. One branch, for several cost as much as decoding.
  complete_jpeg = tf.io.is_jpeg(encoded) & (tf.strings.substr(encoded, -2, 2) == b"\xff\xd9")
  image, columns, part, shape, box = tf.cond(complete_jpeg, part_of_jpeg, part_of_all)
  image.set_shape((None, None, 3))
  shape.set_shape((2,))
  return image, columns, part, shape, box


def _decode_box(encoded, shape, box, shortest):
  """Decodes a part of a JPEG, scaled as `_decode_part` says; returns the first three of what that does."""
  ratio = 1
  if shortest is not None:
    fits = box[2:] // shortest >= tf.constant([2, 4, 8])[:, None]
    power = tf.reduce_sum(tf.cast(tf.reduce_all(fits, axis=1), tf.int32))
    ratio = tf.bitwise.left_shift(1, power)
  begin, end = box[:2] // ratio, -(-(box[:2] + box[2:]) // ratio)
  top, left, height, width = tf.unstack(tf.concat([begin, end - begin], axis=0))
  # One more column to each side: at the ends of what is decoded colours lack a neighbour to interpolate with.
  start = tf.maximum(left - 1, 0)
  stop = tf.minimum(left + width + 1, -(-shape[1] // ratio))
  window = tf.stack([top, start, height, stop - start])
  decoders = [functools.partial(tf.io.decode_and_crop_jpeg, encoded, window, ratio=ratio, **_decode_options)
              for ratio in (1, 2, 4, 8)]  # fmt: skip
  # The branches hold nothing else: what is in those that are not taken costs time as well.
  image = decoders[0]() if shortest is None else tf.switch_case(power, decoders)
  return image, tf.stack([left - start, width]), box / ratio - tf.cast(tf.pad(begin, [[0, 2]]), tf.float64)


def random_resized_crop(
  encoded: tf.Tensor,
  size: tuple[int, int],
  seed: tf.Tensor,
  scale: tuple[float, float] = (0.08, 1.0),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  interpolation: str = "bicubic",
  dct_scaling: bool = False,
  flip: float = 0.0,
) -> tf.Tensor:
  """Decodes a random part of an image and resizes it (Szegedy et al. 2015, arXiv 1409.4842, section 6).

  Along columns first, then along rows: Pillow mostly takes the rows first, for which the whole image has to be turned.

  Args:
    encoded: what `decode` takes.
    size: (height, width) of the result.
    seed: int64 (2,).
    scale, ratio: see `random_box`.
    interpolation: see `resize`; "random" is one of both.
    dct_scaling: a part of a JPEG of twice the size or more is scaled down by 2, 4 or 8 while it is decoded, which is
      faster and averages where `resize` would have interpolated.
    flip: probability of mirroring as `random_flip` does, here without a pass over the image of its own.
  """
  draws = uniform(seed, Stream.CROP, (4, 11))
  image, columns, part, _, _ = _decode_part(
    encoded, lambda shape: random_box(shape, draws, scale, ratio), size if dct_scaling else None
  )
  factor, mirrored = size / part[2:], uniform(seed, Stream.FLIP, ()) < flip
  resized = functools.partial(_resize_columns_first, image, columns, factor, part[:2] * factor, size, mirrored)
  if interpolation != "random":
    return resized(interpolation)
  return tf.cond(draws[0, 10] < 0.5, lambda: resized("bilinear"), lambda: resized("bicubic"))


@tf.function(autograph=False, jit_compile=True)
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
  # Gathered: XLA would compile a slice for every index anew.
  box = tf.where(tf.gather(fits, first), tf.gather(tf.stack([tops, lefts, heights, widths]), first, axis=1), central)
  return tf.cast(box, tf.int32)


def resize(image: tf.Tensor, size: tuple[int, int], interpolation: str) -> tf.Tensor:
  """Resizes as Pillow does, antialiased; to uint8 (height, width, 3).

  Args:
    image: uint8 (any height, any width, 3).
    size: (height, width).
    interpolation: "bilinear" or "bicubic".
  """
  return _resize(image, size / tf.shape(image)[:2], (0.0, 0.0), size, interpolation)


def resize_and_center_crop(encoded: tf.Tensor, size: tuple[int, int], crop: float) -> tf.Tensor:
  """Decodes an image, resizes it bicubically so that `size` is the central `crop` share of its shorter side, and cuts.

  Rounds the sizes as timm does, by way of torchvision's Resize and CenterCrop.
  """

  def resized(shape):
    whole = tf.constant([math.floor(side / crop) for side in size])
    fitting = tf.argmax(whole / shape)
    return whole[fitting] * shape // shape[fitting]

  def offset(shape):
    return tf.cast(tf.round((resized(shape) - size) / 2), tf.int32)

  def made_of(shape):
    # What the crop is made of: its pixels reach two pixels of the smaller image to each side.
    reach = 2 * (shape // resized(shape) + 1) + 1
    begin = tf.maximum(offset(shape) * shape // resized(shape) - reach, 0)
    end = tf.minimum((offset(shape) + size) * shape // resized(shape) + reach, shape)
    return tf.concat([begin, end - begin], axis=0)

  image, columns, _, shape, box = _decode_part(encoded, made_of)
  image = image[:, columns[0] :][:, : columns[1]]
  scale = resized(shape) / shape
  start = tf.cast(offset(shape), tf.float64) - tf.cast(box[:2], tf.float64) * scale
  return _resize(image, scale, start, size, "bicubic")


def _resize(image, scale, start, size, interpolation):
  """Returns `size` pixels of the image scaled by `scale` from `start` on; all are (height, width)."""
  # Pillow resizes along rows first, and rounds to whole levels before it resizes along columns. TensorFlow's op is slow
  # along rows, where it steps over three channels; given whole columns as channels it steps over hundreds.
  height, width = tf.shape(image)[0], tf.shape(image)[1]
  scale, start = tf.cast(scale, tf.float32), tf.cast(start, tf.float32)
  columns = tf.reshape(tf.transpose(tf.reshape(image, (height, -1))), (1, width, 1, height * 3))
  columns = _resize_height(columns, scale[1], start[1], size[1], interpolation)
  rows = tf.reshape(tf.transpose(tf.reshape(columns, (size[1] * 3, height))), (1, height, 1, size[1] * 3))
  rows = _resize_height(rows, scale[0], start[0], size[0], interpolation)
  return tf.reshape(tf.cast(rows, tf.uint8), (*size, 3))


def _resize_columns_first(image, columns, scale, start, size, mirrored, interpolation):
  """Does what `_resize` does in the other order: an image as it lies has whole rows for channels, and needs no turn.

  Args:
    columns: (first, number) of those that are seen. Turned they lie side by side: here they are cut for nothing.
    mirrored: whether the result is, bool.
  """
  height, width = tf.shape(image)[0], tf.shape(image)[1]
  scale, start = tf.cast(scale, tf.float32), tf.cast(start, tf.float32)
  resized = tf.reshape(image, (1, height, 1, width * 3))
  resized = _resize_height(resized, scale[0], start[0], size[0], interpolation)
  rows = tf.reshape(tf.transpose(tf.reshape(resized, (size[0], width * 3))), (width, 3 * size[0]))
  rows = rows[columns[0] : columns[0] + columns[1]][None, :, None]
  return _turn(_resize_height(rows, scale[1], start[1], size[1], interpolation), size, mirrored)


@tf.function(autograph=False, jit_compile=True)
def _turn(levels, size, mirrored):
  """Returns levels that lie by column, channel and row as an image, uint8 (*size, 3)."""
  levels = tf.reshape(levels, (size[1], 3, size[0]))
  levels = tf.where(mirrored, levels[::-1], levels)
  return tf.transpose(tf.cast(levels, tf.uint8), (2, 0, 1))


def _resize_height(images, scale, start, size, interpolation):
  """Returns whole levels, 0 to 255, as float32 (1, size, 1, channels)."""
  resized = tf.raw_ops.ScaleAndTranslate(
    images=images,
    size=(size, 1),
    scale=tf.stack([scale, 1.0]),
    translation=tf.stack([-start, 0.0]),
    kernel_type={"bilinear": "triangle", "bicubic": "keyscubic"}[interpolation],
    antialias=True,
  )
  # Rounds halves up and clips, in one pass over the memory.
  return tf.quantization.fake_quant_with_min_max_args(resized, 0, 255)


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
