"""Charts as geometry in pixels; report.html.jinja draws them."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

WIDTH, HEIGHT = 380, 290
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 28, 44  # margins around the axes
FONT = 13  # on a phone; less on wider screens
MARKED = 30  # points of a line, at most, that get a marker
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def plain(value: float) -> str:
  """Writes a number without exponent, to four digits at least."""
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclasses.dataclass
class Series:
  """What belongs together in a chart.

  Attributes:
    label: its name, in legends and beside points.
    family: chooses colour and marker, by CSS class.
    points: (x, y).
    dash: number of the series among those of its family, chooses the dashes of its line.
    spread: (lowest, highest) x of each point, drawn as whiskers.
    remark: what the legend adds to the label.
  """

  label: str
  family: str
  points: Sequence[Point]
  dash: int = 0
  spread: Sequence[Point] = ()
  remark: str = ""


@dataclasses.dataclass
class Axis:
  """A scale with ticks.

  Attributes:
    label: with the unit.
    log: logarithmic.
    low, high: values that are to be inside, besides the data.
    text: writes a value.
    ticks: value -> text, in place of round numbers.
  """

  label: str
  log: bool = False
  low: float = math.inf
  high: float = -math.inf
  text: Callable[[float], str] = plain
  ticks: Mapping[float, str] | None = None

  def fit(self, values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list]:
    """Returns value -> pixel, from `start` to `end`, and the ticks as (pixel, text)."""
    low, high = min(self.low, *values), max(self.high, *values)
    if self.log:
      margin = max((high / low) ** 0.07, 1.1)
      low, high = low / margin, high * margin
      decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
      for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) >= 3:
          break
    else:
      margin = (high - low) * 0.06 or abs(high) * 0.1 or 1
      low = low if low == self.low else low - margin
      high = high if high == self.high else high + margin
      power = 10.0 ** math.floor(math.log10((high - low) / 5))
      step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= (high - low) / 5.001)
      ticks = [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    scale = math.log if self.log else float

    def place(value: float) -> float:
      return round(start + (scale(value) - scale(low)) / (scale(high) - scale(low)) * (end - start), 1)

    texts = self.ticks or {tick: self.text(tick) for tick in ticks}
    return place, [(place(tick), text) for tick, text in texts.items()]


def chart(
  title: str, series: Sequence[Series], x: Axis, y: Axis, *, lines: bool, level: float | None = None, note: str = ""
) -> dict[str, Any]:
  """Returns what the template draws.

  Args:
    title: above the chart.
    series: at least one, each with points.
    x, y: the axes.
    lines: join the points; else label them.
    level: a horizontal line here.
    note: below.
  """
  xs = [v for s in series for v in (*(p[0] for p in s.points), *(v for pair in s.spread for v in pair))]
  place_x, x_ticks = x.fit(xs, LEFT, WIDTH - RIGHT)
  place_y, y_ticks = y.fit([p[1] for s in series for p in s.points], HEIGHT - BOTTOM, TOP)
  drawn = []
  for s in series:
    marks = [(place_x(px), place_y(py), f"{s.label}: {x.text(px)}, {y.text(py)}") for px, py in s.points]
    drawn.append({
      "label": s.label,
      "remark": s.remark,
      "family": s.family,
      "dash": s.dash % 4,
      "path": "M" + "L".join(f"{px},{py}" for px, py, _ in marks) if lines else "",
      "marks": marks if len(marks) <= MARKED else [],
      "whiskers": [(place_x(low), place_x(high)) for low, high in s.spread],
    })  # fmt: skip
  if not lines:
    _place_labels(drawn)
  return {
    "title": title,
    "note": note,
    "x": {"label": x.label, "ticks": x_ticks},
    "y": {"label": y.label, "ticks": y_ticks},
    "level": None if level is None else place_y(level),
    "series": drawn,
    "lines": lines,
  }


def _place_labels(drawn: Sequence[dict[str, Any]]) -> None:
  """Puts each series' label beside its point, where it hides least of other labels and points."""
  taken = [(mx - 6, my - 6, mx + 6, my + 6) for s in drawn for mx, my, _ in s["marks"]]
  taken += [(low, s["marks"][0][1] - 3, high, s["marks"][0][1] + 3) for s in drawn for low, high in s["whiskers"]]

  def hidden(box: Box) -> float:
    left, top, right, bottom = box
    outside = max(0, LEFT - left) + max(0, right - WIDTH) + max(0, bottom - HEIGHT + BOTTOM) + max(0, TOP - 10 - top)
    widths = [max(0, min(right, other[2]) - max(left, other[0])) for other in taken]
    heights = [max(0, min(bottom, other[3]) - max(top, other[1])) for other in taken]
    return 100 * outside + sum(width * height for width, height in zip(widths, heights, strict=True))

  for s in drawn:
    ((mx, my, _),) = s["marks"]
    width = 0.57 * FONT * len(s["label"])
    boxes = {}
    for dy in (0, -14, 14, -28, 28, -42, 42):
      for left, px, anchor in ((mx + 10, mx + 10, "start"), (mx - 10 - width, mx - 10, "end")):
        boxes[left, my + dy - FONT / 2, left + width, my + dy + FONT / 2] = {"x": px, "y": my + dy, "anchor": anchor}
    best = min(boxes, key=hidden)
    taken.append(best)
    s["text"] = boxes[best]
