"""The ledger against closed forms, XLA's own count where that is right (no loops), and hand-made read sets."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apfl_jax.metrics import ledger
from apfl_jax.random import permutation_key, permute

SQUARE = jax.ShapeDtypeStruct((3, 3), jnp.float32)
PRODUCT = 2 * 3**3  # operations of x @ x for a SQUARE x


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def powers(x, n):
  return jax.lax.fori_loop(0, n, lambda i, c: c @ c, x)


@pytest.mark.parametrize(
  ("equation", "shapes", "expected"),
  [
    ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 2 * 3 * 5),
    ("bij,bjk->bik", [(7, 2, 3), (7, 3, 5)], 7 * 2 * 2 * 3 * 5),
    ("ijk,jkl->il", [(2, 3, 4), (3, 4, 5)], 2 * 2 * 3 * 4 * 5),
    ("i,i->", [(9,), (9,)], 2 * 9),
  ],
)
def test_a_product_costs_two_operations_a_term(equation, shapes, expected):
  assert ledger.flops(lambda a, b: jnp.einsum(equation, a, b), *[shape(*s) for s in shapes]) == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_costs_its_kernel_at_every_output(groups):
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )

  cost = ledger.flops(convolve, shape(5, 8, 8, 6), shape(3, 3, 6 // groups, 4))
  assert cost == 2 * (5 * 4 * 4 * 4) * (3 * 3) * (6 // groups)


@pytest.mark.parametrize("remat", [False, True])
def test_a_training_step_of_a_small_network(remat):
  batch, inputs, hidden, outputs = 8, 5, 7, 3

  def forward(params, x):
    return jax.nn.relu(x @ params[0]) @ params[1]

  def loss(params, x):
    return jnp.sum((jax.checkpoint(forward) if remat else forward)(params, x) ** 2)

  first, second = 2 * batch * inputs * hidden, 2 * batch * hidden * outputs
  params = (shape(inputs, hidden), shape(hidden, outputs))
  cost = ledger.flops(jax.jit(jax.grad(loss)), params, shape(batch, inputs))
  # Forward once, a second time where it is not kept (all but its last product), and backward: no gradient is asked
  # of x, so the first layer has one product there and the second two.
  assert cost == (2 * first if remat else first) + second + first + 2 * second


def test_agrees_with_xla_on_large_products_without_loops():
  def loss(params, x):
    for weight in params:
      x = jax.nn.relu(x @ weight)
    return jnp.mean(x)

  args = ([shape(256, 512), shape(512, 256)], shape(512, 256))
  gradient = jax.grad(loss, argnums=(0, 1))
  expected = jax.jit(gradient).lower(*args).compile().cost_analysis()["flops"]
  assert ledger.flops(gradient, *args) == pytest.approx(expected, rel=0.02)


def test_a_scan_counts_every_trip_forward_and_backward():
  def last(x, weights):
    return jnp.sum(jax.lax.scan(lambda c, w: (c @ w, None), x, weights)[0])

  assert ledger.flops(last, SQUARE, shape(6, 3, 3)) == 6 * PRODUCT
  assert ledger.flops(jax.grad(last, argnums=(0, 1)), SQUARE, shape(6, 3, 3)) == 6 * 3 * PRODUCT


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize(("size", "epochs"), [(100, 3), (64, 1), (0, 5)])
def test_a_traced_bound_follows_from_what_is_known(wrap, size, epochs):
  def train(x, size, epochs):
    return powers(x, jnp.ceil(size / 32).astype(jnp.int32) * epochs)

  assert ledger.flops(wrap(train), SQUARE, jnp.int32(size), epochs) == -(-size // 32) * epochs * PRODUCT


def test_nested_loops_multiply_and_start_where_they_say():
  def nested(x, start, outer, inner):
    def body(i, carry):
      x, bound = carry  # an inner bound that travels through the carry stays known
      return powers(x, inner) @ powers(x, bound), bound

    return jax.lax.fori_loop(start, outer, body, (x, 2 * inner))

  assert ledger.flops(jax.jit(nested), SQUARE, 2, 5, 4) == 3 * (4 + 8 + 1) * PRODUCT
  assert ledger.flops(nested, SQUARE, 5, 2, 4) == 0


def test_a_scan_hands_on_what_it_does_not_change():
  def rounds(x, rows, scale, outer):
    def body(carry, row):
      x, bound, seen = carry
      return (powers(x, bound) + powers(row, outer), bound, seen + 1), x

    (x, bound, seen), _ = jax.lax.scan(body, (x, 2 * scale, 0), rows)
    return powers(x, bound), seen

  assert ledger.flops(rounds, SQUARE, shape(5, 3, 3), 2, 7) == (5 * (4 + 7) + 4) * PRODUCT
  with pytest.raises(ValueError, match="trip count"):  # `seen` changes, so it is not known
    ledger.flops(lambda *args: powers(args[0], rounds(*args)[1]), SQUARE, shape(5, 3, 3), 2, 7)


def test_under_vmap_every_row_runs_as_long_as_the_longest():
  cost = ledger.flops(jax.vmap(powers), shape(4, 3, 3), jnp.array([1, 7, 0, 2]))
  assert cost == 7 * 4 * PRODUCT
  nested = jax.vmap(lambda x, n: jax.lax.fori_loop(0, n, lambda i, c: powers(c, 2 * n), x))
  assert ledger.flops(jax.jit(nested), shape(3, 3, 3), np.array([1, 3, 2])) == 3 * 6 * 3 * PRODUCT


def test_forward_mode_through_a_counted_loop():
  cost = ledger.flops(lambda x, n: jax.jvp(lambda x: powers(x, n), (x,), (x,)), SQUARE, 4)
  assert cost == 4 * 3 * PRODUCT  # c @ c and its two tangent terms


def test_a_branch_is_the_known_one_or_the_dearest():
  def choose(index, x):
    return jax.lax.switch(index, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

  assert [ledger.flops(choose, i, SQUARE) for i in range(3)] == [0, PRODUCT, 2 * PRODUCT]
  assert ledger.flops(choose, 9, SQUARE) == 2 * PRODUCT  # clamped, as switch does
  assert ledger.flops(choose, jax.ShapeDtypeStruct((), jnp.int32), SQUARE) == 2 * PRODUCT


def test_custom_derivatives_are_walked():
  @jax.custom_vjp
  def f(x):
    return x @ x

  f.defvjp(lambda x: (f(x), x), lambda x, g: (g @ x @ x,))
  assert ledger.flops(f, SQUARE) == PRODUCT
  assert ledger.flops(jax.grad(lambda x: f(x).sum()), SQUARE) == 3 * PRODUCT


def test_an_unbounded_loop_without_products_is_free():
  def walk(bits, size):  # cycle-walking: how often is not known beforehand
    return permute(bits, jnp.arange(200), size)

  bits = jax.eval_shape(lambda: permutation_key(jax.random.key(0)))
  assert ledger.flops(walk, bits, 200) == 0


def test_an_unbounded_loop_of_products_is_an_error_that_names_it():
  def settle(x):
    return x @ x

  with pytest.raises(ValueError, match="settle"):
    ledger.flops(lambda x: jax.lax.while_loop(lambda x: jnp.any(x > 1), settle, x), SQUARE)


@pytest.mark.parametrize(
  ("what", "n"), [("unknown", jax.ShapeDtypeStruct((), jnp.int32)), ("too many numbers", np.arange(65))]
)
def test_a_bound_that_is_not_known_is_an_error(what, n):
  with pytest.raises(ValueError, match="trip count"):
    ledger.flops(lambda x, n: powers(x, jnp.max(n)), SQUARE, n)


def test_a_loop_that_counts_by_two_is_not_taken_for_one_that_counts_by_one():
  def even(x, n):
    return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 2, s[1] @ s[1]), (0, x))

  with pytest.raises(ValueError, match="trip count"):
    ledger.flops(even, SQUARE, 6)


def test_a_state_is_followed_from_call_to_call():
  """A server that trains in some rounds only: what it costs is what those rounds cost."""

  def aggregate(server, x):
    count, weights = server
    trained = jax.lax.cond((count >= 2) & (count % 3 == 0), lambda w: powers(w, 5), lambda w: w, weights)
    return count + 1, trained + x

  start = (np.int32(0), SQUARE)
  follow, server, costs = ledger.follower(aggregate, start, SQUARE), start, []
  for _ in range(8):
    operations, server = follow(server, SQUARE)
    costs.append(operations)
  assert costs == [5 * PRODUCT if t >= 2 and t % 3 == 0 else 0 for t in range(8)]
  assert server[0] == 8 and isinstance(server[1], jax.ShapeDtypeStruct)


def test_only_what_a_count_hangs_on_is_computed():
  computed = []

  def told(x):
    computed.append(int(x))
    return np.int32(x)

  def fn(x, n):
    known = lambda n: jax.pure_callback(told, jax.ShapeDtypeStruct((), jnp.int32), n)
    bound = functools.reduce(lambda total, _: total + 1, range(2000), known(n))  # deeper than Python can recurse
    return powers(x, bound) + powers(x, bound), known(n + 1)

  assert ledger.pricer(fn, SQUARE, np.int32(0))(SQUARE, np.int32(4)) == 2 * 2004 * PRODUCT
  assert computed == [4]
  _, (_, last) = ledger.follower(fn, SQUARE, np.int32(0))(SQUARE, np.int32(4))
  assert last == 5 and computed == [4, 4, 5]


@pytest.mark.parametrize("inner", [3, 4])
def test_a_loop_without_decisions_is_walked_once_and_one_with_them_anew(inner):
  def train(x, bound):
    steady = jax.lax.fori_loop(0, 6, lambda i, c: c @ c, x)
    return jax.lax.fori_loop(0, 6, lambda i, c: powers(c, bound), steady)

  price = ledger.pricer(train, SQUARE, np.int32(0))
  assert [price(SQUARE, np.int32(n)) for n in (inner, 0, inner)] == [(6 + 6 * n) * PRODUCT for n in (inner, 0, inner)]


class Download(NamedTuple):
  shared: dict
  own: jax.ShapeDtypeStruct


DOWNLOAD = Download({"w": SQUARE, "c": SQUARE, "t": jax.ShapeDtypeStruct((5,), jnp.int8)}, shape(2))


def test_only_leaves_that_the_result_depends_on_are_read():
  @jax.jit
  def update(x, download, n):
    w = download.shared["w"]
    dead = powers(download.shared["c"], n)  # noqa: F841
    noted = jnp.zeros_like(download.own)  # its shape is all that is used
    return powers(x, n) + jax.lax.fori_loop(0, n, lambda i, y: y @ w, x), noted

  read = ledger.read_leaves(update, SQUARE, DOWNLOAD, 4, argnum=1)
  assert read == Download({"w": True, "c": False, "t": False}, False)
  assert ledger.bytes_read(update, SQUARE, DOWNLOAD, 4, argnum=1) == 9 * 4
  assert ledger.read_leaves(update, SQUARE, DOWNLOAD, 4, argnum=2) is True


def test_dead_parts_of_a_loop_are_not_read():
  def update(download, x):
    carry = jax.lax.scan(lambda c, _: ((c[0] + 1, c[1] * 2), None), (x, download.shared["c"]), None, length=3)[0]
    return carry[0]

  assert not any(jax.tree.leaves(ledger.read_leaves(update, DOWNLOAD, 1.0, argnum=0)))


def test_a_leaf_that_is_handed_on_is_read():
  read = ledger.read_leaves(lambda download: download.shared["t"], DOWNLOAD, argnum=0)
  assert read == Download({"w": False, "c": False, "t": True}, False)
  assert ledger.bytes_read(lambda download: download.shared["t"], DOWNLOAD, argnum=0) == 5


def test_bytes_are_those_of_the_dtypes():
  tree = {"a": np.zeros((2, 3), np.float16), "b": (shape(4), jnp.zeros(3, jnp.uint8)), "none": None, "empty": shape(0)}
  assert ledger.nbytes(tree) == 2 * 3 * 2 + 4 * 4 + 3
  assert ledger.nbytes(()) == 0
