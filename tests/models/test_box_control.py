"""Box control hung on the stock UNet: what it leaves alone, what it reads, what it learns first."""

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


def inputs(clips=1, seed=0):
    """(sample, t, image_embeds, added_time_ids) of the embedded UNet."""
    g = torch.Generator().manual_seed(seed)
    shapes = (clips, 8, 8, 12, 16), (clips,), (clips, 1, 64), (clips, 3)
    return [torch.randn(shape, generator=g) for shape in shapes]


def cond(clips=1, slots=8):
    one = CLIP.tracklets().pad(slots).cond()
    return {k: torch.from_numpy(v)[None].repeat(clips, *[1] * v.ndim) for k, v in one.items()}


def open_gates(adapter, seed=3):
    """As after some training: gates open, no parameter at a special value."""
    g = torch.Generator().manual_seed(seed)
    for name, p in adapter.named_parameters():
        p.data += 0.7 if "alpha" in name else torch.randn(p.shape, generator=g) * 0.02
    return adapter


@pytest.fixture
def unet(pipe):
    return pipe.unet.requires_grad_(False)


def forward(unet, x=None):
    with torch.no_grad():
        return unet(*(x or inputs())).sample


def render(pipe, **kwargs):
    return np.stack(pipe(
        Image.fromarray(CLIP.frames[0]), 48, 64, 8, 2, generator=torch.Generator().manual_seed(0), output_type="np", **kwargs
    ).frames[0])  # fmt: skip


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


def test_the_stock_unet_does_not_notice(unet, tmp_path):
    """Its state_dict, parameters, attention processors, LoRA targets and saved files are the ones it had."""
    before = list(unet.state_dict()), len(list(unet.parameters())), list(unet.attn_processors)
    targets = target_modules(unet, ["attention", "feed_forward"])
    box_control.new_box_control(unet).set(CLIP.tracklets())
    assert (
        list(unet.state_dict()),
        len(list(unet.parameters())),
        list(unet.attn_processors),
    ) == before
    assert target_modules(unet, ["attention", "feed_forward"]) == targets
    unet.save_pretrained(tmp_path)
    torch.testing.assert_close(
        forward(type(unet).from_pretrained(tmp_path)), forward(unet), rtol=0, atol=1e-5
    )


def test_there_is_a_layer_in_every_spatial_block_and_an_enhancer_in_the_decoders(unet):
    adapter = box_control.new_box_control(unet)
    spatial = [n for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert sorted(box_control.public_name(f"layers.{k}") for k in adapter.layers) == sorted(spatial)
    enhanced = {k.replace("/", ".") for k, layer in adapter.layers.items() if layer.injector}
    assert enhanced == {n for n in spatial if n.startswith("up_blocks")} and enhanced
    assert not any(
        layer.injector
        for layer in box_control.new_box_control(unet, enhancer="none").layers.values()
    )


def test_it_attaches_to_the_full_size_svd_with_16_layers_9_of_them_enhanced():
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
def test_saved_and_loaded_equals_trained(unet, tmp_path, enhancer):
    adapter = open_gates(box_control.new_box_control(unet, slots=5, enhancer=enhancer))
    adapter.set(CLIP.tracklets())
    trained = forward(unet)
    box_control.save_box_control(adapter, tmp_path)
    adapter.detach()
    loaded = box_control.load_box_control(unet, tmp_path)
    assert loaded.config == adapter.config
    loaded.set(CLIP.tracklets())
    assert torch.equal(forward(unet), trained)


def test_halved_weights_are_half_the_size_and_load(unet, tmp_path):
    adapter = open_gates(box_control.new_box_control(unet))
    box_control.save_box_control(adapter, tmp_path)
    command = [
        sys.executable,
        "-m",
        "svd_xtend.models.box_control",
        str(tmp_path),
        "--output_dir",
        str(tmp_path / "half"),
    ]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    sizes = [
        (folder / box_control.BOX_CONTROL_FILE).stat().st_size for folder in (tmp_path, tmp_path / "half")
    ]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.02)
    adapter.detach()
    for name, p in box_control.load_box_control(unet, tmp_path / "half").state_dict().items():
        torch.testing.assert_close(p, adapter.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_unet_parameters_that_were_trained_too_come_along(unet, tmp_path):
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


def test_weights_of_another_unet_or_of_something_else_are_refused(unet, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="--tracklet_weights .*no such file"):
        box_control.load_box_control(unet, tmp_path)
    adapter = box_control.new_box_control(unet)
    adapter.config["blocks"] = {k: (c * 2, h) for k, (c, h) in adapter.config["blocks"].items()}
    box_control.save_box_control(adapter, tmp_path / "wide")
    with pytest.raises(ValueError, match="for another UNet; .*64.* here and .*128.* there"):
        box_control.load_box_control(unet, tmp_path / "wide")
    (tmp_path / "cut.safetensors").write_bytes(
        (tmp_path / "wide" / box_control.BOX_CONTROL_FILE).read_bytes()[:1000]
    )
    with pytest.raises(
        ValueError, match="--tracklet_weights .*cut.safetensors: damaged or not safetensors"
    ):
        box_control.load_box_control(unet, tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="not weights of box control"):
        box_control.load_box_control(unet, tmp_path / "lora.safetensors")
    box_control.save_box_control(box_control.new_box_control(unet), tmp_path / "short")
    from safetensors import safe_open

    with safe_open(tmp_path / "short" / box_control.BOX_CONTROL_FILE, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(tmp_path / "short" / box_control.BOX_CONTROL_FILE)
    tensors.pop("position_net.null")
    save_file(tensors, tmp_path / "short" / box_control.BOX_CONTROL_FILE, metadata)
    with pytest.raises(ValueError, match="1 tensors are missing.*position_net.null"):
        box_control.load_box_control(unet, tmp_path / "short")


# ------------------------------------------------------------------------------------------------------------ learning


def loss_of(model, x, boxes):
    return model(*x, **boxes).sample.square().mean()


def test_the_first_step_moves_only_gates_the_second_everything(unet):
    model = box_control.ControlledUNet(unet, box_control.new_box_control(unet))
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=1.0)
    loss_of(model, inputs(), cond()).backward()
    moved = {
        n
        for n, p in model.adapter.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }
    gates = {n for n, _ in model.adapter.named_parameters() if "alpha" in n}
    assert moved == gates
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, inputs(), cond()).backward()
    still = {
        n for n, p in model.adapter.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    }
    # softmax does not see what is the same for all keys
    assert {n for n in still if not n.endswith("to_k.bias")} == set()
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


