"""The decoder as a whole: its options, its cache against whole passes, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.models.decoder.model import Decoder, DecoderConfig, count_parameters
from deepseek.nn.masks import MaskConfig
from tests.models.decoders import EXAMPLES, GPT2_SHAPE, MOE, SMALL, randomize

MASKED = {
    "dynamic mask": DecoderConfig(**SMALL, mask=MaskConfig(local_distance=3)),
    "hard mask, every other layer global": DecoderConfig(
        **SMALL, num_kv_heads=2, mask=MaskConfig(local_distance=2, is_dynamic=False, global_layer_every=2)
    ),
    "dynamic mask over experts, learned positions": DecoderConfig(
        **SMALL, position="learned", moe=MOE, mask=MaskConfig(local_heads=1.0)
    ),
}
SHAPES = EXAMPLES | MASKED
every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def make(config):
    return randomize(Decoder(config)).double()


def make_tokens(*shape, seed=0):
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def read(model, cache, slot, tokens_1T, start):
    """Logits of the tokens from `start` on, which come after what the slot holds."""
    positions_1T = torch.arange(start, start + tokens_1T.shape[1])[None]
    view = cache.view(slot, 1, start + tokens_1T.shape[1])
    return model(tokens_1T, positions_BT=positions_1T, cache=view)


class TestCache:
    @every_shape
    @torch.no_grad()
    def test_token_by_token_is_the_whole_pass(self, config):
        model, tokens_1T = make(config), make_tokens(1, 12)
        cache = model.new_cache(1)
        steps = [read(model, cache, 0, tokens_1T[:, at : at + 1], at) for at in range(12)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens_1T), rtol=1e-6, atol=1e-6)

    @every_shape
    @torch.no_grad()
    def test_chunks_of_any_length_are_the_whole_pass(self, config):
        model, tokens_1T = make(config), make_tokens(1, 16)
        expected = model(tokens_1T)

        @settings(deadline=None, max_examples=5)
        @given(st.lists(st.integers(1, 15), unique=True, max_size=5).map(sorted))
        def check(cuts):
            cache, logits, start = model.new_cache(1), [], 0
            for stop in [*cuts, 16]:
                logits.append(read(model, cache, 0, tokens_1T[:, start:stop], start))
                start = stop
            torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-6, atol=1e-6)

        check()

    @every_shape
    @torch.no_grad()
    def test_slots_at_different_positions_are_each_their_own_whole_pass(self, config):
        model, lengths = make(config), (3, 9, 1, 6)
        sequences = [make_tokens(1, length + 4, seed=length) for length in lengths]
        cache = model.new_cache(6)
        for slot, (tokens_1T, length) in enumerate(zip(sequences, lengths, strict=True), start=1):
            read(model, cache, slot, tokens_1T[:, :length], 0)
        steps = []
        for offset in range(4):
            tokens_B1 = torch.cat(
                [each[:, at + offset : at + offset + 1] for each, at in zip(sequences, lengths, strict=True)]
            )
            positions_B1 = torch.tensor([[length + offset] for length in lengths])
            view = cache.view(1, 4, max(lengths) + offset + 1)
            steps.append(model(tokens_B1, positions_BT=positions_B1, cache=view))
        for row, (tokens_1T, length) in enumerate(zip(sequences, lengths, strict=True)):
            ours = torch.cat([step[row] for step in steps])
            torch.testing.assert_close(ours, model(tokens_1T)[0, length:], rtol=1e-6, atol=1e-6)

    @torch.no_grad()
    def test_a_used_slot_starts_afresh(self):
        model = make(EXAMPLES["llama"])
        cache = model.new_cache(1)
        read(model, cache, 0, make_tokens(1, 9, seed=5), 0)
        tokens_1T = make_tokens(1, 4)
        torch.testing.assert_close(read(model, cache, 0, tokens_1T, 0), model(tokens_1T), rtol=1e-6, atol=1e-6)

    @torch.no_grad()
    def test_several_prompts_of_one_length_are_read_together(self):
        model, tokens_BT = make(EXAMPLES["llama"]), make_tokens(3, 5)
        ours = model(tokens_BT, cache=model.new_cache(3).view(0, 3, 5))
        torch.testing.assert_close(ours, model(tokens_BT), rtol=1e-6, atol=1e-6)

    def test_it_has_the_shape_of_the_model(self):
        model = Decoder(EXAMPLES["llama with a head size of its own"])
        cache = model.bfloat16().new_cache(3, 10)
        assert (cache.num_slots, cache.max_length) == (3, 10)
        layers = cache.view(0, 3, 10).layers
        assert [each.keys_SKLH.shape for each in layers] == [(3, 4, 10, 16)] * 2
        assert layers[0].keys_SKLH.dtype == torch.bfloat16
        assert model.new_cache(1).max_length == SMALL["max_length"]

    def test_it_is_on_the_device_of_the_model(self):
        model = Decoder(EXAMPLES["llama"]).to("meta")
        assert model.new_cache(1).view(0, 1, 1).layers[0].keys_SKLH.device.type == "meta"


@every_shape
@torch.no_grad()
def test_a_token_changes_no_logits_before_it(config):
    model, tokens_1T = make(config), make_tokens(1, 10)
    before = model(tokens_1T)
    for changed in (3, 9):
        other_1T = tokens_1T.clone()
        other_1T[0, changed] = (other_1T[0, changed] + 1) % SMALL["vocab_size"]
        after = model(other_1T)
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after[:, changed], before[:, changed])


@every_shape
@torch.no_grad()
def test_the_last_token_alone_has_the_logits_it_has_among_all(config):
    model, tokens_BT = make(config), make_tokens(2, 7)
    last = model(tokens_BT, last_only=True)
    assert last.shape == (2, 1, SMALL["vocab_size"])
    torch.testing.assert_close(last, model(tokens_BT)[:, -1:], rtol=1e-9, atol=1e-9)


@every_shape
def test_every_parameter_learns(config):
    model = make(config).train()
    model(make_tokens(2, 12)).logsumexp(dim=-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@torch.no_grad()
def test_rotary_logits_depend_on_distances_only():
    for config in (EXAMPLES["llama"], MASKED["dynamic mask"]):
        model, tokens_1T = make(config), make_tokens(1, 8)
        moved = model(tokens_1T, positions_BT=torch.arange(20, 28)[None])
        torch.testing.assert_close(moved, model(tokens_1T), rtol=1e-4, atol=1e-4)


def count_by_hand(config):
    """Parameters from the shapes on paper."""
    d, v, f = config.hidden_size, config.vocab_size, config.ffn_size
    q, kv = config.num_heads * config.size_of_head, config.kv_heads * config.size_of_head
    norm = 2 * d if config.norm == "layer" else d
    attention = d * q + 2 * d * kv + q * d + (q + 2 * kv + d if config.attention_bias else 0)
    if config.moe is not None:
        feedforward = config.moe.num_experts * (3 * d * config.moe.ffn_size + d)
    elif config.feedforward == "swiglu":
        feedforward = 3 * d * f + (2 * f + d if config.feedforward_bias else 0)
    else:
        feedforward = 2 * d * f + (f + d if config.feedforward_bias else 0)
    gates = 0
    if config.mask is not None and config.mask.is_dynamic:
        gates = sum(config.mask.num_local_heads(config.num_heads, layer) for layer in range(config.num_layers)) * (
            d + 1
        )
    embeddings = v * d * (1 if config.tie_embeddings else 2) + (
        config.max_length * d if config.position == "learned" else 0
    )
    return embeddings + config.num_layers * (attention + feedforward + 2 * norm) + norm + gates


@every_shape
def test_it_has_as_many_parameters_as_on_paper(config):
    assert count_parameters(Decoder(config)) == count_by_hand(config)


def test_the_first_generations_sizes():
    """GPT-2 small and SmolLM2-135M, whose numbers of parameters are published."""
    gpt2 = DecoderConfig(
        vocab_size=50257, num_layers=12, hidden_size=768, num_heads=12, ffn_size=3072, max_length=1024, **GPT2_SHAPE
    )
    smollm2 = DecoderConfig(
        vocab_size=49152, num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3, ffn_size=1536, max_length=8192
    )
    assert count_by_hand(gpt2) == 124_439_808
    assert count_by_hand(smollm2) == 134_515_008
    with torch.device("meta"):
        assert count_parameters(Decoder(gpt2)) == 124_439_808
        assert count_parameters(Decoder(smollm2)) == 134_515_008


def test_tied_weights_are_one_tensor():
    model = Decoder(DecoderConfig(**SMALL))
    assert model.head.weight is model.embed.weight
    free = Decoder(DecoderConfig(**SMALL, tie_embeddings=False))
    assert free.head.weight is not free.embed.weight


@pytest.mark.parametrize("shape", ["llama", "gpt2", "mixtral"])
def test_new_weights_are_normal_and_shrink_with_depth_where_they_feed_the_residual(shape):
    torch.manual_seed(0)
    config = EXAMPLES[shape].override({"num_layers": 8, "hidden_size": 64})
    model = Decoder(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
            continue
        feeds_residual = any(part in name for part in ("o_proj", "down_proj"))
        expected = 0.02 / math.sqrt(2 * 8) if feeds_residual else 0.02
        five_sigma = 5 / math.sqrt(parameter.numel())
        assert parameter.std().item() == pytest.approx(expected, rel=five_sigma), name
        assert abs(parameter.mean().item()) < five_sigma * expected, name


class TestMask:
    def test_heads_start_open_and_close_over_the_opening_steps(self):
        config = DecoderConfig(**SMALL, mask=MaskConfig(local_distance=2, opening_steps=10))
        model, tokens_1T = make(config), make_tokens(1, 12)
        plain = make(DecoderConfig(**SMALL))
        plain.load_state_dict({name: each for name, each in model.state_dict().items() if "far_gate" not in name})
        with torch.no_grad():
            trained = model(tokens_1T)
            model.set_step(0)
            torch.testing.assert_close(model(tokens_1T), plain(tokens_1T), rtol=1e-6, atol=1e-6)
            model.set_step(5)
            half = model(tokens_1T)
            model.set_step(10)
            torch.testing.assert_close(model(tokens_1T), trained, rtol=0, atol=0)
        assert not torch.allclose(half, trained) and not torch.allclose(half, plain(tokens_1T))

    def test_openness_is_no_part_of_what_is_saved(self):
        model = Decoder(MASKED["dynamic mask"])
        assert not [name for name in model.state_dict() if "openness" in name or "rotary" in name]

    def test_a_model_without_a_mask_takes_a_step_number_all_the_same(self):
        model = Decoder(DecoderConfig(**SMALL))
        model.set_step(3)
        assert model.mask_openness == 1

    def test_sequences_within_the_distance_see_no_mask(self):
        config = DecoderConfig(**SMALL, mask=MaskConfig(local_distance=5, is_dynamic=False))
        model, tokens_1T = make(config), make_tokens(1, 6)
        plain = make(DecoderConfig(**SMALL))
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(tokens_1T), plain(tokens_1T), rtol=1e-9, atol=1e-9)
            longer_1T = make_tokens(1, 7)
            assert not torch.allclose(model(longer_1T)[0, 6], plain(longer_1T)[0, 6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 3},
            r"^num_heads=3 does not divide hidden_size=32; choose one of 1, 2, 4, or set head_size$",
        ),
        (
            {"num_kv_heads": 3},
            r"^num_kv_heads=3 does not divide num_heads=4; choose one of 1, 2, 4$",
        ),
        ({"num_kv_heads": 8}, r"^num_kv_heads=8 does not divide num_heads=4; choose one of 1, 2, 4$"),
        ({"head_size": 7}, r"^rotary positions pair channels and head_size=7 is odd; choose an even one$"),
        (
            {"hidden_size": 36, "num_heads": 12},
            r"^rotary positions pair channels and head_size=3 is odd; choose an even",
        ),
        (
            {"moe": MOE, "feedforward": "gelu"},
            r"^mixture-of-experts blocks are gated, and feedforward is 'gelu'; choose 'swiglu'$",
        ),
        ({"num_layers": 0}, r"^setting 'num_layers' is 0: input should be greater than or equal to 1$"),
        ({"norm": "batch"}, r"^setting 'norm' is 'batch': input should be 'rms', 'rms_centered' or 'layer'$"),
        ({"num_head": 4}, r"^unknown setting 'num_head'; did you mean 'num_heads'\?"),
        ({"moe": {"topk": 4}}, r"^unknown setting 'moe.topk'; did you mean 'moe.top_k'\?"),
        ({"mask": {"local_head": 1}}, r"^unknown setting 'mask.local_head'; did you mean 'mask.local_heads'\?"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        DecoderConfig(**(SMALL | changes))
    assert "\n" not in str(caught.value)


def test_what_the_message_suggests_is_accepted():
    for num_heads in (1, 2, 4):
        DecoderConfig(**(SMALL | {"num_heads": num_heads}))
    DecoderConfig(**(SMALL | {"num_heads": 3, "head_size": 8}))
    DecoderConfig(**(SMALL | {"head_size": 7, "position": "learned"}))


def test_experts_that_are_too_few_are_refused_when_the_model_is_made():
    config = DecoderConfig(**SMALL, moe={"num_experts": 2, "top_k": 3})
    with pytest.raises(ConfigError, match="top_k=3 of 2 candidates and 2 experts"):
        Decoder(config)


def test_a_sequence_that_is_too_long_is_refused():
    model = Decoder(DecoderConfig(**SMALL))
    model(make_tokens(1, 32))
    message = "the sequence has 33 tokens and this model was made for 32; shorten it, or make the model with a larger"
    with pytest.raises(ConfigError, match=message):
        model(make_tokens(1, 33))
    cache = model.new_cache(1, 40)
    with pytest.raises(ConfigError, match=message):
        read(model, cache, 0, make_tokens(1, 1), 32)
    with pytest.raises(ConfigError, match=message):
        model(make_tokens(1, 33), cache=cache.view(0, 1, 8))


def test_a_decoder_is_exported_by_torch() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 64}
    model = Decoder(DecoderConfig.from_dict(shape)).eval()
    tokens = torch.randint(0, 64, (2, 8))
    exported = torch.export.export(model, (tokens,)).module()
    torch.testing.assert_close(exported(tokens), model(tokens))


SCALED = {
    kind: DecoderConfig(**SMALL, rope_scaling={"kind": kind, "factor": 2.0, "original_length": 6, **more})
    for kind, more in {
        "dynamic": {},
        "longrope": {"pair_factors": [1.0] * 4, "long_pair_factors": [2.0, 3.0, 4.0, 5.0]},
    }.items()
}
WINDOWED = {
    "sliding window": DecoderConfig(**SMALL, sliding_window=3, full_layers=(1,)),
    "softcap": DecoderConfig(**SMALL, attention_softcap=5.0, sliding_window=4),
}
APART = [[5, 9, 1, 4], [2, 17], [19]]


def lay_side_by_side(rows):
    """Tokens and documents of rows with documents of these lengths, each row one token longer than them."""
    documents_BT = torch.tensor(
        [[n for n, length in enumerate((*row, 20 - sum(row))) for _ in range(length)] for row in rows]
    )
    return make_tokens(*documents_BT.shape), documents_BT


class TestDocuments:
    @pytest.mark.parametrize("config", (SHAPES | SCALED | WINDOWED).values(), ids=SHAPES | SCALED | WINDOWED)
    def test_each_has_the_logits_that_it_has_alone(self, config):
        model = make(config)
        tokens_BT, documents_BT = lay_side_by_side(APART)
        for is_learning in (False, True):
            with torch.set_grad_enabled(is_learning):
                together = model(tokens_BT, documents_BT=documents_BT)
                for tokens_T, documents_T, logits_TV in zip(tokens_BT, documents_BT, together, strict=True):
                    for document in documents_T.unique():
                        mine = documents_T == document
                        alone = model(tokens_T[mine][None])[0]
                        torch.testing.assert_close(logits_TV[mine], alone, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "dynamic mask", "sliding window"])
    def test_gradients_are_the_sums_of_those_of_each_alone(self, name):
        tolerance = 1e-5 if name == "dynamic mask" else 1e-9  # its biases are float32
        model = make((SHAPES | WINDOWED)[name]).train()
        tokens_BT, documents_BT = lay_side_by_side(APART)
        model(tokens_BT, documents_BT=documents_BT).square().sum().backward()
        together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        for tokens_T, documents_T in zip(tokens_BT, documents_BT, strict=True):
            for document in documents_T.unique():
                model(tokens_T[documents_T == document][None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name], parameter.grad, rtol=tolerance, atol=tolerance)

    def test_bf16_rows_that_are_written_out_hide_other_documents_as_well(self):
        model = Decoder(DecoderConfig(**SMALL)).bfloat16()
        tokens_BT, documents_BT = lay_side_by_side(APART)
        changed = torch.where(documents_BT == 1, (tokens_BT + 1) % SMALL["vocab_size"], tokens_BT)
        logits, others = (model(tokens, documents_BT=documents_BT) for tokens in (tokens_BT, changed))
        assert torch.equal(logits[documents_BT != 1], others[documents_BT != 1])
        assert not torch.equal(logits[documents_BT == 1], others[documents_BT == 1])

    def test_documents_in_a_cache_are_refused(self):
        model = make(SHAPES["llama"])
        with pytest.raises(ConfigError, match="leave cache, positions_BT and lengths_B1 out"):
            model(make_tokens(1, 4), documents_BT=torch.zeros(1, 4), cache=model.new_cache(1).view(0, 1, 4))
