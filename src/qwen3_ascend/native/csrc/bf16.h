/* bfloat16 as the upper half of a float32. */
#ifndef QWEN3_ASCEND_BF16_H
#define QWEN3_ASCEND_BF16_H

#include <stdint.h>
#include <string.h>

static inline __attribute__((always_inline)) float from_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The nearest one, half to even; what is not a number stays so. */
static inline __attribute__((always_inline)) uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

#endif
