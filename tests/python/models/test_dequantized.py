"""Matrices in fp8 read as the numbers that they stand for, in pieces of any size."""

from dataclasses import dataclass
from math import prod

import pytest
import torch

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.models.dequantized import DequantizedWeights, can_dequantize

BLOCK = (128, 128)


@dataclass
class Entry:
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self):
        return prod(self.shape)


class Files:
    """Tensors in memory, read as those of files are."""

    def __init__(self, tensors):
        self.tensors = tensors
        names = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}
        self.entries = {name: Entry(names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}

    def read(self, name, start, stop):
        return bytearray(
            self.tensors[name].reshape(-1)[start:stop].clone().view(torch.uint8).numpy().tobytes()
        )


def quantised(rows, columns):
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.5
    return values, scales


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (300, 200), (1, 5), (576, 128)])
def test_every_piece_is_the_product_with_the_scale_of_its_block(rows, columns):
    values, scales = quantised(rows, columns)
    expected = values.float()
    for row in range(rows):
        for first in range(0, columns, 128):
            expected[row, first : first + 128] *= scales[row // 128, first // 128]
    reader = DequantizedWeights(Files({"w": values, "w_scale_inv": scales, "n": torch.ones(3)}), BLOCK)
    assert {name: (each.dtype, each.shape) for name, each in reader.entries.items()} == {
        "w": ("F32", (rows, columns)), "n": ("F32", (3,)),
    }  # fmt: skip
    flat, count = expected.reshape(-1), rows * columns
    for start, stop in [
        (0, count),
        (0, 1),
        (count - 1, count),
        (count // 3, count // 2),
        (columns // 2, count),
    ]:
        piece = (
            torch.frombuffer(reader.read("w", start, stop), dtype=torch.float32) if stop > start else flat[:0]
        )
        assert torch.equal(piece, flat[start:stop])
    assert reader.read("n", 0, 3) == bytearray(torch.ones(3).view(torch.uint8).numpy().tobytes())


def test_scales_that_are_missing_or_of_another_grid_are_refused_by_name():
    values, scales = quantised(300, 200)
    with pytest.raises(ModelFilesError, match="the files hold no w_scale_inv"):
        DequantizedWeights(Files({"w": values}), BLOCK)
    with pytest.raises(ModelFilesError, match=r"w_scale_inv is F32 \[2, 2\].*needs F32 \[3, 2\]"):
        DequantizedWeights(Files({"w": values, "w_scale_inv": scales[:2]}), BLOCK)


def test_what_is_no_matrix_with_fp32_scales_is_refused_with_what_to_import():
    values, scales = quantised(300, 200)
    with pytest.raises(UnsupportedModelError, match=r"scales in BF16.* import a copy of the model in bf16"):
        DequantizedWeights(Files({"w": values, "w_scale_inv": scales.bfloat16()}), BLOCK)
    with pytest.raises(UnsupportedModelError, match="only matrices"):
        DequantizedWeights(Files({"w": values[None], "w_scale_inv": scales}), BLOCK)


def test_a_block_that_is_wider_than_any_matrix_takes_no_memory():
    values, _ = quantised(3, 5)
    reader = DequantizedWeights(Files({"w": values, "w_scale_inv": torch.full((1, 1), 2.0)}), (2**31, 2**60))
    found = torch.frombuffer(reader.read("w", 0, 15), dtype=torch.float32)
    assert torch.equal(found, 2 * values.float().reshape(-1))


def test_only_fp8_by_blocks_is_dequantised():
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert can_dequantize(fp8)
    for other in (
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        fp8 | {"weight_block_size": [0, 1]},
    ):
        assert not can_dequantize(other)
