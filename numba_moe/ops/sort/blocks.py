"""Count each expert's slots in earlier blocks, from counts in memory or from the other blocks of the cluster."""

from numba_moe.device.dialect import cuda, int32, int64
from numba_moe.device.instructions import atomic_add, load_words, of_block, quotient, store_words
from numba_moe.device.primitives import WARP

# Number of 16-byte loads of counts that a thread starts at once.
ROW_BATCH = 4
ROW_BATCH_WORDS = 4 * ROW_BATCH


@cuda.jit(device=True)
def sum_blocks(block_counts, stride, first, size, in_earlier, in_all):
    """Add the counts of earlier blocks to in_earlier[:size], and the counts of all blocks to in_all[:size].

    A thread takes eight experts of every `rows`-th block. It adds the two counts in a word as one number, which cannot
    overflow within a batch.
    """
    words = cuda.local.array(ROW_BATCH_WORDS, int32)
    pairs = cuda.local.array(8, int32)  # four words for the earlier blocks of a batch, four for all blocks
    sums = cuda.local.array(16, int32)
    for i in range(16):
        sums[i] = 0
    thread = int32(cuda.threadIdx.x)
    mine = int32(cuda.blockIdx.x)
    last = int32(cuda.gridDim.x - 1)
    groups = int32((size + 7) >> 3)
    rows = quotient(cuda.blockDim.x, groups)
    row = quotient(thread, groups)
    expert = int32((thread - row * groups) * 8)
    if row < rows:
        while row <= last:
            for turn in range(ROW_BATCH):
                block = min(int32(row + turn * rows), last)
                four = load_words(block_counts, int64(block) * stride + first + expert)
                for i in range(4):
                    words[4 * turn + i] = four[i]
            for i in range(8):
                pairs[i] = 0
            for turn in range(ROW_BATCH):
                block = int32(row + turn * rows)
                for i in range(4):
                    if block < mine:
                        pairs[i] = int32(pairs[i] + words[4 * turn + i])
                    if block <= last:
                        pairs[4 + i] = int32(pairs[4 + i] + words[4 * turn + i])
            for i in range(16):
                sums[i] = int32(sums[i] + ((pairs[i // 2] >> (16 * (i % 2))) & 0xFFFF))
            row = int32(row + ROW_BATCH * rows)
        for i in range(8):
            atomic_add(in_earlier, expert + i, sums[i])
            atomic_add(in_all, expert + i, sums[8 + i])


@cuda.jit(device=True)
def gather_counts(in_blocks, chunk, blocks):
    """Read the row of in_blocks [blocks, chunk] that each block of the cluster wrote; a warp reads two at once."""
    none = int32(0)
    warps = int32(cuda.blockDim.x >> 5)
    one = int32(cuda.threadIdx.x >> 5)
    while one < blocks:
        other = int32(one + warps)
        word = int32(cuda.laneid << 3)
        while word < chunk:
            place = int32(one * chunk + word)
            other_place = int32(other * chunk + word)
            words = load_words(of_block(in_blocks, one), place)
            other_words = (none, none, none, none)
            if other < blocks:
                other_words = load_words(of_block(in_blocks, other), other_place)
            if one != cuda.blockIdx.x:
                store_words(in_blocks, place, words)
            if other < blocks and other != cuda.blockIdx.x:
                store_words(in_blocks, other_place, other_words)
            word = int32(word + (WARP << 3))
        one = int32(one + 2 * warps)


@cuda.jit(device=True)
def sum_cluster(in_blocks, chunk, block, blocks, expert):
    """Return an expert's counts in earlier blocks of the cluster, and in all its blocks."""
    counts = cuda.local.array(8, int32)
    before = int32(0)
    total = int32(0)
    other = int32(0)
    cell = expert
    while other < blocks:
        for i in range(8):
            counts[i] = in_blocks[int32(cell + i * chunk)]
        for i in range(8):
            if int32(other + i) < block:
                before = int32(before + counts[i])
            if int32(other + i) < blocks:
                total = int32(total + counts[i])
        other = int32(other + 8)
        cell = int32(cell + 8 * chunk)
    return before, total
