"""Quantised linear layers, against a plain loop."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from quantized_by_loop import BITS, loop_quantized, weights_like
from safetensors.torch import load_file, save_file
from torch import nn

from slipstream.embedding.quantized import PackedLinear, QuantizedEmbeddingBag, QuantizedLinear, quantize_linears


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_per", ["channel", "matrix"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_linear_equals_the_reference_and_its_packed_self(
    bits: int, scale_per: str, bias: bool, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = QuantizedLinear(13, 5, bias, bits=bits, scale_per=scale_per, dtype=dtype)
        x = weights_like(0, 7, 13, dtype)
        per = "row" if scale_per == "channel" else "table"
        weight = loop_quantized(layer.weight, bits, per).requires_grad_()
        expected = F.linear(x, weight, layer.bias)
        out = layer(x)
        assert torch.equal(out, expected)
        upstream = weights_like(1, 7, 5, dtype)
        (gradient,) = torch.autograd.grad(expected, weight, upstream)
        out.backward(upstream)
        torch.testing.assert_close(layer.weight.grad, gradient)
        packed = layer.pack()
        path = tmp_path / f"{dtype}.safetensors"
        save_file(packed.state_dict(), path)
        loaded = PackedLinear(13, 5, bias, bits=bits, scale_per=scale_per, dtype=dtype)
        loaded.load_state_dict(load_file(path))
        assert torch.equal(packed(x), expected)
        assert torch.equal(loaded(x), expected)
        columns = {16: 26, 8: 13, 4: 7, 2: 4}[bits]
        floats = 5 * bias * expected.element_size() + 4 * (5 if scale_per == "channel" else 1)
        assert packed.memory_bytes() == 5 * columns + floats


def test_swapping_the_linears_of_a_model_shares_parameters_and_keeps_the_optimizer() -> None:
    torch.manual_seed(0)  # by chance every rectifier is off, and nothing has a gradient
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(shared, shared), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys, before = list(model.state_dict()), [id(p) for p in model.parameters()]
    assert quantize_linears(model, 4, skip=["3"]) == ["0", "2.0", "2.1"]
    assert [type(m) for m in model] == [QuantizedLinear, nn.Tanh, nn.Sequential, nn.Linear]
    assert model[2][0] is model[2][1]
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == before
    weight = model[0].weight.detach().clone()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, weight)


def test_a_model_of_quantised_parts_learns() -> None:
    torch.manual_seed(0)
    bag = QuantizedEmbeddingBag(30, 8, period=10, generator=torch.Generator().manual_seed(0))
    top = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    quantize_linears(top, 8)
    optimizer = torch.optim.SGD([*bag.parameters(), *top.parameters()], lr=0.3)
    ids = torch.arange(30)[:, None]
    labels = (torch.arange(30) % 3 == 0).float()
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(top(bag(ids)).squeeze(1), labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    bag.eval()
    packed_top = nn.Sequential(top[0].pack(), nn.Tanh(), top[2].pack())
    assert torch.equal(packed_top(bag.pack()(ids)), top(bag(ids)))


def test_a_layer_with_nan_is_not_packed() -> None:
    layer = QuantizedLinear(2, 2)
    layer.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="expected finite values"):
        layer.pack()


def test_layers_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one of channel, matrix, found 'row'"):
        QuantizedLinear(2, 2, scale_per="row")
    with pytest.raises(ValueError, match=r"found \['7'\]"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), skip=["7"])
    with pytest.raises(ValueError, match="from_linear"):
        quantize_linears(nn.Linear(2, 2))
