"""Kernels for TPUs that work on each token by itself, all of a block but its attention: what they share.

Where tokens are many and narrow, as in the first stages of Swin and CSWin, a block's time is that of memory, and they
lie along the lanes, their channels along the sublanes. XLA keeps them so too: 96 channels need no padding, and a norm's
sums need no shuffles. Wider ones lie row by row, and a block's time is that of the matrix unit. What XLA would compile
anew for every block is compiled once here: the compiler knows kernels that it has had.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Self

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from vit_jax_ext.models import kernels
from vit_jax_ext.models.kernels import LANES, Arrays, product, tiled_bytes, vmem_bytes

NARROW = LANES  # channels; tokens with fewer lie along the lanes
FEWEST = 128  # tokens of an image, where they lie row by row: with fewer, matrix units wait for weights
DTYPE = jnp.bfloat16  # of products; the kernels are no more precise
HELD = (2**18, 2**19)  # activations that a step works on, about; the second row by row, where a chip has the memory
TOKENS = 2048  # of the images that one program works on
MOVED_SHARE = 4  # what is moved for them takes at most 1 / MOVED_SHARE of the chip's memory


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the tokens of an image lie.

  Attributes:
    axis: of their channels, in (C, tokens) or (tokens, C).
    held: activations that a step works on, about.
  """

  axis: int
  held: int

  @classmethod
  def of(cls, x: jax.Array) -> Self:
    """Returns the layout for tokens x (B, tokens, C)."""
    axis = 0 if x.shape[-1] < NARROW else 1
    return cls(axis, HELD[axis if vmem_bytes() > 2**25 else 0])

  def turn(self, x: jax.Array) -> jax.Array:
    """Returns (B, tokens, C) as it lies, or the inverse."""
    return x if self.axis else x.swapaxes(1, 2)

  def tokens(self, shape: Sequence[int]) -> int:
    """Returns the tokens of an image, of the shape of what lies so."""
    return shape[2 - self.axis]

  def tiled_bytes(self, tokens: int, channels: int) -> int:
    """Returns the bytes of an image in float32 on the chip."""
    return tiled_bytes((tokens, channels) if self.axis else (channels, tokens), 4)

  def at(self, image: int, some: pl.Slice) -> tuple:
    """Returns the index of some tokens of an image."""
    return (image, some, slice(None)) if self.axis else (image, slice(None), some)

  def rows(self, x: jax.Array) -> jax.Array:
    """Returns tokens as (tokens, C)."""
    return x if self.axis else x.T

  def weights(self, w: jax.Array) -> jax.Array:
    """Returns w (in, out) as `multiply` takes it, or the inverse."""
    return w if self.axis else w.swapaxes(0, 1)

  def multiply(self, w: jax.Array, x: jax.Array) -> jax.Array:
    """Returns tokens x times what `weights` gives."""
    return product(x, w, 1, 0) if self.axis else product(w, x, 1, 0)

  def multiply_back(self, w: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the gradient of x from that of the product, w being (in, out)."""
    return product(dy, w, 1, 1) if self.axis else product(w, dy, 1, 0)

  def outer(self, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns the gradient of what `weights` gives."""
    return product(x, dy, 0, 0) if self.axis else product(dy, x, 1, 1)

  def sum_tokens(self, x: jax.Array) -> jax.Array:
    """Returns the sum over the tokens."""
    return x.sum(axis=1 - self.axis, keepdims=True)

  def normalise(self, x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Returns x with mean 0 and variance 1 over the channels, and the inverse deviations."""
    x = x - x.mean(axis=self.axis, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=self.axis, keepdims=True) + epsilon)
    return x * inverse, inverse

  def normalise_backward(self, dunit: jax.Array, unit: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns the gradient of x from that of `unit`; `unit` and `inverse` are what `normalise` gave."""
    mean = dunit.mean(axis=self.axis, keepdims=True)
    return inverse * (dunit - mean - unit * (dunit * unit).mean(axis=self.axis, keepdims=True))

  def step_size(self, tokens: int, width: int) -> int:
    """Returns how many tokens are worked on at a time, of `width` activations each."""
    return min(tokens, max(1, self.held // width // LANES) * LANES)

  def over_tokens(self, shape: Sequence[int], width: int, body: Callable) -> None:
    """Calls `body` with the index of an image and a slice of its tokens, one after another.

    Args:
      shape: of the images of a program, as they lie.
      width: activations that a token has.
      body: gets slices of one size, but for the last of an image.
    """
    tokens = self.tokens(shape)
    size = self.step_size(tokens, width)

    @pl.loop(0, shape[0])
    def _(image):
      @pl.loop(0, tokens // size)
      def _(i):
        body(image, pl.ds(pl.multiple_of(i * size, LANES), size))

      if tokens % size:
        body(image, pl.ds(tokens - tokens % size, tokens % size))

  def of_vector(self, x: jax.Array) -> jax.Array:
    """Returns (C,) as it meets tokens."""
    return x[None] if self.axis else x[:, None]


def fits(x: jax.Array, dtype: jnp.dtype, moved: int, weights: int, width: int) -> bool:
  """Returns whether a kernel takes x (B, tokens, C) and has room on the chip.

  Not where a mesh has a model axis, which would split what a token has of activations.

  Args:
    dtype: of products.
    moved: bytes of an image's arrays, of which the next ones are on their way while some are worked on.
    weights: bytes of what all programs see.
    width: activations of a token.
  """
  layout, tokens = Layout.of(x), x.shape[1]
  alone = jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1
  temporaries = 4 * layout.tiled_bytes(layout.step_size(tokens, width), width)
  room = 2 * moved + weights + temporaries <= vmem_bytes()
  enough = tokens >= FEWEST or not layout.axis
  return alone and room and enough and x.dtype == jnp.float32 and dtype == DTYPE


def as_read(layout: Layout, **parameters: jax.Array) -> dict[str, jax.Array]:
  """Returns parameters as kernels read them: vectors as they meet tokens, matrices as `Layout.weights` gives them."""
  return {
    f"{name}_for_all": layout.of_vector(x) if x.ndim == 1 else layout.weights(x) for name, x in parameters.items()
  }


def call(kernel: Callable, arrays: Arrays, results: Arrays, layout: Layout, flops: int) -> list[jax.Array]:
  """Does `kernels.call`, with as many images in a program as there is room for.

  Args:
    kernel, arrays, results, flops: see there.
    layout: of q.
  """
  moved = sum(
    2 * tiled_bytes(x.shape[1:], x.dtype.itemsize)
    for name, x in (*arrays.items(), *results.items())
    if not name.endswith(("_for_all", "_sums", "_scalars"))
  )
  most = min(TOKENS // layout.tokens(arrays["q"].shape), vmem_bytes() // MOVED_SHARE // moved)
  return kernels.call(kernel, arrays, results, flops, images_at_once=max(1, most) if layout.axis else 1)


def sums_of(layout: Layout, parameters: Mapping[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns what programs add the gradients of parameters to, shaped as `as_read` shapes them."""
  shapes = {name: jax.eval_shape(lambda x: as_read(layout, x=x), x)["x_for_all"] for name, x in parameters.items()}
  return {f"{name}_sums": jax.ShapeDtypeStruct((1, *x.shape), jnp.float32) for name, x in shapes.items()}


def over_devices(sums: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the sum over the first axis, the devices and their cores, in float32; what travels is of `dtype`."""
  zero = jnp.zeros((), dtype)
  return jax.lax.reduce(sums.astype(dtype), zero, jax.lax.add, (0,)).astype(jnp.float32)


def add_up(layout: Layout, sums: Sequence[jax.Array], parameters: Mapping[str, jax.Array]) -> Iterator[jax.Array]:
  """Yields the gradients of parameters from the sums of all devices, which travel in the parameters' dtypes."""
  for x, parameter in zip(sums, parameters.values(), strict=True):
    x = over_devices(x, parameter.dtype)
    yield layout.weights(x) if parameter.ndim == 2 else x.reshape(parameter.shape)
