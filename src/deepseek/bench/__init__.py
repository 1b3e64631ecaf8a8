"""The benchmark behind `deepseek benchmark`: one model as several generations, precisions or backends, side by side."""
