"""Box control on the stock UNet: tokens of tracklets, gated self-attention, Instance Enhancer; attach and detach.

    adapter = load_box_control(pipe.unet, "outputs/tracklet/stage3")     # a stock StableVideoDiffusionPipeline
    adapter.set(tracklets)                                         # svd_xtend.tracklets.Tracklets, padded to its slots
    pipe(image, ...)                                               # boxes steer; adapter.detach() takes it off again

In each spatial transformer block, where diffusers' GLIGEN branch has its place:

    x = x + attn1(x)                                                 stock
    x = x + tanh(a) attn([x; boxes])[: hw],  x = x + tanh(b) ff(x)   every block    Boximator Sec. 4.1, GLIGEN Eq. 8
    x = x + tanh(c) mlp([x; carried])                                decoder only   ours: frame 0's features, see `carry`
    x = x + tanh(d) attn(x, instances),      x = x + tanh(e) ff(x)   decoder only   TrackDiffusion's Instance Enhancer
    x = x + attn2(x, image),  x = x + ff(x)                          stock

The gates a to e start at 0: a fresh adapter changes nothing. Next: train_svd_tracklet.py.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from diffusers.models.attention import FeedForward, GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange, repeat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from svd_xtend.models.loading import BOX_CONTROL_FILE

FREQUENCIES = 8  # Boximator, Sec. 4.1: cos and sin of x 100^(k / 8), k = 0 .. 7
SHARPNESS = 10  # a tenth of the picture away from its side is clearly inside or outside a box
POOL = 4  # points on each side of a box, whose mean is its appearance


def fourier_features(x):
    """(..., k) scalars in [0, 1] -> (..., 16 k): cosines, then sines."""
    scale = 100 ** (torch.arange(FREQUENCIES, device=x.device, dtype=torch.float32) / FREQUENCIES)
    angles = (x.float()[..., None] * scale).flatten(-2)
    return torch.cat([angles.cos(), angles.sin()], -1)


def pool_boxes(x, boxes, height, width):
    """Mean of the features x (b, h w, c) inside each of boxes (b, n, 4): 1x1 RoI align, (b, n, c).

    Bilinear samples on a 4 x 4 grid; a box without area, on the picture's border, gives what is there."""
    ticks = (torch.arange(POOL, device=x.device, dtype=torch.float32) + 0.5) / POOL
    corner, size = boxes[..., :2].float(), (boxes[..., 2:] - boxes[..., :2]).float()
    points = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).flatten(0, 1)
    grid = 2 * (corner[:, :, None] + points * size[:, :, None]) - 1
    # contiguous: the CPU's half-precision grid_sample indexes a channels-last map in 16 bits, and reads beyond it
    maps = rearrange(x, "b (h w) c -> b c h w", h=height, w=width).contiguous()
    samples = nn.functional.grid_sample(
        maps, grid.to(x.dtype), padding_mode="border", align_corners=False
    )
    return rearrange(samples.mean(-1), "b c n -> b n c")


def carry_features(x, boxes, valid, hard, points, height, width):
    """What each position shows if every object moved with its box: frame 0's features x (b, h w, c) of the place that came
    to lie there, (b, f, h w, c), and where in its box a position is, (b, f, h w, 4): x and y in [-1, 1], whether it is in
    one, whether that is hard. 0 outside boxes, and in those of objects that frame 0 does not hold.

    boxes (b, f, n, 4), valid and hard (b, f, n), points (h w, 2). Between two hard boxes an object grows as they do;
    where one is soft, which tells no size, it keeps its own. The smaller of two boxes lies in front."""
    boxes, p = boxes.float()[:, :, None], points.float()[:, None]  # (b, f, 1, n, 4), (h w, 1, 2)
    inside = ((boxes[..., :2] < p) & (p < boxes[..., 2:])).all(-1) & (valid * valid[:, :1] > 0)[
        :, :, None
    ]
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    own = torch.where(inside, area, torch.inf).argmin(
        -1, keepdim=True
    )  # (b, f, h w, 1): the slot in front
    inside = inside.any(-1, keepdim=True).to(x.dtype)

    def of_own(values):  # (b, 1 or f, 1, n, k) -> (b, f, h w, k)
        values = values.expand(*own.shape[:3], *values.shape[3:])
        return values.gather(3, own[..., None].expand(*own.shape, values.shape[-1])).squeeze(3)

    now, first, exact = (
        of_own(boxes),
        of_own(boxes[:, :1]),
        of_own((hard * hard[:, :1])[:, :, None, :, None]),
    )
    size, first_size = now[..., 2:] - now[..., :2], first[..., 2:] - first[..., :2]
    off_center = points - (now[..., :2] + now[..., 2:]) / 2
    scale = torch.where(exact > 0, first_size / size.clamp(min=1e-3), 1)
    source = (first[..., :2] + first[..., 2:]) / 2 + off_center * scale
    maps = rearrange(
        x.float(), "b (h w) c -> b c h w", h=height, w=width
    )  # half a pixel would be lost in bf16
    carried = nn.functional.grid_sample(
        maps, 2 * source - 1, padding_mode="border", align_corners=False
    ).to(x.dtype)
    place = torch.cat(
        [2 * off_center / size.clamp(min=1e-3), torch.ones_like(exact), exact], -1
    ).to(x.dtype)
    return rearrange(carried, "b c f p -> b f p c") * inside, place * inside


