# ruff: noqa: SIM108 - the statements are the subject
"""Rewritten counterparts: lines that stay, source to read, and plain Python where nothing is traced."""

import inspect

import torch

from deepseek.compiler.jit.rewriting.counterparts import make_counterpart, rewrite, show


def test_every_generated_line_is_a_line_of_the_user(tmp_path):
    def f(x, n):
        total = 0.0
        for i in range(n):
            if x[i] > 0:
                continue
            total = total + x[i]
        return total if total < 3 else None

    lines, first = inspect.getsourcelines(f)
    make_counterpart(f)
    code = f.__ds__.function.__code__
    stack, seen = [code], set()
    while stack:
        each = stack.pop()
        stack += [inner for inner in each.co_consts if hasattr(inner, "co_code")]
        seen |= {line for _, _, line in each.co_lines() if line is not None}
        assert each.co_filename == __file__
    assert seen <= set(range(first, first + len(lines)))


def test_rewritten_code_can_be_read():
    def f(x):
        if x.sum() > 0:
            y = x
        else:
            y = -x
        return y

    assert "_ds0.cond(" in show(f)
    assert rewrite(f)(torch.tensor([-1.0])) == 1


def test_eager_use_of_rewritten_code_is_plain_python():
    seen = []

    def f(x):
        for value in x:
            if value > 1:
                seen.append(value.item())
        return len(seen)

    assert rewrite(f)(torch.tensor([0.0, 2.0, 3.0])) == 2
    assert seen == [2.0, 3.0]
