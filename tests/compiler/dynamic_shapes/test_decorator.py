"""Models for changing shapes against the same models left alone: numbers, gradients, number of compilations."""

import copy
import io
import pickle
import random
import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek.compiler.dynamic_shapes.buckets import Cost
from deepseek.compiler.dynamic_shapes.codegen import merge_kernels, start_probing
from deepseek.compiler.dynamic_shapes.decorator import DynamicGraph, dynamic_graph
from deepseek.compiler.dynamic_shapes.regions import DynamicGraphWarning, find_repeated
from deepseek.core.errors import ConfigError

CUT_OFTEN = Cost(overhead=1.0, token=1.0, pair=0.0)
SIZE = 16


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(SIZE), nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.dropout = dropout

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, SIZE // 2)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x + F.dropout(F.gelu(self.out(attended)), self.dropout, self.training)


class Encoder(nn.Module):
    def __init__(self, num_layers=3, dropout=0.0):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, SIZE), nn.Embedding(64, SIZE)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_layers))

    def forward(self, tokens, mask):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return x


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


def count_graphs():
    """A backend that compiles nothing and remembers each graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def make_batch(generator, num_rows=6, longest=40):
    lengths = [generator.choice([2, 3, 5, 8, 21, longest]) for _ in range(num_rows)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(1, 50, mask.shape) * mask, mask


def twins(module, **options):
    plain = copy.deepcopy(module)
    settings = {"backend": "eager", "cache": False} | options
    return dynamic_graph(module, **settings), plain


# Symbolic lengths


def test_one_compilation_serves_all_lengths_and_batch_sizes():
    backend, graphs = count_graphs()

    @dynamic_graph(backend=backend, cache=False)
    def score(x, y):
        return torch.tanh(x @ y.transpose(1, 2)).sum(dim=(1, 2))

    for rows, length in [(7, 9), (4, 4), (3, 4), (16, 16), (5, 33), (9, 8)]:
        x = torch.randn(rows, length, 5, dtype=torch.float64)
        y = torch.randn(rows, length, 5, dtype=torch.float64)
        torch.testing.assert_close(score(x, y), torch.tanh(torch.einsum("btd,bsd->bts", x, y)).sum((1, 2)))
    assert len(graphs) == 1
    assert score.explain().compilations[0].shapes[0][2] == 5  # a dim that never varied is a number


def test_a_function_that_always_sees_one_shape_is_compiled_for_it():
    backend, graphs = count_graphs()
    double = dynamic_graph(lambda x: 2 * x, backend=backend, cache=False)
    for _ in range(3):
        assert double(torch.ones(4, 6)).sum() == 48
    assert len(graphs) == 1
    assert double.explain().compilations[0].shapes == ((4, 6),)


def test_a_model_of_24_blocks_is_compiled_as_one():
    backend, graphs = count_graphs()
    model, plain = twins(Encoder(num_layers=24), mask="mask", backend=backend)
    generator = random.Random(0)
    for _ in range(4):
        tokens, mask = make_batch(generator, num_rows=8)
        mask[0], mask[1] = mask[1].clone(), mask[1]  # never one row alone, which is a graph of its own
        torch.testing.assert_close(model(tokens, mask)[mask], plain(tokens, mask)[mask])
    assert len({len(graph.graph.nodes) for graph in graphs}) == len(graphs) <= 2
    assert all(each.target == "Block" for each in model.explain().compilations)
    assert model.explain().blocks == ("Block, 24 times",)


def test_blocks_of_different_structure_are_different_groups():
    model = nn.Sequential(Block(), Block(), Block(dropout=0.5), nn.Sequential(Block(), nn.ReLU()), Block(dropout=0.5))
    groups = find_repeated(model)
    assert [len(group) for group in groups] == [2, 2]
    assert groups[1][0].dropout == 0.5


def test_a_frozen_block_is_not_of_the_structure_of_a_trained_one():
    model = nn.ModuleList([Block(), Block()])
    model[0].requires_grad_(requires_grad=False)
    assert find_repeated(model) == []


# Rows in groups


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_groups_of_rows_give_the_numbers_and_gradients_of_the_batch(is_training, rows):
    model, plain = twins(Encoder().double().train(is_training), mask="mask", cost=CUT_OFTEN)
    generator = random.Random(rows)
    for _ in range(5):
        tokens, mask = make_batch(generator, num_rows=rows)
        answers = []
        for each in (model, plain):
            each.zero_grad()
            hidden = each(tokens, mask)
            answers.append(hidden[mask].square().mean())
            answers[-1].backward()
        torch.testing.assert_close(*answers)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    explanation = model.explain()
    assert explanation.num_pieces > explanation.num_calls or rows == 1
    assert explanation.padding_share <= explanation.padding_share_before
    assert len(explanation.compilations) <= 3


def test_outputs_after_the_end_of_a_row_are_zeros():
    model, _ = twins(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    mask = torch.tensor([[1] * 9, [1] * 3 + [0] * 6])
    for _ in range(3):
        hidden = model(torch.ones(2, 9, dtype=torch.long), mask.bool())
    assert not hidden[1, 3:].any()
    assert hidden[1, :3].any()


def test_a_mask_with_holes_is_the_mask_that_counts():
    model, plain = twins(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    for seed in range(3):
        torch.manual_seed(seed)
        mask = torch.rand(4, 20) < 0.4
        mask[:, 0] = True
        tokens = torch.randint(1, 50, (4, 20))
        torch.testing.assert_close(model(tokens, mask)[mask], plain(tokens, mask)[mask])


def test_dropout_draws_and_leaves_the_generator_to_the_model():
    model, _ = twins(Encoder(dropout=0.5).train(), mask="mask", cost=CUT_OFTEN)
    tokens, mask = make_batch(random.Random(3))
    first, second = model(tokens, mask), model(tokens, mask)
    assert not torch.equal(first, second)
    assert model.training
    assert all(block.training for block in model.blocks)
    plain = copy.deepcopy(model.eval())
    torch.testing.assert_close(model(tokens, mask)[mask], Encoder.forward(plain, tokens, mask)[mask])


def test_autocast_works():
    model, plain = twins(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    generator = random.Random(4)
    for _ in range(3):
        tokens, mask = make_batch(generator)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(tokens, mask)[mask], plain(tokens, mask)[mask], atol=0.05, rtol=0.05)


def test_scores_per_row_and_keywords_and_nested_arguments():
    class Pooled(Encoder):
        def forward(self, batch, *, scale=1.0):
            hidden = super().forward(batch["tokens"], batch["mask"])
            weights = batch["mask"][:, :, None].to(hidden.dtype)
            return {"mean": scale * (hidden * weights).sum(1) / weights.sum(1), "hidden": hidden}

    model, plain = twins(Pooled().eval(), mask="batch['mask']", cost=CUT_OFTEN)
    generator = random.Random(5)
    for _ in range(4):
        tokens, mask = make_batch(generator)
        answer, expected = (each({"tokens": tokens, "mask": mask}, scale=2.0) for each in (model, plain))
        torch.testing.assert_close(answer["mean"], expected["mean"])
        torch.testing.assert_close(answer["hidden"][mask], expected["hidden"][mask])
    assert model.explain().num_pieces > 4


# What must not be padded or split


class Mixing(Encoder):
    """Rows depend on each other."""

    def forward(self, tokens, mask):
        hidden = super().forward(tokens, mask)
        return hidden - hidden.mean(dim=0)


class Counting(Encoder):
    """Positions are counted, padding too."""

    def forward(self, tokens, mask):
        return super().forward(tokens, mask).mean(dim=1)


class Summed(Encoder):
    """There is no row to cut."""

    def forward(self, tokens, mask):
        return super().forward(tokens, mask)[mask].mean()


class Normalized(Encoder):
    """In training, padding would be averaged over."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(SIZE)

    def forward(self, tokens, mask):
        return self.norm(super().forward(tokens, mask).transpose(1, 2))


