"""Metrics of rendered clips: identities, closed formulas, and references computed another way."""

import sys
import types

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from svd_xtend.data.tracklets import Tracklets
from svd_xtend.demo import synthetic_clips
from svd_xtend.evaluation import metrics
from svd_xtend.training import validation_loss


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def texture(rng, height, width):
    """A smooth picture with detail everywhere, (h, w, 3) uint8."""
    soft = gaussian_filter(rng.normal(size=(height, width, 3)), (2, 2, 0))
    return (128 + 40 * soft / soft.std()).clip(0, 255).astype(np.uint8)


def temporal_metrics(frames):
    return metrics.temporal_metrics(frames, metrics.optical_flows(frames), 7)


def frame_change(frames):
    """Mean absolute change from frame to frame."""
    return np.abs(np.diff(frames.astype(float), axis=0)).mean()


# ------------------------------------------------------------------------------------------------------------- frames


def test_equal_clips_have_100_decibels_and_a_similarity_of_one(rng):
    frames = rng.integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    quality = metrics.frame_metrics(frames, frames)
    assert quality["psnr"].tolist() == [100, 100, 100]
    assert quality["ssim"] == pytest.approx(1, abs=1e-6)


def test_psnr_of_each_frame_is_the_formula(rng):
    a, b = rng.integers(0, 256, (2, 3, 48, 64, 3), dtype=np.uint8)
    expected = [10 * np.log10(255**2 / np.mean((x.astype(float) - y) ** 2)) for x, y in zip(a, b)]
    psnr = metrics.frame_metrics(a, b)["psnr"]
    assert psnr == pytest.approx(expected, abs=1e-4)
    assert psnr.mean() == pytest.approx(synthetic_clips.psnr(a, b), abs=0.05)


