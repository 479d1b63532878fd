"""What runs in a peer's own environment: reads a line of JSON, does that work with the peer's script, writes a line.

`python -I worker.py SCRIPT`. A line on standard input is a spec (see `experiments.peers`); the answer is
`{"seconds": ..., "samples": ...}`, or `{"error": one line}`. The first time that a case comes it is prepared and done
once before it is timed. Between lines the process waits and computes nothing. Standard library and NumPy only.

A script has one function, `prepare(spec, train, test) -> run`; `train` and `test` hold (images, labels) of each client,
and `run()` does a round and returns how many examples it trained on, those read twice counted twice.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Examples = tuple[np.ndarray, np.ndarray]


def clients(spec: dict[str, Any]) -> tuple[list[Examples], list[Examples]]:
  """Noise, drawn with repeats: float32 [n, height, width, channels] in [-1, 1] and int64 [n], for each client."""
  rng = np.random.default_rng(spec["seed"])
  images = rng.integers(0, 256, (spec["examples"], *spec["image_shape"]), np.uint8)
  labels = np.arange(spec["examples"]) % spec["classes"]

  def draw(size: int) -> Examples:
    index = rng.integers(0, spec["examples"], size)
    return images[index].astype(np.float32) / 127.5 - 1, labels[index]

  return [draw(size) for size in spec["train"]], [draw(size) for size in spec["test"]]


def main(script: str) -> None:
  """Serves until standard input ends."""
  # Only answers may reach the pipe, whatever a library prints.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  found = importlib.util.spec_from_file_location("peer", script)
  assert found is not None and found.loader is not None
  peer = importlib.util.module_from_spec(found)
  found.loader.exec_module(peer)

  ready: dict[str, Callable[[], int]] = {}
  for line in sys.stdin:
    spec = json.loads(line)
    answer: dict[str, Any]
    try:
      if spec["case"] not in ready:
        run = peer.prepare(spec, *clients(spec))
        run()
        ready[spec["case"]] = run
      start = time.perf_counter()
      samples = ready[spec["case"]]()
      answer = {"seconds": time.perf_counter() - start, "samples": samples}
    except Exception as error:  # of any kind: it is this case's answer, others may go well
      answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
  main(sys.argv[1])
