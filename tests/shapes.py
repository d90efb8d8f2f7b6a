"""The one list of layer shapes for tests and benchmarks, each with its reason."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A quantized layer: K in features, N out features, rows of K that share scales, bits, why it is here."""

    size_k: int
    size_n: int
    group_size: int
    bits: int
    reason: str

    def __str__(self):
        return f"b{self.bits}_k{self.size_k}_n{self.size_n}_g{self.group_size}"

    @property
    def num_groups(self):
        return 1 if self.group_size == -1 else -(-self.size_k // self.group_size)


#: Exact in the layout, and small enough to repack with the slowest implementation.
SMALL_SHAPES = (
    Shape(16, 64, -1, 4, "one tile, 4 bits"),
    Shape(16, 64, -1, 8, "one tile, 8 bits"),
    Shape(32, 64, 32, 4, "the smallest group, and a single one"),
    Shape(64, 64, 32, 4, "two groups, one column of tiles"),
    Shape(64, 128, 64, 4, "aligned only by the wide rule: K a multiple of 64, N of 128; a single group"),
    Shape(128, 64, 128, 4, "the least shape of the strict rule; g = K, so scales are in blocks of 32"),
    Shape(128, 64, 128, 8, "the same, 8 bits"),
    Shape(256, 192, 128, 4, "N an odd number of tiles, the commonest group size"),
    Shape(192, 128, 64, 8, "K an odd multiple of 64"),
    Shape(256, 256, -1, 4, "one group over all of K, several tiles each way"),
    Shape(96, 192, 32, 8, "exact but unaligned, odd numbers of tiles each way"),
)

#: Layers of models that people run: what conversion must be fast for.
MODEL_SHAPES = (
    Shape(576, 1536, 64, 4, "SmolLM2-135M gate and up: aligned by the wide rule alone"),
    Shape(1536, 576, 64, 4, "SmolLM2-135M down: N = 576 is no multiple of 128"),
    Shape(3584, 512, 128, 4, "Qwen2-7B key and value: converting makes the header longer"),
    Shape(4096, 1024, 128, 4, "Llama-3-8B key and value"),
    Shape(4096, 4096, 128, 4, "Llama-3-8B query and output"),
    Shape(4096, 14336, 128, 4, "Llama-3-8B gate and up, the widest"),
    Shape(14336, 4096, 128, 4, "Llama-3-8B down, the deepest"),
    Shape(10944, 2048, 64, 4, "DeepSeek-V2-Lite's dense down: K = 10944 is a multiple of 64, not of 128"),
    Shape(4096, 4096, 128, 8, "8 bits, at the size of Llama-3-8B"),
)

#: What Marlin cannot take as it is: kept in AWQ layout, or padded.
UNALIGNED_SHAPES = (
    Shape(576, 576, 64, 4, "SmolLM2-135M query and output: both sides odd multiples of 64; padding's products tie"),
    Shape(576, 192, 64, 4, "SmolLM2-135M key and value"),
    Shape(1024, 48, 128, 4, "N = 48, narrower than a tile"),
    Shape(1024, 96, 128, 4, "N = 96, a tile and a half"),
    Shape(10944, 576, 64, 4, "K = 10944 needs N a multiple of 128"),
    Shape(10944, 2048, 128, 4, "K = 10944 is no multiple of the group"),
    Shape(72, 200, -1, 8, "nothing divides anything: K cuts a tile, N cuts a tile"),
    Shape(100, 40, 32, 4, "the last group is not full"),
)

SHAPES = SMALL_SHAPES + MODEL_SHAPES + UNALIGNED_SHAPES
