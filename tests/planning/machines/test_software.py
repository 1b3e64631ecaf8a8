import pytest

from deepseek.core.errors import ConfigError
from deepseek.planning.machines.software import SOFTWARE, Software, find_software


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


@pytest.mark.parametrize(
    ("text", "is_once", "is_in_parts", "is_whole"),
    [
        ("Megatron-Bridge, container 25.09 GB200 DeepSeekV3", False, False, False),
        ("Megatron-Bridge, container 25.11 GB200 DeepSeekV3", True, True, False),
        ("Megatron-Bridge, container 25.11 B200 DeepSeekV3", False, False, False),
        ("Megatron-Bridge, container 26.02.01 B200 DeepSeekV3", True, False, False),
        ("Megatron-Bridge, container 26.04 H100-SXM-80GB Qwen3_235B_a22B", False, False, False),
        ("Megatron-Bridge, container 26.06 GB300 Qwen3_235B_a22B", True, True, True),
        ("arXiv:2412.19437 DualPipe", True, False, False),
        ("Megatron-LM arXiv:2312.00001", False, False, False),
    ],
)
def test_recipes_for_experts_are_those_of_their_release_and_machine(text, is_once, is_in_parts, is_whole):
    found = find_software(text)[1]
    assert found.sends_tokens_once is is_once
    assert found.records_layers is is_in_parts
    assert (found.is_compiled, found.fuses_experts) == (is_whole, is_whole)


def test_an_unknown_attention_kernel_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'flash2'"):
        Software(attention="flash22")
    assert all(isinstance(each, Software) for each in SOFTWARE.values())
