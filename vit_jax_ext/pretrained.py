"""Weights into our models and out again: the authors' names and layouts, strict both ways."""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from vit_jax_ext import hub, weight_files, weight_names
from vit_jax_ext.errors import UserError
from vit_jax_ext.models import registry, swin
from vit_jax_ext.models.resize import resize_bicubic
from vit_jax_ext.workdir import checkpoint, description

# Our leaf names -> PyTorch's. All other parts of a path are the authors' own attribute names and indices.
_TORCH_LEAF = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Entries that are no parameters, which we compute or need none of; and Transformers' pooler, beside its models' logits.
_NOT_NEEDED = re.compile(r"(.*\.)?(attn_mask|relative_position_index|num_batches_tracked)|pooler\.dense\.(weight|bias)")
_CLASSIFIER = re.compile(r"head(_dist|\.[01])?\.(weight|bias)")  # a distilled DeiT has two, and CrossViT
METADATA = "vit_jax_ext"  # of a .safetensors file: the description of its weights, as JSON
# Of an .npz for each published parameter, at most: what unpacks to more is not read. Options may make a model larger.
BYTES_OF_PARAMETER = 64
_AT_MOST = 6  # names of each kind in an error message


Source = str | os.PathLike | Mapping[str, np.ndarray] | bool


@dataclasses.dataclass
class LoadReport:
  """What happened to every name, in the authors' naming.

  Attributes:
    source: what was read, and which entry of it.
    loaded: parameters filled as they are.
    resized: parameters filled after interpolation to another size.
    reinitialized: parameters left at their initial values: the classifier, when the number of classes differs, or the
      weights have none.
    unused: entries of the source that are no parameters: masks, indices, counters; the classifier of a model without.
  """

  source: str = "a mapping"
  loaded: list[str] = dataclasses.field(default_factory=list)
  resized: list[str] = dataclasses.field(default_factory=list)
  reinitialized: list[str] = dataclasses.field(default_factory=list)
  unused: list[str] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    """Says it in one line; names what was not simply loaded, save for buffers."""
    parts = [f"{len(self.loaded)} arrays loaded from {self.source}"]
    for what in ("resized", "reinitialized"):
      if names := getattr(self, what):
        parts.append(f"{len(names)} {what}: {_some(names)}")
    if self.unused:
      parts.append(f"{len(self.unused)} not needed")
    return "; ".join(parts)


def load_pretrained(model: nnx.Module, source: Source, *, keep_classifier: bool = False) -> LoadReport:
  """Fills `model` with pretrained weights, in its own param_dtype and where its arrays lie.

  Position embeddings and relative-position tables of another size are interpolated bicubically, as torch does it
  (a = -0.75); a classifier for another number of classes is left as it is, or one that the weights do not have.

  Args:
    model: any model of `create_model`, or one without arrays of `nnx.eval_shape`.
    source: a file (.pth, .pt, .pth.tar, .safetensors, Google's .npz; also https://...), a run's workdir or one of its
      checkpoints, either also in a bucket (gs://...); hf://OWNER/NAME[@REVISION][/FILE] on the Hugging Face Hub, or a
      folder of such a repository; a mapping, the authors' state dict; or True for what was published for this variant,
      downloaded once. Names may also be timm's, those of Transformers' ViT, DeiT and Swin, and what torch.compile,
      DataParallel and Lightning make of them. Files that are not ours do not tell the shape of their grid of patches:
      where their number differs from the model's it is taken to be square.
    keep_classifier: refuse weights for another number of classes, or without a classifier.

  Returns:
    What was loaded and what was not.

  Raises:
    UserError: the source cannot be read; a parameter without an entry or an entry without a parameter; a wrong shape
      or type; a value that is not finite. The model is then unchanged.
  """
  variant = getattr(model, "variant", type(model).__name__)  # a class may be used without its registered name
  read = read_source(source, variant, lambda: model)
  return fill(model, *read, keep_classifier=keep_classifier, aspect=aspect_of(source))


