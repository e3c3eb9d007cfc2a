"""Weights that lie in an ONNX file: read without the onnx package, turned back into floats, named as transformers names them."""
