"""Quantised linear layers, against a plain loop."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantized_by_loop import BITS, loop_quantized, loop_scale, weights_like
from safetensors.torch import load_file, save_file
from torch import nn

from slipstream.embedding.quantized import PackedLinear, QuantizedEmbeddingBag, QuantizedLinear, quantize_linears


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_per", ["channel", "matrix"])
@pytest.mark.parametrize("held", ["no bias", "float bias", "rounded bias"])
def test_a_quantised_linear_equals_the_reference_and_its_packed_self(
    bits: int, scale_per: str, held: str, tmp_path: Path
) -> None:
    bias, options = held != "no bias", {"scale_per": scale_per, "quantize_bias": held == "rounded bias"}
    for dtype in (torch.float32, torch.float64):
        layer = QuantizedLinear(13, 5, bias, bits=bits, dtype=dtype, **options)
        x = weights_like(0, 7, 13, dtype)
        per = "row" if scale_per == "channel" else "table"
        weight = loop_quantized(layer.weight, bits, per).requires_grad_()
        added = loop_rounded_bias(layer) if held == "rounded bias" else layer.bias
        expected = F.linear(x, weight, added)
        out = layer(x)
        assert torch.equal(out, expected)
        upstream = weights_like(1, 7, 5, dtype)
        (gradient,) = torch.autograd.grad(expected, weight, upstream)
        out.backward(upstream)
        torch.testing.assert_close(layer.weight.grad, gradient)
        packed = layer.pack()
        path = tmp_path / f"{dtype}.safetensors"
        save_file(packed.state_dict(), path)
        loaded = PackedLinear(13, 5, bias, bits=bits, dtype=dtype, **options)
        loaded.load_state_dict(load_file(path))
        assert torch.equal(packed(x), expected)
        assert torch.equal(loaded(x), expected)
        assert torch.equal(loaded.to_float()(x), expected)
        columns = {16: 26, 8: 13, 4: 7, 2: 4}[bits]
        of_bias = {
            "no bias": 0,
            "float bias": 5 * expected.element_size(),
            "rounded bias": {16: 10, 8: 5, 4: 3, 2: 2}[bits],
        }
        assert packed.memory_bytes() == 5 * columns + of_bias[held] + 4 * (5 if scale_per == "channel" else 1)


def loop_rounded_bias(layer: QuantizedLinear) -> torch.Tensor:
    """The bias on the grid of its weights, number by number."""
    weight, bias, n = layer.weight.detach().numpy(), layer.bias.detach().numpy(), 2 ** (layer.bits - 1) - 1
    rounded = bias.copy()
    for i in range(len(bias)):
        scale = bias.dtype.type(loop_scale(weight[i] if layer.scale_per == "channel" else weight, layer.bits))
        rounded[i] = min(max(np.round(bias[i] / scale), -n - 1), n) * scale
    return torch.from_numpy(rounded)


@pytest.mark.parametrize("scale_per", ["channel", "matrix"])
def test_training_with_rounded_biases_is_that_of_dqrm(scale_per: str) -> None:
    # as published: integers times the input, an integer bias added, and one multiplication by the scale at the end
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.bias[0] = 10 * linear.weight.abs().max()  # beyond the grid
    layer = QuantizedLinear.from_linear(copy.deepcopy(linear), bits=4, scale_per=scale_per, quantize_bias=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    weight, bias = (p.detach().double().numpy().copy() for p in (linear.weight, linear.bias))
    for step in range(30):
        x, upstream = weights_like(step, 8, 6), weights_like(100 + step, 8, 4)
        largest = np.abs(weight).max(axis=1) if scale_per == "channel" else np.full(4, np.abs(weight).max())
        scale = largest / 7
        integers = np.clip(np.round(weight / scale[:, None]), -8, 7)
        expected = (x.double().numpy() @ integers.T + np.clip(np.round(bias / scale), -8, 7)) * scale
        out = layer(x)
        np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        out.backward(upstream)
        optimizer.step()
        # the gradient goes straight through both roundings
        weight -= 0.1 * (upstream.double().numpy().T @ x.double().numpy())
        bias -= 0.1 * upstream.double().numpy().sum(axis=0)
    assert not np.allclose(layer.bias.detach().numpy(), linear.bias.detach().numpy())


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
    layer = QuantizedLinear(2, 2, quantize_bias=True)
    layer.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="expected finite values"):
        layer.pack()


def test_layers_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one of channel, matrix, found 'row'"):
        QuantizedLinear(2, 2, scale_per="row")
    with pytest.raises(ValueError, match=r"found \['7'\]"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), skip=["7"])
    with pytest.raises(ValueError, match="from_linear"):
        quantize_linears(nn.Linear(2, 2))
