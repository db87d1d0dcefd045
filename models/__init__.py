"""GLM in PyTorch and the engine that runs it. Knows nothing of Ray, files of rows, jobs."""
