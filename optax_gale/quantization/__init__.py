"""Arrays in 8 and 4 bits: pure functions, which know nothing of optimizers.

`quantize` divides an array into blocks along its last axis and stores every element as the nearest
number of a *code*, relative to the largest of its block: the dynamic code of 8-bit optimizers,
signed or not, for optimizer states, and evenly spaced ones of 8 and 4 bits, for projectors.
"""

from optax_gale.quantization.blockwise import (
    BLOCK_SIZE,
    Quantized,
    dequantize,
    quantize,
    quantized_nbytes,
)
from optax_gale.quantization.codes import CodeName, dynamic_map
from optax_gale.quantization.packing import pack, unpack

__all__ = [
    "BLOCK_SIZE",
    "CodeName",
    "Quantized",
    "dequantize",
    "dynamic_map",
    "pack",
    "quantize",
    "quantized_nbytes",
    "unpack",
]
