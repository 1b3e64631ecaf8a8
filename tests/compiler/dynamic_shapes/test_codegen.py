"""Kernels of a graph go into one library, and torch is left as it was."""

import re
import warnings

import pytest
import torch

from deepseek.compiler.dynamic_shapes.codegen import merge_kernels, start_probing
from deepseek.compiler.dynamic_shapes.dynamic_graph import DynamicGraph
from tests.compiler.dynamic_shapes.encoders import SIZE, Block, Encoder, build_pair


@pytest.mark.slow
def test_24_layers_are_generated_once_and_right(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, plain = build_pair(Encoder(num_layers=24).eval(), backend="inductor")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in (5, 9, 12):
            tokens = torch.randint(1, 50, (3, length))
            mask = torch.ones(3, length, dtype=torch.bool)
            torch.testing.assert_close(model(tokens, mask), plain(tokens, mask), atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"] == 1
    assert isinstance(model.forward, DynamicGraph)
    assert len(model.explain().compilations) == 1


def test_kernels_in_one_library_keep_their_names_and_arguments():
    source = 'extern "C"  void  kernel(const float* x, int64_t n)\n{ /* calls kernel_group(x) */ }\n'
    merged, call = merge_kernels([(["const float*", "int64_t"], source), (["float*"], source)])
    assert merged.count("void  kernel_0(const float* x") == merged.count("void  kernel_1(const float* x") == 1
    assert merged.count("kernel_group(x)") == 2
    assert "kernel_0(parse_arg<float*>(args, 1), parse_arg<int64_t>(args, 2))" in call
    assert "kernel_1(parse_arg<float*>(args, 1))" in call


@pytest.mark.slow
def test_the_kernels_of_a_graph_are_compiled_together_and_torch_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    start_probing().join()
    before = torch._inductor.async_compile.AsyncCompile
    model, plain = build_pair(Block().train(), backend="inductor")
    for length in (7, 7, 12):
        x, mask = torch.randn(3, length, SIZE), torch.ones(3, 1, 1, length, dtype=torch.bool)
        answers = []
        for each in (model, plain):
            each.zero_grad()
            answers.append(each(x, mask))
            answers[-1].square().mean().backward()
        torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-4)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
    sources = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.main.cpp")]
    num_kernels = sum(len(re.findall(r'extern "C"\s+void\s+kernel_\d+\(', source)) for source in sources)
    assert num_kernels > len(sources) > 0
    assert torch._inductor.async_compile.AsyncCompile is before
