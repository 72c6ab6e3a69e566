"""What a model costs: parameters and multiply-adds."""

from collections.abc import Callable, Sequence
import csv
import math
import os
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import rich.console
import rich.table

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


# CrossViT, Table 6: fusion -> (ImageNet top-1 %, multiply-adds in 10^9, parameters in 10^6), all on CrossViT-S.
TABLE_6 = {
  "none": (80.2, 5.3, 23.7),
  "all_attention": (80.0, 7.6, 27.7),
  "class_token": (80.3, 5.4, 24.2),
  "pairwise": (80.3, 5.5, 24.2),
  "cross_attention": (81.0, 5.6, 26.7),
}


def compare(models: Sequence[str] | None, *, fusion: bool, output: str | None) -> list[dict[str, Any]]:
  """Prints parameters and multiply-adds beside the published figures, and returns the rows.

  Args:
    models: names; None for all.
    fusion: CrossViT-S under the five fusions of Table 6 instead.
    output: folder for cost.csv, if any.
  """
  rows = []
  if fusion:
    for name, (top1, published_adds, published_params) in TABLE_6.items():
      rows.append(_row(name, top1, published_params * 1e6, published_adds, "crossvit_small_224", fusion=name))
  else:
    for name in models or registry.list_models():
      variant = registry.get_variant(name)
      rows.append(_row(name, variant.top1, variant.params, variant.multiply_adds, name))
  table = rich.table.Table(*rows[0], title="CrossViT-S, Table 6" if fusion else None)
  for row in rows:
    table.add_row(
      *("" if value is None else f"{value:,}" if isinstance(value, int) else str(value) for value in row.values())
    )
  rich.console.Console(width=140).print(table)
  if output:
    os.makedirs(output, exist_ok=True)
    path = os.path.join(output, "cost.csv")
    with open(path, "w", newline="") as file:
      writer = csv.DictWriter(file, rows[0])
      writer.writeheader()
      writer.writerows(rows)
    print(f"wrote {path}")
  return rows


def _row(name: str, top1: float | None, published_params: float, published_adds: float | None, *args, **kw) -> dict:
  params, adds = model_cost(*args, **kw)
  return {
    "model": name,
    "params": params,
    "published": round(published_params),
    "params off": f"{params / published_params - 1:+.1%}",
    "G multiply-adds": f"{adds / 1e9:.2f}",
    "published G": published_adds,
    "G off": f"{adds / 1e9 / published_adds - 1:+.1%}" if published_adds else None,
    "published top-1 %": top1,
  }
