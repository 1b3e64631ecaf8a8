"""What the tests of vision transformers share."""

from deepseek.models.vit.model import ViTConfig

SMALL = ViTConfig(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_size=24, mlp_size=40, num_classes=5)
