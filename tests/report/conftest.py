"""Run directories as experiments/train.py leaves them, made up."""

import csv
import json

import numpy as np
import pytest

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "<b>eight</b>", "$nine$"]
GROUPS = ("", "_dropped", "_present")


def bars(mean, dropped, present):
  return {
    "mean": mean,
    "weighted_mean": mean,
    "std": 0.08,
    "worst_decile": mean - 0.2,
    "dropped": dropped,
    "present": present,
    "monopolists": dropped,
    "gini": 0.05,
    "jain": 0.987,
    "dropped_gap": dropped - present,
    "monopolist_gap": None,
  }


def images(rng, classes, count, noise):
  """Blobs whose place tells the class."""
  y, x = np.mgrid[:8, :8]
  angle = 2 * np.pi * np.arange(classes)[:, None, None] / classes
  clean = np.exp(-((x - 3.5 - 2 * np.cos(angle)) ** 2 + (y - 3.5 - 2 * np.sin(angle)) ** 2) / 3)
  noisy = clean[:, None] + noise * rng.random((classes, count, 8, 8))
  return (255 * np.clip(noisy, 0, 1)).astype(np.uint8)[..., None]


def write(path, algorithm="ap_fl", clients=20, rounds=40, names=CLASSES, generator=True, evaluated=True, timed=True):
  """Writes a run directory; `evaluated=False` leaves null for every accuracy, as a run without evaluation does."""
  path.mkdir(parents=True)
  rng = np.random.default_rng(0)
  classes = len(names)
  dropped = rng.permutation(clients) < 0.6 * clients
  histogram = rng.multinomial(200, rng.dirichlet(np.full(classes, 0.15), clients)).astype(np.int32)
  monopolistic = [classes - 2, classes - 1]
  histogram[np.ix_(~dropped, monopolistic)] = 0
  histogram[np.flatnonzero(dropped)[:3, None], monopolistic] += 40

  def number(value):
    return float(np.clip(value, 0, 1)) if evaluated else None

  personal = np.clip(rng.normal(0.92, 0.06, clients), 0, 1)
  shared = np.clip(rng.normal(np.where(dropped, 0.35, 0.8), 0.15), 0, 1)
  (path / "flags.txt").write_text(
    f"--algorithm={algorithm}\n--alpha=0.15\n--seed=0\n--workdir={path}\n--ap_fl_tier=s1\n"
  )
  with (path / "metrics.jsonl").open("w") as file:
    for step in range(2, rounds + 1, 2):
      gain = 1 - np.exp(-step / 10)
      line = {
        "round": step,
        "virtual_seconds": 30.0 * step,
        "present": 8,
        "arrived": 7,
        "pooled_accuracy": number(0.6 * gain),
      }
      line["personal_pooled_accuracy"] = number(0.57 * gain) if step % 10 == 0 else None
      for group, fall, own in zip(GROUPS, (0.1, 0.25, 0), (0.92, 0.93, 0.9), strict=True):
        line[f"global_accuracy{group}"] = number((0.8 - 2 * fall) * gain)
        line[f"personal_accuracy{group}"] = number(own - 0.2 * (1 - gain)) if step % 10 == 0 else None
      file.write(json.dumps(line) + "\n")
  with (path / "timings.jsonl").open("w") as file:
    start = {"round": 0, "seconds": 7.0, "compile_seconds": 6.0, "peak_memory_bytes": None}
    file.write(json.dumps(start) + "\n")
    for step in range(10, rounds + 1, 10):
      compiling = 5.0 if step == 10 else 0.0
      line = {"round": step, "seconds": 4.0 + compiling, "compile_seconds": compiling, "peak_memory_bytes": None}
      file.write(json.dumps(line) + "\n")
    evaluation = {"round": rounds, "seconds": 90.0, "compile_seconds": 2.0, "peak_memory_bytes": None}
    file.write(json.dumps(evaluation) + "\n")
  with (path / "clients.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    header = "client,dropped,rounds_present,train_size,classes,personal_accuracy,global_accuracy"
    header += ",pooled_accuracy,reweighted_accuracy"
    # What each client chose is told by methods that mix two models.
    writer.writerow(header.split(",") + (["lambda_base", "lambda_head", "guard", "barrier"] if generator else []))
    for i in range(clients):
      held = " ".join(map(str, np.flatnonzero(histogram[i])))
      scores = (personal[i], shared[i], 0.5, 0.9) if evaluated else ("", "", "", "")
      # One has the friend alone, two the local model alone, one the model both came from; some of the rest are equal.
      base, head = {1: (0.0, 0.0), 2: (1.0, 1.0), 4: (1.0, 1.0)}.get(i, (round(0.2 * (i % 6), 1), 0.6))
      chosen = (base, head, 3 if i == 3 else 0, 0.25 if i == 1 else 0.01) if generator else ()
      writer.writerow([i, int(dropped[i]), 0 if dropped[i] else rounds, histogram[i].sum(), held, *scores, *chosen])
  summary = {
    "algorithm": algorithm,
    "dataset": "digits & <i>more</i>",
    "num_clients": clients,
    "rounds": rounds,
    "seed": 0,
    "class_names": list(names),
    "partition": "dirichlet",
    "dropout": "cold",
    "drop_rate": 0.6,
    "finished": True,
    "monopolistic_classes": monopolistic,
    "personal_accuracy": bars(0.92, 0.93, 0.9) if evaluated else None,
    "global_accuracy": bars(0.58, 0.352, 0.83) if evaluated else None,
    "pooled_accuracy": {
      "global_model": number(0.6),
      "personal_mean": number(0.571),
      "personal_dropped": number(0.55),
    },
    "recall": {
      "global_model": None,
      "personal": {"each": [0.5] * classes, "mean": 0.5, "std": 0.11, "least": 0.222} if evaluated else None,
    },
    "unseen": {
      "classes": monopolistic if evaluated else [],
      "accuracy": number(0.123),
      "seen_accuracy": number(0.81),
      "harmonic_mean": number(0.214),
      "restricted_accuracy": number(0.654),
    },
    "cost": {
      "local_flops": 3.2e12,
      "generator_flops": 1.5e13 if generator else None,
      "server_flops": None,
      "generator_share": 0.816 if generator else None,
      "break_even_rounds": 0.64,
      "personalize_flops": 2e11,
      "bytes_up": 41_000_000,
      "bytes_down": 66_000_000,
    },
    "seconds": 192.4,
    "compile_seconds": 7.25,
    "peak_memory_bytes": 812_000_000,
    "device": "2 x cpu, sequential",
    "versions": {"python": "3.11.2", "jax": "0.10.2"},
    "commit": "0123abc",
  }
  agreement, trust = rng.random((2, classes))
  if generator:
    summary["samples"] = {
      "count": 64,
      "judge_accuracy": 0.987,
      "judge_recall": {"each": np.linspace(0.9, 1.0, classes).tolist()},
      "recognised": list(range(classes - 2)),
      "agreement": {"each": agreement.tolist()},
      "agreement_recognised": {"mean": 0.876},
      "teacher": 0.854,
      "tstr": {"mean": 0.743, "std": 0.01},
      "modes": {"each": [7] * classes, "mean": 7.0},
      "trust": {"each": trust.tolist(), "correlation": 0.31, "error": 0.2},
    }
    summary["privacy"] = {"examples": 100, "closer": 0.512, "distance_auc": 0.52, "loss_auc": None}
  if timed:
    staleness = {"edges": [0, 1, 2, 3], "counts": [90, 40, 3]}
    visits = {"arrived": 133, "lost": 0, "cut off": 1207}
    clock = {"clock": "synchronous", "virtual_seconds": 30.0 * rounds, "idle_share": 0.1}
    summary["time"] = clock | {"staleness": staleness, "visits": visits}
  (path / "summary.json").write_text(json.dumps(summary))
  followed = np.sort(rng.permutation(clients)[:200])
  took_part = (rng.random((rounds, followed.size)) < 0.8) & ~dropped[followed]
  confusion = (0.12 * 60 * rng.dirichlet(np.full(classes, 0.4), classes)).astype(np.int64)
  confusion[np.arange(classes), np.arange(classes)] += np.where(np.isin(np.arange(classes), monopolistic), 2, 50)
  arrays = {
    "histogram": histogram,
    "presence": (took_part * np.where(rng.random(took_part.shape) < 0.1, 1 + 2 * (followed % 2), 2)).astype(np.uint8),
    "presence_clients": followed.astype(np.int32),
    "seen": ~np.isin(np.arange(classes), monopolistic),
  }
  if evaluated:
    arrays["pooled_confusion"] = confusion
  if generator:
    arrays["surface"] = np.add.outer((np.linspace(0, 1, 6) - 0.4) ** 2, (np.linspace(0, 1, 6) - 0.8) ** 2)
    arrays["samples"] = images(rng, classes, 8, 0.5)
    arrays["real"] = images(rng, classes, 8, 0.15)
    arrays["agreement"], arrays["trust"] = agreement, trust
  np.savez(path / "arrays.npz", **arrays)
  return path


@pytest.fixture
def make_run(tmp_path):
  """Writes a run directory with the settings of `write`."""
  return lambda name, **settings: write(tmp_path / name, **settings)


@pytest.fixture
def ap_fl(tmp_path):
  """20 clients, 10 classes, two of them monopolistic, a generator."""
  return write(tmp_path / "ap_fl")


@pytest.fixture
def fedavg(tmp_path):
  """No generator, so no samples."""
  return write(tmp_path / "fedavg", algorithm="fedavg", generator=False, timed=False)


@pytest.fixture
def unevaluated(tmp_path):
  """Every accuracy null or empty."""
  return write(tmp_path / "unevaluated", algorithm="local", generator=False, evaluated=False)
