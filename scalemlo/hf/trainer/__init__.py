"""``MLOTrainer`` and ``ReweightingTrainer``, with arguments, callbacks, checkpoints and cards."""
