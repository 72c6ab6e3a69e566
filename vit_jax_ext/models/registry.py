"""Names to models: every variant, its hyper-parameters and what was published about it, each fact once."""

from collections.abc import Mapping
import dataclasses
import difflib
import fnmatch
import inspect
import numbers
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from vit_jax_ext.errors import UserError
from vit_jax_ext.models.attention import IMPLEMENTATIONS
from vit_jax_ext.models.boat import BoatCSWin, BoatSwin
from vit_jax_ext.models.crossvit import CrossViT
from vit_jax_ext.models.cswin import CSWin
from vit_jax_ext.models.deepvit import DeepViT
from vit_jax_ext.models.layers import DepthwiseConv, Mlp, MultiHeadAttention
from vit_jax_ext.models.swin import Swin
from vit_jax_ext.models.vit import DistilledTransformer, VisionTransformer
from vit_jax_ext.rules import POSITIVE, RATE, SWITCH, TEXT, Rule, integer

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOKEN_PARAMS = ("pos_embed", "cls_token")  # what timm's no_weight_decay names


@dataclasses.dataclass(frozen=True)
class Variant:
  """A named model and its published facts.

  Attributes:
    model: the module class.
    kwargs: its hyper-parameters.
    image_size: side of the square images it was trained with, pixels.
    params: number of parameters with 1000 classes; None where nobody has published it.
    multiply_adds: published multiply-adds of one forward pass, in 10^9; None where none was published.
    top1: published ImageNet-1k accuracy, percent; None where none was published.
    url: address of the authors' released weights.
    hub: repository on the Hugging Face Hub that has the same weights as .safetensors, timm's: its name of the
      architecture, a dot, a tag.
    license: of these weights, as the Hub abbreviates it.
    mean, std: per-channel normalisation of images in [0, 1], the same at every size.
    crop: evaluation resizes the shorter side to image_size / crop and crops the centre.
    crops: side of the square images -> crop, where another one was published for another size; see `crop_at`.
    no_decay: parameter names that the authors' recipe excludes from weight decay, besides biases and norms.
  """

  model: type[nnx.Module]
  kwargs: dict[str, Any]
  image_size: int
  params: int | None = None
  multiply_adds: float | None = None
  top1: float | None = None
  url: str | None = None
  hub: str | None = None
  license: str | None = None
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD
  crop: float = 0.875
  crops: Mapping[int, float] = dataclasses.field(default_factory=dict)
  no_decay: tuple[str, ...] = ()

  def crop_at(self, image_size: tuple[int, int]) -> float:
    """Returns evaluation's crop at a (height, width): the one published for it, else that of the variant's own size."""
    height, width = image_size
    return self.crops.get(height, self.crop) if height == width else self.crop


def _published_crops(name: str) -> dict[int, float]:
  """Returns `Variant.crops` of DeiT, Swin and CSWin, where base alone was published at a second size."""
  return {384: 1.0} if "base" in name else {}


def _crossvit(name: str, params: int, multiply_adds: float, top1: float, dim: int, num_heads: int, depth: int,
              mlp_ratio: int, multi_conv: bool = False, image_size: int = 240):  # fmt: skip
  kwargs = dict(
    embed_dim=(dim, 2 * dim),
    num_heads=(num_heads, num_heads),
    depth=((1, depth),) * 3,
    mlp_ratio=(mlp_ratio, mlp_ratio),
    multi_conv=multi_conv,
  )
  url = f"https://github.com/IBM/CrossViT/releases/download/weights-0.1/{name}.pth"
  hub = f"timm/{name.rpartition('_')[0]}_{image_size}.in1k"
  # no_decay is empty: the authors' rule names `pos_embed` and `cls_token`, their parameters are called `pos_embed.0`,
  # so it never matched and both were decayed.
  # crop is 0.875 at 408 pixels too: the default of the authors' main.py (--crop-ratio 256 / 224), which names no other.
  # timm takes 1.0 there, and measures 83.842 and 84.198 with the released weights, 0.3 above what was published.
  return name, Variant(CrossViT, kwargs, image_size, params, multiply_adds, top1, url, hub, "apache-2.0")


