"""How deep in a model each parameter is, for learning rates that grow with the depth.

    embeddings, stem    0
    the n-th block      n
    final norm, head    number of blocks + 1

A block is a module with parts of its own in a list (`ModuleList`, `Sequential`) that is in no other block: the layers
of decoders and encoders, the residual blocks of a ResNet over all its stages. Parameters between two blocks count to
the one before. Source: Clark et al. 2020, "ELECTRA", appendix B; Bao et al. 2021, "BEiT", for vision.
"""

from __future__ import annotations

from torch import nn

from deepseek.core.errors import ConfigError


def find_depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """Return the depth of each parameter by name, and the largest depth there is.

    Raises `ConfigError` for a model without blocks.

    >>> stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    >>> parts = {"embed": nn.Embedding(4, 8), "stack": stack, "head": nn.Linear(8, 4)}
    >>> depths, last = find_depths(nn.ModuleDict(parts))
    >>> [depths[name] for name in ("embed.weight", "stack.layers.0.norm1.bias", "stack.layers.1.norm1.bias")], last
    ([0, 1, 2], 3)
    """
    blocks = find_all_blocks(model)
    if not blocks:
        raise ConfigError(
            f"layer_decay lowers learning rates block by block and {type(model).__name__} has no list of blocks; "
            "set optimizer.layer_decay to 1"
        )
    depths: dict[str, int] = {}
    passed = 0
    for name, _ in model.named_parameters():
        inside = next((depth for depth, block in enumerate(blocks, start=1) if name.startswith(f"{block}.")), None)
        passed = max(passed, inside or 0)
        depths[name] = inside or (len(blocks) + 1 if passed == len(blocks) else passed)
    return depths, len(blocks) + 1


def find_all_blocks(model: nn.Module) -> list[str]:
    """List the paths of the blocks, in the order in which they are defined."""
    found: list[str] = []
    for path, module in model.named_modules():
        is_inside = any(path == block or path.startswith(f"{block}.") for block in found)
        if is_inside or not path or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        found += [f"{path}.{name}" for name, child in module.named_children() if any(True for _ in child.children())]
    return found
