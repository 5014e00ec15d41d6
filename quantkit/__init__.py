"""Mixed-precision post-training quantization: your model, your limit, a file you can deploy."""

__version__ = "0.1.0"
