"""Box control: layers on the stock SVD UNet that move objects along boxes over time (tracklets).

Load trained box control into a stock StableVideoDiffusionPipeline, choose the boxes and render:

    adapter = load_box_control(pipe.unet, "outputs/tracklet/stage3")
    adapter.set(tracklets)      # a svd_xtend.data.tracklets.Tracklets
    pipe(image, ...)
    adapter.detach()            # the stock UNet again

The adapter adds layers to each spatial transformer block, where diffusers has its GLIGEN branch:

    x = x + attn1(x)                           stock
    x = x + tanh(a) attn([x; boxes])[: hw]     every block     Boximator Sec. 4.1, GLIGEN Eq. 8
    x = x + tanh(b) ff(x)                      every block     Boximator Sec. 4.1, GLIGEN Eq. 8
    x = x + tanh(c) mlp([x; carried])          decoder only    ours: see `carry_features`
    x = x + tanh(d) attn(x, instances)         decoder only    TrackDiffusion's Instance Enhancer
    x = x + tanh(e) ff(x)                      decoder only    TrackDiffusion's Instance Enhancer
    x = x + attn2(x, image)                    stock
    x = x + ff(x)                              stock

The gates a to e start at 0, so a fresh adapter does not change the output.

Boximator: arXiv 2402.01566. TrackDiffusion: arXiv 2312.00651. GLIGEN: arXiv 2301.07093.

Letters in shapes: b clips, f frames, n slots (objects), c channels, d token dimension, and h w the
height and width of a block's features, flattened row by row.

To share trained weights, write them in half precision:

    python -m svd_xtend.models.box_control outputs/tracklet/stage3 --output_dir outputs/shared
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward, GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svd_xtend.models.loading import BOX_CONTROL_FILE

if TYPE_CHECKING:
    from diffusers import UNetSpatioTemporalConditionModel

NUM_FREQUENCIES = 8  # Boximator, Sec. 4.1
FREQUENCY_BASE = 100  # as in GLIGEN
FEATURES_PER_SCALAR = 2 * NUM_FREQUENCIES  # a cosine and a sine of each frequency
SCALARS_PER_BOX = 4 + 3 + 1  # x0 y0 x1 y1, RGB colour, hard
POOL_SIZE = 4  # pool_boxes averages 4 x 4 sampling points of a box
DISTANCE_SHARPNESS = 10  # tanh saturates at about a tenth of the picture from a side of the box
MIN_BOX_SIDE = 1e-3  # fraction of the picture; avoids division by 0 in boxes without area

# {path of a spatial transformer block in the UNet: (channels, attention heads)}
Blocks = dict[str, tuple[int, int]]


class BoxTokens(NamedTuple):
    """The boxes of one forward pass of the UNet, as its blocks receive them.

    This is a NamedTuple and not a dataclass because it travels through the arguments of modules,
    where FSDP2 before torch 2.13 finds tensors in tuples, but not in dataclasses.
    """

    tokens: Tensor  # (b f, n, d) outputs of BoxEncoder
    boxes: Tensor  # (b f, n, 4) xyxy in [0, 1]
    valid: Tensor  # (b f, n) 1: the object is in this frame, 0: it is not
    hard: Tensor  # (b f, n) 1: the box is exact, 0: it is a region that contains the object
    num_frames: int  # f


# ---------------------------------------------------------------------------- functions of boxes


def fourier_features(x: Tensor) -> Tensor:
    """Return cos(x s_k) and sin(x s_k) with s_k = 100^(k / 8), k = 0 .. 7 (Boximator, Sec. 4.1).

    x: (..., m) scalars in [0, 1]. Returns (..., 16 m) float32: all cosines, then all sines.
    """
    k = torch.arange(NUM_FREQUENCIES, device=x.device, dtype=torch.float32)
    s = FREQUENCY_BASE ** (k / NUM_FREQUENCIES)
    angles = (x.float()[..., None] * s).flatten(-2)
    return torch.cat([angles.cos(), angles.sin()], -1)


def cell_centers(height: int, width: int, device: torch.device) -> Tensor:
    """Return the centres of a grid of cells as (height width, 2): x and y in [0, 1], row by row."""
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def pool_boxes(x: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the mean of the features x inside each box: RoI align with an output of 1 x 1.

    The mean is over bilinear samples at a 4 x 4 grid of points in the box. A box without area on
    the border of the picture returns the features at the border.

    x: (b, h w, c). boxes: (b, n, 4) xyxy in [0, 1]. Returns (b, n, c).
    """
    top_left = boxes[..., :2].float()
    size = (boxes[..., 2:] - boxes[..., :2]).float()
    points_in_box = cell_centers(POOL_SIZE, POOL_SIZE, x.device)  # (16, 2) in [0, 1]
    points = top_left[:, :, None] + points_in_box * size[:, :, None]  # (b, n, 16, 2) in [0, 1]
    # grid_sample counts from -1 to 1. `contiguous` because its half-precision CPU kernel computes
    # offsets in 16 bits: in a channels-last map of more than 32,767 elements it reads beyond the
    # memory of the map.
    maps = rearrange(x, "b (h w) c -> b c h w", h=height, w=width).contiguous()
    samples = nn.functional.grid_sample(
        maps, (2 * points - 1).to(x.dtype), padding_mode="border", align_corners=False
    )  # (b, c, n, 16)
    return rearrange(samples.mean(-1), "b c n -> b n c")