def fill(
  model: nnx.Module,
  weights: Mapping[str, np.ndarray],
  where: str,
  *,
  keep_classifier: bool = False,
  aspect: float = 1.0,
) -> LoadReport:
  """Does what `load_pretrained` does with what `read_source` has read: weights, and what to call them.

  `aspect` is height over width of the images that they were trained on, see `aspect_of`.
  """
  variant, weights = getattr(model, "variant", type(model).__name__), dict(weights)
  report, filled = LoadReport(where), {}
  headless = not any(map(_CLASSIFIER.fullmatch, weights))
  missing, misfits = [], []
  for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
    name = _torch_name(path)
    if name not in weights:
      new = headless and _CLASSIFIER.fullmatch(name) and not keep_classifier
      (report.reinitialized if new else missing).append(name)
      continue
    array = _from_torch_layout(path, weights.pop(name))
    outcome = report.loaded
    if not jnp.issubdtype(array.dtype, jnp.floating):
      misfits.append(f"{name} is {array.dtype}")
    elif not np.isfinite(array).all():
      misfits.append(f"{name} has values that are not finite")
    elif array.shape != variable.shape:
      if _CLASSIFIER.fullmatch(name) and array.shape[:-1] == variable.shape[:-1] and not keep_classifier:
        report.reinitialized.append(name)
        continue
      resized = _resize(model, path, array, variable.shape, aspect)
      if resized is None:
        shapes = (_torch_shape(path, shape) for shape in (array.shape, variable.shape))
        misfits.append("{} has shape {} instead of {}".format(name, *shapes))
        continue
      array, outcome = resized, report.resized
    outcome.append(name)
    filled[path] = (variable, array)
  has_classifier = any(map(_CLASSIFIER.fullmatch, missing + report.loaded + report.reinitialized))
  for name in weights:
    if _NOT_NEEDED.fullmatch(name) or (_CLASSIFIER.fullmatch(name) and not has_classifier):
      report.unused.append(name)
  unknown = [name for name in weights if name not in report.unused]
  if missing or unknown or misfits:
    raise UserError(_misfit(variant, where, missing, unknown, misfits))
  nnx.update(model, nnx.from_flat_state([(path, _place(*pair)) for path, pair in filled.items()]))
  return report


def read_source(
  source: Source, variant: str, model: Callable[[], nnx.Module] | None = None
) -> tuple[dict[str, np.ndarray], str]:
  """Returns weights under the authors' names and in their layouts, and what to call them.

  Args:
    source: see `load_pretrained`.
    variant: a registered name, whose published weights True stands for.
    model: called where a file's names are looked at before the file is read: an .npz may unpack to anything.

  Raises:
    UserError: the source cannot be read, or nothing was published.
  """
  where = LoadReport.source
  if source is True:
    source = _published(variant)
  if isinstance(source, Mapping):
    weights = source
  elif not isinstance(source, (str, os.PathLike)):
    raise UserError(f"pretrained weights {source!r} are neither a path nor True; give one of them")
  elif (saved := checkpoint.read_weights(os.fspath(source))) is not None:
    step, item, arrays = saved
    where = f"{source}, step {step}, {item}"
    weights = {_torch_name(path): _to_torch_layout(path, array) for path, array in arrays.items()}
  else:
    published = registry.VARIANTS.get(variant)
    largest = published and published.params and BYTES_OF_PARAMETER * published.params
    weights, where = weight_files.read_weights(
      os.fspath(source),
      largest,
      model and (lambda found: _check_names(model(), weight_names.to_authors(found), source)),
    )
  return weight_names.to_authors({name: np.asarray(array) for name, array in weights.items()}), where


def _published(variant: str) -> str:
  """Returns where a variant's weights are: on the Hub, as .safetensors, or with the authors.

  The authors' file is taken where it is here already, be it put there by hand.
  """
  published = registry.get_variant(variant)
  if published.url is None:
    raise UserError(f"no weights were published for {variant}; give a file or a run's workdir")
  if published.hub is None or weight_files.cached(published.url).exists():
    return published.url
  return hub.PREFIX + published.hub


