"""`load_model` over ranks as the documents write it: a program under torchrun, with the device map of their configs."""

import subprocess
import sys

import torch

import deepseek as ds
from deepseek.models.decoder.model import Decoder, DecoderConfig

PROGRAM = """
import sys
import torch
import deepseek as ds

model = ds.load_model(sys.argv[1], {
    "model_parallel": {"tensor_parallel_size": 1, "pipeline_parallel_size": 2},
    "device_map": {"gpu0": [0], "gpu1": [1]},
})
logits = model(torch.tensor([[1, 2, 3]]))
if torch.distributed.get_rank() == 0:
    torch.save(logits, sys.argv[2])
"""


def test_a_program_under_torchrun_gets_the_answer_of_one_process(tmp_path):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab_size=11, num_layers=2, hidden_size=8, num_heads=2, ffn_size=8))
    ds.save_model(model, tmp_path / "model")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "program.py"), str(tmp_path / "model"), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model.eval()(torch.tensor([[1, 2, 3]])).detach())
