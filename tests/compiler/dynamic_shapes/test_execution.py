"""Batches in pieces give the numbers and gradients of the model left alone, or are left whole."""

import copy
import random
import threading

import pytest
import torch
from torch import nn

from deepseek.compiler.dynamic_shapes.dynamic_graph import dynamic_graph
from deepseek.compiler.dynamic_shapes.regions import DynamicGraphWarning
from deepseek.core.errors import ConfigError
from tests.compiler.dynamic_shapes.encoders import CUT_OFTEN, SIZE, Encoder, build_pair, count_graphs, make_batch


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


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_groups_of_rows_give_the_numbers_and_gradients_of_the_batch(is_training, rows):
    model, plain = build_pair(Encoder().double().train(is_training), mask="mask", cost=CUT_OFTEN)
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
    model, _ = build_pair(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    mask = torch.tensor([[1] * 9, [1] * 3 + [0] * 6])
    for _ in range(3):
        hidden = model(torch.ones(2, 9, dtype=torch.long), mask.bool())
    assert not hidden[1, 3:].any()
    assert hidden[1, :3].any()


def test_a_mask_with_holes_is_the_mask_that_counts():
    model, plain = build_pair(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
    for seed in range(3):
        torch.manual_seed(seed)
        mask = torch.rand(4, 20) < 0.4
        mask[:, 0] = True
        tokens = torch.randint(1, 50, (4, 20))
        torch.testing.assert_close(model(tokens, mask)[mask], plain(tokens, mask)[mask])


def test_dropout_draws_and_leaves_the_generator_to_the_model():
    model, _ = build_pair(Encoder(dropout=0.5).train(), mask="mask", cost=CUT_OFTEN)
    tokens, mask = make_batch(random.Random(3))
    first, second = model(tokens, mask), model(tokens, mask)
    assert not torch.equal(first, second)
    assert model.training
    assert all(block.training for block in model.blocks)
    plain = copy.deepcopy(model.eval())
    torch.testing.assert_close(model(tokens, mask)[mask], Encoder.forward(plain, tokens, mask)[mask])


def test_autocast_works():
    model, plain = build_pair(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
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

    model, plain = build_pair(Pooled().eval(), mask="batch['mask']", cost=CUT_OFTEN)
    generator = random.Random(5)
    for _ in range(4):
        tokens, mask = make_batch(generator)
        answer, expected = (each({"tokens": tokens, "mask": mask}, scale=2.0) for each in (model, plain))
        torch.testing.assert_close(answer["mean"], expected["mean"])
        torch.testing.assert_close(answer["hidden"][mask], expected["hidden"][mask])
    assert model.explain().num_pieces > 4


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
    model, plain = build_pair(kind().train(), mask="mask", cost=CUT_OFTEN)
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
    model, plain = build_pair(Encoder().eval(), mask="mask", cost=CUT_OFTEN, boundaries=(8, 24, 40))
    generator = random.Random(8)
    for _ in range(6):
        tokens, mask = make_batch(generator)
        torch.testing.assert_close(model(tokens, mask)[mask], plain(tokens, mask)[mask])
    assert {each.way for each in model.explain().compilations} <= {8, 24, 40}


def test_inside_of_another_compilation_it_is_the_function():
    backend, graphs = count_graphs()
    inner = dynamic_graph(lambda x: x + 1, backend="eager", cache=False)
    outer = torch.compile(lambda x: inner(x) * 2, backend=backend)
    assert outer(torch.ones(3)).tolist() == [4.0] * 3
    assert len(graphs) == 1
    assert inner.explain().num_calls == 0


def test_threads_share_what_is_compiled():
    model, plain = build_pair(Encoder().eval(), mask="mask", cost=CUT_OFTEN)
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


@pytest.mark.parametrize(
    "mask", [torch.ones(3), torch.zeros(2, 5), torch.full((2, 5), 0.5), torch.ones(2, 5, 5, dtype=torch.bool), 1]
)
def test_a_mask_that_is_none_is_refused(mask):
    model, _ = build_pair(Encoder(), mask="mask")
    with pytest.raises(ConfigError, match="zeros and ones"):
        model(torch.ones(2, 5, dtype=torch.long), mask)


def test_a_dim_that_an_argument_does_not_have_is_refused():
    model, _ = build_pair(Encoder(), mask="mask", dims={"tokens": 2})
    with pytest.raises(ConfigError, match="dim 2 of 'tokens', which has 2 dims"):
        model(*make_batch(random.Random(0)))


def test_an_error_of_the_function_is_the_users():
    @dynamic_graph(backend="eager", cache=False)
    def broken(x):
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            broken(torch.ones(2))
