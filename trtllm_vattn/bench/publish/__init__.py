"""Plots, and the tables of the documents, from results."""
