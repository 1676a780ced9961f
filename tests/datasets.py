"""Open a dataset of a folder, as load_training_set does, with few arguments."""

from svd_xtend.data import latent_cache
from svd_xtend.data.clip import ClipSpec
from svd_xtend.data.sampler import ClipCollection, ClipSampler
from train_svd import DummyDataset


def open_dataset(
    folder,
    width,
    height,
    num_frames,
    fps,
    motion_bucket_id,
    resize_mode,
    seed=0,
    cached=None,
    weights=None,
    source_fps=None,
    buckets=0,
    image_ratio=0.0,
    batch=1,
    make_dataset=DummyDataset,
):
    spec = ClipSpec(width, height, num_frames, fps, resize_mode)
    clips = ClipCollection(
        folder,
        spec,
        motion_bucket_id=motion_bucket_id,
        source_fps=source_fps,
        bucket_step=buckets,
        with_pictures=image_ratio > 0,
    )
    clip_sampler = ClipSampler(clips.pools(weights, image_ratio), seed, batch)
    if cached:
        latent_cache.check_cached_videos(cached, clips)
    return make_dataset(clips, clip_sampler, spec, seed=seed, latent_cache=cached)
