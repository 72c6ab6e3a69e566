"""The compare command: its numbers, its files, and the page in a browser."""

import csv
import dataclasses
import itertools
import json
import pathlib
import re
import shutil

from flax import nnx
import jax
import playwright.sync_api
import pytest

from configs import digits
from tests.command_line import execute
from vit_jax_ext.compare import benchmark, charts, report
from vit_jax_ext.compare.cost import count_params
from vit_jax_ext.console import Countdown
from vit_jax_ext.models import registry
from vit_jax_ext.training.train import train

TINY = dict(embed_dim=16, num_heads=2)
ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("tiny_vit", "tiny_deepvit")


@pytest.fixture(scope="module", autouse=True)
def tiny_variants():
  """Registers two models that compile in a second; the second is the larger, and no accuracy was published for it."""
  with pytest.MonkeyPatch.context() as patch:
    for name, base, top1, depth in (("tiny_vit", "vit_16b", 80.0, 1), ("tiny_deepvit", "deepvit_16b", None, 2)):
      kwargs = registry.VARIANTS[base].kwargs | TINY | {"depth": depth}
      variant = dataclasses.replace(
        registry.VARIANTS[base], kwargs=kwargs, image_size=32, top1=top1, multiply_adds=0.001
      )
      patch.setitem(registry.VARIANTS, name, variant)
    patch.setattr(benchmark, "SECONDS", 0.01)
    yield


def run(*args):
  return execute("compare", *args)


def read_csv(folder):
  with open(folder / "results.csv") as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
  """A few steps of a small ViT, with what `analyze` would write."""
  config = digits.get_config("vit")
  config.dataset.data_dir = data_dir
  config.model.overrides.update(TINY, depth=1, image_size=8, patch_size=4)
  config.total_steps, config.eval_every_steps, config.log_every_steps = 4, 2, 1
  config.optimizer.warmup_steps = 1
  path = tmp_path_factory.mktemp("runs") / "my_run"
  train(config, str(path))
  (path / "analysis").mkdir()
  similarity = {"similarity": {"1": [0.5]}, "threshold": 0.8, "blocks": 2, "similar_blocks": 0}
  (path / "analysis" / "similarity.json").write_text(json.dumps(similarity))
  shutil.copy(ROOT / "docs" / "clusters.png", path / "analysis")
  return path


@pytest.fixture(scope="module")
def compared(workdir, tmp_path_factory):
  """Two models and a run, compared at two batch sizes; the order in which programs were timed."""
  folder, order = tmp_path_factory.mktemp("compared"), []
  (folder / "studies").mkdir()
  study = {"title": "Fusion", "text": "2 seeds", "columns": ["fusion", "top-1, %"], "rows": [["none", [98.2, 0.31]]]}
  (folder / "studies" / "fusion.json").write_text(json.dumps(study))
  original = benchmark.Benchmark.images_per_second

  def recorded(self, program):
    order.append((id(self), program))
    return original(self, program)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(benchmark.Benchmark, "images_per_second", recorded)
    status = run(f"--models={','.join(NAMES)}", f"--workdir={workdir}", "--batch-sizes=1,2", "--rounds=2",
                 f"--output={folder}")  # fmt: skip
  assert status == 0
  return folder, order


def test_numbers(compared, workdir):
  folder, order = compared
  rows = read_csv(folder)
  assert [(row["label"], row["batch_size"]) for row in rows] == [
    (label, size) for label in (*NAMES, "my_run") for size in "12"
  ]
  assert order == order[:12] * 2 and len(set(order)) == 12  # one after another, round by round
  for row in rows:
    rates = [float(row[f"forward_{key}"]) for key in ("slowest", "images_per_second", "fastest")]
    assert 0 < rates[0] <= rates[1] <= rates[2]
    # XLA counts elementwise work too, which is much in models as thin as these.
    assert 1 < float(row["compiled_multiply_adds"]) / int(row["multiply_adds"]) < 3
    assert int(row["training_memory"]) > int(row["training_activations"]) > 0
    assert int(row["training_memory"]) > 3 * 4 * int(row["params"])  # with two moments, in float32
    assert not row["note"]
  for row in rows[:2]:
    model = nnx.eval_shape(lambda: registry.create_model("tiny_vit", rngs=nnx.Rngs(0)))
    assert int(row["params"]) == count_params(model)
    assert (row["published_top1"], row["deviation"], row["image_size"]) == ("80.0", "differs", "32")
  scores = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  best = max((row for row in scores if "eval/top1" in row), key=lambda row: row["eval/top1"])
  assert float(rows[-1]["eval_top1"]) == best["eval/top1"]
  assert float(rows[-1]["eval_ece"]) == best["eval/ece"]
  assert rows[-1]["published_top1"] == ""


