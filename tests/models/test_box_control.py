"""Box control attached to the stock UNet: saving, loading, learning, guidance and precision."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from PIL import Image
from torch import nn

from svd_xtend.demo.synthetic_clips import make_clip
from svd_xtend.demo.tiny_svd import build_unet
from svd_xtend.models import box_control
from svd_xtend.models.activation_checkpointing import POLICIES, checkpoint_activations
from svd_xtend.models.lora import inject_lora, target_modules
from svd_xtend.models.unet_optimizations import speed_up

CLIP = make_clip((1, 1), "roam")


def inputs(num_clips=1, seed=0):
    """Return random (sample, timestep, image_embeds, added_time_ids) of the embedded UNet."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_clips, 8, 8, 12, 16), (num_clips,), (num_clips, 1, 64), (num_clips, 3)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def cond(num_clips=1, slots=8):
    """Return the boxes of CLIP as a batch of `num_clips` equal clips."""
    batch = {}
    for name, array in CLIP.tracklets().pad(slots).cond().items():
        tensor = torch.from_numpy(array)
        batch[name] = torch.stack([tensor] * num_clips)
    return batch


def open_gates(adapter, seed=3):
    """Change all parameters as training would: gates open, no parameter at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if "alpha" in name:
            parameter.data += 0.7
        else:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
    return adapter


@pytest.fixture
def unet(pipe):
    return pipe.unet.requires_grad_(False)


def forward(unet, x=None):
    with torch.no_grad():
        return unet(*(x or inputs())).sample


def render(pipe, **kwargs):
    """Render 8 frames in 2 steps from a fixed seed, as an array."""
    output = pipe(
        Image.fromarray(CLIP.frames[0]),
        height=48,
        width=64,
        num_frames=8,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **kwargs,
    )
    return np.stack(output.frames[0])


# ---------------------------------------------------------------------------------------------------- attach and detach


def test_a_fresh_adapter_leaves_unet_and_pipeline_bit_identical_and_detach_restores_them(pipe):
    base, video = forward(pipe.unet), render(pipe)
    adapter = box_control.new_box_control(pipe.unet)
    adapter.set(CLIP.tracklets())
    assert torch.equal(forward(pipe.unet), base) and (render(pipe) == video).all()
    open_gates(adapter)
    assert (forward(pipe.unet) - base).abs().max() > 1e-3 and (render(pipe) != video).any()
    adapter.detach()
    assert torch.equal(forward(pipe.unet), base) and (render(pipe) == video).all()


def test_without_boxes_an_attached_adapter_is_the_stock_unet(unet):
    base = forward(unet)
    adapter = open_gates(box_control.new_box_control(unet))
    assert torch.equal(forward(unet), base)
    adapter.set(CLIP.tracklets())
    assert not torch.equal(forward(unet), base)
    adapter.set(None)
    assert torch.equal(forward(unet), base)


def test_an_attached_adapter_changes_nothing_that_others_see_of_the_unet(unet, tmp_path):
    """The state_dict, parameters, attention processors, LoRA targets and saved files stay the same."""
    names = list(unet.state_dict())
    num_parameters = len(list(unet.parameters()))
    processors = list(unet.attn_processors)
    targets = target_modules(unet, ["attention", "feed_forward"])
    box_control.new_box_control(unet).set(CLIP.tracklets())
    assert list(unet.state_dict()) == names
    assert len(list(unet.parameters())) == num_parameters
    assert list(unet.attn_processors) == processors
    assert target_modules(unet, ["attention", "feed_forward"]) == targets
    unet.save_pretrained(tmp_path)
    torch.testing.assert_close(
        forward(type(unet).from_pretrained(tmp_path)), forward(unet), rtol=0, atol=1e-5
    )


def test_every_spatial_block_has_a_layer_and_those_of_the_decoder_have_an_enhancer(unet):
    adapter = box_control.new_box_control(unet)
    spatial = [n for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert sorted(box_control.public_name(f"layers.{k}") for k in adapter.layers) == sorted(spatial)
    enhanced = {k.replace("/", ".") for k, layer in adapter.layers.items() if layer.injector}
    assert enhanced == {n for n in spatial if n.startswith("up_blocks")} and enhanced
    assert not any(
        layer.injector
        for layer in box_control.new_box_control(unet, enhancer="none").layers.values()
    )


def test_the_full_size_svd_gets_16_layers_9_of_them_with_an_enhancer():
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel()
        adapter = box_control.BoxAdapter(box_control.spatial_blocks(unet), 1024)
    assert (
        len(adapter.layers) == 16
        and sum(layer.injector is not None for layer in adapter.layers.values()) == 9
    )
    gated = sum(p.numel() for layer in adapter.layers.values() for p in layer.fuser.parameters())
    assert gated / 1e6 == pytest.approx(211.2, abs=0.1)
    assert sum(p.numel() for p in adapter.position_net.parameters()) / 1e6 == pytest.approx(
        1.12, abs=0.01
    )


# ------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("enhancer", ["carry", "tokens", "none"])
def test_a_loaded_adapter_gives_the_output_of_the_saved_one(unet, tmp_path, enhancer):
    adapter = open_gates(box_control.new_box_control(unet, slots=5, enhancer=enhancer))
    adapter.set(CLIP.tracklets())
    trained = forward(unet)
    box_control.save_box_control(adapter, tmp_path)
    adapter.detach()
    loaded = box_control.load_box_control(unet, tmp_path)
    assert loaded.config == adapter.config
    loaded.set(CLIP.tracklets())
    assert torch.equal(forward(unet), trained)


def test_half_precision_weights_have_half_the_size_and_load(unet, tmp_path):
    adapter = open_gates(box_control.new_box_control(unet))
    box_control.save_box_control(adapter, tmp_path)
    command = [sys.executable, "-m", "svd_xtend.models.box_control", str(tmp_path)]
    command += ["--output_dir", str(tmp_path / "half")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    full_size = (tmp_path / box_control.BOX_CONTROL_FILE).stat().st_size
    half_size = (tmp_path / "half" / box_control.BOX_CONTROL_FILE).stat().st_size
    assert half_size / full_size == pytest.approx(0.5, abs=0.02)
    adapter.detach()
    for name, p in box_control.load_box_control(unet, tmp_path / "half").state_dict().items():
        torch.testing.assert_close(p, adapter.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_trained_unet_parameters_are_saved_loaded_and_restored_by_detach(unet, tmp_path):
    fresh = copy.deepcopy(unet)
    unet.conv_in.weight.data += 0.1
    adapter = box_control.new_box_control(unet)
    box_control.save_box_control(adapter, tmp_path, {"conv_in.weight": unet.conv_in.weight})
    base = forward(fresh)
    loaded = box_control.load_box_control(fresh, tmp_path)
    assert list(loaded.replaced) == ["conv_in.weight"]
    assert torch.equal(forward(fresh), forward(unet)) and not torch.equal(forward(fresh), base)
    loaded.detach()
    assert torch.equal(forward(fresh), base)


def test_weights_of_another_unet_or_of_another_kind_are_refused(unet, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="--tracklet_weights .*no such file"):
        box_control.load_box_control(unet, tmp_path)
    adapter = box_control.new_box_control(unet)
    adapter.config["blocks"] = {k: (c * 2, h) for k, (c, h) in adapter.config["blocks"].items()}
    box_control.save_box_control(adapter, tmp_path / "wide")
    with pytest.raises(
        ValueError, match="for another UNet.*64.* in this UNet, but .*128.* in that one"
    ):
        box_control.load_box_control(unet, tmp_path / "wide")
    (tmp_path / "cut.safetensors").write_bytes(
        (tmp_path / "wide" / box_control.BOX_CONTROL_FILE).read_bytes()[:1000]
    )
    with pytest.raises(
        ValueError,
        match="--tracklet_weights .*cut.safetensors: is damaged or not a safetensors file",
    ):
        box_control.load_box_control(unet, tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="does not contain box control"):
        box_control.load_box_control(unet, tmp_path / "lora.safetensors")
    box_control.save_box_control(box_control.new_box_control(unet), tmp_path / "short")
    from safetensors import safe_open

    with safe_open(tmp_path / "short" / box_control.BOX_CONTROL_FILE, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(tmp_path / "short" / box_control.BOX_CONTROL_FILE)
    tensors.pop("position_net.null")
    save_file(tensors, tmp_path / "short" / box_control.BOX_CONTROL_FILE, metadata)
    with pytest.raises(ValueError, match=r"1 tensor\(s\) are missing.*position_net.null"):
        box_control.load_box_control(unet, tmp_path / "short")


# ------------------------------------------------------------------------------------------------------------ learning


def loss_of(model, x, boxes):
    return model(*x, **boxes).sample.square().mean()


def with_gradient(module):
    """Return the names of the parameters whose gradient is not 0."""
    names = set()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            names.add(name)
    return names


def test_the_first_step_moves_only_gates_the_second_everything(unet):
    model = box_control.ControlledUNet(unet, box_control.new_box_control(unet))
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=1.0)
    loss_of(model, inputs(), cond()).backward()
    names = {name for name, _ in model.adapter.named_parameters()}
    gates = {name for name in names if "alpha" in name}
    assert with_gradient(model.adapter) == gates
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, inputs(), cond()).backward()
    # a bias that is the same for all keys does not change their softmax
    key_biases = {name for name in names if name.endswith("to_k.bias")}
    assert with_gradient(model.adapter) | key_biases == names
    assert all(p.grad is None for p in unet.parameters())


@pytest.mark.parametrize("policy", ["diffusers'", *list(POLICIES)[1:]])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(unet, policy):
    model = box_control.ControlledUNet(unet, open_gates(box_control.new_box_control(unet))).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing and policy == "diffusers'":
            unet.enable_gradient_checkpointing()
        elif checkpointing:
            checkpoint_activations(speed_up(unet), policy)
        model.zero_grad()
        loss = loss_of(model, inputs(2), cond(2))
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.adapter.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


def test_removing_the_boxes_before_backward_is_an_error_and_not_a_wrong_gradient(unet):
    unet.enable_gradient_checkpointing()
    model = box_control.ControlledUNet(unet, open_gates(box_control.new_box_control(unet))).train()
    loss = loss_of(model, inputs(), cond())
    model.adapter.current = None
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_a_box_layer_soon_learns_what_is_inside_its_boxes():
    """The features are noise, so that positions are known from the layer alone.

    The layer has learned it if it explains more than 40 % of the variance of "is inside a box".
    """
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = box_control.BoxEncoder(64)
        layer = box_control.BoxLayer(64, 64, 2, enhancer="tokens")
        head = torch.nn.Linear(64, 1)
    layer.size = (6, 8)
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *layer.parameters(), *head.parameters()], lr=3e-3
    )
    colors = torch.rand(32, 2, 3, generator=g)
    flags = torch.ones(32, 1, 2)
    for _ in range(201):
        corner = torch.rand(32, 1, 2, 2, generator=g)
        size = torch.rand(32, 1, 2, 2, generator=g)
        boxes = torch.cat([0.6 * corner, (0.6 * corner + 0.15 + 0.25 * size)], -1)
        inside = (box_control.foreground_weight(boxes, 6, 8, 3)[:, 0, 0].flatten(1) > 1).float()
        x = torch.randn(32, 48, 64, generator=g)
        tokens = encoder(boxes, flags, flags, colors)
        control = box_control.BoxTokens(tokens[:, 0], boxes[:, 0], flags[:, 0], flags[:, 0], 1)
        out = layer(x, control) - x
        loss = (head(out)[..., 0] - inside).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss / inside.var() < 0.6


# ------------------------------------------------------------------------------------------------- the layers' inputs


def test_the_order_of_slots_and_the_content_of_empty_slots_do_not_matter(unet):
    adapter = open_gates(box_control.new_box_control(unet))
    ours = CLIP.tracklets().pad(8)
    adapter.set(ours)
    expected = forward(unet)
    adapter.set(ours.take_slots([5, 1, 0, 7, 2, 3, 6, 4]))
    torch.testing.assert_close(forward(unet), expected, rtol=1e-4, atol=1e-5)
    junk = cond()
    empty = junk["valid"] == 0
    junk["boxes"][empty], junk["hard"][empty] = 0.77, 1
    adapter.set(**junk)
    torch.testing.assert_close(forward(unet), expected, rtol=1e-4, atol=1e-5)


def test_gated_attention_sees_the_boxes_of_its_frame_and_the_enhancer_those_of_all_frames(unet):
    adapter = open_gates(box_control.new_box_control(unet))
    moved = cond()
    moved["boxes"][:, 0] = 1 - moved["boxes"][:, 0, :, [2, 3, 0, 1]]  # in frame 0 alone
    with torch.no_grad():
        for key, layer in adapter.layers.items():
            channels = layer.fuser.norm1.normalized_shape[0]
            layer.size = (6, 8)
            x = torch.randn(8, 6 * 8, channels, generator=torch.Generator().manual_seed(0))
            out = layer(x, adapter.tokens(cond(), [1], 8))
            out_moved = layer(x, adapter.tokens(moved, [1], 8))
            changed = (out - out_moved).abs().amax((1, 2)) > 1e-6
            other_frames_change = layer.injector is not None
            assert changed.tolist() == [True] + [other_frames_change] * 7, key


def test_pooling_is_the_mean_inside_the_box_and_a_box_without_area_reads_the_border():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8 * 12, 5, generator=g)
    maps = x.view(8, 12, 5)
    boxes = torch.tensor(
        [[[0.25, 0.25, 0.5833333, 0.75], [0.0, 0.0, 0.3333333, 0.5], [1.0, 0.5, 1.0, 0.5]]]
    )
    got = box_control.pool_boxes(x, boxes, 8, 12)[0]
    torch.testing.assert_close(got[0], maps[2:6, 3:7].mean((0, 1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], maps[0:4, 0:4].mean((0, 1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[2], maps[3:5, 11].mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("height, width, channels", [(16, 8, 320), (40, 64, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_in_half_precision_reads_maps_of_more_than_32767_elements(
    dtype, height, width, channels
):
    """torch's half-precision CPU grid_sample computes offsets into a map in 16 bits.

    Given a channels-last map of this size it read memory outside the map. (16, 8, 320) is a level
    of the real UNet at 128x64 pixels.
    """
    assert height * width * channels > 32767
    g = torch.Generator().manual_seed(0)
    # features that are smooth, so that rounding the coordinates to `dtype` matters little
    points = box_control.cell_centers(height, width, torch.device("cpu"))
    x = (points @ torch.randn(2, 2, channels, generator=g)).to(dtype)
    corner = torch.rand(2, 8, 2, generator=g) / 2
    boxes = torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(2, 8, 2, generator=g)], -1)
    expected = box_control.pool_boxes(x.float(), boxes, height, width)
    pooled = box_control.pool_boxes(x, boxes, height, width)
    assert pooled.dtype == dtype
    assert (pooled.float() - expected).norm() / expected.norm() < 0.01


def carry_on_a_grid(boxes, valid=1.0, hard=1.0):
    """Carry random features of a 16 x 12 grid along the boxes of one object.

    boxes: [x0, y0, x1, y1] of each frame, in cells. Returns (features of frame 0 (12, 16, c),
    carried (f, 12, 16, c), place (f, 12, 16, 4)).
    """
    x = torch.randn(1, 12 * 16, 5, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(boxes, dtype=torch.float32)[None, :, None] / torch.tensor([16, 12, 16, 12])
    flags = torch.ones(boxes.shape[:3])
    points = box_control.cell_centers(12, 16, x.device)
    carried, place = box_control.carry_features(
        x, boxes, flags * valid, flags * hard, points, 12, 16
    )
    return x.view(12, 16, 5), carried.view(-1, 12, 16, 5), place.view(-1, 12, 16, 4)


def test_the_features_of_frame_0_are_carried_along_with_their_box():
    """A box that stays, moves by whole cells or doubles its size crops, shifts or enlarges them."""
    x, carried, place = carry_on_a_grid([[2, 2, 6, 6], [5, 4, 9, 8], [4, 1, 12, 9]])
    for f, (top, left) in enumerate([(2, 2), (4, 5)]):
        expected = torch.zeros_like(x)
        expected[top : top + 4, left : left + 4] = x[2:6, 2:6]
        torch.testing.assert_close(carried[f], expected, rtol=0, atol=1e-5)
    maps = x.permute(2, 0, 1)[None]
    doubled = nn.functional.interpolate(maps, scale_factor=2, mode="bilinear")[0].permute(1, 2, 0)
    torch.testing.assert_close(carried[2, 1:9, 4:12], doubled[4:12, 4:12], rtol=0, atol=1e-5)
    assert place[0, 2, 2].tolist() == pytest.approx([-0.75, -0.75, 1, 1])
    assert not place[0, 7].any()


def test_a_soft_box_carries_an_object_to_its_centre_at_the_objects_own_size():
    x, carried, place = carry_on_a_grid(
        [[2, 2, 6, 6], [4, 1, 12, 9]], hard=torch.tensor([1.0, 0.0])[None, :, None]
    )
    torch.testing.assert_close(carried[1, 3:7, 6:10], x[2:6, 2:6], rtol=0, atol=1e-5)
    assert place[1, 4, 7, 2:].tolist() == [1, 0]


def test_objects_that_are_not_in_frame_0_carry_nothing_and_no_box_gives_nan():
    _, carried, place = carry_on_a_grid(
        [[2, 2, 6, 6], [5, 4, 9, 8]], valid=torch.tensor([0.0, 1.0])[None, :, None]
    )
    assert not carried.any() and not place.any()
    for boxes in ([[0, 0, 0, 0], [5, 4, 9, 8]], [[2, 2, 6, 6], [16, 3, 16, 9]]):
        assert all(part.isfinite().all() for part in carry_on_a_grid(boxes))


def test_fourier_features_are_those_of_gligen():
    """diffusers' function for four coordinates returns the same numbers in another order."""
    x = torch.rand(2, 3, 4)
    theirs = get_fourier_embeds_from_boundingbox(8, x)
    torch.testing.assert_close(
        box_control.fourier_features(x).sort(-1).values, theirs.sort(-1).values
    )


