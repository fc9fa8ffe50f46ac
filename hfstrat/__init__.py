"""hfstrat: fine-tuning strategies on the Hugging Face Trainer."""

__version__ = "0.1.0"
