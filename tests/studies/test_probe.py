"""Probes' studies: what they choose, test, say and refuse; their configs cost the same."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.command_line import execute
from vit_jax_ext import config as configs
from vit_jax_ext.attention.clusters import tint
from vit_jax_ext.compare import cost
from vit_jax_ext.data import probes
from vit_jax_ext.studies import figures, mechanisms, probe, statistics
from vit_jax_ext.studies import run as running
from vit_jax_ext.studies import study as studies

FILE = '''"""Is a second block worth it?"""

from configs import probes

STUDY = {"1": "one block", "2": "two blocks"}
PROBE = {
  "learning_rates": (1e-3, 3e-3),
  "claims": (("2", "1"),),
  "ablations": {"2": {"wider heads": {"num_heads": 1}}, "1": {"never": {"num_heads": 1}}},
}


def get_config(argument):
  config = probes.recipe("chains", 3)
  config.model.name = "vit_16b"
  config.model.overrides.update(patch_size=8, embed_dim=8, num_heads=2, depth=int(argument), mlp_ratio=1)
  config.batch_size, config.optimizer.warmup_steps, config.log_every_steps = 16, 0, 2
  return config
'''


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
  folder = tmp_path_factory.mktemp("file")
  (folder / "tiny.py").write_text(FILE)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probes, "SIZES", {"train": 64, "validation": 32})
    patch.setattr(probes, "TESTED", 32)
    yield "study", str(folder / "tiny.py"), f"--config.dataset.data_dir={folder / 'tfds'}"


@pytest.fixture(scope="module")
def output(argv, tmp_path_factory):
  """The folder of a study that has run undisturbed."""
  folder = tmp_path_factory.mktemp("output")
  assert execute(*argv, "--seeds=2", f"--output={folder}") == 0
  return folder


def read(output, name="tiny"):
  return json.loads((output / "studies" / f"{name}.json").read_text())


def last(folder):
  return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_learning_rate_is_the_best_on_validation(output):
  for row, cell in zip(read(output)["rows"], ("1", "2"), strict=True):
    folder = output / "studies" / "tiny" / cell
    found = {rate: last(folder / f"rate_{rate}")["eval/top1"] for rate in ("0.001", "0.003")}
    assert row[1] == float(max(found, key=found.get))
    for seed in (0, 1):
      config = json.loads((folder / f"seed_{seed}" / "config.json").read_text())
      assert config["optimizer"]["learning_rate"] == row[1] and config["seed"] == seed
    assert json.loads((folder / "rate_0.001" / "config.json").read_text())["seed"] == 1000


def test_the_tables(output):
  table, verdicts = read(output), read(output, "tiny_verdicts")
  assert table["columns"][4:] == ["1, %", "2, %", "3, %"] and "chance 25%" in table["text"]
  runs = {
    cell: [
      json.loads((output / "studies" / "tiny" / cell / f"seed_{seed}" / "levels.json").read_text()) for seed in (0, 1)
    ]
    for cell in ("1", "2")
  }
  for row, cell in zip(table["rows"], ("1", "2"), strict=True):
    for text, level in zip(row[4:], ("1", "2", "3"), strict=True):
      values = [100 * levels[level] for levels in runs[cell]]
      low, high = statistics.interval(values)
      assert text == f"{np.mean(values):.1f} ({low:.1f} to {high:.1f})"
  assert [row[:2] for row in verdicts["rows"]] == [["two blocks above one block", level] for level in "123"]
  for row in verdicts["rows"]:
    differences = [100 * (two[row[1]] - one[row[1]]) for one, two in zip(runs["1"], runs["2"], strict=True)]
    assert float(row[2]) == pytest.approx(np.mean(differences), abs=0.051)
    assert row[6].startswith(("supported", "contradicted", "not decided with 2 seeds"))
  for name in ("tiny", "tiny.similarity"):
    assert (output / "studies" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  page = (output / "report.html").read_text()
  assert "What that says of the claims" in page and table["rows"][0][4] in page and page.count("<img") == 2


def test_the_test_is_on_images_of_that_difficulty(output, argv, run):
  """`evaluate` finds the same."""
  folder = output / "studies" / "tiny" / "2" / "seed_1"
  status, out, err = run("evaluate", f"--workdir={folder}", "--config.dataset.eval_split=test_2")
  assert status == 0, err
  assert f"eval/top1        {json.loads((folder / 'levels.json').read_text())['2']:.2%}" in out


def test_a_finished_study_is_only_read(argv, output, monkeypatch):
  before = read(output), read(output, "tiny_verdicts"), (output / "studies" / "tiny.png").read_bytes()
  monkeypatch.setattr(running, "train", lambda *args: pytest.fail("trained again"))
  monkeypatch.setattr(probe, "evaluate_weights", lambda *args: pytest.fail("tested again"))
  assert execute(*argv, "--seeds=2", f"--output={output}") == 0
  assert (read(output), read(output, "tiny_verdicts"), (output / "studies" / "tiny.png").read_bytes()) == before


def test_stopped_it_goes_on_to_the_same_table(argv, output, monkeypatch, tmp_path):
  """Stopped in its third search, then with one seed, then with both: bit for bit the tables of the undisturbed one."""
  made, step = [], running._Bar.step

  def interrupt(self, number):
    made.append(number)
    step(self, number)
    if len(made) == 8:
      raise KeyboardInterrupt

  monkeypatch.setattr(running._Bar, "step", interrupt)
  assert execute(*argv, f"--output={tmp_path}", "--seeds=1") == 1
  assert "Not finished: 2 of 6 runs are in, 4 of them searches." in read(tmp_path)["text"]
  assert [row[1] for row in read(tmp_path)["rows"]][1] is None
  assert execute(*argv, f"--output={tmp_path}", "--seeds=1") == 0
  assert "one seed: no interval" in read(tmp_path)["text"]
  assert {row[6] for row in read(tmp_path, "tiny_verdicts")["rows"]} == {"not decided: one seed gives no interval"}
  assert execute(*argv, f"--output={tmp_path}", "--seeds=2") == 0
  for name in ("tiny", "tiny_verdicts"):
    assert read(tmp_path, name) == read(output, name)


def test_ablations_follow_where_a_claim_is_supported(argv, output, monkeypatch, tmp_path):
  """Of the claim's model alone: trained and tested as the others, beside it in tables of their own, once."""
  assert not [path for path in (output / "studies").rglob("*") if "ablations" in path.name or "wider" in path.name]
  folder = tmp_path / "output"
  shutil.copytree(output, folder)
  monkeypatch.setattr(statistics, "_verdict", lambda *args: "supported")
  assert execute(*argv, "--seeds=2", f"--output={folder}") == 0
  assert read(folder)["rows"] == read(output)["rows"]
  labels = ["two blocks", "two blocks, wider heads"]
  table, verdicts = read(folder, "tiny_ablations"), read(folder, "tiny_ablations_verdicts")
  assert [row[0] for row in table["rows"]] == labels and table["rows"][0] == read(output)["rows"][1]
  assert {row[0] for row in verdicts["rows"]} == {f"{labels[0]} above {labels[1]}"}
  runs = folder / "studies" / "tiny" / "2_wider_heads"
  for level, row in zip("123", verdicts["rows"], strict=True):
    found = [[json.loads((path / f"seed_{seed}" / "levels.json").read_text())[level] for seed in (0, 1)]
             for path in (runs.with_name("2"), runs)]  # fmt: skip
    assert float(row[2]) == pytest.approx(100 * np.mean(np.subtract(*found)), abs=0.051)
  config = json.loads((runs / "seed_1" / "config.json").read_text())
  assert config["model"]["overrides"]["num_heads"] == 1 and config["model"]["overrides"]["depth"] == 2
  assert config["optimizer"]["learning_rate"] == table["rows"][1][1]
  assert "What the ablations say" in (folder / "report.html").read_text()
  monkeypatch.setattr(running, "train", lambda *args: pytest.fail("trained again"))
  monkeypatch.setattr(probe, "evaluate_weights", lambda *args: pytest.fail("tested again"))
  assert execute(*argv, "--seeds=2", f"--output={folder}") == 0
  assert (table, verdicts) == (read(folder, "tiny_ablations"), read(folder, "tiny_ablations_verdicts"))
  monkeypatch.setattr(statistics, "_verdict", lambda *args: "not decided")  # as more seeds may say
  assert execute(*argv, "--seeds=2", f"--output={folder}") == 0
  assert not [*(folder / "studies").glob("*_ablations*")] and "ablations" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--config.model.overrides.patch_size=7"], "does not divide into 7-pixel patches"),
    (["--config.dataset.name=digits"], "cannot learn dataset 'digits'; give one of probes/scales"),
    (["--config.dataset.name=probes/rings"], "cannot learn dataset 'probes/rings'"),
    (["--config.optimizer.learning_rate=1"], "chooses config.optimizer.learning_rate itself"),
    (["--seeds=0"], "--seeds=0 is no positive number"),
  ],
)
def test_mistakes(argv, args, words, tmp_path, capsys):
  assert execute(*argv, *args, f"--output={tmp_path / 'x'}") == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("error: ") and words in error
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", studies.PROBES)
def test_models_of_a_probe_cost_the_same(name, capsys):
  """Parameters and multiply-adds within 10%."""
  spec = studies.PROBES[name]
  costs = {}
  for argument in configs.read_study(spec)[1]:
    config = configs.load_config(f"{spec}:{argument}")
    overrides = config.model.overrides.to_dict()
    costs[argument] = cost.model_cost(config.model.name, num_classes=4, **overrides)
  print(costs)
  params, adds = np.array([*costs.values()]).T
  assert params.max() / params.min() <= 1.1 and adds.max() / adds.min() <= 1.1, costs


