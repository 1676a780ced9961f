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
    """A smooth picture with something to see everywhere, (h, w, 3) uint8."""
    soft = gaussian_filter(rng.normal(size=(height, width, 3)), (2, 2, 0))
    return (128 + 40 * soft / soft.std()).clip(0, 255).astype(np.uint8)


def order_figures(frames):
    return metrics.order_figures(frames, metrics.flows(frames), 7)


# ------------------------------------------------------------------------------------------------------------- frames


def test_equal_clips_have_100_decibels_and_a_similarity_of_one(rng):
    frames = rng.integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    told = metrics.frame_figures(frames, frames)
    assert told["psnr"].tolist() == [100, 100, 100] and told["ssim"] == pytest.approx(1, abs=1e-6)


def test_psnr_of_each_frame_is_the_formula(rng):
    a, b = rng.integers(0, 256, (2, 3, 48, 64, 3), dtype=np.uint8)
    expected = [10 * np.log10(255**2 / np.mean((x.astype(float) - y) ** 2)) for x, y in zip(a, b)]
    assert metrics.frame_figures(a, b)["psnr"] == pytest.approx(expected, abs=1e-4)
    assert metrics.frame_figures(a, b)["psnr"].mean() == pytest.approx(
        synthetic_clips.psnr(a, b), abs=0.05
    )


