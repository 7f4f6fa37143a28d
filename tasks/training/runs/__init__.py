"""Records of trainings: their MLflow runs, inputs and results."""
