"""Sentence embeddings of real sentences, and the wrapper around models of `transformers`."""

import onnxruntime
import pytest
import tokenizers
import torch
import transformers

from deepseek.core.errors import ConfigError
from deepseek.models.loading import load_model
from deepseek.models.transformers_models.model import TransformersModel, build_transformers, quiet
from deepseek.models.transformers_models.pooling import pool_mean
from tests.models import minilm

SENTENCES = (
    "A man is eating a plate of pasta.",
    "Someone has noodles for dinner.",
    "The stock market fell sharply on Monday.",
    "Shares lost value at the start of the week.",
    "How do I install this package?",
)
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
EXAMPLES = {
    "bert": ("BertModel", SMALL | {"num_hidden_layers": 2}),
    "roberta": ("RobertaModel", SMALL | {"num_hidden_layers": 2, "pad_token_id": 0}),
    "distilbert": ("DistilBertModel", {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "electra": ("ElectraModel", SMALL | {"num_hidden_layers": 2, "embedding_size": 16}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "vit": (
        "ViTForImageClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
        },
    ),
}


@pytest.fixture(scope="module")
def encoded():
    """The sentences in the model's own tokens, padded: tokens and mask."""
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm.find_folder() / "tokenizer.json"))
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(list(SENTENCES))
    return torch.tensor([row.ids for row in rows]), torch.tensor([row.attention_mask for row in rows])


@pytest.fixture(scope="module")
def model():
    return load_model(minilm.find_folder())


@torch.inference_mode()
def embed(model, tokens_BT, mask_BT):
    return pool_mean(model(tokens_BT, mask_BT, torch.zeros_like(mask_BT)), mask_BT)


def test_sentence_embeddings_are_those_of_transformers(model, encoded):
    with quiet():
        theirs = transformers.AutoModel.from_pretrained(minilm.find_folder()).eval()
    tokens_BT, mask_BT = encoded
    with torch.inference_mode():
        hidden_BTD = theirs(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
    expected = []
    for hidden_TD, mask_T in zip(hidden_BTD, mask_BT, strict=True):  # one sentence at a time, without its padding
        mean_D = hidden_TD[mask_T.bool()].mean(0)
        expected.append(mean_D / mean_D.norm())
    torch.testing.assert_close(embed(model, *encoded), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_int8_weights_in_onnx_runtime_give_nearly_the_same_embeddings(model, encoded):
    session = onnxruntime.InferenceSession(str(minilm.find_int8_onnx()), providers=["CPUExecutionProvider"])
    tokens_BT, mask_BT = encoded
    feed = (tokens_BT, mask_BT, torch.zeros_like(mask_BT))
    names = [each.name for each in session.get_inputs()]
    (hidden,) = session.run(None, {name: each.numpy() for name, each in zip(names, feed, strict=True)})
    theirs = pool_mean(torch.from_numpy(hidden), mask_BT)
    assert float((embed(model, *encoded) * theirs).sum(-1).min()) > 0.995


def test_sentences_that_mean_the_same_are_near(model, encoded):
    similarity = embed(model, *encoded) @ embed(model, *encoded).T
    near, far = (similarity[0, 1], similarity[2, 3]), (similarity[0, 2], similarity[1, 3], similarity[0, 4])
    assert float(min(near)) > 0.4 > 0.2 > float(max(far))


def test_padding_does_not_change_an_embedding(model, encoded):
    tokens_BT, mask_BT = encoded
    length = int(mask_BT[0].sum())
    alone = embed(model, tokens_BT[:1, :length], mask_BT[:1, :length])
    torch.testing.assert_close(embed(model, tokens_BT, mask_BT)[:1], alone, rtol=1e-4, atol=1e-5)


def test_a_mean_without_normalizing_is_the_mean():
    hidden_BTD, mask_BT = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    means_BD = pool_mean(hidden_BTD, mask_BT, normalize=False)
    torch.testing.assert_close(means_BD, torch.stack([hidden_BTD[0, :2].mean(0), hidden_BTD[1, 0]]))


@pytest.mark.parametrize("model_type", EXAMPLES)
def test_a_wrapped_model_answers_with_one_tensor_for_tensors_in_order(model_type):
    kind, settings = EXAMPLES[model_type]
    torch.manual_seed(0)
    model = build_transformers({"model_type": model_type, "architectures": [kind]} | settings)
    inputs = model.draw_inputs(2, 7)
    assert len(inputs) == len(model.input_names) and inputs[0].shape[0] == 2
    with torch.inference_mode():
        theirs = model.model(**dict(zip(model.input_names, inputs, strict=True)))
        expected = theirs.logits if "logits" in theirs else theirs.last_hidden_state
        torch.testing.assert_close(model(*inputs), expected)
    program = torch.export.export(model, inputs)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_its_config_builds_the_same_model_again():
    kind, settings = EXAMPLES["roberta"]
    model = build_transformers({"model_type": "roberta", "architectures": [kind]} | settings)
    again = build_transformers(model.config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(again(*model.draw_inputs(1, 5)), model(*model.draw_inputs(1, 5)))


def test_too_many_inputs_are_refused():
    kind, settings = EXAMPLES["vit"]
    model = build_transformers({"model_type": "vit", "architectures": [kind]} | settings)
    with pytest.raises(ConfigError, match="the model takes pixel_values"):
        model(*model.draw_inputs(1, 1), torch.ones(1))


def test_loading_leaves_the_settings_of_transformers_as_they_were():
    logging = transformers.utils.logging
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    assert isinstance(load_model(minilm.find_folder()), TransformersModel)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
