"""From raw click logs to a trained model, with only the rows that matter next to the accelerator."""

__version__ = "0.1.0"
