"""report.html, the page that shows a run, in a real browser."""

import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from svd_xtend.data import images
from svd_xtend.demo.synthetic_clips import write_clips
from svd_xtend.evaluation import report
from svd_xtend.inference import video_writer
from svd_xtend.training import run_record, validation_loss

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)
HOSTILE = "<img src=x onerror=alert(1)></script>'\"&"
STEPS = (0, 10, 20)


def flat(step, f):
    """A frame whose colour encodes the step and the frame index."""
    return Image.new("RGB", (64, 48), (step * 10, f * 30, 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    """The output folder of a run of 20 steps, with names and values that look like markup."""
    out = tmp_path_factory.mktemp("run") / "out & <b>"
    image = clips / "fall0000" / "000.png"
    for step in STEPS:
        stem = out / "validation" / f"step{step:06d}_fall0000_000"
        video_writer.write_clip(stem, [flat(step, f) for f in range(8)], 7)
    validation_input = {
        "fps": 7,
        "clip": str(clips / "fall0000"),
        "frames": list(range(8)),
        "motion": 0.2,
        "motion_bucket_id": 127,
    }
    args = {
        "max_train_steps": 20,
        "num_frames": 8,
        "width": 64,
        "height": 48,
        "resize_mode": "crop",
        "validation": [validation_input],
        "validation_image": [str(image)],
        "base_folder": [str(clips)],
        "output_dir": HOSTILE,
        "hub_model_id": HOSTILE,
    }
    start = {
        "command": f"train {HOSTILE}",
        "commit": "c0ffee",
        "changed": True,
        "started": "2026-01-01",
        "device": HOSTILE,
        "processes": 2,
        "environment": {"torch": HOSTILE},
    }
    (out / "args.json").write_text(json.dumps(args))
    (out / "run.json").write_text(json.dumps({"starts": [start]}))
    metrics = run_record.MetricsWriter(out, 0)
    for step in range(1, 21):
        metrics.write(step, 1 / step, 1e-4, math.inf if step == 3 else 1.0, 0.5, 10.0)
    base = np.random.default_rng(0).random((6, 5)) + 1
    for step in STEPS:
        tuned = base * (1 - step / 100) + step * 1e-4 * np.arange(6)[:, None]
        raw = validation_loss.compare_losses([0.1, 0.5, 1.0, 4.0, 20.0], base, tuned)
        run_record.write_row(out / "held_out.jsonl", {"step": step, "seconds": 1.0, "raw": raw})
        run_record.write_row(
            out / "motion.jsonl", {"step": step, "motion": 0.1, "motion_truth": 0.2, "clips": {}}
        )
    metric = {
        "name": "psnr",
        "label": HOSTILE,
        "better": "higher",
        "still": None,
        "base": 20.0,
        "tuned": 24.5,
        "truth": None,
        "difference": [4.5, 4.0, 5.0],
        "verdict": "better",
    }
    evaluation = {
        "base": "b",
        "tuned": HOSTILE,
        "protocol": None,
        "clips": 6,
        "metrics": [metric],
        "left_out": {},
    }
    (out / "evaluation").mkdir()
    (out / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    report.write_report(out)
    return out


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser):
    """open_report(folder, ...): its report in the browser. page.messages: console output; page.requests: URLs."""
    contexts = []

    def open_page(folder, **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.messages = []
        page.requests = []

        def dismiss(dialog):
            page.messages.append(dialog.message)
            dialog.dismiss()

        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.on("dialog", dismiss)
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto((folder / "report.html").resolve().as_uri())
        until(page, "typeof decoded == 'undefined' || " + DECODED)
        return page

    yield open_page
    for context in contexts:
        context.close()


def until(page, expression):
    """Wait until an expression is true. The page's content policy forbids wait_for_function."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise TimeoutError(expression)


DECODED = "[...decoded.values()].every((i) => i.complete)"


def color(page, n):
    """Colour (r, g, b) in the middle of the n-th canvas."""
    return page.evaluate(
        "(n) => { const c = document.querySelectorAll('canvas')[n];"
        "const pixels = c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1);"
        "return [...pixels.data.slice(0, 3)]; }",
        n,
    )


def near(shown, expected):
    """mp4 and WebP change colours a little."""
    return max(abs(a - b) for a, b in zip(shown, expected)) < 16


def set_slider(page, name, value):
    page.locator(f"#{name}").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
    )


def captions(page):
    return page.locator("#clips figcaption").all_inner_texts()


def test_the_page_is_whole_small_and_quick(folder, open_report):
    assert (folder / "report.html").stat().st_size < 6e6
    began = time.perf_counter()
    page = open_report(folder)
    # only that it does not hang; benchmarks/bench_held_out.py measures the page
    assert time.perf_counter() - began < 20
    assert page.messages == []
    assert [url.split(":")[0] for url in page.requests if not url.startswith("data:")] == ["file"]
    text = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:|//)|@import|url\((?!#)", text)


def test_it_plays(folder, open_report):
    page = open_report(folder)
    assert page.locator("#play").inner_text() == "Pause"
    seen = set()
    until(page, "Number(frame.value) > 2")
    page.locator("#play").click()
    stopped = page.locator("#frame").input_value()
    for _ in range(3):
        page.wait_for_timeout(200)
        seen.add(page.locator("#frame").input_value())
    assert seen == {stopped}


def test_one_scrubber_moves_every_player_to_the_same_frame(folder, open_report, clips):
    page = open_report(folder)
    for f in (0, 3, 7):
        set_slider(page, "frame", f)
        ground_truth = np.asarray(Image.open(clips / "fall0000" / f"{f:03d}.png").convert("RGB"))[
            24, 32
        ]
        assert near(color(page, 1), flat(0, f).getpixel((0, 0)))
        assert near(color(page, 2), flat(20, f).getpixel((0, 0)))
        assert near(color(page, 3), ground_truth.tolist())
        assert page.locator("#frame_label").inner_text() == f"{f + 1} of 8"


def test_clips_of_two_frame_rates_play_side_by_side_in_time(folder, tmp_path, open_report):
    """The slower one repeats its frames. Its validation image was deleted, and the page says so."""
    out = tmp_path / "out"
    path = tmp_path / "slow.png"
    shutil.copytree(folder, out)
    args = json.loads((out / "args.json").read_text())
    name = images.clip_name(path)
    for step in STEPS:
        stem = out / "validation" / f"step{step:06d}_{name}"
        video_writer.write_clip(stem, [flat(step, f) for f in range(4)], 3.5)
    args["validation"].append({**args["validation"][0], "fps": 3.5})
    args["validation_image"].append(str(path))
    (out / "args.json").write_text(json.dumps(args))
    report.write_report(out)
    page = open_report(out)
    page.locator("#play").click()
    set_slider(page, "frame", 5)
    labels = page.locator("canvas").evaluate_all("(all) => all.map((c) => c.ariaLabel)")
    assert page.locator("#frame_label").inner_text() == "6 of 8"
    for clip, f in (("fall0000_000", 5), (name, 2)):
        canvas = labels.index(f"{clip}, base model")
        assert near(color(page, canvas), flat(0, f).getpixel((0, 0)))
    assert str(path) in page.locator(".note").first.inner_text()


def test_the_step_slider_goes_through_all_validations(folder, open_report):
    page = open_report(folder)
    page.locator("#play").click()
    set_slider(page, "frame", 2)
    for i, step in enumerate(STEPS):
        set_slider(page, "step", i)
        until(page, DECODED)
        page.wait_for_timeout(50)
        assert captions(page) == ["first frame", "base model", f"step {step}", "ground truth"]
        assert near(color(page, 2), flat(step, 2).getpixel((0, 0)))
        assert near(color(page, 1), flat(0, 2).getpixel((0, 0)))


def test_keys_play_and_move_by_frame_and_by_step(folder, open_report):
    page = open_report(folder)

    def value(name):
        return int(page.locator(f"#{name}").input_value())

    page.keyboard.press("Space")
    assert page.locator("#play").inner_text() == "Play"
    before = value("frame")
    page.keyboard.press("ArrowLeft" if before else "ArrowRight")
    assert abs(value("frame") - before) == 1
    page.keyboard.press("ArrowDown")
    assert value("step") == 1 and captions(page)[2] == "step 10"
    page.keyboard.press("ArrowUp")
    assert value("step") == 2


def test_it_does_not_play_by_itself_for_users_who_prefer_reduced_motion(folder, open_report):
    page = open_report(folder, reduced_motion="reduce")
    page.wait_for_timeout(400)
    assert page.locator("#play").inner_text() == "Play"
    assert page.locator("#frame").input_value() == "0"


def test_nothing_overflows_on_a_phone(folder, open_report):
    page = open_report(folder, viewport={"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for canvas in page.locator("canvas").all():
        assert canvas.bounding_box()["width"] >= 140
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


WORST_CONTRAST = """() => {
    const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) =>
        .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
    const numbers = (css) => css.match(/[\\d.]+/g).map(Number);
    const background = (element) => {
        for (; element; element = element.parentElement) {
            const color = numbers(getComputedStyle(element).backgroundColor);
            if (color.length === 3 || color[3] > 0) return color.slice(0, 3);
        }
    };
    const texts = "h1,h2,p,td,th,figcaption,output,label,button,summary,pre,svg text";
    const contrasts = [...document.querySelectorAll(texts)].map((element) => {
        const property = element.closest("svg") ? "fill" : "color";
        const color = numbers(getComputedStyle(element)[property]).slice(0, 3);
        const pair = [luminance(color), luminance(background(element))];
        const ratio = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
        return [ratio, element.textContent];
    });
    return contrasts.sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast_in_light_and_dark(folder, open_report, scheme):
    """At least 4.5 to its background (WCAG 2.1, 1.4.3), in plots too."""
    page = open_report(folder, color_scheme=scheme)
    page.locator("summary").click()
    worst = page.evaluate(WORST_CONTRAST)
    assert worst[0] >= 4.5, worst


def test_names_and_values_are_never_markup(folder, open_report):
    page = open_report(folder)
    assert page.messages == []
    assert page.locator("img[src=x]").count() == 0
    page.locator("summary").click()
    assert HOSTILE in page.locator("details").inner_text()
    assert page.locator("h1").inner_text() == "out & <b>"
    assert f"train {HOSTILE}" == page.locator("pre").inner_text()


def test_the_page_shows_the_numbers_of_the_files(folder, open_report):
    row = run_record.read_rows(folder / "held_out.jsonl")[-1]["raw"]
    mean, low, high = row["difference"]
    text = open_report(folder).locator("body").inner_text()
    assert f"difference {mean:+.3g}, 95 % confidence interval {low:+.3g} to {high:+.3g}" in text
    assert f"{row['loss'][2]:.4g}" in text
    assert "24.5" in text
    assert "c0ffee, with uncommitted changes" in text
    assert "10 s of training" in text  # 20 steps of 0.5 s
    for title in (
        "Training loss",
        "Validation loss vs base model",
        "Validation loss by noise level",
        "Motion of rendered clips",
        "Seconds per step",
        "Peak memory",
    ):
        assert title in text


@pytest.mark.parametrize(
    "interval, kind, fragment",
    [
        ((-0.2, -0.3, -0.1), "good", "It learned"),
        ((0.2, 0.1, 0.3), "bad", "It got worse"),
        ((-0.1, -0.3, 0.1), "open", "No clear difference"),
        ((0.0, 0.0, 0.0), "open", "exactly that of the base model"),
        ((-0.2, None, None), "open", "only one source video"),
    ],
)
def test_the_verdict_follows_from_the_confidence_interval(interval, kind, fragment):
    raw = {
        "clips": 4,
        "films": 3,
        "base": [1.0, 3.0],
        "difference": list(interval),
        "by_sigma": [list(interval)],
    }
    row = {"raw": raw}
    verdict_kind, sentence = report.judge_run([row, row], {})
    assert verdict_kind == kind
    assert fragment in sentence


def test_the_verdict_is_about_the_exported_weights():
    """The EMA weights, if there are any."""

    def losses(interval):
        return {"clips": 4, "base": [2.0], "difference": interval, "by_sigma": [interval]}

    row = {"raw": losses([-1, -2, -0.5]), "ema": losses([0.1, -1, 1])}
    assert report.judge_run([row, row], {})[0] == "open"


def test_without_a_measurement_the_verdict_says_why():
    args = {"validation_ratio": 0.2, "validation_steps": 500}
    assert "Pass --validation_folder" in report.judge_run([], {})[1]
    assert "no validation has run since" in report.judge_run([{"raw": {}}], args)[1]
    assert "--validation_steps is 0" in report.judge_run([], {**args, "validation_steps": 0})[1]


def test_rows_of_another_validation_set_are_left_out():
    """As when a run was resumed with other --validation_clips."""
    rows = [
        {"step": step, "raw": {"base": base}}
        for step, base in ((0, [1.0]), (10, [2.0]), (20, [1.0]))
    ]
    assert [row["step"] for row in validation_loss.comparable_rows(rows)] == [0, 20]


def test_the_page_leaves_out_what_a_run_does_not_have(tmp_path):
    args = {"max_train_steps": 5, "num_frames": 8, "width": 64, "height": 48}
    (tmp_path / "args.json").write_text(json.dumps(args))
    text = report.write_report(tmp_path).read_text()
    assert "<canvas" not in text
    assert "Training curves" not in text
    assert "Rendered validation clips" not in text
    assert "unknown whether the run learned" in text


def test_damaged_and_missing_files_are_left_out_and_named(folder, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    damaged = out / "validation" / "step000010_fall0000_000.mp4"
    damaged.write_bytes(damaged.read_bytes()[:200])
    missing = str(tmp_path / "missing.png")
    args = json.loads((out / "args.json").read_text())
    args["validation_image"] = [missing]
    (out / "args.json").write_text(json.dumps(args))
    with (out / "metrics.jsonl").open("a") as f:
        f.write('{"step": 21, "lo')  # cut off, as by a kill
    players = report.make_players(out, args)
    assert players["steps"] == [0, 20]
    assert players["missing"] == [missing]
    assert players["clips"][0]["ground_truth"] is None
    assert str(damaged) in caplog.text
    assert missing in caplog.text
    report.write_report(out)


def test_a_page_of_many_large_videos_stays_small(tmp_path, monkeypatch):
    """It keeps the first and the last step of each."""
    monkeypatch.setattr(report, "MAX_VIDEO_CHARACTERS", 300_000)
    rng = np.random.default_rng(0)
    (tmp_path / "validation").mkdir()
    for name in range(3):
        noise = rng.integers(0, 255, (4, 72, 128, 3), dtype=np.uint8)
        frames = [Image.fromarray(frame) for frame in noise]
        for step in range(14):
            file = tmp_path / "validation" / f"step{step:06d}_{name}.mp4"
            video_writer.write_mp4(file, frames, 7)
    players = report.make_players(tmp_path, {})
    characters = sum(len(sheet["uri"]) for clip in players["clips"] for sheet in clip["steps"])
    assert characters <= report.MAX_VIDEO_CHARACTERS
    assert players["steps"][0] == 0
    assert players["steps"][-1] == 13
    assert len(players["clips"]) == 3
    # more are left out than by MAX_STEPS alone
    assert players["left_out"] == 3 * (14 - len(players["steps"])) > 3 * (14 - report.MAX_STEPS)


def test_of_many_images_the_first_are_shown_and_the_others_counted(tmp_path):
    (tmp_path / "validation").mkdir()
    for name in range(12):
        file = tmp_path / "validation" / f"step000000_picture{name}.mp4"
        video_writer.write_mp4(file, [flat(0, 0)], 7)
    players = report.make_players(tmp_path, {})
    assert [clip["name"] for clip in players["clips"]] == [f"picture{name}" for name in range(8)]
    assert players["left_out"] == 4


def test_a_folder_without_a_run_gives_an_error_of_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "svd_xtend.evaluation.report", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"{tmp_path}: no args.json in it; pass the --output_dir of a training run\n"
    )


def test_a_run_ends_with_its_page(run, tmp_path, open_report):
    write_clips(tmp_path / "validation_set", "fall", 3, seed=7)
    out = run(
        "--max_train_steps=2",
        "--validation_steps=5",
        "--num_inference_steps=1",
        "--validation_clips=2",
        f"--validation_folder={tmp_path / 'validation_set'}",
        lora=True,
        page=True,
    )
    page = open_report(out)
    assert page.messages == []
    assert captions(page) == ["first frame", "base model", "step 2", "ground truth"]
    assert "loss" in page.locator(".verdict").inner_text()
