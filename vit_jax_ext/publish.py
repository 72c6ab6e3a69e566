"""A model as a folder that timm loads, with a card: config.json, model.safetensors, README.md; and on the Hub."""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
import pathlib
import tempfile
from typing import Any

from flax import nnx

from vit_jax_ext import hub, weight_names
from vit_jax_ext.errors import UserError
from vit_jax_ext.files import check_new_file, replace, write_json
from vit_jax_ext.models import registry
from vit_jax_ext.models.crossvit import CrossViT
from vit_jax_ext.models.swin import Swin
from vit_jax_ext.models.vit import DistilledTransformer, VisionTransformer
from vit_jax_ext.pretrained import LoadReport, Source, load_anew, parameters, workdir_of, write_arrays
from vit_jax_ext.workdir import description
from vit_jax_ext.workdir.metrics import read_metrics

CONFIG, CARD = "config.json", "README.md"
WEIGHTS = hub.FILES[0]
OPTION = "to=timm FOLDER"  # what another one is to be chosen for where files cannot be written


def _vit(options: Mapping[str, Any], model: nnx.Module) -> dict[str, Any]:
  if not options.get("dist_head", True):
    raise UserError("timm's distilled DeiT has two heads; convert to .safetensors without --to")
  return {key: options[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}


def _crossvit(options: Mapping[str, Any], model: CrossViT) -> dict[str, Any]:
  if options["fusion"] != "cross_attention":
    raise UserError(f"timm's CrossViT has no fusion={options['fusion']}; convert to .safetensors without --to")
  shared = {key: options[key] for key in ("patch_size", "embed_dim", "num_heads", "multi_conv")}
  return shared | {
    "img_scale": [1.0, _scale(*model.sizes)],
    "depth": [[*depth, 0] for depth in options["depth"]],  # no blocks after the fusion
    "mlp_ratio": [*options["mlp_ratio"], 1],  # the fusion has no MLP
  }


def _scale(small: tuple[int, int], large: tuple[int, int]) -> float:
  """Returns the one factor by which timm brings images from the first branch's size to the second's, rounding down."""
  scale = max(b / a for a, b in zip(small, large, strict=True))
  scale = scale if int(small[0] * scale) == large[0] else math.nextafter(scale, math.inf)
  if tuple(int(side * scale) for side in small) != large:
    raise UserError(
      f"timm's CrossViT resizes both sides by one factor, and {small} to {large} takes two; choose a square image_size"
    )
  return scale


def _swin(options: Mapping[str, Any], model: Swin) -> dict[str, Any]:
  windows = [stage.blocks[0].attn.window for stage in model.layers]
  if any(height != width for height, width in windows):
    raise UserError(
      f"the windows of {model.variant} at image_size={model.image_size} are {windows}, and timm resizes those that are "
      "no squares; choose a square image_size"
    )
  largest = max(windows)[0]  # timm has no larger ones than the stage's grid
  same = all(min(largest, *grid) == window[0] for grid, window in zip(model.grids, windows, strict=True))
  return {key: options[key] for key in ("patch_size", "embed_dim", "depths", "num_heads", "mlp_ratio")} | {
    "window_size": largest if same else [[*window] for window in windows]
  }


@dataclasses.dataclass(frozen=True)
class Family:
  """What timm has to know of a class of models.

  Attributes:
    arguments: (hyper-parameters, model) -> arguments of timm's class, but for the size of images.
    first_convolutions, classifiers: names of its modules, which timm changes for other images and classes.
    architecture: its name for variants that it does not have.
  """

  arguments: Callable[[Mapping[str, Any], nnx.Module], dict[str, Any]]
  first_convolutions: tuple[str, ...]
  classifiers: tuple[str, ...]
  architecture: str | None = None


FAMILIES = {
  CrossViT: Family(_crossvit, ("patch_embed.0.proj", "patch_embed.1.proj"), ("head.0", "head.1")),
  VisionTransformer: Family(_vit, ("patch_embed.proj",), ("head",), "vit_small_patch16_224"),
  DistilledTransformer: Family(_vit, ("patch_embed.proj",), ("head", "head_dist")),
  Swin: Family(_swin, ("patch_embed.proj",), ("head.fc",)),
}


def write_folder(
  source: Source,
  folder: str | os.PathLike,
  spec: Mapping[str, Any],
  num_classes: int | None,
  *,
  license: str | None = None,
  repository: str | None = None,
) -> LoadReport:
  """Writes config.json, model.safetensors and README.md, which `timm.create_model("local-dir:FOLDER")` loads.

  Args:
    source, spec, num_classes: see `pretrained.convert`.
    folder: where; made if needed.
    license: of the weights, as the Hub abbreviates it; None: that of published weights, else none is named.
    repository: that it is for; None if it stays a folder.

  Returns:
    What happened to every array.

  Raises:
    UserError: an architecture or options that timm does not have, files that exist, an unwritable folder; weights that
      do not fit.
  """
  variant = registry.get_variant(spec["name"])
  if variant.model not in FAMILIES:
    able = [name for name, other in registry.VARIANTS.items() if other.model in FAMILIES]
    raise UserError(f"timm has no {spec['name']}; it has {', '.join(able)}; convert to .safetensors without --to")
  folder = pathlib.Path(folder)
  for name in (CONFIG, CARD, WEIGHTS):
    if (folder / name).exists():
      raise UserError(f"{folder / name} exists and is not overwritten; choose another folder")
    check_new_file(os.fspath(folder / name), OPTION)
  model, report, about = load_anew(source, spec, num_classes)
  license = license or (variant.license if source is True else None)
  config = timm_config(model, spec, about, license)
  arrays = weight_names.to_timm(parameters(model))
  write_json(os.fspath(folder), CONFIG, config, OPTION)
  card = _card(source, report, about, config, license, repository or os.fspath(folder), repository is not None)
  with replace(os.fspath(folder), CARD, OPTION) as file:
    file.write(card)
  write_arrays(arrays, folder / WEIGHTS, about, kind="pt")
  return report


def publish(
  source: Source, repository: str, spec: Mapping[str, Any], num_classes: int | None, *, license: str | None = None
) -> tuple[LoadReport, str]:
  """Uploads what `write_folder` writes to OWNER/NAME on the Hub; returns its report and the repository's address.

  Raises:
    UserError: what `write_folder` and `hub.upload` refuse.
  """
  hub.check_name(repository)
  with tempfile.TemporaryDirectory() as folder:
    report = write_folder(source, folder, spec, num_classes, license=license, repository=repository)
    return report, hub.upload(pathlib.Path(folder), repository)


def timm_config(
  model: nnx.Module, spec: Mapping[str, Any], about: Mapping[str, Any], license: str | None
) -> dict[str, Any]:
  """Returns the content of config.json: the architecture with all its arguments, and how images are prepared."""
  variant = registry.get_variant(spec["name"])
  family, options = FAMILIES[variant.model], registry.hyperparameters(spec)
  suffix = ".0" if options.get("multi_conv") else ""
  config = {
    "architecture": variant.hub.removeprefix("timm/").partition(".")[0] if variant.hub else family.architecture,
    "num_classes": about["num_classes"],
    "model_args": {"img_size": [*model.image_size]} | family.arguments(options, model),
    "pretrained_cfg": {
      "custom_load": False,
      "input_size": [3, *model.image_size],
      "fixed_input_size": True,
      "interpolation": "bicubic",
      "crop_pct": about["crop"],
      "crop_mode": "center",
      "mean": about["mean"],
      "std": about["std"],
      "num_classes": about["num_classes"],
      "pool_size": None,
      "first_conv": [name + suffix for name in family.first_convolutions],
      "classifier": [*family.classifiers],
    },
  }
  if license:
    config["pretrained_cfg"]["license"] = license
  if about["class_names"]:
    config["label_names"] = about["class_names"]
  return config


def _card(
  source: Source,
  report: LoadReport,
  about: Mapping[str, Any],
  config: Mapping[str, Any],
  license: str | None,
  place: str,
  uploaded: bool,
) -> str:
  """Returns the text of README.md, which the Hub shows; its head is YAML."""
  height, width = about["image_size"]
  options = "".join(f", {key}={value!r}" for key, value in about["overrides"].items())
  theirs, ours = (f"hf-hub:{place}", f"hf://{place}") if uploaded else (f"local-dir:{place}", place)
  arrays = f"{len(report.loaded)} arrays, {len(report.resized)} resized, {len(report.reinitialized)} not trained"
  return f"""---
library_name: timm
{f"license: {license}" if license else "# license: say it here, before others use the weights"}
pipeline_tag: image-classification
tags: [image-classification, timm, vit_jax_ext]
---
# {about["model"]}

{about["num_classes"]} classes, images of {height}x{width} pixels. Weights: {about["from"]}; {arrays}.
Written by vit_jax_ext {about["made_by"]["versions"]["vit_jax_ext"]} on {about["made_by"]["time"][:10]}.

## Data and accuracy

{_accuracy(source, about)}

Evaluation resizes images bicubically so that {height}x{width} is the central {about["crop"]:g}, cuts that out, and
normalises it, in [0, 1], with mean {about["mean"]} and standard deviation {about["std"]}.

## Use

With timm, where the architecture is called {config["architecture"]}:

```python
import timm

model = timm.create_model({theirs!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0))  # a PIL image
```

With vit_jax_ext:

```python
from flax import nnx
import vit_jax_ext as vx

model = vx.create_model({about["model"]!r}, num_classes={about["num_classes"]}{options}, rngs=nnx.Rngs(0))
vx.load_pretrained(model, {ours!r})
logits, _ = model(vx.preprocess("image.png", model))
```

## License

{license or "Not named yet: whoever passes the weights on names it here and above. It depends on the data too."}
"""


def _accuracy(source: Source, about: Mapping[str, Any]) -> str:
  """Returns what the weights were trained on and how good they are, as far as the source tells."""
  if source is True:
    top1 = registry.get_variant(about["model"]).top1
    return f"ImageNet-1k; the paper's top-1 accuracy is {top1}%. Not measured anew."
  workdir = workdir_of(source) if isinstance(source, (str, os.PathLike)) else None
  run = workdir and description.read(workdir)
  if not run or not run.get("starts"):
    return "Not recorded with the weights: say here what they were trained on, and how they were measured."
  data = run["starts"][-1]
  lines = [f"Trained by vit_jax_ext on {data['dataset']} {data.get('dataset_version', '')}".rstrip() + "."]
  prefix = "eval_ema/" if about["from"].endswith(", ema") else "eval/"
  for row in read_metrics(workdir):
    if f", step {row['step']}, " in about["from"] and f"{prefix}top1" in row:
      scores = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
      lines += ["", "| measured on its evaluation split | |", "|---|---|"]
      lines += [f"| {name} | {value:.4g} |" for name, value in scores.items()]
  return "\n".join(lines)
