"""Models and adapters of transformers and peft: loading, preparing, saving."""
