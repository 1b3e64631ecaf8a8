"""What `deepseek benchmark` runs: one model as several generations, precisions or backends, side by side."""