def test_foreground_weight_has_mean_one_and_the_stated_ratio():
    weight = box_control.foreground_weight(
        torch.tensor([[[[0.0, 0.5, 0.25, 1.0], [0, 0, 0, 0]]] * 2]), 12, 16, 2.0
    )
    assert weight.shape == (1, 2, 1, 12, 16) and weight.mean() == pytest.approx(1)
    heavy = torch.zeros(12, 16, dtype=bool)
    heavy[6:, :4] = True
    assert torch.equal(weight[0, 1, 0] == weight.max(), heavy)
    assert weight.max() == pytest.approx(2 * weight.min().item())


# ------------------------------------------------------------------------------------------------------------- guidance


def test_the_unconditional_half_has_null_boxes(unet):
    adapter = open_gates(box_control.new_box_control(unet))
    x = inputs()
    both = [torch.cat([y, y]) for y in x]
    adapter.set(**cond())
    unconditional, conditional = forward(unet, both).chunk(2)
    torch.testing.assert_close(conditional, forward(unet, x), rtol=1e-4, atol=1e-5)
    adapter.set(CLIP.tracklets().without_objects())
    torch.testing.assert_close(unconditional, forward(unet, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guided", [True, False])
def test_box_guidance_extrapolates_from_without_boxes_to_with_boxes(unet, guided):
    adapter = open_gates(box_control.new_box_control(unet))
    x = inputs()
    adapter.set(CLIP.tracklets().without_objects())
    without = forward(unet, x)
    adapter.set(CLIP.tracklets())
    with_boxes = forward(unet, x)
    both = [torch.cat([y, y]) for y in x] if guided else x
    for scale in (0.0, 1.0, 2.5):
        adapter.box_guidance_scale = scale
        got = forward(unet, both)
        assert len(got) == len(both[0])
        torch.testing.assert_close(
            got[-1:], without + scale * (with_boxes - without), rtol=1e-3, atol=1e-4
        )
        if guided:
            torch.testing.assert_close(got[:1], without, rtol=1e-3, atol=1e-5)


def test_scheduled_sampling_uses_the_boxes_in_the_first_tau_of_the_steps(pipe):
    stock = render(pipe)
    adapter = open_gates(box_control.new_box_control(pipe.unet))
    adapter.set(CLIP.tracklets())
    videos = {}
    for tau in (0, 0.5, 1):
        callback = adapter.scheduled_sampling(tau, 2)
        videos[tau] = render(pipe, callback_on_step_end=callback)
    assert (videos[0] == stock).all()
    assert (videos[0.5] != stock).any()
    assert (videos[0.5] != videos[1]).any()
    adapter.enabled = True
    assert (render(pipe) == videos[1]).all()


def test_a_batch_size_or_length_that_does_not_fit_the_boxes_is_a_clear_error(unet):
    adapter = box_control.new_box_control(unet)
    adapter.set(**cond())
    with pytest.raises(ValueError, match=r"boxes of 1 clip\(s\) do not fit a batch of 3"):
        forward(unet, inputs(3))
    adapter.set(CLIP.tracklets().at(range(5)))
    with pytest.raises(ValueError, match="boxes of 5 frames, but the clip has 8"):
        forward(unet)


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_unet_takes_adapters_in_any_precision(unet, dtype):
    adapter = open_gates(box_control.new_box_control(unet))
    adapter.set(CLIP.tracklets())
    exact = forward(unet)
    unet.to(dtype)
    half = [x.to(dtype) for x in inputs()]
    for adapter_dtype in (torch.float32, dtype):
        adapter.to(adapter_dtype)
        sample = forward(unet, half)
        assert sample.dtype == dtype
        assert (sample.float() - exact).norm() / exact.norm() < 0.05


def test_autocast_trains_a_float32_adapter_on_a_half_unet(unet):
    unet.to(torch.bfloat16)
    model = box_control.ControlledUNet(unet, open_gates(box_control.new_box_control(unet)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, [y.to(torch.bfloat16) for y in inputs()], cond()).float()
    loss.backward()
    grads = [p.grad for p in model.adapter.parameters()]
    assert (
        all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
        and max(g.abs().max() for g in grads) > 0
    )


def test_box_control_works_together_with_a_lora(unet):
    base = forward(unet)
    inject_lora(unet, 4, 4, ["attention"])
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    lora = forward(unet)
    adapter = box_control.new_box_control(unet)
    adapter.set(CLIP.tracklets())
    torch.testing.assert_close(forward(unet), lora)
    open_gates(adapter)
    assert not torch.allclose(forward(unet), lora, atol=1e-3) and not torch.allclose(
        lora, base, atol=1e-3
    )


def test_box_control_attaches_to_an_untrained_unet():
    unet = build_unet()
    box_control.new_box_control(unet).set(CLIP.tracklets())
    assert forward(unet).isfinite().all()
