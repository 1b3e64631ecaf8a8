"""ONNX files as models: read and checked, and turned into PyTorch where every operator is known."""