def test_ssim_is_the_formula_of_wang_et_al(rng):
    """Their formula under a Gaussian of 1.5 pixels, by scipy, with mirrored borders."""
    a = texture(rng, 40, 56)[None]
    b = texture(rng, 40, 56)[None]
    x = a[0] / 255
    y = b[0] / 255

    def blur(v):
        return gaussian_filter(v, (1.5, 1.5, 0), truncate=3.5, mode="mirror")

    mean_x = blur(x)
    mean_y = blur(y)
    var_x = blur(x * x) - mean_x**2
    var_y = blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4)
    denominator = (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    expected = (numerator / denominator).mean()
    assert metrics.frame_metrics(a, b)["ssim"][0] == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------------------------- temporal consistency


def test_a_static_clip_has_no_flicker_warp_error_or_motion(rng):
    frames = np.repeat(texture(rng, 48, 64)[None], 4, 0)
    assert temporal_metrics(frames) == {"flicker": 0, "warp_error": 0, "motion": 0}


def test_flicker_is_the_change_of_static_pixels(rng):
    frames = np.repeat(texture(rng, 48, 64)[None], 4, 0)
    frames[1::2] += np.where(frames[1::2] < 200, 10, 0).astype(np.uint8)
    assert temporal_metrics(frames)["flicker"] == pytest.approx(frame_change(frames), rel=0.05)


def test_rigid_motion_is_neither_flicker_nor_warp_error(rng):
    """A textured square moves over a static background: plain frame differences would count it."""
    background = texture(rng, 96, 128)
    square = texture(rng, 40, 40)
    frames = np.stack([background] * 4)
    for f in range(4):
        frames[f, 20:60, 10 + 6 * f : 50 + 6 * f] = square
    values = temporal_metrics(frames)
    assert values["flicker"] < 0.05 * frame_change(frames)
    assert values["warp_error"] < 0.2 * frame_change(frames)
    assert values["motion"] > 0.1


def test_flicker_is_undefined_if_every_pixel_moves(rng):
    panorama = texture(rng, 96, 160)
    frames = np.stack([panorama[:, 8 * f : 8 * f + 128] for f in range(4)])
    values = temporal_metrics(frames)
    assert values["flicker"] is None
    assert values["warp_error"] < 0.1 * frame_change(frames)


# --------------------------------------------------------------------------------------------------------------- boxes


def test_moving_shapes_follow_their_boxes_and_a_static_clip_does_not():
    clips = [synthetic_clips.make_clip((5, i), "roam") for i in range(12)]
    moving = []
    static = []
    for clip in clips:
        first_frame_repeated = np.repeat(clip.frames[:1], len(clip.frames), 0)
        boxes = clip.tracklets()
        moving.append(metrics.box_metrics(metrics.optical_flows(clip.frames), boxes))
        static.append(metrics.box_metrics(metrics.optical_flows(first_frame_repeated), boxes))
    assert np.mean([values["box_iou"] for values in moving]) > 0.85
    assert np.mean([values["box_success"] for values in moving]) > 0.95
    assert np.mean([values["box_iou"] for values in static]) < 0.4


def test_a_followed_box_grows_with_its_object(rng):
    background = texture(rng, 96, 128)
    square = texture(rng, 32, 32)
    frames = np.stack([background] * 5)
    boxes = []
    for f, size in enumerate(range(32, 52, 4)):
        x0 = 64 - size // 2
        y0 = 48 - size // 2
        nearest = np.arange(size) * 32 // size
        frames[f, y0 : y0 + size, x0 : x0 + size] = square[nearest][:, nearest]
        boxes.append([x0 / 128, y0 / 96, (x0 + size) / 128, (y0 + size) / 96])
    followed = metrics.follow_box(metrics.optical_flows(frames), boxes[0])
    width = followed[:, 2] - followed[:, 0]
    assert followed[0].tolist() == boxes[0]
    assert width[-1] == pytest.approx(48 / 128, rel=0.12)


def test_box_metrics_are_undefined_without_boxes(rng):
    flows = metrics.optical_flows(np.stack([texture(rng, 48, 64)] * 3))
    values = metrics.box_metrics(flows, Tracklets.empty(3))
    assert values == {"box_iou": None, "box_success": None}


# ----------------------------------------------------------------------------------------------- pretrained networks


def test_errors_say_where_to_get_a_missing_network_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(
        metrics.MissingNetwork, match=r"^FVD is left out: download https://\S+"
    ) as error:
        metrics.load_i3d()
    assert str(error.value).endswith(f" to {tmp_path}/cache/svd_xtend/i3d_torchscript.pt")
    for torchvision, advice in (
        (None, "install torchvision.*, and download"),
        (types.ModuleType("torchvision"), "download"),
    ):
        monkeypatch.setitem(sys.modules, "torchvision", torchvision)
        with pytest.raises(
            metrics.MissingNetwork, match=rf"^LPIPS is left out.*: {advice} https://\S+alexnet"
        ) as error:
            metrics.load_lpips()
        assert str(error.value).endswith(f" to {tmp_path}/torch/hub/checkpoints/{metrics.ALEXNET}")


def test_lpips_measures_frame_by_frame(monkeypatch, tmp_path, rng):
    """Everything but torchmetrics' network, which needs weights."""
    import torchmetrics.image.lpip

    class Distance(torch.nn.Module):
        def __init__(self, net_type, normalize):
            super().__init__()
            assert net_type == "alex"
            assert normalize

        def forward(self, a, b):
            assert a.shape == (1, 3, 24, 32)
            assert 0 <= a.min() and a.max() <= 1
            return (a - b).abs().mean()

        def reset(self):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", Distance)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / metrics.ALEXNET).touch()
    a, b = rng.integers(0, 256, (2, 3, 24, 32, 3), dtype=np.uint8)
    expected = np.abs(a.astype(float) - b).mean((1, 2, 3)) / 255
    assert metrics.load_lpips()(a, b) == pytest.approx(expected, rel=1e-5)


class FakeI3D(torch.nn.Module):
    """Returns the means of a clip's eighths, its smallest and largest value, and its shape."""

    def forward(self, x, rescale: bool, resize: bool, return_features: bool):
        assert not rescale and not resize and return_features
        parts = torch.stack([part.mean() for part in x.flatten(1).chunk(8, 1)])
        size = torch.tensor([float(side) for side in x.shape])
        return torch.cat([parts, x.amin()[None], x.amax()[None], size])[None]


def test_fvd_of_equal_sets_is_zero_and_i3d_sees_squares_of_224_pixels(monkeypatch, tmp_path, rng):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "svd_xtend" / metrics.I3D
    file.parent.mkdir()
    file.write_text("<html>a login page instead of the file</html>")
    with pytest.raises(
        metrics.MissingNetwork, match="^FVD is left out: .*i3d_torchscript.pt is damaged"
    ):
        metrics.load_i3d()
    torch.jit.script(FakeI3D()).save(str(file))
    features = metrics.load_i3d()

    frames = np.stack([texture(rng, 48, 80)] * 3)
    frames[0, :, 16:24] = 0
    frames[1, :, 56:64] = 255
    frames[:, :, :16] = 7  # cropped away
    frames[:, :, 64:] = 7
    answer = features(frames)
    assert answer[8:].tolist() == pytest.approx([-1, 1, 1, 3, 3, 224, 224])
    assert answer.dtype == np.float64
    assert features(frames[:, :, 16:64])[:8] == pytest.approx(answer[:8], abs=0.02)

    def features_of_noise():
        clips = [rng.integers(0, 256, (3, 24, 24, 3), dtype=np.uint8) for _ in range(5)]
        return np.array([features(clip)[:8] for clip in clips])

    one = features_of_noise()
    other = features_of_noise()
    assert metrics.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(one, other) > 1e-6


def with_covariance(rng, n, mean, root):
    """Samples (n, d) of exactly this mean, and covariance root' root."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T
    return white @ root + mean


def test_frechet_distance_is_the_formula(rng):
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), by scipy; with diagonal C the trace is |s - s'|^2."""
    m, n = rng.normal(size=(2, 4))
    s, t = rng.uniform(0.5, 2, (2, 4))
    a = with_covariance(rng, 40, m, np.diag(s))
    b = with_covariance(rng, 30, n, np.diag(t))
    expected = ((m - n) ** 2).sum() + ((s - t) ** 2).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)
    R, Q = rng.normal(size=(2, 4, 4))
    a = with_covariance(rng, 40, m, R)
    b = with_covariance(rng, 30, n, Q)
    C = R.T @ R
    D = Q.T @ Q
    expected = ((m - n) ** 2).sum() + np.trace(C + D - 2 * sqrtm(C @ D).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_distance_holds_with_fewer_clips_than_features(rng):
    """As with I3D's 400 features: both covariances are singular."""
    a = rng.normal(size=(6, 20))
    b = rng.normal(size=(9, 20)) + 1
    C = np.cov(a, rowvar=False)
    D = np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(C)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ D @ half).clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(C) + np.trace(D) - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(a, a + 3) == pytest.approx(20 * 9)


