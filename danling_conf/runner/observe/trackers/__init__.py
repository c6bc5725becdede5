"""Trackers of metrics: the terminal, the run's own file, TensorBoard, Weights & Biases, MLflow."""