def carry_features(
    x: Tensor,
    boxes: Tensor,
    valid: Tensor,
    hard: Tensor,
    points: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Move the features of frame 0 along with the boxes.

    For a position p inside a box with centre m_t and size s_t in frame t, return the features of
    frame 0 at the place that moved to p:

        source = m_0 + (p - m_t) s_0 / s_t

    If the box is soft in frame t or in frame 0, its size says nothing about the object, and the
    object keeps its size: s_0 / s_t is replaced by 1. Where boxes overlap, the smaller box is
    taken to be in front. Positions outside all boxes, and boxes of objects that are not in frame 0,
    give 0.

    Args:
        x: features of frame 0, (b, h w, c).
        boxes: (b, f, n, 4) xyxy in [0, 1].
        valid: (b, f, n), 1 where the object is in the frame.
        hard: (b, f, n), 1 where the box is exact.
        points: (h w, 2) centres of the feature map's cells, x and y in [0, 1].
        height: h.
        width: w.

    Returns:
        carried: (b, f, h w, c) features of frame 0 at `source`.
        place: (b, f, h w, 4) x and y of p in its box, in [-1, 1]; 1 inside a box; 1 if that box is
            hard in frame t and in frame 0.
    """
    boxes = boxes.float()[:, :, None]  # (b, f, 1, n, 4)
    p = points.float()[:, None]  # (h w, 1, 2)

    # the box that each position belongs to
    is_between_corners = ((boxes[..., :2] < p) & (p < boxes[..., 2:])).all(-1)  # (b, f, h w, n)
    is_valid = valid * valid[:, :1] > 0  # (b, f, n) in frame t and in frame 0
    is_inside = is_between_corners & is_valid[:, :, None]
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)  # (b, f, 1, n)
    front_slot = torch.where(is_inside, area, torch.inf).argmin(-1, keepdim=True)  # (b, f, h w, 1)
    is_in_any_box = is_inside.any(-1, keepdim=True).to(x.dtype)  # (b, f, h w, 1)

    def select_front(values: Tensor) -> Tensor:
        """Select the front slot's values: (b, 1 or f, 1, n, k) -> (b, f, h w, k)."""
        values = values.expand(*front_slot.shape[:3], *values.shape[3:])
        index = front_slot[..., None].expand(*front_slot.shape, values.shape[-1])
        return values.gather(3, index).squeeze(3)

    box_t = select_front(boxes)  # (b, f, h w, 4)
    box_0 = select_front(boxes[:, :1])  # (b, f, h w, 4)
    is_hard = select_front((hard * hard[:, :1])[:, :, None, :, None])  # (b, f, h w, 1)

    s_t = box_t[..., 2:] - box_t[..., :2]
    s_0 = box_0[..., 2:] - box_0[..., :2]
    m_t = (box_t[..., :2] + box_t[..., 2:]) / 2
    m_0 = (box_0[..., :2] + box_0[..., 2:]) / 2
    off_center = points - m_t
    scale = torch.where(is_hard > 0, s_0 / s_t.clamp(min=MIN_BOX_SIDE), 1)
    source = m_0 + off_center * scale  # (b, f, h w, 2) in [0, 1]

    # in float32, because bf16 coordinates would be wrong by half a pixel
    maps = rearrange(x.float(), "b (h w) c -> b c h w", h=height, w=width)
    carried = nn.functional.grid_sample(
        maps, 2 * source - 1, padding_mode="border", align_corners=False
    ).to(x.dtype)  # (b, c, f, h w)
    carried = rearrange(carried, "b c f p -> b f p c")

    place_in_box = 2 * off_center / s_t.clamp(min=MIN_BOX_SIDE)
    place = torch.cat([place_in_box, torch.ones_like(is_hard), is_hard], -1).to(x.dtype)
    return carried * is_in_any_box, place * is_in_any_box


def foreground_weight(boxes: Tensor, height: int, width: int, weight: float) -> Tensor:
    """Return loss weights that are `weight` times as large inside boxes as outside.

    TrackDiffusion uses 2. The mean over each clip is 1.

    boxes: (b, f, n, 4) xyxy in [0, 1]. Returns (b, f, 1, height, width).
    """
    x0, y0, x1, y1 = boxes.float()[..., None, None].unbind(3)  # each (b, f, n, 1, 1)
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    y = y[:, None]
    is_inside = (x0 < x) & (x < x1) & (y0 < y) & (y < y1)  # (b, f, n, height, width)
    weights = 1 + (weight - 1) * is_inside.any(2, keepdim=True).float()
    return weights / weights.mean((1, 2, 3, 4), keepdim=True)


# ----------------------------------------------------------------------------------- the layers


class BoxEncoder(nn.Module):
    """Encode boxes as tokens: MLP(Fourier([xyxy, colour, hard])), Boximator Sec. 4.1.

    Slots without an object get one learned token. The MLP has Kaiming weights and ends with a
    LayerNorm: with torch's default initialization the tokens of any two boxes are nearly equal.
    """

    def __init__(self, token_dim: int, hidden_dim: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SCALARS_PER_BOX * FEATURES_PER_SCALAR, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, token_dim),
            nn.LayerNorm(token_dim),
        )
        self.null = nn.Parameter(torch.randn(token_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, boxes: Tensor, valid: Tensor, hard: Tensor, colors: Tensor) -> Tensor:
        """Return tokens (b, f, n, d).

        boxes (b, f, n, 4) in [0, 1]; valid, hard (b, f, n) 0 or 1; colors (b, n, 3) in [0, 1].
        """
        colors = repeat(colors, "b n c -> b f n c", f=boxes.shape[1])
        scalars = torch.cat([boxes, colors, hard[..., None]], -1)  # (b, f, n, 8)
        tokens = self.mlp(fourier_features(scalars).to(self.null.dtype))
        valid = valid[..., None].to(tokens.dtype)
        # a weighted sum instead of torch.where, so that every parameter has a gradient in each step
        return valid * tokens + (1 - valid) * self.null


class InstanceEnhancer(nn.Module):
    """TrackDiffusion's Instance Enhancer: visual tokens attend to one token per object.

    An instance token is made from the object's appearance, pooled inside its box, and the token of
    its box. Attention over time mixes the instance tokens of an object over all frames.

    There are three additions to TrackDiffusion:

    - The attention has a bias, learned from where a visual token lies relative to the box's sides.
      Being inside a box is a product of four comparisons, which dot products of position features
      are slow to learn. In a toy task, 300 steps explained 20 % of it without the bias and 76 %
      with it.
    - Visual tokens outside all boxes can attend to one learned token.
    - With `carrying`, the features of frame 0 are moved along with the boxes (see `carry_features`)
      and added before the attention. One token per object says what the object is, but little about
      how it looks. The features of frame 0 do.
    """

    def __init__(self, channels: int, token_dim: int, heads: int, carrying: bool) -> None:
        super().__init__()
        head_dim = channels // heads
        self.null = nn.Parameter(torch.zeros(channels))  # appearance of slots without an object
        self.outside = nn.Parameter(torch.randn(channels))  # for tokens that are in no box
        self.bias = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, heads))
        self.fuse = nn.Sequential(
            nn.Linear(channels + token_dim, channels),
            nn.SiLU(),
            nn.Linear(channels, channels),
            nn.SiLU(),
            nn.Linear(channels, channels),
        )
        self.norm_roi = nn.LayerNorm(channels)
        self.norm_fused = nn.LayerNorm(channels)
        self.norm_time = nn.LayerNorm(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm_context = nn.LayerNorm(channels)
        self.time_attn = Attention(channels, heads=heads, dim_head=head_dim)
        self.attn = Attention(
            channels, cross_attention_dim=channels, heads=heads, dim_head=head_dim
        )
        self.ff = FeedForward(channels, activation_fn="geglu")
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.alpha_dense = nn.Parameter(torch.zeros(1))
        self.carrying = carrying
        if carrying:
            self.norm_own = nn.LayerNorm(channels)
            self.norm_carried = nn.LayerNorm(channels)
            self.mlp = nn.Sequential(
                nn.Linear(2 * channels + 4, channels), nn.SiLU(), nn.Linear(channels, channels)
            )
            self.alpha_carry = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, control: BoxTokens, height: int, width: int, points: Tensor
    ) -> Tensor:
        """Return x, (b f, h w, c), enhanced. points: (h w, 2) centres of the tokens in [0, 1]."""
        if self.carrying:
            moved = self.move_features(x, control, height, width, points)
            x = x + self.alpha_carry[0].tanh() * moved
        instances = self.instance_tokens(x, control, height, width)
        bias = self.attention_bias(x, control, points)
        x = x + self.alpha_attn[0].tanh() * self.attn(self.norm1(x), instances, attention_mask=bias)
        return x + self.alpha_dense[0].tanh() * self.ff(self.norm2(x))

    def move_features(
        self, x: Tensor, control: BoxTokens, height: int, width: int, points: Tensor
    ) -> Tensor:
        """Return mlp([x; carried; place]), (b f, h w, c), from the features of frame 0."""
        f = control.num_frames
        x = rearrange(x, "(b f) p c -> b f p c", f=f)
        boxes = rearrange(control.boxes, "(b f) n xyxy -> b f n xyxy", f=f)
        valid = rearrange(control.valid, "(b f) n -> b f n", f=f)
        hard = rearrange(control.hard, "(b f) n -> b f n", f=f)
        carried, place = carry_features(x[:, 0], boxes, valid, hard, points, height, width)
        parts = [self.norm_own(x), self.norm_carried(carried), place]
        moved = self.mlp(torch.cat([part.to(x.dtype) for part in parts], -1))
        return rearrange(moved, "b f p c -> (b f) p c")

    def instance_tokens(self, x: Tensor, control: BoxTokens, height: int, width: int) -> Tensor:
        """Return (b f, n + 1, c): one token per slot, and the one for positions in no box."""
        f = control.num_frames
        valid = control.valid[..., None].to(x.dtype)
        pooled = pool_boxes(x, control.boxes, height, width)
        appearance = valid * pooled + (1 - valid) * self.null
        appearance = self.norm_roi(appearance).to(control.tokens.dtype)
        instances = self.norm_fused(self.fuse(torch.cat([appearance, control.tokens], -1)))

        num_images, n, c = instances.shape
        frame_embeddings = get_timestep_embedding(torch.arange(f, device=x.device), c)
        frame_embeddings = frame_embeddings.to(instances.dtype)
        instances = rearrange(instances, "(b f) n c -> (b n) f c", f=f) + frame_embeddings
        instances = instances + self.time_attn(self.norm_time(instances))
        instances = rearrange(instances, "(b n) f c -> (b f) n c", n=n)

        outside = self.outside.expand(num_images, 1, c).to(instances.dtype)
        return self.norm_context(torch.cat([instances, outside], 1))

    def attention_bias(self, x: Tensor, control: BoxTokens, points: Tensor) -> Tensor:
        """Return the bias of the attention to instance tokens, (b f heads, h w, n + 1).

        It is learned from the signed distances to the four sides of a box, which are all positive
        inside. It is 0 for slots without an object and for the token of positions in no box.
        """
        valid = control.valid[..., None].to(x.dtype)  # (b f, n, 1)
        x_p, y_p = points.to(control.boxes.dtype)[:, None].unbind(-1)  # each (h w, 1)
        x0, y0, x1, y1 = control.boxes[:, None].unbind(-1)  # each (b f, 1, n)
        distances = torch.stack([x_p - x0, y_p - y0, x1 - x_p, y1 - y_p], -1)  # (b f, h w, n, 4)
        distances = (distances * DISTANCE_SHARPNESS).tanh().to(self.null.dtype)
        bias = self.bias(distances) * valid[:, None]  # (b f, h w, n, heads)
        no_bias = torch.zeros_like(bias[:, :, :1])
        bias = torch.cat([bias, no_bias], 2)
        return rearrange(bias, "b p n heads -> (b heads) p n")


