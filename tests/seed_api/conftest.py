"""A model folder as a user has one after training, and text to go with it."""

import warnings

import pytest
import torch

import deepseek as ds
from deepseek.data.tokenizing import train_tokenizer
from deepseek.models.decoder.model import Decoder, DecoderConfig

LINES = [f"line {number}: the quick brown fox jumps over {number * 7 % 13} lazy dogs\n" for number in range(400)]


@pytest.fixture(scope="session")
def text():
    return "".join(LINES)


@pytest.fixture(scope="session")
def tokenizer(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so little text does not give all the tokens that are asked for
        return train_tokenizer([text], vocab_size=320)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """A Llama-shaped model with random weights, scaled up so that it has opinions."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=320, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, max_length=256, tie_embeddings=False
    )
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    folder = tmp_path_factory.mktemp("models") / "llama"
    ds.save_model(model, folder, tokenizer=tokenizer)
    return folder
