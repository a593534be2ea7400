/* Activations of sums, before they leave the kernel: as torch has them, in float32.
 *   gelu       x Phi(x), by erfc(z) = t (a1 + a2 t + ... + a5 t^4) exp(-z^2), t = 1 / (1 + p z), z >= 0, to 1.5e-7
 *              (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26)
 *   gelu_tanh  x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, 2016, with tanh written out)
 *   silu       x / (1 + exp(-x))
 */
#ifndef PADST_ACTIVATION_H
#define PADST_ACTIVATION_H

#include "simd.h"

INLINE vec choose(uvec where, vec yes, vec no) { return (vec)(((uvec)yes & where) | ((uvec)no & ~where)); }

/* exp(x), finite for every finite x: 2^n e^r with n the whole part of x / ln 2 and |r| <= ln 2 / 2; ln 2 in two parts, so that
 * n ln 2 is exact, and e^r by its series to r^6. NaN stays NaN. */
INLINE vec exponential(vec x) {
    const vec magic = splat(0x1.8p23f); /* floats there have no fraction: adding it rounds, and n stands in the low bits */
    x = choose((uvec)(x > splat(88.0f)), splat(88.0f), x);
    x = choose((uvec)(x < splat(-87.0f)), splat(-87.0f), x);
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f, p = splat(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((uvec)p + ((uvec)shifted << 23));
}

INLINE vec gelu(vec x) {
    const vec zero = splat(0);
    vec size = (vec)((uvec)x & 0x7fffffffu), t = 1.0f / (1.0f + size * (0.3275911f * 0.707106781f));
    vec p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return choose((uvec)(x < zero), zero, x) - 0.5f * size * t * p * exponential(-0.5f * x * x);
}

INLINE vec activated(vec x, int activation) {
    if (activation == PADST_GELU) return gelu(x);
    if (activation == PADST_GELU_TANH) return x / (1.0f + exponential(x * (-1.59576912f - 0.0713548163f * x * x)));
    return x / (1.0f + exponential(-x));
}

/* `count` neighbouring sums, rounded up to whole vectors: f(sum + shift). */
INLINE void activate(float *sums, long count, float shift, int activation) {
    for (long i = 0; i < count; i += LANES) storef(sums + i, activated(loadf(sums + i) + shift, activation));
}
#endif