class GatedAttention(GatedSelfAttentionDense):
    """diffusers' gated self-attention over visual and box tokens, with gates of one dimension.

    FSDP2 cannot shard parameters without dimensions, as diffusers has them. The gates are used
    as scalars, `alpha[0]`, because a float32 tensor with a dimension would turn the half-precision
    features that it multiplies into float32.
    """

    def __init__(self, channels: int, token_dim: int, heads: int, head_dim: int) -> None:
        super().__init__(channels, token_dim, heads, head_dim)
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.alpha_dense = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, objs: Tensor) -> Tensor:
        """Return x + tanh(a) attn([x; objs])[: hw], then x + tanh(b) ff(x): GLIGEN Eq. 8.

        x: (b f, h w, c) visual tokens. objs: (b f, n, d) box tokens. Returns (b f, h w, c).
        """
        num_visual_tokens = x.shape[1]
        objs = self.linear(objs)
        tokens = self.norm1(torch.cat([x, objs], dim=1))
        x = x + self.alpha_attn[0].tanh() * self.attn(tokens)[:, :num_visual_tokens, :]
        return x + self.alpha_dense[0].tanh() * self.ff(self.norm2(x))


class BoxLayer(nn.Module):
    """All box-control layers of one spatial transformer block.

    Attention does not know positions, and a box is a position. So visual tokens get the Fourier
    features of their own position added, the same features that encode the corners of boxes. They
    are added inside the gated attention only.

    Outside autocast the layer computes in the dtype of its parameters. It returns the dtype of x.
    """

    def __init__(self, channels: int, token_dim: int, heads: int, enhancer: str) -> None:
        super().__init__()
        self.fuser = GatedAttention(channels, token_dim, heads, channels // heads)
        nn.init.zeros_(self.fuser.linear.bias)
        self.place = nn.Linear(2 * FEATURES_PER_SCALAR, channels)
        self.injector: InstanceEnhancer | None = None
        if enhancer != "none":
            self.injector = InstanceEnhancer(channels, token_dim, heads, enhancer == "carry")
        self.size: tuple[int, int] | None = None  # (h, w) of the features, see record_size

    def record_size(self, transformer: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember h and w of the features; a forward pre-hook of the surrounding transformer.

        The transformer receives (b f, c, h, w), the block only the flattened (b f, h w, c).
        """
        height, width = args[0].shape[-2:]
        self.size = (height, width)

    def forward(self, x: Tensor, control: BoxTokens) -> Tensor:
        """Return x, (b f, h w, c), after the layers that see the boxes."""
        assert self.size is not None, "record_size runs before the block does"
        height, width = self.size
        points = cell_centers(height, width, x.device)
        place = self.place(fourier_features(points).to(self.place.weight.dtype))
        out = x
        if not torch.is_autocast_enabled(x.device.type):
            out = x.to(place.dtype)
        placed = out + place
        change = self.fuser(placed, control.tokens) - placed  # exactly 0 while the gates are 0
        out = out + change
        if self.injector is not None:
            out = self.injector(out, control, height, width, points)
        return out.to(x.dtype)


# ---------------------------------------------------------------------------------- the adapter


class BoxAdapter(nn.Module):
    """The box encoder and the box layers for one UNet.

    The adapter works through hooks on the UNet. It is not a child module of the UNet, whose
    parameters, state_dict and LoRA targets stay those of the stock model.

    The boxes that `set` chose are used until the next call of `set`. Keep them until the backward
    pass is done: under gradient checkpointing it runs the blocks again and needs the same boxes.

    Args:
        blocks: {path of a spatial transformer block: (channels, heads)}, see `spatial_blocks`.
        token_dim: dimension of the box tokens.
        slots: number of objects that a clip can have.
        enhancer: layers in the decoder: "carry" is TrackDiffusion's Instance Enhancer that also
            carries the features of frame 0, "tokens" is the enhancer alone, "none" adds no enhancer.

    Attributes:
        enabled: False runs the stock UNet.
        box_guidance_scale: s in e + s (e_boxes - e), where e and e_boxes are the predictions without
            and with boxes. 1 is no guidance. Other values run the UNet on one more copy of the clip.
        replaced: {name: value before loading} of the UNet's own parameters that were trained
            together with the adapter. `detach` restores them.
    """

    def __init__(
        self, blocks: Blocks, token_dim: int, slots: int = 8, enhancer: str = "carry"
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "blocks": blocks,
            "token_dim": token_dim,
            "slots": slots,
            "enhancer": enhancer,
        }
        self.position_net = BoxEncoder(token_dim)
        self.layers = nn.ModuleDict()
        for path, (channels, heads) in blocks.items():
            is_decoder = path.startswith("up_blocks")
            layer_enhancer = enhancer if is_decoder else "none"
            # a ModuleDict allows no dots in its keys
            key = path.replace(".", "/")
            self.layers[key] = BoxLayer(channels, token_dim, heads, layer_enhancer)
        self.replaced: dict[str, Tensor] = {}
        self.enabled = True
        self.box_guidance_scale = 1.0
        self.cond: dict[str, Tensor] | None = None  # the boxes that `set` chose
        self.current: BoxTokens | None = None  # their tokens in the running forward pass
        self.guided_parts = 0  # copies of the clip in the running pass with box guidance; or 0
        self.hooks: list[Any] = []
        self.unets: list[nn.Module] = []  # none or one; in a list, so that it is no child module

    # ---------------------------------------------------------------------------- attach, detach

    def attach(self, unet: nn.Module) -> BoxAdapter:
        """Attach the layers to `unet` and return the adapter.

        Raises ValueError if the adapter was made for a UNet with other blocks.
        """
        check_box_blocks(self.config["blocks"], unet, "the adapter")
        self.detach()
        self.unets.append(unet)
        self.hooks.append(unet.register_forward_pre_hook(self.before_unet, with_kwargs=True))
        self.hooks.append(unet.register_forward_hook(self.after_unet))
        for key, layer in self.layers.items():
            assert isinstance(layer, BoxLayer)
            path = key.replace("/", ".")
            transformer_path = path.rsplit(".", 2)[0]
            block = unet.get_submodule(path)
            transformer = unet.get_submodule(transformer_path)
            # diffusers' GLIGEN branch calls the attribute `fuser`. nn.Module.__setattr__ would
            # register the layer as a child of the UNet.
            object.__setattr__(block, "fuser", layer)
            self.hooks.append(block.register_forward_pre_hook(self.before_block, with_kwargs=True))
            self.hooks.append(transformer.register_forward_pre_hook(layer.record_size))
        return self

    def detach(self) -> None:
        """Remove the layers from the UNet and restore the UNet's own parameters."""
        for hook in self.hooks:
            hook.remove()
        for unet in self.unets:
            for path in self.config["blocks"]:
                unet.get_submodule(path).__dict__.pop("fuser", None)
            for name, value in self.replaced.items():
                unet.get_parameter(name).data.copy_(value)
        self.hooks = []
        self.unets = []
        self.replaced = {}

    # ------------------------------------------------------------------------------------- boxes

    def set(self, tracklets: Any = None, **cond: Tensor) -> None:
        """Choose the boxes of all forward passes from here on.

        Pass either a svd_xtend.data.tracklets.Tracklets of one clip, which is padded to the slots
        of the adapter, or tensors of a batch: boxes (b, f, n, 4) xyxy in [0, 1], valid and hard
        (b, f, n), colors (b, n, 3). Without either, the UNet is the stock UNet.
        """
        if tracklets is not None:
            slots = self.config["slots"]
            if len(tracklets.ids) != slots:
                tracklets = tracklets.pad(slots)
            cond = {}
            for name, array in tracklets.cond().items():
                cond[name] = torch.from_numpy(array)[None]
        self.cond = cond or None

    def scheduled_sampling(self, tau: float, num_steps: int) -> Callable[..., dict[str, Tensor]]:
        """Return a pipeline's `callback_on_step_end` for scheduled sampling (GLIGEN, Sec. 4).

        The boxes are used in the first `tau` (0 to 1) of the pipeline's `num_steps` steps. The
        remaining steps run the stock UNet.
        """
        self.enabled = tau > 0

        def callback(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            # modulo, so that after the last step the adapter is ready for the next clip
            next_step = (step + 1) % num_steps
            self.enabled = next_step < tau * num_steps
            return tensors

        return callback

    def tokens(self, cond: dict[str, Tensor], copies: list[int], num_frames: int) -> BoxTokens:
        """Encode the boxes for a batch that consists of one or more copies of the clips.

        Args:
            cond: boxes (b, f, n, 4), valid and hard (b, f, n), colors (b, n, 3).
            copies: for each copy of the b clips, 1 if it has the boxes and 0 if it has none.
            num_frames: f of the clips.

        Raises ValueError if the boxes have another number of frames.
        """
        num_box_frames = cond["boxes"].shape[1]
        if num_box_frames != num_frames:
            raise ValueError(
                f"boxes of {num_box_frames} frames, but the clip has {num_frames}. Select the "
                f"clip's frames with Tracklets.at(range({num_frames}))."
            )
        device = self.position_net.null.device
        copied = {}
        for name, tensor in cond.items():
            tensor = tensor.to(device)
            if name == "valid":
                copied[name] = torch.cat([tensor * has_boxes for has_boxes in copies])
            else:
                copied[name] = torch.cat([tensor for _ in copies])
        tokens = self.position_net(**copied)
        return BoxTokens(
            tokens=tokens.flatten(0, 1),
            boxes=copied["boxes"].flatten(0, 1),
            valid=copied["valid"].flatten(0, 1),
            hard=copied["hard"].flatten(0, 1),
            num_frames=num_frames,
        )

    # ------------------------------------------------------------------------------------- hooks

    def before_unet(
        self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Encode the boxes, once per forward pass of the UNet.

        A batch of twice as many clips as boxes is the pipeline's [unconditional, conditional]
        under classifier-free guidance: the first half gets no boxes. With a box guidance scale,
        the conditional clips are appended once more: [..., without boxes, with boxes].
        """
        self.current = None
        self.guided_parts = 0
        if self.cond is None or not self.enabled:
            return None
        sample = args[0] if args else kwargs["sample"]
        if self.position_net.null.device != sample.device:
            # the pipeline was moved to a GPU after the adapter was loaded
            self.to(sample.device)

        num_clips = len(sample)
        b = len(self.cond["boxes"])
        if num_clips == b:
            copies = [1]
        elif num_clips == 2 * b:
            copies = [0, 1]
        else:
            raise ValueError(
                f"boxes of {b} clip(s) do not fit a batch of {num_clips}. The batch must have {b} "
                f"clips, or {2 * b} with classifier-free guidance."
            )

        if self.box_guidance_scale != 1:
            copies = [*copies[:-1], 0, 1]
            self.guided_parts = len(copies)

            def repeat_conditional(value: Any) -> Any:
                if torch.is_tensor(value) and value.ndim > 0 and len(value) == num_clips:
                    return torch.cat([value, value[-b:]])
                return value

            args = tuple(repeat_conditional(value) for value in args)
            kwargs = {name: repeat_conditional(value) for name, value in kwargs.items()}

        num_frames = sample.shape[1]
        self.current = self.tokens(self.cond, copies, num_frames)
        return args, kwargs

    def after_unet(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return e + s (e_boxes - e) with the box guidance scale s, if `before_unet` prepared it."""
        if not self.guided_parts:
            return None
        *unconditional, e, e_boxes = output[0].chunk(self.guided_parts)
        guided = e + self.box_guidance_scale * (e_boxes - e)
        sample = torch.cat([*unconditional, guided])
        if isinstance(output, tuple):
            return (sample,)
        return type(output)(sample=sample)

    def before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pass the box tokens to the block in the argument of diffusers' GLIGEN branch."""
        if self.current is None:
            return None
        gligen = {"objs": self.current}
        return args, {**kwargs, "cross_attention_kwargs": {"gligen": gligen}}


class ControlledUNet(nn.Module):
    """A UNet and its adapter as one module, for DDP, FSDP2 and checkpoints.

    The boxes are keyword arguments: `ControlledUNet(unet, adapter)(sample, timestep,
    encoder_hidden_states, added_time_ids, boxes=..., valid=..., hard=..., colors=...)`.
    """

    def __init__(self, unet: nn.Module, adapter: BoxAdapter) -> None:
        super().__init__()
        self.unet = unet
        self.adapter = adapter

    def forward(self, *args: Any, **cond: Tensor) -> Any:
        """Return the UNet's output. args: those of the UNet; cond: those of `BoxAdapter.set`."""
        self.adapter.set(**cond)
        return self.unet(*args)


# ----------------------------------------------------------------------------- make, save, load


def spatial_blocks(unet: nn.Module) -> Blocks:
    """Return {path: (channels, heads)} of the spatial transformer blocks. SVD has 16."""
    blocks = {}
    for path, block in unet.named_modules():
        if re.search(r"attentions\.\d+\.transformer_blocks\.\d+$", path):
            channels = block.norm1.normalized_shape[0]
            blocks[path] = (channels, block.attn1.heads)
    return blocks


def check_box_blocks(blocks: Blocks, unet: nn.Module, source: str) -> None:
    """Raise ValueError if `blocks` are not those of the UNet. source: names them in the error."""
    unet_blocks = spatial_blocks(unet)
    for path in sorted(blocks.keys() | unet_blocks.keys()):
        expected = unet_blocks.get(path)
        actual = None
        if path in blocks:
            actual = tuple(blocks[path])
        if actual != expected:
            raise ValueError(
                f"{source}: was made for another UNet. The block {path} has (channels, heads) "
                f"{expected} in this UNet, but {actual} in that one."
            )


def new_box_control(
    unet: UNetSpatioTemporalConditionModel,
    slots: int = 8,
    token_dim: int | None = None,
    enhancer: str = "carry",
    seed: int = 0,
) -> BoxAdapter:
    """Make an untrained adapter and attach it. The UNet's output stays the same, bit for bit.

    slots: number of objects that a clip can have. token_dim: by default the dimension of the UNet's
    CLIP embeddings. enhancer: see BoxAdapter. seed: of the initial weights; the global random
    state is not changed.
    """
    if token_dim is None:
        token_dim = unet.config.cross_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = BoxAdapter(spatial_blocks(unet), token_dim, slots, enhancer)
    return adapter.attach(unet)


def public_name(name: str) -> str:
    """Return the name of a parameter as files have it, as in GLIGEN and TrackDiffusion.

    layers.up_blocks/1/attentions/0/... -> up_blocks.1.attentions.0. ...
    """
    return name.removeprefix("layers.").replace("/", ".")


def public_parameters(adapter: BoxAdapter) -> dict[str, Tensor]:
    """Return the adapter's parameters under the names that files have."""
    # not the state_dict, which under FSDP2 returns this process's shard
    return {public_name(name): p for name, p in adapter.named_parameters()}


def save_box_control(
    adapter: BoxAdapter, folder: str | Path, unet_parameters: Mapping[str, Tensor] | None = None
) -> None:
    """Write `folder`/tracklet_weights.safetensors in float32: the adapter and its configuration.

    unet_parameters: {name: tensor} of the UNet's own parameters that were trained together with the
    adapter. They are written into the same file, with the prefix `unet.`.
    """
    tensors = public_parameters(adapter)
    for name, tensor in (unet_parameters or {}).items():
        tensors[f"unet.{name}"] = tensor
    metadata = {"format": "pt", "box_adapter": json.dumps(adapter.config)}
    write_box_weights(tensors, metadata, folder, torch.float32)


def write_box_weights(
    tensors: dict[str, Tensor], metadata: dict[str, str], folder: str | Path, dtype: torch.dtype
) -> None:
    """Write `folder`/tracklet_weights.safetensors with the tensors in `dtype`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    converted = {}
    for name, tensor in tensors.items():
        converted[name] = tensor.detach().to("cpu", dtype).contiguous()
    save_file(converted, Path(folder, BOX_CONTROL_FILE), metadata)


def read_box_weights(file: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return (metadata, {name: tensor in float32}) of a box-control file or of its folder.

    Raises ValueError if the file is missing, damaged or not a box-control file.
    """
    file = Path(file)
    if file.is_dir():
        file = file / BOX_CONTROL_FILE
    if not file.is_file():
        raise ValueError(f"--tracklet_weights {file}: no such file")
    tensors = {}
    try:
        with safe_open(file, "pt") as weights:
            metadata = weights.metadata() or {}
            for name in weights.keys():
                # old files have gates without dimensions
                tensors[name] = torch.atleast_1d(weights.get_tensor(name).float())
    except SafetensorError as error:
        raise ValueError(
            f"--tracklet_weights {file}: is damaged or not a safetensors file ({error})"
        ) from error
    if "box_adapter" not in metadata:
        raise ValueError(
            f"--tracklet_weights {file}: does not contain box control (its metadata has no "
            "box_adapter)"
        )
    return metadata, tensors


def load_box_control(unet: UNetSpatioTemporalConditionModel, file: str | Path) -> BoxAdapter:
    """Load the adapter from `file` or from its folder, and attach it to `unet`.

    If the file also contains parameters of the UNet, they replace those of `unet` until
    `adapter.detach()`. Raises ValueError if the file does not fit the UNet.
    """
    metadata, tensors = read_box_weights(file)
    config = json.loads(metadata["box_adapter"])
    config["blocks"] = {path: tuple(size) for path, size in config["blocks"].items()}
    check_box_blocks(config["blocks"], unet, f"--tracklet_weights {file}")

    adapter = BoxAdapter(**config)
    check_tensors(tensors, parameters_to_load(adapter, unet, tensors), file)
    adapter.to(unet.device, unet.dtype).attach(unet)

    parameters = parameters_to_load(adapter, unet, tensors)
    for name, tensor in tensors.items():
        parameter = parameters[name]
        if name.startswith("unet."):
            unet_name = name.removeprefix("unet.")
            adapter.replaced[unet_name] = parameter.detach().cpu().clone()
        parameter.data.copy_(tensor)
    return adapter


def parameters_to_load(
    adapter: BoxAdapter, unet: nn.Module, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return all parameters of the adapter, and those of the UNet that `tensors` contains."""
    parameters = public_parameters(adapter)
    for name, parameter in unet.named_parameters():
        if f"unet.{name}" in tensors:
            parameters[f"unet.{name}"] = parameter
    return parameters


def check_tensors(
    tensors: dict[str, Tensor], parameters: dict[str, Tensor], file: str | Path
) -> None:
    """Raise ValueError if the names and shapes in a file are not those of the parameters."""
    missing = parameters.keys() - tensors.keys()
    unknown = tensors.keys() - parameters.keys()
    misshapen = set()
    for name in parameters.keys() & tensors.keys():
        if parameters[name].shape != tensors[name].shape:
            misshapen.add(name)
    wrong = sorted(missing | unknown | misshapen)
    if wrong:
        raise ValueError(
            f"--tracklet_weights {file}: {len(wrong)} tensor(s) are missing, unknown or of another "
            f"shape, for instance {wrong[:3]}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write box-control weights in half precision, for sharing."
    )
    parser.add_argument("tracklet_weights", help="tracklet_weights.safetensors, or its folder")
    parser.add_argument("--output_dir", required=True, help="folder for the half-precision file")
    args = parser.parse_args()
    metadata, tensors = read_box_weights(args.tracklet_weights)
    write_box_weights(tensors, metadata, args.output_dir, torch.float16)
