"""`megagpt report`: the page of real runs, in a browser too, and what it makes of folders that are wrong or hostile."""

import json
import math
import shutil
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import board
import hosts
import processes
import pytest
from matplotlib.image import imread
from support import DEBUG_RUN, ROOT, curves, overrides, read_json

from megagpt.__main__ import main
from megagpt.checkpoint.commit import _digest
from megagpt.cli.pretrain import pretrain
from megagpt.report.curves import SPANS, short_number, thinned
from megagpt.report.page import page_of
from megagpt.report.run_record import RollBack, read_log, read_runs

PICTURES = ROOT / "build" / "report"
HOSTILE = "</pre><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)  # of train/loss and val/loss, or of two runs


@pytest.fixture(scope="module")
def run(dataset: Path, device: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that was resumed for ten more."""
    out_dir = tmp_path_factory.mktemp("runs") / "mine"
    prompts = f"megagpt.sample.prompts={json.dumps(['', HOSTILE])}"
    for steps in (10, 20):
        more = [f"megagpt.schedule.max_steps={steps}", prompts]
        assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, out_dir, *more)]) == 0
    return out_dir


@pytest.fixture(scope="module")
def other(run: Path) -> Path:
    """The same run with another learning rate and a lower loss, in a folder of the same name, which is hostile."""
    folder = run.parent / "<script>alert(1)</script>" / "mine"
    shutil.copytree(run, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lower = [row | {name: row[name] - 1 for name in ("train/loss", "val/loss") if name in row} for row in rows]
    write_rows(folder / "metrics.jsonl", lower)
    settings = read_json(folder / "run.json")
    settings["optimizer"]["params"]["lr"] = 0.5
    (folder / "run.json").write_text(json.dumps(settings))
    return folder


class Page(HTMLParser):
    """The tags, the texts and the rows of the tables of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and self.lasttag in ("td", "th"):
            self.rows[-1][-1] += data.strip()
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page_about(*paths: Path) -> Page:
    """The page without its plots, which take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megagpt.report.page.plot", lambda *args: "<svg></svg>")
        return Page(page_of(read_runs(list(paths)), datetime.now()))


# --- of a real run --------------------------------------------------------------------------------------------


def test_the_page_has_the_numbers_of_the_run_its_samples_data_and_starts(run, dataset, capsys):
    (run / "report.html").unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["report", str(run)]) == 0
    assert f"{run / 'report.html'}: the report on 1 run" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    page = Page((run / "report.html").read_text())
    losses, tokens = curves(run)["val/loss"], 20 * 8 * 64
    assert {"finished", "20 of 20", short_number(tokens)} <= set(page.words)
    best = min(losses, key=lambda step: losses[step])
    assert f"{losses[best]:.4f} at step {best}" in page.words
    for caption in ("by step", "by tokens"):
        assert f"loss, nats per token, {caption}" in page.words
        assert {f"val/{name} {caption}" for name in ("perplexity", "bits_per_byte", "best_loss")} <= set(page.words)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert all(row["continuation"].split("\n")[0].strip() in page.text for row in samples)
    assert [row[3] for row in page.rows if "WORLD_SIZE=1" in "".join(row)] == ["0", "10"]
    assert "Saved at steps 10, 20; the best checkpoint is that of step 20." in page.words
    documents = read_json(dataset / "manifest.json")["splits"]["train"]["documents"]
    assert ["train", f"{documents:,}"] in [row[:2] for row in page.rows]
    assert ["optimizer.params.lr", "0.003"] in page.rows
    assert main(["report", str(run)]) == 0  # its own page is replaced


def test_of_several_runs_the_keys_that_differ_are_told(run, other):
    page = page_about(run, other, run)
    names = ["mine", "<script>alert(1)</script>/mine"]  # those of their folders are equal
    [differences] = [i for i, row in enumerate(page.rows) if row == ["key", *names]]
    assert page.rows[differences + 1] == ["optimizer.params.lr", "0.003", "0.5"]
    assert page.rows[differences + 2][0] != "optimizer.params.betas"
    assert [row[0] for row in page.rows if row[1:2] == ["finished"]] == names
    assert not page.tags & {"script", "img", "b", "link", "iframe"}
    assert "These runs" not in page.text


def test_runs_that_cannot_be_compared_by_their_losses_are_told(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for file in copy.glob("checkpoints/*/COMMIT"):
        record = read_json(file)
        del record["sha256"]
        record["identity"] |= {"tokenizer": "another", "data": {"val": "another"}}
        file.write_text(json.dumps(record | {"sha256": _digest(record)}))
    page = page_about(run, copy)
    assert "These runs have different tokenizers: do not compare losses or perplexities. val/bits_per_byte" in page.text
    assert "These runs were validated" not in page.text  # as its numbers say, the tokens, which the above tells


def test_data_that_was_moved_or_built_again_is_told(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    settings = read_json(copy / "run.json")
    settings["megagpt"]["data"]["val"] = str(tmp_path / "gone")
    noise = Path(settings["megagpt"]["data"]["train"][0]["path"]).parent / "noise"
    settings["megagpt"]["data"]["train"][0]["path"] = str(noise)  # a dataset that the run never read
    (copy / "run.json").write_text(json.dumps(settings))
    page = page_about(copy)
    assert f"{tmp_path / 'gone'}: not here now, or no dataset, so only its name is known." in page.words
    assert "run read another dataset, which was at this place then." in page.words
    assert "read another dataset" not in page_about(run).text


@pytest.fixture
@processes.start_here
def chrome(tmp_path_factory):
    if reason := hosts.missing(*board.NEEDED):
        pytest.skip(reason)
    with board.browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def test_a_browser_shows_the_curves_at_any_width_and_runs_nothing(chrome, run, other, tmp_path):
    out = tmp_path / "both.html"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    for width, theme in ((1280, "light"), (400, "light"), (400, "dark")):
        open_page(chrome, out, width, theme)
        root = "document.documentElement"
        assert chrome.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
        assert chrome.title != "taken"
        picture = PICTURES / f"{width}_{theme}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        assert chrome.save_screenshot(str(picture))
        pixels = imread(picture)[:, :, :3] * 255
        assert pixels.shape[1] == width
        assert (pixels[0, 0].max() < 60) == (theme == "dark")
        if theme == "light":
            assert min(count_of(pixels, color) for color in (BLUE, ORANGE)) > 60  # of the curves
    texts = chrome.execute_script("return [...document.querySelectorAll('svg text')].map(t => t.textContent)")
    assert {"mine", "<script>alert(1)</script>/mine"} <= set(texts)
    assert "</pre><script>document.title" in chrome.execute_script("return document.body.innerText")


def open_page(chrome: "board.Chrome", page: Path, width: int, theme: str) -> None:
    """Open a page in a high window."""
    colors = {"name": "prefers-color-scheme", "value": theme}
    size = {"width": width, "height": 3000, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [colors]})
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chrome.get(page.as_uri())


def count_of(pixels, color: tuple[int, int, int]) -> int:
    return int((abs(pixels - color).max(axis=2) < 12).sum())


# --- of rows and logs -----------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun_or_never_validated_or_is_older_has_a_page(tmp_path):
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text('{"megagpt": {"schedule": {"max_steps": 9}}}')
    (begun / "lock").touch()  # as of every run
    old = [{"step": 3, "tokens_seen": 30, "loss/train": 2.5, "grad_norm": 1.0, "tasks/mine/acc": 0.5}]
    write_rows(tmp_path / "old" / "metrics.jsonl", old)
    page = page_about(begun, tmp_path / "old")
    assert "begun has logged nothing yet." in page.words
    assert ["begun", "not finished", "0 of 9"] in [row[:3] for row in page.rows]
    assert [row[4] for row in page.rows if row[0] == "old"] == ["2.5000"]
    assert {"optim/grad_norm: gradient norm, before clipping", "tasks/mine/acc by step"} <= set(page.words)
    assert "old has no samples.jsonl: it sampled nothing, or an older megagpt wrote it." in page.words


def test_hostile_rows_names_and_logs_are_shown_and_never_followed(tmp_path):
    folder = tmp_path / "_$x$<b>"
    values = (None, math.nan, 10**400, 1e308, True, "x", [1], {"a": 1})
    rows = [{"step": i, "tokens_seen": 10 * i, "train/loss": value} for i, value in enumerate(values)]
    rows += [{"step": 10**400}, {"step": 3, "\ud800": 1, "val/\udcff": 2.0, "tokens_seen": math.inf}]
    rows += [{"step": 5, "tokens_seen": 9, f"val/{HOSTILE}": 1.0}, {"step": 8, "tokens_seen": None, "train/loss": 2.0}]
    write_rows(folder / "metrics.jsonl", rows)
    sample = {"step": 2, "prompt": "\x1b[31m\u202e", "continuation": HOSTILE + "x" * 5000}
    write_rows(folder / "samples.jsonl", [sample, {"step": 2, "prompt": 1}])
    (folder / "starts.json").write_text('{"in_vain": 2, "reached": 8}')
    (folder / "train.log").write_bytes(b"--- \xff: <i> (megagpt 1)\nresuming from a/step_99999999999\n\xff")
    content = page_of(read_runs([folder]), datetime.now())
    page = Page(content)
    assert not page.tags & {"script", "img", "b", "i"}
    assert not {"\x1b", "\u202e", "\ud800"} & set(content)
    assert "_$x$<b>: train/loss was not finite at steps 0, 1, 2, 3." in page.words
    assert "_$x$<b>: the last 2 starts did not get past step 8." in page.words
    assert "more characters" in page.text


def test_a_long_curve_keeps_its_spikes_its_gaps_and_its_ends():
    points = [(float(i), 1.0 + i % 7) for i in range(100_000)]
    points[51_234] = (51_234.0, 1e6)
    points[777] = (777.0, math.nan)
    few = thinned(points)
    assert SPANS <= len(few) <= 3 * SPANS + 1
    assert points[51_234] in few
    assert any(x == 777.0 and math.isnan(y) for x, y in few)
    assert (few[0][0] < 10, few[-1]) == (True, points[-1])
    assert few == sorted(few, key=lambda point: point[0])
    assert thinned(points[:1000]) == points[:1000]


def test_a_thinned_page_says_so(tmp_path):
    rows = [{"step": i, "tokens_seen": i, "train/loss": 3.0} for i in range(1, 20_001)]
    write_rows(tmp_path / "run" / "metrics.jsonl", rows)
    content = page_of(read_runs([tmp_path / "run"]), datetime.now())
    assert "Curves are thinned, the longest from 20,000 points to " in content
    assert len(content) < 300_000


def test_starts_and_roll_backs_are_read_from_the_log(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(
        "--- 2026-01-01 10:00:00+00:00: megagpt train a.json (megagpt 1.0 on h, process 7, WORLD_SIZE=2)\n"
        "a: 5 parameters\n"
        "no checkpoint in a: starting at step 0\n"
        "  | --- 2026: a sampled text (megagpt 1)\n"
        "rolled back from step 16 to a/checkpoints/step_00000012; samples 96 to 127 are skipped\n"
        "--- 2026-01-02 10:00:00+00:00: megagpt train a.json (megagpt 1.0 on h, process 9, WORLD_SIZE=4)\n"
        "a: 6 parameters\n"
        "resuming from a/checkpoints/step_00000018\n"
    )
    starts, roll_backs, opening = read_log(log)
    assert [(start.step, start.where[-12:]) for start in starts] == [(0, "WORLD_SIZE=2"), (18, "WORLD_SIZE=4")]
    assert (roll_backs, opening) == ([RollBack(16, 12)], ["a: 6 parameters"])


# --- wrong uses -----------------------------------------------------------------------------------------------


def test_what_is_no_run_is_answered_by_what_to_give(run, dataset, tmp_path, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "run.json").write_text('{"a')
    (broken / "starts.json").write_text("{}")
    users = tmp_path / "users"  # where a user keeps run files, and no run was
    shutil.copytree(DEBUG_RUN.parent, users)
    shutil.copy(DEBUG_RUN, users / "run.json")
    for given, told in (
        (tmp_path / "nowhere", "nowhere; give a run's folder"),
        (run.with_name(f"{run.name}e"), f"there is no run {run}e; did you mean {run}?"),
        (empty, "is no run: it has no metrics.jsonl; give a run's folder"),
        (users, "is no run: it has no metrics.jsonl; give a run's folder"),
        (dataset, "is a dataset, and no run"),
        (DEBUG_RUN, "is a file, and no run"),
        (run.parent, f"give the runs in it: megagpt report {run}"),
        (run / "checkpoints" / "step_00000020", f"give the run's folder: megagpt report {run}"),
        (run / "checkpoints" / "latest", f"give the run's folder: megagpt report {run}"),
        (run / "metrics.jsonl", f"give the run's folder: megagpt report {run}"),
        (broken, "is damaged ("),
    ):
        assert main(["report", str(run), str(given)]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert told in printed
    assert list(empty.iterdir()) == []


def test_what_is_not_its_own_page_is_never_overwritten(run, tmp_path, capsys):
    page, folder, no_folder = tmp_path / "mine.html", tmp_path / "folder", tmp_path / "a b" / "x.html"
    page.write_text("<h1>my notes</h1>")
    folder.mkdir()
    for out, told in (
        (page, "was not written by megagpt report, and stays as it is; give another --out FILE.html"),
        (folder, f"is a folder; give a file, such as --out {folder / 'report.html'}"),
        (tmp_path / "x.pdf", "give a name that ends in .html"),
        (no_folder, f"make it with mkdir -p '{no_folder.parent}'"),
    ):
        assert main(["report", str(run), "--out", str(out)]) == 2
        assert told in capsys.readouterr().err
    assert page.read_text() == "<h1>my notes</h1>"
    assert sorted(tmp_path.iterdir()) == [folder, page]


def test_without_matplotlib_the_message_names_the_command_that_installs_it(run, monkeypatch, capsys):
    monkeypatch.setattr("megagpt.cli.report.find_spec", lambda name: None)
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err == "error: report needs matplotlib; install with pip install matplotlib\n"
