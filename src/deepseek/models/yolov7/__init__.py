"""YOLOv7: objects in pictures, as boxes with a class and a confidence."""
