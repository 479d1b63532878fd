"""The client map against a Python loop over the clients, on one device and on several."""

import itertools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.errors import InputError
from apfl_jax.simulation import client_map, executed_steps, resolve

HOWS = ["sequential", "vmap", "vmap:1", "vmap:3", "vmap:16"]


def one_client(shared, row):
  """Sums a vector and a count, returns a matrix and a number; `steps` times x := cos(x) first."""
  x = jax.lax.fori_loop(0, row["steps"], lambda i, x: jnp.cos(x), row["x"])
  return {"vector": shared * x, "count": jnp.int32(1)}, (jnp.outer(x, x), row["steps"] + 1)


def by_hand(shared, rows, ok):
  """The same in NumPy, client by client."""
  vector, outputs = np.zeros(4), []
  for x, steps, present in zip(rows["x"].astype(float), rows["steps"], ok, strict=True):
    if present:
      for _ in range(steps):
        x = np.cos(x)
      vector = vector + shared * x
      outputs.append((np.outer(x, x), steps + 1))
    else:
      outputs.append((np.zeros((4, 4)), 0))
  return {"vector": vector, "count": int(np.sum(ok))}, tuple(np.stack(x) for x in zip(*outputs, strict=True))


def problem(count, seed=0):
  """(shared, rows, ok); about a third is absent, and what an absent client would compute is not a number."""
  rng = np.random.default_rng(seed)
  ok = rng.random(count) < 0.7
  x = rng.normal(size=(count, 4)).astype(np.float32)
  steps = rng.integers(0, 6, count, np.int32)
  return np.float32(0.7), {"x": np.where(ok[:, None], x, np.nan).astype(np.float32), "steps": steps}, ok


@pytest.mark.parametrize("how", HOWS)
def test_a_clients_function_is_traced_once(how):
  """Tracing is most of what a small run takes."""
  traces = []

  def counted(shared, row):
    traces.append(how)
    return one_client(shared, row)

  jax.jit(client_map(counted, how)).trace(*problem(9))
  assert traces == [how]


@pytest.fixture(scope="module")
def mapped():
  return {how: jax.jit(client_map(one_client, how)) for how in HOWS}


