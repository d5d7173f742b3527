"""Weights in and out of Hugging Face folders; `convert` is the door, the tables say which tensor is which."""
