"""The process: who started it, its signals, its logging and its exit. Nothing here depends on what is trained."""
