"""What the README says is true: its Python runs, its table is the registry, its example is short."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from apfl_jax import algorithms
from apfl_jax.errors import InputError
from experiments import methods
from tests import binaries

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


METHOD = next(text for text in EXAMPLES if "def q_fedavg" in text)
EXAMPLES.remove(METHOD)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_run(number, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
  assert list(tmp_path.glob("runs/*/summary.json"))


def test_the_example_of_a_method_is_short():
  assert len([line for line in METHOD.splitlines() if line.strip()]) < 45


def test_the_example_of_a_method_is_a_binary_and_has_the_common_tests(tmp_path):
  """By the two commands below it."""
  (tmp_path / "q_fedavg.py").write_text(METHOD)
  run, test = re.search(r"^python (q_fedavg\.py .*)\npython (-m pytest .*)$", TEXT, re.MULTILINE).groups()
  here = ("--num_clients=4", "--local_steps=2", "--personal_steps=1", "--report=false")
  made = binaries.run(*run.split(), *here, cwd=tmp_path)
  assert made.returncode == 0, made.stderr
  assert "--q_fedavg_q=0.5\n" in (tmp_path / "runs/q_fedavg-fast-0/flags.txt").read_text()
  assert json.loads((tmp_path / "runs/q_fedavg-fast-0/summary.json").read_text())["program"] == "python q_fedavg.py"
  helped = binaries.run("q_fedavg.py", "--help", cwd=tmp_path)
  assert helped.returncode == 0 and "--num_clients" in helped.stdout
  compared = re.search(r"^python -c '(import q_fedavg.*?)' --methods=q_fedavg,fedavg$", TEXT, re.MULTILINE)[1]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
  call = partial(subprocess.run, env=environment, capture_output=True, text=True, check=False)
  listed = call([sys.executable, "-c", compared, "--methods=q_fedavg,fedavg", "--seeds=0", "--dry_run"], cwd=tmp_path)
  assert listed.returncode == 0 and "q_fedavg-0" in listed.stdout, listed.stderr
  tested = call([sys.executable, *test.split(), "-k", "q_fedavg and (same_bits or arguments_alone)"], cwd=ROOT)
  assert tested.returncode == 0 and " 2 passed" in tested.stdout, tested.stdout


def test_the_table_is_the_registry():
  assert methods.with_table(TEXT) == TEXT, "python -m experiments.methods --readme writes it anew"
  rows = re.findall(r"^\| `(\w+)` \| (.*?) \| \[.*?\]\((.*?)\) \| (.*?) \|$", TEXT, re.MULTILINE)
  assert {(name, paper, keeps) for name, paper, _, keeps in rows} == {
    (name, method.paper, method.keeps) for name, method in algorithms.METHODS.items()
  }
  assert all((ROOT / path).exists() for _, _, path, _ in rows)


def test_a_readme_without_a_place_for_the_table_is_refused():
  with pytest.raises(InputError, match="end of methods"):
    methods.with_table(TEXT.replace("<!-- end of methods -->", ""))


def test_links_lead_somewhere():
  for path in re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT):
    assert (ROOT / path).exists(), path
