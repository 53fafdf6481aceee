"""The names of dtypes for models and embeddings; a parser can import them without JAX or NumPy."""

DTYPES = ("float32", "bfloat16", "int8")
"""The dtypes that ``load`` takes."""

OUTPUTS = ("float32", "bfloat16", "float16", "int8", "binary", "ubinary")
"""The outputs that ``Encoder.encode`` takes."""

FILE_OUTPUTS = tuple(output for output in OUTPUTS if output != "bfloat16")
"""The outputs that .npy and Parquet files can hold: neither supports bfloat16."""


STORED_DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes that the weights of a model folder can have."""


def float_dtype(dtype: str) -> str:
    """The dtype of everything but the projections in a model loaded in ``dtype``."""
    return "bfloat16" if dtype == "int8" else dtype
