"""What models are loaded in and embeddings given as, by name: a parser need import neither JAX nor NumPy for it."""

DTYPES = ("float32", "bfloat16", "int8")
"""Of ``load``."""

OUTPUTS = ("float32", "bfloat16", "float16", "int8", "binary", "ubinary")
"""Of ``Encoder.encode``."""

FILE_OUTPUTS = tuple(output for output in OUTPUTS if output != "bfloat16")
"""Those that .npy and Parquet files can hold: neither knows bfloat16."""


STORED_DTYPES = ("float32", "bfloat16", "float16")
"""Of the weights that a model folder can hold."""


def float_dtype(dtype: str) -> str:
    """Of all but the projections, in a model loaded in ``dtype``."""
    return "bfloat16" if dtype == "int8" else dtype