def test_files(compared):
  folder, _ = compared
  table = [line for line in (folder / "results.md").read_text().splitlines() if line.startswith("|")]
  assert len(table) == 2 + 6 and len({line.count("|") for line in table}) == 1
  text = (folder / "report.html").read_text()
  assert len(text) < 3_000_000
  assert not re.search(r'(src|href)="(?!data:)', text) and "@import" not in text and "url(" not in text
  for words in (
    *NAMES,
    "my_run",
    "98.20 ± 0.31",
    "No accuracy was published for tiny_deepvit",
    "jax " + jax.__version__,
  ):
    assert words in text
  assert not list(folder.glob("*.part"))


def test_a_model_that_does_not_fit_is_skipped(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(benchmark, "free_memory", lambda: 10**6)
  taken = {}
  monkeypatch.setattr(benchmark.Benchmark, "images_per_second", lambda self, program: 1.0 + len(program))
  original = benchmark.Benchmark.compile

  def remember(self, program):
    try:
      original(self, program)
    finally:
      taken[self.batch_size, program] = self.facts[f"{program}_memory"]

  monkeypatch.setattr(benchmark.Benchmark, "compile", remember)
  assert run("--models=tiny_vit", "--batch-sizes=1,64", "--rounds=1", f"--output={tmp_path}") == 0
  small, large = read_csv(tmp_path)
  assert taken[1, "training"] < 10**6 < taken[64, "training"]
  assert small["training_images_per_second"] == "9.0" and not small["note"]
  assert large["training_images_per_second"] == "" and "training does not fit in memory" in large["note"]
  assert "does not fit in memory" in (tmp_path / "report.html").read_text()
  assert "does not fit in memory" in capsys.readouterr().out


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
  calls = []

  def interrupted(self, program):
    calls.append(program)
    if len(calls) == 6:
      raise KeyboardInterrupt
    if len(calls) == 2:
      raise jax.errors.JaxRuntimeError("INTERNAL: broken")
    return 7.0

  monkeypatch.setattr(benchmark.Benchmark, "images_per_second", interrupted)
  assert run(f"--models={','.join(NAMES)}", "--rounds=3", f"--output={tmp_path}") == 1
  first, second = read_csv(tmp_path)
  assert first["training_images_per_second"] == "" and "training failed, INTERNAL: broken" in first["note"]
  assert (first["forward_images_per_second"], second["training_images_per_second"]) == ("7.0", "7.0")
  assert "Not finished: 1 of 3 rounds" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--models=swin_tinny"], "did you mean swin_tiny"),
    (["--models=tiny_vit", "--batch-sizes=0"], "--batch-sizes=0 is no positive number"),
    (["--models=tiny_vit", "--rounds=x"], "--rounds=x is no positive number"),
    (["--models=tiny_vit", "--dtypes=int8"], "int8"),
    (["--workdir=/nowhere"], "holds no run"),
  ],
)
def test_mistakes(args, words, tmp_path, capsys):
  assert run(*args, f"--output={tmp_path / 'x'}") == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "x").exists()


def test_a_workdir_without_checkpoints(workdir, tmp_path, capsys):
  shutil.copy(workdir / "config.json", tmp_path)
  assert run(f"--workdir={tmp_path}", f"--output={tmp_path / 'x'}") == 2
  assert "holds no complete checkpoint" in capsys.readouterr().err
  assert run(f"--workdir={workdir}") == 2
  assert "give --output=DIR" in capsys.readouterr().err
  assert run("--models=tiny_vit", "--output=/proc/x") == 2
  assert "cannot be written" in capsys.readouterr().err


def test_which_points_no_other_exceeds():
  assert report.undominated({"a": (1, 9), "b": (2, 8), "c": (1.5, 7), "d": (3, 1), "e": (2, 8)}) == ["d", "b", "e", "a"]


def test_labels_do_not_hide_each_other():
  series = [charts.Series(f"deit_small_patch16_{i}", "vit", [(4 + i / 50, 80 + i / 50)]) for i in range(4)]
  drawn = charts.chart("t", series, charts.Axis("x"), charts.Axis("y"), lines=False)["series"]
  heights = sorted((s["text"]["y"], s["text"]["anchor"]) for s in drawn)
  assert len(set(heights)) == 4
  for (y, anchor), (next_y, next_anchor) in itertools.pairwise(heights):
    assert anchor != next_anchor or next_y - y >= charts.FONT - 1