def _deit(name: str, params: int, multiply_adds: float | None, top1: float, dim: int, num_heads: int, digest: str):
  kwargs = dict(embed_dim=dim, depth=12, num_heads=num_heads, mlp_ratio=4)
  # The authors' rule, that of timm 0.3.2, names no `dist_token`, and it was decayed.
  # At 384 pixels the released weights of base reach the paper's 83.1 with crop 1.0 (timm: 83.108); the 82.890 of
  # README_deit.md is with 0.875, the default of the authors' main.py.
  return name, Variant(
    DistilledTransformer if "distilled" in name else VisionTransformer,
    kwargs,
    224,
    params,
    multiply_adds,
    top1,
    url=f"https://dl.fbaipublicfiles.com/deit/{name}-{digest}.pth",
    hub=f"timm/{name}.fb_in1k",
    license="apache-2.0",
    crops=_published_crops(name),
    no_decay=TOKEN_PARAMS,
  )


def _deepvit_baseline(name: str, params: int, top1: float, depth: int):
  # The authors' `vit_base_patch16_224` with 16 blocks; the README gives the parameters rounded to 0.1 M.
  kwargs = dict(embed_dim=384, depth=depth, num_heads=12, mlp_ratio=3)
  return name, Variant(
    VisionTransformer, kwargs, 224, params, None, top1, mean=HALF, std=HALF, crop=0.9, no_decay=TOKEN_PARAMS
  )  # fmt: skip


def _deepvit(name: str, params: int, multiply_adds: float | None, top1: float, dim: int, depth: int,
             url: str | None = None, image_size: int = 224, **options):  # fmt: skip
  kwargs = dict(embed_dim=dim, depth=depth, num_heads=12, mlp_ratio=3, **options)
  # The file itself, where the authors' link leads to a page that shows it.
  url = url and f"https://drive.usercontent.google.com/download?id={url}&export=download&confirm=t"
  return name, Variant(
    DeepViT, kwargs, image_size, params, multiply_adds, top1, url,
    mean=HALF, std=HALF, crop=0.9 if image_size == 224 else 1.0, no_decay=TOKEN_PARAMS,
  )  # fmt: skip


# The s and l models. s scales the new maps by head_dim ** -0.5, l does not.
_DEEPVIT_S = dict(reattention_blocks=tuple(range(11, 16)), reatten_scale=None, scale_adjustment=0.5, conv_stem=True)
_DEEPVIT_L = dict(reattention_blocks=tuple(range(20, 32)), scale_adjustment=0.5, conv_stem=True)

