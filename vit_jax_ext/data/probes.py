"""Three generated tasks, each of which needs the one ability that a paper claims for its architecture.

`scales` needs a coarse and a fine fact together (CrossViT), `twins` a comparison across the image (BOAT), `chains`
steps of which each needs the one before (DeepViT). An image is a function of seed, split and index alone.
docs/probes.md says why the obvious shortcuts fail, and shows samples.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools

import numpy as np
import tensorflow_datasets as tfds

from vit_jax_ext.errors import UserError

Level = tuple[int, ...]  # what turns the difficulty; its meaning is each probe's
Drawn = tuple[np.ndarray, np.ndarray]  # images, uint8 (n, 32, 32, channels); labels, int (n,)

SIDE = 32  # pixels
TILE, TILES = 8, 4  # chains and twins: side of a tile in pixels, tiles along a side
BLANK = 0.5  # grey where no tile lies
CELL, CELLS = 4, 8  # scales: the same of its cells

SIZES = {"train": 30_000, "validation": 2000}
TESTED = 2000  # images of each level
CHUNK = 1000  # images that are drawn together


def _mosaics(seed: int, count: int, rows: int) -> np.ndarray:
  """Returns symbols, (count, rows, TILE, 3) in [0, 1]: blocks of 2x2 pixels, each of one of eight colours."""
  blocks = np.random.default_rng(seed).random((count, rows // 2, TILE // 2, 3)) < 0.5
  return np.kron(0.1 + 0.8 * blocks, np.ones((1, 2, 2, 1)))


def _lay(tiles: np.ndarray, shown: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Returns images of tiles, (n, tiles, TILE, TILE, 3) in [0, 1], at random places: those of the smallest `order`."""
  places = np.argsort(order, axis=1)[:, : tiles.shape[1]]
  canvas = np.full((len(tiles), TILES**2, TILE, TILE, 3), BLANK)
  np.put_along_axis(canvas, places[..., None, None, None], np.where(shown[..., None, None, None], tiles, BLANK), axis=1)
  canvas = canvas.reshape(-1, TILES, TILES, TILE, TILE, 3).swapaxes(2, 3).reshape(-1, SIDE, SIDE, 3)
  return np.round(255 * canvas).astype(np.uint8)


def _split(u: np.ndarray, *shapes: tuple[int, ...]) -> list[np.ndarray]:
  """Cuts each image's numbers into arrays of the shapes."""
  ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
  parts = np.split(u[:, : ends[-1]], ends[:-1], axis=1)
  return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


# Coarse fact: stripes of bright and dark cells lie upright or across. Their sign is random, each cell's brightness
# noisy. Fine fact: the texture in all cells leans left or right. Its mean over a cell is nothing, its phase random.
SCALES_CLASSES = ("upright, left", "upright, right", "across, left", "across, right")
COARSE, FINE, CELL_NOISE, PIXEL_NOISE = 0.15, 0.12, 0.2, 0.2
SCALES_SHAPES = ((1, 1), (1, 1), (1, 1), (CELLS, CELLS), (CELLS, CELLS), (SIDE, SIDE))


def draw_scales(u: np.ndarray, levels: np.ndarray) -> Drawn:
  """Level: (coarse wavelength in cells, which is its ratio to the fine one; percentage that begins with bright)."""
  across, right, sign, cells, phases, pixels = _split(u, *SCALES_SHAPES)
  across, right = across < 0.5, right < 0.5
  period = levels[:, :1, None]
  bright = sign < levels[:, 1:, None] / 100
  stripes = np.where((np.arange(CELLS) % period < period / 2) == bright, COARSE, -COARSE)
  cells = np.where(across, stripes.swapaxes(1, 2), stripes) + CELL_NOISE * (cells - 0.5)
  row, column = np.indices((SIDE, SIDE))
  phases = np.floor(CELL * phases)
  cells, phases = (values.repeat(CELL, axis=1).repeat(CELL, axis=2) for values in (cells, phases))
  ridge = (np.where(right, row + column, row - column) + phases) % CELL < CELL / 2
  images = 0.5 + cells + np.where(ridge, FINE, -FINE) + PIXEL_NOISE * (pixels - 0.5)
  return np.round(255 * images.clip(0, 1)).astype(np.uint8)[..., None], (2 * across + right).ravel()


