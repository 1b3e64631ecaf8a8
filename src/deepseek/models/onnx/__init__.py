"""ONNX files as models: read and checked, turned into PyTorch where every operator is known, run as they are elsewhere."""
