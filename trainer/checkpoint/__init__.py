"""Checkpoints: state stored by global name and offset, committed with a marker file, and readable at any tp and dp size."""
