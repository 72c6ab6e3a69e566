"""Per-image TensorFlow operations: encoded bytes to uint8 (height, width, 3)."""

import tensorflow as tf


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
  return to_uint8(moved[0])
