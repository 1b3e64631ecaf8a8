"""`deepseek plan scaling`: what the model says about often quoted scaling figures, and about a model of one's own."""

from __future__ import annotations

from pathlib import Path

from deepseek.core.errors import ConfigError


def plan_scaling(
    *curves: str,
    cluster: str = "dgx-a100",
    nodes: str = "1,2,4,8,16,32,64,128",
    global_batch: int | None = None,
    picture: Path | None = None,
    json: bool = False,
) -> None:
    """Print scaling curves with their assumptions: what the planner and the communication model say.

    CURVES are weak-scaling, weak-scaling-1750b, data-parallel-only, bert-large and hierarchical-all-reduce; without
    one, all are printed. A model (Llama3-8B, a model folder) is scaled itself: the best plan at every number of nodes.

    Example: deepseek plan scaling Llama3-8B --cluster dgx-h100 --nodes 1,2,4,8 --picture scaling.png

    Parameters
    ----------
    curves
        Names of curves, or models.
    cluster
        Box or accelerator; the curves set the number of boxes.
    nodes
        Numbers of boxes for a model, with commas between them.
    global_batch
        Sequences of one step of a model, the same on every cluster; without it two a device.
    picture
        Plot the efficiency of the models into this .png file.
    json
        Print JSON, one line a curve.
    """
    from deepseek.cli.screen.plans import print_json, show_curve
    from deepseek.cli.screen.plots import plot_scaling
    from deepseek.core.names import explain_unknown
    from deepseek.planning.models.model_shape import load_model_shapes
    from deepseek.planning.naming import find_accelerator, find_model, is_model
    from deepseek.planning.scaling import CURVES, build_curve, scale_model

    models = [name for name in curves if name not in CURVES]
    for name in models:
        if not is_model(name):
            raise ConfigError(explain_unknown("scaling curve or model", name, {*CURVES, *load_model_shapes()}))
    if not models and (picture is not None or global_batch is not None):
        raise ConfigError("--picture and --global-batch are for models; name one, for example Llama3-8B")
    if picture is not None and picture.suffix != ".png":
        raise ConfigError(f"{picture} is no .png file; choose that ending")
    accelerator = find_accelerator(cluster).name
    counts = _read_counts(nodes)
    own = []
    for name in curves or CURVES:
        if name in models:
            curve = scale_model(find_model(name), accelerator=accelerator, nodes=counts, global_batch=global_batch)
            own.append(curve)
        else:
            curve = build_curve(name, accelerator=accelerator)
        if json:
            print_json(curve.to_dict())
        else:
            show_curve(curve)
    if picture is not None:
        plot_scaling(own, picture)


def _read_counts(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--nodes {text} are no numbers of boxes; write for example 1,2,4,8")
    return tuple(map(int, parts))
