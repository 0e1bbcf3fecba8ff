"""Device functions that turn a product `hidden . weight[j]` into a logit."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # A Taylor series near 0, where 1 - e^-2x cancels.
    size = tl.abs(x)
    square = x * x
    e = tl.exp(-2.0 * size)
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    y = tl.where(size < 0.3, size * series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -y, y)


@triton.jit
def transform(products, scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """Logits from float32 products with the bias already added; elementwise on any shape."""
    if SOFTCAP:
        return tanh(products * (scale / softcap)) * (softcap * inv_temperature)
    else:
        return products * (scale * inv_temperature)


@triton.jit
def slope(logits, softcap, inv_temperature):
    """The softcap's derivative `1 - tanh^2`, recovered from its output; 0 where a logit was replaced by -inf."""
    y = logits / (softcap * inv_temperature)
    return tl.maximum(1.0 - y * y, 0.0)


@triton.jit
def finite(maximum):
    """Replaces a maximum of -inf by 0, so that `exp(z - maximum)` never evaluates `inf - inf`."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