def foreground_weight(boxes, height, width, weight):
    """(b, f, n, 4) -> (b, f, 1, height, width) of mean 1: `weight` times as much inside boxes (TrackDiffusion: 2)."""
    x0, y0, x1, y1 = boxes.float()[..., None, None].unbind(3)
    y, x = ((torch.arange(side, device=boxes.device) + 0.5) / side for side in (height, width))
    inside = ((x0 < x) & (x < x1) & (y0 < y[:, None]) & (y[:, None] < y1)).any(2, keepdim=True)
    map = 1 + (weight - 1) * inside.float()
    return map / map.mean((1, 2, 3, 4), keepdim=True)


class BoxEncoder(nn.Module):
    """Tokens of boxes: MLP(Fourier([xyxy, colour, hard])); slots without an object get one learned token (Boximator).

    Kaiming weights and a LayerNorm at the end: with torch's defaults the tokens of any two boxes are all but equal."""

    def __init__(self, token_dim, hidden=512):
        super().__init__()
        sizes = [8 * 2 * FREQUENCIES, hidden, hidden, hidden]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, token_dim), nn.LayerNorm(token_dim))
        self.null = nn.Parameter(torch.randn(token_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, boxes, valid, hard, colors):
        """(b, f, n, 4), (b, f, n), (b, f, n), (b, n, 3) -> (b, f, n, token_dim)."""
        colors = repeat(colors, "b n c -> b f n c", f=boxes.shape[1])
        tokens = self.mlp(
            fourier_features(torch.cat([boxes, colors, hard[..., None]], -1)).to(self.null.dtype)
        )
        valid = valid[..., None].to(tokens.dtype)
        return (
            valid * tokens + (1 - valid) * self.null
        )  # a blend: every parameter has a gradient in every step


class InstanceEnhancer(nn.Module):
    """One token for an object from its appearance and its box, mixed over the frames, read by all visual tokens.

    Beyond TrackDiffusion: a bias on that attention, learned from where a visual token lies relative to the box's sides, and
    a learned token for those that lie in none. Being inside is a product of four comparisons, which dot products of
    position features are slow to learn: in a toy, 300 steps explained 20 % of it without the bias, and 76 % with it.
    And, with `carrying`, before that attention: what frame 0 shows of an object is brought to where its box is, place by
    place. One token for an object tells what it is, but hardly how it looks; its features of frame 0 do."""

    def __init__(self, channels, token_dim, heads, carrying):
        super().__init__()
        size = {"heads": heads, "dim_head": channels // heads}
        self.null, self.outside = (
            nn.Parameter(torch.zeros(channels)),
            nn.Parameter(torch.randn(channels)),
        )
        self.bias = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, heads))
        self.fuse = nn.Sequential(
            nn.Linear(channels + token_dim, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU(),
            nn.Linear(channels, channels),
        )  # fmt: skip
        self.norm_roi, self.norm_fused, self.norm_time = (nn.LayerNorm(channels) for _ in range(3))
        self.norm1, self.norm2, self.norm_context = (nn.LayerNorm(channels) for _ in range(3))
        self.time_attn = Attention(channels, **size)
        self.attn = Attention(channels, cross_attention_dim=channels, **size)
        self.ff = FeedForward(channels, activation_fn="geglu")
        self.alpha_attn, self.alpha_dense = (
            nn.Parameter(torch.zeros(1)),
            nn.Parameter(torch.zeros(1)),
        )
        self.carrying = carrying
        if carrying:
            self.norm_own, self.norm_carried = nn.LayerNorm(channels), nn.LayerNorm(channels)
            self.mlp = nn.Sequential(
                nn.Linear(2 * channels + 4, channels), nn.SiLU(), nn.Linear(channels, channels)
            )
            self.alpha_carry = nn.Parameter(torch.zeros(1))

    def forward(self, x, control, height, width, points):
        """x (b f, h w, c) -> the same. control: see BoxAdapter.tokens; points (h w, 2): where each visual token is."""
        tokens, boxes, valid, hard, f = control
        if self.carrying:
            clips = [rearrange(y, "(b f) ... -> b f ...", f=f) for y in (x, boxes, valid, hard)]
            carried, place = carry_features(clips[0][:, 0], *clips[1:], points, height, width)
            parts = self.norm_own(clips[0]), self.norm_carried(carried), place
            moved = self.mlp(torch.cat([part.to(x.dtype) for part in parts], -1))
            x = x + self.alpha_carry[0].tanh() * rearrange(moved, "b f p c -> (b f) p c")
        valid = valid[..., None].to(x.dtype)
        appearance = valid * pool_boxes(x, boxes, height, width) + (1 - valid) * self.null
        instances = self.norm_fused(
            self.fuse(torch.cat([self.norm_roi(appearance).to(tokens.dtype), tokens], -1))
        )
        b, n, c = instances.shape
        frames = get_timestep_embedding(torch.arange(f, device=x.device), c).to(instances.dtype)
        instances = rearrange(instances, "(b f) n c -> (b n) f c", f=f) + frames
        instances = instances + self.time_attn(self.norm_time(instances))
        instances = rearrange(instances, "(b n) f c -> (b f) n c", n=n)
        instances = self.norm_context(
            torch.cat([instances, self.outside.expand(b, 1, c).to(instances.dtype)], 1)
        )
        x = x + self.alpha_attn[0].tanh() * self.attn(
            self.norm1(x), instances, attention_mask=self.inside(boxes, valid, points)
        )
        return x + self.alpha_dense[0].tanh() * self.ff(self.norm2(x))

    def inside(self, boxes, valid, points):
        """Bias (b heads, h w, n + 1) of the attention, from the distances to the box's sides, positive inside; 0 for empty
        slots and for the token of being in none. valid (b, n, 1)."""
        x, y = points.to(boxes.dtype)[:, None].unbind(-1)
        x0, y0, x1, y1 = boxes[:, None].unbind(-1)
        sides = torch.stack([x - x0, y - y0, x1 - x, y1 - y], -1)
        bias = self.bias((sides * SHARPNESS).tanh().to(self.null.dtype)) * valid[:, None]
        bias = torch.cat([bias, torch.zeros_like(bias[:, :, :1])], 2)
        return rearrange(bias, "b p n heads -> (b heads) p n")


class GatedAttention(GatedSelfAttentionDense):
    """diffusers', with gates that are kept in one dimension, as FSDP2 needs them, and used as scalars: of anything more, in
    float32, half precision would become float32."""

    def __init__(self, *size):
        super().__init__(*size)
        self.computes = False
        for name in ("alpha_attn", "alpha_dense"):
            self._parameters[name] = nn.Parameter(torch.zeros(1))

    def forward(self, x, objs):
        self.computes = True
        try:
            return super().forward(x, objs)
        finally:
            self.computes = False

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value[0] if name.startswith("alpha_") and self.computes else value


class BoxLayer(nn.Module):
    """What one spatial block gains. Computes in its layers' dtype outside autocast, and answers in that of x.

    Neither attention knows positions, and a box is a position: visual tokens are told theirs by the same Fourier features
    as the boxes' corners, inside the new layers only."""

    def __init__(self, channels, token_dim, heads, enhancer):
        super().__init__()
        self.fuser = GatedAttention(channels, token_dim, heads, channels // heads)
        nn.init.zeros_(self.fuser.linear.bias)
        self.place = nn.Linear(2 * 2 * FREQUENCIES, channels)
        self.injector = (
            InstanceEnhancer(channels, token_dim, heads, enhancer == "carry")
            if enhancer != "none"
            else None
        )
        self.size = None  # (h, w) of the block's features, known when they come

    def forward(self, x, control):
        h, w = self.size
        y, x_ = ((torch.arange(side, device=x.device) + 0.5) / side for side in (h, w))
        points = torch.stack(torch.meshgrid(x_, y, indexing="xy"), -1).flatten(0, 1)
        own = self.place.weight.dtype
        place = self.place(fourier_features(points).to(own))
        out = x if torch.is_autocast_enabled(x.device.type) else x.to(place.dtype)
        placed = out + place
        out = out + (self.fuser(placed, control[0]) - placed)  # exactly 0 while the gates are shut
        if self.injector:
            out = self.injector(out, control, h, w, points)
        return out.to(x.dtype)


class BoxAdapter(nn.Module):
    """Encoder and layers for one UNet, which stays as it is: the adapter hangs on by hooks and is none of its children.

    blocks: {path of a spatial transformer block: (channels, heads)}; slots: objects a clip may have; enhancer, in the
    decoder: TrackDiffusion's Instance Enhancer that also carries frame 0's features ("carry"), that does not ("tokens"), or
    "none". `set` decides which boxes hold, until the next `set`: backward under gradient checkpointing runs the blocks again
    and must find the same ones.
    """

    def __init__(self, blocks, token_dim, slots=8, enhancer="carry"):
        super().__init__()
        self.config = {
            "blocks": blocks,
            "token_dim": token_dim,
            "slots": slots,
            "enhancer": enhancer,
        }
        self.position_net = BoxEncoder(token_dim)
        self.layers = nn.ModuleDict(
            {
                path.replace(".", "/"): BoxLayer(
                    channels, token_dim, heads, enhancer if path.startswith("up_blocks") else "none"
                )
                for path, (channels, heads) in blocks.items()
            }
        )
        self.control = self.current = self.parts = None
        self.replaced = {}  # {name: value before} of the UNet's parameters that were trained with it and came along
        self.enabled, self.box_guidance_scale, self.hooks, self.unet = True, 1.0, [], []

    # ------------------------------------------------------------------------------------------------ attach, detach

    def attach(self, unet):
        """Hang the layers on `unet`; its parameters, state_dict and LoRA targets stay those of the stock model."""
        check_box_blocks(self.config["blocks"], unet, "the adapter")
        self.detach()
        self.unet.append(unet)  # in a list: not a child
        self.hooks = [
            unet.register_forward_pre_hook(self.before_unet, with_kwargs=True),
            unet.register_forward_hook(self.after_unet),
        ]
        for key, layer in self.layers.items():
            path = key.replace("/", ".")
            block, transformer = (
                unet.get_submodule(path),
                unet.get_submodule(path.rsplit(".", 2)[0]),
            )
            object.__setattr__(
                block, "fuser", layer
            )  # not registered; diffusers' GLIGEN branch looks for this name
            self.hooks += [
                block.register_forward_pre_hook(self.before_block, with_kwargs=True),
                transformer.register_forward_pre_hook(
                    lambda m, args, layer=layer: note_size(layer, args[0])
                ),
            ]
        return self

    def detach(self):
        """Leave the UNet as it was."""
        for hook in self.hooks:
            hook.remove()
        for unet in self.unet:
            for path in self.config["blocks"]:
                unet.get_submodule(path).__dict__.pop("fuser", None)
            for name, value in self.replaced.items():
                unet.get_parameter(name).data.copy_(value)
        self.hooks, self.unet, self.replaced = [], [], {}

    # --------------------------------------------------------------------------------------------------------- boxes

    def set(self, tracklets=None, **cond):
        """The boxes that hold from here on: a Tracklets (one clip, one video of it), or batched tensors boxes
        (b, f, n, 4), valid and hard (b, f, n), colors (b, n, 3). None: no boxes, the stock UNet."""
        if tracklets is not None:
            slots = self.config["slots"]
            own = tracklets if len(tracklets.ids) == slots else tracklets.pad(slots)
            cond = {k: torch.from_numpy(v)[None] for k, v in own.cond().items()}
        self.control = cond or None

    def scheduled_sampling(self, tau, steps):
        """A pipeline's callback_on_step_end that lets the boxes hold for the first tau of its steps, and the stock UNet
        for the rest (GLIGEN, Sec. 4: scheduled sampling)."""
        self.enabled = tau > 0

        def callback(pipe, i, t, tensors):
            self.enabled = (
                i + 1
            ) % steps < tau * steps  # at the last step: ready for the next clip
            return tensors

        return callback

    def tokens(self, cond, copies, f):
        """What blocks are handed: tokens (b f, n, d), boxes (b f, n, 4), valid and hard (b f, n), f. `copies`: for each part of
        the batch, whether it has the boxes (1) or none (0)."""
        if cond["boxes"].shape[1] != f:
            raise ValueError(
                f"boxes of {cond['boxes'].shape[1]} frames, but the clip has {f}: cut them with window()"
            )
        device = self.position_net.null.device
        cond = {
            k: torch.cat([v.to(device) * (copy if k == "valid" else 1) for copy in copies])
            for k, v in cond.items()
        }
        tokens = self.position_net(**cond)
        flat = (
            rearrange(x, "b f ... -> (b f) ...")
            for x in (tokens, *map(cond.get, ("boxes", "valid", "hard")))
        )
        return (*flat, f)

    # --------------------------------------------------------------------------------------------------------- hooks

    def before_unet(self, unet, args, kwargs):
        """Encode the boxes once a forward. A batch of twice as many clips is the pipeline's [unconditional,
        conditional]: the first half has none. With a box guidance scale, the conditional part runs once more without.
        """
        self.current = self.parts = None
        if self.control is None or not self.enabled:
            return None
        sample = args[0] if args else kwargs["sample"]
        if (
            self.position_net.null.device != sample.device
        ):  # the pipeline went to a GPU after the adapter was loaded
            self.to(sample.device)
        clips, b = len(sample), len(self.control["boxes"])
        if clips not in (b, 2 * b):
            raise ValueError(
                f"boxes of {b} clip(s) do not fit a batch of {clips}; it must be {b}, or {2 * b} under guidance"
            )
        copies = [0, 1] if clips == 2 * b else [1]
        if self.box_guidance_scale != 1:
            self.parts = copies = [*copies[:-1], 0, 1]

            def again(x):
                return (
                    torch.cat([x, x[-b:]])
                    if torch.is_tensor(x) and x.ndim and len(x) == clips
                    else x
                )

            args, kwargs = tuple(map(again, args)), {k: again(v) for k, v in kwargs.items()}
        self.current = self.tokens(self.control, copies, sample.shape[1])
        return args, kwargs

    def after_unet(self, unet, args, output):
        """e + s (e_boxes - e) in place of e_boxes, where a box guidance scale s made `before_unet` ask for both."""
        if not self.parts:
            return None
        sample = output[0]
        *rest, plain, boxed = sample.chunk(len(self.parts))
        sample = torch.cat([*rest, plain + self.box_guidance_scale * (boxed - plain)])
        return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)

    def before_block(self, block, args, kwargs):
        if self.current is None:
            return None
        return args, {**kwargs, "cross_attention_kwargs": {"gligen": {"objs": self.current}}}


def note_size(layer, hidden_states):
    layer.size = tuple(hidden_states.shape[-2:])


class ControlledUNet(nn.Module):
    """UNet and adapter as one module, for DDP and checkpoints; boxes are keyword arguments."""

    def __init__(self, unet, adapter):
        super().__init__()
        self.unet, self.adapter = unet, adapter

    def forward(self, *args, **cond):
        self.adapter.set(**cond)
        return self.unet(*args)


# ------------------------------------------------------------------------------------------------ make, save, load


def spatial_blocks(unet):
    """{path: (channels, heads)} of the spatial transformer blocks; 16 in SVD."""
    return {
        path: (block.norm1.normalized_shape[0], block.attn1.heads)
        for path, block in unet.named_modules()
        if re.search(r"attentions\.\d+\.transformer_blocks\.\d+$", path)
    }


def check_box_blocks(blocks, unet, source):
    """Raise where `blocks` are not the UNet's."""
    own = spatial_blocks(unet)
    for path in sorted(blocks.keys() | own.keys()):
        has, needs = (own.get(path), tuple(blocks[path]) if path in blocks else None)
        if has != needs:
            raise ValueError(
                f"{source}: is for another UNet; {path} has (channels, heads) {has} here and {needs} there"
            )


def new_box_control(unet, slots=8, token_dim=None, enhancer="carry", seed=0):
    """A fresh adapter, attached: the output is bit for bit that of the UNet. token_dim: by default that of CLIP."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = BoxAdapter(
            spatial_blocks(unet), token_dim or unet.config.cross_attention_dim, slots, enhancer
        )
    return adapter.attach(unet)


def public_name(name):
    """layers.up_blocks/1/..., as a ModuleDict must name it -> up_blocks.1..., as GLIGEN and TrackDiffusion do."""
    return name.removeprefix("layers.").replace("/", ".")


def save_box_control(adapter, folder, unet_parameters=None):
    """Write `folder`/tracklet_weights.safetensors: the adapter, its configuration, and UNet parameters trained with it
    ({name: tensor}, under the prefix `unet.`)."""
    # not state_dict, which under FSDP2 gives each process its part
    tensors = {public_name(k): v for k, v in adapter.named_parameters()}
    tensors |= {f"unet.{k}": v for k, v in (unet_parameters or {}).items()}
    write_box_weights(
        tensors, {"format": "pt", "box_adapter": json.dumps(adapter.config)}, folder, torch.float32
    )


def write_box_weights(tensors, metadata, folder, dtype):
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}
    save_file(tensors, Path(folder, BOX_CONTROL_FILE), metadata)


def read_box_weights(file):
    """(metadata, {name: tensor} in float32) of weights of box control, a file or its folder."""
    file = Path(file, BOX_CONTROL_FILE) if Path(file).is_dir() else Path(file)
    if not file.is_file():
        raise ValueError(f"--tracklet_weights {file}: no such file")
    try:
        with safe_open(file, "pt") as f:
            metadata = f.metadata() or {}
            tensors = {key: torch.atleast_1d(f.get_tensor(key).float()) for key in f.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"--tracklet_weights {file}: damaged or not safetensors ({error})"
        ) from error
    if "box_adapter" not in metadata:
        raise ValueError(
            f"--tracklet_weights {file}: not weights of box control (no box_adapter in its metadata)"
        )
    return metadata, tensors


def load_box_control(unet, file):
    """The adapter in `file` (or its folder), attached to `unet`, whose own trained parameters it brings along."""
    metadata, tensors = read_box_weights(file)
    config = json.loads(metadata["box_adapter"])
    config["blocks"] = {path: tuple(size) for path, size in config["blocks"].items()}
    check_box_blocks(config["blocks"], unet, f"--tracklet_weights {file}")
    adapter = BoxAdapter(**config)
    own = {public_name(name): tensor for name, tensor in adapter.state_dict(keep_vars=True).items()}
    own |= {f"unet.{name}": p for name, p in unet.named_parameters() if f"unet.{name}" in tensors}
    wrong = [
        k
        for k in own.keys() | tensors.keys()
        if k not in own or k not in tensors or own[k].shape != tensors[k].shape
    ]
    if wrong:
        raise ValueError(
            f"--tracklet_weights {file}: {len(wrong)} tensors are missing, unknown or of another shape: {sorted(wrong)[:3]}"
        )
    adapter.to(unet.device, unet.dtype).attach(unet)
    own |= {
        public_name(name): tensor for name, tensor in adapter.state_dict(keep_vars=True).items()
    }
    for name, tensor in tensors.items():
        if name.startswith("unet."):
            adapter.replaced[name.removeprefix("unet.")] = own[name].detach().cpu().clone()
        own[name].data.copy_(tensor)
    return adapter


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write weights of box control in half precision, to share them."
    )
    parser.add_argument("tracklet_weights", help="tracklet_weights.safetensors, or its folder")
    parser.add_argument("--output_dir", required=True, help="where the halved file goes")
    args = parser.parse_args()
    metadata, tensors = read_box_weights(args.tracklet_weights)
    write_box_weights(tensors, metadata, args.output_dir, torch.float16)
