"""YOLOv7, base and tiny, on one device, under the state-dict names of its authors' repository.

    images -> backbone of ELAN blocks, strides 2 to 32 -> SPPCSPC -> up and down again beside shortcuts
           -> three maps (strides 8, 16, 32) -> RepConv each -> head -> boxes

A network is a list of rows, each a layer and the rows it reads. The position of a row is its number in the state dict:
`model.51.cv1.conv.weight` is the first convolution of the SPPCSPC. The rows repeat four patterns, a function each:

    elan     two 1x1 side by side, one of them followed by four 3x3; four of the six are joined and mixed by a 1x1
    gather   the same for the head: narrower 3x3, and all six are joined
    shrink   half the size in two ways, pooled and strided, joined
    grow     twice the size, joined with an older map

The tiny network has patterns of its own: `lean_elan` with two 3x3 and all four maps joined, the pooling of the SPPCSPC
as rows (`lean_spp`), a strided 3x3 alone for `shrink`, and leaky ReLU instead of SiLU.

Batch norms, the branches of a RepConv and the head's learned offset and factor (Wang et al. 2021, "You Only Learn One
Representation") are of use in training; `reparameterization.fold_` moves them into the convolutions.

Shapes: B images, C channels, H x W image, A anchors a level, K classes, N = A * (cells of all levels) boxes; a box is
centre x, centre y, width, height in pixels of the input, objectness, and K class probabilities.
Source: Wang, Bochkovskiy and Liao 2022, "YOLOv7", figures 2 and 4 and section 4.2; the rows of the tiny network, its
anchors and its activation are those of the authors' repository (cfg/training/yolov7-tiny.yaml).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.models.class_labels import check_labels

STRIDES = (8, 16, 32)
NUM_BOX = 5  # centre, size, objectness
POOL_KERNELS = (5, 9, 13)
CHANNEL_STEP = 8
NEGATIVE_SLOPE = 0.1
Anchors = tuple[tuple[tuple[float, float], ...], ...]
COCO_ANCHORS: Anchors = (
    ((12.0, 16.0), (19.0, 36.0), (40.0, 28.0)),
    ((36.0, 75.0), (76.0, 55.0), (72.0, 146.0)),
    ((142.0, 110.0), (192.0, 243.0), (459.0, 401.0)),
)
TINY_ANCHORS: Anchors = (
    ((9.0, 6.0), (13.0, 16.0), (29.0, 11.0)),
    ((29.0, 28.0), (66.0, 26.0), (51.0, 62.0)),
    ((115.0, 54.0), (134.0, 119.0), (308.0, 147.0)),
)


class YOLOv7Config(Config):
    """Shape of a YOLOv7."""

    variant: Literal["base", "tiny"] = "base"
    """Which network of the paper: `tiny` has a sixth of the parameters of `base`."""
    image_size: int = Field(default=640, ge=32, multiple_of=32)
    """Height and width of an image in training, in pixels; others work if 32 divides them."""
    num_classes: int = Field(default=80, ge=1)
    """Kinds of objects."""
    labels: tuple[str, ...] = ()
    """Names of the kinds in their order; none numbers them, and 80 unnamed kinds are those of COCO."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of an image: 3 for colour, 1 for grey."""
    width_multiple: float = Field(default=1.0, gt=0)
    """Factor on the channels of every layer, which are then rounded up to multiples of 8."""
    anchors: Anchors = COCO_ANCHORS
    """(width, height) of typical boxes in pixels, for strides 8, 16 and 32; as many for each."""
    norm_eps: float = Field(default=1e-3, gt=0)
    """Added to the variance before the root."""
    norm_momentum: float = Field(default=0.03, gt=0, le=1)
    """Share of a batch in the running statistics."""
    is_folded: bool = False
    """Whether it is built as `fold_` leaves it, for weights that were folded before they were stored."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        counts = [len(level) for level in self.anchors]
        if len(counts) != len(STRIDES) or len(set(counts)) != 1 or not counts[0]:
            raise ConfigError(f"anchors has {counts} boxes a level; give each of the strides {STRIDES} as many")
        if min(size for level in self.anchors for anchor in level for size in anchor) <= 0:
            raise ConfigError(f"anchors={self.anchors} has a box without area; give sizes in pixels above 0")
        check_labels(self.labels, self.num_classes)
        return self

    @property
    def num_anchors(self) -> int:
        """Anchors a level."""
        return len(self.anchors[0])

    @property
    def num_outputs(self) -> int:
        """Numbers a box."""
        return NUM_BOX + self.num_classes

    def scale(self, num_channels: int) -> int:
        """Scale a number of channels by the width."""
        return math.ceil(num_channels * self.width_multiple / CHANNEL_STEP) * CHANNEL_STEP


# ---- rows


class LayerSpec(NamedTuple):
    """One layer and what it reads: rows before it as -1, -2, ..., or rows by number."""

    kind: Literal["conv", "pool", "surround", "upsample", "concat", "sppcspc", "repconv"]
    num_out: int = 0
    """Channels; layers that only move values have as many as they read."""
    kernel: int = 1
    stride: int = 1
    sources: tuple[int, ...] = (-1,)


def elan(num_inner: int, num_out: int) -> list[LayerSpec]:
    """Mix what passed through zero, two and four 3x3 convolutions, and a shortcut."""
    return [
        LayerSpec("conv", num_inner),
        LayerSpec("conv", num_inner, sources=(-2,)),
        *(LayerSpec("conv", num_inner, kernel=3) for _ in range(4)),
        LayerSpec("concat", sources=(-1, -3, -5, -6)),
        LayerSpec("conv", num_out),
    ]


def gather(num_out: int) -> list[LayerSpec]:
    """Mix what passed through zero to four 3x3 convolutions of half the width, and a shortcut."""
    return [
        LayerSpec("conv", num_out),
        LayerSpec("conv", num_out, sources=(-2,)),
        *(LayerSpec("conv", num_out // 2, kernel=3) for _ in range(4)),
        LayerSpec("concat", sources=(-1, -2, -3, -4, -5, -6)),
        LayerSpec("conv", num_out),
    ]


def shrink(num_half: int, *shortcut: int) -> list[LayerSpec]:
    """Half the size, twice over; in the head, the map of row `shortcut` of that size is joined."""
    return [
        LayerSpec("pool"),
        LayerSpec("conv", num_half),
        LayerSpec("conv", num_half, sources=(-3,)),
        LayerSpec("conv", num_half, kernel=3, stride=2),
        LayerSpec("concat", sources=(-1, -3, *shortcut)),
    ]


def grow(num_half: int, shortcut: int) -> list[LayerSpec]:
    """Twice the size, joined with the map of row `shortcut`."""
    return [
        LayerSpec("conv", num_half),
        LayerSpec("upsample"),
        LayerSpec("conv", num_half, sources=(shortcut,)),
        LayerSpec("concat", sources=(-1, -2)),
    ]


STEM = [LayerSpec("conv", 32, 3), LayerSpec("conv", 64, 3, 2), LayerSpec("conv", 64, 3), LayerSpec("conv", 128, 3, 2)]
BACKBONE = [
    *STEM,
    *elan(64, 256),  # row 11, stride 4
    *shrink(128),
    *elan(128, 512),  # row 24, stride 8
    *shrink(256),
    *elan(256, 1024),  # row 37, stride 16
    *shrink(512),
    *elan(256, 1024),  # row 50, stride 32
]
NECK = [
    LayerSpec("sppcspc", 512),  # row 51
    *grow(256, 37),
    *gather(256),  # row 63, stride 16
    *grow(128, 24),
    *gather(128),  # row 75, stride 8
    *shrink(128, 63),
    *gather(256),  # row 88, stride 16
    *shrink(256, 51),
    *gather(512),  # row 101, stride 32
    LayerSpec("repconv", 256, sources=(75,)),
    LayerSpec("repconv", 512, sources=(88,)),
    LayerSpec("repconv", 1024, sources=(101,)),
]
ROWS = [*BACKBONE, *NECK]


def lean_elan(num_inner: int, num_out: int) -> list[LayerSpec]:
    """Mix what passed through zero, one and two 3x3 convolutions, and a shortcut."""
    return [
        LayerSpec("conv", num_inner),
        LayerSpec("conv", num_inner, sources=(-2,)),
        LayerSpec("conv", num_inner, kernel=3),
        LayerSpec("conv", num_inner, kernel=3),
        LayerSpec("concat", sources=(-1, -2, -3, -4)),
        LayerSpec("conv", num_out),
    ]


def lean_spp(num_out: int) -> list[LayerSpec]:
    """The surroundings of each cell at four sizes, mixed, beside what passes by."""
    pools = [LayerSpec("surround", kernel=kernel, sources=(-1 - number,)) for number, kernel in enumerate(POOL_KERNELS)]
    return [
        LayerSpec("conv", num_out),
        LayerSpec("conv", num_out, sources=(-2,)),
        *pools,
        LayerSpec("concat", sources=(-1, -2, -3, -4)),
        LayerSpec("conv", num_out),
        LayerSpec("concat", sources=(-1, -7)),
        LayerSpec("conv", num_out),
    ]


TINY_ROWS = [
    LayerSpec("conv", 32, 3, 2),
    LayerSpec("conv", 64, 3, 2),
    *lean_elan(32, 64),  # row 7, stride 4
    LayerSpec("pool"),
    *lean_elan(64, 128),  # row 14, stride 8
    LayerSpec("pool"),
    *lean_elan(128, 256),  # row 21, stride 16
    LayerSpec("pool"),
    *lean_elan(256, 512),  # row 28, stride 32
    *lean_spp(256),  # row 37
    *grow(128, 21),
    *lean_elan(64, 128),  # row 47, stride 16
    *grow(64, 14),
    *lean_elan(32, 64),  # row 57, stride 8
    LayerSpec("conv", 128, 3, 2),
    LayerSpec("concat", sources=(-1, 47)),
    *lean_elan(64, 128),  # row 65, stride 16
    LayerSpec("conv", 256, 3, 2),
    LayerSpec("concat", sources=(-1, 37)),
    *lean_elan(128, 256),  # row 73, stride 32
    LayerSpec("conv", 128, 3, sources=(57,)),
    LayerSpec("conv", 256, 3, sources=(65,)),
    LayerSpec("conv", 512, 3, sources=(73,)),
]
ROWS_OF = {"base": ROWS, "tiny": TINY_ROWS}


def find_sources(rows: list[LayerSpec]) -> list[tuple[int, ...]]:
    """Return the rows that each row reads, by number; -1 is the image.

    >>> find_sources(elan(64, 256))[6:]
    [(5, 3, 1, 0), (6,)]
    """
    return [tuple(index + source if source < 0 else source for source in row.sources) for index, row in enumerate(rows)]


def find_last_reads(sources: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the rows that nobody reads after each row: their values may go."""
    last = {read: reader for reader, reads in enumerate(sources) for read in reads}
    return [tuple(read for read, reader in last.items() if reader == index) for index in range(len(sources))]


