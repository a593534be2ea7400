/* The sizes that images are laid out by: what packers write and kernels read must agree on. */
#ifndef PADST_LAYOUT_H
#define PADST_LAYOUT_H

#define CHUNK 32  /* outputs of a run of a diagonal (diag.h) */
#define NM_ROWS 8 /* outputs of a panel, one a lane (nm.h) */
#define STRIP 16  /* outputs that a column of a block is cut into (block.h) */

/* Bits of an N:M index within its 32-bit word. */
static inline int nm_index_bits(int m) { return m <= 4 ? 2 : m <= 16 ? 4 : 8; }
#endif