def test_ssim_is_that_of_wang_et_al(rng):
    """Their formula under a Gaussian of 1.5 pixels, by scipy; beyond its border a picture is mirrored."""
    a, b = (np.stack([texture(rng, 40, 56)]) for _ in range(2))
    x, y = a[0] / 255, b[0] / 255

    def blur(v):
        return gaussian_filter(v, (1.5, 1.5, 0), truncate=3.5, mode="mirror")

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    similar = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert metrics.frame_figures(a, b)["ssim"][0] == pytest.approx(similar.mean(), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------- in time


def test_in_a_still_nothing_flickers_errs_or_moves(rng):
    frames = np.repeat(texture(rng, 48, 64)[None], 4, 0)
    assert order_figures(frames) == {"flicker": 0, "warp_error": 0, "motion": 0}


def test_flicker_is_how_much_a_still_picture_changes(rng):
    frames = np.repeat(texture(rng, 48, 64)[None], 4, 0)
    frames[1::2] += np.where(frames[1::2] < 200, 10, 0).astype(np.uint8)
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean()
    assert order_figures(frames)["flicker"] == pytest.approx(change, rel=0.05)


def test_what_moves_without_changing_neither_flickers_nor_errs(rng):
    """A textured square over a picture that stands still: plain differences see it, these do not."""
    back, square = texture(rng, 96, 128), texture(rng, 40, 40)
    frames = np.stack([back] * 4)
    for f in range(4):
        frames[f, 20:60, 10 + 6 * f : 50 + 6 * f] = square
    told = order_figures(frames)
    change = np.abs(np.diff(frames.astype(float), axis=0)).mean()
    assert (
        told["flicker"] < 0.05 * change
        and told["warp_error"] < 0.2 * change
        and told["motion"] > 0.1
    )


def test_where_all_moves_nothing_is_said_of_flicker(rng):
    wide = texture(rng, 96, 160)
    frames = np.stack([wide[:, 8 * f : 8 * f + 128] for f in range(4)])
    told = order_figures(frames)
    assert (
        told["flicker"] is None
        and told["warp_error"] < 0.1 * np.abs(np.diff(frames.astype(float), axis=0)).mean()
    )


# --------------------------------------------------------------------------------------------------------------- boxes


def test_follow_finds_roaming_shapes_and_a_still_does_not_obey():
    clips = [synthetic_clips.make_clip((5, i), "roam") for i in range(12)]
    stills = [np.repeat(clip.frames[:1], len(clip.frames), 0) for clip in clips]
    true = [metrics.control_figures(metrics.flows(clip.frames), clip.tracklets()) for clip in clips]
    still = [
        metrics.control_figures(metrics.flows(f), clip.tracklets())
        for f, clip in zip(stills, clips)
    ]
    assert np.mean([told["box_iou"] for told in true]) > 0.85
    assert np.mean([told["box_success"] for told in true]) > 0.95
    assert np.mean([told["box_iou"] for told in still]) < 0.4


def test_follow_sees_an_object_grow(rng):
    back, square = texture(rng, 96, 128), texture(rng, 32, 32)
    frames, boxes = np.stack([back] * 5), []
    for f, size in enumerate(range(32, 52, 4)):
        x0, y0 = 64 - size // 2, 48 - size // 2
        near = np.arange(size) * 32 // size
        frames[f, y0 : y0 + size, x0 : x0 + size] = square[near][:, near]
        boxes.append([x0 / 128, y0 / 96, (x0 + size) / 128, (y0 + size) / 96])
    found = metrics.follow(metrics.flows(frames), boxes[0])
    width = found[:, 2] - found[:, 0]
    assert found[0].tolist() == boxes[0] and width[-1] == pytest.approx(48 / 128, rel=0.12)


def test_without_boxes_control_says_nothing(rng):
    ways = metrics.flows(np.stack([texture(rng, 48, 64)] * 3))
    assert metrics.control_figures(ways, Tracklets.empty(3)) == {
        "box_iou": None,
        "box_success": None,
    }


# ------------------------------------------------------------------------------------------------ by published networks


def test_what_is_missing_is_named_with_where_to_get_it_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(metrics.Missing, match=r"^FVD is left out: download https://\S+") as told:
        metrics.i3d()
    assert str(told.value).endswith(f" to {tmp_path}/cache/svd_xtend/i3d_torchscript.pt")
    for there, advice in (
        (None, "pip install torchvision.*, and download"),
        (types.ModuleType("torchvision"), "download"),
    ):
        monkeypatch.setitem(sys.modules, "torchvision", there)
        with pytest.raises(
            metrics.Missing, match=rf"^LPIPS is left out.*: {advice} https://\S+alexnet"
        ) as told:
            metrics.lpips()
        assert str(told.value).endswith(f" to {tmp_path}/torch/hub/checkpoints/{metrics.ALEXNET}")


def test_lpips_measures_frame_by_frame(monkeypatch, tmp_path, rng):
    """torchmetrics' own, but for its network."""
    import torchmetrics.image.lpip

    class Distance(torch.nn.Module):
        def __init__(self, net_type, normalize):
            super().__init__()
            self.seen, self.how = 0, (net_type, normalize)

        def forward(self, a, b):
            assert (
                self.how == ("alex", True)
                and a.shape == (1, 3, 24, 32)
                and 0 <= a.min()
                and a.max() <= 1
            )
            self.seen += 1
            return (a - b).abs().mean()

        def reset(self):
            self.seen = 0

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", Distance)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / metrics.ALEXNET).touch()
    a, b = rng.integers(0, 256, (2, 3, 24, 32, 3), dtype=np.uint8)
    expected = np.abs(a.astype(float) - b).mean((1, 2, 3)) / 255
    assert metrics.lpips()(a, b) == pytest.approx(expected, rel=1e-5)


class Network(torch.nn.Module):
    """In I3D's place: means of a clip's eighths, and what it was handed."""

    def forward(self, x, rescale: bool, resize: bool, return_features: bool):
        assert not rescale and not resize and return_features
        parts = torch.stack([part.mean() for part in x.flatten(1).chunk(8, 1)])
        size = torch.tensor([float(side) for side in x.shape])
        return torch.cat([parts, x.amin()[None], x.amax()[None], size])[None]


def test_fvd_of_equal_sets_is_zero_and_its_network_sees_squares_of_224(monkeypatch, tmp_path, rng):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "svd_xtend" / metrics.I3D
    file.parent.mkdir()
    file.write_text("<html>not what was asked for</html>")
    with pytest.raises(metrics.Missing, match="^FVD is left out: .*i3d_torchscript.pt is damaged"):
        metrics.i3d()
    torch.jit.script(Network()).save(str(file))
    features = metrics.i3d()
    frames = np.stack([texture(rng, 48, 80)] * 3)
    frames[0, :, 16:24], frames[1, :, 56:64] = 0, 255
    frames[:, :, :16] = 7  # cut off
    frames[:, :, 64:] = 7
    told = features(frames)
    assert (
        told[8:].tolist() == pytest.approx([-1, 1, 1, 3, 3, 224, 224]) and told.dtype == np.float64
    )
    assert features(frames[:, :, 16:64])[:8] == pytest.approx(told[:8], abs=0.02)
    one, other = (
        [features(rng.integers(0, 256, (3, 24, 24, 3), dtype=np.uint8))[:8] for _ in range(5)]
        for _ in "ab"
    )
    assert metrics.frechet(np.array(one), np.array(one)) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(np.array(one), np.array(other)) > 1e-6


def with_covariance(rng, n, mean, root):
    """Samples (n, d) of exactly this mean, and covariance root' root."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T
    return white @ root + mean


def test_frechet_distance_is_that_of_the_normal_distributions(rng):
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), by scipy; of diagonal C the sum of squares of what standard deviations differ."""
    m, n = rng.normal(size=(2, 4))
    s, t = rng.uniform(0.5, 2, (2, 4))
    a, b = with_covariance(rng, 40, m, np.diag(s)), with_covariance(rng, 30, n, np.diag(t))
    assert metrics.frechet(a, b) == pytest.approx(((m - n) ** 2).sum() + ((s - t) ** 2).sum())
    R, Q = rng.normal(size=(2, 4, 4))
    a, b = with_covariance(rng, 40, m, R), with_covariance(rng, 30, n, Q)
    C, D = R.T @ R, Q.T @ Q
    expected = ((m - n) ** 2).sum() + np.trace(C + D - 2 * sqrtm(C @ D).real)
    assert metrics.frechet(a, b) == pytest.approx(expected)


def test_frechet_distance_holds_with_fewer_clips_than_features(rng):
    """As with I3D's 400: both covariances are singular."""
    a, b = rng.normal(size=(6, 20)), rng.normal(size=(9, 20)) + 1
    C, D = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(C)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ D @ half).clip(0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(C) + np.trace(D) - 2 * root
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet(a, a + 3) == pytest.approx(20 * 9)


# --------------------------------------------------------------------------------------------------------- over a data set


def rows_of(name, **columns):
    """Rows of clips of which one figure is known."""
    count = len(next(iter(columns.values())))
    figures = [{c: {name: values[i]} for c, values in columns.items()} for i in range(count)]
    return [
        {"film": i, "figures": one, "features": dict.fromkeys(columns)}
        for i, one in enumerate(figures)
    ]


def test_a_metric_is_better_up_down_or_nearer_to_the_truth():
    spread = np.array([0.0, 0.01, 0.02])
    cases = [("psnr", 20, 22, "better"), ("psnr", 22, 20, "worse"), ("lpips", 0.4, 0.3, "better"),
             ("motion", 0.1, 0.3, "better"), ("motion", 0.35, 0.3, "better"), ("motion", 0.3, 0.5, "worse")]  # fmt: skip
    for name, base, tuned, expected in cases:
        columns = {"base": base + spread, "tuned": tuned + 2 * spread}
        columns |= {"truth": 0.3 + 2 * spread} if name == "motion" else {}
        (line,) = metrics.table_of(rows_of(name, **columns))
        assert line["verdict"] == expected, (name, base, tuned)
        assert metrics.in_words([line]).endswith(expected)
        assert ("in distance to the truth" in metrics.in_words([line])) == (name == "motion")
    (line,) = metrics.table_of(rows_of("psnr", base=[20, 21, 22], tuned=[21, 21, 21]))
    assert line["verdict"] == "unclear"


def test_clips_of_which_something_is_not_known_count_in_no_column():
    rows = rows_of("flicker", base=[1, 2, None], tuned=[3, 5, 7], truth=[0, None, 0])
    (line,) = metrics.table_of(rows)
    assert (line["base"], line["tuned"], line["truth"]) == (1, 3, 0) and line["difference"] == (
        2,
        None,
        None,
    )
    rows = rows_of(
        "flicker", base=[1, 2], tuned=[3, 5], truth=[None, None]
    )  # in what is true everything moves
    (line,) = metrics.table_of(rows)
    assert line["truth"] is None and line["difference"] is None


def test_without_a_tuned_model_the_table_has_no_such_column():
    table = metrics.table_of(rows_of("psnr", base=[20, 21], still=[18, 18]))
    assert (
        metrics.in_words(table).split("\n")[0].split() == ["still", "base"]
        and table[0]["tuned"] is None
    )


def test_fvd_is_in_the_table_where_there_are_features(rng):
    rows = rows_of("psnr", base=[20, 21, 22], tuned=[21, 21, 21], truth=[None] * 3)
    features = {c: rng.normal(size=(3, 4)) for c in ("base", "tuned", "truth")}
    for i, row in enumerate(rows):
        row["features"] = {c: values[i] for c, values in features.items()}
    fvd = metrics.table_of(rows)[-1]
    assert fvd["name"] == "fvd" and fvd["truth"] is None and fvd["difference"] is None
    assert fvd["tuned"] == metrics.frechet(features["tuned"], features["truth"])
    assert metrics.table_of(rows[:1])[-1]["name"] == "psnr"  # one clip has no covariance


def test_windows_of_one_film_are_one_witness():
    """Their mean: two films of two windows each have an interval of two, not of four."""
    rows = rows_of("psnr", base=[20, 20, 30, 30], tuned=[21, 23, 34, 36])
    for row, film in zip(rows, "aabb"):
        row["film"] = film
    (line,) = metrics.table_of(rows)
    assert line["difference"] == validation_loss.confidence_interval([2, 5]) and (
        line["base"],
        line["tuned"],
    ) == (
        25,
        28.5,
    )