# A tile is a texture under a bar. The bar in one corner is white; one other tile has the texture of that one: which
# colour is its bar? No other textures are equal. With 4, 8 or 12 coloured bars the colours are equally frequent. All of
# them keep the same distance from the white one, so that no place is likelier for the twin than for the others.
TWINS_CLASSES = ("red", "green", "blue", "yellow")
BARS = np.array([[1, 1, 1], [0.9, 0.1, 0.1], [0.1, 0.7, 0.1], [0.2, 0.2, 1], [0.9, 0.9, 0.1]])  # white, and the classes
TEXTURES = _mosaics(1, 12, TILE - 2)
TWINS_SHAPES = ((1,), (TILES**2,), (len(TEXTURES),), (len(BARS) - 1,))
ROW, COLUMN = np.divmod(np.arange(TILES**2), TILES)
CORNERS = np.array([0, TILES - 1, TILES * (TILES - 1), TILES**2 - 1])
AWAY = np.maximum(
  abs(ROW - ROW[CORNERS, None]), abs(COLUMN - COLUMN[CORNERS, None])
)  # of places from corners, in tiles


def draw_twins(u: np.ndarray, levels: np.ndarray) -> Drawn:
  """Level: (least distance from the white tile along rows or columns, in tiles; tiles besides the twins)."""
  corner, order, textures, colours = _split(u, *TWINS_SHAPES)
  away = AWAY[np.floor(len(CORNERS) * corner[:, 0]).astype(int)]
  order = np.where(away == 0, -1, order + (away < levels[:, :1]))
  textures = np.argsort(textures, axis=1)
  textures = np.concatenate([textures[:, :1], textures], axis=1)
  colours = 1 + np.argsort(colours, axis=1)
  bars = np.concatenate([np.zeros_like(colours[:, :1]), *[colours] * (len(TEXTURES) // colours.shape[1])], axis=1)
  above = np.broadcast_to(BARS[bars][:, :, None, None], (*bars.shape, 2, TILE, 3))
  tiles = np.concatenate([above, TEXTURES[textures]], axis=2)
  return _lay(tiles, np.arange(tiles.shape[1]) < 2 + levels[:, 1:], order), colours[:, 0] - 1


# A tile has two symbols; the lower one is the upper one of the next tile in its chain. Chains begin under black, one of
# them under white: in which of four symbols does that one end?
CHAINS = 4
LINKS = 3  # at most
CHAINS_CLASSES = ("A", "B", "C", "D")
SYMBOLS = _mosaics(2, CHAINS * (LINKS + 1), TILE // 2).reshape(LINKS + 1, CHAINS, TILE // 2, TILE, 3)
CHAINS_SHAPES = ((TILES**2,), (LINKS + 1, CHAINS))


def draw_chains(u: np.ndarray, levels: np.ndarray) -> Drawn:
  """Level: (steps from the start to the end, chains). The symbols after l steps are row l - 1, at an end the last."""
  order, symbols = _split(u, *CHAINS_SHAPES)
  symbols = np.argsort(symbols, axis=2)
  steps, chains = levels[:, :1, None], levels[:, 1:, None]
  step, chain = np.indices((LINKS + 1, CHAINS))
  begin = np.zeros((len(u), 1, CHAINS, *SYMBOLS.shape[2:]))
  begin[:, :, 0] = 1
  links = SYMBOLS[np.arange(LINKS + 1)[:, None], symbols]
  ends = np.where((step == steps)[..., None, None, None], links[:, -1:], links)
  tiles = np.concatenate([np.concatenate([begin, links[:, :-1]], axis=1), ends], axis=3)
  shown = (step <= steps) & (chain < chains)
  return _lay(tiles.reshape(len(u), -1, TILE, TILE, 3), shown.reshape(len(u), -1), order), symbols[:, -1, 0]


@dataclasses.dataclass(frozen=True)
class Probe:
  """A task.

  Attributes:
    title: the question that an image asks.
    class_names: the answers.
    draw: uniform numbers, float32 (n, `numbers`), and levels, int (n, parameters), to images and labels.
    shapes: of what `draw` cuts the numbers into.
    channels: of the images.
    turned_by: what a level is.
    levels: name -> level, from easy to hard: of validation, drawn at random, and of the splits test_NAME.
    ramp: those of the training split. Some are so easy that a shortcut helps; what it teaches is a start. Those of
      `twins` are all easier than what is tested: with harder ones among them BOAT-Swin learned nothing (docs/log.md).
  """

  title: str
  class_names: Sequence[str]
  draw: Callable[[np.ndarray, np.ndarray], Drawn]
  shapes: Sequence[tuple[int, ...]]
  channels: int
  turned_by: str
  levels: Mapping[str, Level]
  ramp: Sequence[Level]

  def levels_of(self, split: str) -> np.ndarray:
    """Returns the levels that a split mixes, (levels, parameters).

    Raises:
      UserError: there is no such split.
    """
    if split in SIZES:
      return np.array(self.ramp if split == "train" else [*self.levels.values()])
    name = split.removeprefix("test_")
    if name not in self.levels or split == name:
      raise UserError(f"difficulty {name!r} is out of range ({self.turned_by}); choose one of {', '.join(self.levels)}")
    return np.array([self.levels[name]])


PROBES = {
  "scales": Probe(
    "Do the stripes lie across or upright, and does the texture lean left or right?", SCALES_CLASSES, draw_scales,
    SCALES_SHAPES, 1, "ratio of the coarse to the fine wavelength",
    levels={str(ratio): (ratio, 50) for ratio in (2, 4, 8)},
    ramp=[*itertools.product((2, 4, 8), (50, 75, 100))],
  ),
  "twins": Probe(
    "Which colour has the tile whose texture is that of the white one?", TWINS_CLASSES, draw_twins,
    TWINS_SHAPES, 3, "distance from the white tile x tiles besides the twins",
    levels={f"{far}x{others}": (far, others) for far, others in ((1, 3), (2, 3), (3, 3), (1, 7), (2, 7), (2, 11))},
    ramp=[*itertools.product((1, 2, 3), (1, 2))],
  ),
  "chains": Probe(
    "Where does the chain end that begins under white?", CHAINS_CLASSES, draw_chains,
    CHAINS_SHAPES, 3, "steps to follow",
    levels={str(steps): (steps, CHAINS) for steps in range(1, LINKS + 1)},
    ramp=[*itertools.product(range(1, LINKS + 1), range(1, CHAINS + 1))],
  ),
}  # fmt: skip


def generate(name: str, split: str, indices: Sequence[int], seed: int = 0) -> Drawn:
  """Returns images of a probe, uint8 (n, 32, 32, channels), and their labels, int64 (n,).

  Image i is the same whichever others are drawn with it.

  Args:
    name: of PROBES.
    split: train, validation or test_LEVEL.
    indices: below 2**64.
    seed: of the whole dataset, below 2**60.

  Raises:
    UserError: an unknown probe, or a difficulty out of range.
  """
  if name not in PROBES:
    raise UserError(f"probe {name!r} is unknown; choose one of {', '.join(PROBES)}")
  probe = PROBES[name]
  levels = probe.levels_of(split)
  number = [*SIZES, *(f"test_{level}" for level in probe.levels)].index(split)
  count = 1 + sum(np.prod(shape, dtype=int) for shape in probe.shapes)
  u = np.stack([_uniform(16 * seed + number, index, count) for index in indices])
  images, labels = probe.draw(u[:, 1:], levels[np.floor(len(levels) * u[:, 0]).astype(int)])
  return images, labels.astype(np.int64)


def _uniform(stream: int, index: int, count: int) -> np.ndarray:
  """Returns the numbers of one image: Philox counts, so any (stream, index) is as good a key as any other."""
  return np.random.Generator(np.random.Philox(key=np.array([stream, index], np.uint64))).random(count, np.float32)


class Probes(tfds.core.GeneratorBasedBuilder):
  """The probes as datasets: probes/scales, probes/twins, probes/chains. Preparing them needs no network."""

  VERSION = tfds.core.Version("1.1.0")  # 1.0.0 trained twins with up to 11 other tiles
  BUILDER_CONFIGS = [  # noqa: RUF012, TFDS's own name
    tfds.core.BuilderConfig(name=name, description=f"{probe.title} Turned by: {probe.turned_by}.")
    for name, probe in PROBES.items()
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    probe = PROBES[self.builder_config.name]
    return self.dataset_info_from_configs(
      description="Generated images that ask for one ability of a vision transformer.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(SIDE, SIDE, probe.channels), encoding_format="png"),
          "label": tfds.features.ClassLabel(names=list(probe.class_names)),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    levels = PROBES[self.builder_config.name].levels
    sizes = SIZES | {f"test_{level}": TESTED for level in levels}
    return {split: self._generate_examples(split, size) for split, size in sizes.items()}

  def _generate_examples(self, split: str, size: int):
    for start in range(0, size, CHUNK):
      images, labels = generate(self.builder_config.name, split, range(start, min(start + CHUNK, size)))
      for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True), start):
        yield i, {"image": image, "label": label}
