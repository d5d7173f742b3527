"""Benchmarks of our code against other projects. They run from a checkout and are not installed. See README.md."""
