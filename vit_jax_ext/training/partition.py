"""Where a model's arrays lie on the mesh: rules by parameter path.

Kept between steps, every array is split over the fsdp and the model axis alike (ZeRO-3, Rajbhandari et al. 2020), along
whichever dimensions divide. In use it is gathered from fsdp, and over model it stays split only where RULES say, so
that every device computes some of the heads and of the MLPs' hidden units (Megatron-LM, Shoeybi et al. 2019).
"""

from collections.abc import Iterable, Sequence
import functools
import math
import re
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax_ext.models.functional import split_model

# Parameter path -> the dimension that the model axis splits in use, and what lies along it.
# Packed qkv needs no rule: XLA carries the split of the heads over to it from these (see models.layers.PackedQKV).
RULES = (
  (r"mlp\.fc1\.(kernel|bias)$", -1, "hidden units"),
  (r"mlp\.fc2\.kernel$", 0, "hidden units"),
  (r"attnC?\.proj\.kernel$", 0, "heads"),
  (r"attn\.w[qkv]\.(kernel|bias)$", -1, "heads"),
  (r"get_v\.(kernel|bias)$", -1, "heads"),
  (r"relative_position_bias_table$", 1, "heads"),
)


class Layout:
  """Where the parameters of a model lie, what mirrors them (moments, averages), and all the rest.

  Args:
    model: concrete or abstract.
    mesh: of `sharding.make_mesh`.

  Attributes:
    weights: shardings of {"params", "stats"} of the model.
  """

  def __init__(self, model: nnx.Module, mesh: Mesh):
    self.mesh = mesh
    self._heads = {_name(path): m.num_heads for path, m in nnx.iter_modules(model) if hasattr(m, "num_heads")}
    _, params, stats = split_model(model)
    self._sizes = {_name(path): param.size for path, param in jax.tree.leaves_with_path(params)}
    self._undivided = {}  # module -> its heads or hidden units, where the model axis does not divide them
    self._used, self._stored, self._whole = {}, {}, []
    for path, param in jax.tree.leaves_with_path(params):
      name = _name(path)
      self._used[name] = self._split_in_use(name, param.shape)
      self._stored[name], rest = _split_in_store(param.shape, self._used[name], mesh)
      self._whole += [name] if rest else []
    self.weights = self.shardings({"params": params, "stats": stats})

  def _split_in_use(self, name: str, shape: Sequence[int]) -> P:
    """Returns the split over the model axis alone."""
    dims, devices = [None] * len(shape), self.mesh.shape["model"]
    for pattern, dimension, kind in RULES:
      if re.search(pattern, name):
        module, number = name.rsplit(".", 2)[0], shape[dimension]
        if kind == "heads":
          module = max((m for m in self._heads if name.startswith(m + ".")), key=len)
          number = self._heads[module]
        if number % devices:
          self._undivided[module] = f"{module} ({number} {kind})"
        elif devices > 1:
          dims[dimension] = "model"
    return P(*dims)

  def shardings(self, tree: Any) -> Any:
    """Returns the NamedSharding of every array of `tree` between steps.

    Args:
      tree: arrays or ShapeDtypeStructs: parameters, or anything whose paths end with theirs, such as a TrainState.
    """

    def find(path, _):
      parts = _name(path).split(".")
      suffixes = (".".join(parts[i:]) for i in range(len(parts)))
      spec = next((self._stored[suffix] for suffix in suffixes if suffix in self._stored), P())
      return NamedSharding(self.mesh, spec)

    return jax.tree.map_with_path(find, tree)

  def gather(self, params: Any) -> Any:
    """Brings parameters, inside jit, from where they are kept to where they are used, and their gradients back.

    Left to itself, XLA at times leaves the parameters where they are and gathers the activations of the whole batch.
    """
    used = jax.tree.map_with_path(lambda path, _: NamedSharding(self.mesh, self._used[_name(path)]), params)
    return jax.tree.map(_gather, params, used, self.shardings(params))

  def remarks(self) -> str:
    """Returns one line on what the mesh does not divide; empty if there is nothing."""
    remarks = []
    if self._undivided:
      names = _first(self._undivided.values())
      remarks.append(f"model={self.mesh.shape['model']} does not divide, every device computes the whole of {names}")
    if self._whole:
      share = sum(self._sizes[name] for name in self._whole) / sum(self._sizes.values())
      remarks.append(f"{share:.2%} of the parameters cannot be split over all of fsdp and model: {_first(self._whole)}")
    return "; ".join(remarks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(param: jax.Array, used: NamedSharding, stored: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(param, used)


def _gather_backward(used: NamedSharding, stored: NamedSharding, _, gradient: jax.Array) -> tuple[jax.Array]:
  # Without the stop at `used`, the split for storage would spread from the gradients to the activations.
  gradient = jax.lax.with_sharding_constraint(gradient, used)
  return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(lambda param, used, stored: (_gather(param, used, stored), None), _gather_backward)


def _split_in_store(shape: Sequence[int], used: P, mesh: Mesh) -> tuple[P, list[str]]:
  """Returns the split over all axes but data, and the axes that fit no dimension.

  First comes the dimension that divides by most of them, mostly by all; of several the largest.
  """
  dims = [[axis] if axis else [] for axis in used]
  sizes = [size // mesh.shape[axis] if axis else size for size, axis in zip(shape, used, strict=True)]
  axes = [axis for axis in mesh.axis_names if axis not in ("data", *used) and mesh.shape[axis] > 1]
  total = math.prod(mesh.shape[axis] for axis in axes)
  for i in sorted(range(len(shape)), key=lambda i: (math.gcd(sizes[i], total), sizes[i]), reverse=True):
    for axis in list(axes):
      if sizes[i] % mesh.shape[axis] == 0:
        dims[i].append(axis)
        sizes[i] //= mesh.shape[axis]
        axes.remove(axis)
  return P(*(tuple(dim) or None for dim in dims)), axes


def _name(path: Sequence[Any]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".")


def _first(names: Iterable[str]) -> str:
  """Returns the first three names and how many more there are."""
  names = list(names)
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
