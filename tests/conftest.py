"""Shared: the embedded SVD, a small folder of clips, and training in this process."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a network
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare bits, which GPUs do not promise
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # lists of folders that go again

import pytest
import torch
from farm import Farm

import train_svd
import train_svd_lora
import train_svd_tracklet
from svd_xtend.demo.synthetic_clips import write_clips
from svd_xtend.demo.tiny_svd import TINY_SVD
from svd_xtend.evaluation import report
from svd_xtend.models.loading import load_svd
from svd_xtend.training import optimizers as optimizers_module

QUICK = [
    "--width=64", "--height=48", "--num_workers=0", "--validation_steps=0",
    "--vae_encode_chunk=8", "--learning_rate=1e-3",
]  # fmt: skip


LONGEST_FIRST = [
    "test_scripts.py",
    "test_tiny_svd.py",
    "test_distributed.py",
    "test_checkpoints.py",
    "test_train_svd.py",
]


# `-m "not slow"` leaves out what trains, starts processes or evaluates for long, by files, fixtures and names of tests.
SLOW_FILES = {
    "test_bench_loader.py",
    "test_benchmarks.py",
    "test_checkpoints.py",
    "test_distributed.py",
    "test_evaluate_svd.py",
    "test_infer_svd.py",
    "test_memory_count.py",
    "test_prepare_data.py",
    "test_safety.py",
    "test_trackers.py",
}
SLOW_FIXTURES = {"browser", "farm", "run", "torchao"}
SLOW_TESTS = {
    "test_a_half_precision_unet_takes_adapters_in_any_precision",
    "test_a_held_out_loss_is_the_trainers_own_of_that_clip_at_that_sigma",
    "test_half_precision_has_the_loss_and_the_gradients_direction_of_float32",
    "test_a_box_layer_soon_learns_what_is_inside_its_boxes",
    "test_a_changed_checkout_says_so",
    "test_a_folder_without_a_run_gives_an_error_of_one_line",
    "test_accelerate_launch_six_steps_then_resume",
    "test_compiled_blocks_give_the_same_and_never_fall_back",
    "test_half_precision_weights_have_half_the_size_and_load",
    "test_inference_heeds_the_boxes_and_shows_them_beside_the_clean_clip",
    "test_objects_follow_boxes_that_nothing_else_announces",
    "test_out_of_memory_ends_with_one_message_of_flags_to_add",
    "test_outside_of_git_there_is_no_commit",
    "test_scheduled_sampling_uses_the_boxes_in_the_first_tau_of_the_steps",
    "test_shapes_move_where_they_point",
    "test_signals_save_a_checkpoint_and_leave_with_a_message",
    "test_the_losses_of_video_files_agree_too_and_in_every_size_bucket",
    "test_the_vae_reconstructs_validation_clips",
    "test_thirty_kinds_of_bad_files_are_named_and_left_out",
    "test_train_does_not_write_to_the_flags_that_it_is_given",
    "test_two_processes_share_the_videos_and_write_the_same_cache",
    "test_what_is_not_in_the_table_is_counted",
    "test_wrong_questions_are_one_clear_error",
}
# Training runs of a few steps that every edit should pass.
FAST_RUNS = {
    "test_a_stage_starts_where_the_last_one_ended",
    "test_lora_checkpoint_holds_only_lora_and_infers_like_the_export",
    "test_second_run_with_the_same_seed_is_bit_identical",
}


def is_slow(item):
    """Return whether a test belongs to the slow part."""
    if item.originalname in FAST_RUNS:
        return False
    uses_slow_fixture = not SLOW_FIXTURES.isdisjoint(item.fixturenames)
    return item.path.name in SLOW_FILES or item.originalname in SLOW_TESTS or uses_slow_fixture


def pytest_collection_modifyitems(items):
    """Mark slow tests, and sort files that take minutes to the front: both processes then end at about the same time."""
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (LONGEST_FIRST + [item.path.name]).index(item.path.name))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A base_folder of 8 falling clips."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, "fall", 8)
    return folder


@pytest.fixture(scope="session")
def farm():
    """Starts trainers as processes of their own."""
    farm = Farm()
    yield farm
    farm.close()


@pytest.fixture
def pipe():
    """The embedded SVD in float32."""
    return load_svd(str(TINY_SVD), torch.float32)


@pytest.fixture(scope="session")
def boxed_clips(tmp_path_factory):
    """A base_folder of 6 roaming clips, with their boxes."""
    folder = tmp_path_factory.mktemp("boxed")
    write_clips(folder, "roam", 6)
    return folder


@pytest.fixture
def run(clips, boxed_clips, tmp_path, monkeypatch):
    """Train in this process, as a script would: run("--max_train_steps=2", ..., lora=False).

    Returns the output folder. hooks: fields of the Recipe. page: write report.html, too.
    """
    from accelerate.state import AcceleratorState, PartialState

    write_report = report.write_report

    def train_in_process(
        *flags, lora=False, tracklet=False, output_dir=tmp_path / "out", seed=1, page=False, **hooks
    ):
        monkeypatch.setattr(report, "write_report", write_report if page else Path)
        AcceleratorState._reset_state(reset_partial_state=True)
        base_folder = boxed_clips if tracklet else clips
        flags = [*QUICK, f"--base_folder={base_folder}", f"--output_dir={output_dir}", *flags]
        if tracklet:
            args = train_svd_tracklet.script_parse(flags)
            recipe = train_svd_tracklet.make_recipe(args)
        elif lora:
            args = train_svd.parse(train_svd_lora.script_parser(), flags)
            recipe = train_svd_lora.RECIPE
        else:
            args = train_svd.parse(train_svd.build_parser(), flags)
            recipe = train_svd.Recipe()
        args.seed = seed
        train_svd.train(args, replace(recipe, **hooks))
        PartialState._reset_state()
        return output_dir

    yield train_in_process
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def kept():
    """What the tests of a file share: runs that are made once, when first asked for."""
    return {}


@pytest.fixture
def optimizers(monkeypatch):
    """The torch optimizers that runs in this process make, in a list."""
    made = []
    make = optimizers_module.make_optimizer
    monkeypatch.setattr(
        optimizers_module, "make_optimizer", lambda *how: made.append(make(*how)) or made[-1]
    )
    return made
