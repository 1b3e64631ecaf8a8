"""Residual convolutional networks for image classification, from 18 to 152 layers."""