_SWIN_SIZES = {
  "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
  "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
  "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
_CSWIN_SIZES = {
  "tiny": dict(embed_dim=64, depth=(1, 2, 21, 1), num_heads=(2, 4, 8, 16)),
  "small": dict(embed_dim=64, depth=(2, 4, 32, 2), num_heads=(2, 4, 8, 16)),
  "base": dict(embed_dim=96, depth=(2, 4, 32, 2), num_heads=(4, 8, 16, 32)),
}


def _swin(model: type[nnx.Module], name: str, params: int, multiply_adds: float, top1: float | None, url: str):
  size = name.rpartition("_")[2]
  hub = f"timm/swin_{size}_patch4_window7_224.ms_in1k" if model is Swin else None
  no_decay = ("relative_position_bias_table",)
  # At 384 pixels the authors squeeze the whole image into the square (TEST.CROP: False), which we cannot. 1.0 is what
  # timm takes, and measures 84.478 with; 84.5 was published.
  return name, Variant(
    model, _SWIN_SIZES[size], 224, params, multiply_adds, top1, url, hub, "mit" if hub else None,
    crops=_published_crops(name), no_decay=no_decay,
  )  # fmt: skip


def _cswin(model: type[nnx.Module], name: str, params: int, multiply_adds: float, top1: float | None, url: str):
  size = _CSWIN_SIZES[name.rpartition("_")[2]]
  # cswin_384 in the authors' models/cswin.py, which BOAT's copy has too: crop_pct 1.0.
  return name, Variant(model, size, 224, params, multiply_adds, top1, url, crop=0.9, crops=_published_crops(name))


_SWIN_URL = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_{}_patch4_window7_224.pth"
_CSWIN_URL = "https://github.com/microsoft/CSWin-Transformer/releases/download/v0.1.0/cswin_{}_224.pth"
# dl=1 answers with the file, where the authors' own dl=0 answers with a page.
_BOAT_URL = "https://www.dropbox.com/s/{}?dl=1"

VARIANTS: dict[str, Variant] = dict(
  [
    _crossvit("crossvit_tiny_224", 7_014_800, 1.6, 73.4, 96, 3, 4, 4),
    _crossvit("crossvit_small_224", 26_856_272, 5.6, 81.0, 192, 6, 4, 4),
    _crossvit("crossvit_base_224", 105_025_232, 21.2, 82.2, 384, 12, 4, 4),
    _crossvit("crossvit_9_224", 8_553_296, 1.8, 73.9, 128, 4, 3, 3),
    _crossvit("crossvit_15_224", 27_528_464, 5.8, 81.5, 192, 6, 5, 3),
    _crossvit("crossvit_18_224", 43_271_408, 9.0, 82.5, 224, 7, 6, 3),
    _crossvit("crossvit_9_dagger_224", 8_776_592, 2.0, 77.1, 128, 4, 3, 3, True),
    _crossvit("crossvit_15_dagger_224", 28_209_008, 6.1, 82.3, 192, 6, 5, 3, True),
    _crossvit("crossvit_18_dagger_224", 44_266_976, 9.5, 82.8, 224, 7, 6, 3, True),
    _crossvit("crossvit_15_dagger_384", 28_500_080, 21.4, 83.5, 192, 6, 5, 3, True, 408),
    _crossvit("crossvit_18_dagger_384", 44_606_560, 32.4, 83.9, 224, 7, 6, 3, True, 408),
    _deit("deit_tiny_patch16_224", 5_717_416, 1.3, 72.2, 192, 3, "a1311bcf"),
    _deit("deit_small_patch16_224", 22_050_664, 4.6, 79.8, 384, 6, "cd65a155"),
    _deit("deit_base_patch16_224", 86_567_656, 17.6, 81.8, 768, 12, "b5f2ef4d"),
    _deit("deit_tiny_distilled_patch16_224", 5_910_800, None, 74.5, 192, 3, "b40b3cf7"),
    _deit("deit_small_distilled_patch16_224", 22_436_432, None, 81.2, 384, 6, "649709d9"),
    _deit("deit_base_distilled_patch16_224", 87_338_192, None, 83.4, 768, 12, "df68dfff"),
    _deepvit_baseline("vit_16b", 24_423_784, 78.88, 16),
    _deepvit_baseline("vit_24b", 36_257_128, 79.35, 24),
    _deepvit_baseline("vit_32b", 48_090_472, 79.27, 32),
    _deepvit("deepvit_16b", 24_426_664, 5.3, 79.10, 384, 16),
    _deepvit("deepvit_24b", 36_261_448, 7.9, 79.99, 384, 24, "1lPmKdNMPJq-mq-4FivqIY4JNAPoQHYxV"),
    _deepvit("deepvit_32b", 48_096_232, 10.5, 80.90, 384, 32, "1kUBrAbAQfMT5FQJprITRxDtOE6ECZM0M"),
    _deepvit("deepvit_s", 27_312_632, 6.4, 82.3, 396, 16, "1evhBjla4Nth7LawW2PAXnGEcpv3YBWEC", **_DEEPVIT_S),
    _deepvit("deepvit_l", 58_883_708, 13.2, 83.1, 420, 32, "1MTRm0NK_sPGRSyuD_hHJ1Zgw2diEaKLR", **_DEEPVIT_L),
    _deepvit("deepvit_l_384", 59_043_308, None, 84.25, 420, 32, image_size=384, **_DEEPVIT_L),
    _swin(Swin, "swin_tiny", 28_288_354, 4.5, 81.2, _SWIN_URL.format("tiny")),
    _swin(Swin, "swin_small", 49_606_258, 8.7, 83.2, _SWIN_URL.format("small")),
    _swin(Swin, "swin_base", 87_768_224, 15.4, 83.5, _SWIN_URL.format("base")),
    _swin(BoatSwin, "boat_swin_tiny", 30_265_186, 5.2, None, _BOAT_URL.format("xa94uewsrvjglnn/tiny.pth")),
    _swin(BoatSwin, "boat_swin_small", 55_158_898, 10.2, None, _BOAT_URL.format("7ih1zvii3bvdcgd/small.pth")),
    _swin(BoatSwin, "boat_swin_base", 97_612_960, 18.0, None, _BOAT_URL.format("70hr7h0smcr0gr9/base.pth")),
    _cswin(CSWin, "cswin_tiny", 22_320_552, 4.3, 82.8, _CSWIN_URL.format("tiny")),
    _cswin(CSWin, "cswin_small", 34_643_304, 6.9, 83.6, _CSWIN_URL.format("small")),
    _cswin(CSWin, "cswin_base", 77_382_184, 15.0, 84.2, _CSWIN_URL.format("base")),
    _cswin(BoatCSWin, "boat_cswin_tiny", 26_390_952, 5.2, None, _BOAT_URL.format("rsmtu6r0v2lt0y5/cswin_tiny.pth.tar")),
    _cswin(
      BoatCSWin, "boat_cswin_small", 40_112_488, 8.0, None, _BOAT_URL.format("cnl00d1faxxoi19/cswin_small.pth.tar")
    ),
    _cswin(
      BoatCSWin, "boat_cswin_base", 89_628_712, 17.6, None, _BOAT_URL.format("92sr8r8zhng1mqg/cswin_base.pth.tar")
    ),
  ]
)


PUBLISHED = frozenset(VARIANTS)


def register_model(name: str, variant: Variant) -> None:
  """Makes a model of your own known to `create_model`, configs and commands, as long as this process runs.

  Given again, the name means the new one.

  Args:
    name: as config.model.name has it.
    variant: its class, of which README says what it has to take and return, and hyper-parameters.

  Raises:
    UserError: the name is that of a published model.
  """
  if name in PUBLISHED:
    raise UserError(f"model {name!r} is a published one; choose another name")
  VARIANTS[name] = variant


def list_models(pattern: str = "*") -> list[str]:
  """Returns the names that `create_model` knows, sorted: those that match a pattern such as "swin*"."""
  return sorted(fnmatch.filter(VARIANTS, pattern))


def get_variant(name: str) -> Variant:
  """Returns a variant's hyper-parameters and published facts.

  Raises:
    UserError: the name is unknown; offers the nearest ones.
  """
  if name not in VARIANTS:
    nearest = difflib.get_close_matches(str(name), VARIANTS, n=3, cutoff=0.4)
    remedy = f"did you mean {', '.join(nearest)}?" if nearest else "see vit_jax_ext.list_models()"
    raise UserError(f"model {name!r} is unknown; {remedy}")
  return VARIANTS[name]


def _float_dtype(argument: str, value: Any) -> jnp.dtype:
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = None
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    raise UserError(f"{argument} {value!r} is no floating-point type; choose bfloat16, float32 or float64")
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise UserError(f'{argument} {dtype} would silently be float32; call jax.config.update("jax_enable_x64", True)')
  return dtype


def _options(model: type[nnx.Module]) -> dict[str, Any]:
  """Returns the keyword arguments of a model's class, and of its bases: name -> default."""
  options = {}
  for cls in reversed(model.__mro__):
    parameters = inspect.signature(cls.__init__).parameters.values()
    options |= {
      parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY
    }
  return options


def hyperparameters(spec: Mapping[str, Any]) -> dict[str, Any]:
  """Returns all keyword arguments of a model's class: the spec's overrides, else the variant's, else its defaults.

  Args:
    spec: `name` and `overrides` of the model, as in config.model.
  """
  variant = get_variant(spec["name"])
  return _options(variant.model) | variant.kwargs | dict(spec["overrides"])


# What an option may be; where a variant has a list, it is a list. Names are checked where they are looked up, and
# other options of a class from outside by itself.
_RULES = {
  "num_classes": integer(0),
  "image_size": integer(1),
  "patch_size": integer(1),
  "embed_dim": integer(1),
  "depth": integer(1),
  "depths": integer(1),
  "num_heads": integer(1),
  "mlp_ratio": POSITIVE,
  "window_size": integer(1),
  "split_size": integer(1),
  "drop_rate": RATE,
  "attn_drop_rate": RATE,
  "drop_path_rate": RATE,
  "remat": SWITCH,
  "multi_conv": SWITCH,
  "conv_stem": SWITCH,
  "fusion": TEXT,
  "reattention_blocks": integer(0, nesting=1, empty=True, optional=True),
  "reattention_norm": TEXT,
  "reatten_scale": Rule(optional=True),
  "scale_adjustment": Rule(),
  "statistics_batch": integer(1, optional=True),
  "local_attention": TEXT,
  "clustering": TEXT,
  "overlap": integer(0),
  "iterations": integer(0),
  "cluster_size": integer(1),
}


def _check_options(variant: Variant, options: Mapping[str, Any]) -> None:
  """Raises UserError unless each option is of the type, nesting and range that its class takes."""
  for name, value in options.items():
    if name not in _RULES:
      continue
    rule, usual = _RULES[name], variant.kwargs.get(name, _options(variant.model)[name])
    if isinstance(usual, tuple):  # CrossViT has two branches
      length = 2 if issubclass(variant.model, CrossViT) else None
      rule = dataclasses.replace(rule, nesting=1 + isinstance(usual[0], tuple), length=length)
    rule.check(f"{name} ", value)


class _ParamKeys:
  """The keys that `rngs.params()` would give, one after another, counted in Python.

  Flax's own counter is a variable, and setting one while tracing searches all that was traced so far: under eval_shape
  or jit the creation of a deep model would take quadratic time, seconds instead of tenths.
  """

  def __init__(self, rngs: nnx.Rngs):
    self._stream = rngs["params"]
    self._key, self._first, self._drawn = self._stream.key[...], self._stream.count[...], 0

  def params(self) -> jax.Array:
    key = jax.random.fold_in(self._key, self._first + self._drawn)
    self._drawn += 1
    return key

  def advance_stream(self) -> None:
    """Leaves the caller's `rngs` as if it had drawn the keys itself."""
    self._stream.count[...] += self._drawn


def create_model(
  name: str,
  *,
  rngs: nnx.Rngs,
  num_classes: int = 1000,
  image_size: int | tuple[int, int] | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
  attention: str = "auto",
  **overrides,
) -> nnx.Module:
  """Creates a model by name.

  Args:
    name: one of `list_models()`.
    rngs: draws the initial parameters.
    num_classes: 0 for pooled features instead of logits.
    image_size: side or (height, width) in pixels; None for the variant's own.
    dtype: of the computation; softmax and statistics are at least float32.
    param_dtype: of the parameters.
    attention: what computes it, one of `models.attention.IMPLEMENTATIONS`; auto: the fastest of the platform.
    **overrides: keyword arguments of the model's class, e.g. `drop_path_rate=0.1` or `embed_dim=(32, 64)`.

  Returns:
    A module: `logits, out = model(images, train=False)`, images (B, H, W, 3) normalised. It keeps `name` as `variant`.

  Raises:
    UserError: unknown name or keyword, or values that do not fit together.
  """
  variant = get_variant(name)
  known = _options(variant.model)
  for key in overrides:
    if key not in known:
      raise UserError(f"{name} has no option {key!r}; it has {', '.join(sorted(known))}")
  _RULES["num_classes"].check("num_classes ", num_classes, "0: pooled features")
  _check_options(variant, overrides)
  if attention not in IMPLEMENTATIONS:
    raise UserError(f"attention {attention!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
  size = variant.image_size if image_size is None else image_size
  sizes = (size, size) if isinstance(size, numbers.Integral) else size
  dataclasses.replace(_RULES["image_size"], nesting=1, length=2).check("image_size ", sizes, "height and width")
  if not isinstance(rngs, nnx.Rngs):
    raise UserError(f"rngs {rngs!r} is of type {type(rngs).__name__}; give flax.nnx.Rngs(SEED)")
  keys = _ParamKeys(rngs)
  model = variant.model(
    **(variant.kwargs | overrides),
    num_classes=num_classes,
    image_size=tuple(sizes),
    dtype=_float_dtype("dtype", dtype),
    param_dtype=_float_dtype("param_dtype", param_dtype),
    rngs=keys,
  )
  keys.advance_stream()
  model.variant = name
  choose_attention(model, attention)
  return model


def choose_attention(model: nnx.Module, attention: str) -> None:
  """Has a model's attention, and what else has kernels, done as `attention` says, of `attention.IMPLEMENTATIONS`."""
  for _, module in nnx.iter_modules(model):
    if isinstance(module, MultiHeadAttention | DepthwiseConv | Mlp):
      module.implementation = attention


def abstract_model(spec: Mapping[str, Any], num_classes: int) -> nnx.Module:
  """Returns a model without arrays, of shapes only, from `name` and `overrides` of an experiment's config.model."""
  return nnx.eval_shape(
    lambda: create_model(spec["name"], num_classes=num_classes, rngs=nnx.Rngs(0), **spec["overrides"])
  )
