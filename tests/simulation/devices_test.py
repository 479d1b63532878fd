"""The same clients and the same server on 1, 2, 4 and 8 devices of one process, and on two processes over loopback."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

# One round of 5 steps, in which every client's row becomes what it uploads; with two processes, of rows that each holds
# half of, in host memory; with the options for which a client needs to know its cohort.
ROUND = """
  import sys

  import jax
  import numpy as np
  from jax.sharding import Mesh

  method, folder, counts, process, port = sys.argv[1:]
  counts = [int(count) for count in counts.split(",")]
  if process:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))

  from apfl_jax import simulation
  from tests import tasks

  def round_on(count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("clients",)) if count > 1 else None

    def build(settings):
      algorithm, process = tasks.build(method, 6, settings, mesh)

      def local_update(download, client, data, visit, key):
        _, upload = algorithm.local_update(download, (), data, visit, key)
        return upload.update.delta if method == "ap_fl" else upload.update, upload

      init_client = lambda download, key: download.shared.params if method == "ap_fl" else download.shared
      return algorithm._replace(init_client=init_client, local_update=local_update), process

    inputs = jax.tree.map(np.asarray, tasks.inputs(method))
    inputs = tasks.with_settings(inputs, rounds=2)._replace(seed=np.uint32(0))
    inputs = jax.tree.map(np.asarray, inputs)
    inputs.settings["rounds"] = np.int32(2)  # the generator trains from the first round on
    simulator = simulation.simulator(build, inputs, tasks.NUM_CLASSES, population_size=6, cohort_size=6, chunk=1,
                                     softmax_mask="present", readout="prior", how="sequential", mesh=mesh)
    staging = simulation.Staging(simulator, inputs, data_on="host" if process else "device")
    state, inputs = staging.begin()
    state, _ = simulator.advance(state, inputs, simulator.place(np.int32(1)))
    server = jax.tree.map(np.asarray, state.server)
    snapshot = staging.snapshot(state)
    return jax.tree.leaves((snapshot.clients, server))

  for count in counts:
    np.savez(f"{folder}/{process or 'one'}-{count}.npz", *round_on(count))
"""


# Thirty uploads one by one, of clients of which each reads its own version of the server; and who came when.
CLOCK = """
  import sys

  import jax
  import numpy as np
  from jax.sharding import Mesh

  from apfl_jax import population, simulation
  from apfl_jax.simulation import batches, schedule
  from tests import tasks

  folder = sys.argv[2]
  inputs = jax.tree.map(np.asarray, tasks.inputs("fedasync"))
  settings = schedule.Settings("asynchronous", 3, 10, concurrency=5, jitter=0.8, round_seconds=1.0)
  process = lambda traced: population.chain(population.markov(0.3, 4.0), population.speeds("pareto", traced))
  for count in map(int, sys.argv[3].split(",")):
    mesh = Mesh(np.array(jax.devices()[:count]), ("clients",)) if count > 1 else None
    made = schedule.make(process, np.float32(1.0), inputs.seed, settings, np.ones(6))
    plan = batches.plan(made)
    build = lambda s: tasks.build("fedasync", 6, s, mesh)
    simulator = simulation.simulator(build, inputs, tasks.NUM_CLASSES, population_size=6, cohort_size=plan.per_round,
                                     chunk=3, layout=plan.layout, how="sequential", mesh=mesh)
    staging = simulation.Staging(simulator, inputs)
    chunks = simulation.Chunks(simulator, staging, *staging.begin(), plan=plan)
    chunks.run(3, 0)
    columns = [x for x in made if isinstance(x, np.ndarray)]
    np.savez(f"{folder}/schedule-{count}.npz", *columns)
    np.savez(f"{folder}/server-{count}.npz", *jax.tree.leaves(jax.tree.map(np.asarray, chunks.state.server)))
"""


def _start(
  method: str, folder: Path, counts: str, devices: int, process: str = "", port: int = 0, text: str = ROUND
) -> subprocess.Popen:
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
  words = [sys.executable, "-c", textwrap.dedent(text), method, str(folder), counts, process, str(port)]
  return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _arrays(path: Path) -> list[np.ndarray]:
  with np.load(path) as file:
    return [file[name] for name in file.files]


@pytest.mark.parametrize(
  ("method", "counts"),
  [  # slow to compile
    ("fedavg", "1,8"),
    pytest.param("fedavg", "1,2,4", marks=pytest.mark.slow),
    pytest.param("ap_fl", "1,2,4,8", marks=pytest.mark.slow),
  ],
)
def test_devices_and_processes_give_the_same(tmp_path, method, counts):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  running = [_start(method, tmp_path, counts, 8)]
  running += [_start(method, tmp_path, "2", 1, str(number), port) for number in (0, 1)]
  for process in running:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
  one = _arrays(tmp_path / "one-1.npz")
  assert any(np.abs(x).max() > 1e-3 for x in one)
  for other in (*(f"one-{n}" for n in counts.split(",")[1:]), "0-2", "1-2"):
    for a, b in zip(_arrays(tmp_path / f"{other}.npz"), one, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=other)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_the_clock_on_one_device_and_on_several(tmp_path, count):
  process = _start("fedasync", tmp_path, f"1,{count}", 8, text=CLOCK)
  output, _ = process.communicate(timeout=600)
  assert process.returncode == 0, output
  for a, b in zip(_arrays(tmp_path / f"schedule-{count}.npz"), _arrays(tmp_path / "schedule-1.npz"), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(_arrays(tmp_path / f"server-{count}.npz"), _arrays(tmp_path / "server-1.npz"), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
