"""Where metrics go: the terminal, the run's own file, TensorBoard, Weights & Biases, MLflow."""
