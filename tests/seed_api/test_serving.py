"""`deepseek-serve MODEL --quantize=int8 --port N`, with `/metrics` for Prometheus."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import LlamaForCausalLM

COMMAND = str(Path(sys.executable).with_name("deepseek-serve"))
PROMPT = "line 7: the quick brown"


@pytest.fixture(scope="module")
def server(model_folder):
    """The URL of a server in a process of its own, which has to end well."""
    command = [COMMAND, str(model_folder), "--quantize=int8", "--port", "0", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DEEPSEEK_API_KEY": "secret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=30)
    assert status == 0


def ask(url, body=None, *, key="secret"):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def complete(url, **parameters):
    body = {"model": "deepseek", "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | parameters
    return json.loads(ask(f"{url}/v1/completions", body))


def test_an_int8_server_gives_nearly_the_probabilities_of_the_float_model(server, model_folder, tokenizer):
    answer = complete(server, max_tokens=1, logprobs=5)
    (served,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    tokens = torch.tensor([tokenizer.encode(PROMPT)])
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(tokens).logits[0, -1].log_softmax(dim=-1)
    texts = [tokenizer.decode([index]) for index in range(320)]  # single bytes of a character share one text, U+FFFD
    by_text = {text: value for text, value in zip(texts, expected.tolist(), strict=True) if texts.count(text) == 1}
    compared = served.keys() & by_text.keys()
    assert len(compared) >= 3
    differences = [abs(served[token] - by_text[token]) for token in compared]
    assert 1e-4 < max(differences) < 0.1  # 8 bits, and not 32


def test_a_stream_is_the_whole_answer_in_pieces(server):
    body = {"model": "deepseek", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "stream": True}
    lines = [line for line in ask(f"{server}/v1/completions", body).split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(pieces) == complete(server)["choices"][0]["text"]


def test_the_model_is_listed(server):
    (card,) = json.loads(ask(f"{server}/v1/models"))["data"]
    assert (card["id"], card["max_model_len"]) == ("deepseek", 256)


def test_metrics_count_what_was_asked_and_answered(server):
    before = read_counters(server)
    usage = complete(server)["usage"]
    after = read_counters(server)
    assert after["ds_prompt_tokens_total"] - before["ds_prompt_tokens_total"] == usage["prompt_tokens"]
    assert after["ds_generation_tokens_total"] - before["ds_generation_tokens_total"] == usage["completion_tokens"]


def test_health_is_open_and_the_api_wants_its_key(server):
    with urllib.request.urlopen(f"{server}/healthz", timeout=60) as answer:
        assert answer.status == 200
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        ask(f"{server}/v1/models", key="guess")
    with refused.value as answer:
        assert set(json.load(answer)["error"]) == {"message", "type", "param", "code"}


def test_a_prompt_over_the_context_length_is_refused_in_openais_shape(server):
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        complete(server, prompt="fox " * 400)
    with refused.value as answer:
        assert "256" in json.load(answer)["error"]["message"]


def read_counters(url):
    families = text_string_to_metric_families(ask(f"{url}/metrics"))
    return {
        sample.name: sample.value for family in families for sample in family.samples if "bucket" not in sample.name
    }
