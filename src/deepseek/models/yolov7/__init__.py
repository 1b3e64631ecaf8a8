"""YOLOv7: objects in images, as boxes with a class and a confidence."""
