"""Models: loading, quantization, blocks, losses over hidden states; without torch, the size of a chunk of these losses."""

CHUNK_BYTES = 16 * 2**20  # of a chunk's float32 logits on a CPU: about the size of its last-level cache
GPU_CHUNK_BYTES = 256 * 2**20  # on a GPU large matrix products matter more than memory
MIN_CHUNK_ROWS = 128  # each chunk reads the complete weight, which takes longer than the product with fewer rows


def rows_per_chunk(vocabulary: int, width: int, trainable: bool, on_cpu: bool) -> int:
    """As many as keep the logits in the cache, but enough that reading the weight of the head does not dominate.

    For a trainable weight each chunk also reads and writes its gradient, which is as large as H rows of logits: H/4 rows per
    chunk need little memory in comparison.
    """
    size = CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES
    return max(MIN_CHUNK_ROWS, size // (4 * vocabulary), width // 4 if trainable else 0)
