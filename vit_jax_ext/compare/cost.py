"""What a model costs: parameters and multiply-adds, counted without computing anything."""

from collections import Counter
from collections.abc import Callable, Sequence
import contextlib
import functools
import math
import re
from typing import Any

from flax import nnx
import humanize
import jax
from jax.extend import core
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry

# What a multiply-add is spent on, by the place of the module in its model; the first that fits.
PARTS = {
  "patch embedding": r"patch_embed|stage1_conv_embed",
  "classifier": r"\bhead\b",
  "MLP": r"\bmlp\b",
  "merging of patches": r"\bdownsample\b|\bmerge\d",
  "fusion of branches": r"\bfusion\b|projs\b",
  "attention in clusters": r"\battnC\b|\bcontent_attn\b",
  "re-attention": r"\breatten_matrix\b",
  "attention, projections": r"\b(qkv|proj)\b",
  "attention, maps": r"",
}
RESOLUTIONS = (224, 256, 320, 384, 448, 512)


def multiply_adds(fn: Callable, *args: Any) -> int:
  """Counts the multiply-adds of the matrix products and convolutions of `fn(*args)`, arrays or ShapeDtypeStructs.

  Elementwise work (softmax, normalisation, interpolation weights) is left out, as in the papers' counts.
  """
  return sum(_count(jax.make_jaxpr(fn)(*args).jaxpr).values())


def _count(jaxpr, scope: str = "") -> Counter[str]:
  """Returns the multiply-adds of a program by scope, the names of the calls around them."""
  total = Counter()
  for eqn in jaxpr.eqns:
    operands = [v.aval for v in eqn.invars]
    place = f"{scope}/{eqn.source_info.name_stack}"
    match eqn.primitive.name:
      case "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        total[place] += math.prod(eqn.outvars[0].aval.shape) * math.prod(operands[0].shape[i] for i in contracted)
      case "conv_general_dilated":
        kernel = operands[1].shape
        out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        total[place] += math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // out_channels
      case "cond":  # jax.lax.platform_dependent, whose default comes last
        total.update(_count(eqn.params["branches"][-1].jaxpr, place))
      case _:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in core.jaxprs_in_params(eqn.params):
          total.update({name: times * count for name, count in _count(inner, place).items()})
  return total


def count_params(model: nnx.Module) -> int:
  """Returns the number of parameters, of a concrete or abstract model."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _forward(model: nnx.Module) -> tuple[Callable, nnx.State, jax.ShapeDtypeStruct]:
  """Returns the forward pass to the logits as its authors write it, and its arguments for one image.

  What computes the same with less, as CrossViT's fusion does, counts whole. Operations are under their modules' paths.
  """
  graphdef, state = nnx.split(model)

  def forward(state, images):
    model = nnx.merge(graphdef, state)
    registry.choose_attention(model, "reference")
    with _scopes_of_modules(model):
      return model(images)[0]

  return forward, state, jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)


def trace_forward(model: nnx.Module) -> core.ClosedJaxpr:
  """Returns one image's forward pass to the logits as its authors write it, operations under their modules' paths."""
  forward, *arguments = _forward(model)
  return jax.make_jaxpr(forward)(*arguments)


def module_costs(forward: core.ClosedJaxpr) -> dict[str, int]:
  """Returns the multiply-adds of `trace_forward` by what they are spent on (PARTS), largest first."""
  parts = Counter()
  for scope, count in _count(forward.jaxpr).items():
    parts[next(part for part, pattern in PARTS.items() if re.search(pattern, scope))] += count
  return dict(parts.most_common())


def count_operations(jaxpr) -> int:
  """Returns the number of operations of a program, on which the time of its compilation depends."""
  return sum(1 + sum(map(count_operations, core.jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


@contextlib.contextmanager
def _scopes_of_modules(model: nnx.Module):
  """While open, what a module of `model` computes when called is under a `jax.named_scope` of the module's path."""
  names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
  classes = {cls for _, module in nnx.iter_modules(model) for cls in type(module).__mro__}
  originals = {cls: vars(cls)["__call__"] for cls in classes if "__call__" in vars(cls)}

  def scoped(call):
    @functools.wraps(call)
    def wrapper(self, *args, **kw):
      with jax.named_scope(names.get(id(self)) or "model"):
        return call(self, *args, **kw)

    return wrapper

  try:
    for cls, call in originals.items():
      cls.__call__ = scoped(call)
    yield
  finally:
    for cls, call in originals.items():
      cls.__call__ = call


