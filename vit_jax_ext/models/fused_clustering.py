"""Balanced clustering on a TPU, and the permutations it asks for: Pallas kernels.

Features never move while they are clustered. What a level needs of the order is each token's place in it, so a kernel
finds the centroids of all groups at once, as products with a matrix (group, token) that it makes on the chip, and gives
back one number a token, by which XLA sorts. The levels are rounds of one loop, whose two sorts compile once. A
permutation is a product with a matrix of zeros and ones, made on the chip as well, or moves rows one by one where they
are so many that this takes less.
"""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from vit_jax_ext.models.kernels import call, head_groups, on_each_device, own_lanes, product

GROUPS = 8  # that centroids are found of at a time
ROWS = 512  # of a permutation's matrix that are made at a time
MANY = 1024  # tokens from which on rows are moved one by one: a product's time grows with the square of their number
UNROLLED = 512  # rows, at most
STEPS = 8  # rows whose places are found from one address
ROW_FLOPS = 131_000 * 1.1  # what a product would do in the cycles that a row takes, by the compiler's schedule


def _precise(a, x, axis_a, axis_x, number=3):
  """Returns `kernels.product` of float32 a with x to full precision.

  Three bfloat16 numbers make up a float32 one; with bfloat16 x one product of the three, side by side, does. For zeros
  and ones a `number` of 1 is enough.
  """
  if x.dtype != jnp.bfloat16:
    return product(a, x, axis_a, axis_x, jax.lax.Precision.HIGHEST)
  parts = []
  for _ in range(number):
    parts.append(a.astype(x.dtype))
    a = a - parts[-1].astype(jnp.float32)
  whole = product(jnp.concatenate(parts, axis=0), x, axis_a, axis_x)
  return sum(whole[i * len(a) : (i + 1) * len(a)] for i in range(number))


def _ratio_kernel(x_ref, place_ref, size_ref, ratio_ref, *, width, groups, iterations, sharpness):
  """size_ref: tokens of a group, and how many turns to take, as `groups` are worked on at a time."""
  size, turns, tokens = size_ref[0, 0, 0], size_ref[0, 0, 1], x_ref.shape[2]
  for lanes, heads in head_groups(x_ref.shape[-1], width):
    x = x_ref[0, 0, :, lanes]
    rows = [own_lanes(i, lanes.size, width).astype(jnp.float32) for i in range(len(heads))]
    squares = _precise(jnp.concatenate(rows, axis=0), jnp.square(x.astype(jnp.float32)), 1, 1)
    norms = jnp.maximum(jnp.sqrt(squares), 1e-12)
    # The rows of a product are the centroids of all heads: of each head the first ones of its groups, then the second.
    own = jnp.concatenate([jnp.broadcast_to(row, (2 * groups, lanes.size)) for row in rows], axis=0)

    @pl.loop(0, turns)
    def _(turn, x=x, heads=heads, own=own, norms=norms):
      start = (turn * groups + jax.lax.broadcasted_iota(jnp.int32, (groups, tokens), 0)) * size
      places = [place_ref[0, pl.ds(head, 1)] for head in heads]
      within = [place - start for place in places]
      inside = [(w >= 0) & (w < size) for w in within]

      def cosines(first, number=3):
        weights = [jnp.where(i, w, 0) for f, i in zip(first, inside, strict=True) for w in (f, 1 - f)]
        centroids = own * _precise(jnp.concatenate(weights, axis=0), x, 1, 0, number)
        length = jnp.sqrt((centroids * centroids).sum(axis=1, keepdims=True))
        cosine = _precise(centroids / jnp.maximum(length, 1e-12), x, 1, 1)
        parts = [cosine[i * groups : (i + 1) * groups] for i in range(2 * len(heads))]
        sums = [jnp.where(inside[i // 2], part, 0).sum(axis=0, keepdims=True) for i, part in enumerate(parts)]
        sums = [x / norms[i // 2 : i // 2 + 1] for i, x in enumerate(sums)]
        return list(zip(sums[::2], sums[1::2], strict=True))

      found = cosines([(2 * w < size).astype(jnp.float32) for w in within], 1)
      for _ in range(iterations):
        found = cosines([1 / (1 + jnp.exp(sharpness * (c1 - c0))) for c0, c1 in found])
      for head, place, (c0, c1) in zip(heads, places, found, strict=True):
        mine = (place >= turn * groups * size) & (place < (turn + 1) * groups * size)
        ratio_ref[0, pl.ds(head, 1)] = jnp.where(mine, (c0 + 1) / (c1 + 1), ratio_ref[0, pl.ds(head, 1)])


def cluster_order(
  x: jax.Array, num_heads: int, levels: int, iterations: int, sharpness: float
) -> tuple[jax.Array, jax.Array]:
  """Balanced hierarchical clustering, see `boat.balanced_clusters`.

  Args:
    x: features (B, tokens, C), the heads side by side.
    num_heads: each is clustered by itself.
    levels, iterations: see there; at least one level.
    sharpness: of the soft assignment.

  Returns:
    order: the token at each place, (B, heads, tokens) int32.
    place: the place of each token, its inverse.
  """
  tokens, width = x.shape[1], x.shape[2] // num_heads
  groups = min(GROUPS, 2 ** (levels - 1))
  kernel = functools.partial(_ratio_kernel, width=width, groups=groups, iterations=iterations, sharpness=sharpness)
  turns = [max(1, 2**level // groups) for level in range(levels)]

  def run(arrays):
    heads = arrays["q"].shape[3] // width
    token = jax.lax.broadcasted_iota(jnp.int32, (len(arrays["q"]), heads, tokens), 2)
    result = jax.ShapeDtypeStruct(token.shape, jnp.float32)

    def halve(level, found):
      _, place = found
      size = tokens >> level
      sizes = jnp.broadcast_to(jnp.stack([size, jnp.asarray(turns)[level]]), (len(token), 1, 2))
      flops = 8 * (iterations + 1) * groups * sum(turns) // levels * arrays["q"].size  # of a level on average
      (ratio,) = call(kernel, {**arrays, "place": place, "size_scalars": sizes}, {"ratio": result}, flops)
      group = ((place + 0.5) / size).astype(jnp.int32)  # there is no division of integers on the chip
      *_, order = jax.lax.sort((group, ratio, place, token), num_keys=3, is_stable=False)
      return order, jax.lax.sort((order, token), num_keys=1, is_stable=False)[1]

    return jax.lax.fori_loop(0, levels, halve, (token, token))

  return on_each_device(run, {"q": x[:, None]}, ["order", "place"], num_heads)