def _check_names(model: nnx.Module, names: Collection[str], where: Any) -> None:
  """Raises UserError if there are names of nothing that the model has, or might do without."""
  known = {_torch_name(path) for path, _ in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))}
  foreign = [name for name in names if name not in known]
  unknown = [name for name in foreign if not (_CLASSIFIER.fullmatch(name) or _NOT_NEEDED.fullmatch(name))]
  if unknown:
    raise UserError(_misfit(getattr(model, "variant", type(model).__name__), where, [], unknown, []))


def read_description(source: Any) -> dict[str, Any] | None:
  """Returns what weights tell of themselves, see `description.describe`; None if they do not.

  Thresholds are those of the weights that `load_pretrained` takes.

  Args:
    source: a run's workdir, one of its checkpoints, or what `convert` or `export` wrote, a .safetensors file, its
      folder, or its address on the Hub.

  Raises:
    UserError: the Hub does not give it.
  """
  if not isinstance(source, (str, os.PathLike)):
    return None
  on_hub = isinstance(source, str) and source.startswith(hub.PREFIX)
  path = hub.fetch(source) if on_hub else pathlib.Path(source).expanduser()
  path = hub.in_folder(path) or path
  if workdir := workdir_of(path):
    about = description.read(workdir)
    if about and "thresholds" in about and (found := checkpoint.find_weights(os.fspath(path))):
      step, item, _ = found
      about["thresholds"] = description.thresholds(about, step, ema=item == "ema")
    return about
  if path.suffix != ".safetensors" or not path.is_file():
    return None
  try:
    with safetensors.safe_open(path, "np") as file:
      about = json.loads((file.metadata() or {}).get(METADATA, "null"))
    return about if isinstance(about["overrides"], dict) and {"model", "num_classes", "crop"} <= about.keys() else None
  except Exception:  # whoever reads the weights will say what is wrong
    return None


def aspect_of(source: Any) -> float:
  """Returns height over width of the images that weights were trained on; 1 if they do not tell."""
  size = (read_description(source) or {}).get("image_size")
  known = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)
  return size[0] / size[1] if known else 1.0


def workdir_of(source: str | os.PathLike) -> str | None:
  """Returns the workdir that a folder is, or that holds a checkpoint; None for a file."""
  path = pathlib.Path(source).expanduser()
  return os.fspath(path.parent.parent if path.parent.name == "checkpoints" else path) if path.is_dir() else None


def count_classes(weights: Mapping[str, np.ndarray]) -> int:
  """Returns the number of classes of weights under the authors' names; 0 without a classifier."""
  return len(weights.get("head.bias", weights.get("head.0.bias", ())))  # CrossViT has two


def _misfit(variant: str, where: str, missing: list[str], unknown: list[str], misfits: list[str]) -> str:
  complaints = []
  if missing:
    complaints.append(f"{len(missing)} missing: {_some(missing)}")
  if unknown:
    complaints.append(f"{len(unknown)} that the model does not have: {_some(unknown)}")
  if misfits:
    complaints.append(f"{len(misfits)} that do not fit: {_some(misfits)}")
  if missing and all(name.startswith("head_dist.") for name in missing):
    complaints.append("for weights of one head create the model with dist_head=False")
  return f"weights from {where} are not those of this {variant}; {'; '.join(complaints)}"


