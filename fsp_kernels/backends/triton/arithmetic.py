"""Products on tensor cores that keep what the loss needs: one place for every ``tl.dot``.

Half-precision maps are multiplied as they are, exactly, into fp32. fp32 maps are multiplied as
``PRECISION`` says: ``"tf32x3"`` (three products, fp32-accurate) or ``"tf32"`` (one, 11 bits). What
a kernel computed itself, a residual, is fp32. Beside half-precision maps it is rounded once: to
bf16 for a gradient of bf16, else to TF32, which holds such maps exactly and has the range of fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter computes on the raw bits of bf16 (triton issue 11584), so they are widened there;
# and it cuts fp32 off where a GPU rounds.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LARGEST_BF16 = tl.constexpr((2 - 2**-7) * 2.0**127)
# The smallest fp32 number that is nearer to 2^128 than to the largest number of TF32.
ROUNDED_TO_INF = tl.constexpr((2 - 2**-11) * 2.0**127)


@triton.jit
def multiply(x, y, accumulator, PRECISION: tl.constexpr):
    """``accumulator + x @ y`` for two tiles of maps, of one dtype or of two."""
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
    """``accumulator + x @ y`` for an ``x`` that was computed and a tile ``y`` of a map.

    ``OWN`` is the dtype of the result, once it is accumulated: the gradient's.
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
    """An operand of an fp32 ``tl.dot``, such that no finite element is Inf in there."""
    if PRECISION == "tf32x3" and x.dtype == tl.float32:
        # Its first term is rounded to TF32, by adding half an ulp to the bits.
        cut = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < ROUNDED_TO_INF, x, cut)
    return x.to(tl.float32)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 ``x`` to the nearest of ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def cast_finite(x):
    """fp32 ``x`` to the nearest of bf16 that is finite if ``x`` is."""
    top = tl.where(x < 0, -LARGEST_BF16, LARGEST_BF16)
    beyond = (tl.abs(x) > LARGEST_BF16) & (tl.abs(x) < float("inf"))
    return cast(tl.where(beyond, top, x), tl.bfloat16)


@triton.jit
def round_to_tf32(x):
    """To the nearest of 11 bits; tensor cores would cut the rest off, which is biased.

    Where rounding would make Inf of a finite ``x``, the rest is left to be cut off.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < ROUNDED_TO_INF, rounded, x)
