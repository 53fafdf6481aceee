"""What embeddings may be given as, by name: a parser need not import NumPy for it."""

OUTPUTS = ("float32", "bfloat16", "float16", "int8", "binary", "ubinary")

FILE_OUTPUTS = tuple(output for output in OUTPUTS if output != "bfloat16")
"""Those that .npy and Parquet files can hold: neither knows bfloat16."""
