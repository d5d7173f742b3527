"""Tandem's trainer: from one YAML file to a trained, resumable, exportable model. Start reading at `train.py`."""
