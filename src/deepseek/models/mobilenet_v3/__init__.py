"""MobileNetV3, large and small: image classification for processors with little to spend."""
