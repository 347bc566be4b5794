"""Bags of integers: size, bits and files."""

from pathlib import Path

import pytest
import torch
from quantized_by_loop import BITS, LENGTHS, jagged, loop_quantized, settings_of, weights_like
from safetensors.torch import load_file, save_file

from slipstream.embedding.quantized import PackedEmbeddingBag, QuantizedEmbeddingBag, quantize_table
from slipstream.embedding.quantized.numbers import fake_quantize_rows, table_scale


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_per", ["table", "row"])
@pytest.mark.parametrize("master_dtype", ["float32", "int8"])
def test_a_packed_bag_has_the_promised_size_and_the_same_bits_after_safetensors(
    bits: int, scale_per: str, master_dtype: str, tmp_path: Path
) -> None:
    for mode in ("sum", "mean", "max"):
        for dtype in (torch.float32, torch.float64):
            bag = QuantizedEmbeddingBag(
                37,
                8,
                bits=bits,
                scale_per=scale_per,
                master_dtype=master_dtype,
                mode=mode,
                padding_idx=4,
                include_last_offset=True,
                dtype=dtype,
                generator=torch.Generator().manual_seed(1),
            )
            values, offsets = jagged(3, 37, [*LENGTHS, 9, 30], include_last=True)
            with torch.no_grad():
                bag.apply_update(torch.arange(37), weights_like(5, 37, 8, dtype))
            bag(values, offsets)  # takes the scale
            bag.apply_update(torch.arange(37), weights_like(6, 37, 8, dtype))
            # from here on the frozen scale is stale, so some weights saturate
            bag.eval()
            packed = bag.pack()
            size = {16: 37 * 16, 8: 37 * 8, 4: 37 * 4, 2: 37 * 2}[bits]
            assert packed.packed.numel() * packed.packed.element_size() == size
            assert packed.memory_bytes() == size + 4 * (37 if scale_per == "row" else 1)
            path = tmp_path / f"{mode}{dtype}.safetensors"
            save_file(packed.state_dict(), path)
            loaded = PackedEmbeddingBag(37, 8, bits=bits, scale_per=scale_per, dtype=dtype, **settings_of(bag))
            loaded.load_state_dict(load_file(path))
            ones, starts = torch.arange(37), torch.arange(38)
            for lookup in ((values, offsets), (values.view(-1, 1),), (ones, starts)):
                expected = bag(*lookup)
                assert expected.dtype == dtype
                for answer in (packed(*lookup), loaded(*lookup)):
                    assert torch.equal(answer, expected)
                    assert torch.equal(torch.signbit(answer), torch.signbit(expected))
            scale = None if scale_per == "row" else float(bag.scale)
            table = loop_quantized(bag.master_rows(), bits, scale_per, scale)
            table[4] = 0  # the padding row
            assert torch.equal(packed(ones[:, None]), table)


def test_a_table_larger_than_one_chunk_packs_whole() -> None:
    weight = weights_like(0, 70_000, 2)
    packed = quantize_table(weight, 8, "table")
    ids = torch.tensor([[0], [65_535], [65_536], [69_999]])
    assert torch.equal(packed(ids), fake_quantize_rows(weight[ids[:, 0]], table_scale(weight, 8), 8))


@pytest.mark.parametrize("scale_per", ["table", "row"])
def test_quantising_after_training_equals_the_plain_loop_and_rows_are_closer(scale_per: str) -> None:
    weight = weights_like(0, 20, 8)
    weight[3] *= 20  # one outlier row sets the scale of the table
    packed = quantize_table(weight, 4, scale_per)
    assert torch.equal(packed(torch.arange(20)[:, None]), loop_quantized(weight, 4, scale_per))
    if scale_per == "row":
        error = (packed(torch.arange(20)[:, None]) - weight).norm()
        assert error < 0.5 * (loop_quantized(weight, 4, "table") - weight).norm()


def test_packing_refuses_widths_that_do_not_fill_bytes() -> None:
    with pytest.raises(ValueError, match="multiple of 2 to pack 4 bits, found 3; use 4 columns"):
        QuantizedEmbeddingBag(10, 3).pack()
    with pytest.raises(ValueError, match="multiple of 4 to pack 2 bits, found 6"):
        quantize_table(torch.ones(10, 6), 2)
    assert QuantizedEmbeddingBag(10, 3, bits=8).pack().memory_bytes() == 34


def test_a_table_with_nan_is_not_quantised() -> None:
    with pytest.raises(ValueError, match=r"expected finite values, found 1 .* \(0, 1\); lower the learning"):
        quantize_table(torch.tensor([[1.0, torch.nan]]), 4)


def test_loading_integers_of_another_width_is_an_error_not_a_conversion() -> None:
    eight = quantize_table(torch.ones(4, 4), 8).state_dict()
    with pytest.raises(RuntimeError, match=r"expected torch\.uint8 for 4 bits, found torch\.int8"):
        PackedEmbeddingBag(4, 8, bits=4, scale_per="row").load_state_dict(eight)