# ---- layers


def leak(x: Tensor) -> Tensor:
    """Return `x`, with a tenth of what is negative."""
    return F.leaky_relu(x, NEGATIVE_SLOPE)


class ConvNorm(nn.Module):
    """Convolution, batch norm and activation; folded, a convolution with a bias and the activation."""

    def __init__(self, config: YOLOv7Config, num_in: int, num_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride, padding=kernel // 2, bias=config.is_folded)
        self.bn: nn.BatchNorm2d | None = None if config.is_folded else build_norm(config, num_out)
        self.activate: Callable[[Tensor], Tensor] = leak if config.variant == "tiny" else F.silu

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv(x_BCHW)
        return self.activate(y_BCHW if self.bn is None else self.bn(y_BCHW))


class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution and, where sizes allow, the input itself, each normed, added; folded, one 3x3."""

    def __init__(self, config: YOLOv7Config, num_in: int, num_out: int) -> None:
        super().__init__()
        self.rbr_reparam: nn.Conv2d | None = None
        self.rbr_identity: nn.BatchNorm2d | None = None
        self.rbr_dense: nn.Sequential | None = None
        self.rbr_1x1: nn.Sequential | None = None
        if config.is_folded:
            self.rbr_reparam = nn.Conv2d(num_in, num_out, 3, padding=1)
            return
        self.rbr_identity = build_norm(config, num_in) if num_in == num_out else None
        self.rbr_dense = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), build_norm(config, num_out)
        )
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(num_in, num_out, 1, bias=False), build_norm(config, num_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.rbr_dense is None or self.rbr_1x1 is None:
            return F.silu(cast("nn.Conv2d", self.rbr_reparam)(x_BCHW))
        y_BCHW = self.rbr_dense(x_BCHW) + self.rbr_1x1(x_BCHW)
        return F.silu(y_BCHW if self.rbr_identity is None else y_BCHW + self.rbr_identity(x_BCHW))


class SPPCSPC(nn.Module):
    """The surroundings of each cell at four sizes, in one half of the channels; the other half passes by."""

    def __init__(self, config: YOLOv7Config, num_in: int, num_out: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(config, num_in, num_out)
        self.cv2 = ConvNorm(config, num_in, num_out)
        self.cv3 = ConvNorm(config, num_out, num_out, 3)
        self.cv4 = ConvNorm(config, num_out, num_out)
        self.cv5 = ConvNorm(config, num_out * (1 + len(POOL_KERNELS)), num_out)
        self.cv6 = ConvNorm(config, num_out, num_out, 3)
        self.cv7 = ConvNorm(config, 2 * num_out, num_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        near_BCHW = self.cv4(self.cv3(self.cv1(x_BCHW)))
        pooled = [F.max_pool2d(near_BCHW, kernel, 1, padding=kernel // 2) for kernel in POOL_KERNELS]
        far_BCHW = self.cv6(self.cv5(torch.cat([near_BCHW, *pooled], dim=1)))
        y_BCHW: Tensor = self.cv7(torch.cat([far_BCHW, self.cv2(x_BCHW)], dim=1))
        return y_BCHW


class Concat(nn.Module):
    """Several maps side by side in the channels."""

    def forward(self, *maps_BCHW: Tensor) -> Tensor:
        return torch.cat(maps_BCHW, dim=1)


class Implicit(nn.Module):
    """A learned number a channel, around `mean`."""

    def __init__(self, num_channels: int, mean: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(nn.init.normal_(torch.empty(1, num_channels, 1, 1), mean, std=0.02))


class Head(nn.Module):
    """Maps of the three levels to raw boxes, by a 1x1 convolution between a learned offset and a learned factor."""

    anchors: Tensor
    anchor_grid: Tensor

    def __init__(self, config: YOLOv7Config, sizes: list[int]) -> None:
        super().__init__()
        self.num_anchors = config.num_anchors
        num_out = config.num_anchors * config.num_outputs
        num_levels = len(config.anchors)
        self.register_buffer("anchors", torch.empty(num_levels, config.num_anchors, 2))  # in cells
        self.register_buffer("anchor_grid", torch.empty(num_levels, 1, config.num_anchors, 1, 1, 2))  # in pixels
        self.set_anchors_(config.anchors)
        self.m = nn.ModuleList(nn.Conv2d(size, num_out, 1) for size in sizes)
        self.ia = nn.ModuleList(Implicit(size, mean=0.0) for size in sizes)
        self.im = nn.ModuleList(Implicit(num_out, mean=1.0) for _ in sizes)
        self.is_folded = False
        if config.is_folded:
            self.drop_implicit_()

    def forward(self, *maps_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return the raw boxes (B, A, H, W, 5 + K) of each level."""
        raw = (self.predict(level, map_BCHW) for level, map_BCHW in enumerate(maps_BCHW))
        return tuple(level.unflatten(1, (self.num_anchors, -1)).permute(0, 1, 3, 4, 2) for level in raw)

    def predict(self, level: int, x_BCHW: Tensor) -> Tensor:
        """Apply the convolution of one level."""
        if self.is_folded:
            return cast("Tensor", self.m[level](x_BCHW))
        y_BCHW = self.m[level](x_BCHW + cast("Tensor", self.ia[level].implicit))
        return cast("Tensor", y_BCHW * self.im[level].implicit)

    def set_anchors_(self, anchors: Anchors) -> None:
        """Take other anchors of the same number, in pixels."""
        anchors_LA2 = self.anchors.new_tensor(anchors)
        self.anchors.copy_(anchors_LA2 / self.anchors.new_tensor(STRIDES).view(-1, 1, 1))
        self.anchor_grid.copy_(anchors_LA2[:, None, :, None, None])

    def drop_implicit_(self) -> None:
        """Leave the convolutions alone."""
        del self.ia, self.im
        self.is_folded = True


# ---- the network


class YOLOv7(nn.Module):
    """Boxes for images.

    (B, in_channels, H, W) with values in [0, 1] in; (B, N, 5 + num_classes) out, whose numbers are described above. 32
    must divide H and W, or `ConfigError` is raised. `suppression.select` keeps the boxes that count.

    >>> model = YOLOv7(YOLOv7Config(width_multiple=0.125, num_classes=2)).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape  # 3 anchors on 8x8, 4x4 and 2x2 cells
    torch.Size([1, 252, 7])
    """

    def __init__(self, config: YOLOv7Config) -> None:
        super().__init__()
        self.config = config
        rows = ROWS_OF[config.variant]
        self.sources = find_sources(rows)
        heads = tuple(range(len(rows) - len(STRIDES), len(rows)))
        self.last_reads = find_last_reads([*self.sources, heads])
        self.heads = heads
        sizes: list[int] = []
        layers: list[nn.Module] = []
        for row, reads in zip(rows, self.sources, strict=True):
            num_read = [config.in_channels if read < 0 else sizes[read] for read in reads]
            layers.append(build_layer(config, row, num_read))
            sizes.append(config.scale(row.num_out) if row.num_out else sum(num_read))
        self.model = nn.ModuleList([*layers, Head(config, [sizes[head] for head in heads])])
        initialize_(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return decode_levels(self.predict_raw(images_BCHW), self.head.anchor_grid)

    def predict_raw(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return what a loss compares: (B, A, H / stride, W / stride, 5 + K) for each stride, before the sigmoid."""
        height, width = images_BCHW.shape[-2:]
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise ConfigError(
                f"the images are {height}x{width} and {STRIDES[-1]} must divide both; fit them with letterbox"
            )
        values: dict[int, Tensor] = {-1: images_BCHW}
        for index, (layer, reads) in enumerate(zip(self.model, self.sources, strict=False)):
            values[index] = layer(*(values[read] for read in reads))
            for read in self.last_reads[index]:
                del values[read]
        raw: tuple[Tensor, ...] = self.head(*(values[index] for index in self.heads))
        return raw

    @property
    def head(self) -> Head:
        """The last layer."""
        return cast("Head", self.model[-1])


def build_layer(config: YOLOv7Config, row: LayerSpec, num_read: list[int]) -> nn.Module:
    """Build the module of one row, which reads maps of `num_read` channels."""
    num_in, num_out = num_read[0], config.scale(row.num_out)
    layers: dict[str, Callable[[], nn.Module]] = {
        "conv": lambda: ConvNorm(config, num_in, num_out, row.kernel, row.stride),
        "pool": lambda: nn.MaxPool2d(2, 2),
        "surround": lambda: nn.MaxPool2d(row.kernel, 1, padding=row.kernel // 2),
        "upsample": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
        "concat": Concat,
        "sppcspc": lambda: SPPCSPC(config, num_in, num_out),
        "repconv": lambda: RepConv(config, num_in, num_out),
    }
    return layers[row.kind]()


def build_norm(config: YOLOv7Config, num_channels: int) -> nn.BatchNorm2d:
    """Build a batch norm with the constants of the config."""
    return nn.BatchNorm2d(num_channels, eps=config.norm_eps, momentum=config.norm_momentum)


def decode_levels(raw: Sequence[Tensor], anchor_grid_L1A112: Tensor) -> Tensor:
    """Decode what `YOLOv7.predict_raw` returned, with the head's anchors, to the boxes of all levels, (B, N, 5 + K)."""
    levels = zip(raw, anchor_grid_L1A112, STRIDES, strict=True)
    return torch.cat([decode(raw_BAHWO, anchors, stride) for raw_BAHWO, anchors, stride in levels], dim=1)


def decode(raw_BAHWO: Tensor, anchors_1A112: Tensor, stride: int) -> Tensor:
    """Decode boxes (B, A*H*W, 5 + K) of one level: a centre up to one cell beside its own, a size up to four anchors.

    >>> decode(torch.zeros(1, 1, 1, 1, 6), torch.full((1, 1, 1, 1, 2), 30.0), 8).tolist()
    [[[4.0, 4.0, 30.0, 30.0, 0.5, 0.5]]]
    """
    if raw_BAHWO.dtype in (torch.float16, torch.bfloat16):
        raw_BAHWO = raw_BAHWO.float()  # a coordinate in bfloat16 would be two pixels off
    height, width = raw_BAHWO.shape[2:4]
    y_H1 = torch.arange(height, dtype=raw_BAHWO.dtype, device=raw_BAHWO.device).view(-1, 1).expand(height, width)
    x_1W = torch.arange(width, dtype=raw_BAHWO.dtype, device=raw_BAHWO.device).expand(height, width)
    share_BAHWO = raw_BAHWO.sigmoid()
    centre = (share_BAHWO[..., :2] * 2 - 0.5 + torch.stack([x_1W, y_H1], dim=-1)) * stride
    size = (share_BAHWO[..., 2:4] * 2).square() * anchors_1A112
    return torch.cat([centre, size, share_BAHWO[..., 4:]], dim=-1).flatten(1, 3)


def initialize_(model: YOLOv7) -> None:
    """Weights that keep the size of what passes them; the head expects few objects at first.

    Source for the head: Lin et al. 2017, "Focal Loss for Dense Object Detection", section 4.1. An image of training
    size starts with eight objects an anchor and level, and each class with 0.6 of an even share of them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for module, stride in zip(model.head.m, STRIDES, strict=True):
        conv = cast("nn.Conv2d", module)
        nn.init.normal_(conv.weight, std=0.01)
        bias_AO = nn.init.zeros_(cast("Tensor", conv.bias)).detach().view(model.config.num_anchors, -1)
        bias_AO[:, NUM_BOX - 1] = math.log(8 / (model.config.image_size / stride) ** 2)
        bias_AO[:, NUM_BOX:] = math.log(0.6 / max(model.config.num_classes - 0.99, 0.01))