def test_taking_the_boxes_away_before_backward_is_an_error_not_a_wrong_gradient(unet):
    unet.enable_gradient_checkpointing()
    model = box_control.ControlledUNet(unet, open_gates(box_control.new_box_control(unet))).train()
    loss = loss_of(model, inputs(), cond())
    model.adapter.current = None
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_a_box_layer_soon_learns_what_is_inside_its_boxes():
    """On features of pure noise, which say nothing of positions. Unexplained: of the variance of being inside."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, layer, head = (
            box_control.BoxEncoder(64),
            box_control.BoxLayer(64, 64, 2, enhancer="tokens"),
            torch.nn.Linear(64, 1),
        )
    layer.size = (6, 8)
    optimizer = torch.optim.AdamW(
        [*encoder.parameters(), *layer.parameters(), *head.parameters()], lr=3e-3
    )
    colors, flags = torch.rand(32, 2, 3, generator=g), torch.ones(32, 1, 2)
    for _ in range(201):
        corner, size = (torch.rand(32, 1, 2, 2, generator=g) for _ in range(2))
        boxes = torch.cat([0.6 * corner, (0.6 * corner + 0.15 + 0.25 * size)], -1)
        inside = (box_control.foreground_weight(boxes, 6, 8, 3)[:, 0, 0].flatten(1) > 1).float()
        x = torch.randn(32, 48, 64, generator=g)
        tokens = encoder(boxes, flags, flags, colors)
        out = layer(x, (tokens[:, 0], boxes[:, 0], flags[:, 0], flags[:, 0], 1)) - x
        loss = (head(out)[..., 0] - inside).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss / inside.var() < 0.6


# ------------------------------------------------------------------------------------------------------- what is read


def test_the_order_of_slots_and_what_stands_in_empty_ones_do_not_matter(unet):
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


def test_gated_attention_reads_its_frames_boxes_and_the_enhancer_those_of_all_frames(unet):
    adapter = open_gates(box_control.new_box_control(unet))
    with torch.no_grad():
        moved = cond()
        moved["boxes"][:, 0] = 1 - moved["boxes"][:, 0, :, [2, 3, 0, 1]]
        for key, layer in adapter.layers.items():
            channels, h, w = layer.fuser.norm1.normalized_shape[0], 6, 8
            layer.size, x = (
                (h, w),
                torch.randn(8, h * w, channels, generator=torch.Generator().manual_seed(0)),
            )
            a, c = (layer(x, adapter.tokens(boxes, [1], 8)) for boxes in (cond(), moved))
            changed = (a - c).abs().amax((1, 2)) > 1e-6
            assert changed.tolist() == [True] + [layer.injector is not None] * 7, key


def test_pooled_appearance_is_the_mean_inside_the_box_and_a_line_reads_the_border():
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


def carry_on_a_grid(boxes, valid=1.0, hard=1.0):
    """(frame 0's features, carried, place), each (f, 12, 16, c), for boxes [[x0, y0, x1, y1] of each frame] of one object, in
    cells of a 16 x 12 grid."""
    x = torch.randn(1, 12 * 16, 5, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(boxes, dtype=torch.float32)[None, :, None] / torch.tensor([16, 12, 16, 12])
    flags = torch.ones(boxes.shape[:3])
    y, x_ = ((torch.arange(side) + 0.5) / side for side in (12, 16))
    points = torch.stack(torch.meshgrid(x_, y, indexing="xy"), -1).flatten(0, 1)
    carried, place = box_control.carry_features(
        x, boxes, flags * valid, flags * hard, points, 12, 16
    )
    return x.view(12, 16, 5), carried.view(-1, 12, 16, 5), place.view(-1, 12, 16, 4)


def test_frame_0s_features_are_carried_along_with_their_box():
    """Stays, moves by whole cells, grows to twice its size: each is what a crop, a shift and an enlargement give."""
    x, carried, place = carry_on_a_grid([[2, 2, 6, 6], [5, 4, 9, 8], [4, 1, 12, 9]])
    for f, (top, left) in enumerate([(2, 2), (4, 5)]):
        expected = torch.zeros_like(x)
        expected[top : top + 4, left : left + 4] = x[2:6, 2:6]
        torch.testing.assert_close(carried[f], expected, rtol=0, atol=1e-5)
    half = nn.functional.interpolate(x.permute(2, 0, 1)[None], scale_factor=2, mode="bilinear")[
        0
    ].permute(1, 2, 0)
    torch.testing.assert_close(carried[2, 1:9, 4:12], half[4:12, 4:12], rtol=0, atol=1e-5)
    assert place[0, 2, 2].tolist() == pytest.approx([-0.75, -0.75, 1, 1]) and not place[0, 7].any()


def test_a_soft_box_carries_an_object_to_its_middle_in_its_own_size():
    x, carried, place = carry_on_a_grid(
        [[2, 2, 6, 6], [4, 1, 12, 9]], hard=torch.tensor([1.0, 0.0])[None, :, None]
    )
    torch.testing.assert_close(carried[1, 3:7, 6:10], x[2:6, 2:6], rtol=0, atol=1e-5)
    assert place[1, 4, 7, 2:].tolist() == [1, 0]


def test_nothing_is_carried_of_an_object_that_frame_0_does_not_hold_and_no_box_yields_nan():
    _, carried, place = carry_on_a_grid(
        [[2, 2, 6, 6], [5, 4, 9, 8]], valid=torch.tensor([0.0, 1.0])[None, :, None]
    )
    assert not carried.any() and not place.any()
    for boxes in ([[0, 0, 0, 0], [5, 4, 9, 8]], [[2, 2, 6, 6], [16, 3, 16, 9]]):
        assert all(part.isfinite().all() for part in carry_on_a_grid(boxes))


def test_fourier_features_are_those_of_gligen():
    """The same numbers as diffusers' function for four coordinates, in another order."""
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
def test_box_guidance_goes_farther_from_without_boxes_to_with(unet, guided):
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


def test_tau_ends_the_boxes_reign(pipe):
    stock = render(pipe)
    adapter = open_gates(box_control.new_box_control(pipe.unet))
    adapter.set(CLIP.tracklets())
    got = {tau: render(pipe, callback_on_step_end=adapter.scheduled_sampling(tau, 2)) for tau in (0, 0.5, 1)}
    assert (got[0] == stock).all()
    assert (got[0.5] != stock).any() and (got[0.5] != got[1]).any()
    adapter.enabled = True
    assert (render(pipe) == got[1]).all()


def test_a_batch_or_a_length_that_the_boxes_do_not_fit_is_one_clear_error(unet):
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
    half = [y.to(dtype) for y in inputs()]
    for own in (torch.float32, dtype):
        got = (
            forward(unet, half)
            if own == torch.float32
            else (adapter.to(own), forward(unet, half))[1]
        )
        assert got.dtype == dtype
        assert (got.float() - exact).norm() / exact.norm() < 0.05


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


def test_it_goes_together_with_a_lora(unet):
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


def test_it_hangs_on_a_unet_that_was_never_trained():
    unet = build_unet()
    box_control.new_box_control(unet).set(CLIP.tracklets())
    assert forward(unet).isfinite().all()
