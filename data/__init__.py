"""Label files, video files, frame choice, perturbations and prompts. Knows nothing of models, rewards or training."""