@pytest.mark.parametrize("name", studies.PROBES)
def test_claims_are_about_models_of_the_study(name):
  labels, about = configs.read_study(studies.PROBES[name])[1], configs.read_probe(studies.PROBES[name])
  assert {argument for claim in about["claims"] for argument in claim} <= set(labels)
  assert about["claims"] and len(about["learning_rates"]) >= 2
  assert configs.load_config(f"{studies.PROBES[name]}:{next(iter(labels))}").dataset.name == f"probes/{name}"


@pytest.mark.parametrize("name", studies.PROBES)
def test_ablations_take_away(name):
  """Every model of a claim has some, each with other values, none dearer."""
  about = configs.read_probe(studies.PROBES[name])
  assert {model for model, _ in about["claims"]} == set(about["ablations"])
  for argument, ablations in about["ablations"].items():
    config = configs.load_config(f"{studies.PROBES[name]}:{argument}")
    usual = config.model.overrides.to_dict()
    whole = cost.model_cost(config.model.name, num_classes=4, **usual)
    for values in ablations.values():
      assert values.items() - usual.items()
      params, adds = cost.model_cost(config.model.name, num_classes=4, **usual | values)
      assert params <= whole[0] and adds <= whole[1]


@pytest.mark.parametrize(
  ("probe_name", "cell", "what", "columns"),
  [
    ("scales", "cross_attention", "attention", ["image", "A\nclass token 0", "A\nclass token 1"]),
    ("twins", "boat_swin", "clusters", ["image", "A\nhead 0", "A\nhead 1"]),
    ("twins", "swin", None, []),
  ],
)
def test_what_models_look_at_is_drawn(probe_name, cell, what, columns, random_model, monkeypatch):
  """What `out` has of one image of each level, and nothing of a model that has none of it.

  Of noise, of each level its own: the empty tiles of twins are all alike, so that rounding tells their clusters.
  """
  config = configs.load_config(f"{studies.PROBES[probe_name]}:{cell}")
  model = random_model(config.model.name, num_classes=4, **config.model.overrides)
  about = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
  monkeypatch.setattr(mechanisms, "load_run", lambda workdir: (model, about))
  generate = probes.generate

  def noise(*args):
    images, labels = generate(*args)
    return np.random.default_rng([*args[1].encode()]).integers(0, 256, images.shape, np.uint8), labels

  monkeypatch.setattr(probes, "generate", noise)
  drawn = mechanisms.draw(probe_name, {"A": "workdir"})
  if what is None:
    assert drawn == {}
    return
  (figure,) = (drawn[name] for name in [what])
  levels = [*probes.PROBES[probe_name].levels]
  axes = np.reshape(figure.axes, (len(levels), len(columns)))
  assert [place.get_title() for place in axes[0]] == columns
  for row, level in zip(axes, levels, strict=True):
    (image,), _ = probes.generate(probe_name, f"test_{level}", [0])
    image = np.broadcast_to(image, (32, 32, 3))
    np.testing.assert_array_equal(row[0].images[0].get_array(), image)
    _, out = model(jnp.asarray(((image / 255 - about["mean"]) / about["std"])[None], jnp.float32))
    for i, place in enumerate(row[1:]):
      shown = place.images[0].get_array()
      if what == "attention":
        (name,) = (key for key in out if key.endswith(f"fusion.{i}.attn"))
        side = (4, 8)[i]  # of the other branch
        expected = np.asarray(out[name][0, :, 0, 1:]).mean(axis=0).reshape(side, side)
        np.testing.assert_allclose(shown, expected, atol=1e-5)
      else:
        name = [key for key in out if key.startswith("layers.0.") and key.endswith(".clusters")][-1]
        np.testing.assert_array_equal(shown, tint(image, np.asarray(out[name][0, i]).reshape(4, 4)))


@pytest.mark.parametrize("name", probes.PROBES)
def test_samples_are_drawn(name, tmp_path):
  """A row of each level with its answers, and the ends of chains."""
  figure = figures.samples(name, columns=5)
  titles = [axes.get_title() for axes in figure.axes]
  for i, level in enumerate(probes.PROBES[name].levels):
    labels = probes.generate(name, f"test_{level}", range(5))[1]
    assert titles[5 * i : 5 * i + 5] == [probes.PROBES[name].class_names[label] for label in labels]
  if name == "chains":
    assert titles[-5:] == ["end A", "end B", "end C", "end D", ""]
  figure.savefig(tmp_path / "samples.png")
