"""report.html: one page that shows a run, in a real browser."""

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

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
HOSTILE = "<img src=x onerror=alert(1)></script>'\"&"
STEPS = (0, 10, 20)


def flat(step, f):
    """A frame whose colour tells the step and the frame."""
    return Image.new("RGB", (64, 48), (step * 10, f * 30, 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, clips):
    """What a run of 20 steps leaves, with names and values that would like to be markup."""
    out = tmp_path_factory.mktemp("run") / "out & <b>"
    image = clips / "fall0000" / "000.png"
    for step in STEPS:
        video_writer.write_clip(
            out / "validation" / f"step{step:06d}_fall0000_000",
            [flat(step, f) for f in range(8)],
            7,
        )
    told = {
        "fps": 7,
        "clip": str(clips / "fall0000"),
        "frames": list(range(8)),
        "motion": 0.2,
        "motion_bucket_id": 127,
    }
    args = {
        "max_train_steps": 20, "num_frames": 8, "width": 64, "height": 48, "resize_mode": "crop", "validation": [told],
        "validation_image": [str(image)], "base_folder": [str(clips)], "output_dir": HOSTILE, "hub_model_id": HOSTILE,
    }  # fmt: skip
    start = {"command": f"train {HOSTILE}", "commit": "c0ffee", "changed": True, "started": "2026-01-01", "device": HOSTILE,
             "processes": 2, "environment": {"torch": HOSTILE}}  # fmt: skip
    (out / "args.json").write_text(json.dumps(args))
    (out / "run.json").write_text(json.dumps({"starts": [start]}))
    metrics = run_record.MetricsWriter(out, 0)
    for step in range(1, 21):
        metrics.write(step, 1 / step, 1e-4, math.inf if step == 3 else 1.0, 0.5, 10.0)
    base, sigmas = np.random.default_rng(0).random((6, 5)) + 1, [0.1, 0.5, 1.0, 4.0, 20.0]
    for step in STEPS:
        raw = validation_loss.compare_losses(
            sigmas, base, base * (1 - step / 100) + step * 1e-4 * np.arange(6)[:, None]
        )
        run_record.write_row(out / "held_out.jsonl", {"step": step, "seconds": 1.0, "raw": raw})
        run_record.write_row(
            out / "motion.jsonl", {"step": step, "motion": 0.1, "motion_truth": 0.2, "clips": {}}
        )
    metric = {"name": "psnr", "label": HOSTILE, "better": "higher", "still": None, "base": 20.0, "tuned": 24.5,
              "truth": None, "difference": [4.5, 4.0, 5.0], "verdict": "better"}  # fmt: skip
    told = {
        "base": "b",
        "tuned": HOSTILE,
        "protocol": None,
        "clips": 6,
        "metrics": [metric],
        "left_out": {},
    }
    (out / "evaluation").mkdir()
    (out / "evaluation" / "evaluation.json").write_text(json.dumps(told))
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
def look(browser):
    """look(folder, ...): its report in the browser, opened; .said: what the console says, .asked: what it wanted to fetch."""
    contexts = []

    def go(folder, **how):
        contexts.append(browser.new_context(offline=True, **how))
        page = contexts[-1].new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto((folder / "report.html").resolve().as_uri())
        until(page, "typeof decoded == 'undefined' || " + DECODED)
        return page

    yield go
    for context in contexts:
        context.close()


def until(page, expression):
    """Wait until it is true. wait_for_function would evaluate in the page, which forbids that."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise TimeoutError(expression)


DECODED = "[...decoded.values()].every((i) => i.complete)"


def color(page, n):
    """Of the middle of the n-th canvas, (r, g, b)."""
    return page.evaluate(
        "(n) => { const c = document.querySelectorAll('canvas')[n];"
        "return [...c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data.slice(0, 3)]; }", n
    )  # fmt: skip


def near(shown, asked):
    return max(abs(a - b) for a, b in zip(shown, asked)) < 16  # mp4 and WebP lose some


def captions(page):
    return page.locator("#clips figcaption").all_inner_texts()


def test_the_page_is_whole_small_and_quick(folder, look):
    assert (folder / "report.html").stat().st_size < 6e6
    began = time.perf_counter()
    page = look(folder)
    assert (
        time.perf_counter() - began < 20
    )  # a benchmark tells how quick; here only that it does not hang
    assert page.said == []
    assert [url.split(":")[0] for url in page.asked if not url.startswith("data:")] == ["file"]
    text = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:|//)|@import|url\((?!#)", text)


def test_it_plays(folder, look):
    page = look(folder)
    assert page.locator("#play").inner_text() == "Pause"
    seen = set()
    until(page, "Number(frame.value) > 2")
    page.locator("#play").click()
    stopped = page.locator("#frame").input_value()
    for _ in range(3):
        page.wait_for_timeout(200)
        seen.add(page.locator("#frame").input_value())
    assert seen == {stopped}


def test_one_scrubber_moves_every_player_to_the_same_frame(folder, look, clips):
    page = look(folder)
    for f in (0, 3, 7):
        page.locator("#frame").evaluate(
            "(e, f) => { e.value = f; e.dispatchEvent(new Event('input')); }", f
        )
        true = np.asarray(Image.open(clips / "fall0000" / f"{f:03d}.png").convert("RGB"))[24, 32]
        assert near(color(page, 1), flat(0, f).getpixel((0, 0)))
        assert near(color(page, 2), flat(20, f).getpixel((0, 0)))
        assert near(color(page, 3), true.tolist())
        assert page.locator("#frame_told").inner_text() == f"{f + 1} of 8"


def test_clips_of_two_rates_play_side_by_side_in_time(folder, tmp_path, look):
    """The slower one holds its frames; the picture that it began with has gone, and is named."""
    out, path = tmp_path / "out", tmp_path / "slow.png"
    shutil.copytree(folder, out)
    args, name = json.loads((out / "args.json").read_text()), images.clip_name(path)
    for step in STEPS:
        video_writer.write_clip(
            out / "validation" / f"step{step:06d}_{name}", [flat(step, f) for f in range(4)], 3.5
        )
    args["validation"].append({**args["validation"][0], "fps": 3.5})
    args["validation_image"].append(str(path))
    (out / "args.json").write_text(json.dumps(args))
    report.write_report(out)
    page = look(out)
    page.locator("#play").click()
    page.locator("#frame").evaluate("(e) => { e.value = 5; e.dispatchEvent(new Event('input')); }")
    labels = page.locator("canvas").evaluate_all("(all) => all.map((c) => c.ariaLabel)")
    assert page.locator("#frame_told").inner_text() == "6 of 8"
    for clip, f in (("fall0000_000", 5), (name, 2)):
        assert near(color(page, labels.index(f"{clip}, before")), flat(0, f).getpixel((0, 0)))
    assert str(path) in page.locator(".note").first.inner_text()


def test_the_slider_goes_through_all_validations(folder, look):
    page = look(folder)
    page.locator("#play").click()
    page.locator("#frame").evaluate("(e) => { e.value = 2; e.dispatchEvent(new Event('input')); }")
    for i, step in enumerate(STEPS):
        page.locator("#step").evaluate(
            "(e, i) => { e.value = i; e.dispatchEvent(new Event('input')); }", i
        )
        until(page, DECODED)
        page.wait_for_timeout(50)
        assert captions(page) == ["init", "before", f"step {step}", "truth"]
        assert near(color(page, 2), flat(step, 2).getpixel((0, 0)))
        assert near(color(page, 1), flat(0, 2).getpixel((0, 0)))


def test_keys_play_and_go_by_frame_and_by_validation(folder, look):
    page = look(folder)

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


def test_it_stands_still_for_whoever_asked_for_less_motion(folder, look):
    page = look(folder, reduced_motion="reduce")
    page.wait_for_timeout(400)
    assert (
        page.locator("#play").inner_text() == "Play" and page.locator("#frame").input_value() == "0"
    )


def test_nothing_overflows_on_a_phone(folder, look):
    page = look(folder, viewport={"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert all(
        box["width"] >= 140 for box in map(lambda c: c.bounding_box(), page.locator("canvas").all())
    )
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_light_and_dark(folder, look, scheme):
    """Contrast of at least 4.5 with what is behind it (WCAG 2.1, 1.4.3), in plots too."""
    page = look(folder, color_scheme=scheme)
    page.locator("summary").click()
    worst = page.evaluate("""() => {
        const light = (c) => c.map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const of = (text) => text.match(/[\\d.]+/g).map(Number);
        const behind = (e) => { for (; e; e = e.parentElement) {
            const c = of(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c.slice(0, 3); } };
        const found = [...document.querySelectorAll("h1,h2,p,td,th,figcaption,output,label,button,summary,pre,svg text")].map((e) => {
            const [a, b] = [of(getComputedStyle(e)[e.closest("svg") ? "fill" : "color"]).slice(0, 3), behind(e)].map(light).sort();
            return [(b + .05) / (a + .05), e.textContent]; });
        return found.sort((a, b) => a[0] - b[0])[0]; }""")
    assert worst[0] >= 4.5, worst


def test_names_and_values_are_text_whatever_they_hold(folder, look):
    page = look(folder)
    assert page.said == [] and page.locator("img[src=x]").count() == 0
    page.locator("summary").click()
    assert HOSTILE in page.locator("details").inner_text()
    assert page.locator("h1").inner_text() == "out & <b>"
    assert f"train {HOSTILE}" == page.locator("pre").inner_text()


def test_the_page_tells_what_the_files_tell(folder, look):
    row = run_record.read_rows(folder / "held_out.jsonl")[-1]["raw"]
    mean, low, high = row["difference"]
    text = look(folder).locator("body").inner_text()
    assert f"{mean:+.3g}, 95 % interval {low:+.3g} to {high:+.3g}" in text
    assert f"{row['loss'][2]:.4g}" in text and "24.5" in text and "c0ffee, with changes" in text
    assert "10 s of training" in text  # 20 steps of 0.5 s
    for title in (
        "Training loss",
        "Held-out loss",
        "by noise level",
        "Motion",
        "Seconds a step",
        "Peak memory",
    ):
        assert title in text


@pytest.mark.parametrize(
    "ends, kind, said",
    [
        ((-0.2, -0.3, -0.1), "good", "It learned"),
        ((0.2, 0.1, 0.3), "bad", "It got worse"),
        ((-0.1, -0.3, 0.1), "open", "Not told apart"),
        ((0.0, 0.0, 0.0), "open", "exactly that of the start"),
        ((-0.2, None, None), "open", "one film cannot tell"),
    ],
)
def test_the_verdict_follows_from_the_interval(ends, kind, said):
    row = {
        "raw": {
            "clips": 4,
            "films": 3,
            "base": [1.0, 3.0],
            "difference": list(ends),
            "by_sigma": [list(ends)],
        }
    }
    assert report.verdict([row, row], {})[0] == kind and said in report.verdict([row, row], {})[1]


def test_the_verdict_is_of_what_is_exported():
    """The moving averages, where there are any."""
    learned, not_yet = (
        {"clips": 4, "base": [2.0], "difference": d, "by_sigma": [d]}
        for d in ([-1, -2, -0.5], [0.1, -1, 1])
    )
    row = {"raw": learned, "ema": not_yet}
    assert report.verdict([row, row], {})[0] == "open"


def test_where_nothing_was_measured_the_page_says_why():
    assert "pass --validation_folder" in report.verdict([], {})[1]
    held = {"validation_ratio": 0.2, "validation_steps": 500}
    assert "no validation since the start" in report.verdict([{"raw": {}}], held)[1]
    assert "--validation_steps=0" in report.verdict([], {**held, "validation_steps": 0})[1]


def test_rows_of_another_set_of_clips_are_left_out():
    """As where a run went on with other --validation_clips."""
    rows = [
        {"step": s, "raw": {"base": base}} for s, base in ((0, [1.0]), (10, [2.0]), (20, [1.0]))
    ]
    assert [row["step"] for row in validation_loss.comparable_rows(rows)] == [0, 20]


def test_what_a_run_does_not_have_its_page_leaves_out(tmp_path, look):
    args = {"max_train_steps": 5, "num_frames": 8, "width": 64, "height": 48}
    (tmp_path / "args.json").write_text(json.dumps(args))
    text = report.write_report(tmp_path).read_text()
    assert "<canvas" not in text and "Curves" not in text and "Rendered" not in text
    assert "Whether it learned is not known" in text


def test_damaged_and_missing_files_are_left_out_by_name(folder, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    damaged = out / "validation" / "step000010_fall0000_000.mp4"
    damaged.write_bytes(damaged.read_bytes()[:200])
    args = json.loads((out / "args.json").read_text())
    gone = str(tmp_path / "gone.png")
    (out / "args.json").write_text(json.dumps({**args, "validation_image": [gone]}))
    with (out / "metrics.jsonl").open("a") as f:
        f.write('{"step": 21, "lo')  # killed there
    shown = report.players(out, {**args, "validation_image": [gone]})
    assert shown["steps"] == [0, 20] and shown["clips"][0]["truth"] is None
    assert str(damaged) in caplog.text and gone in caplog.text
    report.write_report(out)


def test_a_page_of_many_large_videos_stays_small(tmp_path, monkeypatch):
    """And keeps the first and the last of each."""
    monkeypatch.setattr(report, "MAX_VIDEO_CHARACTERS", 300_000)
    noise, folder = np.random.default_rng(0), tmp_path / "validation"
    folder.mkdir()
    for name in range(3):
        frames = [
            Image.fromarray(noise.integers(0, 255, (72, 128, 3), dtype=np.uint8)) for _ in range(4)
        ]
        for step in range(14):
            video_writer.write_mp4(folder / f"step{step:06d}_{name}.mp4", frames, 7)
    shown = report.players(tmp_path, {})
    assert (
        sum(len(sheet["uri"]) for clip in shown["clips"] for sheet in clip["steps"])
        <= report.MAX_VIDEO_CHARACTERS
    )
    assert shown["steps"][0] == 0 and shown["steps"][-1] == 13 and len(shown["clips"]) == 3
    assert (
        shown["left_out"] == 3 * (14 - len(shown["steps"])) > 6
    )  # more than STEPS alone leaves out


def test_of_many_pictures_the_first_are_shown_and_the_others_counted(tmp_path):
    (tmp_path / "validation").mkdir()
    for name in range(12):
        video_writer.write_mp4(
            tmp_path / "validation" / f"step000000_picture{name}.mp4", [flat(0, 0)], 7
        )
    shown = report.players(tmp_path, {})
    assert [clip["name"] for clip in shown["clips"]] == [f"picture{name}" for name in range(8)]
    assert shown["left_out"] == 4


def test_a_folder_without_a_run_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "svd_xtend.evaluation.report", tmp_path],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and done.stderr == f"{tmp_path}: holds no args.json; pass the --output_dir of a run\n"
    )


def test_a_run_ends_with_its_page(run, tmp_path, look):
    write_clips(tmp_path / "held", "fall", 3, seed=7)
    out = run("--max_train_steps=2", "--validation_steps=5", "--num_inference_steps=1", "--validation_clips=2", f"--validation_folder={tmp_path / 'held'}",
              lora=True, page=True)  # fmt: skip
    page = look(out)
    assert page.said == [] and captions(page) == ["init", "before", "step 2", "truth"]
    assert "loss" in page.locator(".verdict").inner_text()
