"""Dense prediction: a class for each pixel (`--task segment`)."""
