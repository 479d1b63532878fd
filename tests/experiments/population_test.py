"""A run knows who leaves before it begins, and tells its processes what clients hold."""

import numpy as np

from apfl_jax import data
from experiments import job
from experiments.config import Config


def test_the_leavers_hold_the_monopolistic_classes_and_labels_reach_their_process():
  config = Config(
    algorithm="fedavg", dataset="fast", model="mlp", head="free", dropout="late,label", drop_rate="0.3,0.5", rounds=4
  )
  prepared = job.prepare(config)
  assert np.sum(prepared.gone) == 3
  histogram = data.histogram(prepared.federation, len(prepared.dataset.class_names))
  others = histogram[~prepared.gone].sum(axis=0)
  assert np.sum(others == 0) == config.monopolistic_classes

  facts = prepared.inputs.settings["population"]
  assert (facts.rounds, facts.leave_at, facts.regions) == (4, 0.5, 4)
  smallest = [np.flatnonzero(row)[0] for row in histogram]
  assert min(smallest) < max(smallest)
  np.testing.assert_allclose(facts.label_rank, np.array(smallest) / (histogram.shape[1] - 1), rtol=1e-6)


def test_clients_that_leave_may_have_few_examples():
  settings = {"algorithm": "fedavg", "dataset": "fast", "model": "mlp", "drop_rate": "0.5", "monopolistic_classes": 1}
  whole, few = (job.prepare(Config(**settings, dropped_examples=n)) for n in (0, 12))
  for part, most in (("train", 12), ("validation", 3)):
    before, after = (getattr(x.federation, part) for x in (whole, few))
    np.testing.assert_array_equal(after.start, before.start)
    np.testing.assert_array_equal(after.size, np.where(whole.gone, np.minimum(before.size, most), before.size))
    assert (after.size < before.size).any()
  np.testing.assert_array_equal(few.federation.test.size, whole.federation.test.size)
