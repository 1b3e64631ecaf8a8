"""`deepseek plan scaling`: what the model says about often quoted scaling figures."""

from __future__ import annotations


def plan_scaling(*curves: str, cluster: str = "dgx-a100", json: bool = False) -> None:
    """Print scaling curves with their assumptions: what the planner and the communication model say.

    CURVES are weak-scaling, weak-scaling-1750b, data-parallel-only, bert-large and hierarchical-all-reduce; without
    one, all are printed.

    Example: deepseek plan scaling weak-scaling --cluster dgx-h100

    Parameters
    ----------
    curves
        Names of curves.
    cluster
        Box or accelerator; the curves set the number of boxes.
    json
        Print JSON, one line a curve.
    """
    from deepseek.cli.screen.plans import print_json, show_curve
    from deepseek.planning.naming import find_accelerator
    from deepseek.planning.scaling import CURVES, build_curve, check_curve

    for name in curves:
        check_curve(name)
    accelerator = find_accelerator(cluster).name
    for name in curves or CURVES:
        curve = build_curve(name, accelerator=accelerator)
        if json:
            print_json(curve.to_dict())
        else:
            show_curve(curve)
