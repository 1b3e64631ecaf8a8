import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.software import SOFTWARE, Software, find_software


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("arXiv:2104.04473 Table 1; Megatron-LM examples", "Megatron-LM 2021"),
        ("arXiv:2205.05198 Table 5", "Megatron-LM 2022"),
        ("arXiv:2104.04473 Table 2 ZeRO-3; 74 days", "DeepSpeed 2021"),
        ("arXiv:2402.15627 Megatron-LM; accel is Ampere", "Megatron-LM"),
        ("arXiv:2402.15627 MegaScale; accel is Ampere", "MegaScale"),
        ("NVIDIA/NeMo docs performance_summary.md (2024-11-27)", "NeMo 2024"),
        ("NVIDIA/NeMo docs performance_summary.md (2025-03-01)", "NeMo"),
        ("NVIDIA/dgxc-benchmarking v25.04: NeMo", "NeMo"),
        ("huggingface/nanotron docs", "nanotron"),
        ("DeepSpeed ZeRO-3, 2025", "DeepSpeed"),
        ("maxtext; release v25.04", "XLA"),
        ("mosaicml/llm-foundry throughput", "llm-foundry"),
        ("single node, Megatron-DeepSpeed", "DeepSpeed 2021"),
        ("", "modern"),
    ],
)
def test_a_description_names_its_program(text, name):
    assert find_software(text)[0] == name


def test_runs_before_fused_attention_write_their_scores():
    assert find_software("Megatron-LM arXiv:2104.04473")[1].attention == "unfused"
    assert find_software("Megatron-LM arXiv:2312.00001")[1].attention == "flash2"


def test_what_a_description_adds_changes_the_traits():
    assert find_software("torchtitan 2024 FSDP+compile+Float8")[1].is_compiled
    assert not find_software("torchtitan 2024 FSDP eager")[1].is_compiled
    added = find_software("DeepSpeed ZeRO-3 + CPU-offloaded AdamW + Liger, 2025")[1]
    assert (added.offloads_optimizer, added.logit_bytes) == (True, 0.0)


def test_tokens_are_sent_once_by_programs_that_can():
    for text, is_once in [
        ("Megatron-Bridge, container 25.09", False),
        ("Megatron-Bridge, container 25.11", True),
        ("Megatron-Bridge, container 26.02.01", True),
        ("arXiv:2412.19437 DualPipe", True),
        ("Megatron-LM arXiv:2312.00001", False),
    ]:
        assert find_software(text)[1].sends_tokens_once is is_once


def test_an_unknown_attention_kernel_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'flash2'"):
        Software(attention="flash22")
    assert all(isinstance(each, Software) for each in SOFTWARE.values())