# ------------------------------------------------------------------------------------------------- over the data set


def clips_with(name, sources=None, **columns):
    """Clips of which one metric is known: its values in each column."""
    count = len(next(iter(columns.values())))
    clips = []
    for i in range(count):
        values = {column: {name: numbers[i]} for column, numbers in columns.items()}
        source = str(i) if sources is None else sources[i]
        clips.append(metrics.ClipMetrics(source, values, dict.fromkeys(columns)))
    return clips


def test_a_metric_is_better_higher_lower_or_near_the_ground_truth():
    spread = np.array([0.0, 0.01, 0.02])
    cases = [
        ("psnr", 20, 22, "better"),
        ("psnr", 22, 20, "worse"),
        ("lpips", 0.4, 0.3, "better"),
        ("motion", 0.1, 0.3, "better"),
        ("motion", 0.35, 0.3, "better"),
        ("motion", 0.3, 0.5, "worse"),
    ]
    for name, base, tuned, expected in cases:
        columns = {"base": base + spread, "tuned": tuned + 2 * spread}
        if name == "motion":
            columns["truth"] = 0.3 + 2 * spread
        (row,) = metrics.summarize_metrics(clips_with(name, **columns))
        assert row["verdict"] == expected, (name, base, tuned)
        text = metrics.format_table([row])
        assert text.endswith(expected)
        assert ("in distance to the ground truth" in text) == (name == "motion")
    (row,) = metrics.summarize_metrics(clips_with("psnr", base=[20, 21, 22], tuned=[21, 21, 21]))
    assert row["verdict"] == "unclear"


def test_a_clip_without_a_value_in_one_column_counts_in_no_column():
    clips = clips_with("flicker", base=[1, 2, None], tuned=[3, 5, 7], truth=[0, None, 0])
    (row,) = metrics.summarize_metrics(clips)
    assert (row["base"], row["tuned"], row["truth"]) == (1, 3, 0)
    assert row["difference"] == (2, None, None)


def test_there_is_no_difference_if_the_ground_truth_has_no_value():
    """As with flicker, if everything moves in all of the ground truth."""
    clips = clips_with("flicker", base=[1, 2], tuned=[3, 5], truth=[None, None])
    (row,) = metrics.summarize_metrics(clips)
    assert row["base"] == 1.5
    assert row["truth"] is None
    assert row["difference"] is None


def test_without_a_tuned_model_the_table_has_no_such_column():
    rows = metrics.summarize_metrics(clips_with("psnr", base=[20, 21], still=[18, 18]))
    header = metrics.format_table(rows).split("\n")[0]
    assert header.split() == ["static", "baseline", "base", "model"]
    assert rows[0]["tuned"] is None


def test_fvd_is_in_the_table_if_there_are_features(rng):
    clips = clips_with("psnr", base=[20, 21, 22], tuned=[21, 21, 21], truth=[None] * 3)
    features = {column: rng.normal(size=(3, 4)) for column in ("base", "tuned", "truth")}
    for i, clip in enumerate(clips):
        clip.features = {column: values[i] for column, values in features.items()}
    fvd = metrics.summarize_metrics(clips)[-1]
    assert fvd["name"] == "fvd"
    assert fvd["truth"] is None
    assert fvd["difference"] is None
    assert fvd["tuned"] == metrics.frechet_distance(features["tuned"], features["truth"])
    # one clip has no covariance
    assert metrics.summarize_metrics(clips[:1])[-1]["name"] == "psnr"


def test_clips_of_one_source_video_count_as_their_mean():
    """Two source videos of two clips each have the interval of two values, not of four."""
    clips = clips_with("psnr", sources="aabb", base=[20, 20, 30, 30], tuned=[21, 23, 34, 36])
    (row,) = metrics.summarize_metrics(clips)
    assert row["difference"] == validation_loss.confidence_interval([2, 5])
    assert (row["base"], row["tuned"]) == (25, 28.5)
