"""Attribute tables made by hand: human prior knowledge about images, to be named as such beside every comparison.

A table is a text of one line a class: its name in the data set, then its values in the order of the heading, from 0
(no) to 1 (yes).
"""

import numpy as np

from apfl_jax.semantics.lookup import find

# Seven-segment code a to g, closed loops / 2, curved, diagonal stroke: as in the pilots, method 7 [P].
_DIGITS = """
  class  a b c d e f g  loops curved diagonal
  zero   1 1 1 1 1 1 0   .5   1  0
  one    0 1 1 0 0 0 0   0    0  1
  two    1 1 0 1 1 0 1   0    1  1
  three  1 1 1 1 0 0 1   0    1  0
  four   0 1 1 0 0 1 1   .25  0  1
  five   1 0 1 1 0 1 1   0    1  0
  six    1 0 1 1 1 1 1   .5   1  .5
  seven  1 1 1 0 0 0 0   0    0  1
  eight  1 1 1 1 1 1 1   1    1  0
  nine   1 1 1 1 0 1 1   .5   1  .5
"""

# The matrix of the pilots, method 8.1 [P].
_FASHION_MNIST = """
  class        upper lower full_body footwear bag long_sleeve short_sleeve sleeveless open ankle_or_heel legs elongated
  T-shirt/top  1  0  0  0 0 0  1  0  0  0  0 0
  Trouser      0  1  0  0 0 0  0  0  0  0  1 1
  Pullover     1  0  0  0 0 1  0  0  0  0  0 0
  Dress        .5 .5 1  0 0 0  .5 .5 0  0  0 1
  Coat         1  0  .5 0 0 1  0  0  1  0  0 .5
  Sandal       0  0  0  1 0 0  0  0  1  .5 0 0
  Shirt        1  0  0  0 0 .5 .5 0  .5 0  0 0
  Sneaker      0  0  0  1 0 0  0  0  0  0  0 0
  Bag          0  0  0  0 1 0  0  0  0  0  0 0
  Ankle boot   0  0  0  1 0 0  0  0  0  1  0 0
"""

# The attributes are those of method 2.3; the values are ours and were tuned on nothing [O].
_CIFAR10 = """
  class      animal mammal flies water four_legs wheels metal large hooves_antlers fur road wings
  airplane   0 0 1 0  0 .5 1 1   0  0  0 1
  automobile 0 0 0 0  0 1  1 .5  0  0  1 0
  bird       1 0 1 0  0 0  0 0   0  0  0 1
  cat        1 1 0 0  1 0  0 0   0  1  0 0
  deer       1 1 0 0  1 0  0 .5  1  .5 0 0
  dog        1 1 0 0  1 0  0 .25 0  1  0 0
  frog       1 0 0 .5 1 0  0 0   0  0  0 0
  horse      1 1 0 0  1 0  0 .75 .5 .5 0 0
  ship       0 0 0 1  0 0  1 1   0  0  0 0
  truck      0 0 0 0  0 1  1 1   0  0  1 0
"""

# Where the light is: with any three classes seen, the fourth is minus the one across.
_FAST = """
  class         bottom right
  top left      0 0
  top right     0 1
  bottom left   1 0
  bottom right  1 1
"""


def _parse(text: str, width: int) -> dict[str, list[float]]:
  """Class name (which may hold spaces) -> its last `width` words as numbers."""
  lines = [line.split() for line in text.strip().splitlines()[1:]]
  return {" ".join(words[:-width]): [float(word) for word in words[-width:]] for words in lines}


_digits = _parse(_DIGITS, 10)

ATTRIBUTES = {
  "digits": _digits,
  "mnist": {str(digit): row for digit, row in enumerate(_digits.values())},
  "fashion_mnist": _parse(_FASHION_MNIST, 12),
  "cifar10": _parse(_CIFAR10, 12),
  "fast": _parse(_FAST, 2),
}


def attributes(class_names: tuple[str, ...], dataset_name: str) -> np.ndarray:
  """float64 [C, D]: the raw table of a data set, rows in the order of `class_names`.

  Raises:
    InputError: no table for this data set, or a class that it does not describe.
  """
  table = find(ATTRIBUTES, "attribute table", class_names, dataset_name)
  return np.array([table[name] for name in class_names])
