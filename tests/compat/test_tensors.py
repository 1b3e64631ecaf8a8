"""Dtypes by the names of safetensors, against torch and against files that safetensors writes."""

import json
import struct

import pytest
import safetensors.torch
import torch

from deepseek.compat.tensors import FLOAT_DTYPES, ITEM_BYTES, TensorSpec, describe, parse_dtype, torch_dtype
from deepseek.core.errors import ArtifactError


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_a_dtype_has_the_name_and_the_size_that_safetensors_writes(name):
    tensor = torch.zeros(2, 3).to(torch_dtype(name))
    written = safetensors.torch.save({"a": tensor})
    (length,) = struct.unpack("<Q", written[:8])
    header = json.loads(written[8 : 8 + length])["a"]
    spec = describe("a", tensor)
    assert (spec.dtype, list(spec.shape)) == (header["dtype"], header["shape"]) == (name, [2, 3])
    start, end = header["data_offsets"]
    assert spec.num_bytes == end - start == tensor.nbytes
    assert spec.is_float == (tensor.is_floating_point() and tensor.element_size() > 1)


def test_a_scalar_has_one_element_and_an_empty_tensor_none():
    assert TensorSpec("F64", ()).num_bytes == 8
    assert TensorSpec("F64", (5, 0)).num_bytes == 0


def test_what_no_file_can_hold_is_refused_by_name():
    with pytest.raises(ArtifactError, match=r"layers\.0 is a list; expected a torch tensor"):
        describe("layers.0", [1.0])
    with pytest.raises(ArtifactError, match=r"layers.0 has dtype complex64, .* cast it to one of bool, uint8"):
        describe("layers.0", torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("spellings", "dtype"),
    [
        (("bf16", "BF16", "bfloat16", "torch.bfloat16"), "BF16"),
        (("f16", "fp16", "FP16", "float16", "torch.float16"), "F16"),
        (("f32", "fp32", "float32", "torch.float32"), "F32"),
        (("f64", "fp64", "float64"), "F64"),
    ],
)
def test_a_dtype_is_understood_as_people_write_it(spellings, dtype):
    assert {parse_dtype(spelling) for spelling in spellings} == {dtype}


@pytest.mark.parametrize("name", ["int8", "f8_e4m3", "bfloat", ""])
def test_a_dtype_that_no_cast_goes_to_is_refused(name):
    with pytest.raises(ArtifactError, match=f"unknown dtype '{name}'"):
        parse_dtype(name)


def test_every_float_is_found_by_the_name_that_torch_gives_it():
    assert [torch_dtype(parse_dtype(str(torch_dtype(name)))) for name in FLOAT_DTYPES] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ]
