"""Settings with limits: what a keyword argument or a field takes, said once, checked wherever it is given."""

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Any, NamedTuple, TypeVar

from apfl_jax.errors import InputError


class Limits(NamedTuple):
  """What a value must be.

  Attributes:
    least: smallest value, or None.
    above: value that it must exceed, or None.
    most: largest value, or None.
    choices: the values accepted, if not empty; may grow, as a registry does.
  """

  least: float | None = None
  above: float | None = None
  most: float | None = None
  choices: Collection[str] = ()


_Kind = TypeVar("_Kind")
_PERSONAL = "read by personal models alone"

ANYTHING = Limits()
Share = Annotated[float, Limits(least=0, most=1)]
Weight = Annotated[float, Limits(least=0)]
Positive = Annotated[float, Limits(above=0)]
Count = Annotated[int, Limits(least=0)]
# `Personal[Share]`: what rounds do not depend on, so that another value needs no new ones.
Personal = Annotated[_Kind, _PERSONAL]


class Setting(NamedTuple):
  """A setting of a method.

  Attributes:
    default: its kind, too.
    limits: what it takes.
    text: of its docstring.
    personal: whether personal models alone read it: neither rounds nor the server do.
  """

  default: Any
  limits: Limits
  text: str
  personal: bool = False


_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


def checked(name: str, value: Any, kind: type, limits: Limits = ANYTHING) -> Any:
  """The value as its kind (int, float, bool or str), so that 1 and 1.0 are one setting.

  Raises:
    InputError: another kind of value, or one outside the limits.
  """
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if kind is float and number and math.isfinite(value):
    value = float(value)
  elif kind is int and number and math.isfinite(value) and value == int(value):
    value = int(value)
  elif kind not in (bool, str) or not isinstance(value, kind):
    raise InputError(f"{name}: got {value!r}, accepted is {_KINDS[kind]}")
  if limits.choices and value not in limits.choices:
    raise InputError(f"{name}: got {value!r}{near(value, limits.choices)}, accepted are {', '.join(limits.choices)}")
  if limits.least is not None and value < limits.least:
    raise InputError(f"{name}: got {value}, accepted is {limits.least} or more")
  if limits.above is not None and not value > limits.above:
    raise InputError(f"{name}: got {value}, accepted is a finite number above {limits.above}")
  if limits.most is not None and value > limits.most:
    raise InputError(f"{name}: got {value}, accepted is at most {limits.most}")
  return value


def near(value: str, choices: Iterable[str]) -> str:
  """What a refused name may have meant, for behind it in the line; '' where nothing is like it."""
  by_lower = {choice.lower(): choice for choice in choices}
  found = difflib.get_close_matches(value.lower(), by_lower, 1)
  return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""


def of(function: Callable[..., Any]) -> dict[str, Setting]:
  """The settings of a function: its keyword-only arguments, with limits from `Annotated[kind, Limits(...)]`."""
  hints = typing.get_type_hints(function, include_extras=True)
  texts = _argument_texts(function)
  found = {}
  for name, parameter in inspect.signature(function).parameters.items():
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
      extras = getattr(hints.get(name), "__metadata__", ())
      limits = next((x for x in extras if isinstance(x, Limits)), ANYTHING)
      if type(parameter.default) not in _KINDS:
        raise InputError(f"{function.__name__}: {name} has no default, accepted are a float, int, bool or str")
      found[name] = Setting(parameter.default, limits, texts.get(name, name), _PERSONAL in extras)
    elif name not in ("algorithm", "task"):
      raise InputError(f"{function.__name__}: {name} can be given by position, accepted are settings after a *")
  return found


def _argument_texts(function: Callable[..., Any]) -> dict[str, str]:
  """name -> text, from the Args section of a docstring."""
  _, _, section = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
  texts: dict[str, str] = {}
  name = ""
  for line in section.splitlines():
    if line.startswith("  ") and not line.startswith("   "):
      name, _, text = line.strip().partition(": ")
      texts[name] = text
    elif line.startswith("   ") and name:
      texts[name] += " " + line.strip()
    else:
      break
  return texts
