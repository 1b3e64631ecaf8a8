"""What the tests of MobileNetV3 share."""

from deepseek.models.mobilenet_v3.model import (
    MobileNetV3Config,
)

SMALL = MobileNetV3Config(variant="small", width_multiple=0.25, num_classes=5)
# Howard et al. 2019, tables 1 and 2: kernel, widened, out, SE, NL, stride. A new line here is a new width.
LARGE_TABLE = """
3 16 16 - RE 1
3 64 24 - RE 2 | 3 72 24 - RE 1
5 72 40 SE RE 2 | 5 120 40 SE RE 1 | 5 120 40 SE RE 1
3 240 80 - HS 2 | 3 200 80 - HS 1 | 3 184 80 - HS 1 | 3 184 80 - HS 1
3 480 112 SE HS 1 | 3 672 112 SE HS 1
5 672 160 SE HS 2 | 5 960 160 SE HS 1 | 5 960 160 SE HS 1
"""
SMALL_TABLE = """
3 16 16 SE RE 2
3 72 24 - RE 2 | 3 88 24 - RE 1
5 96 40 SE HS 2 | 5 240 40 SE HS 1 | 5 240 40 SE HS 1
5 120 48 SE HS 1 | 5 144 48 SE HS 1
5 288 96 SE HS 2 | 5 576 96 SE HS 1 | 5 576 96 SE HS 1
"""


def act(graph, x, name):
    return graph.add("Relu", x) if name == "RE" else graph.hardswish(x)


def squeeze(graph, x, reduce, expand):
    mean = graph.add("GlobalAveragePool", x)
    inner = graph.add("Relu", graph.conv(mean, reduce))
    return graph.add("Mul", x, graph.hard_sigmoid(graph.conv(inner, expand)))


def torchvision_block(graph, x, prefix, has_widening, num_inner, has_squeeze, nonlinearity, stride, eps):
    position = 0
    if has_widening:
        x = act(graph, graph.norm(graph.conv(x, f"{prefix}.0.0"), f"{prefix}.0.1", eps), nonlinearity)
        position += 1
    name = f"{prefix}.{position}"
    x = graph.norm(graph.conv(x, f"{name}.0", stride=stride, groups=num_inner), f"{name}.1", eps)
    x = act(graph, x, nonlinearity)
    if has_squeeze:
        position += 1
        x = squeeze(graph, x, f"{prefix}.{position}.fc1", f"{prefix}.{position}.fc2")
    position += 1
    return graph.norm(graph.conv(x, f"{prefix}.{position}.0"), f"{prefix}.{position}.1", eps)


def timm_block(graph, x, prefix, has_widening, num_inner, has_squeeze, nonlinearity, stride, eps):
    if has_widening:
        x = act(graph, graph.norm(graph.conv(x, f"{prefix}.conv_pw"), f"{prefix}.bn1", eps), nonlinearity)
    first, last, project = ("bn2", "bn3", "conv_pwl") if has_widening else ("bn1", "bn2", "conv_pw")
    x = graph.norm(graph.conv(x, f"{prefix}.conv_dw", stride=stride, groups=num_inner), f"{prefix}.{first}", eps)
    x = act(graph, x, nonlinearity)
    if has_squeeze:
        x = squeeze(graph, x, f"{prefix}.se.conv_reduce", f"{prefix}.se.conv_expand")
    return graph.norm(graph.conv(x, f"{prefix}.{project}"), f"{prefix}.{last}", eps)


def scaled(number, width):
    """A multiple of 8 near `number` times `width`, by trying all."""
    exact = number * width
    candidates = range(8, 10_000, 8)
    nearest = min(candidates, key=lambda each: (abs(each - exact), -each))
    return nearest if nearest >= 0.9 * exact else nearest + 8


def write_blocks(graph, x, table, width, eps, naming):
    """The inverted residuals of a table; `naming` is torchvision or timm."""
    num_in, feature = scaled(16, width), 0
    for stage, line in enumerate(table.strip().splitlines()):
        for block, cells in enumerate(line.split("|")):
            kernel, inner, out, se, nonlinearity, stride = cells.split()
            num_inner, num_out, feature = scaled(int(inner), width), scaled(int(out), width), feature + 1
            write, prefix = (
                (torchvision_block, f"features.{feature}.block")
                if naming == "torchvision"
                else (timm_block, f"blocks.{stage}.{block}")
            )
            details = num_inner != num_in, num_inner, se == "SE", nonlinearity, int(stride), eps
            y = write(graph, x, prefix, *details)
            depthwise = f"{prefix}.{'conv_dw' if naming == 'timm' else f'{int(num_inner != num_in)}.0'}.weight"
            assert graph.weights[depthwise].shape == (num_inner, 1, int(kernel), int(kernel))
            x = graph.add("Add", x, y) if int(stride) == 1 and num_in == num_out else y
            num_in = num_out
    return x, feature + 1, stage + 1
