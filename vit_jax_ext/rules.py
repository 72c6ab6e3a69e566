"""What a value may be: its type, its range, its choices; of a config's key or of a model's option."""

from collections.abc import Sequence
import dataclasses
import math
import numbers
from typing import Any

from vit_jax_ext.errors import UserError

LARGEST, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # of integers and numbers, which JAX has in 32 bits


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a value may be.

  Attributes:
    kind: int, float (an integer will do), bool or str; object for the source of weights: a path, True or False.
    least, most: bounds of numbers.
    above, below: bounds that are left out themselves.
    nesting: 0 for one value, 1 for a list, 2 for a list of lists.
    length: of the (innermost) lists; None for any.
    choices: the only values.
    optional: None is one too.
    empty: a text or list may be.
  """

  kind: type = float
  least: float = -math.inf
  most: float = math.inf
  above: float = -math.inf
  below: float = math.inf
  nesting: int = 0
  length: int | None = None
  choices: tuple[str, ...] = ()
  optional: bool = False
  empty: bool = False

  def __str__(self) -> str:
    """Says it in words."""
    if self.choices:
      words = "one of " + ", ".join(self.choices)
    elif self.kind in (bool, object, str):
      words = {bool: "True or False", object: "a path, True or False", str: "text"}[self.kind]
    else:
      words = self._number()
    return words + (" or an empty one" if self.empty else "") + (" or None" if self.optional else "")

  def _number(self) -> str:
    words = {int: "integer", float: "number"}[self.kind]
    if self.nesting:
      count = f"{self.length} " if self.length else ""
      words = f"{'a list of lists' if self.nesting == 2 else 'a list'} of {count}{words}s"
    else:
      words = f"{'an' if self.kind is int else 'a'} {words}"
    low = f"above {self.above:g}" if self.above > self.least else f"{self.least:g}"
    high = f"below {self.below:g}" if self.below < self.most else f"{self.most:g}"
    if self.below == math.inf and self.most in (math.inf, LARGEST):
      return f"{words} of {low} or more" if self.least > -math.inf else f"{words} {low}"
    return f"{words} from {low} to {high}"

  def check(self, name: str, value: Any, meaning: str = "") -> None:
    """Raises UserError, one line with the name, the value, what is wrong and what to give, unless the value fits.

    Args:
      name: what stands before the value, such as "config.seed=" or "num_classes ".
      value: to be checked.
      meaning: of it, for the message.
    """
    if (self.optional and value is None) or not (wrong := self._wrong(value, self.nesting)):
      return
    shown = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise UserError(f"{name}{shown} {wrong}; give {self}{f' ({meaning})' if meaning else ''}")

  def _wrong(self, value: Any, nesting: int) -> str:
    """Returns what is wrong, "" if nothing is."""
    if nesting:
      if isinstance(value, str) or not isinstance(value, Sequence):
        return f"is of type {type(value).__name__}"
      if not value:
        return "" if self.empty else "is empty"
      if nesting == 1 and self.length not in (None, len(value)):
        return f"has a list of {len(value)}"
      return next(filter(None, (self._wrong(part, nesting - 1) for part in value)), "")
    kinds = {int: numbers.Integral, float: numbers.Real, object: (bool, str)}.get(self.kind, self.kind)
    if isinstance(value, str) and not value and not self.empty:
      return "is empty"
    if not isinstance(value, kinds) or (isinstance(value, bool) and self.kind in (int, float)):
      return f"is of type {type(value).__name__}"
    if self.kind is str:
      if self.choices:
        return "" if value in self.choices else "is unknown"
      return "" if value.strip() or self.empty else "is empty"
    if self.kind in (bool, object):
      return ""
    if self.kind is float and not abs(value) <= LARGEST_FLOAT:
      return "is no finite number"
    if value > LARGEST and self.most == LARGEST:
      return f"is more than {LARGEST}"
    return "" if self.least <= value <= self.most and self.above < value < self.below else "is out of range"


def integer(least: int, most: int = LARGEST, **kw) -> Rule:
  """Returns the rule of an integer."""
  return Rule(int, least, most, **kw)


SHARE = Rule(least=0, most=1)
RATE = Rule(least=0, below=1)
POSITIVE = Rule(above=0)
NOT_NEGATIVE = Rule(least=0)
SWITCH = Rule(bool)
TEXT = Rule(str)
