"""Linear layers that are trained on, and stored on, a few bits.

Source: DQRM (Zhou et al. 2024); its activations on few bits are left out.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slipstream.embedding.quantized.numbers import (
    check_bits,
    check_choice,
    check_finite,
    check_stored_dtype,
    dequantize,
    fake_quantize_rows,
    float_dtype,
    pack,
    quantize,
    scale_for,
    storage_dtype,
    unpack,
    values_per_byte,
)

LinearScale = Literal["channel", "matrix"]


def _check_grid(bits: int, scale_per: str) -> None:
    check_bits(bits)
    check_choice("scale_per", scale_per, ("channel", "matrix"))


class QuantizedLinear(nn.Linear):
    """An `nn.Linear` whose weight is rounded to the grid at every forward.

    One scale per output channel or for the whole matrix, exact at every call, in training and evaluation.
    Straight-through gradients reach the float weight, which any torch optimizer updates. NaN weights are not
    refused here (that would make a GPU wait at each step): they give NaN outputs, and `pack` refuses them.

    The bias stays float unless asked for: it is a vector, and rounding it saves next to nothing. Rounded, it goes
    to the grid of the weights, as DQRM has it, so that the sum is one of integers; a bias beyond the largest
    weight of its channel then saturates.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether to add a bias.
        bits: 16, 8, 4 or 2.
        scale_per: "channel" (one per output) or "matrix".
        quantize_bias: Whether the bias is rounded too, to the grid of the weights.
        device: Where to put the parameters.
        dtype: float32 or float64.

    Raises:
        ValueError: An option is not in its set.

    Source: DQRM section 3 and its released code, the linear layers; its activations on few bits are left out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        scale_per: LinearScale = "channel",
        quantize_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_grid(bits, scale_per)
        super().__init__(in_features, out_features, bias, device=device, dtype=float_dtype(dtype))
        self.bits = bits
        self.scale_per = scale_per
        self.quantize_bias = quantize_bias

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, bits: int = 4, scale_per: LinearScale = "channel", quantize_bias: bool = False
    ) -> "QuantizedLinear":
        """Wrap the parameters of a linear layer, without copying them.

        Args:
            linear: The layer; its parameters are shared.
            bits: 16, 8, 4 or 2.
            scale_per: "channel" or "matrix".
            quantize_bias: Whether the bias is rounded too.

        Returns:
            A layer in the same training mode.

        Raises:
            ValueError: An option is not in its set.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            bits=bits,
            scale_per=scale_per,
            quantize_bias=quantize_bias,
            device="meta",
            dtype=linear.weight.dtype,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def _scale(self) -> Tensor:
        weight = self.weight.detach()
        if self.scale_per == "channel":
            return scale_for(torch.maximum(weight.amax(1), -weight.amin(1)), self.bits)
        return scale_for(torch.maximum(weight.amax(), -weight.amin()), self.bits)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is that of nn.Linear)
        """Multiply with the rounded weight and add the bias.

        Args:
            input: Shape (..., in_features).

        Returns:
            Shape (..., out_features).
        """
        scale = self._scale()
        bias: Tensor | None = self.bias
        if self.quantize_bias and bias is not None:
            bias = fake_quantize_rows(bias, scale, self.bits)
        return F.linear(input, fake_quantize_rows(self.weight, scale, self.bits), bias)

    def pack(self) -> "PackedLinear":
        """Keep only the integers.

        Returns:
            A layer whose outputs equal those of this one to the bit; a bias that is not rounded is copied.

        Raises:
            ValueError: A weight, or a bias to be rounded, is not finite.
        """
        weight = self.weight.detach()
        check_finite(weight, "weights")
        packed = PackedLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            bits=self.bits,
            scale_per=self.scale_per,
            quantize_bias=self.quantize_bias,
            device=weight.device,
            dtype=weight.dtype,
        )
        scale = self._scale()
        packed.packed.copy_(_pack_padded(quantize(weight, scale, self.bits), self.bits))
        packed.scale.copy_(scale)
        if packed.packed_bias is not None:
            packed.packed_bias.copy_(_pack_padded(quantize(self.bias.detach(), scale, self.bits), self.bits))
        elif packed.bias is not None:
            packed.bias.copy_(self.bias.detach())
        return packed

    def extra_repr(self) -> str:
        """Describe the layer in one line.

        Returns:
            The line of nn.Linear, bits and scale.
        """
        line = f"{super().extra_repr()}, bits={self.bits}, scale_per={self.scale_per}"
        return f"{line}, quantize_bias=True" if self.quantize_bias else line


class PackedLinear(nn.Module):
    """A linear layer for inference, its weight stored on the bits it has.

    The weight takes out_features * ceil(in_features * bits / 8) bytes: unlike a table's, the last byte of a
    row may be part empty, since 13 dense features are what they are. It is unpacked at every call, so this
    saves memory, not time.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether there is a bias.
        bits: 16, 8, 4 or 2.
        scale_per: "channel" or "matrix".
        quantize_bias: Whether the bias is stored on the same bits, and not in float.
        device: Where to put it.
        dtype: float32 or float64, of the output.

    Raises:
        ValueError: An option is not in its set.
    """

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    packed_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        scale_per: LinearScale = "channel",
        quantize_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_grid(bits, scale_per)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.dtype = float_dtype(dtype)
        scales = (out_features,) if scale_per == "channel" else ()

        def on_bits(*shape: int) -> Tensor:
            *rows, columns = shape
            return torch.zeros(*rows, -(-columns // values_per_byte(bits)), dtype=storage_dtype(bits), device=device)

        floats = torch.zeros(out_features, dtype=self.dtype, device=device) if bias and not quantize_bias else None
        self.register_buffer("packed", on_bits(out_features, in_features))
        self.register_buffer("scale", torch.ones(scales, dtype=torch.float32, device=device))
        self.register_buffer("bias", floats)
        self.register_buffer("packed_bias", on_bits(out_features) if bias and quantize_bias else None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is that of nn.Linear)
        """Unpack the weight, multiply and add the bias.

        Args:
            input: Shape (..., in_features).

        Returns:
            Shape (..., out_features).
        """
        return F.linear(input, self._weight(), self._bias())

    def to_float(self) -> nn.Linear:
        """Give the plain layer that computes the same."""
        bias = self._bias()
        layer = nn.Linear(
            self.in_features, self.out_features, bias is not None, device=self.packed.device, dtype=self.dtype
        )
        with torch.no_grad():
            layer.weight.copy_(self._weight())
            if bias is not None:
                layer.bias.copy_(bias)
        return layer.requires_grad_(False)

    def _weight(self) -> Tensor:
        q = unpack(self.packed, self.bits)[:, : self.in_features]
        return dequantize(q, self.scale.to(torch.float32), self.dtype)

    def _bias(self) -> Tensor | None:
        if self.packed_bias is None:
            return self.bias
        q = unpack(self.packed_bias, self.bits)[: self.out_features]
        return dequantize(q, self.scale.to(torch.float32), self.dtype)

    def memory_bytes(self) -> int:
        """Count the bytes of integers, scales and bias.

        Returns:
            Bytes.
        """
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        check_stored_dtype(state_dict, prefix, self.bits, args)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _pack_padded(q: Tensor, bits: int) -> Tensor:
    """Pack integers, filling up the last byte of each row with zeros. Shape (..., n)."""
    return pack(F.pad(q, (0, -q.shape[-1] % values_per_byte(bits))), bits)


def quantize_linears(
    module: nn.Module,
    bits: int = 4,
    *,
    scale_per: LinearScale = "channel",
    quantize_bias: bool = False,
    skip: Collection[str] = (),
) -> list[str]:
    """Put a `QuantizedLinear` in the place of every `nn.Linear` inside a module.

    Parameters are shared, not copied, so an optimizer made before goes on working and state dicts keep their
    keys. Subclasses of `nn.Linear` are left alone: their owners rely on what they are. A layer that occurs
    twice in the module is replaced by one layer that occurs twice.

    Args:
        module: Changed in place.
        bits: 16, 8, 4 or 2.
        scale_per: "channel" or "matrix".
        quantize_bias: Whether biases are rounded too, to the grids of their weights.
        skip: Names, as `named_modules` gives them, of layers to leave in float.

    Returns:
        Names of the layers that were replaced.

    Raises:
        ValueError: An option is not in its set, `module` is itself an `nn.Linear`, or a name in `skip` is not
            that of a linear layer inside it. Nothing is changed then.
    """
    _check_grid(bits, scale_per)
    if type(module) is nn.Linear:
        raise ValueError(
            "quantize_linears: expected a module that contains nn.Linear layers, found an nn.Linear; "
            "use QuantizedLinear.from_linear"
        )
    found = {name: layer for name, layer in module.named_modules(remove_duplicate=False) if type(layer) is nn.Linear}
    unknown = sorted(set(skip) - set(found))
    if unknown:
        raise ValueError(f"skip: expected names of linear layers, {sorted(found)}, found {unknown}; fix the names")
    replaced: dict[nn.Linear, QuantizedLinear] = {}
    for name, linear in found.items():
        if name in skip:
            continue
        if linear not in replaced:
            replaced[linear] = QuantizedLinear.from_linear(
                linear, bits=bits, scale_per=scale_per, quantize_bias=quantize_bias
            )
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, replaced[linear])
    return [name for name in found if name not in skip]
