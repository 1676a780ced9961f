"""The loader's benchmark compares readers of the same pixels."""

import json
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_loader


def test_reference_and_loader_read_the_same_pixels_and_the_cache_a_whole_clip(tmp_path):
    """PNG, so that only the crop and the resize could differ."""
    bench_loader.write_frames(tmp_path / "png", "png", 2)
    reads = bench_loader.make_readers(tmp_path / "png", tmp_path / "cache", 128, 80, 2)
    full, ours, cached = (read() for read in reads.values())
    assert ours["pixel_values"].shape == (2, 3, 80, 128)
    assert full["pixel_values"].shape == (2, 3, 80, 128)
    psnr = bench_loader.psnr(ours["pixel_values"], full["pixel_values"])
    assert psnr is None or psnr > 60  # None: all are equal; torch's bicubic rounds differently
    one_level_off = full["pixel_values"] + 2 / 255
    assert bench_loader.psnr(ours["pixel_values"], one_level_off) > 48  # 48.13 dB
    assert cached["pixel_values"].shape[0] == 1
    assert cached["moments"].shape == (2, 2, 4, 10, 16)


def test_the_last_line_is_one_json_document_of_all_variants(capsys):
    bench_loader.main(Namespace(formats=["jpeg"], sizes=["128x80"], num_frames=2, rounds=1))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [r["variant"] for r in rows] == ["full decode", "ours", "cached"]
    full, ours, _ = rows
    assert full["x_full"] == 1
    assert full["MB"] == 4 * 2 * 3 * 80 * 128 / 1e6  # float32
    assert ours["MB"] == full["MB"] / 4  # uint8
    assert ours["psnr_dB"] > 30
