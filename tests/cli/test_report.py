"""`danling-conf report`: the page of a real run, in a real browser."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from danling_conf.cli.main import main
from danling_conf.cli.report import duration, report
from danling_conf.records.attempts import attempts_of
from danling_conf.records.history import goodput
from danling_conf.records.metrics import read_metrics, series
from danling_conf.records.stopped import Stopped
from tests.cli.browser import dom_of, picture_of
from tests.support.small import Net, Pairs, loss, runner

DATA = {"train": Pairs(), "val": Pairs(9, seed=1)}
SETTINGS: dict[str, Any] = {"log_interval": 1, "eval_interval": 3, "max_grad_norm": 1.0,
                            "checkpoint": {"load_only": False, "interval": 3}}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two attempts, the first of which was lost without a word."""
    root = tmp_path_factory.mktemp("runs")

    class Dying(Net):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            Dying.count += self.training
            if Dying.count > 7:
                raise RuntimeError("<b>the machine</b> is lost")
            return super().forward(x)

    first = runner(root, {**SETTINGS, "steps": 12})
    with pytest.raises(RuntimeError, match="is lost"):
        first.fit(Dying, DATA, loss=loss)
    found = first.world.attempt.run_directory
    second = runner(root, {**SETTINGS, "steps": 12, "resume": str(found)})
    second.fit(Net, DATA, loss=loss)
    (second.world.attempt.directory / "result.json").write_text(
        json.dumps({"status": "completed", "score": second.score.best, "error": None})
    )
    return found


def test_a_page_is_written_and_said_where(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "there" / "run.html"
    assert main(["report", str(run), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"report of {run}: {page}\n"
    assert page.read_text(encoding="utf-8") == report(run)


@pytest.mark.parametrize(
    ("directory", "html", "said"),
    [
        (lambda run: run / "nowhere", "page.html", "there is no such directory"),
        (lambda run: run.parents[2], "page.html", "2 runs in it, and a report shows one"),
        (lambda run: run, "run.json/page.html", "it cannot be written"),
    ],
)
def test_what_is_refused(
    run: Path, directory: Callable[[Path], Path], html: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parents[2] / "lin" / "exp" / "other"
    other.mkdir(exist_ok=True)
    (other / "run.json").touch()
    assert main(["report", str(directory(run)), "--html", str(run / html)]) == 2
    assert said in capsys.readouterr().err


def test_what_the_page_says(run: Path) -> None:
    page = report(run)
    history = read_metrics(run)
    assert f"<title>Run {run.name}</title>" in page
    for heading in ("Overview", "Training", "Speed and memory", "Attempts", "Checkpoints", "Configuration",
                    "Environment"):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page
    charts = re.findall(r'aria-label="([^"]+)"', page)
    assert charts == ["Loss", "Learning rate", "Gradient norm", "Throughput, samples per second", "Time of a step, ms",
                      "Peak memory", "Attempts and what ended them"]  # fmt: skip
    assert f"{series(history, 'train.loss')[-1][1]:.5g}" in page
    share = goodput(run)
    assert share is not None
    assert f"{100 * share:.1f} %" in page
    assert "<td>max_grad_norm</td><td>1.0</td>" in page
    assert "ckpt-s00000012" in page
    assert page.count("<title>checkpoint of step ") == len(list((run / "checkpoints").glob("ckpt-*"))) > 1
    assert "torch" in page


def test_attempts_as_they_ended(run: Path) -> None:
    first, second = attempts_of(run)
    assert (first.status, first.first_step, first.last_step) == ("failed", 0, 7)
    assert (second.status, second.first_step, second.last_step) == ("completed", 6, 12)
    assert first.begin <= first.end <= second.end
    assert second.score is not None
    assert second.environment.text("torch")
    assert second.difference["max_grad_norm"] == 1.0


def test_a_run_that_goes_on_is_live(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    run = ours.world.attempt.run_directory
    ours.prepare(Net, {"train": Pairs()}, loss=loss)
    assert [item.status for item in attempts_of(run)] == ["running"]
    assert "running" in report(run)
    ours.stop_request.number = int(signal.SIGTERM)
    batches = ours.batches("train")
    with pytest.raises(Stopped):
        ours.step(next(batches))
    ours.close()
    assert [item.status for item in attempts_of(run)] == ["interrupted"]  # as the runner itself wrote


def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    page.write_text(report(run), encoding="utf-8")
    document = dom_of(page, tmp_path)
    assert document.count("<svg viewBox") == 7
    assert document.count('class="path"') == 9  # two losses, learning rate, norm, speed, three of a step's, memory
    # A page that asks itself: what is drawn where, and what a pointer and a click do.
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", PROBE + "</body>"), encoding="utf-8")
    found = json.loads(
        re.search(r'<pre id="found">(.*?)</pre>', dom_of(probe, tmp_path, "--window-size=1200,900")).group(1)
    )
    assert found["wide"] <= 1200  # nothing sticks out
    assert all(width > 300 and height > 60 for width, height in found["charts"])
    assert "step " in found["tip"]
    assert "train.loss: " in found["tip"]
    whole, zoomed, back = found["zoom"]
    assert zoomed != whole
    assert len(zoomed) > len(whole) / 2
    assert back.count("L") == whole.count("L")
    assert float(back[1:].split()[0]) == pytest.approx(float(whole[1:].split()[0]), abs=0.2)
    assert found["first"] != found["sorted"]
    assert found["external"] == 0


PROBE = """<pre id="found"></pre><script>
const svg = document.querySelector('svg[data-lines]'), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2, clientY: box.top + 50}));
const curve = () => svg.querySelector('.curves .path').getAttribute('d');
const at = (what, share) => svg.dispatchEvent(new PointerEvent(what, {clientX: box.left + box.width * share}));
const tipped = document.getElementById('tip').textContent, zoom = [curve()];
at('pointerdown', .3); at('pointermove', .5); at('pointerup', .6); zoom.push(curve());
at('dblclick', .5); zoom.push(curve());
const table = [...document.querySelectorAll('table')].find(t => t.textContent.includes('max_grad_norm'));
const first = () => table.tBodies[0].rows[0].textContent;
const before = first(); table.tHead.rows[0].cells[0].click(); table.tHead.rows[0].cells[0].click();
document.getElementById('found').textContent = JSON.stringify({
  wide: document.documentElement.scrollWidth, tip: tipped, zoom,
  charts: [...document.querySelectorAll('.chart > svg')].map(s => s.getBoundingClientRect())
    .map(b => [b.width, b.height]),
  first: before, sorted: first(), external: performance.getEntriesByType('resource').length});
</script>"""


def test_light_dark_and_narrow_are_different_pictures(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    page.write_text(report(run), encoding="utf-8")
    pictures = {picture_of(page, tmp_path, width=1200, height=900), picture_of(page, tmp_path, width=420, height=900),
                picture_of(page, tmp_path, width=1200, height=900, dark=True)}  # fmt: skip
    assert len(pictures) == 3
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 20_000 for picture in pictures)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.5, "0.5 s"), (45, "45 s"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"), (100800, "1 d 4 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