@pytest.mark.parametrize("count", [1, 7, 9, 20])
@pytest.mark.parametrize("how", HOWS)
def test_equals_a_loop_over_the_clients(mapped, how, count):
  for seed in range(3):
    given = problem(count, seed)
    sums, outputs = mapped[how](*given)
    wanted_sums, wanted_outputs = by_hand(*given)
    np.testing.assert_allclose(sums["vector"], wanted_sums["vector"], rtol=1e-6, atol=1e-6)
    assert sums["count"] == wanted_sums["count"]
    for got, want in zip(outputs, wanted_outputs, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert mapped[how]._cache_size() <= 6, "whom it is computed for must not recompile"


@pytest.mark.parametrize("how", HOWS)
def test_absent_rows_are_zeros_whatever_they_hold(mapped, how):
  shared, rows, ok = problem(9)
  assert np.isnan(rows["x"]).any()
  for present in (ok, np.zeros(9, bool)):
    sums, outputs = mapped[how](shared, rows, present)
    want_sums, _ = by_hand(shared, rows, present)
    np.testing.assert_allclose(sums["vector"], want_sums["vector"], rtol=1e-6, atol=1e-6)
    for output in outputs:
      np.testing.assert_array_equal(np.asarray(output)[~present], 0)
      assert np.isfinite(output).all()


@pytest.mark.parametrize("how", HOWS)
def test_a_row_does_not_depend_on_the_other_rows(mapped, how):
  shared, rows, _ = problem(20)
  here, other = {"x": rows["x"].copy(), "steps": rows["steps"].copy()}, np.arange(20) != 11
  here["x"][11], here["steps"][11] = 0.3, 4
  there = {"x": np.where(other[:, None], np.float32(5), here["x"]), "steps": np.where(other, 1, here["steps"])}
  one = mapped[how](shared, here, np.ones(20, bool))[1]
  two = mapped[how](shared, there, ~other)[1]
  for a, b in zip(one, two, strict=True):
    np.testing.assert_array_equal(a[11], b[11])


@pytest.mark.parametrize("how", ["sequential", "vmap"])
def test_nothing_to_sum_or_to_stack(how):
  sums, outputs = client_map(lambda shared, row: ((), {"id": row}), how)(
    (), jnp.arange(3), jnp.array([True, False, True])
  )
  assert sums == ()
  np.testing.assert_array_equal(outputs["id"], [0, 0, 2])
  sums, outputs = client_map(lambda shared, row: (row, ()), how)((), jnp.arange(3), jnp.array([True, False, True]))
  assert sums == 2 and outputs == ()


def test_resolve():
  assert resolve("sequential") == resolve("auto") == ("sequential", 0)  # tests run on the CPU
  assert resolve("vmap") == ("vmap", 0)
  assert resolve("vmap:16") == ("vmap", 16)


@pytest.mark.parametrize(
  "how", ["", "Vmap", "vmap:", "vmap:0", "vmap:-1", "vmap:1.5", "vmap:a", "sequential:2", "auto:", "pmap"]
)
def test_resolve_says_what_it_takes(how):
  with pytest.raises(InputError) as error:
    resolve(how)
  message = str(error.value)
  assert repr(how) in message and "sequential" in message and "vmap:CHUNK" in message and "\n" not in message


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("count", [5, 40])
def test_executed_steps_are_those_that_run(how, count):
  """Counted by a callback in the loop's body, which a masked client's steps reach as well."""
  steps = -np.sort(-np.random.default_rng(count).integers(0, 9, count))
  seen = []

  def one(shared, row):
    def body(i, x):
      jax.debug.callback(lambda _: seen.append(1), x)
      return x + 1

    return (), jax.lax.fori_loop(0, row, body, 0)

  _, done = jax.jit(client_map(one, how))((), jnp.asarray(steps), jnp.asarray(steps > 0))
  jax.effects_barrier()
  np.testing.assert_array_equal(done, steps)
  assert len(seen) == executed_steps(steps, how)


def test_little_work_is_masked():
  """Clients with 1 to 500 examples, batches of 16, one epoch (what the last short batches waste is not counted)."""
  for seed, devices in itertools.product(range(3), (1, 2, 8)):
    steps = -(-np.random.default_rng(seed).integers(1, 501, 100) // 16)
    assert executed_steps(steps, "sequential", devices) == steps.sum()
    assert 1 - steps.sum() / executed_steps(steps, "vmap", devices) <= 0.25
    assert 1 - steps.sum() / executed_steps(steps, f"vmap:{len(steps)}") > 0.4


DEVICES = """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh

  from apfl_jax.errors import InputError
  from apfl_jax.simulation import client_map, default_mesh

  devices = jax.local_devices()
  assert len(devices) == 8
  assert default_mesh().size == 8
  meshes = [None, *(Mesh(np.array(devices[:n]), ("clients",)) for n in (1, 2, 4, 8))]

  # Numbers of very different size: another order of additions is another sum.
  rng = np.random.default_rng(0)
  rows = {"x": (rng.normal(size=(21, 5)) * 10.0 ** rng.integers(-3, 4, (21, 1))).astype(np.float32),
          "steps": rng.integers(0, 5, 21, np.int32)}
  ok = rng.random(21) < 0.8

  def outer(how, mesh):
    @jax.jit
    def run(shared, scale, rows, ok):
      scale = scale + 1.0  # traced by the outer jit, closed over below

      def one_client(shared, row):
        x = jax.lax.fori_loop(0, row["steps"], lambda i, x: x - scale * x * shared, row["x"])
        return (x, jnp.int32(1)), x[:2] + scale

      return client_map(one_client, how, mesh)(shared, rows, ok)

    return jax.tree.map(np.asarray, run(np.float32(0.1), np.float32(0.5), rows, ok))

  assert any(not np.array_equal(rows["x"][ok][order].sum(0), rows["x"][ok].sum(0))
             for order in (rng.permutation(ok.sum()) for _ in range(5)))
  first, *others = (outer("sequential", mesh) for mesh in meshes)
  assert first[0][1] == ok.sum() and not first[1][~ok].any()
  for other in others:
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
      np.testing.assert_array_equal(a, b)
  for how, mesh in (("vmap", meshes[2]), ("vmap:3", meshes[4])):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(outer(how, mesh)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-4)  # the largest terms are of the order of 1000

  try:
    client_map(lambda shared, row: (row, ()), "vmap", Mesh(np.array(devices[:3]), ("clients",)))
  except InputError as error:
    assert "3 devices" in str(error) and "8" in str(error)
  else:
    raise AssertionError("a mesh of 3 devices was accepted")
  for count, most in ((1, None), (3, 2), (6, 4)):
    jax.devices = lambda count=count: devices[:count]
    assert (default_mesh() and default_mesh().size) == most
"""


def test_sums_are_the_same_bits_on_1_2_4_and_8_devices():
  path = os.pathsep.join(p for p in sys.path if p)
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(DEVICES)], env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
