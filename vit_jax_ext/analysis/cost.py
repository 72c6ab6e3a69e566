"""What a model costs: parameters and multiply-adds."""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.models import registry


def multiply_adds(fn: Callable, *args: Any) -> int:
  """Counts the multiply-adds of the matrix products and convolutions of `fn(*args)`, arrays or ShapeDtypeStructs.

  Elementwise work (softmax, normalisation, interpolation weights) is left out, as in the papers' counts.
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    operands = [v.aval for v in eqn.invars]
    match eqn.primitive.name:
      case "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        total += math.prod(eqn.outvars[0].aval.shape) * math.prod(operands[0].shape[i] for i in contracted)
      case "conv_general_dilated":
        kernel = operands[1].shape
        out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        total += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // out_channels
      case _:
        inner = sum(_count(sub) for sub in jax.core.jaxprs_in_params(eqn.params))
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
  return total


def count_params(model: nnx.Module) -> int:
  """Returns the number of parameters, of a concrete or abstract model."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def model_cost(name: str, **overrides) -> tuple[int, int]:
  """Returns (parameters, multiply-adds of one image's forward pass) of a model; nothing is allocated or computed."""
  model = nnx.eval_shape(lambda: registry.create_model(name, rngs=nnx.Rngs(0), **overrides))
  graphdef, state = nnx.split(model)
  images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
  return count_params(model), multiply_adds(lambda state, x: nnx.merge(graphdef, state)(x)[0], state, images)