@pytest.mark.parametrize(
  ("values", "ticks"),
  [([4.3, 5.7], [4.5, 5, 5.5]), ([0, 40], [0, 10, 20, 30, 40]), ([79.1, 82.8], [79, 80, 81, 82, 83]), ([5], [4.6])],
)
def test_ticks_are_round_and_inside(values, ticks):
  place, found = charts.Axis("x").fit(values, 0, 100)
  texts = [float(text) for _, text in found]
  assert texts[: len(ticks)] == ticks or len(values) == 1
  assert len(found) >= 3 and all(0 <= x <= 100 for x, _ in found)
  assert all(0 <= place(value) <= 100 for value in values)


def test_time_left_is_learned(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr("time.monotonic", lambda: clock[0])
  with Countdown({"compile": (10, 1.0), "time": (4, 5.0)}) as countdown:
    assert countdown.seconds_left() == 30
    with countdown.job("compile", 5, "half"):
      clock[0] += 20
    assert countdown.seconds_left() == 5 * 4 + 4 * 5
    countdown.skip("time", 3)
    assert countdown.seconds_left() == 5 * 4 + 5


@pytest.fixture(scope="module")
def browser():
  """A headless Chromium: playwright's own, or one on the PATH."""
  names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
  with playwright.sync_api.sync_playwright() as driver:
    own = driver.chromium.executable_path
    path = own if pathlib.Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
    if path is None:
      pytest.skip("no Chromium here; `playwright install chromium` or `apt install chromium` gives one")
    browser = driver.chromium.launch(executable_path=path)
    yield browser
    browser.close()


@pytest.fixture
def open_page(browser, compared):
  """Returns a function: opens the report, and fails on console messages or requests to a network."""
  contexts, complaints = [], []

  def open_at(width, scheme):
    contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
    tab = contexts[-1].new_page()
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    tab.goto((compared[0] / "report.html").as_uri())
    return tab

  yield open_at
  for context in contexts:
    context.close()
  assert not complaints


def amount(text):
  number, unit = text.split()
  return float(number) * {"k": 1e3, "M": 1e6, "G": 1e9}[unit]


def test_the_page_sorts(open_page):
  tab = open_page(1280, "light")
  assert tab.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart") < 2000

  def column(heading):
    index = tab.locator("table >> nth=0 >> th button").all_inner_texts().index(heading)
    return [row.split("\t")[index] for row in tab.locator("table >> nth=0 >> tbody tr").all_inner_texts()]

  button = tab.get_by_role("button", name="multiply-adds").first
  before = column("multiply-adds")
  button.click()
  rising = [amount(text) for text in column("multiply-adds")]
  assert rising == sorted(map(amount, before))
  assert button.locator("..").get_attribute("aria-sort") == "ascending"
  button.click()
  assert [amount(text) for text in column("multiply-adds")] == rising[::-1]
  accuracy = tab.get_by_role("button", name="accuracy").first
  for _ in range(2):  # what is missing stays below
    accuracy.click()
    assert column("accuracy\n%") == ["80.0"] * 2 + [""] * 4
  assert button.locator("..").get_attribute("aria-sort") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_can_be_read(open_page, width, scheme):
  tab = open_page(width, scheme)
  assert tab.evaluate("document.documentElement.scrollWidth") <= width
  headings = tab.locator("h2").all_inner_texts()
  assert headings[:2] == ["Which to choose", "All numbers"] and "Studies" in headings and "Training runs" in headings
  assert tab.locator("svg[role=img]").count() >= 8 and tab.locator("img").count() == 1
  sizes = tab.evaluate(
    """[...document.querySelectorAll("svg[role=img] text")].map(
         text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.clientWidth / 380)"""
  )
  assert min(sizes) > 9
  # WCAG: contrast of text at least 4.5 to 1, of lines and marks 3 to 1.
  contrasts = tab.evaluate(
    """(() => {
      const light = color => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(
          v => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const style = getComputedStyle(document.documentElement);
      const get = name => light(style.getPropertyValue("--" + name));
      const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const of = names => Math.min(...names.map(name => contrast(get(name), get("card"))));
      return [of(["ink", "soft"]), of(["crossvit", "vit", "deepvit", "swin", "boat-swin", "cswin", "boat-cswin"])];
    })()"""
  )
  assert contrasts[0] >= 4.5 and contrasts[1] >= 3
