"""Time to a target, from lines as a run writes them."""

import pytest

from apfl_jax.metrics import time

LINES = [
  {"round": 2, "pooled_accuracy": 0.4, "virtual_seconds": 10.0, "bytes": 5.0},
  {"round": 4, "pooled_accuracy": None, "virtual_seconds": 21.0, "bytes": 9.0},
  {"round": 6, "pooled_accuracy": 0.7, "virtual_seconds": 33.0, "bytes": 14.0},
  {"round": 8, "pooled_accuracy": 0.6, "virtual_seconds": 40.0, "bytes": 19.0},
]


@pytest.mark.parametrize(("target", "expected"), [(0.0, 10.0), (0.4, 10.0), (0.5, 33.0), (0.7, 33.0), (0.71, None)])
def test_the_first_evaluated_round_that_is_good_enough(target, expected):
  assert time.to_target(LINES, target) == expected


def test_in_bytes_and_of_other_measures():
  assert time.to_target(LINES, 0.5, by="bytes") == 14.0
  assert time.to_target(LINES, 0.5, by="round") == 6
  assert time.to_target(LINES, 0.5, of="personal_accuracy") is None
  assert time.to_target([{"round": 1, "pooled_accuracy": 0.9, "virtual_seconds": None}], 0.5) is None
