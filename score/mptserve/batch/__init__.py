"""Scoring of whole files: rows in, the same engine as online, one file of results for each file of input.

files → readers → rows → (service) → flow → results, summary.  job.py shows the way of a mini-batch on one screen.
"""
