"""Products on tensor cores with the precision that the loss needs. All ``tl.dot`` are in this file.

Half-precision maps are multiplied exactly and accumulated in fp32. fp32 maps are multiplied as
``PRECISION`` says: ``"tf32x3"`` (three products, fp32-accurate) or ``"tf32"`` (one, 11 bits). A
residual, which a kernel has computed, is fp32. For a product with a half-precision map it is
rounded once: to bf16 if the gradient is bf16, else to TF32. TF32 holds half-precision maps exactly
and has the range of fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# In the interpreter bf16 is widened, because it would compute on the raw bits (triton issue 11584).
# It also truncates fp32 where a GPU rounds.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LARGEST_BF16 = tl.constexpr((2 - 2**-7) * 2.0**127)
# The smallest fp32 number that rounding to TF32 would make infinite: it is nearer to 2^128 than to
# the largest number of TF32.
ROUNDED_TO_INF = tl.constexpr((2 - 2**-11) * 2.0**127)


@triton.jit
def multiply(x, y, accumulator, PRECISION: tl.constexpr):
    """``accumulator + x @ y`` for two tiles of maps, of the same dtype or not."""
    if x.dtype == tl.float32 or y.dtype == tl.float32:
        x, y = _operand(x, PRECISION), _operand(y, PRECISION)
        result = tl.dot(x, y, accumulator, input_precision=PRECISION)
    elif x.dtype != y.dtype or INTERPRETED:  # fp16 and bf16: TF32 holds both exactly
        result = tl.dot(x.to(tl.float32), y.to(tl.float32), accumulator, input_precision="tf32")
    else:
        result = tl.dot(x, y, accumulator)
    return result


@triton.jit
def multiply_computed(x, y, accumulator, OWN: tl.constexpr, PRECISION: tl.constexpr):
    """``accumulator + x @ y`` for a computed ``x`` and a tile ``y`` of a map.

    ``OWN`` is the dtype of the gradient, to which the accumulated result will be rounded.
    """
    if x.dtype == y.dtype and x.dtype != tl.float32:  # already rounded
        result = multiply(x, y, accumulator, PRECISION)
    elif y.dtype == tl.bfloat16 and tl.bfloat16 == OWN:
        result = multiply(cast_finite(x), y, accumulator, PRECISION)
    elif y.dtype != tl.float32:
        result = tl.dot(round_to_tf32(x), y.to(tl.float32), accumulator, input_precision="tf32")
    else:
        if PRECISION == "tf32":
            x = round_to_tf32(x)
        result = multiply(x, y, accumulator, PRECISION)
    return result


@triton.jit
def _operand(x, PRECISION: tl.constexpr):
    """``x`` as an operand of an fp32 ``tl.dot``. The dot will not turn finite elements into Inf."""
    if PRECISION == "tf32x3" and x.dtype == tl.float32:
        # The dot rounds its first term to TF32 by adding half an ulp, which may overflow.
        cut = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < ROUNDED_TO_INF, x, cut)
    return x.to(tl.float32)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 ``x``, rounded to the nearest number of ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def cast_finite(x):
    """fp32 ``x``, rounded to bf16. Finite numbers stay finite."""
    top = tl.where(x < 0, -LARGEST_BF16, LARGEST_BF16)
    beyond = (tl.abs(x) > LARGEST_BF16) & (tl.abs(x) < float("inf"))
    return cast(tl.where(beyond, top, x), tl.bfloat16)


@triton.jit
def round_to_tf32(x):
    """fp32 ``x``, rounded to the 11 bits of TF32. Tensor cores would truncate, which is biased.

    Where rounding would turn a finite ``x`` into Inf, ``x`` is unchanged; tensor cores truncate it.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < ROUNDED_TO_INF, rounded, x)