class Remembering(Encoder):
    """Every call leaves a trace."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, tokens, mask):
        self.num_calls += 1
        return super().forward(tokens, mask)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Remembering, "changes its buffers"),
        (Mixing, "changes by"),
        (Counting, "changes by"),
        (Summed, "no row for each"),
        (Normalized, "batch normalization"),
    ],
)
def test_a_model_that_sees_padding_is_left_whole_with_a_warning_and_the_right_answer(kind, reason):
    model, plain = twins(kind().train(), mask="mask", cost=CUT_OFTEN)
    generator = random.Random(6)
    with pytest.warns(DynamicGraphWarning, match=reason) as caught:
        for _ in range(4):
            tokens, mask = make_batch(generator)
            torch.testing.assert_close(model(tokens, mask), plain(tokens, mask))
    assert len([each for each in caught if each.category is DynamicGraphWarning]) == 1
    assert reason.split()[0] in model.explain().reason
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_random_function_is_not_padded():
    @dynamic_graph(pad_value=0.0, boundaries=[8, 16], backend="eager", cache=False)
    def noisy(x):
        return x + torch.rand_like(x)

    with pytest.warns(DynamicGraphWarning, match="random numbers"):
        for length in (5, 7, 12):
            assert noisy(torch.zeros(2, length)).shape == (2, length)


def test_a_mean_over_positions_is_not_padded_whatever_the_user_says():
    @dynamic_graph(pad_value=0.0, boundaries=[8, 16], backend="eager", cache=False)
    def mean(x):
        return x.mean(dim=1)

    with pytest.warns(DynamicGraphWarning, match="changes by"):
        for length in (5, 7, 12):
            x = torch.randn(2, length)
            torch.testing.assert_close(mean(x), x.mean(dim=1))


# Boundaries


def test_lengths_run_at_their_boundary_and_are_cut_back():
    backend, graphs = count_graphs()
    scaled = dynamic_graph(
        lambda x: x.cumsum(1) * x.amax((1, 2), keepdim=True),
        pad_value=0.0,
        boundaries=[8, 16],
        backend=backend,
        cache=False,
    )
    for length in (5, 7, 12, 8, 16, 3, 30, 31, 14):
        x = torch.rand(3, length, 4) + 0.1
        torch.testing.assert_close(scaled(x), x.cumsum(1) * x.amax((1, 2), keepdim=True))
    ways = [each.way for each in scaled.explain().compilations]
    assert sorted(map(str, ways)) == ["16", "8", "symbolic"]
    assert [each.shapes[0][1] for each in scaled.explain().compilations if each.way != "symbolic"] == [8, 16]
    assert len(graphs) == 3


def test_padding_is_with_the_value_that_was_asked_for():
    @dynamic_graph(pad_value={"x": -1e9}, boundaries=[8, 16], backend="eager", cache=False)
    def attend(x):
        return x.softmax(dim=1)

    for length in (5, 7, 12, 9):
        x = torch.randn(2, length)
        torch.testing.assert_close(attend(x), x.softmax(dim=1))
    assert attend.explain().strategy == "bucketed"


def test_boundaries_are_learned_from_what_arrives():
    doubled = dynamic_graph(
        lambda x: 2 * x, pad_value=0.0, strategy="bucketed", max_compilations=4, backend="eager", cache=False
    )
    generator = random.Random(7)
    for _ in range(60):
        length = generator.choice([9, 10, 29, 30, 60])
        assert doubled(torch.ones(2, length)).sum() == 4 * length
    explanation = doubled.explain()
    assert explanation.boundaries[-1] == 60
    assert {10, 30, 60} >= set(explanation.boundaries) | {30}
    assert len(explanation.compilations) <= 4
    assert "planned from" in explanation.reason


def test_groups_run_at_boundaries_as_well():
    model, plain = twins(Encoder().eval(), mask="mask", cost=CUT_OFTEN, boundaries=(8, 24, 40))
    generator = random.Random(8)
    for _ in range(6):
        tokens, mask = make_batch(generator)
        torch.testing.assert_close(model(tokens, mask)[mask], plain(tokens, mask)[mask])
    assert {each.way for each in model.explain().compilations} <= {8, 24, 40}


# The bound


def test_the_bound_holds_and_the_failing_guard_is_named():
    backend, graphs = count_graphs()

    @dynamic_graph(backend=backend, cache=False, max_compilations=3)
    def shifted(x, number):
        return x * 2 if number == 99 else x + number

    with pytest.warns(DynamicGraphWarning, match=r"3 compilations.*number") as caught:
        for number in range(9):
            assert shifted(torch.zeros(3), number).tolist() == [number] * 3
        num_captured = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert shifted(torch.zeros(3), 20).tolist() == [20] * 3
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_captured  # nothing is traced any more
    assert len(graphs) == 3
    assert len(shifted.explain().compilations) == 3
    assert len(caught) == 1


def test_a_dim_that_the_function_fixes_is_softened_with_a_warning():
    @dynamic_graph(backend="eager", cache=False)
    def fixed(x):
        return x.reshape(-1, 6) if x.shape[0] == 12 else x.sum()

    with pytest.warns(DynamicGraphWarning, match="fixes a dim"):
        for length in (6, 12, 6, 12):
            assert fixed(torch.ones(length)).sum() == length


# How it is put on


def test_a_class_of_modules_is_decorated():
    @dynamic_graph(mask="mask", backend="eager", cache=False)
    class Decorated(Encoder):
        """What it was."""

    class Larger(Decorated):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(SIZE, 2)

        def forward(self, tokens, mask):
            return self.head(super().forward(tokens, mask))

    tokens, mask = make_batch(random.Random(9))
    for kind, size in ((Decorated, SIZE), (Larger, 2)):
        model = kind().eval()
        assert isinstance(model, Encoder)
        assert model(tokens, mask).shape == (*mask.shape, size)
        assert model.explain().num_calls == 1
    assert Decorated.__doc__ == "What it was."


def test_a_module_keeps_its_parameters_and_its_class():
    plain = Encoder()
    names = list(plain.state_dict())
    model = dynamic_graph(plain, backend="eager", cache=False)
    assert model is plain
    assert type(model) is Encoder
    model(*make_batch(random.Random(0)))
    assert list(model.state_dict()) == names


def test_a_method_is_decorated():
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        @dynamic_graph(backend="eager", cache=False)
        def forward(self, x):
            return self.linear(x).sum()

    scorer = Scorer()
    for length in (3, 5, 8):
        x = torch.randn(length, 4)
        torch.testing.assert_close(scorer(x), scorer.linear(x).sum())
    assert scorer.forward.explain().num_calls == 3


def test_a_copy_is_a_model_of_its_own():
    model, plain = twins(Encoder().eval(), mask="mask")
    tokens, mask = make_batch(random.Random(10))
    model(tokens, mask)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(tokens, mask)[mask], plain(tokens, mask)[mask])
    assert other.explain().num_calls == 1
    assert all(block.forward.block is block for block in other.blocks)


def test_a_model_can_be_pickled():
    model, plain = twins(Encoder().eval(), mask="mask")
    tokens, mask = make_batch(random.Random(11))
    model(tokens, mask)
    restored = pickle.load(io.BytesIO(pickle.dumps(model)))
    torch.testing.assert_close(restored(tokens, mask)[mask], plain(tokens, mask)[mask])


def test_inside_of_another_compilation_it_is_the_function():
    backend, graphs = count_graphs()
    inner = dynamic_graph(lambda x: x + 1, backend="eager", cache=False)
    outer = torch.compile(lambda x: inner(x) * 2, backend=backend)
    assert outer(torch.ones(3)).tolist() == [4.0] * 3
    assert len(graphs) == 1
    assert inner.explain().num_calls == 0


def test_threads_share_what_is_compiled():
    model, plain = twins(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    batches = [make_batch(random.Random(seed)) for seed in range(8)]
    answers = {}

    def run(index):
        with torch.no_grad():
            answers[index] = model(*batches[index])

    run(0)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(1, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (tokens, mask) in enumerate(batches):
        torch.testing.assert_close(answers[index][mask], plain(tokens, mask)[mask])


def test_an_explanation_reads_as_text():
    model, _ = twins(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    for seed in range(3):
        model(*make_batch(random.Random(seed)))
    text = str(model.explain())
    assert "Block, 3 times" in text
    assert "of at most 8" in text
    assert "3 calls ran as" in text


# Bad input


def plain_function(x, mask):
    return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "maks"}, "did you mean 'mask'"),
        ({"dims": {"y": 1}}, "unknown argument 'y'"),
        ({"pad_value": {"z": 1}}, "unknown argument 'z'"),
        ({"strategy": "bucket"}, "did you mean 'bucketed'"),
        ({"strategy": "bucketed"}, "mask="),
        ({"boundaries": [8]}, "mask="),
        ({"boundaries": [0], "pad_value": 0}, "at least 1"),
        ({"max_compilations": 0}, "at least 1"),
        ({"num_checks": 0, "mask": "mask"}, "blindly"),
        ({"max_compilation": 3}, "did you mean 'max_compilations'"),
        ({"backend": "inducter"}, "did you mean 'inductor'"),
    ],
)
def test_a_wrong_option_is_refused_with_the_right_one(options, message):
    with pytest.raises(ConfigError, match=message):
        dynamic_graph(plain_function, **options)


async def coroutine(x):
    return x


def generator_function(x):
    yield x


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, "was given a int"),
        (coroutine, "coroutine"),
        (generator_function, "generator"),
        (len, "no Python code"),
        (torch.relu, "no Python code"),
        (dict, "no nn.Module"),
    ],
)
def test_what_cannot_be_compiled_is_refused(target, message):
    with pytest.raises(ConfigError, match=message):
        dynamic_graph(target)


def test_a_module_is_made_dynamic_once():
    model, _ = twins(Encoder())
    with pytest.raises(ConfigError, match="already"):
        dynamic_graph(model)


@pytest.mark.parametrize("mask", [torch.ones(3), torch.ones(2, 5), torch.ones(2, 5, 5, dtype=torch.bool), 1])
def test_a_mask_that_is_none_is_refused(mask):
    model, _ = twins(Encoder(), mask="mask")
    with pytest.raises(ConfigError, match="zeros and ones"):
        model(torch.ones(2, 5, dtype=torch.long), mask)


def test_a_dim_that_an_argument_does_not_have_is_refused():
    model, _ = twins(Encoder(), mask="mask", dims={"tokens": 2})
    with pytest.raises(ConfigError, match="dim 2 of 'tokens', which has 2 dims"):
        model(*make_batch(random.Random(0)))


def test_an_error_of_the_function_is_the_users():
    @dynamic_graph(backend="eager", cache=False)
    def broken(x):
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            broken(torch.ones(2))


# Code generation


@pytest.mark.slow
def test_24_layers_are_generated_once_and_right(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, plain = twins(Encoder(num_layers=24).eval(), backend="inductor")
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
    model, plain = twins(Block().train(), backend="inductor")
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
