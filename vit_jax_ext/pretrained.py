"""Released weights into our models: names, layouts, strictness both ways."""

from collections.abc import Mapping
import dataclasses

from flax import nnx
import jax.numpy as jnp
import numpy as np

from vit_jax_ext.errors import UserError

# Our leaf names -> PyTorch's. All other parts of a path are the authors' own attribute names and indices.
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# timm's CrossViT writes `pos_embed_0` where the authors write `pos_embed.0`.
_TIMM_NAMES = {f"{name}_{b}": f"{name}.{b}" for name in ("pos_embed", "cls_token") for b in (0, 1)}

# Buffers that are no integers: Swin's mask of shifted windows.
_FLOAT_BUFFERS = ("attn_mask",)


@dataclasses.dataclass
class LoadReport:
  """What happened to every name, in the authors' naming.

  Attributes:
    loaded: parameters filled as they are.
    resized: parameters filled after interpolation to another size.
    reinitialized: parameters left at their initial values on purpose.
    unused: entries of the source that are no parameters (masks, indices, counters).
  """

  loaded: list[str] = dataclasses.field(default_factory=list)
  resized: list[str] = dataclasses.field(default_factory=list)
  reinitialized: list[str] = dataclasses.field(default_factory=list)
  unused: list[str] = dataclasses.field(default_factory=list)


def _torch_name(path: tuple) -> str:
  return ".".join(str(part) for part in (*path[:-1], _TORCH_LEAF.get(path[-1], path[-1])))


def _from_torch_layout(path: tuple, array: np.ndarray) -> np.ndarray:
  """Linear (out, in) -> (in, out); convolution (out, in, height, width) -> (height, width, in, out)."""
  if path[-1] != "kernel":
    return array
  return array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)


def load_pretrained(model: nnx.Module, source: Mapping[str, np.ndarray]) -> LoadReport:
  """Fills `model` with the arrays of `source`, in the model's param_dtype.

  Args:
    model: any model of `create_model`.
    source: the authors' state dict, PyTorch names and layouts.

  Returns:
    What was loaded and what was not used.

  Raises:
    UserError: a parameter without an entry, a floating-point entry without a parameter, a wrong shape, a value that is
      not finite. The model is then unchanged.
  """
  arrays = {_TIMM_NAMES.get(key, key): np.asarray(value) for key, value in source.items()}
  state = nnx.state(model, (nnx.Param, nnx.BatchStat))
  targets = dict(nnx.to_flat_state(state))
  report, filled, wrong = LoadReport(), {}, []
  for path, variable in targets.items():
    name = _torch_name(path)
    if name not in arrays:
      wrong.append(f"{name} is missing")
      continue
    array = _from_torch_layout(path, arrays.pop(name))
    if array.shape != variable.shape:
      wrong.append(f"{name} has shape {array.shape} instead of {variable.shape}")
    elif not np.isfinite(array).all():
      wrong.append(f"{name} has values that are not finite")
    filled[path] = variable.replace(jnp.asarray(array, variable.dtype))
    report.loaded.append(name)
  for name, array in arrays.items():
    if jnp.issubdtype(array.dtype, jnp.floating) and name.rpartition(".")[2] not in _FLOAT_BUFFERS:
      wrong.append(f"{name} is no parameter of the model")
    report.unused.append(name)
  if wrong:
    raise UserError(f"the weights do not fit the model: {'; '.join(wrong)}")
  nnx.update(model, nnx.from_flat_state(filled))
  return report
