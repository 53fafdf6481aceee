"""The released sizes (paper arXiv:2603.19223, Table 1)."""

from f2llm_jax.config import ModelConfig


def _size(hidden: int, mlp: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=1e6,
    )


MODELS: dict[str, ModelConfig] = {
    "80M": _size(320, 2048, 8, 16),
    "160M": _size(640, 1536, 9, 16),
    "330M": _size(896, 2560, 16, 16),
    "0.6B": _size(1024, 3072, 28, 16),
    "1.7B": _size(2048, 6144, 28, 16),
    "4B": _size(2560, 9728, 36, 32),
    "8B": _size(4096, 12288, 36, 32),
    "14B": _size(5120, 17408, 40, 40),
}