def _some(names: list[str]) -> str:
  rest = len(names) - _AT_MOST
  return ", ".join(names[:_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _torch_name(path: tuple) -> str:
  return ".".join(str(part) for part in (*path[:-1], _TORCH_LEAF.get(path[-1], path[-1])))


def _from_torch_layout(path: tuple, array: np.ndarray) -> np.ndarray:
  """Linear (out, in) -> (in, out); convolution (out, in, height, width) -> (height, width, in, out)."""
  if path[-1] != "kernel":
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_torch_layout(path: tuple, array: np.ndarray) -> np.ndarray:
  """Inverse of `_from_torch_layout`."""
  if path[-1] != "kernel":
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _torch_shape(path: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
  return _to_torch_layout(path, np.broadcast_to(np.float32(0), shape)).shape


def _place(variable: nnx.Variable, array: np.ndarray) -> nnx.Variable:
  """Returns the array as the variable's new value, of its dtype and on its devices."""
  array = array.astype(variable.dtype, copy=False)
  # On CPU a contiguous array would be used where it lies, which may be in the file; JAX copies a transposed one.
  array = array.copy() if array.flags.c_contiguous else array
  return variable.replace(jax.device_put(array, getattr(variable.get_value(), "sharding", None)))


def _resize(
  model: nnx.Module, path: tuple, array: np.ndarray, shape: tuple[int, ...], aspect: float
) -> np.ndarray | None:
  """Interpolates a position embedding (1, tokens, C) or a table ((2 h - 1)(2 w - 1), heads); None for anything else."""
  if path[0] == "pos_embed" and array.ndim == 3 and array.shape[-1] == shape[-1]:
    grid = model.grids[path[1]] if len(path) > 1 else model.grid
    learned = shape[1] - math.prod(grid)  # tokens before those of the patches
    tokens = _resize_grid(array[0, learned:], grid, aspect)
    return None if tokens is None else np.concatenate([array[:, :learned], tokens[None]], axis=1)
  if path[-1] == "relative_position_bias_table" and array.ndim == 2 and array.shape[-1] == shape[-1]:
    window = _module(model, path[:-1]).window
    of_weights, of_model = (math.isqrt(len(array)) + 1) // 2, getattr(model, "window_size", math.inf)
    if of_weights >= 1.5 * of_model:  # a stage's own may be a little larger than window_size, to divide its sides
      raise UserError(
        f"the weights have windows of {of_weights}, the model of {of_model}, to which they would be shrunk; create it "
        f"with window_size={of_weights}"
      )
    return _resize_grid(array, (2 * window[0] - 1, 2 * window[1] - 1))
  return None


def _resize_grid(cells: np.ndarray, grid: tuple[int, int], aspect: float = 1.0) -> np.ndarray | None:
  """Interpolates (rows * columns, C) to (prod(grid), C); None if there is no grid of this aspect."""
  count = len(cells)
  rows = [rows for rows in range(1, count + 1) if count % rows == 0]
  # A side is whole patches, and CrossViT resizes for its large ones, so a grid has the aspect of its images but nearly.
  rows = min(rows, key=lambda rows: abs(math.log(rows * rows / count / aspect)), default=0)
  if not rows or (aspect == 1 and rows * rows != count):
    return None
  resized = resize_bicubic(jnp.asarray(cells).reshape(rows, count // rows, -1), grid)
  return np.asarray(resized).reshape(-1, cells.shape[-1])


def _module(model: nnx.Module, path: tuple) -> Any:
  for part in path:
    model = model[part] if isinstance(part, int) else getattr(model, part)
  return model


def convert(source: Source, target: str | os.PathLike, spec: Mapping[str, Any], num_classes: int | None) -> LoadReport:
  """Loads weights and writes them under the authors' names and in their layouts.

  Args:
    source: see `load_pretrained`.
    target: see `save_pretrained`.
    spec: `name` and `overrides` of the model, as in config.model.
    num_classes: None for what the weights have.

  Returns:
    What happened to every array.

  Raises:
    UserError: what `load_pretrained` and `save_pretrained` refuse.
  """
  model, report, about = load_anew(source, spec, num_classes)
  save_pretrained(model, target, about)
  return report


def load_anew(
  source: Source, spec: Mapping[str, Any], num_classes: int | None
) -> tuple[nnx.Module, LoadReport, dict[str, Any]]:
  """Returns a model that is made for weights, what happened to them, and what they are, see `redescribe`.

  Args:
    source, spec, num_classes: see `convert`.
  """
  registry.get_variant(spec["name"])
  weights, where = read_source(source, spec["name"], lambda: registry.abstract_model(spec, 0))
  saved_classes = count_classes(weights)
  if num_classes in (None, saved_classes):
    model = registry.abstract_model(spec, saved_classes)
  else:  # a new classifier needs initial values
    model = registry.create_model(spec["name"], num_classes=num_classes, rngs=nnx.Rngs(0), **spec["overrides"])
  report = fill(model, weights, where, aspect=aspect_of(source))
  num_classes = saved_classes if num_classes is None else num_classes
  return model, report, redescribe(source, where, spec, num_classes)


def redescribe(
  source: Source | None, origin: str, spec: Mapping[str, Any], num_classes: int, crop: float | None = None
) -> dict[str, Any]:
  """Returns the description of weights that are written anew: their classes are known where the source tells them.

  Args:
    source: see `load_pretrained`; None for random weights.
    origin: the source in words.
    spec, num_classes, crop: see `description.describe`.
  """
  known = read_description(source) or {}
  same = known if known.get("num_classes") == num_classes else {}
  names, multi_label = same.get("class_names"), same.get("multi_label", False)
  about = description.describe(spec, num_classes, names, crop or known.get("crop"), multi_label)
  if multi_label:
    about["thresholds"] = same.get("thresholds")
  return about | {"from": known.get("from", origin), "made_by": description.made_by()}


def save_pretrained(model: nnx.Module, path: str | os.PathLike, about: Mapping[str, Any] | None = None) -> None:
  """Writes a model's weights under the authors' names and in their layouts, with the buffers that their code expects.

  Args:
    model: any model of `create_model`.
    path: a new file, .safetensors or .pth (which needs PyTorch).
    about: see `description.describe`; goes into the metadata of a .safetensors file.

  Raises:
    UserError: the file exists, has another suffix, or cannot be written.
  """
  path = pathlib.Path(path)
  if path.suffix not in (".safetensors", ".pth"):
    raise UserError(f"weights cannot be written as {path.name}; name the file .safetensors or .pth")
  if path.exists():
    raise UserError(f"{path} exists and is not overwritten; choose another name")
  write_arrays(parameters(model) | _buffers(model), path, about)


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
  """Returns a model's parameters and statistics under the authors' names and in their layouts."""
  arrays = {}
  for where, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
    array = _to_torch_layout(where, np.asarray(variable.get_value()))
    arrays[_torch_name(where)] = np.ascontiguousarray(array)
  return arrays


def write_arrays(
  arrays: Mapping[str, np.ndarray], path: pathlib.Path, about: Mapping[str, Any] | None, kind: str = "np"
) -> None:
  """Writes a new .safetensors or .pth, as it is; `kind` is the library whose names the former says it has."""
  part = path.with_name(path.name + ".part")
  try:
    if path.suffix == ".safetensors":
      part.touch()
      mode = part.stat().st_mode  # as the umask has it; the library would have it private
      safetensors.numpy.save_file(arrays, part, {"format": kind} | ({METADATA: json.dumps(about)} if about else {}))
      part.chmod(mode)
    else:
      weight_files.save_torch(arrays, part)
    part.rename(path)
  except OSError as error:
    part.unlink(missing_ok=True)
    raise UserError(f"{path} cannot be written: {error.strerror or error}; choose another folder") from None


def _buffers(model: nnx.Module) -> dict[str, np.ndarray]:
  """Returns what the authors' state dicts hold besides parameters, so that their strict loading is content."""
  buffers = {}
  for path, module in nnx.iter_modules(model):
    name = ".".join(map(str, path))
    if isinstance(module, swin.WindowAttention):
      buffers[f"{name}.relative_position_index"] = swin.relative_position_index(module.window).astype(np.int64)
      if any(module.shift):
        seam = swin.seam_mask(module.grid, module.window, module.shift)
        buffers[f"{name.rpartition('.')[0]}.attn_mask"] = np.where(seam == 0, 0, -100).astype(np.float32)
    elif isinstance(module, nnx.BatchNorm):
      buffers[f"{name}.num_batches_tracked"] = np.zeros((), np.int64)
  return buffers