def model_cost(name: str, **overrides) -> tuple[int, int]:
  """Returns (parameters, multiply-adds of one image's forward pass) of a model; nothing is allocated or computed."""
  model = nnx.eval_shape(lambda: registry.create_model(name, rngs=nnx.Rngs(0), **overrides))
  return count_params(model), multiply_adds(*_forward(model))


def resolution_costs(name: str, **overrides) -> list[tuple[int, int]]:
  """Returns (side in pixels, multiply-adds) at the sizes nearest to RESOLUTIONS that the model takes."""

  def nearest(side: int) -> tuple[int, int]:
    for size in sorted(range(side - 24, side + 25), key=lambda size: abs(size - side)):
      with contextlib.suppress(UserError):  # it does not divide
        return size, model_cost(name, **overrides | {"image_size": size})[1]
    raise UserError(f"{name} takes no image_size within 24 pixels of {side}; compare it without these overrides")

  return [nearest(side) for side in RESOLUTIONS]


def growth(costs: Sequence[tuple[int, int]]) -> float:
  """Returns the exponent p of cost = c * pixels ** p between the smallest and the largest size; 1 is linear."""
  (small, cost), (large, larger_cost) = costs[0], costs[-1]
  return math.log(larger_cost / cost) / math.log((large / small) ** 2)


# CrossViT, Table 6: fusion -> (ImageNet top-1 %, multiply-adds in 10^9, parameters in 10^6), all on CrossViT-S.
TABLE_6 = {
  "none": (80.2, 5.3, 23.7),
  "all_attention": (80.0, 7.6, 27.7),
  "class_token": (80.3, 5.4, 24.2),
  "pairwise": (80.3, 5.5, 24.2),
  "cross_attention": (81.0, 5.6, 26.7),
}


def fusion_table() -> list[dict[str, Any]]:
  """Returns `published_row` of CrossViT-S under the five fusions of Table 6."""
  return [
    published_row(name, top1, params * 1e6, adds, *model_cost("crossvit_small_224", fusion=name))
    for name, (top1, adds, params) in TABLE_6.items()
  ]


def models_table(names: Sequence[str]) -> list[dict[str, Any]]:
  """Returns `published_row` of registered models."""
  rows = []
  for name in names:
    variant = registry.get_variant(name)
    rows.append(published_row(name, variant.top1, variant.params, variant.multiply_adds, *model_cost(name)))
  return rows


def published_row(
  name: str, top1: float | None, published_params: float | None, published_adds: float | None, params: int, adds: int
) -> dict[str, Any]:
  """Returns our counts beside the published figures, ready to print."""
  return {
    "model": name,
    "params": params,
    "published": published_params and round(published_params),
    "params off": f"{params / published_params - 1:+.1%}" if published_params else None,
    "multiply-adds": humanize.metric(adds),
    "published G": published_adds,
    "off": f"{adds / 1e9 / published_adds - 1:+.1%}" if published_adds else None,
    "why": deviation(adds, published_adds),
    "published top-1 %": top1,
  }


def deviation(adds: int, published: float | None) -> str | None:
  """Returns why a published figure, in 10^9, is more than 2% away from our multiply-adds; None if it is not."""
  if published is None or abs(adds / 1e9 / published - 1) <= 0.02:
    return None
  return "rounded" if round(adds / 1e9, 1) == published else "differs"
