"""Benchmarks: `cases` measure, `harness` is what they share, `publish` draws plots and writes the documents' tables."""
