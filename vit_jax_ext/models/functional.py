"""A model as a function of plain trees: its structure, its parameters, its statistics, and uint8 images."""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
  """Splits a model into its structure and plain dicts of parameters and statistics; `nnx.merge` puts them together."""
  graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """Turns uint8 (B, H, W, 3) into float32 with `mean` and `std` given for images in [0, 1]."""
  mean, std = (255 * np.asarray(values, np.float32) for values in (mean, std))
  return (images.astype(jnp.float32) - mean) / std
